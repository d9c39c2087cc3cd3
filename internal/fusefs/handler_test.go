package fusefs

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"sync"
	"testing"
	"time"

	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"

	"github.com/wsl2/wsl2/internal/p9"
	"github.com/wsl2/wsl2/internal/p9/localfs"
)

// Requests that the tests make (include/uapi/linux/fuse.h).
const (
	opLookup    = 1
	opGetattr   = 3
	opSetattr   = 4
	opSymlink   = 6
	opUnlink    = 10
	opRename    = 12
	opOpen      = 14
	opRead      = 15
	opWrite     = 16
	opRelease   = 18
	opFlush     = 25
	opOpendir   = 27
	opReaddir   = 28
	opGetlk     = 31
	opSetlk     = 32
	opSetlkw    = 33
	opCreate    = 35
	opFallocate = 43
	opRename2   = 45
	lastOpcode  = 52
)

// kernel is a guest's: it makes requests of a directory that is served.
type kernel struct {
	handle func(request, room []byte) int
	unique uint64
	uid    uint32
}

func u32(v ...uint32) (b []byte) {
	for _, n := range v {
		b = binary.LittleEndian.AppendUint32(b, n)
	}
	return b
}

func u64(v ...uint64) (b []byte) {
	for _, n := range v {
		b = binary.LittleEndian.AppendUint64(b, n)
	}
	return b
}

func join(parts ...[]byte) []byte { return bytes.Join(parts, nil) }

// serve serves a new directory, without the confinement's uses: they are localfs's.
func serve(t testing.TB, cfg Config) (k *kernel, dir string) {
	t.Helper()
	return serveLocal(t, cfg, localfs.Config{Untrusted: true}, func(n p9.Node) p9.Node { return n })
}

// serveLocal is serve of any directory, as what the nodes of a test make of it.
func serveLocal(t testing.TB, cfg Config, how localfs.Config, as func(p9.Node) p9.Node) (k *kernel, dir string) {
	t.Helper()
	dir = t.TempDir()
	local, err := localfs.New(dir, how)
	if err != nil {
		t.Fatal(err)
	}
	root, err := local.Attach("", "", 0)
	if err != nil {
		t.Fatal(err)
	}
	fs := New(as(root), cfg)
	t.Cleanup(func() {
		fs.Close()
		local.Close()
	})
	return &kernel{handle: fs.Handler(func(string, ...any) {})}, dir
}

// observed is a node that tells of requests for attributes, once they are answered, and has none of what localfs's have beyond 9P's.
type observed struct {
	p9.Node
	answered func()
}

func (n observed) Clone() p9.Node { return observed{n.Node.Clone(), n.answered} }

func (n observed) Walk(name string) (p9.Node, error) {
	child, err := n.Node.Walk(name)
	return observed{child, n.answered}, err
}

func (n observed) GetAttr(mask p9.AttrMask) (p9.Attr, error) {
	defer n.answered()
	return n.Node.GetAttr(mask)
}

func (n observed) SetAttr(a p9.SetAttr) error {
	defer n.answered()
	return n.Node.SetAttr(a)
}

func (k *kernel) request(opcode uint32, node uint64, body []byte) []byte {
	k.unique++
	return join(u32(uint32(inHeader+len(body)), opcode), u64(k.unique, node), u32(k.uid, 0, 1, 0), body)
}

// do makes a request.
func (k *kernel) do(t testing.TB, opcode uint32, node uint64, body []byte) (errno unix.Errno, data []byte) {
	t.Helper()
	m := k.request(opcode, node, body)
	room := make([]byte, 8<<10)
	n := k.handle(m, room)
	if n < outHeader || binary.LittleEndian.Uint32(room) != uint32(n) || !bytes.Equal(room[8:16], m[8:16]) {
		t.Fatalf("opcode %d: an answer of %d bytes: %x", opcode, n, room[:min(n, 32)])
	}
	return unix.Errno(-int32(binary.LittleEndian.Uint32(room[4:]))), room[outHeader:n]
}

