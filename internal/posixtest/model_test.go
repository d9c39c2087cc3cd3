package posixtest

import (
	"bytes"
	"fmt"
	"math/rand/v2"
	"os"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// TestModel does the same random operations in both directories: every result and the trees must be the same. WSL2_POSIX_STEPS
// is how many.
func TestModel(t *testing.T) {
	steps := 2000
	if text := os.Getenv("WSL2_POSIX_STEPS"); text != "" {
		var err error
		steps, err = strconv.Atoi(text)
		check(t, err)
	}
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	m := &model{t: t, r: rand.New(rand.NewPCG(seed, 0))}
	m.sides[0], m.sides[1] = dirs(t)
	for i := range steps {
		if m.step(); t.Failed() {
			t.Fatalf("after step %d of seed %d:\n%s", i, seed, strings.Join(m.log, "\n"))
		}
	}
	for len(m.open) > 0 {
		m.close(0)
	}
	if got, want := tree(t, m.sides[0]), tree(t, m.sides[1]); got != want {
		t.Errorf("the trees differ, seed %d:\n%s\n\nwant\n%s", seed, got, want)
	}
	if m.succeeded < steps/4-20 { // of a few it is a matter of chance
		t.Errorf("only %d of %d operations did anything", m.succeeded, steps)
	}
}

// model is the state of a run: nothing but the files that are open on both sides.
type model struct {
	t         *testing.T
	r         *rand.Rand
	sides     [2]string
	open      []twin
	log       []string // the last operations
	succeeded int
}

// twin is a file that is open on both sides.
type twin struct {
	fd   [2]int
	name string
}

// both does something on both sides, and compares what came of it: the errno, and the text that says what was found.
func (m *model) both(what string, do func(side int) (string, error)) bool {
	m.t.Helper()
	var found [2]string
	var errs [2]error
	for i := range m.sides {
		found[i], errs[i] = do(i)
	}
	if len(m.log) == 40 {
		m.log = m.log[1:]
	}
	m.log = append(m.log, fmt.Sprintf("%s: %v", what, errs[0]))
	if errno(errs[0]) != errno(errs[1]) || found[0] != found[1] {
		m.t.Errorf("%s: %q, %v, want %q, %v", what, found[0], errs[0], found[1], errs[1])
	}
	if errs[0] == nil {
		m.succeeded++
	}
	return errs[0] == nil
}

// at is both for an operation on a path that finds nothing.
func (m *model) at(what, path string, do func(path string) error) {
	m.t.Helper()
	m.both(what+" "+path, func(side int) (string, error) { return "", do(m.sides[side] + path) })
}

// path is of one to three names: so most are there some of the time.
func (m *model) path() string {
	p := ""
	for p == "" || m.r.IntN(3) == 0 && len(p) < 6 {
		p += "/" + string("abcdef"[m.r.IntN(6)])
	}
	return p
}

func (m *model) close(i int) {
	f := m.open[i]
	m.open[i] = m.open[len(m.open)-1]
	m.open = m.open[:len(m.open)-1]
	m.both("close "+f.name, func(side int) (string, error) { return "", unix.Close(f.fd[side]) })
}

// step does one operation.
func (m *model) step() {
	if len(m.open) > 0 && (m.r.IntN(10) < 4 || len(m.open) > 8) {
		m.onOpen(m.r.IntN(len(m.open)))
		return
	}
	path, other := m.path(), m.path()
	mode := uint32(m.r.IntN(0o1000)) | 0o700
	switch m.r.IntN(16) {
	case 0, 1:
		m.at("mkdir", path, func(p string) error { return unix.Mkdir(p, mode) })
	case 2:
		m.at("unlink", path, unix.Unlink)
	case 3:
		m.at("rmdir", path, unix.Rmdir)
	case 4:
		target := other[1:2] // never out of the directory, which both sides may have beside them
		m.at("symlink", path, func(p string) error { return unix.Symlink(target, p) })
	case 5:
		m.at("mkfifo", path, func(p string) error { return unix.Mkfifo(p, mode) })
	case 6, 7:
		m.both("rename "+path+" "+other, func(side int) (string, error) {
			return "", unix.Rename(m.sides[side]+path, m.sides[side]+other)
		})
	case 8:
		m.both("link "+path+" "+other, func(side int) (string, error) {
			return "", unix.Link(m.sides[side]+path, m.sides[side]+other)
		})
	case 9, 10, 11:
		m.create(path, mode)
	case 12:
		m.at("chmod", path, func(p string) error { return unix.Chmod(p, mode) })
	case 13:
		size := m.r.Int64N(20_000)
		m.at("truncate", path, func(p string) error { return unix.Truncate(p, size) })
	case 14:
		m.xattr(path)
	case 15:
		m.both("stat "+path, func(side int) (string, error) {
			var st unix.Stat_t
			if err := unix.Lstat(m.sides[side]+path, &st); err != nil {
				return "", err
			}
			if st.Mode&unix.S_IFMT == unix.S_IFDIR { // a file system's own
				st.Size, st.Nlink = 0, 0
			}
			return fmt.Sprintf("%o %d %d", st.Mode, st.Nlink, st.Size), nil
		})
	}
}

func (m *model) create(path string, mode uint32) {
	flags := []int{0, unix.O_EXCL, unix.O_TRUNC, unix.O_APPEND}[m.r.IntN(4)] | unix.O_RDWR | unix.O_CREAT | unix.O_CLOEXEC | unix.O_NONBLOCK
	f := twin{name: path}
	if m.both(fmt.Sprintf("open %s flags %#x", path, flags), func(side int) (_ string, err error) {
		f.fd[side], err = unix.Open(m.sides[side]+path, flags, mode)
		return "", err
	}) {
		m.open = append(m.open, f)
	}
}

func (m *model) xattr(path string) {
	value, flags := bytes.Repeat([]byte{'v'}, m.r.IntN(200)), m.r.IntN(3) // XATTR_CREATE, XATTR_REPLACE
	switch m.r.IntN(3) {
	case 0:
		m.at("setxattr", path, func(p string) error { return unix.Setxattr(p, "user.a", value, flags) })
	case 1:
		m.at("removexattr", path, func(p string) error { return unix.Removexattr(p, "user.a") })
	case 2:
		m.both("getxattr "+path, func(side int) (string, error) {
			b := make([]byte, 1000)
			n, err := unix.Getxattr(m.sides[side]+path, "user.a", b)
			return string(b[:max(n, 0)]), err
		})
	}
}

// onOpen works on a file that is open, whatever has become of its name.
func (m *model) onOpen(i int) {
	f := m.open[i]
	offset, size := m.r.Int64N(30_000), m.r.IntN(9000)
	var st unix.Stat_t
	check(m.t, unix.Fstat(f.fd[1], &st))
	if st.Mode&unix.S_IFMT != unix.S_IFREG { // a FIFO, which is each kernel's own
		m.close(i)
		return
	}
	switch m.r.IntN(6) {
	case 0, 1:
		data := bytes.Repeat([]byte{byte('0' + m.r.IntN(10))}, size)
		m.both("write "+f.name, func(side int) (string, error) {
			n, err := unix.Pwrite(f.fd[side], data, offset)
			return fmt.Sprint(n), err
		})
	case 2, 3:
		m.both("read "+f.name, func(side int) (string, error) {
			b := make([]byte, size)
			n, err := unix.Pread(f.fd[side], b, offset)
			return string(b[:max(n, 0)]), err
		})
	case 4:
		m.both("ftruncate "+f.name, func(side int) (string, error) { return "", unix.Ftruncate(f.fd[side], offset) })
	case 5:
		m.close(i)
	}
}
