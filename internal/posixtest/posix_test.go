// Package posixtest holds a file system to what the kernel's own ones do. Each test does the
// same in a directory of it and in one beside, and compares every result, errno included.
//
// WSL2_POSIX_DIR names the directory to test, WSL2_POSIX_LOCAL the other; by default both are temporary
// ones of this machine, and the tests test themselves. WSL2_POSIX_EVERY=N does an Nth of the cases, always the same.
package posixtest

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// TestMain: modes are what is asked for, on both sides.
func TestMain(m *testing.M) {
	unix.Umask(0)
	os.Exit(m.Run())
}

// dirs returns a new directory on each side.
func dirs(t *testing.T) (tested, local string) {
	t.Helper()
	side := func(variable string) string {
		dir, err := os.MkdirTemp(os.Getenv(variable), "posix-")
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { os.RemoveAll(dir) })
		return dir
	}
	return side("WSL2_POSIX_DIR"), side("WSL2_POSIX_LOCAL")
}

// errno is what is compared of an error.
func errno(err error) syscall.Errno {
	var n syscall.Errno
	if err != nil && !errors.As(err, &n) {
		return syscall.Errno(0xffff)
	}
	return n
}

// kinds make what an operation meets at a path.
var kinds = []struct {
	name string
	make func(path string) error
}{
	{"nothing", func(string) error { return nil }},
	{"file", func(p string) error { return os.WriteFile(p, []byte("contents"), 0o644) }},
	{"empty-directory", func(p string) error { return os.Mkdir(p, 0o755) }},
	{"directory", func(p string) error {
		return errors.Join(os.Mkdir(p, 0o755), os.WriteFile(p+"/in", []byte("in it"), 0o600))
	}},
	{"link-to-file", func(p string) error {
		return errors.Join(os.WriteFile(p+".target", []byte("target"), 0o644), os.Symlink(filepath.Base(p)+".target", p))
	}},
	{"link-to-directory", func(p string) error {
		return errors.Join(os.Mkdir(p+".target", 0o755), os.Symlink(filepath.Base(p)+".target", p))
	}},
	{"dangling-link", func(p string) error { return os.Symlink("no-such", p) }},
	{"loop", func(p string) error { return os.Symlink(filepath.Base(p), p) }},
	{"fifo", func(p string) error { return unix.Mkfifo(p, 0o644) }},
	{"socket", func(p string) error { return unix.Mknod(p, unix.S_IFSOCK|0o644, 0) }},
}

// opened is open(2), which tells the errno only.
func opened(flags int) func(string) error {
	return func(p string) error {
		fd, err := unix.Open(p, flags|unix.O_CLOEXEC|unix.O_NONBLOCK, 0o640)
		if err == nil {
			err = unix.Close(fd)
		}
		return err
	}
}

var long = strings.Repeat("n", 256)

