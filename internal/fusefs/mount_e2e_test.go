//go:build e2e

package fusefs_test

import (
	"bufio"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"slices"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"

	"github.com/wsl2/wsl2/internal/fusefs"
	"github.com/wsl2/wsl2/internal/p9"
	"github.com/wsl2/wsl2/internal/p9/localfs"
	"github.com/wsl2/wsl2/internal/p9/remote"
	"github.com/wsl2/wsl2/internal/testsys"
)

func check(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// cases is how many the suite has at least.
const cases = 900

// TestPosix holds a directory of this machine, mounted by this machine's kernel, to what the
// directory itself does: directly, also where the kernel keeps names and attributes, and over 9P.
func TestPosix(t *testing.T) {
	suite := t.TempDir() + "/posix"
	if out, err := exec.Command("go", "test", "-c", "-o", suite, "../posixtest").CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	unix.Umask(0)
	for name, how := range map[string]func(*testing.T, *localfs.FS) p9.Node{"direct": direct, "kept": direct, "9P": over9P} {
		var cfg fusefs.Config
		if name == "kept" {
			cfg.Timeout, cfg.Lease = time.Hour, func(p9.Node) time.Duration { return time.Hour }
		}
		t.Run(name, func(t *testing.T) {
			fs, err := localfs.New(t.TempDir(), localfs.Config{})
			check(t, err)
			defer fs.Close()
			dir := mount(t, how(t, fs), cfg)
			ctx, cancel := context.WithTimeout(t.Context(), 3*time.Minute)
			defer cancel()
			cmd := exec.CommandContext(ctx, suite, "-test.v")
			cmd.Env = append(os.Environ(), "WSL2_POSIX_DIR="+dir)
			out, err := cmd.CombinedOutput()
			switch {
			case name == "9P": // as distros are mounted on the host
				testsys.Differences(t, "host mount", cases, string(out))
			case err != nil:
				t.Errorf("%v\n%s", err, out)
			}
		})
	}
}

// mount mounts a tree until the test ends.
func mount(t *testing.T, root p9.Node, cfg fusefs.Config) (dir string) {
	t.Helper()
	dir = t.TempDir()
	served := fusefs.New(root, cfg)
	o := fusefs.Options()
	o.DirectMount, o.FsName, o.Name, o.Options = true, "test", "wsl2", []string{"default_permissions"}
	server, err := fuse.NewServer(served, dir, o)
	check(t, err)
	ended := make(chan struct{})
	go func() { server.Serve(); close(ended) }()
	check(t, server.WaitMount())
	t.Cleanup(func() {
		check(t, unix.Unmount(dir, unix.MNT_DETACH))
		<-ended
		served.Close()
	})
	return dir
}

func direct(t *testing.T, fs *localfs.FS) p9.Node {
	root, err := fs.Attach("", "", 0)
	check(t, err)
	return root
}

func over9P(t *testing.T, fs *localfs.FS) p9.Node { return overGate(t, fs, new(gate)) }

// overGate is over9P with a server that is silent while a gate is closed.
func overGate(t *testing.T, fs *localfs.FS, g *gate) p9.Node {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0) // it buffers, as the way to a guest does
	check(t, err)
	var ends [2]net.Conn
	for i, fd := range fds {
		f := os.NewFile(uintptr(fd), "socket")
		ends[i], err = net.FileConn(f)
		check(t, errors.Join(err, f.Close()))
	}
	ours, theirs := ends[0], ends[1]
	served := make(chan error, 1)
	g.Conn = theirs
	go func() { served <- p9.Serve(context.Background(), g, fs, p9.Config{}) }()
	c, err := p9.NewClient(t.Context(), ours, 0)
	check(t, err)
	root, err := c.Attach(t.Context(), "", "", 0)
	check(t, err)
	t.Cleanup(func() {
		c.Close()
		<-served
	})
	return remote.Root(context.Background(), root)
}