// init opens the session: INIT of 7.38, with any flags.
func (k *kernel) init(t testing.TB) {
	t.Helper()
	if errno, _ := k.do(t, opInit, 0, join(u32(7, 38, 1<<20, ^uint32(0)), make([]byte, 48))); errno != 0 {
		t.Fatal(errno)
	}
}

// lookup returns the node ID of a name in the root.
func (k *kernel) lookup(t testing.TB, name string) uint64 {
	t.Helper()
	errno, b := k.do(t, opLookup, 1, []byte(name+"\x00"))
	if errno != 0 {
		t.Fatalf("%s: %v", name, errno)
	}
	return binary.LittleEndian.Uint64(b)
}

func (k *kernel) open(t testing.TB, node uint64, flags uint32) uint64 {
	t.Helper()
	errno, b := k.do(t, opOpen, node, u32(flags, 0))
	if errno != 0 {
		t.Fatal(errno)
	}
	return binary.LittleEndian.Uint64(b)
}

// TestNodes: a file has one ID by all of its names, until it is forgotten; IDs and
// handles that were never given out, or no longer, are errors.
func TestNodes(t *testing.T) {
	k, dir := serve(t, Config{MaxNodes: 4, MaxHandles: 2})
	if errno, _ := k.do(t, opLookup, 1, []byte("a\x00")); errno != unix.EIO {
		t.Errorf("before INIT: %v", errno)
	}
	k.init(t)
	if errno, _ := k.do(t, opInit, 0, join(u32(7, 38, 1<<20, 0), make([]byte, 48))); errno != unix.EBUSY {
		t.Errorf("a second INIT: %v", errno)
	}
	for _, name := range []string{"a", "c", "d", "e"} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(name), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Link(dir+"/a", dir+"/b"); err != nil {
		t.Fatal(err)
	}
	a := k.lookup(t, "a")
	if b := k.lookup(t, "b"); a != b {
		t.Errorf("a is %d and b, the same file, %d", a, b)
	}
	forget := func(n uint64) { k.handle(k.request(opForget, a, u64(n)), nil) }
	forget(1)
	fh := k.open(t, a, unix.O_RDONLY)
	if errno, b := k.do(t, opRead, a, join(u64(fh, 0), u32(100, 0), u64(0), u32(0, 0))); errno != 0 || string(b) != "a" {
		t.Errorf("%q, %v", b, errno)
	}
	forget(1)
	if errno, _ := k.do(t, opGetattr, a, make([]byte, 16)); errno != unix.ESTALE {
		t.Errorf("a node that was forgotten: %v", errno)
	}
	forget(1 << 60) // harmless
	k.lookup(t, "c")
	k.lookup(t, "d")
	k.lookup(t, "e")
	if errno, _ := k.do(t, opLookup, 1, []byte("a\x00")); errno != unix.EMFILE {
		t.Errorf("one node too many: %v", errno)
	}
	for _, name := range []string{"", ".", "..", "a/b", "../a"} {
		if errno, _ := k.do(t, opLookup, 1, []byte(name+"\x00")); errno != unix.EINVAL {
			t.Errorf("%q: %v", name, errno)
		}
	}
	k.open(t, k.lookup(t, "c"), unix.O_RDONLY)
	if errno, _ := k.do(t, opOpen, k.lookup(t, "c"), u32(unix.O_RDONLY, 0)); errno != unix.EMFILE {
		t.Errorf("one handle too many: %v", errno)
	}
	k.do(t, opRelease, a, join(u64(fh), u32(0, 0), u64(0)))
	if errno, _ := k.do(t, opRead, a, join(u64(fh, 0), u32(100, 0), u64(0), u32(0, 0))); errno != unix.EBADF {
		t.Errorf("a handle that was released: %v", errno)
	}
	k.open(t, k.lookup(t, "c"), unix.O_RDONLY)
}