// operations on one path.
var operations = []struct {
	name string
	do   func(path string) error
}{
	{"open-rdonly", opened(unix.O_RDONLY)},
	{"open-wronly", opened(unix.O_WRONLY)},
	{"open-rdwr", opened(unix.O_RDWR)},
	{"open-trunc", opened(unix.O_WRONLY | unix.O_TRUNC)},
	{"open-creat", opened(unix.O_RDWR | unix.O_CREAT)},
	{"open-creat-trunc", opened(unix.O_WRONLY | unix.O_CREAT | unix.O_TRUNC)},
	{"open-excl", opened(unix.O_WRONLY | unix.O_CREAT | unix.O_EXCL)},
	{"open-append", opened(unix.O_WRONLY | unix.O_APPEND)},
	{"open-directory", opened(unix.O_RDONLY | unix.O_DIRECTORY)},
	{"open-nofollow", opened(unix.O_RDONLY | unix.O_NOFOLLOW)},
	{"open-path", opened(unix.O_PATH | unix.O_NOFOLLOW)},
	{"open-slash", func(p string) error { return opened(unix.O_RDONLY)(p + "/") }},
	{"creat-slash", func(p string) error { return opened(unix.O_WRONLY | unix.O_CREAT)(p + "/") }},
	{"open-below", func(p string) error { return opened(unix.O_RDONLY)(p + "/x") }},
	{"creat-below", func(p string) error { return opened(unix.O_WRONLY | unix.O_CREAT)(p + "/x") }},
	{"creat-long", func(p string) error { return opened(unix.O_WRONLY | unix.O_CREAT)(p + "/" + long) }},
	{"creat-255", func(p string) error { return opened(unix.O_WRONLY | unix.O_CREAT)(p + "/" + long[:255]) }},
	{"mkdir", func(p string) error { return unix.Mkdir(p, 0o710) }},
	{"mkdir-slash", func(p string) error { return unix.Mkdir(p+"/", 0o710) }},
	{"mkdir-below", func(p string) error { return unix.Mkdir(p+"/x", 0o710) }},
	{"mkdir-long", func(p string) error { return unix.Mkdir(p+"/"+long, 0o710) }},
	{"mkdir-dot", func(p string) error { return unix.Mkdir(p+"/.", 0o710) }},
	{"mkfifo", func(p string) error { return unix.Mkfifo(p, 0o620) }},
	{"mknod-file", func(p string) error { return unix.Mknod(p, unix.S_IFREG|0o604, 0) }},
	{"mknod-socket", func(p string) error { return unix.Mknod(p, unix.S_IFSOCK|0o604, 0) }},
	{"symlink", func(p string) error { return unix.Symlink("a/../b", p) }},
	{"symlink-below", func(p string) error { return unix.Symlink("b", p+"/x") }},
	{"symlink-empty", func(p string) error { return unix.Symlink("", p) }},
	{"symlink-4095", func(p string) error { return unix.Symlink(strings.Repeat("t/", 2047)+"t", p) }},
	{"unlink", unix.Unlink},
	{"unlink-slash", func(p string) error { return unix.Unlink(p + "/") }},
	{"unlink-below", func(p string) error { return unix.Unlink(p + "/in") }},
	{"rmdir", unix.Rmdir},
	{"rmdir-slash", func(p string) error { return unix.Rmdir(p + "/") }},
	{"rmdir-dot", func(p string) error { return unix.Rmdir(p + "/.") }},
	{"rmdir-dotdot", func(p string) error { return unix.Rmdir(p + "/..") }},
	{"truncate-0", func(p string) error { return unix.Truncate(p, 0) }},
	{"truncate-3", func(p string) error { return unix.Truncate(p, 3) }},
	{"truncate-100000", func(p string) error { return unix.Truncate(p, 100_000) }},
	{"truncate-negative", func(p string) error { return unix.Truncate(p, -1) }},
	{"chmod-0", func(p string) error { return unix.Chmod(p, 0) }},
	{"chmod-751", func(p string) error { return unix.Chmod(p, 0o751) }},
	{"chmod-sticky", func(p string) error { return unix.Chmod(p, 0o1777) }},
	{"chown-same", func(p string) error { return unix.Lchown(p, -1, -1) }},
	{"utimens", func(p string) error {
		return unix.UtimesNanoAt(unix.AT_FDCWD, p, []unix.Timespec{{Sec: 1_000_000_000}, {Sec: 1_234_567_890}}, unix.AT_SYMLINK_NOFOLLOW)
	}},
	{"utimens-2040", func(p string) error {
		return unix.UtimesNanoAt(unix.AT_FDCWD, p, []unix.Timespec{{Sec: 1 << 31}, {Sec: 1<<31 + 12345}}, 0)
	}},
	{"readlink", func(p string) error {
		_, err := os.Readlink(p)
		return err
	}},
	{"readdir", func(p string) error {
		_, err := os.ReadDir(p)
		return err
	}},
	{"stat", func(p string) error { return unix.Stat(p, new(unix.Stat_t)) }},
	{"lstat-slash", func(p string) error { return unix.Lstat(p+"/", new(unix.Stat_t)) }},
	{"statfs", func(p string) error { return unix.Statfs(p, new(unix.Statfs_t)) }},
	{"access-rw", func(p string) error { return unix.Access(p, unix.R_OK|unix.W_OK) }},
	{"access-x", func(p string) error { return unix.Access(p, unix.X_OK) }},
	{"setxattr", func(p string) error { return unix.Setxattr(p, "user.a", []byte("value"), 0) }},
	{"setxattr-create", func(p string) error { return unix.Setxattr(p, "user.a", []byte("value"), unix.XATTR_CREATE) }},
	{"setxattr-replace", func(p string) error { return unix.Setxattr(p, "user.a", []byte("value"), unix.XATTR_REPLACE) }},
	{"getxattr-none", func(p string) error {
		_, err := unix.Getxattr(p, "user.none", make([]byte, 10))
		return err
	}},
	{"removexattr-none", func(p string) error { return unix.Removexattr(p, "user.none") }},
	{"write", func(p string) error {
		f, err := os.OpenFile(p, os.O_WRONLY|unix.O_NONBLOCK, 0)
		if err == nil {
			_, err = f.WriteString("other")
			f.Close()
		}
		return err
	}},
	{"read", func(p string) error {
		if st, err := os.Stat(p); err == nil && !st.Mode().IsRegular() && !st.IsDir() {
			return nil // it would wait
		}
		_, err := os.ReadFile(p)
		return err
	}},
}

