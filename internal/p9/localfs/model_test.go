package localfs

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/wsl2/wsl2/internal/p9"
)

// TestModel does the same random operations through 9P on a share, and with the
// kernel's calls on a directory beside it: every result and the trees must be the same.
func TestModel(t *testing.T) {
	steps := 20_000
	if os.Getenv("WSL2_SOAK") != "" {
		steps = 1_000_000
	}
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	root, dir := share(t, Config{})
	local := t.TempDir()
	m := &model{t: t, ctx: t.Context(), r: rand.New(rand.NewPCG(seed, 0)), root: root, local: local}
	for i := range steps {
		m.step()
		if t.Failed() {
			t.Fatalf("after step %d of seed %d:\n%s", i, seed, strings.Join(m.log, "\n"))
		}
	}
	for len(m.open) > 0 {
		m.close(0)
	}
	if got, want := tree(t, dir), tree(t, local); got != want {
		t.Errorf("the trees differ, seed %d:\n%s\n\nwant\n%s", seed, got, want)
	}
	if m.succeeded < steps/3 {
		t.Errorf("only %d of %d operations did anything", m.succeeded, steps)
	}
}

// model is the state of a run: nothing but which files are open on both sides.
type model struct {
	t         *testing.T
	ctx       context.Context
	r         *rand.Rand
	root      *p9.File
	local     string
	open      []pair
	log       []string // the last operations
	succeeded int
}

type pair struct {
	ours  *p9.File
	local int
	name  string
}

func (m *model) name() string { return string("abcdef"[m.r.IntN(6)]) }

// path is of one to three names: so most are there some of the time.
func (m *model) path() []string {
	p := []string{m.name()}
	for m.r.IntN(3) == 0 && len(p) < 3 {
		p = append(p, m.name())
	}
	return p
}