// TestChangedWhileKept: a file that has changed while the kernel keeps its attributes is looked up again by whoever opens it.
func TestChangedWhileKept(t *testing.T) {
	for _, timeout := range []time.Duration{0, time.Hour} {
		k, dir := serve(t, Config{Timeout: timeout})
		k.init(t)
		write := func(text string) {
			t.Helper()
			if err := os.WriteFile(dir+"/f", []byte(text), 0o644); err != nil {
				t.Fatal(err)
			}
		}
		write("text")
		f := k.lookup(t, "f")
		open := func() unix.Errno {
			errno, _ := k.do(t, opOpen, f, u32(unix.O_RDONLY, 0))
			return errno
		}
		stale := unix.ESTALE
		if timeout == 0 { // it asks anyway
			stale = 0
		}
		for what, change := range map[string]func(){
			"nothing": nil,
			"content": func() { write("another") },
			"its name": func() {
				if err := os.Rename(dir+"/f", dir+"/g"); err != nil {
					t.Fatal(err)
				}
				if err := os.Chtimes(dir+"/g", time.Time{}, time.Unix(1, 0)); err != nil { // its ctime may be within a tick
					t.Fatal(err)
				}
				write("new")
			},
		} {
			want := unix.Errno(0)
			if change != nil {
				change()
				want = stale
			}
			if errno := open(); errno != want {
				t.Errorf("timeout %v, %s has changed: %v, want %v", timeout, what, errno, want)
			}
			if errno := open(); errno != 0 {
				t.Errorf("timeout %v, %s has changed, once more: %v", timeout, what, errno)
			}
			f = k.lookup(t, "f")
			if errno := open(); errno != 0 {
				t.Errorf("timeout %v, looked up after %s has changed: %v", timeout, what, errno)
			}
		}
		// What somebody writes to all the time can be opened all the same.
		for range 3 {
			write("before it is looked up")
			open()
			f = k.lookup(t, "f")
			write("and after it")
			if errno := open(); errno != 0 {
				t.Errorf("timeout %v, changed after it was looked up anew: %v", timeout, errno)
			}
			f = k.lookup(t, "f")
		}
		errno, out := k.do(t, opOpen, f, u32(unix.O_WRONLY, 0))
		if errno != 0 {
			t.Fatal(errno)
		}
		if errno, _ = k.do(t, opWrite, f, join(out[:8], make([]byte, 8), u32(4, 0), make([]byte, 16), []byte("ours"))); errno != 0 {
			t.Fatal(errno)
		}
		if errno := open(); errno != 0 {
			t.Errorf("timeout %v, changed by the kernel itself: %v", timeout, errno)
		}
	}
}