// pair is an operation on two paths.
type pair struct {
	name string
	do   func(from, to string) error
}

var pairs = []pair{
	{"rename", unix.Rename},
	{"rename-into", func(from, to string) error { return unix.Rename(from, to+"/x") }},
	{"link", unix.Link},
	{"link-follow", func(from, to string) error {
		return unix.Linkat(unix.AT_FDCWD, from, unix.AT_FDCWD, to, unix.AT_SYMLINK_FOLLOW)
	}},
}

// flagged are those that renameat2(2) has flags for, which 9P has not.
var flagged = []pair{
	{"rename-noreplace", func(from, to string) error {
		return unix.Renameat2(unix.AT_FDCWD, from, unix.AT_FDCWD, to, unix.RENAME_NOREPLACE)
	}},
	{"rename-exchange", func(from, to string) error {
		return unix.Renameat2(unix.AT_FDCWD, from, unix.AT_FDCWD, to, unix.RENAME_EXCHANGE)
	}},
}

// tree describes all below dir that both sides have in common.
func tree(t *testing.T, dir string) string {
	t.Helper()
	var b strings.Builder
	var walk func(path, name string)
	walk = func(path, name string) {
		var st unix.Stat_t
		if err := unix.Lstat(path, &st); err != nil {
			t.Fatal(err)
		}
		fmt.Fprintf(&b, "%s %o", name, st.Mode)
		switch st.Mode & unix.S_IFMT {
		case unix.S_IFREG:
			fmt.Fprintf(&b, " nlink %d size %d", st.Nlink, st.Size)
			if data, err := os.ReadFile(path); err == nil {
				fmt.Fprintf(&b, " %q", data[:min(len(data), 40)])
			}
			if st.Mtim.Sec < 1_500_000_000 || st.Mtim.Sec > 1<<31 {
				fmt.Fprintf(&b, " mtime %d", st.Mtim.Sec)
			}
		case unix.S_IFLNK:
			target, _ := os.Readlink(path)
			fmt.Fprintf(&b, " -> %s", target)
		}
		value := make([]byte, 100)
		if n, err := unix.Lgetxattr(path, "user.a", value); err == nil {
			fmt.Fprintf(&b, " user.a=%q", value[:n])
		}
		b.WriteByte('\n')
		if st.Mode&unix.S_IFMT == unix.S_IFDIR {
			entries, err := os.ReadDir(path)
			if err != nil {
				fmt.Fprintf(&b, "%s: %v\n", name, errno(err))
			}
			for _, e := range entries {
				walk(path+"/"+e.Name(), name+"/"+e.Name())
			}
		}
	}
	walk(dir, ".")
	return b.String()
}

