package localfs

import (
	"os"
	"slices"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/wsl2/wsl2/internal/p9"
)

// TestMetadata: owners and modes of the client's are kept, and change nothing here.
func TestMetadata(t *testing.T) {
	ctx := t.Context()
	uid, gid := uint32(os.Geteuid()), uint32(os.Getegid())
	root, dir := share(t, Config{Untrusted: true, Metadata: true, Owner: &p9.Owner{UID: uid, GID: gid, ClientUID: 1000, ClientGID: 1001}})
	f := create(t, root, "f", "text")
	attr := func(f *p9.File) [3]uint32 {
		a := must(f.GetAttr(ctx, p9.AttrBasic))(t)
		return [3]uint32{a.UID, a.GID, a.Mode & 0o7777}
	}
	if got := attr(f); got != [3]uint32{1000, 1001, 0o644} {
		t.Errorf("a new file is %o", got)
	}
	check(t, f.SetAttr(ctx, p9.SetAttr{Valid: p9.SetMode, Mode: 0o4400}))
	check(t, f.SetAttr(ctx, p9.SetAttr{Valid: p9.SetGID, GID: 4}))
	if got := attr(f); got != [3]uint32{1000, 4, 0o400} {
		t.Errorf("after chmod and chgrp it is %o", got)
	}
	check(t, f.SetAttr(ctx, p9.SetAttr{Valid: p9.SetUID | p9.SetGID | p9.SetMode | p9.SetSize, UID: 0, GID: 0, Mode: 0o4755, Size: 2}))
	if got := attr(f); got != [3]uint32{0, 0, 0o4755} {
		t.Errorf("after chown it is %o", got)
	}
	var st unix.Stat_t
	check(t, unix.Stat(dir+"/f", &st))
	if st.Uid != uid || st.Mode&0o7777 != 0o644 || st.Size != 2 {
		t.Errorf("here it is %d's, %o, %d bytes", st.Uid, st.Mode, st.Size)
	}
	// What is made without rights for its owner can be changed all the same.
	must(root.Mkdir(ctx, "d", 0o555, 0))(t)
	d := must(root.Walk(ctx, "d"))(t)
	if got := attr(d); got != [3]uint32{1000, 1001, 0o555} {
		t.Errorf("the directory is %o", got)
	}
	check(t, d.SetAttr(ctx, p9.SetAttr{Valid: p9.SetUID, UID: 7}))
	g := must(root.Walk(ctx))(t)
	check(t, g.Create(ctx, "g", os.O_RDWR, 0o444, 0))
	check(t, g.SetAttr(ctx, p9.SetAttr{Valid: p9.SetMode, Mode: 0o440}))
	if got := attr(g); got != [3]uint32{1000, 1001, 0o440} {
		t.Errorf("the read-only file is %o", got)
	}
	// The attribute is not the client's to see or to write.
	check(t, f.SetXattr(ctx, "user.a", []byte("x"), 0))
	if list := must(f.Xattr(ctx, ""))(t); !slices.Equal(list, []byte("user.a\x00")) {
		t.Errorf("the list is %q", list)
	}
	want(t, "set it", f.SetXattr(ctx, metadataName, []byte("0 0 777"), 0), unix.EOPNOTSUPP)
	want(t, "read it", second(f.Xattr(ctx, metadataName)), unix.EOPNOTSUPP)
	// What somebody else has put there means nothing.
	check(t, unix.Setxattr(dir+"/f", metadataName, []byte("root"), 0))
	if got := attr(f); got != [3]uint32{1000, 1001, 0o644} {
		t.Errorf("with nonsense it is %o", got)
	}
}

// TestMasks: permissions that are masked are not there for the client.
func TestMasks(t *testing.T) {
	root, dir := share(t, Config{FileMask: 0o133, DirMask: 0o027})
	check(t, os.WriteFile(dir+"/f", nil, 0o777))
	check(t, os.Mkdir(dir+"/d", 0o777))
	check(t, os.Symlink("f", dir+"/l"))
	for name, mode := range map[string]uint32{"f": unix.S_IFREG | 0o644, "d": unix.S_IFDIR | 0o750, "l": unix.S_IFLNK | 0o777} {
		if a := must(must(root.Walk(t.Context(), name))(t).GetAttr(t.Context(), p9.AttrBasic))(t); a.Mode != mode {
			t.Errorf("%s is %o, want %o", name, a.Mode, mode)
		}
	}
}