// TestLocks: fcntl(2)'s locks are an owner's through all handles, and end with his close(2).
func TestLocks(t *testing.T) {
	k, dir := serve(t, Config{LockWait: 1})
	k.init(t)
	if err := os.WriteFile(dir+"/f", nil, 0o644); err != nil {
		t.Fatal(err)
	}
	f := k.lookup(t, "f")
	fh, other := k.open(t, f, unix.O_RDWR), k.open(t, f, unix.O_RDWR)
	lock := func(op uint32, fh, owner uint64, kind uint32) unix.Errno {
		errno, _ := k.do(t, op, f, join(u64(fh, owner, 0, 9), u32(kind, 1, 0, 0)))
		return errno
	}
	if errno := lock(opSetlk, fh, 1, unix.F_WRLCK); errno != 0 {
		t.Fatal(errno)
	}
	if errno := lock(opSetlk, other, 1, unix.F_WRLCK); errno != 0 {
		t.Errorf("its own lock is in an owner's way: %v", errno)
	}
	if errno := lock(opSetlk, other, 2, unix.F_RDLCK); errno != unix.EAGAIN {
		t.Errorf("another's lock is not: %v", errno)
	}
	if errno := lock(opSetlkw, other, 2, unix.F_RDLCK); errno != unix.EINTR {
		t.Errorf("a wait that is too long: %v", errno)
	}
	if errno, b := k.do(t, opGetlk, f, join(u64(other, 2, 0, 9), u32(unix.F_RDLCK, 1, 0, 0))); errno != 0 || binary.LittleEndian.Uint32(b[16:]) != unix.F_WRLCK {
		t.Errorf("GETLK: %v, %x", errno, b)
	}
	k.do(t, opFlush, f, join(u64(other), u32(0, 0), u64(1)))
	if errno := lock(opSetlk, other, 2, unix.F_RDLCK); errno != 0 {
		t.Errorf("after a close: %v", errno)
	}
	// An open file description's end is that of its handle, which no FLUSH of its owner comes before.
	k.do(t, opFlush, f, join(u64(other), u32(0, 0), u64(2)))
	if errno := lock(opSetlk, fh, 3, unix.F_WRLCK); errno != 0 {
		t.Fatal(errno)
	}
	k.do(t, opRelease, f, join(u64(other), u32(0, 0), u64(0)))
	again := k.open(t, f, unix.O_RDWR)
	if errno := lock(opSetlk, again, 2, unix.F_RDLCK); errno != unix.EAGAIN {
		t.Errorf("after another handle's end: %v", errno)
	}
	reader := k.open(t, f, unix.O_RDONLY)
	if errno := lock(opSetlk, reader, 4, unix.F_RDLCK); errno != unix.EAGAIN {
		t.Errorf("what is locked for writing is locked for reading: %v", errno)
	}
	k.do(t, opRelease, f, join(u64(fh), u32(0, 0), u64(0)))
	// Of its closing no FLUSH tells.
	if errno := lock(opSetlk, reader, 4, unix.F_RDLCK); errno != 0 {
		t.Error(errno)
	}
	k.do(t, opRelease, f, join(u64(reader), u32(0, 0), u64(0)))
	if errno := lock(opSetlk, again, 2, unix.F_WRLCK); errno != 0 {
		t.Errorf("after its handle's end: %v", errno)
	}
}

// TestComplaints: what a guest can have logged is bounded, in lines and in their length.
func TestComplaints(t *testing.T) {
	var lines []string
	w := Complaints(func(format string, args ...any) { lines = append(lines, fmt.Sprintf(format, args...)) })
	for range 10 * maxComplaints {
		if n, err := w.Write(bytes.Repeat([]byte{'\n'}, 1000)); n != 1000 || err != nil {
			t.Fatal(n, err)
		}
	}
	if len(lines) != maxComplaints || len(lines[0]) > 500 {
		t.Errorf("%d lines, the first of %d bytes", len(lines), len(lines[0]))
	}
}

// TestLinkTargets: what a link made in a mount points to, in the tree is without the mount's place.
func TestLinkTargets(t *testing.T) {
	k, dir := serve(t, Config{Root: "/run/fs"})
	k.init(t)
	for i, c := range [][2]string{{"/run/fs", "/"}, {"/run/fs/etc", "/etc"}, {"/run/fsx", "/run/fsx"}, {"../run/fs", "../run/fs"}} {
		name := fmt.Sprint(i)
		if errno, _ := k.do(t, opSymlink, 1, []byte(name+"\x00"+c[0]+"\x00")); errno != 0 {
			t.Fatal(errno)
		}
		if got, err := os.Readlink(dir + "/" + name); err != nil || got != c[1] {
			t.Errorf("%s: %q, %v, want %q", c[0], got, err, c[1])
		}
	}
}