// TestOperations does each operation on each kind of file: the same error, and then the same tree.
func TestOperations(t *testing.T) {
	tested, local := dirs(t)
	cases := 0
	for _, op := range operations {
		for _, kind := range kinds {
			cases++
			name := op.name + "." + kind.name
			compare(t, name, tested, local, func(dir string) (error, error) {
				p := dir + "/p"
				return kind.make(p), op.do(p)
			})
		}
	}
	if cases += onPairs(t, tested, local, pairs); cases < 800 {
		t.Errorf("only %d cases", cases)
	}
}

// TestRenameFlags is TestOperations for renameat2(2)'s flags.
func TestRenameFlags(t *testing.T) {
	tested, local := dirs(t)
	onPairs(t, tested, local, flagged)
}

// onPairs does each operation on each two kinds of files, and returns how many there were.
func onPairs(t *testing.T, tested, local string, operations []pair) (cases int) {
	t.Helper()
	for _, op := range operations {
		for _, from := range kinds {
			for _, to := range kinds {
				if to.name == "socket" || to.name == "loop" { // nothing tells them from a FIFO, or a link that dangles
					continue
				}
				cases++
				name := op.name + "." + from.name + "." + to.name
				compare(t, name, tested, local, func(dir string) (error, error) {
					p, q := dir+"/p", dir+"/q"
					return errors.Join(from.make(p), to.make(q)), op.do(p, q)
				})
			}
		}
	}
	return cases
}

// chosen tells whether a case is to be done.
func chosen(t *testing.T, name string) bool {
	t.Helper()
	text := os.Getenv("WSL2_POSIX_EVERY")
	if text == "" {
		return true
	}
	n, err := strconv.ParseUint(text, 10, 32)
	check(t, err)
	return crc32.ChecksumIEEE([]byte(name))%uint32(n) == 0
}

// compare does the same on both sides, each in a directory of its own.
func compare(t *testing.T, name, tested, local string, do func(dir string) (made, err error)) {
	t.Helper()
	if !chosen(t, name) {
		return
	}
	t.Run(name, func(t *testing.T) {
		var trees [2]string
		var errs [2]error
		for i, side := range []string{tested, local} {
			dir := side + "/" + name
			if err := os.Mkdir(dir, 0o755); err != nil {
				t.Fatal(err)
			}
			made, err := do(dir)
			if made != nil {
				t.Fatal(made)
			}
			errs[i], trees[i] = err, tree(t, dir)
			os.RemoveAll(dir)
		}
		if errno(errs[0]) != errno(errs[1]) {
			t.Errorf("%v, want %v", errs[0], errs[1])
		}
		if trees[0] != trees[1] {
			t.Errorf("it leaves\n%swant\n%s", trees[0], trees[1])
		}
	})
}

func open(t *testing.T, path string, flags int) *os.File {
	t.Helper()
	f, err := os.OpenFile(path, flags, 0o644)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	return f
}

