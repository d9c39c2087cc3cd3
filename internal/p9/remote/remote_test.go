package remote

import (
	"context"
	"errors"
	"net"
	"os"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/wsl2/wsl2/internal/p9"
	"github.com/wsl2/wsl2/internal/p9/localfs"
)

// tree serves a new directory and returns its root, as it is at the other end.
func tree(t *testing.T) (root p9.Node, dir string) {
	t.Helper()
	dir = t.TempDir()
	fs, err := localfs.New(dir, localfs.Config{})
	check(t, err)
	ours, theirs := net.Pipe()
	served := make(chan error, 1)
	go func() { served <- p9.Serve(context.Background(), theirs, fs, p9.Config{}) }()
	c, err := p9.NewClient(t.Context(), ours, 0)
	check(t, err)
	f, err := c.Attach(t.Context(), "", "", 0)
	check(t, err)
	t.Cleanup(func() {
		c.Close()
		check(t, <-served)
		fs.Close()
	})
	return Root(context.Background(), f), dir
}

func check(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func walk(t *testing.T, n p9.Node, name string) p9.Node {
	t.Helper()
	child, err := n.Walk(name)
	check(t, err)
	return child
}

// TestNode: each operation shows at the other end.
func TestNode(t *testing.T) {
	root, dir := tree(t)
	_, err := root.Mkdir("d", 0o755, 0)
	check(t, err)
	d := walk(t, root, "d")
	f, h, err := d.Create("f", uint32(os.O_RDWR), 0o644, 0)
	check(t, err)
	if n, err := h.WriteAt([]byte("contents"), 0); n != 8 || err != nil {
		t.Errorf("%d, %v", n, err)
	}
	check(t, h.Fsync(true))
	check(t, h.Truncate(4))
	if got, err := os.ReadFile(dir + "/d/f"); err != nil || string(got) != "cont" {
		t.Errorf("%q, %v", got, err)
	}
	check(t, f.SetAttr(p9.SetAttr{Valid: p9.SetMode, Mode: 0o600}))
	if a, err := f.GetAttr(p9.AttrBasic); err != nil || a.Mode != unix.S_IFREG|0o600 || a.Size != 4 || a.QID.Path != f.QID().Path {
		t.Errorf("%+v, %v", a, err)
	}
	check(t, f.SetXattr("user.a", []byte("x"), 0))
	if v, err := f.Xattr("user.a"); err != nil || string(v) != "x" {
		t.Errorf("%q, %v", v, err)
	}
	check(t, d.Link("g", f))
	check(t, d.RenameAt("g", root, "h"))
	_, err = root.Symlink("s", "d/f", 0)
	check(t, err)
	s := walk(t, root, "s")
	if target, err := s.Readlink(); err != nil || target != "d/f" {
		t.Errorf("%q, %v", target, err)
	}
	if _, err := root.Mknod("p", unix.S_IFIFO|0o600, 0, 0, 0); err != nil {
		t.Error(err)
	}
	if st, err := root.Statfs(); err != nil || st.Bsize == 0 {
		t.Errorf("%+v, %v", st, err)
	}
	if lock, err := h.Lock(p9.Lock{Type: p9.LockWrite, Start: 1, Length: 1}); err != nil || lock != p9.LockSuccess {
		t.Errorf("%v, %v", lock, err)
	}
	if l, err := h.GetLock(p9.Lock{Type: p9.LockWrite, Start: 1, Length: 1}); err != nil || l.Type != p9.LockUnlock {
		t.Errorf("its own lock is in its way: %+v, %v", l, err)
	}
	check(t, h.Close())
	// By node: the name that it was walked by, and where that is.
	up := f.Parent()
	if up.QID() != d.QID() {
		t.Errorf("above f is %+v", up.QID())
	}
	up.Close()
	moved := walk(t, root, "h")
	check(t, moved.Rename(d, "i"))
	if up := moved.Parent(); up.QID().Path != d.QID().Path {
		t.Errorf("above what was moved is %+v", up.QID())
	} else {
		up.Close()
	}
	check(t, moved.Remove())
	check(t, d.UnlinkAt("f", 0))
	if _, err := d.Walk("f"); !errors.Is(err, unix.ENOENT) {
		t.Error(err)
	}
	if err := root.UnlinkAt("d", 0); !errors.Is(err, unix.EISDIR) {
		t.Error(err)
	}
	for _, n := range []p9.Node{f, moved, s, d, root.Clone()} {
		n.Close()
	}
}

// TestReaddir: as many entries as there is room for, and all in the end.
func TestReaddir(t *testing.T) {
	root, dir := tree(t)
	for i := range 200 {
		check(t, os.WriteFile(dir+"/"+strings.Repeat("n", i+1), nil, 0o644))
	}
	h, err := root.Open(uint32(os.O_RDONLY))
	check(t, err)
	defer h.Close()
	seen, offset := map[string]bool{}, uint64(0)
	for {
		b, err := h.Readdir(make([]byte, 0, 500), offset)
		check(t, err)
		entries, err := p9.DecodeDirents(b)
		check(t, err)
		if len(entries) == 0 {
			break
		}
		for _, e := range entries {
			if offset = e.Offset; seen[e.Name] {
				t.Errorf("%q twice", e.Name)
			}
			seen[e.Name] = true
		}
	}
	if len(seen) != 202 {
		t.Errorf("%d entries", len(seen))
	}
	if _, err := h.Readdir(make([]byte, 0, 10), 0); !errors.Is(err, unix.EINVAL) {
		t.Errorf("room for no entry: %v", err)
	}
}