// TestRace: what is forgotten and released while it is used is used to its end.
func TestRace(t *testing.T) {
	k, dir := serve(t, Config{})
	k.init(t)
	if err := os.WriteFile(dir+"/f", bytes.Repeat([]byte("x"), 4096), 0o644); err != nil {
		t.Fatal(err)
	}
	before := descriptors(t)
	var wg sync.WaitGroup
	for i := range 8 {
		own := &kernel{handle: k.handle, unique: uint64(i) << 32}
		wg.Go(func() {
			for j := range 300 {
				node := uint64(2 + j%40)
				own.do(t, opLookup, 1, []byte("f\x00"))
				_, b := own.do(t, opOpen, node, u32(unix.O_RDWR, 0))
				fh := uint64(j)
				if len(b) >= 8 && j%2 == 0 {
					fh = binary.LittleEndian.Uint64(b)
				}
				own.do(t, opRead, node, join(u64(fh, 0), u32(4096, 0), u64(0), u32(0, 0)))
				own.do(t, opSetlk, node, join(u64(fh, uint64(j%3), 0, 9), u32(unix.F_RDLCK, 1, 0, 0)))
				own.do(t, opFlush, node, join(u64(fh), u32(0, 0), u64(uint64(j%3))))
				own.do(t, opRelease, node, join(u64(fh), u32(0, 0), u64(0)))
				own.handle(own.request(opForget, node, u64(1<<40)), nil)
			}
		})
	}
	wg.Wait()
	for fh := range uint64(8 * 300 * 2) {
		k.do(t, opRelease, 2, join(u64(fh), u32(0, 0), u64(0)))
	}
	for owner := range uint64(3) {
		for node := range uint64(8 * 300) {
			k.do(t, opFlush, node, join(u64(0), u32(0, 0), u64(owner)))
		}
	}
	for node := uint64(2); node < 8*300; node++ {
		k.handle(k.request(opForget, node, u64(1<<40)), nil)
	}
	if after := descriptors(t); after > before {
		t.Errorf("%d descriptors, before %d", after, before)
	}
}

func descriptors(t *testing.T) int {
	entries, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	runtime.KeepAlive(entries)
	return len(entries)
}

// FuzzHandler: no requests of a guest reach what lies beside the directory, or stop the server.
func FuzzHandler(f *testing.F) {
	row := func(opcode byte, node byte, body ...byte) []byte {
		return append([]byte{opcode, node, byte(len(body))}, body...)
	}
	name := func(op byte, name string) []byte { return row(op, 1, []byte(name+"\x00")...) }
	f.Add(join(name(opLookup, "f"), row(opOpen, 2, 2, 0, 0, 0, 0, 0, 0, 0), row(opRead, 2, join(u64(1, 0), u32(99, 0), u64(0), u32(0, 0))...)))
	f.Add(join(name(opLookup, "up"), row(opOpen, 2, 0, 0, 0, 0, 0, 0, 0, 0), name(opLookup, "..")))
	f.Add(join(row(opCreate, 1, join(u32(unix.O_RDWR, 0o6755, 0, 0), []byte("new\x00"))...), row(opWrite, 2, join(u64(1, 0), u32(4, 0), u64(0), u32(0, 0), []byte("data"))...)))
	f.Add(join(row(opOpendir, 1, 0, 0, 0, 0, 0, 0, 0, 0), row(opReaddir, 1, join(u64(1, 0), u32(4096, 0), u64(0), u32(0, 0))...)))
	f.Add(join(name(opLookup, "d"), row(12, 1, join(u64(2), []byte("f\x00g\x00"))...), name(opUnlink, "up"), row(6, 1, []byte("s\x00../secret\x00")...)))
	for op := range byte(lastOpcode) {
		f.Add(join(name(opLookup, "f"), row(op, 2, make([]byte, 64)...), row(op, 1, []byte("f\x00d\x00")...)))
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		k, dir := serve(t, Config{MaxNodes: 50, MaxHandles: 20, LockWait: 1})
		secret := filepath.Dir(dir) + "/secret"
		for _, err := range []error{os.WriteFile(secret, []byte("secret"), 0o644), os.WriteFile(dir+"/f", []byte("file"), 0o644),
			os.Mkdir(dir+"/d", 0o755), os.Symlink("../secret", dir+"/up")} {
			if err != nil {
				t.Fatal(err)
			}
		}
		k.init(t)
		for len(data) >= 3 {
			n := min(int(data[2]), len(data)-3)
			opcode, node, body := uint32(data[0])%(lastOpcode+4), uint64(data[1]), data[3:3+n]
			data = data[3+n:]
			room := make([]byte, 8<<10)
			got := k.handle(k.request(opcode, node, body), room)
			if got > len(room) || bytes.Contains(room[:max(got, 0)], []byte("secret")) && opcode != 5 { // READLINK tells where a link leads
				t.Fatalf("opcode %d: %q", opcode, room[:got])
			}
		}
		if b, err := os.ReadFile(secret); err != nil || string(b) != "secret" {
			t.Fatalf("the file beside: %q, %v", b, err)
		}
		filepath.WalkDir(dir, func(path string, _ os.DirEntry, err error) error { //nolint:errcheck // it has none of its own
			var st unix.Stat_t
			if err == nil && unix.Lstat(path, &st) == nil && st.Mode&unix.S_IFMT == unix.S_IFREG && st.Mode&(unix.S_ISUID|unix.S_ISGID) != 0 {
				err = fmt.Errorf("%s has mode %o", path, st.Mode)
				t.Error(err)
			}
			return nil
		})
	})
}

