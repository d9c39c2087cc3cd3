package hostexec

import (
	"bytes"
	"fmt"
	"io"
	"io/fs"
	"net"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/wsl2/wsl2/internal/hostpath"
	"github.com/wsl2/wsl2/internal/wire"
)

const limit = 60 * time.Second

// guest is the other end of a host program: the process in the guest.
type guest struct {
	t    testing.TB
	mu   sync.Mutex
	ends map[wire.Role]*net.UnixConn
	came chan struct{}
	done chan struct{} // Run has returned
}

// run has a Runner serve start and returns the guest's side.
func run(t testing.TB, r *Runner, start *wire.Start) *guest {
	t.Helper()
	g := &guest{t: t, ends: map[wire.Role]*net.UnixConn{}, came: make(chan struct{}, 8), done: make(chan struct{})}
	one := &Runner{Policy: r.Policy, Environ: r.Environ, Dir: r.Dir, Shares: r.Shares, Logf: t.Logf}
	if one.Policy == nil {
		one.Policy = func() Policy { return Policy{Programs: []string{"*"}} }
	}
	one.Dial = func(role wire.Role, _ wire.SessionID) (Conn, error) {
		fds, err := syscall.Socketpair(syscall.AF_UNIX, syscall.SOCK_STREAM|syscall.SOCK_CLOEXEC, 0)
		if err != nil {
			return nil, err
		}
		var c [2]*net.UnixConn
		for i, fd := range fds {
			f := os.NewFile(uintptr(fd), "pair")
			conn, err := net.FileConn(f)
			f.Close()
			if err != nil {
				return nil, err
			}
			c[i] = conn.(*net.UnixConn)
		}
		c[1].SetDeadline(time.Now().Add(limit))
		g.mu.Lock()
		g.ends[role] = c[1]
		g.mu.Unlock()
		g.came <- struct{}{}
		return c[0], nil
	}
	go func() {
		defer close(g.done)
		one.Run(wire.SessionID{1})
	}()
	t.Cleanup(func() {
		g.mu.Lock()
		for _, c := range g.ends {
			c.Close()
		}
		g.mu.Unlock()
		<-g.done
	})
	if err := wire.Write(g.conn(wire.RoleHost), start); err != nil {
		t.Fatal(err)
	}
	return g
}

func (g *guest) conn(role wire.Role) *net.UnixConn {
	g.t.Helper()
	timeout := time.After(limit)
	for {
		g.mu.Lock()
		c := g.ends[role]
		g.mu.Unlock()
		if c != nil {
			return c
		}
		select {
		case <-g.came:
		case <-timeout:
			g.t.Fatalf("role %d is not opened", role)
		}
	}
}

func (g *guest) next() wire.Message {
	g.t.Helper()
	m, err := wire.Read(g.conn(wire.RoleHost))
	if err != nil {
		g.t.Fatal(err)
	}
	return m
}

func (g *guest) started() {
	g.t.Helper()
	if m, ok := g.next().(*wire.Started); !ok || m.PID == 0 {
		g.t.Fatalf("%+v", m)
	}
}

func (g *guest) exited() *wire.Exited {
	g.t.Helper()
	m := g.next()
	e, ok := m.(*wire.Exited)
	if !ok {
		g.t.Fatalf("%+v", m)
	}
	return e
}

// exactly reads n bytes: the connections may stay open behind them.
func (g *guest) exactly(role wire.Role, n int) string {
	g.t.Helper()
	b := make([]byte, n)
	if _, err := io.ReadFull(g.conn(role), b); err != nil {
		g.t.Fatal(err)
	}
	return string(b)
}

const three = wire.StreamStdin | wire.StreamStdout | wire.StreamStderr

func sh(script string) *wire.Start {
	return &wire.Start{Argv: []string{"sh", "-c", script}, Streams: three}
}

func TestProgram(t *testing.T) {
	dir := t.TempDir()
	r := &Runner{Environ: []string{"PATH=" + os.Getenv("PATH"), "A=host", "B=host"}, Dir: dir}
	m := sh(`cat; echo "$A,$B,$PWD" >&2; exit 7`)
	m.Env = []string{"B=guest"}
	g := run(t, r, m)
	g.started()
	payload := strings.Repeat("0123456789abcdef\x00\xff", 20000)
	go func() {
		io.WriteString(g.conn(wire.RoleStdin), payload)
		g.conn(wire.RoleStdin).CloseWrite()
	}()
	if out := g.exactly(wire.RoleStdout, len(payload)); out != payload {
		t.Errorf("%d bytes of stdout, want %d", len(out), len(payload))
	}
	want := "host,guest," + dir + "\n"
	if out := g.exactly(wire.RoleStderr, len(want)); out != want {
		t.Errorf("stderr %q, want %q", out, want)
	}
	if e := g.exited(); *e != (wire.Exited{Status: 7, StdoutBytes: uint64(len(payload)), StderrBytes: uint64(len(want))}) {
		t.Errorf("%+v", e)
	}
}

