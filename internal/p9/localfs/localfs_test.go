package localfs

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/wsl2/wsl2/internal/p9"
)

// TestMain: modes are the client's, as they are where the server runs.
func TestMain(m *testing.M) {
	syscall.Umask(0)
	os.Exit(m.Run())
}

// TestAsUser runs this package's tests once more without root's rights, where it has
// them; but for the long one, in which rights play no part.
func TestAsUser(t *testing.T) {
	if os.Geteuid() != 0 {
		return // all of them run so
	}
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	dir, err := os.MkdirTemp("", "p9-user-") // the parents of t.TempDir are not for others
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(dir)
	program, err := os.ReadFile(exe)
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(os.Chmod(dir, 0o777), os.WriteFile(dir+"/test", program, 0o755)); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(dir+"/test", "-test.count=1", "-test.timeout=5m", "-test.skip=TestManyEntries")
	cmd.Dir, cmd.Env = dir, append(os.Environ(), "TMPDIR="+dir)
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 65534, Gid: 65534}}
	out, err := cmd.CombinedOutput()
	if err != nil || !bytes.Contains(out, []byte("PASS")) {
		t.Errorf("%v\n%s", err, out)
	}
}

// connect serves fs and returns the root as a client sees it.
func connect(t testing.TB, fs *FS, cfg p9.Config) *p9.File {
	t.Helper()
	ours, theirs := socketPair(t)
	served := make(chan error, 1)
	ctx, cancel := context.WithCancel(context.Background()) // go test -timeout bounds it
	go func() { served <- p9.Serve(ctx, theirs, fs, cfg) }()
	c, err := p9.NewClient(ctx, ours, 0)
	if err != nil {
		t.Fatal(err)
	}
	root, err := c.Attach(ctx, "", "", 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		c.Close()
		if err := <-served; err != nil {
			t.Errorf("the server ended with %v", err)
		}
		cancel()
	})
	return root
}

func socketPair(t testing.TB) (a, b net.Conn) {
	t.Helper()
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	var conns [2]net.Conn
	for i, fd := range fds {
		f := os.NewFile(uintptr(fd), "socketpair")
		conns[i], err = net.FileConn(f)
		f.Close()
		if err != nil {
			t.Fatal(err)
		}
	}
	return conns[0], conns[1]
}

// share serves a new directory.
func share(t testing.TB, cfg Config) (root *p9.File, dir string) {
	t.Helper()
	dir = t.TempDir()
	fs, err := New(dir, cfg)
	if err != nil {
		t.Fatal(err)
	}
	root = connect(t, fs, p9.Config{})
	t.Cleanup(func() { fs.Close() }) // before connect's
	return root, dir
}

// must returns what a call gave, which may not have failed.
func must[T any](v T, err error) func(t testing.TB) T {
	return func(t testing.TB) T {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
		return v
	}
}