// gate is a connection that can be stopped at a request, behind which nothing is read.
type gate struct {
	net.Conn
	head []byte // of a frame, up to its type; of who reads
	left int    // what is still to come of the frame; of who reads

	mu     sync.Mutex
	stop   p9.Type       // 0: at none; guarded by mu
	wanted chan struct{} // closed when the request has come; guarded by mu
	open   chan struct{} // guarded by mu
}

// shut has the gate closed by the next request of a type: no other, as of a file that was closed before, does.
func (g *gate) shut(at p9.Type) (wanted <-chan struct{}, open func()) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.stop, g.wanted, g.open = at, make(chan struct{}), make(chan struct{})
	wait := g.open
	return g.wanted, sync.OnceFunc(func() { close(wait) })
}

func (g *gate) Read(p []byte) (int, error) {
	n, err := g.Conn.Read(p)
	types := g.types(p[:n])
	g.mu.Lock()
	var wait chan struct{}
	if g.stop != 0 && slices.Contains(types, g.stop) {
		close(g.wanted)
		wait, g.stop = g.open, 0
	}
	g.mu.Unlock()
	if wait != nil {
		<-wait
	}
	return n, err
}

// types are those of the frames that begin in what has been read: size[4] type[1].
func (g *gate) types(b []byte) (list []p9.Type) {
	for len(b) > 0 {
		n := min(g.left, len(b))
		g.left, b = g.left-n, b[n:]
		n = min(5-len(g.head), len(b))
		g.head, b = append(g.head, b[:n]...), b[n:]
		if len(g.head) == 5 {
			list = append(list, p9.Type(g.head[4]))
			g.head, g.left = g.head[:0], int(binary.LittleEndian.Uint32(g.head))-5
		}
	}
	return list
}

// TestInterrupt: a program that waits for a lock, or for a server that is silent, can be ended, and leaves nothing behind.
func TestInterrupt(t *testing.T) {
	tree, lock := t.TempDir(), t.TempDir()+"/lock"
	if out, err := exec.Command("go", "build", "-o", lock, "../testsys/lock").CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	check(t, os.WriteFile(tree+"/f", []byte("text"), 0o644))
	fs, err := localfs.New(tree, localfs.Config{})
	check(t, err)
	defer fs.Close()
	var g gate
	dir := mount(t, overGate(t, fs, &g), fusefs.Config{})
	f, err := os.OpenFile(tree+"/f", os.O_RDWR, 0)
	check(t, err)
	defer f.Close()
	part := func(how int16) error {
		return unix.FcntlFlock(f.Fd(), unix.F_OFD_SETLK, &unix.Flock_t{Type: how, Start: 15, Len: 1})
	}
	start := func(argv ...string) (cmd *exec.Cmd, stdout *bufio.Reader, stdin io.Writer) {
		t.Helper()
		ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
		t.Cleanup(cancel)
		cmd = exec.CommandContext(ctx, argv[0], argv[1:]...)
		out, err := cmd.StdoutPipe()
		check(t, err)
		stdin, err = cmd.StdinPipe()
		check(t, err)
		check(t, cmd.Start())
		return cmd, bufio.NewReader(out), stdin
	}
	for kind, take := range map[string]func(take bool) error{
		"flock": func(take bool) error {
			return unix.Flock(int(f.Fd()), map[bool]int{true: unix.LOCK_EX | unix.LOCK_NB, false: unix.LOCK_UN}[take])
		},
		"fcntl": func(take bool) error { return part(map[bool]int16{true: unix.F_WRLCK, false: unix.F_UNLCK}[take]) },
	} {
		check(t, take(true))
		cmd, out, _ := start(lock, kind+"-wait", dir+"/f")
		if line, err := out.ReadString('\n'); line != "waiting\n" {
			t.Fatalf("%s: %q, %v", kind, line, err)
		}
		check(t, cmd.Process.Signal(unix.SIGTERM))
		if err := cmd.Wait(); cmd.ProcessState.Sys().(syscall.WaitStatus).Signal() != unix.SIGTERM {
			t.Errorf("%s: %v, want the end by the signal", kind, err)
		}
		check(t, take(false))
		check(t, take(true)) // who waited has nothing
		check(t, take(false))
	}
	// The program has what it needs before the gate is shut, and goes on then: a line of its standard input tells.
	for name, c := range map[string]struct {
		at     p9.Type
		script string
	}{
		"look up": {p9.TWalk, `echo ready; read go; exec stat "$0/f"`},
		"read":    {p9.TRead, `exec 3<"$0/f"; echo ready; read go; exec cat <&3`},
		// More than the socket holds: the client cannot even send it all.
		"write": {p9.TWrite, `exec 3>"$0/g"; echo ready; read go; exec dd if=/dev/zero bs=1M >&3`},
	} {
		cmd, out, in := start("sh", "-c", c.script, dir)
		if line, err := out.ReadString('\n'); line != "ready\n" {
			t.Fatalf("%s: %q, %v", name, line, err)
		}
		wanted, open := g.shut(c.at)
		began := time.Now()
		io.WriteString(in, "go\n") //nolint:errcheck // what comes to the gate tells
		select {
		case <-wanted:
		case <-time.After(time.Minute):
			t.Fatalf("%s: nothing was asked for", name)
		}
		check(t, cmd.Process.Kill())
		cmd.Wait() //nolint:errcheck // the context's end is what to look for
		if took := time.Since(began); took > 50*time.Second {
			t.Errorf("%s: it ended after %v only", name, took)
		}
		open()
		if text, err := os.ReadFile(dir + "/f"); err != nil || string(text) != "text" {
			t.Errorf("%s: afterwards the file is %q, %v", name, text, err)
		}
	}
}