// at returns the directory of a path, on both sides, and the last name. Both take
// one step at a time and follow no link.
func (m *model) at(path []string) (dir *p9.File, fd int, name string, ok bool) {
	dir, err := m.root.Walk(m.ctx)
	fd, lerr := unix.Open(m.local, unix.O_PATH|unix.O_CLOEXEC, 0)
	for _, step := range path[:len(path)-1] {
		if err != nil || lerr != nil {
			break
		}
		var next *p9.File
		next, err = dir.Walk(m.ctx, step)
		dir.Close(m.ctx)
		dir = next
		was := fd
		fd, lerr = unix.Openat(fd, step, unix.O_PATH|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
		unix.Close(was)
	}
	ok = m.same(fmt.Sprint("walk ", path), err, lerr)
	return dir, fd, path[len(path)-1], ok
}

// same compares two results and notes them; it tells whether there was no error.
func (m *model) same(what string, err, local error) bool {
	m.t.Helper()
	if len(m.log) == 40 {
		m.log = m.log[1:]
	}
	m.log = append(m.log, fmt.Sprintf("%s: %v", what, err))
	var a, b syscall.Errno
	errors.As(err, &a)
	errors.As(local, &b)
	if a != b || (err == nil) != (local == nil) {
		m.t.Errorf("%s: %v, want %v", what, err, local)
	}
	if err == nil {
		m.succeeded++
	}
	return err == nil
}

func (m *model) close(i int) {
	p := m.open[i]
	m.open[i] = m.open[len(m.open)-1]
	m.open = m.open[:len(m.open)-1]
	m.same("close "+p.name, p.ours.Close(m.ctx), unix.Close(p.local))
}

// step does one operation.
func (m *model) step() {
	if n := m.r.IntN(10); len(m.open) > 0 && (n < 4 || len(m.open) > 8) {
		m.onOpen(m.r.IntN(len(m.open)))
		return
	}
	path := m.path()
	dir, fd, name, ok := m.at(path)
	if !ok {
		return
	}
	defer dir.Close(m.ctx)
	defer unix.Close(fd)
	mode := uint32(m.r.IntN(0o1000)) | 0o700 // what is made can be entered, by who is not root
	switch op := m.r.IntN(12); op {
	case 0:
		_, err := dir.Mkdir(m.ctx, name, mode, 0)
		m.same(fmt.Sprint("mkdir ", path), err, unix.Mkdirat(fd, name, mode))
	case 1:
		m.same(fmt.Sprint("unlink ", path), dir.UnlinkAt(m.ctx, name, 0), unix.Unlinkat(fd, name, 0))
	case 2:
		m.same(fmt.Sprint("rmdir ", path), dir.UnlinkAt(m.ctx, name, p9.UnlinkDir), unix.Unlinkat(fd, name, unix.AT_REMOVEDIR))
	case 3:
		target := strings.Repeat("../", m.r.IntN(3)) + m.name()
		_, err := dir.Symlink(m.ctx, name, target, 0)
		m.same(fmt.Sprint("symlink ", path), err, unix.Symlinkat(target, fd, name))
	case 4:
		_, err := dir.Mknod(m.ctx, name, unix.S_IFIFO|mode, 0, 0, 0)
		m.same(fmt.Sprint("mkfifo ", path), err, unix.Mknodat(fd, name, unix.S_IFIFO|mode, 0))
	case 5, 6:
		m.two(path, dir, fd, name, op == 5)
	case 7, 8:
		m.create(path, dir, fd, name, mode)
	default:
		m.onNode(path, dir, fd, name, mode)
	}
}

// two renames or links.
func (m *model) two(path []string, dir *p9.File, fd int, name string, link bool) {
	other := m.path()
	to, toFD, newName, ok := m.at(other)
	if !ok {
		return
	}
	defer to.Close(m.ctx)
	defer unix.Close(toFD)
	what := fmt.Sprint(" ", path, " ", other)
	if !link {
		m.same("rename"+what, dir.RenameAt(m.ctx, name, to, newName), unix.Renameat(fd, name, toFD, newName))
		return
	}
	f, err := dir.Walk(m.ctx, name)
	if err == nil {
		err = to.Link(m.ctx, newName, f)
		f.Close(m.ctx)
	}
	m.same("link"+what, err, unix.Linkat(fd, name, toFD, newName, 0))
}

func (m *model) create(path []string, dir *p9.File, fd int, name string, mode uint32) {
	flags := []int{0, os.O_EXCL, os.O_TRUNC, os.O_APPEND}[m.r.IntN(4)] | os.O_RDWR
	f, err := dir.Walk(m.ctx)
	if err != nil {
		m.t.Error(err)
		return
	}
	// What cannot be opened on a share, whoever made it, is not opened here either.
	var st unix.Stat_t
	if unix.Fstatat(fd, name, &st, unix.AT_SYMLINK_NOFOLLOW) == nil && st.Mode&unix.S_IFMT == unix.S_IFIFO {
		errno := unix.ENXIO
		if flags&os.O_EXCL != 0 {
			errno = unix.EEXIST
		}
		m.same(fmt.Sprint("create over a FIFO ", path), f.Create(m.ctx, name, flags, mode, 0), errno)
		f.Close(m.ctx)
		return
	}
	err = f.Create(m.ctx, name, flags, mode, 0)
	lfd, lerr := unix.Openat(fd, name, flags|unix.O_CREAT|unix.O_NOFOLLOW|unix.O_CLOEXEC, mode)
	if !m.same(fmt.Sprintf("create %v flags %#x", path, flags), err, lerr) {
		f.Close(m.ctx)
		return
	}
	m.open = append(m.open, pair{f, lfd, fmt.Sprint(path)})
}

// onNode works on a file by its name.
func (m *model) onNode(path []string, dir *p9.File, fd int, name string, mode uint32) {
	f, err := dir.Walk(m.ctx, name)
	lfd, lerr := unix.Openat(fd, name, unix.O_PATH|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if !m.same(fmt.Sprint("look up ", path), err, lerr) {
		return
	}
	defer f.Close(m.ctx)
	defer unix.Close(lfd)
	magic := fmt.Sprint("/proc/self/fd/", lfd)
	var st unix.Stat_t
	if err := unix.Fstat(lfd, &st); err != nil {
		m.t.Error(err)
		return
	}
	kind := st.Mode & unix.S_IFMT
	switch op := m.r.IntN(6); {
	case op == 0 && kind != unix.S_IFLNK:
		m.same(fmt.Sprint("chmod ", path), f.SetAttr(m.ctx, p9.SetAttr{Valid: p9.SetMode, Mode: mode}), unix.Chmod(magic, mode))
	case op == 1 && kind == unix.S_IFREG:
		size := m.r.Int64N(20_000)
		m.same(fmt.Sprint("truncate ", path), f.SetAttr(m.ctx, p9.SetAttr{Valid: p9.SetSize, Size: uint64(size)}), unix.Truncate(magic, size))
	case op == 2:
		at, mt := m.r.Int64N(1<<34), m.r.Int64N(1<<34)
		err := f.SetAttr(m.ctx, p9.SetAttr{Valid: p9.SetAtime | p9.SetAtimeTo | p9.SetMtime | p9.SetMtimeTo,
			Atime: p9.Time{Sec: at, Nsec: 1}, Mtime: p9.Time{Sec: mt, Nsec: 2}})
		m.same(fmt.Sprint("utimens ", path), err, unix.UtimesNanoAt(lfd, "", []unix.Timespec{{Sec: at, Nsec: 1}, {Sec: mt, Nsec: 2}}, unix.AT_EMPTY_PATH))
	case op == 3 && kind != unix.S_IFLNK:
		m.xattr(path, f, magic)
	case op == 4 && kind == unix.S_IFLNK:
		got, err := f.Readlink(m.ctx)
		b := make([]byte, 4096)
		n, lerr := unix.Readlinkat(lfd, "", b)
		if m.same(fmt.Sprint("readlink ", path), err, lerr) && got != string(b[:n]) {
			m.t.Errorf("%q, want %q", got, b[:n])
		}
	default:
		a, err := f.GetAttr(m.ctx, p9.AttrBasic)
		m.same(fmt.Sprint("stat ", path), err, nil)
		if a.Mode != st.Mode || a.Nlink != uint64(st.Nlink) || kind != unix.S_IFDIR && a.Size != uint64(st.Size) {
			m.t.Errorf("%v is %+v, want %+v", path, a, st)
		}
	}
}

func (m *model) xattr(path []string, f *p9.File, magic string) {
	name := "user." + m.name()
	switch m.r.IntN(3) {
	case 0:
		value := bytes.Repeat([]byte{'v'}, m.r.IntN(200))
		flags := m.r.IntN(2) // XATTR_CREATE is 1
		m.same(fmt.Sprint("setxattr ", path), f.SetXattr(m.ctx, name, value, flags), unix.Setxattr(magic, name, value, flags))
	case 1:
		m.same(fmt.Sprint("removexattr ", path), f.SetXattr(m.ctx, name, nil, 0), unix.Removexattr(magic, name))
	case 2:
		got, err := f.Xattr(m.ctx, name)
		b := make([]byte, 1000)
		n, lerr := unix.Getxattr(magic, name, b)
		if m.same(fmt.Sprint("getxattr ", path), err, lerr) && !bytes.Equal(got, b[:n]) {
			m.t.Errorf("%q, want %q", got, b[:n])
		}
	}
}

// onOpen works on a file that is open, whatever has become of its name.
func (m *model) onOpen(i int) {
	p := m.open[i]
	offset := m.r.Int64N(30_000)
	switch m.r.IntN(6) {
	case 0, 1:
		data := bytes.Repeat([]byte{byte('0' + m.r.IntN(10))}, m.r.IntN(9000))
		n, err := p.ours.WriteAt(m.ctx, data, offset)
		ln, lerr := unix.Pwrite(p.local, data, offset)
		if m.same("write "+p.name, err, lerr) && n != ln {
			m.t.Errorf("%d bytes, want %d", n, ln)
		}
	case 2, 3:
		a, b := make([]byte, 9000), make([]byte, 9000)
		n, err := p.ours.ReadAt(m.ctx, a, offset)
		ln, lerr := unix.Pread(p.local, b, offset)
		if m.same("read "+p.name, err, lerr) && !bytes.Equal(a[:n], b[:ln]) {
			m.t.Errorf("%d bytes, want %d", n, ln)
		}
	case 4:
		m.same("ftruncate "+p.name, p.ours.SetAttr(m.ctx, p9.SetAttr{Valid: p9.SetSize, Size: uint64(offset)}), unix.Ftruncate(p.local, offset))
	case 5:
		m.close(i)
	}
}

// tree describes a tree: every name, and what can be compared of its file.
func tree(t *testing.T, root string) string {
	var b strings.Builder
	err := filepath.WalkDir(root, func(path string, _ fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		var st unix.Stat_t
		if err := unix.Lstat(path, &st); err != nil {
			return err
		}
		rel, _ := filepath.Rel(root, path)
		fmt.Fprintf(&b, "%s %o nlink %d", rel, st.Mode, st.Nlink)
		switch st.Mode & unix.S_IFMT {
		case unix.S_IFREG:
			data, err := os.ReadFile(path)
			if err != nil {
				return err
			}
			fmt.Fprintf(&b, " %d %x", st.Size, sha256.Sum256(data))
		case unix.S_IFLNK:
			target, _ := os.Readlink(path)
			fmt.Fprint(&b, " -> ", target)
		}
		list := make([]byte, 1000)
		n, _ := unix.Llistxattr(path, list)
		fmt.Fprintf(&b, " %q\n", list[:max(n, 0)])
		return nil
	})
	check(t, err)
	return b.String()
}