func check(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// want checks an error's number; 0 is none.
func want(t testing.TB, what string, err error, errno syscall.Errno) {
	t.Helper()
	if errno == 0 && err == nil {
		return
	}
	if !errors.Is(err, errno) {
		t.Errorf("%s: %v, want %v", what, err, errno)
	}
}

// create makes a file with contents and returns it, open.
func create(t testing.TB, dir *p9.File, name, contents string) *p9.File {
	t.Helper()
	f := must(dir.Walk(t.Context()))(t)
	check(t, f.Create(t.Context(), name, os.O_RDWR|os.O_EXCL, 0o644, 0))
	if n, err := f.WriteAt(t.Context(), []byte(contents), 0); err != nil || n != len(contents) {
		t.Fatalf("%d, %v", n, err)
	}
	return f
}

func read(t testing.TB, f *p9.File) string {
	t.Helper()
	var all []byte
	buf := make([]byte, f.MaxIO())
	for {
		n := must(f.ReadAt(t.Context(), buf, int64(len(all))))(t)
		if n == 0 {
			return string(all)
		}
		all = append(all, buf[:n]...)
	}
}

func names(t testing.TB, dir *p9.File) []string {
	t.Helper()
	d := must(dir.Walk(t.Context()))(t)
	defer d.Close(t.Context())
	check(t, d.Open(t.Context(), os.O_RDONLY))
	var list []string
	for offset := uint64(0); ; {
		entries := must(d.Readdir(t.Context(), offset))(t)
		if len(entries) == 0 {
			slices.Sort(list)
			return list
		}
		for _, e := range entries {
			if offset = e.Offset; e.Name != "." && e.Name != ".." {
				list = append(list, e.Name)
			}
		}
	}
}

// TestFiles: each operation shows on this machine, and what is done here shows to the client.
func TestFiles(t *testing.T) {
	ctx := t.Context()
	root, dir := share(t, Config{})
	f := create(t, root, "a", "hello")
	if got, err := os.ReadFile(dir + "/a"); err != nil || string(got) != "hello" {
		t.Errorf("%q, %v", got, err)
	}
	must(root.Mkdir(ctx, "d", 0o750, 0))(t)
	d := must(root.Walk(ctx, "d"))(t)
	must(d.Symlink(ctx, "s", "../a", 0))(t)
	if got := must(os.Readlink(dir + "/d/s"))(t); got != "../a" {
		t.Errorf("link to %q", got)
	}
	s := must(root.Walk(ctx, "d", "s"))(t)
	if got := must(s.Readlink(ctx))(t); got != "../a" || s.QID().Type != p9.QTSymlink {
		t.Errorf("%q of type %#x", got, s.QID().Type)
	}
	want(t, "open a link", s.Open(ctx, os.O_RDONLY), unix.ELOOP)
	check(t, d.Link(ctx, "hard", f))
	if a := must(f.GetAttr(ctx, p9.AttrBasic))(t); a.Nlink != 2 || a.Size != 5 || a.Mode != unix.S_IFREG|0o644 || a.UID != uint32(os.Geteuid()) {
		t.Errorf("%+v", a)
	}
	check(t, root.RenameAt(ctx, "a", d, "b"))
	if got := read(t, f); got != "hello" {
		t.Errorf("a file that was renamed reads as %q", got)
	}
	// By fid: the name that it was walked by, as long as it has it.
	hard := must(root.Walk(ctx, "d", "hard"))(t)
	check(t, hard.Rename(ctx, root, "soft"))
	check(t, hard.Rename(ctx, root, "again"))
	check(t, os.Rename(dir+"/again", dir+"/elsewhere"))
	want(t, "rename what was renamed here", hard.Rename(ctx, root, "x"), unix.ESTALE)
	check(t, os.WriteFile(dir+"/again", nil, 0o644))
	want(t, "remove what another file took the name of", hard.Remove(ctx), unix.ESTALE)
	if got := names(t, root); !slices.Equal(got, []string{"again", "d", "elsewhere"}) {
		t.Errorf("%q", got)
	}
	want(t, "unlink a directory", root.UnlinkAt(ctx, "d", 0), unix.EISDIR)
	want(t, "remove a directory that is not empty", root.UnlinkAt(ctx, "d", p9.UnlinkDir), unix.ENOTEMPTY)
	check(t, must(root.Walk(ctx, "d", "s"))(t).Remove(ctx))
	check(t, d.UnlinkAt(ctx, "b", 0))
	check(t, root.UnlinkAt(ctx, "elsewhere", 0))
	if a := must(f.GetAttr(ctx, p9.AttrBasic))(t); a.Nlink != 0 || read(t, f) != "hello" {
		t.Errorf("an open file without names: %+v", a)
	}
	check(t, f.SetAttr(ctx, p9.SetAttr{Valid: p9.SetSize | p9.SetMode, Size: 2, Mode: 0o600}))
	if got := read(t, f); got != "he" {
		t.Errorf("%q", got)
	}
	check(t, f.Fsync(ctx, false))
	check(t, d.Remove(ctx))
	want(t, "what was removed", second(root.Walk(ctx, "d")), unix.ENOENT)
	if up := must(root.Walk(ctx, "..", ".."))(t); up.QID() != root.QID() {
		t.Errorf("above the root is %+v, want the root", up.QID())
	}
	if st := must(root.Statfs(ctx))(t); st.Bsize == 0 || st.Blocks == 0 || st.Namelen != 255 {
		t.Errorf("%+v", st)
	}
}

func second[T any](_ T, err error) error { return err }

// TestErrors: each misuse is told by its number, and ends nothing but itself.
func TestErrors(t *testing.T) {
	ctx := t.Context()
	root, dir := share(t, Config{})
	f := create(t, root, "f", "x")
	check(t, unix.Mkfifo(dir+"/fifo", 0o666))
	long := strings.Repeat("n", 256)
	file := must(root.Walk(ctx, "f"))(t)
	unopened := must(root.Walk(ctx, "f"))(t)
	for _, c := range []struct {
		what  string
		err   error
		errno syscall.Errno
	}{
		{"walk to nothing", second(root.Walk(ctx, "no")), unix.ENOENT},
		{"walk through a file", second(root.Walk(ctx, "f", "g")), unix.ENOENT}, // Rwalk is short
		{"walk from a file", second(file.Walk(ctx, "g")), unix.ENOTDIR},
		{"walk to a long name", second(root.Walk(ctx, long)), unix.ENAMETOOLONG},
		{"walk to a path", second(root.Walk(ctx, "f/g")), unix.EINVAL},
		{"walk to .", second(root.Walk(ctx, ".")), unix.EINVAL},
		{"walk to an empty name", second(root.Walk(ctx, "")), unix.EINVAL},
		{"walk to a name with NUL", second(root.Walk(ctx, "a\x00b")), unix.EINVAL},
		{"create what is there", must(root.Walk(ctx))(t).Create(ctx, "f", os.O_RDWR|os.O_EXCL, 0o644, 0), unix.EEXIST},
		{"create a FIFO that is there", must(root.Walk(ctx))(t).Create(ctx, "fifo", os.O_RDWR, 0o644, 0), unix.ENXIO},
		{"create ..", must(root.Walk(ctx))(t).Create(ctx, "..", os.O_RDWR, 0o644, 0), unix.EINVAL},
		{"mkdir ..", second(root.Mkdir(ctx, "..", 0o755, 0)), unix.EINVAL},
		{"unlink ..", root.UnlinkAt(ctx, "..", p9.UnlinkDir), unix.EINVAL},
		{"rename from ..", root.RenameAt(ctx, "..", root, "x"), unix.EINVAL},
		{"rename to ..", root.RenameAt(ctx, "f", root, ".."), unix.EINVAL},
		{"link as a/b", root.Link(ctx, "a/b", file), unix.EINVAL},
		{"link a directory", root.Link(ctx, "l", root), unix.EPERM},
		{"symlink to nothing", second(root.Symlink(ctx, "s", "", 0)), unix.ENOENT},
		{"mknod a directory", second(root.Mknod(ctx, "m", unix.S_IFDIR|0o755, 0, 0, 0)), unix.EINVAL},
		{"open a FIFO", must(root.Walk(ctx, "fifo"))(t).Open(ctx, os.O_RDONLY), unix.ENXIO},
		{"open twice", f.Open(ctx, os.O_RDONLY), unix.EBUSY},
		{"write a directory", must(root.Walk(ctx))(t).Open(ctx, os.O_RDWR), unix.EISDIR},
		{"read what is not open", second(unopened.ReadAt(ctx, make([]byte, 1), 0)), unix.EBADF},
		{"readdir of a file", second(f.Readdir(ctx, 0)), unix.ENOTDIR},
		{"readlink of a file", second(f.Readlink(ctx)), unix.EINVAL},
		{"truncate a directory", root.SetAttr(ctx, p9.SetAttr{Valid: p9.SetSize}), unix.EISDIR},
		{"a negative size", f.SetAttr(ctx, p9.SetAttr{Valid: p9.SetSize, Size: 1 << 63}), unix.EINVAL},
		{"a second of 2e9 ns", f.SetAttr(ctx, p9.SetAttr{Valid: p9.SetMtime | p9.SetMtimeTo, Mtime: p9.Time{Nsec: 2e9}}), unix.EINVAL},
		{"remove the root", must(root.Walk(ctx))(t).Remove(ctx), unix.EBUSY},
		{"an attribute that is not there", second(f.Xattr(ctx, "user.no")), unix.ENODATA},
		{"an attribute of 1 MB", f.SetXattr(ctx, "user.a", make([]byte, 1<<20), 0), unix.E2BIG},
		{"lock what is not open", second(unopened.Lock(ctx, p9.Lock{})), unix.EBADF},
		{"an unknown lock", second(f.Lock(ctx, p9.Lock{Type: 9})), unix.EINVAL},
	} {
		want(t, c.what, c.err, c.errno)
	}
	if got := names(t, root); !slices.Equal(got, []string{"f", "fifo"}) || read(t, f) != "x" {
		t.Errorf("%q is left", got)
	}
}

// TestNames: a name is any bytes but / and NUL, up to 255 of them.
func TestNames(t *testing.T) {
	root, dir := share(t, Config{})
	var list []string
	for b := 1; b < 256; b++ {
		if b != '/' && b != '.' {
			list = append(list, string([]byte{byte(b)}))
		}
	}
	list = append(list, strings.Repeat("\xff", 255), "...", "a\nb", "-rf")
	for _, name := range list {
		create(t, root, name, name).Close(t.Context())
	}
	slices.Sort(list)
	if got := names(t, root); !slices.Equal(got, list) {
		t.Errorf("%d names, want %d", len(got), len(list))
	}
	for _, name := range list {
		if got, err := os.ReadFile(dir + "/" + name); err != nil || string(got) != name {
			t.Errorf("%q: %q, %v", name, got, err)
		}
		check(t, root.UnlinkAt(t.Context(), name, 0))
	}
}

// TestDeep: a tree deeper than PATH_MAX can name.
func TestDeep(t *testing.T) {
	ctx := t.Context()
	root, _ := share(t, Config{})
	const depth = 100
	name := strings.Repeat("d", 200)
	at := root
	for range depth {
		must(at.Mkdir(ctx, name, 0o755, 0))(t)
		at = must(at.Walk(ctx, name))(t)
	}
	create(t, at, "f", "deep").Close(ctx)
	path := append(slices.Repeat([]string{name}, depth), "f")
	f := must(root.Walk(ctx, path...))(t)
	check(t, f.Open(ctx, os.O_RDONLY))
	if got := read(t, f); got != "deep" {
		t.Errorf("%q", got)
	}
	check(t, must(root.Walk(ctx, path...))(t).Remove(ctx))
	for n := depth; n > 0; n-- { // what os.RemoveAll does, too, but check it here
		check(t, must(root.Walk(ctx, path[:n]...))(t).Remove(ctx))
	}
}

// TestLarge: offsets over 4 GiB, and holes that stay holes.
func TestLarge(t *testing.T) {
	ctx := t.Context()
	root, _ := share(t, Config{})
	f := create(t, root, "big", "begin")
	const at = 5<<30 + 123
	if n, err := f.WriteAt(ctx, []byte("end"), at); n != 3 || err != nil {
		t.Fatal(n, err)
	}
	buf := make([]byte, 10)
	if n := must(f.ReadAt(ctx, buf, at-2))(t); string(buf[:n]) != "\x00\x00end" {
		t.Errorf("%q", buf[:n])
	}
	if a := must(f.GetAttr(ctx, p9.AttrBasic))(t); a.Size != at+3 || a.Blocks*512 > 1<<20 {
		t.Errorf("%d bytes in %d blocks", a.Size, a.Blocks)
	}
	// One request moves up to what msize allows.
	data := bytes.Repeat([]byte("0123456789abcdef"), 1<<16)
	n := must(f.WriteAt(ctx, data, 0))(t)
	if n != f.MaxIO() || n < 1<<20-64 {
		t.Errorf("one write of %d bytes", n)
	}
	got := make([]byte, len(data))
	if m := must(f.ReadAt(ctx, got, 0))(t); m != n || !bytes.Equal(got[:n], data[:n]) {
		t.Errorf("one read of %d bytes", m)
	}
}

// TestTimes: to the nanosecond, before 1970 and past 2038.
func TestTimes(t *testing.T) {
	ctx := t.Context()
	root, dir := share(t, Config{})
	f := create(t, root, "f", "")
	must(root.Symlink(ctx, "s", "f", 0))(t)
	for _, file := range []*p9.File{f, must(root.Walk(ctx, "s"))(t)} {
		for _, sec := range []int64{0, -86400, 1 << 31, 1<<33 + 5} {
			atime, mtime := p9.Time{Sec: sec, Nsec: 999999999}, p9.Time{Sec: sec + 1, Nsec: 1}
			check(t, file.SetAttr(ctx, p9.SetAttr{Valid: p9.SetAtime | p9.SetAtimeTo | p9.SetMtime | p9.SetMtimeTo, Atime: atime, Mtime: mtime}))
			if a := must(file.GetAttr(ctx, p9.AttrBasic))(t); a.Atime != atime || a.Mtime != mtime {
				t.Errorf("%+v and %+v became %+v and %+v", atime, mtime, a.Atime, a.Mtime)
			}
		}
	}
	before := time.Now().Add(-time.Second)
	check(t, f.SetAttr(ctx, p9.SetAttr{Valid: p9.SetMtime}))
	st := must(os.Stat(dir + "/f"))(t)
	if a := must(f.GetAttr(ctx, p9.AttrBasic))(t); st.ModTime().Before(before) || a.Atime.Sec != 1<<33+5 {
		t.Errorf("set to now: %v; the other is %+v", st.ModTime(), a.Atime)
	}
}

// TestXattr: values from nothing to 60 KB, and lists.
func TestXattr(t *testing.T) {
	ctx := t.Context()
	root, dir := share(t, Config{})
	f := create(t, root, "f", "")
	for name, value := range map[string]string{"user.one": "1", "user.empty": "", "user.long": strings.Repeat("v", 3000)} {
		check(t, f.SetXattr(ctx, name, []byte(value), 0))
		got := make([]byte, 4000)
		n, err := unix.Getxattr(dir+"/f", name, got)
		if err != nil || string(got[:n]) != value {
			t.Errorf("%s: %d bytes, %v", name, n, err)
		}
		if got := must(f.Xattr(ctx, name))(t); string(got) != value {
			t.Errorf("%s: %q", name, got)
		}
	}
	list := strings.Split(strings.TrimSuffix(string(must(f.Xattr(ctx, ""))(t)), "\x00"), "\x00")
	list = slices.DeleteFunc(list, func(s string) bool { return !strings.HasPrefix(s, "user.") })
	slices.Sort(list)
	if !slices.Equal(list, []string{"user.empty", "user.long", "user.one"}) {
		t.Errorf("%q", list)
	}
	want(t, "XATTR_CREATE", f.SetXattr(ctx, "user.one", []byte("2"), unix.XATTR_CREATE), unix.EEXIST)
	want(t, "XATTR_REPLACE", f.SetXattr(ctx, "user.two", []byte("2"), unix.XATTR_REPLACE), unix.ENODATA)
	check(t, f.SetXattr(ctx, "user.one", nil, 0))
	want(t, "what was removed", second(f.Xattr(ctx, "user.one")), unix.ENODATA)
}

// TestManyEntries: a directory of 200,000 entries, read while it changes, has each
// entry that stays once.
func TestManyEntries(t *testing.T) {
	ctx := t.Context()
	root, dir := share(t, Config{})
	const count = 200_000
	fd := must(unix.Open(dir, unix.O_RDONLY|unix.O_DIRECTORY, 0))(t)
	defer unix.Close(fd)
	for i := range count {
		check(t, unix.Mknodat(fd, fmt.Sprint("stays-", i), unix.S_IFREG|0o644, 0))
	}
	d := must(root.Walk(ctx))(t)
	check(t, d.Open(ctx, os.O_RDONLY))
	seen := make(map[string]int, count)
	var middle uint64
	var after string
	for offset, calls := uint64(0), 0; ; calls++ {
		entries := must(d.Readdir(ctx, offset))(t)
		if len(entries) == 0 {
			break
		}
		for _, e := range entries {
			if strings.HasPrefix(e.Name, "stays-") {
				seen[e.Name]++
			}
			if after == "" && middle != 0 {
				after = e.Name
			}
			offset = e.Offset
		}
		if calls == 3 {
			middle = offset
		}
		name := fmt.Sprint("comes-", calls)
		check(t, unix.Mknodat(fd, name, unix.S_IFREG|0o644, 0))
		if calls%2 == 0 {
			check(t, unix.Unlinkat(fd, name, 0))
		}
	}
	if len(seen) != count {
		t.Errorf("%d entries, want %d", len(seen), count)
	}
	for name, n := range seen {
		if n != 1 {
			t.Fatalf("%s came %d times", name, n)
		}
	}
	// From the middle again, and by another open file: the offsets mean the same.
	other := must(root.Walk(ctx))(t)
	check(t, other.Open(ctx, os.O_RDONLY))
	for _, f := range []*p9.File{d, other} {
		if again := must(f.Readdir(ctx, middle))(t); len(again) == 0 || again[0].Name != after {
			t.Errorf("from offset %d: not %s", middle, after)
		}
	}
}

// TestReadOnly: nothing of a read-only share changes.
func TestReadOnly(t *testing.T) {
	ctx := t.Context()
	dir := t.TempDir()
	check(t, os.WriteFile(dir+"/f", []byte("x"), 0o644))
	fs := must(New(dir, Config{ReadOnly: true}))(t)
	defer fs.Close()
	root := connect(t, fs, p9.Config{})
	f := must(root.Walk(ctx, "f"))(t)
	for what, err := range map[string]error{
		"create":   must(root.Walk(ctx))(t).Create(ctx, "g", os.O_RDWR, 0o644, 0),
		"open":     must(root.Walk(ctx, "f"))(t).Open(ctx, os.O_RDWR),
		"truncate": must(root.Walk(ctx, "f"))(t).Open(ctx, os.O_RDONLY|os.O_TRUNC),
		"mkdir":    second(root.Mkdir(ctx, "d", 0o755, 0)),
		"mknod":    second(root.Mknod(ctx, "d", unix.S_IFIFO|0o755, 0, 0, 0)),
		"symlink":  second(root.Symlink(ctx, "s", "f", 0)),
		"link":     root.Link(ctx, "l", f),
		"renameat": root.RenameAt(ctx, "f", root, "g"),
		"rename":   f.Rename(ctx, root, "g"),
		"unlink":   root.UnlinkAt(ctx, "f", 0),
		"remove":   must(root.Walk(ctx, "f"))(t).Remove(ctx),
		"setattr":  f.SetAttr(ctx, p9.SetAttr{Valid: p9.SetMode, Mode: 0o600}),
		"setxattr": f.SetXattr(ctx, "user.a", []byte("1"), 0),
	} {
		want(t, what, err, unix.EROFS)
	}
	check(t, f.Open(ctx, os.O_RDONLY))
	if got := read(t, f); got != "x" {
		t.Errorf("%q", got)
	}
}

// TestUntrusted: nothing that a guest makes takes effect on the host.
func TestUntrusted(t *testing.T) {
	ctx := t.Context()
	uid, gid := uint32(os.Geteuid()), uint32(os.Getegid())
	root, dir := share(t, Config{Untrusted: true, Owner: &p9.Owner{UID: uid, GID: gid, ClientUID: 1000, ClientGID: 1001}})
	f := must(root.Walk(ctx))(t)
	check(t, f.Create(ctx, "f", os.O_RDWR, 0o6755, 0))
	mode := func(name string) uint32 {
		var st unix.Stat_t
		check(t, unix.Lstat(dir+"/"+name, &st))
		return st.Mode
	}
	if m := mode("f"); m != unix.S_IFREG|0o755 {
		t.Errorf("made with mode %o", m)
	}
	check(t, f.SetAttr(ctx, p9.SetAttr{Valid: p9.SetMode, Mode: 0o6711}))
	if m := mode("f"); m != unix.S_IFREG|0o711 {
		t.Errorf("set to mode %o", m)
	}
	must(root.Mkdir(ctx, "d", 0o3777, 0))(t)
	if m := mode("d"); m&0o7777 != 0o1777 && m&0o7777 != 0o3777 { // mkdir(2) need not set S_ISGID
		t.Errorf("a directory with mode %o", m)
	}
	must(root.Mknod(ctx, "fifo", unix.S_IFIFO|0o4644, 0, 0, 0))(t)
	if m := mode("fifo"); m != unix.S_IFIFO|0o644 {
		t.Errorf("a FIFO with mode %o", m)
	}
	for what, err := range map[string]error{
		"a device":            second(root.Mknod(ctx, "null", unix.S_IFCHR|0o666, 1, 3, 0)),
		"somebody else's UID": f.SetAttr(ctx, p9.SetAttr{Valid: p9.SetUID, UID: 0}),
		"somebody else's GID": f.SetAttr(ctx, p9.SetAttr{Valid: p9.SetGID, GID: 5}),
	} {
		want(t, what, err, unix.EPERM)
	}
	want(t, "capabilities", f.SetXattr(ctx, "security.capability", []byte("x"), 0), unix.EOPNOTSUPP)
	want(t, "capabilities", second(f.Xattr(ctx, "security.capability")), unix.EOPNOTSUPP)
	check(t, f.SetXattr(ctx, "user.a", []byte("x"), 0))
	if got := must(f.Xattr(ctx, ""))(t); string(got) != "user.a\x00" {
		t.Errorf("%q", got)
	}
	check(t, f.SetAttr(ctx, p9.SetAttr{Valid: p9.SetUID | p9.SetGID, UID: 1000, GID: 1001}))
	if a := must(f.GetAttr(ctx, p9.AttrBasic))(t); a.UID != 1000 || a.GID != 1001 {
		t.Errorf("owner %d, %d", a.UID, a.GID)
	}
	if uid == 0 {
		check(t, os.Lchown(dir+"/f", 7, 7))
		if a := must(f.GetAttr(ctx, p9.AttrBasic))(t); a.UID != 65534 || a.GID != 65534 {
			t.Errorf("somebody else's is %d, %d", a.UID, a.GID)
		}
	}
}

// TestAppend: what two clients append, each in one request, is all there.
func TestAppend(t *testing.T) {
	ctx := t.Context()
	root, dir := share(t, Config{})
	create(t, root, "f", "").Close(ctx)
	var wg sync.WaitGroup
	for i := range 4 {
		f := must(root.Walk(ctx, "f"))(t)
		check(t, f.Open(ctx, os.O_WRONLY|os.O_APPEND))
		wg.Go(func() {
			for range 100 {
				if _, err := f.WriteAt(ctx, bytes.Repeat([]byte{byte('0' + i)}, 10), 0); err != nil {
					t.Error(err)
				}
			}
		})
	}
	wg.Wait()
	got := must(os.ReadFile(dir + "/f"))(t)
	for i := range 4 {
		if n := bytes.Count(got, bytes.Repeat([]byte{byte('0' + i)}, 10)); n != 100 {
			t.Errorf("%d of 100 records of writer %d", n, i)
		}
	}
}

// TestLimits: a client that wants too much gets an error, and no one else notices.
func TestLimits(t *testing.T) {
	ctx := t.Context()
	fs := must(New(t.TempDir(), Config{}))(t)
	defer fs.Close()
	root := connect(t, fs, p9.Config{MaxFIDs: 10})
	var held []*p9.File
	for {
		f, err := root.Walk(ctx)
		if err != nil {
			want(t, "one fid too many", err, unix.EMFILE)
			break
		}
		held = append(held, f)
	}
	if len(held) != 9 {
		t.Errorf("%d fids and the root's, want 10 in all", len(held))
	}
	check(t, held[0].Close(ctx))
	must(root.Walk(ctx))(t)
}

// TestNothingLeft: the end of a connection ends its descriptors, whatever was open.
func TestNothingLeft(t *testing.T) {
	ctx := t.Context()
	dir := t.TempDir()
	descriptors := func() int { return len(must(os.ReadDir("/proc/self/fd"))(t)) }
	before := descriptors()
	fs := must(New(dir, Config{}))(t)
	ours, theirs := socketPair(t)
	served := make(chan error, 1)
	go func() { served <- p9.Serve(ctx, theirs, fs, p9.Config{}) }()
	c := must(p9.NewClient(ctx, ours, 0))(t)
	root := must(c.Attach(ctx, "", "", 0))(t)
	for i := range 50 {
		must(root.Mkdir(ctx, fmt.Sprint("d", i), 0o755, 0))(t)
		d := must(root.Walk(ctx, fmt.Sprint("d", i)))(t)
		create(t, d, "f", "x")
		if i%2 == 0 {
			check(t, d.Close(ctx)) // f still needs it
		}
	}
	if n := descriptors(); n < before+100 {
		t.Fatalf("only %d descriptors with 50 files open", n)
	}
	c.Close()
	check(t, <-served)
	fs.Close()
	if n := descriptors(); n != before {
		t.Errorf("%d descriptors, before %d", n, before)
	}
}

// TestConfinedUnderSwaps: while directories of the share are swapped for symbolic
// links that lead out of it, and moved about, no request gets out.
func TestConfinedUnderSwaps(t *testing.T) {
	ctx := t.Context()
	root, dir := share(t, Config{})
	outside := t.TempDir()
	check(t, os.WriteFile(outside+"/f", []byte("secret"), 0o666))
	check(t, os.MkdirAll(dir+"/real", 0o777))
	check(t, os.WriteFile(dir+"/real/f", []byte("public"), 0o666))
	check(t, os.Symlink(outside, dir+"/link"))
	check(t, os.Symlink(outside+"/f", dir+"/flink"))
	check(t, os.WriteFile(dir+"/file", []byte("public"), 0o666))
	swap := func(a, b string) {
		if err := unix.Renameat2(unix.AT_FDCWD, dir+"/"+a, unix.AT_FDCWD, dir+"/"+b, unix.RENAME_EXCHANGE); err != nil {
			t.Error(err)
		}
	}
	stop := make(chan struct{})
	var swapping sync.WaitGroup
	swapping.Go(func() {
		for {
			select {
			case <-stop:
				return
			default:
				swap("real", "link")
				swap("file", "flink")
			}
		}
	})
	reached := 0
	for i := range 1000 {
		for _, path := range [][]string{{"real", "f"}, {"file"}} {
			f, err := root.Walk(ctx, path...)
			if err != nil {
				continue
			}
			if f.Open(ctx, os.O_RDWR) == nil {
				reached++
				if got := read(t, f); !strings.HasPrefix(got, "public") {
					t.Fatalf("read %q", got)
				}
				if _, err := f.WriteAt(ctx, []byte("public"), 0); err != nil {
					t.Error(err)
				}
			}
			f.SetAttr(ctx, p9.SetAttr{Valid: p9.SetMode, Mode: 0o666})
			f.SetXattr(ctx, "user.a", []byte("x"), 0)
			f.Close(ctx)
		}
		if d, err := root.Walk(ctx, "real"); err == nil {
			name := fmt.Sprint("made", i)
			if c, err := d.Walk(ctx); err == nil {
				c.Create(ctx, name, os.O_RDWR, 0o666, 0)
				c.Close(ctx)
			}
			d.Mkdir(ctx, name+"d", 0o777, 0)
			d.UnlinkAt(ctx, "f", p9.UnlinkDir)
			d.RenameAt(ctx, "f", root, "f")
			root.RenameAt(ctx, "f", d, "f")
			d.Close(ctx)
		}
	}
	close(stop)
	swapping.Wait()
	if reached == 0 {
		t.Error("no file was ever reached: the test says nothing")
	}
	list := must(os.ReadDir(outside))(t)
	got := must(os.ReadFile(outside + "/f"))(t)
	if len(list) != 1 || string(got) != "secret" || must(os.Stat(outside+"/f"))(t).Mode().Perm() != 0o666 {
		t.Errorf("outside there are %v, with %q", list, got)
	}
	if n, err := unix.Getxattr(outside+"/f", "user.a", nil); err != unix.ENODATA {
		t.Errorf("outside has an attribute of %d bytes, %v", n, err)
	}
}

// TestOutOfTheShare: a directory that is moved out of the share stays what its fid
// stands for, and ".." from it leads nowhere but into the share.
func TestOutOfTheShare(t *testing.T) {
	ctx := t.Context()
	top := t.TempDir()
	check(t, os.MkdirAll(top+"/share/a/b", 0o755))
	fs := must(New(top+"/share", Config{}))(t)
	defer fs.Close()
	root := connect(t, fs, p9.Config{})
	b := must(root.Walk(ctx, "a", "b"))(t)
	check(t, os.Rename(top+"/share/a/b", top+"/b"))
	up := must(b.Walk(ctx, "..", "..", ".."))(t)
	if up.QID().Path != root.QID().Path {
		t.Errorf("leads to %+v", up.QID())
	}
}

// FuzzServe feeds a server what a hostile guest may send: a session that is made
// of the fuzzer's messages, in frames of the right size, or bytes as they are.
func FuzzServe(f *testing.F) {
	names := []string{"f", "d", "..", "link", "a/b", "new"}
	for _, seed := range seeds(names) {
		f.Add(seed, true)
	}
	f.Add([]byte("\x13\x00\x00\x00\x64\xff\xff\x00\x20\x00\x00\x08\x009P2000.L"), false)
	f.Fuzz(func(t *testing.T, data []byte, framed bool) {
		top := t.TempDir()
		check(t, errors.Join(os.MkdirAll(top+"/share/d", 0o755), os.WriteFile(top+"/share/f", []byte("file"), 0o644),
			os.Symlink("..", top+"/share/link"), os.WriteFile(top+"/secret", []byte("secret"), 0o644)))
		fs := must(New(top+"/share", Config{Untrusted: true}))(t)
		defer fs.Close()
		ours, theirs := socketPair(t)
		served := make(chan error, 1)
		var log bytes.Buffer
		go func() {
			served <- p9.Serve(t.Context(), theirs, fs, p9.Config{MaxFIDs: 100, Logf: func(format string, args ...any) { fmt.Fprintf(&log, format, args...) }})
		}()
		go func() {
			ours.Write(session(data, framed))
			ours.(*net.UnixConn).CloseWrite()
		}()
		answers, _ := io.ReadAll(ours)
		ours.Close()
		<-served
		if log.Len() > 0 {
			t.Error(log.String())
		}
		if bytes.Contains(answers, []byte("secret")) {
			t.Error("the server told what is outside")
		}
		list := must(filepath.Glob(top + "/*"))(t)
		if got, err := os.ReadFile(top + "/secret"); err != nil || string(got) != "secret" || len(list) != 2 {
			t.Errorf("outside is %q, %v, %q", list, err, got)
		}
	})
}