// TestPrune: a kernel that has seen many files forgets the oldest, and finds them again.
func TestPrune(t *testing.T) {
	tree, dir := t.TempDir(), t.TempDir()
	const files, keep = 1000, 100
	for i := range files {
		sub := fmt.Sprintf("%s/%d", tree, i%10)
		check(t, os.MkdirAll(sub, 0o755))
		check(t, os.WriteFile(fmt.Sprintf("%s/%d", sub, i), nil, 0o644))
	}
	local, err := localfs.New(tree, localfs.Config{})
	check(t, err)
	defer local.Close()
	served := fusefs.New(direct(t, local), fusefs.Config{Timeout: time.Hour})
	o := fusefs.Options()
	o.DirectMount, o.FsName, o.Name = true, "test", "wsl2"
	forgotten := make(chan struct{}, 1)
	server, err := fuse.NewServer(forgetful{served, forgotten}, dir, o)
	check(t, err)
	ended := make(chan struct{})
	go func() { server.Serve(); close(ended) }()
	check(t, server.WaitMount())
	ctx, cancel := context.WithCancel(context.Background())
	pruned := make(chan struct{})
	go func() {
		served.Prune(ctx, server, keep)
		close(pruned)
	}()
	defer func() {
		cancel()
		<-pruned
		check(t, unix.Unmount(dir, unix.MNT_DETACH))
		<-ended
		served.Close()
	}()
	before := descriptors(t)
	for range 3 {
		for i := range files {
			if _, err := os.Stat(fmt.Sprintf("%s/%d/%d", dir, i%10, i)); err != nil {
				t.Fatal(err)
			}
		}
	}
	for descriptors(t)-before > files/2 {
		select {
		case <-forgotten:
		case <-time.After(time.Minute):
			t.Fatalf("%d files are known, want about %d", descriptors(t)-before, keep)
		}
	}
}

// forgetful tells of each file that the kernel has forgotten.
type forgetful struct {
	*fusefs.FS
	told chan struct{}
}

func (f forgetful) Forget(id, lookups uint64) {
	f.FS.Forget(id, lookups)
	select {
	case f.told <- struct{}{}:
	default:
	}
}

func descriptors(t *testing.T) int {
	t.Helper()
	entries, err := os.ReadDir("/proc/self/fd")
	check(t, err)
	return len(entries)
}