func check(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// TestUnlinked: a file that is open lives on without a name, and through renames.
func TestUnlinked(t *testing.T) {
	dir, _ := dirs(t)
	f := open(t, dir+"/f", os.O_RDWR|os.O_CREATE)
	_, err := f.WriteString("before")
	check(t, err)
	check(t, os.Rename(dir+"/f", dir+"/g"))
	check(t, os.WriteFile(dir+"/h", []byte("other"), 0o644))
	check(t, os.Rename(dir+"/h", dir+"/g"))
	_, err = f.WriteString(" after")
	check(t, err)
	var st unix.Stat_t
	check(t, unix.Fstat(int(f.Fd()), &st))
	if st.Nlink != 0 || st.Size != 12 {
		t.Errorf("%d links, %d bytes", st.Nlink, st.Size)
	}
	b := make([]byte, 20)
	if n, _ := f.ReadAt(b, 0); string(b[:n]) != "before after" {
		t.Errorf("%q", b[:n])
	}
	check(t, f.Chmod(0o400))
	check(t, f.Truncate(3))
	if got, err := os.ReadFile(dir + "/g"); err != nil || string(got) != "other" {
		t.Errorf("%q, %v", got, err)
	}
}

// TestMapping: a shared mapping is written and read, and is one with read(2) and write(2).
func TestMapping(t *testing.T) {
	dir, _ := dirs(t)
	f := open(t, dir+"/f", os.O_RDWR|os.O_CREATE)
	check(t, f.Truncate(3*4096))
	m, err := unix.Mmap(int(f.Fd()), 0, 3*4096, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	check(t, err)
	copy(m[4096:], "mapped")
	check(t, unix.Msync(m, unix.MS_SYNC))
	b := make([]byte, 6)
	if _, err := f.ReadAt(b, 4096); err != nil || string(b) != "mapped" {
		t.Errorf("%q, %v", b, err)
	}
	_, err = f.WriteAt([]byte("written"), 8192)
	check(t, err)
	if got := string(m[8192:8199]); got != "written" {
		t.Errorf("%q", got)
	}
	check(t, unix.Munmap(m))
	if got, err := os.ReadFile(dir + "/f"); err != nil || string(got[4096:4102]) != "mapped" || len(got) != 3*4096 {
		t.Errorf("%d bytes, %v", len(got), err)
	}
}

// TestDirect: what is written past the cache (O_DIRECT) is read through it, and the other way round.
func TestDirect(t *testing.T) {
	dir, _ := dirs(t)
	f := open(t, dir+"/f", os.O_RDWR|os.O_CREATE)
	_, err := f.WriteAt(bytes.Repeat([]byte("cached"), 2048), 0)
	check(t, err)
	direct := open(t, dir+"/f", os.O_RDWR|unix.O_DIRECT)
	page, err := unix.Mmap(-1, 0, 4096, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANON) // aligned
	check(t, err)
	defer unix.Munmap(page) //nolint:errcheck // it is one
	want := bytes.Repeat([]byte("cached"), 2048)
	if n, err := direct.ReadAt(page, 4096); n != 4096 || err != nil || !bytes.Equal(page, want[4096:8192]) {
		t.Errorf("read past the cache: %d bytes, %v", n, err)
	}
	for i := range page {
		page[i] = byte(i)
	}
	if n, err := direct.WriteAt(page, 4096); n != 4096 || err != nil {
		t.Errorf("written past the cache: %d bytes, %v", n, err)
	}
	copy(want[4096:], page)
	if got, err := os.ReadFile(dir + "/f"); err != nil || !bytes.Equal(got, want) {
		t.Errorf("through the cache: %d bytes, %v", len(got), err)
	}
}

// TestAppend: what two files append is all there, in pieces as they were written.
func TestAppend(t *testing.T) {
	dir, _ := dirs(t)
	a := open(t, dir+"/log", os.O_WRONLY|os.O_CREATE|os.O_APPEND)
	b := open(t, dir+"/log", os.O_WRONLY|os.O_APPEND)
	for range 50 {
		_, err := a.WriteString("aaaa\n")
		check(t, err)
		_, err = b.WriteString("bbbbbb\n")
		check(t, err)
	}
	got, err := os.ReadFile(dir + "/log")
	check(t, err)
	if want := strings.Repeat("aaaa\nbbbbbb\n", 50); string(got) != want {
		t.Errorf("%d bytes, want %d", len(got), len(want))
	}
}

// TestHoles: a file is as large as its last byte says, and what was not written is zeros.
func TestHoles(t *testing.T) {
	dir, local := dirs(t)
	for _, d := range []string{dir, local} {
		f := open(t, d+"/f", os.O_RDWR|os.O_CREATE)
		_, err := f.WriteAt([]byte("end"), 5<<30)
		check(t, err)
		st, err := f.Stat()
		check(t, err)
		if st.Size() != 5<<30+3 {
			t.Errorf("%d bytes", st.Size())
		}
		if blocks := st.Sys().(*syscall.Stat_t).Blocks; blocks > 1<<12 {
			t.Errorf("%d blocks", blocks)
		}
		b := make([]byte, 8)
		if n, err := f.ReadAt(b, 5<<30-5); n != 8 || string(b) != "\x00\x00\x00\x00\x00end" {
			t.Errorf("%q, %v", b, err)
		}
	}
}

// TestSeek: where data is and where holes are, lseek(2) tells.
func TestSeek(t *testing.T) {
	dir, local := dirs(t)
	var told [2]string
	for i, d := range []string{dir, local} {
		f := open(t, d+"/f", os.O_RDWR|os.O_CREATE)
		check(t, f.Truncate(4<<20))
		_, err := f.WriteAt(make([]byte, 64<<10), 1<<20)
		check(t, err)
		check(t, f.Sync()) // what is not allocated yet is a hole to some
		for _, at := range []int64{0, 1 << 20, 1<<20 + 5, 2 << 20, 4 << 20} {
			for _, whence := range []int{unix.SEEK_DATA, unix.SEEK_HOLE} {
				found, err := unix.Seek(int(f.Fd()), at, whence)
				told[i] += fmt.Sprintf("from %d whence %d: %d, %v\n", at, whence, found, err)
			}
		}
	}
	if told[0] != told[1] {
		t.Errorf("%swant\n%s", told[0], told[1])
	}
}

// TestTimes: times are kept to the nanosecond.
func TestTimes(t *testing.T) {
	dir, _ := dirs(t)
	check(t, os.WriteFile(dir+"/f", nil, 0o644))
	for _, want := range []time.Time{time.Unix(1_700_000_000, 123_456_789), time.Unix(1<<32, 999_999_999)} {
		check(t, os.Chtimes(dir+"/f", want, want))
		st, err := os.Stat(dir + "/f")
		check(t, err)
		if !st.ModTime().Equal(want) {
			t.Errorf("%v, want %v", st.ModTime(), want)
		}
	}
}

// TestNames: names are any bytes, up to 255.
func TestNames(t *testing.T) {
	dir, _ := dirs(t)
	names := []string{long[:255], "...", "a\nb", "-rf", "ä", strings.Repeat("\xff", 255)}
	for b := 1; b < 256; b++ {
		if b != '/' && b != '.' {
			names = append(names, string([]byte{byte(b)}))
		}
	}
	for _, name := range names {
		check(t, os.WriteFile(dir+"/"+name, []byte(name), 0o644))
	}
	entries, err := os.ReadDir(dir)
	check(t, err)
	var got []string
	for _, e := range entries {
		got = append(got, e.Name())
	}
	slices.Sort(names)
	if !slices.Equal(got, names) {
		t.Errorf("%d names, want %d", len(got), len(names))
	}
}

// TestDeep: a tree may be deeper than any path is long.
func TestDeep(t *testing.T) {
	dir, _ := dirs(t)
	const levels = 300
	name := strings.Repeat("d", 20)
	at, err := unix.Open(dir, unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	check(t, err)
	for range levels {
		check(t, unix.Mkdirat(at, name, 0o755))
		below, err := unix.Openat(at, name, unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
		check(t, err)
		check(t, unix.Close(at))
		at = below
	}
	defer unix.Close(at)
	fd, err := unix.Openat(at, "f", unix.O_RDWR|unix.O_CREAT|unix.O_CLOEXEC, 0o644)
	check(t, err)
	defer unix.Close(fd)
	if n, err := unix.Write(fd, []byte("text")); n != 4 || err != nil {
		t.Errorf("%d, %v", n, err)
	}
	var st unix.Stat_t
	if err := unix.Fstatat(at, "f", &st, 0); err != nil || st.Size != 4 {
		t.Errorf("%d bytes, %v", st.Size, err)
	}
	if err := unix.Fstatat(at, strings.Repeat("../", levels)+name, &st, 0); err != nil || st.Mode&unix.S_IFMT != unix.S_IFDIR {
		t.Errorf("up to its top: mode %o, %v", st.Mode, err)
	}
	if err := unix.Access(dir+strings.Repeat("/"+name, levels), unix.F_OK); err != unix.ENAMETOOLONG {
		t.Errorf("by path: %v", err)
	}
	check(t, os.RemoveAll(dir+"/"+name))
}

// TestReaddir: a directory that changes while it is read shows once what was there all the time.
func TestReaddir(t *testing.T) {
	dir, _ := dirs(t)
	const stay = 700
	for i := range stay {
		check(t, os.WriteFile(fmt.Sprintf("%s/stay-%d", dir, i), nil, 0o644))
		check(t, os.WriteFile(fmt.Sprintf("%s/go-%d", dir, i), nil, 0o644))
	}
	d := open(t, dir, os.O_RDONLY)
	seen := map[string]int{}
	for i := 0; ; i++ {
		names, err := d.Readdirnames(100)
		if err != nil {
			break
		}
		for _, name := range names {
			if strings.HasPrefix(name, "stay") {
				seen[name]++
			}
		}
		for j := range 60 {
			os.Remove(fmt.Sprintf("%s/go-%d", dir, i*60+j)) //nolint:errcheck // some are gone
		}
		check(t, os.WriteFile(fmt.Sprintf("%s/new-%d", dir, i), nil, 0o644))
	}
	for name, n := range seen {
		if n != 1 {
			t.Errorf("%s is there %d times", name, n)
		}
	}
	if len(seen) != stay {
		t.Errorf("%d names, want %d", len(seen), stay)
	}
}

// TestXattrs: attributes of users keep any value, and are listed.
func TestXattrs(t *testing.T) {
	dir, _ := dirs(t)
	p := dir + "/f"
	check(t, os.WriteFile(p, nil, 0o644))
	for _, value := range [][]byte{{}, {0}, []byte("text"), bytes.Repeat([]byte{0xff}, 2000)} {
		check(t, unix.Setxattr(p, "user.x", value, 0))
		b := make([]byte, 4000)
		if n, err := unix.Getxattr(p, "user.x", b); err != nil || !bytes.Equal(b[:n], value) {
			t.Errorf("%d bytes, %v, want %d", n, err, len(value))
		}
		if n, err := unix.Getxattr(p, "user.x", nil); err != nil || n != len(value) {
			t.Errorf("the size is %d, %v, want %d", n, err, len(value))
		}
	}
	if _, err := unix.Getxattr(p, "user.x", make([]byte, 10)); err != unix.ERANGE {
		t.Errorf("a small buffer: %v, want ERANGE", err)
	}
	check(t, unix.Setxattr(p, "user.y", []byte("1"), unix.XATTR_CREATE))
	if err := unix.Setxattr(p, "user.y", nil, unix.XATTR_CREATE); err != unix.EEXIST {
		t.Errorf("%v, want EEXIST", err)
	}
	b := make([]byte, 1000)
	n, err := unix.Listxattr(p, b)
	check(t, err)
	list := strings.Split(strings.TrimSuffix(string(b[:n]), "\x00"), "\x00")
	slices.Sort(list)
	list = slices.DeleteFunc(list, func(s string) bool { return !strings.HasPrefix(s, "user.") })
	if !slices.Equal(list, []string{"user.x", "user.y"}) {
		t.Errorf("%q", list)
	}
	check(t, unix.Removexattr(p, "user.x"))
}

// TestACL: an access control list holds, or is refused; never taken and ignored.
func TestACL(t *testing.T) {
	dir, _ := dirs(t)
	p := dir + "/f"
	check(t, os.WriteFile(p, nil, 0o600))
	// struct posix_acl_xattr_header and entries: tag[2] permissions[2] id[4].
	entry := func(tag, permissions uint16, id uint32) []byte {
		b := binary.LittleEndian.AppendUint16(nil, tag)
		return binary.LittleEndian.AppendUint32(binary.LittleEndian.AppendUint16(b, permissions), id)
	}
	const user, named, group, mask, other, nobody = 1, 2, 4, 0x10, 0x20, ^uint32(0)
	acl := slices.Concat([]byte{2, 0, 0, 0}, entry(user, 6, nobody), entry(named, 4, 12345), entry(group, 0, nobody), entry(mask, 4, nobody), entry(other, 0, nobody))
	err := unix.Setxattr(p, "system.posix_acl_access", acl, 0)
	if err == unix.EOPNOTSUPP {
		return
	}
	check(t, err)
	got := make([]byte, 100)
	if n, err := unix.Getxattr(p, "system.posix_acl_access", got); err != nil || !bytes.Equal(got[:n], acl) {
		t.Errorf("%x, %v, want %x", got[:max(n, 0)], err, acl)
	}
	var st unix.Stat_t
	if err := unix.Stat(p, &st); err != nil || st.Mode&0o777 != 0o640 {
		t.Errorf("mode %o, %v, want the mask in it", st.Mode, err)
	}
}

// TestFlock: flock(2)'s locks are of open files.
func TestFlock(t *testing.T) {
	dir, _ := dirs(t)
	a, b := open(t, dir+"/f", os.O_RDWR|os.O_CREATE), open(t, dir+"/f", os.O_RDONLY)
	lock := func(f *os.File, how int) error { return unix.Flock(int(f.Fd()), how|unix.LOCK_NB) }
	check(t, lock(a, unix.LOCK_SH))
	check(t, lock(b, unix.LOCK_SH))
	if err := lock(a, unix.LOCK_EX); err != unix.EWOULDBLOCK {
		t.Errorf("%v, want EWOULDBLOCK", err)
	}
	check(t, lock(b, unix.LOCK_UN))
	check(t, lock(a, unix.LOCK_EX))
	if err := lock(b, unix.LOCK_SH); err != unix.EWOULDBLOCK {
		t.Errorf("%v, want EWOULDBLOCK", err)
	}
	check(t, a.Close())
	check(t, unix.Flock(int(b.Fd()), unix.LOCK_EX)) // a FUSE mount hears of the close a moment later
}

// TestFcntl: fcntl(2)'s locks are of a process, through all its descriptors.
func TestFcntl(t *testing.T) {
	dir, _ := dirs(t)
	a, b := open(t, dir+"/f", os.O_RDWR|os.O_CREATE), open(t, dir+"/f", os.O_RDWR)
	set := func(f *os.File, kind int16, start, length int64) error {
		return unix.FcntlFlock(f.Fd(), unix.F_SETLK, &unix.Flock_t{Type: kind, Start: start, Len: length})
	}
	check(t, set(a, unix.F_WRLCK, 0, 10))
	check(t, set(b, unix.F_WRLCK, 5, 10)) // no conflict with oneself
	check(t, set(b, unix.F_UNLCK, 0, 0))
	check(t, set(a, unix.F_RDLCK, 0, 0))
	r := open(t, dir+"/f", os.O_RDONLY)
	if err := set(r, unix.F_WRLCK, 0, 1); err != unix.EBADF {
		t.Errorf("a write lock of what is open for reading: %v, want EBADF", err)
	}
}

// TestBig: blocks of many sizes are what was written.
func TestBig(t *testing.T) {
	dir, _ := dirs(t)
	data := make([]byte, 3<<20+17)
	for i := range data {
		data[i] = byte(i ^ i>>8 ^ i>>16)
	}
	for _, block := range []int{4096, 100_000, 1 << 20, len(data)} {
		f := open(t, fmt.Sprintf("%s/%d", dir, block), os.O_RDWR|os.O_CREATE)
		for at := 0; at < len(data); at += block {
			_, err := f.WriteAt(data[at:min(at+block, len(data))], int64(at))
			check(t, err)
		}
		check(t, f.Sync())
		got, err := os.ReadFile(f.Name())
		check(t, err)
		if !bytes.Equal(got, data) {
			t.Errorf("in blocks of %d: not what was written", block)
		}
	}
}