// TestTerminal: a program gets the terminal that it is asked to have, and keys
// and signals reach it.
func TestTerminal(t *testing.T) {
	m := sh(`trap 'echo int; exit 3' INT; tty >/dev/null && stty size && echo ready; while :; do sleep 1000 & wait $!; done`)
	m.Streams, m.Size = wire.StreamPTY, wire.WindowSize{Rows: 11, Cols: 22}
	g := run(t, &Runner{Environ: os.Environ(), Dir: "/"}, m)
	g.started()
	var seen []byte
	b := make([]byte, 1)
	for !bytes.HasSuffix(seen, []byte("ready\r\n")) {
		if _, err := g.conn(wire.RolePTY).Read(b); err != nil {
			t.Fatalf("%q: %v", seen, err)
		}
		seen = append(seen, b...)
	}
	if string(seen) != "11 22\r\nready\r\n" {
		t.Errorf("%q", seen)
	}
	io.WriteString(g.conn(wire.RolePTY), "\x03")
	if e := g.exited(); e.Status != 3 {
		t.Errorf("%+v", e)
	}
}

func TestSignalAndHangup(t *testing.T) {
	g := run(t, &Runner{Environ: os.Environ(), Dir: "/"}, sh(`echo ready; exec sleep 1000`))
	g.started()
	io.ReadFull(g.conn(wire.RoleStdout), make([]byte, 6))
	wire.Write(g.conn(wire.RoleHost), &wire.Signal{Number: uint8(syscall.SIGTERM)})
	if e := g.exited(); e.Signal != uint8(syscall.SIGTERM) {
		t.Errorf("%+v", e)
	}

	// The guest's process ends: its program is hung up.
	dir := t.TempDir()
	if err := syscall.Mkfifo(dir+"/f", 0o600); err != nil {
		t.Fatal(err)
	}
	f, err := os.OpenFile(dir+"/f", os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	f.SetDeadline(time.Now().Add(limit))
	g = run(t, &Runner{Environ: os.Environ(), Dir: dir}, sh(`trap 'echo hup >f; exit' HUP; echo ready; while :; do sleep 1000 & wait $!; done`))
	g.started()
	io.ReadFull(g.conn(wire.RoleStdout), make([]byte, 6))
	g.conn(wire.RoleHost).Close()
	got := make([]byte, 4)
	if _, err := io.ReadFull(f, got); err != nil || string(got) != "hup\n" {
		t.Errorf("%q, %v", got, err)
	}
	<-g.done
}

// TestBackgroundChild: what a program leaves behind keeps nobody.
func TestBackgroundChild(t *testing.T) {
	g := run(t, &Runner{Environ: os.Environ(), Dir: "/"}, sh(`echo here; sleep 1000 & echo $!`))
	g.started()
	e := g.exited()
	b := make([]byte, e.StdoutBytes)
	if _, err := io.ReadFull(g.conn(wire.RoleStdout), b); err != nil || !strings.HasPrefix(string(b), "here\n") {
		t.Fatalf("%q, %v", b, err)
	}
	var pid int
	fmt.Sscan(strings.TrimPrefix(string(b), "here\n"), &pid)
	syscall.Kill(pid, syscall.SIGKILL)
}

func TestRefused(t *testing.T) {
	some := func() Policy { return Policy{Programs: []string{"echo", "/bin/true"}} }
	for _, c := range []struct {
		policy func() Policy
		argv   []string
		code   wire.Code // 0: it runs
		text   string
	}{
		{nil, []string{"nosuchprogram"}, wire.CodeNotFound, "nosuchprogram"},
		{nil, []string{"/no/such/program"}, wire.CodeNotFound, "no such file"},
		{nil, []string{"/etc/passwd"}, wire.CodeNotExecutable, "permission denied"},
		{nil, []string{"./relative"}, wire.CodeNotExecutable, "absolute"},
		{nil, []string{""}, wire.CodeNotExecutable, "no program"},
		{nil, nil, wire.CodeNotExecutable, "no program"},
		{some, []string{"true"}, wire.CodeNotExecutable, "hostPrograms"},
		{some, []string{"/bin/echo"}, wire.CodeNotExecutable, "hostPrograms"},
		{some, []string{"/bin/../bin/true"}, wire.CodeNotExecutable, "hostPrograms"},
		{some, []string{"*"}, wire.CodeNotExecutable, "hostPrograms"},
		{some, []string{"/bin/true"}, 0, ""},
		{some, []string{"echo"}, 0, ""},
		{func() Policy { return Policy{Off: true, Programs: []string{"*"}} }, []string{"true"}, wire.CodeNotExecutable, "hostPrograms"},
		{func() Policy { return Policy{} }, []string{"true"}, wire.CodeNotExecutable, "hostPrograms"},
	} {
		g := run(t, &Runner{Environ: os.Environ(), Dir: "/", Policy: c.policy}, &wire.Start{Argv: c.argv, Streams: three})
		switch m := g.next().(type) {
		case *wire.Failed:
			if m.Code != c.code || !strings.Contains(m.Text, c.text) {
				t.Errorf("%q: %+v", c.argv, m)
			}
		case *wire.Started:
			if c.code != 0 {
				t.Errorf("%q runs", c.argv)
			}
			g.exited()
		}
	}
}

// TestFailed: what is the host's own want is not taken for the program's.
func TestFailed(t *testing.T) {
	for _, c := range []struct {
		err  error
		code wire.Code
	}{
		{&fs.PathError{Op: "fork/exec", Path: "/x", Err: syscall.EAGAIN}, wire.CodeInternal},
		{&fs.PathError{Op: "fork/exec", Path: "/x", Err: syscall.ENOMEM}, wire.CodeInternal},
		{&fs.PathError{Op: "open", Path: "/dev/null", Err: syscall.EMFILE}, wire.CodeInternal},
		{&ownFailure{&fs.PathError{Op: "open", Path: "/dev/ptmx", Err: syscall.ENOENT}}, wire.CodeInternal},
		{&fs.PathError{Op: "fork/exec", Path: "/x", Err: syscall.ENOENT}, wire.CodeNotFound},
		{&fs.PathError{Op: "fork/exec", Path: "/x", Err: syscall.ENOEXEC}, wire.CodeNotExecutable},
		{&refusal{"x"}, wire.CodeNotExecutable},
	} {
		if f := failed(c.err); f.Code != c.code || f.Text == "" {
			t.Errorf("%v: %+v, want code %d", c.err, f, c.code)
		}
	}
}

// TestFlood: requests whose guest says no more than that are dropped beyond a number, and are no burden once they end.
func TestFlood(t *testing.T) {
	dialled, gone := make(chan struct{}, 2*maxRequests), make(chan struct{})
	var logged atomic.Int32
	r := &Runner{
		Dial: func(wire.Role, wire.SessionID) (Conn, error) {
			dialled <- struct{}{}
			<-gone
			return nil, io.ErrClosedPipe
		},
		Logf: func(string, ...any) { logged.Add(1) },
	}
	var wg sync.WaitGroup
	for range maxRequests / 2 {
		wg.Go(func() { r.Run(wire.SessionID{}) })
		wg.Go(func() { r.Agent(wire.SessionID{}, "") })
	}
	for range maxRequests {
		<-dialled
	}
	for range 3 { // would wait for gone, too
		r.Run(wire.SessionID{})
		r.Agent(wire.SessionID{}, "")
	}
	if n := logged.Load(); n != 1 {
		t.Errorf("dropped requests are told of %d times, want once", n)
	}
	close(gone)
	wg.Wait()
	r.Run(wire.SessionID{})
	if n := len(dialled); n != 1 {
		t.Errorf("%d connections after the flood, want 1", n)
	}
}

// TestEnvironment: a guest that may run some programs cannot make them others.
func TestEnvironment(t *testing.T) {
	env := []string{"LD_PRELOAD=/x.so", "PATH=/tmp", "TERM=xterm", "LC_ALL=C", "BASH_ENV=/x"}
	if got := (Policy{Programs: []string{"git"}}).environment(env); len(got) != 2 || got[0] != "TERM=xterm" || got[1] != "LC_ALL=C" {
		t.Errorf("%q", got)
	}
	if got := (Policy{Programs: []string{"*"}}).environment(env); len(got) != len(env) {
		t.Errorf("%q", got)
	}
}

// TestDirectory: the guest's directory counts where the host shares it.
func TestDirectory(t *testing.T) {
	share, other := t.TempDir(), t.TempDir()
	if err := os.Mkdir(share+"/sub", 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(share+"/file", nil, 0o755); err != nil {
		t.Fatal(err)
	}
	r := &Runner{Environ: os.Environ(), Dir: other, Shares: hostpath.Table{{Host: share, Guest: "/mnt/host"}}}
	for cwd, want := range map[string]string{"/mnt/host/sub": share + "/sub", "/mnt/host/gone": other, "/mnt/host/file": other, "/mnt/host/../../etc": other, "/etc": other, "": other} {
		m := &wire.Start{Argv: []string{"pwd"}, Streams: wire.StreamStdout, Cwd: cwd}
		g := run(t, r, m)
		g.started()
		if got := g.exactly(wire.RoleStdout, int(g.exited().StdoutBytes)); got != want+"\n" {
			t.Errorf("%q: %q, want %q", cwd, got, want)
		}
	}
}