// TestKept: what the kernel may go on with of what it has read: while it is told of changes, for a lease.
func TestKept(t *testing.T) {
	const first, cache = fuse.FOPEN_NOFLUSH, fuse.FOPEN_NOFLUSH | fuse.FOPEN_KEEP_CACHE
	const firstDir, cacheDir = fuse.FOPEN_CACHE_DIR, fuse.FOPEN_CACHE_DIR | fuse.FOPEN_KEEP_CACHE
	lease := time.Hour
	k, dir := serve(t, Config{Timeout: time.Millisecond, Lease: func(p9.Node) time.Duration { return lease }})
	k.init(t)
	write := func(name, text string) {
		t.Helper()
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	write("f", "one")
	if err := os.Mkdir(dir+"/d", 0o755); err != nil {
		t.Fatal(err)
	}
	opened := func(what, name string, opcode, want uint32) {
		t.Helper()
		errno, b := k.do(t, opcode, k.lookup(t, name), u32(unix.O_RDONLY, 0))
		if errno != 0 {
			t.Fatalf("%s: %v", what, errno)
		}
		if got := binary.LittleEndian.Uint32(b[8:]); got != want {
			t.Errorf("%s: flags %#x, want %#x", what, got, want)
		}
	}
	opened("first", "f", opOpen, first)
	opened("a second time", "f", opOpen, cache)
	opened("a directory", "d", opOpendir, firstDir)
	opened("a directory a second time", "d", opOpendir, cacheDir)
	d := k.lookup(t, "d")
	write("d/new", "")
	if errno, b := k.do(t, opOpendir, d, u32(unix.O_RDONLY, 0)); errno != 0 || binary.LittleEndian.Uint32(b[8:]) != firstDir {
		t.Errorf("a directory that the kernel does not know to have changed: %v, %x", errno, b)
	}
	opened("a directory that has changed", "d", opOpendir, firstDir)
	opened("a directory that has changed, again", "d", opOpendir, cacheDir)

	write("f", "another")
	opened("looked up since it has changed", "f", opOpen, first)
	opened("looked up since it has changed, again", "f", opOpen, cache)
	lease = 0
	opened("while changes may be missed", "f", opOpen, first)
	lease = time.Hour
	opened("what was read meanwhile", "f", opOpen, first)
	opened("what was read since", "f", opOpen, cache)
	lease = time.Nanosecond
	write("f", "longer")
	opened("what has changed", "f", opOpen, first)
	opened("after the lease", "f", opOpen, first)
	lease = time.Hour
	if err := os.Link(dir+"/f", dir+"/g"); err != nil {
		t.Fatal(err)
	}
	opened("two names", "f", opOpen, first)
	opened("two names, again", "g", opOpen, first)

	// A name of nothing: node ID 0, for the timeout. What was to be made is an error.
	if errno, b := k.do(t, opLookup, 1, []byte("nothing\x00")); errno != 0 || !bytes.Equal(b[:8], u64(0)) || !bytes.Equal(b[16:24], u64(0)) || !bytes.Equal(b[32:36], u32(1e6)) {
		t.Errorf("nothing: %v, %x", errno, b)
	}
	k, _ = serve(t, Config{})
	k.init(t)
	if errno, _ := k.do(t, opLookup, 1, []byte("nothing\x00")); errno != unix.ENOENT {
		t.Errorf("nothing, where nothing is kept: %v", errno)
	}
}

// TestLeased: how long the kernel may keep attributes: for a lease those of what has one name.
func TestLeased(t *testing.T) {
	const timeout, lease = time.Second, time.Hour
	k, dir := serve(t, Config{Timeout: timeout, Lease: func(p9.Node) time.Duration { return lease }})
	k.init(t)
	if err := os.WriteFile(dir+"/f", nil, 0o644); err != nil {
		t.Fatal(err)
	}
	f := k.lookup(t, "f")
	kept := func(what string, want time.Duration) {
		t.Helper()
		errno, b := k.do(t, opGetattr, f, make([]byte, 16))
		if errno != 0 {
			t.Fatalf("%s: %v", what, errno)
		}
		if got := time.Duration(binary.LittleEndian.Uint64(b)) * time.Second; got != want {
			t.Errorf("%s: kept for %v, want %v", what, got, want)
		}
	}
	kept("one name", lease)
	if err := os.Link(dir+"/f", dir+"/g"); err != nil {
		t.Fatal(err)
	}
	kept("two names", timeout)
	if err := errors.Join(os.Remove(dir+"/f"), os.Remove(dir+"/g")); err != nil {
		t.Fatal(err)
	}
	kept("no name", timeout)
}

// TestLeaseEnds: what is told while a lease ends, or begins, is not kept for it.
func TestLeaseEnds(t *testing.T) {
	const timeout = time.Second
	for before, after := range map[time.Duration]time.Duration{time.Hour: 0, 0: time.Hour} {
		lease := time.Hour
		ends := func() {}
		k, dir := serveLocal(t, Config{Timeout: timeout, Lease: func(p9.Node) time.Duration { return lease }}, localfs.Config{},
			func(n p9.Node) p9.Node { return observed{n, func() { ends() }} })
		k.init(t)
		if err := os.WriteFile(dir+"/f", nil, 0o644); err != nil {
			t.Fatal(err)
		}
		f := k.lookup(t, "f")
		k.open(t, f, unix.O_RDONLY) // from now on what is read may be kept
		ask := func(opcode uint32, node uint64, body []byte) []byte {
			t.Helper()
			lease = before
			errno, b := k.do(t, opcode, node, body)
			if errno != 0 {
				t.Fatal(errno)
			}
			return b
		}
		ends = func() { lease = after }
		entry := ask(opLookup, 1, []byte("f\x00"))
		for what, b := range map[string][]byte{"a name": entry[16:], "its attributes": entry[24:], "attributes": ask(opGetattr, f, make([]byte, 16))} {
			if got := time.Duration(binary.LittleEndian.Uint64(b)) * time.Second; got != timeout {
				t.Errorf("a lease of %v that becomes %v: %s: %v, want %v", before, after, what, got, timeout)
			}
		}
		if b := ask(opOpen, f, u32(unix.O_RDONLY, 0)); binary.LittleEndian.Uint32(b[8:])&fuse.FOPEN_KEEP_CACHE != 0 {
			t.Errorf("a lease of %v that becomes %v: content is kept", before, after)
		}
	}
}

// TestFull: the kernel is asked to forget before it holds too much, and again only when it comes to hold more.
func TestFull(t *testing.T) {
	asked := 0
	k, dir := serve(t, Config{MaxNodes: 16, Full: func() { asked++ }})
	k.init(t)
	look := func(what string, names, want int) {
		t.Helper()
		for i := range names {
			name := fmt.Sprint("f", i)
			if err := os.WriteFile(filepath.Join(dir, name), nil, 0o644); err != nil {
				t.Fatal(err)
			}
			k.lookup(t, name)
		}
		if asked != want {
			t.Errorf("%s: asked %d times, want %d", what, asked, want)
		}
	}
	look("less than half", 7, 0) // the root is one
	look("half", 8, 1)
	look("the same", 8, 1)
	look("an eighth more", 10, 2)
	for id := uint64(2); id <= 11; id++ {
		k.handle(k.request(opForget, id, u64(4)), nil)
	}
	asked = 0
	look("half again", 8, 1)
}

// TestSync: that a guest syncs is no line in the log.
func TestSync(t *testing.T) {
	local, err := localfs.New(t.TempDir(), localfs.Config{})
	if err != nil {
		t.Fatal(err)
	}
	defer local.Close()
	root, err := local.Attach("", "", 0)
	if err != nil {
		t.Fatal(err)
	}
	fs := New(root, Config{})
	defer fs.Close()
	k := &kernel{handle: fs.Handler(t.Errorf)}
	k.init(t)
	if errno, _ := k.do(t, opSyncfs, 1, make([]byte, 8)); errno != unix.ENOSYS {
		t.Error(errno)
	}
}

// TestPrivileges: set-id bits go when the kernel says that who changes the file may not keep them, and stay otherwise. All else of
// the mode stays as well, also what the kernel does not see of it.
func TestPrivileges(t *testing.T) {
	const user = 1000
	write := func(k *kernel, f, fh uint64) unix.Errno {
		errno, _ := k.do(t, opWrite, f, join(u64(fh, 0), u32(4, fuse.WRITE_KILL_SUIDGID), make([]byte, 16), []byte("text")))
		return errno
	}
	setAttr := func(k *kernel, f uint64, valid, mode uint32) unix.Errno {
		errno, _ := k.do(t, opSetattr, f, join(u32(valid, 0), make([]byte, 60), u32(mode), make([]byte, 16)))
		return errno
	}
	for what, how := range map[string]localfs.Config{"plain": {}, "masked": {FileMask: 0o077}, "metadata": {Metadata: true}} {
		k, dir := serveLocal(t, Config{}, how, func(n p9.Node) p9.Node { return n })
		k.init(t)
		k.uid = user
		path := dir + "/f"
		if err := os.WriteFile(path, nil, 0o644); err != nil {
			t.Fatal(err)
		}
		f := k.lookup(t, "f")
		fh := k.open(t, f, unix.O_RDWR)
		mode := func() uint32 {
			if how.Metadata {
				_, b := k.do(t, opGetattr, f, make([]byte, 16))
				return binary.LittleEndian.Uint32(b[16+60:]) & 0o7777
			}
			var st unix.Stat_t
			if err := unix.Stat(path, &st); err != nil {
				t.Fatal(err)
			}
			return st.Mode & 0o7777
		}
		for name, change := range map[string]func() unix.Errno{
			"write":    func() unix.Errno { return write(k, f, fh) },
			"truncate": func() unix.Errno { return setAttr(k, f, fuse.FATTR_SIZE|fuse.FATTR_KILL_SUIDGID, 0) },
			"allocate": func() unix.Errno {
				errno, _ := k.do(t, opFallocate, f, join(u64(fh, 0, 100), u32(0, 0)))
				return errno
			},
		} {
			for before, after := range map[uint32]uint32{0o6755: 0o755, 0o2745: 0o2745, 0o644: 0o644} {
				if errno := setAttr(k, f, fuse.FATTR_MODE, before); errno != 0 {
					t.Fatal(errno)
				}
				if errno := change(); errno != 0 || mode() != after {
					t.Errorf("%s, %s: mode %o is then %o, want %o; %v", what, name, before, mode(), after, errno)
				}
			}
		}
	}
	// Where the change itself takes them away, as on another machine, nothing is asked for.
	asked := 0
	k, dir := serveLocal(t, Config{}, localfs.Config{}, func(n p9.Node) p9.Node { return observed{n, func() { asked++ }} })
	k.init(t)
	if err := os.WriteFile(dir+"/f", nil, 0o644); err != nil {
		t.Fatal(err)
	}
	f := k.lookup(t, "f")
	fh := k.open(t, f, unix.O_RDWR)
	asked = 0
	if errno := write(k, f, fh); errno != 0 || asked != 0 {
		t.Errorf("a write elsewhere: %v, and %d requests beside it", errno, asked)
	}
}
