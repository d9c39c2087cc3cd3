package filecopy

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/wsl2/wsl2/internal/p9"
)

func TestMain(m *testing.M) {
	syscall.Umask(0) // as where a tree's server runs
	os.Exit(m.Run())
}

// tree serves a new directory.
func tree(t *testing.T) (*Tree, string) {
	t.Helper()
	dir := t.TempDir()
	tr, err := Local(t.Context(), dir)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(tr.Close)
	return tr, dir
}

func check(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// describe is what a copy has to keep of a tree.
func describe(t *testing.T, root string) string {
	t.Helper()
	var b strings.Builder
	check(t, filepath.WalkDir(root, func(name string, _ fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		var st unix.Stat_t
		if err := unix.Lstat(name, &st); err != nil {
			return err
		}
		rel, _ := filepath.Rel(root, name)
		fmt.Fprintf(&b, "%q %o %d.%09d", rel, st.Mode, st.Mtim.Sec, st.Mtim.Nsec)
		switch st.Mode & unix.S_IFMT {
		case unix.S_IFREG:
			data, err := os.ReadFile(name)
			if err != nil {
				return err
			}
			fmt.Fprintf(&b, " %d %x", len(data), data[:min(len(data), 20)])
		case unix.S_IFLNK:
			target, _ := os.Readlink(name)
			fmt.Fprintf(&b, " -> %q", target)
		}
		b.WriteString("\n")
		return nil
	}))
	return b.String()
}

// TestCopyTree: a copy is the original: names, kinds, modes, times, contents, holes.
func TestCopyTree(t *testing.T) {
	from, src := tree(t)
	to, dst := tree(t)
	check(t, os.MkdirAll(src+"/d/empty", 0o755))
	check(t, os.MkdirAll(src+"/d/"+strings.Repeat("n", 255), 0o700))
	for i := range 100 {
		check(t, os.WriteFile(fmt.Sprintf("%s/d/\xff\n%d", src, i), []byte(fmt.Sprint(i)), 0o640))
	}
	big := bytes.Repeat([]byte("0123456789abcdef"), 300_000)
	check(t, os.WriteFile(src+"/d/big", big, 0o400))
	check(t, os.WriteFile(src+"/d/nothing", nil, 0o444))
	f, err := os.Create(src + "/d/sparse")
	check(t, err)
	for _, at := range []int64{0, 10 << 20, 50<<20 + 7} {
		_, err = f.WriteAt([]byte("data"), at)
		check(t, err)
	}
	check(t, f.Truncate(100<<20+1))
	check(t, f.Close())
	check(t, os.Symlink("../big", src+"/d/link"))
	check(t, os.Symlink("d", src+"/to d"))
	check(t, unix.Mkfifo(src+"/d/fifo", 0o600))
	check(t, unix.Mknod(src+"/d/socket", unix.S_IFSOCK|0o600, 0))
	check(t, os.Chmod(src+"/d/empty", 0o1777))
	check(t, os.Chmod(src+"/d/nothing", os.ModeSetuid|0o755))
	old := unix.Timespec{Sec: 1 << 33, Nsec: 123456789}
	for _, name := range []string{"/d/link", "/d/big", "/d/empty", "/d"} {
		check(t, unix.UtimesNanoAt(unix.AT_FDCWD, src+name, []unix.Timespec{old, old}, unix.AT_SYMLINK_NOFOLLOW))
	}
	var mu sync.Mutex
	var skipped []string
	var copied int64
	o := Options{Skipped: func(p, why string) {
		mu.Lock()
		defer mu.Unlock()
		skipped = append(skipped, p+": "+why)
	}, Progress: func(n int64) {
		mu.Lock()
		defer mu.Unlock()
		copied = max(copied, n)
	}}
	// The source is followed; the destination's name is the source's.
	check(t, Copy(t.Context(), from, "/to d", to, "/", o))
	want := describe(t, src+"/d")
	want = strings.Replace(want, fmt.Sprintf("%q %o", "nothing", unix.S_IFREG|0o4755), fmt.Sprintf("%q %o", "nothing", unix.S_IFREG|0o755), 1)
	lines := strings.SplitAfter(want, "\n")
	for i, line := range lines {
		if strings.HasPrefix(line, `"socket"`) {
			lines[i] = ""
		}
	}
	if got := describe(t, dst+"/to d"); got != strings.Join(lines, "") {
		t.Errorf("the copy is\n%s\nwant\n%s", got, strings.Join(lines, ""))
	}
	if len(skipped) != 1 || skipped[0] != "/to d/socket: a socket" {
		t.Errorf("skipped %q", skipped)
	}
	if copied < int64(len(big)) {
		t.Errorf("progress up to %d bytes", copied)
	}
	var st unix.Stat_t
	check(t, unix.Stat(dst+"/to d/sparse", &st))
	if st.Blocks*512 > 1<<20 {
		t.Errorf("the holes were filled: %d blocks", st.Blocks)
	}
	got, err := os.ReadFile(dst + "/to d/big")
	if err != nil || !bytes.Equal(got, big) {
		t.Errorf("%d bytes, %v", len(got), err)
	}
	// Again, over what is there, and with what is longer in its place.
	check(t, os.WriteFile(dst+"/to d/nothing", []byte("was here"), 0o644))
	check(t, os.Remove(dst+"/to d/fifo"))
	check(t, os.Symlink("/etc/passwd", dst+"/to d/fifo"))
	check(t, os.Chmod(dst+"/to d/big", 0o600))
	check(t, Copy(t.Context(), from, "/to d/.", to, "/to d/..", Options{}))
	if got := describe(t, dst+"/to d"); got != strings.Join(lines, "") {
		t.Errorf("the second copy is\n%s\nwant\n%s", got, strings.Join(lines, ""))
	}
}

// TestPlaces: where a copy goes, and what is refused.
func TestPlaces(t *testing.T) {
	from, src := tree(t)
	to, dst := tree(t)
	check(t, errors.Join(os.WriteFile(src+"/f", []byte("new"), 0o644), os.Symlink("/f", src+"/absolute"), os.Symlink("loop", src+"/loop"),
		os.MkdirAll(src+"/d/e", 0o755), os.Symlink("../../f", src+"/d/e/up"), os.WriteFile(src+"/secret", nil, 0o644)))
	check(t, errors.Join(os.Mkdir(dst+"/dir", 0o755), os.WriteFile(dst+"/old", []byte("longer than new"), 0o600), os.WriteFile(dst+"/outside", []byte("kept"), 0o600),
		os.Symlink("outside", dst+"/dir/f"), os.Symlink("dir", dst+"/to dir")))
	for _, c := range []struct {
		src, dst, made string
		errno          syscall.Errno
	}{
		{"/f", "/", "/f", 0},
		{"/f", "/dir", "/dir/f", 0}, // in place of the link there
		{"f", "to dir/", "/dir/f", 0},
		{"/absolute", "/g", "/g", 0},
		{"/d/e/up", "/h", "/h", 0},
		{"/../../f", "/old", "/old", 0},
		{"/f", "/no/such", "", unix.ENOENT},
		{"/no", "/", "", unix.ENOENT},
		{"/loop", "/", "", unix.ELOOP},
		{"/f/x", "/", "", unix.ENOTDIR},
		{"/f", "/old/", "", unix.ENOTDIR},
		{"/d", "/old", "", unix.ENOTDIR},
	} {
		err := Copy(t.Context(), from, c.src, to, c.dst, Options{})
		if c.errno != 0 {
			if !errors.Is(err, c.errno) || err.Error() == c.errno.Error() {
				t.Errorf("%s to %s: %v, want %v and a path", c.src, c.dst, err, c.errno)
			}
			continue
		}
		if got, rerr := os.ReadFile(dst + c.made); err != nil || string(got) != "new" {
			t.Errorf("%s to %s: %v; %q, %v", c.src, c.dst, err, got, rerr)
		}
	}
	if got, _ := os.ReadFile(dst + "/outside"); string(got) != "kept" {
		t.Errorf("the copy followed a link: %q", got)
	}
}

// TestOwners: root keeps owners, set-id bits and devices if it is told to.
func TestOwners(t *testing.T) {
	if os.Geteuid() != 0 {
		from, src := tree(t)
		to, _ := tree(t)
		check(t, os.WriteFile(src+"/f", nil, 0o644))
		check(t, Copy(t.Context(), from, "/f", to, "/", Options{Owners: true})) // one's own is no change
		return
	}
	from, src := tree(t)
	to, dst := tree(t)
	check(t, errors.Join(os.WriteFile(src+"/f", nil, 0o644), os.Chown(src+"/f", 12, 34), os.Chmod(src+"/f", os.ModeSetuid|0o755),
		os.Symlink("f", src+"/l"), os.Lchown(src+"/l", 56, 78), unix.Mknod(src+"/null", unix.S_IFCHR|0o666, int(unix.Mkdev(1, 3)))))
	for _, owners := range []bool{true, false} {
		check(t, os.RemoveAll(dst+"/copy"))
		check(t, Copy(t.Context(), from, "/", to, "/copy", Options{Owners: owners}))
		var f, l, null unix.Stat_t
		check(t, errors.Join(unix.Lstat(dst+"/copy/f", &f), unix.Lstat(dst+"/copy/l", &l)))
		err := unix.Lstat(dst+"/copy/null", &null)
		if owners && (f.Uid != 12 || f.Gid != 34 || f.Mode != unix.S_IFREG|0o4755 || l.Uid != 56 || err != nil || null.Rdev != unix.Mkdev(1, 3)) ||
			!owners && (f.Uid != 0 || f.Mode != unix.S_IFREG|0o755 || l.Uid != 0 || err != unix.ENOENT) {
			t.Errorf("owners kept: %v: %+v, %+v, %+v, %v", owners, f, l, null, err)
		}
	}
}

// hostile is a tree whose server lies about its names.
type hostile struct{ p9.Node }

func (h hostile) Walk(string) (p9.Node, error) { n, err := h.Node.Walk("f"); return hostile{n}, err }
func (h hostile) Clone() p9.Node               { return hostile{h.Node.Clone()} }
func (h hostile) Open(flags uint32) (p9.Handle, error) {
	handle, err := h.Node.Open(flags)
	return liar{handle}, err
}

type liar struct{ p9.Handle }

func (l liar) Readdir(b []byte, offset uint64) ([]byte, error) {
	if offset > 0 {
		return b, nil
	}
	return p9.AppendDirent(b, p9.QID{}, 1, unix.DT_REG, "../escaped"), nil
}

type hostileFS struct{ p9.FS }

func (h hostileFS) Attach(u, a string, uid uint32) (p9.Node, error) {
	n, err := h.FS.Attach(u, a, uid)
	return hostile{n}, err
}

// TestHostileNames: a distro cannot name a file out of the directory that is copied to.
func TestHostileNames(t *testing.T) {
	real, src := tree(t)
	check(t, os.WriteFile(src+"/f", []byte("x"), 0o644))
	ours, theirs := net.Pipe()
	served := make(chan error, 1)
	go func() { served <- p9.Serve(context.Background(), theirs, hostileFS{real.local}, p9.Config{}) }()
	from, err := Connect(t.Context(), ours)
	check(t, err)
	to, dst := tree(t)
	if err := Copy(t.Context(), from, "/", to, "/in", Options{}); !errors.Is(err, unix.EINVAL) {
		t.Errorf("%v, want EINVAL", err)
	}
	from.Close()
	check(t, <-served)
	list, _ := filepath.Glob(dst + "/*")
	if len(list) != 1 || list[0] != dst+"/in" {
		t.Errorf("there is %q", list)
	}
}

// TestCancelled: a copy that is given up ends, with its context's error.
func TestCancelled(t *testing.T) {
	from, src := tree(t)
	to, _ := tree(t)
	check(t, os.WriteFile(src+"/f", bytes.Repeat([]byte("x"), 20<<20), 0o644))
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	err := Copy(ctx, from, "/f", to, "/", Options{Progress: func(int64) { cancel() }})
	if !errors.Is(err, context.Canceled) {
		t.Errorf("%v", err)
	}
}

// TestGone: a tree whose server goes away is an error, not a wait.
func TestGone(t *testing.T) {
	from, src := tree(t)
	to, _ := tree(t)
	check(t, os.WriteFile(src+"/f", bytes.Repeat([]byte("x"), 20<<20), 0o644))
	if err := Copy(t.Context(), from, "/f", to, "/", Options{Progress: func(int64) { from.client.Close() }}); err == nil {
		t.Error("no error")
	}
}

// TestOntoItself: a copy onto its original leaves it alone, one into itself is refused.
func TestOntoItself(t *testing.T) {
	tr, dir := tree(t)
	text := bytes.Repeat([]byte("precious"), 100_000)
	check(t, os.MkdirAll(dir+"/d/sub", 0o755))
	check(t, os.WriteFile(dir+"/d/f", text, 0o644))
	check(t, os.Link(dir+"/d/f", dir+"/other name"))
	for _, c := range [][2]string{{"/d/f", "/d"}, {"/d/f", "/d/f"}, {"/d", "/"}, {"/other name", "/d/f"}} {
		err := Copy(t.Context(), tr, c[0], tr, c[1], Options{})
		if got, rerr := os.ReadFile(dir + "/d/f"); rerr != nil || !bytes.Equal(got, text) {
			t.Fatalf("%v (%v): %d bytes are left: %v", c, err, len(got), rerr)
		}
	}
	if err := Copy(t.Context(), tr, "/d", tr, "/d/sub", Options{}); err == nil || !strings.Contains(err.Error(), "into itself") {
		t.Error(err)
	}
	// What was longer is cut, what was a hole is written.
	check(t, os.WriteFile(dir+"/short", append(make([]byte, 1<<20), 'x'), 0o644))
	check(t, os.WriteFile(dir+"/long", bytes.Repeat([]byte("y"), 3<<20), 0o644))
	check(t, Copy(t.Context(), tr, "/short", tr, "/long", Options{}))
	if got, err := os.ReadFile(dir + "/long"); err != nil || !bytes.Equal(got, append(make([]byte, 1<<20), 'x')) {
		t.Errorf("%d bytes, %v", len(got), err)
	}
}
