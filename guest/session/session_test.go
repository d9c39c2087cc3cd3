package session

import (
	"bytes"
	"crypto/rand"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/wsl2/wsl2/guest/reaper"
	"github.com/wsl2/wsl2/guest/users"
	"github.com/wsl2/wsl2/internal/wire"
)

// The one reaper of the test process: it stands for the distro's init, so
// nothing in this package's tests may use os/exec.
var theReaper *reaper.Reaper

func TestMain(m *testing.M) {
	// What the test's own starter left open must not look like a leak of ours.
	if err := unix.CloseRange(3, ^uint(0), unix.CLOSE_RANGE_CLOEXEC); err != nil {
		fmt.Fprintln(os.Stderr, "close_range:", err)
		os.Exit(1)
	}
	// Orphans come to us, as they do to PID 1.
	if err := unix.Prctl(unix.PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0); err != nil {
		fmt.Fprintln(os.Stderr, "prctl:", err)
		os.Exit(1)
	}
	theReaper = reaper.New(nil)
	os.Exit(m.Run())
}

// limit ends a test that hangs; nothing in a passing test waits for it.
const limit = 60 * time.Second

type rig struct {
	quiet   chan struct{}
	standIn chan wire.SessionID // what the service is asked
	t       testing.TB
	srv     *Server
	path    string
}

// newRig serves sessions on a unix socket, with a root whose etc is ours.
func newRig(t testing.TB) *rig { return newRigTimeout(t, 0) }

func newRigTimeout(t testing.TB, timeout time.Duration) *rig {
	t.Helper()
	root := t.TempDir()
	must(t, os.MkdirAll(root+"/etc/default", 0o755))
	must(t, os.Symlink("/dev", root+"/dev"))
	must(t, os.WriteFile(root+"/etc/passwd", []byte("root:x:0:0::/:/bin/sh\nann:x:4242:4243::/tmp:/bin/sh\n"), 0o644))
	must(t, os.WriteFile(root+"/etc/group", []byte("root:x:0:\nann:x:4243:\nwheel:x:777:bob,ann\n"), 0o644))
	must(t, os.WriteFile(root+"/etc/default/locale", []byte("LANG=\"de_DE.UTF-8\"\n"), 0o644))
	r := &rig{t: t, path: root + "/sock"}
	r.quiet = make(chan struct{}, 1)
	r.standIn = make(chan wire.SessionID, 8)
	r.srv = NewServer(Config{Reaper: theReaper, Distro: "debian", Hostname: "box", Root: root, AssemblyTimeout: timeout,
		Interop: root + "/interop", StandIn: func(id wire.SessionID) error { r.standIn <- id; return nil },
		OnQuiet: func() {
			select {
			case r.quiet <- struct{}{}:
			default:
			}
		},
		Logf: func(f string, a ...any) { t.Logf(f, a...) }})
	l, err := net.Listen("unix", r.path)
	must(t, err)
	served := make(chan error, 1)
	go func() { served <- r.srv.Serve(l) }()
	t.Cleanup(func() {
		r.srv.Close()
		l.Close()
		if err := <-served; err != nil {
			t.Errorf("Serve: %v", err)
		}
		r.srv.Wait(limit)
		r.srv.mu.Lock()
		defer r.srv.mu.Unlock()
		if r.srv.active != 0 || len(r.srv.sessions) != 0 {
			t.Errorf("%d connections, %d sessions left", r.srv.active, len(r.srv.sessions))
		}
	})
	return r
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// client is one session's client side.
type client struct {
	t                                   testing.TB
	control, stdin, stdout, stderr, pty *net.UnixConn
}

func (r *rig) dial(role wire.Role, id wire.SessionID) *net.UnixConn {
	r.t.Helper()
	c, err := net.Dial("unix", r.path)
	must(r.t, err)
	r.t.Cleanup(func() { c.Close() })
	c.SetDeadline(time.Now().Add(limit))
	must(r.t, wire.Write(c, &wire.Hello{Version: wire.Version, Role: role, Session: id}))
	return c.(*net.UnixConn)
}

func newID() (id wire.SessionID) {
	rand.Read(id[:])
	return id
}

// open sends everything a client does; it does not wait for Started.
func (r *rig) open(m *wire.Start) *client {
	r.t.Helper()
	id := newID()
	c := &client{t: r.t}
	c.control = r.dial(wire.RoleControl, id)
	must(r.t, wire.Write(c.control, m))
	for _, s := range []struct {
		bit  wire.Streams
		role wire.Role
		conn **net.UnixConn
	}{
		{wire.StreamStdin, wire.RoleStdin, &c.stdin}, {wire.StreamStdout, wire.RoleStdout, &c.stdout},
		{wire.StreamStderr, wire.RoleStderr, &c.stderr}, {wire.StreamPTY, wire.RolePTY, &c.pty},
	} {
		if m.Streams&s.bit != 0 {
			*s.conn = r.dial(s.role, id)
		}
	}
	return c
}

func (c *client) next() wire.Message {
	c.t.Helper()
	m, err := wire.Read(c.control)
	must(c.t, err)
	return m
}

func (c *client) started() *wire.Started {
	c.t.Helper()
	m := c.next()
	s, ok := m.(*wire.Started)
	if !ok {
		c.t.Fatalf("got %+v, want Started", m)
	}
	return s
}

func (c *client) exited() *wire.Exited {
	c.t.Helper()
	m := c.next()
	e, ok := m.(*wire.Exited)
	if !ok {
		c.t.Fatalf("got %+v, want Exited", m)
	}
	return e
}

// exactly reads n bytes, all that Exited promised, without waiting for EOF.
func (c *client) exactly(conn io.Reader, n uint64) string {
	c.t.Helper()
	b := make([]byte, n)
	_, err := io.ReadFull(conn, b)
	must(c.t, err)
	return string(b)
}

const threeStreams = wire.StreamStdin | wire.StreamStdout | wire.StreamStderr

func sh(script string) *wire.Start {
	return &wire.Start{Argv: []string{"sh", "-c", script}, Streams: threeStreams}
}

func TestCommand(t *testing.T) {
	r := newRig(t)
	c := r.open(sh("cat; echo err >&2; exit 3"))
	c.started()
	io.WriteString(c.stdin, "hello")
	c.stdin.CloseWrite()
	e := c.exited()
	if e.Status != 3 || e.Signal != 0 {
		t.Errorf("exit %+v", e)
	}
	if out := c.exactly(c.stdout, e.StdoutBytes); out != "hello" {
		t.Errorf("stdout %q", out)
	}
	if out := c.exactly(c.stderr, e.StderrBytes); out != "err\n" {
		t.Errorf("stderr %q", out)
	}
	// The guest closes all of it.
	for _, conn := range []*net.UnixConn{c.stdout, c.stderr, c.control} {
		if n, err := conn.Read(make([]byte, 1)); err != io.EOF {
			t.Errorf("after Exited: %d bytes, %v", n, err)
		}
	}
}

func TestEnvironment(t *testing.T) {
	r := newRig(t)
	m := &wire.Start{Argv: []string{"env"}, User: "ann", Streams: wire.StreamStdout,
		Env: []string{"A=1", "LANG=C", "A=2"}}
	c := r.open(m)
	c.started()
	got := c.exactly(c.stdout, c.exited().StdoutBytes)
	got = regexp.MustCompile(`/interop/\d+\n`).ReplaceAllString(got, "/interop/N\n")
	want := strings.Join([]string{"HOSTTYPE=x86_64", "LANG=C", "PATH=" + defaultPath, "NAME=box", "WSL_DISTRO_NAME=debian",
		"HOME=/tmp", "USER=ann", "LOGNAME=ann", "SHELL=/bin/sh", "WSL_INTEROP=" + filepath.Dir(r.path) + "/interop/N", "BROWSER=" + Browser, "A=2"}, "\n") + "\n"
	if got != want {
		t.Errorf("got\n%s\nwant\n%s", got, want)
	}
	c = r.open(&wire.Start{Argv: []string{"sh", "-c", "echo $LANG; id -u; id -g; id -G; umask; pwd; ls /proc/self/fd"}, User: "ann", Streams: wire.StreamStdout})
	c.started()
	if got := c.exactly(c.stdout, c.exited().StdoutBytes); got != "de_DE.UTF-8\n4242\n4243\n4243 777\n0022\n/tmp\n0\n1\n2\n3\n" {
		t.Errorf("got %q", got)
	}
}

// TestDefaultUser: who runs what names nobody, and what is prepared for them.
func TestDefaultUser(t *testing.T) {
	for _, c := range []struct{ conf, m, client, want, notice string }{
		{"", "", "", "0", ""},
		{"", "", "ann", "4242", ""},
		{"ann", "", "root", "4242", ""},
		{"ann", "root", "", "0", ""},
		{"nobody-here", "", "ann", "4242", `the default user of /etc/wsl.conf cannot be used: no such user: "nobody-here"`},
	} {
		r := newRig(t)
		r.srv.cfg.DefaultUser = c.conf
		r.srv.cfg.Prepare = func(u *users.User) ([]string, string) {
			return []string{"XDG_RUNTIME_DIR=/run/user/" + fmt.Sprint(u.UID), "A=prepared"}, "waited"
		}
		x := r.open(&wire.Start{Argv: []string{"sh", "-c", "echo $XDG_RUNTIME_DIR $A; id -u"}, User: c.m, Default: c.client, Env: []string{"A=asked"}, Cwd: "/", Streams: wire.StreamStdout})
		notice := x.started().Notice
		if got := x.exactly(x.stdout, x.exited().StdoutBytes); got != "/run/user/"+c.want+" asked\n"+c.want+"\n" {
			t.Errorf("%+v: %q", c, got)
		}
		if want := strings.TrimPrefix(c.notice+"\nwaited", "\n"); notice != want {
			t.Errorf("%+v: notice %q, want %q", c, notice, want)
		}
	}
}

func TestShells(t *testing.T) {
	r := newRig(t)
	for _, c := range []struct {
		m    wire.Start
		want string
	}{
		{wire.Start{Shell: wire.ShellStandard, Argv: []string{`echo "$0" $((1+1))`}}, "/bin/sh 2\n"},
		{wire.Start{Shell: wire.ShellLogin, Argv: []string{`echo "$0"`}}, "-sh\n"},
		{wire.Start{Shell: wire.ShellNone, Argv: []string{"printf", "%s|", "a", "", "b c"}}, "a||b c|"},
	} {
		c.m.Streams = wire.StreamStdout
		x := r.open(&c.m)
		x.started()
		if got := x.exactly(x.stdout, x.exited().StdoutBytes); got != c.want {
			t.Errorf("%+v: %q, want %q", c.m, got, c.want)
		}
	}
}

func TestCannotStart(t *testing.T) {
	r := newRig(t)
	dir := t.TempDir()
	must(t, os.Chmod(dir, 0o755))
	must(t, os.Chmod(filepath.Dir(dir), 0o755))
	write := func(name, text string, mode os.FileMode) string {
		must(t, os.WriteFile(dir+"/"+name, []byte(text), mode))
		return dir + "/" + name
	}
	for name, c := range map[string]struct {
		m    wire.Start
		code wire.Code
		text string
	}{
		"no command":        {wire.Start{Argv: []string{"no-such-program"}}, wire.CodeNotFound, "command not found"},
		"no file":           {wire.Start{Argv: []string{"/no/such"}}, wire.CodeNotFound, "no such file"},
		"directory":         {wire.Start{Argv: []string{dir}}, wire.CodeNotExecutable, "denied"},
		"not executable":    {wire.Start{Argv: []string{write("plain", "x", 0o644)}}, wire.CodeNotExecutable, "denied"},
		"not by this user":  {wire.Start{Argv: []string{write("mine", "#!/bin/sh\n", 0o700)}, User: "ann"}, wire.CodeNotExecutable, "denied"},
		"no interpreter":    {wire.Start{Argv: []string{write("lost", "#!/no/interpreter\n", 0o755)}}, wire.CodeNotFound, "interpreter"},
		"unknown user":      {wire.Start{Argv: []string{"true"}, User: "nobody-here"}, wire.CodeUnknownUser, "nobody-here"},
		"nothing":           {wire.Start{}, wire.CodeRefused, "no program"},
		"NUL":               {wire.Start{Argv: []string{"a\x00b"}}, wire.CodeRefused, "NUL"},
		"bad environment":   {wire.Start{Argv: []string{"true"}, Env: []string{"X"}}, wire.CodeRefused, "NAME=VALUE"},
		"two command lines": {wire.Start{Shell: wire.ShellLogin, Argv: []string{"a", "b"}}, wire.CodeRefused, "one command"},
		"too large":         {wire.Start{Argv: []string{"true", strings.Repeat("x", 256<<10)}}, wire.CodeNotExecutable, "larger"},
	} {
		t.Run(name, func(t *testing.T) {
			c.m.Streams = wire.StreamStdout
			x := r.open(&c.m)
			f, ok := x.next().(*wire.Failed)
			if !ok || f.Code != c.code || !strings.Contains(f.Text, c.text) {
				t.Errorf("got %+v, want code %d with %q", f, c.code, c.text)
			}
		})
	}
	t.Run("script without #!", func(t *testing.T) {
		x := r.open(&wire.Start{Argv: []string{write("bare", "echo bare $1\n", 0o755), "arg"}, Streams: wire.StreamStdout})
		x.started()
		if got := x.exactly(x.stdout, x.exited().StdoutBytes); got != "bare arg\n" {
			t.Errorf("got %q", got)
		}
	})
}

func TestWorkingDirectory(t *testing.T) {
	r := newRig(t)
	locked := t.TempDir()
	must(t, os.Chmod(locked, 0o700))
	for _, c := range []struct {
		cwd, user, want string
		notice          bool
	}{
		{"/usr", "", "/usr", false},
		{"", "ann", "/tmp", false},
		{"~", "ann", "/tmp", false},
		{"/no/such/dir", "ann", "/tmp", true},
		{"relative", "", "/", true},
		{locked, "ann", "/tmp", true},
		{locked, "", locked, false},
	} {
		x := r.open(&wire.Start{Argv: []string{"pwd"}, Cwd: c.cwd, User: c.user, Streams: wire.StreamStdout})
		s := x.started()
		got := x.exactly(x.stdout, x.exited().StdoutBytes)
		if got != c.want+"\n" || (s.Notice != "") != c.notice || c.notice && !strings.Contains(s.Notice, c.cwd) {
			t.Errorf("%+v: in %q with notice %q", c, got, s.Notice)
		}
	}
}

// TestBigBothWays sends and receives more than every buffer on the way holds,
// at the same time, and compares hashes.
func TestBigBothWays(t *testing.T) {
	r := newRig(t)
	const size = 64 << 20
	c := r.open(&wire.Start{Argv: []string{"tee", "/dev/stderr"}, Streams: threeStreams})
	c.started()
	chunk := make([]byte, 1<<20)
	rand.Read(chunk)
	sent := sha256.New()
	var wg sync.WaitGroup
	wg.Go(func() {
		for range size / len(chunk) {
			chunk[0]++
			sent.Write(chunk)
			if _, err := c.stdin.Write(chunk); err != nil {
				t.Error(err)
				return
			}
		}
		c.stdin.CloseWrite()
	})
	out, errout := sha256.New(), sha256.New()
	wg.Go(func() { io.Copy(out, c.stdout) })
	wg.Go(func() { io.Copy(errout, c.stderr) })
	e := c.exited()
	wg.Wait()
	if e.Status != 0 || e.StdoutBytes != size || e.StderrBytes != size {
		t.Errorf("%+v", e)
	}
	if !bytes.Equal(sent.Sum(nil), out.Sum(nil)) || !bytes.Equal(sent.Sum(nil), errout.Sum(nil)) {
		t.Error("hashes differ")
	}
}

// TestExitWithOutput: a program that writes and exits at once loses nothing,
// although a background child keeps its streams open.
func TestExitWithOutput(t *testing.T) {
	r := newRig(t)
	for range 20 {
		c := r.open(sh("sleep 1000 & head -c 300000 /dev/zero; echo $! >&2"))
		c.started()
		n := make(chan int, 1)
		go func() { // the client reads slowly at first, so that the pipe fills
			b, _ := io.ReadAll(io.LimitReader(c.stdout, 300000))
			n <- len(b)
		}()
		e := c.exited()
		if e.StdoutBytes != 300000 || <-n != 300000 {
			t.Fatalf("%+v", e)
		}
		var pid int
		fmt.Sscan(c.exactly(c.stderr, e.StderrBytes), &pid)
		if err := syscall.Kill(pid, 0); err != nil {
			t.Errorf("background child %d: %v", pid, err)
		}
		syscall.Kill(pid, syscall.SIGKILL)
	}
}

// TestBackgroundWriterLives: writing after the session's end does not fail.
func TestBackgroundWriterLives(t *testing.T) {
	r := newRig(t)
	dir := t.TempDir()
	must(t, syscall.Mkfifo(dir+"/go", 0o600))
	must(t, syscall.Mkfifo(dir+"/done", 0o600))
	c := r.open(sh(fmt.Sprintf(`(read x <%[1]s/go; head -c 200000 /dev/zero; echo $? >%[1]s/done) & exit 0`, dir)))
	c.started()
	if e := c.exited(); e.Status != 0 || e.StdoutBytes != 0 {
		t.Errorf("%+v", e)
	}
	must(t, os.WriteFile(dir+"/go", []byte("x\n"), 0))
	b, err := os.ReadFile(dir + "/done")
	if string(b) != "0\n" {
		t.Errorf("background writer ended with %q, %v", b, err)
	}
}

// TestBackgroundFlood: a child that never stops writing does not keep the session
// of a program that has ended.
func TestBackgroundFlood(t *testing.T) {
	for _, streams := range []wire.Streams{wire.StreamStdin | wire.StreamStdout, wire.StreamPTY} {
		r := newRig(t)
		file := filepath.Join(t.TempDir(), "pid")
		m := sh("trap '' HUP; cat /dev/zero & echo $! >" + file + "; read x; exit 3")
		m.Streams = streams
		c := r.open(m)
		in, out := c.stdin, c.stdout
		if in == nil {
			in, out = c.pty, c.pty
		}
		c.started()
		_, err := io.CopyN(io.Discard, out, 1<<20) // it is at it
		must(t, err)
		t.Cleanup(func() {
			text, _ := os.ReadFile(file)
			if pid, err := strconv.Atoi(strings.TrimSpace(string(text))); err == nil {
				syscall.Kill(pid, syscall.SIGKILL)
			}
		})
		go io.Copy(io.Discard, out)
		_, err = io.WriteString(in, "x\n")
		must(t, err)
		if e := c.exited(); e.Status != 3 {
			t.Errorf("%+v", e)
		}
	}
}

// TestClientStopsReading: a client that closes its stdout ends the program as
// a closed pipe does.
func TestClientStopsReading(t *testing.T) {
	r := newRig(t)
	c := r.open(&wire.Start{Argv: []string{"cat", "/dev/zero"}, Streams: wire.StreamStdout})
	c.started()
	c.exactly(c.stdout, 100000)
	c.stdout.Close()
	if e := c.exited(); e.Signal != uint8(syscall.SIGPIPE) {
		t.Errorf("%+v", e)
	}
}

// TestProgramClosesStdin: the client's writes fail instead of vanishing.
func TestProgramClosesStdin(t *testing.T) {
	r := newRig(t)
	c := r.open(sh("exec <&-; echo closed; sleep 1000"))
	c.started()
	c.exactly(c.stdout, 7)
	var err error
	for err == nil {
		_, err = c.stdin.Write(make([]byte, 4096))
	}
	if !errors.Is(err, syscall.EPIPE) {
		t.Errorf("write: %v", err)
	}
	must(t, wire.Write(c.control, &wire.Signal{Number: uint8(syscall.SIGTERM)}))
	if e := c.exited(); e.Signal != uint8(syscall.SIGTERM) {
		t.Errorf("%+v", e)
	}
}

func TestSignals(t *testing.T) {
	r := newRig(t)
	c := r.open(sh("trap 'echo got; exit 7' USR1; echo ready; while :; do sleep 1000 & wait; done"))
	c.started()
	c.exactly(c.stdout, 6)
	must(t, wire.Write(c.control, &wire.Signal{Number: uint8(syscall.SIGUSR1)}))
	e := c.exited()
	if e.Status != 7 || e.StdoutBytes != 10 {
		t.Errorf("%+v", e)
	}
	c = r.open(sh("kill -KILL $$"))
	c.started()
	if e := c.exited(); e.Signal != 9 || e.Status != 0 {
		t.Errorf("%+v", e)
	}
}

// TestClientDeath: SIGHUP reaches the whole session, its pipes and all.
func TestClientDeath(t *testing.T) {
	for _, streams := range []wire.Streams{threeStreams, wire.StreamPTY, wire.StreamStdout} {
		r := newRig(t)
		dir := t.TempDir()
		must(t, syscall.Mkfifo(dir+"/log", 0o600))
		open, err := os.OpenFile(dir+"/log", os.O_RDWR, 0) // has no end while nobody writes yet
		must(t, err)
		log, err := os.OpenFile(dir+"/log", os.O_RDONLY|syscall.O_NONBLOCK, 0)
		must(t, err)
		defer log.Close()
		log.SetDeadline(time.Now().Add(limit))
		// The leader is ended by SIGHUP. The child in the background says that it is
		// SIGHUP; behind a terminal it may get a second one, from the kernel.
		script := fmt.Sprintf(`exec 9>%s/log
(trap 'echo child >&9; exit' HUP; echo r >&9; sleep 1000 9>&- & wait) &
echo r >&9; sleep 1000 9>&-`, dir)
		m := sh(script)
		m.Streams = streams
		c := r.open(m)
		c.started()
		got := read(t, log, 4)
		open.Close()
		c.control.Close()
		rest, err := io.ReadAll(log) // to the end of both
		if got != "r\nr\n" || !strings.HasPrefix(string(rest), "child\n") || strings.ReplaceAll(string(rest), "child\n", "") != "" || err != nil {
			t.Errorf("streams %d: %q, then %q, %v", streams, got, rest, err)
		}
		for _, conn := range []*net.UnixConn{c.stdout, c.pty} {
			if conn != nil {
				if _, err := io.Copy(io.Discard, conn); err != nil && !errors.Is(err, syscall.ECONNRESET) {
					t.Errorf("streams %d: data connection: %v", streams, err)
				}
			}
		}
	}
}

func read(t *testing.T, f io.Reader, n int) string {
	t.Helper()
	b := make([]byte, n)
	_, err := io.ReadFull(f, b)
	must(t, err)
	return string(b)
}

func TestTerminal(t *testing.T) {
	r := newRig(t)
	c := r.open(&wire.Start{Argv: []string{"sh", "-c", `tty; stty size; stat -c '%u %g %a' $(tty); echo $TERM; stty -a | grep -o -- '-*iutf8'; read x; echo "<$x>"; stty size; exit 5`},
		User: "ann", Streams: wire.StreamPTY, Size: wire.WindowSize{Rows: 24, Cols: 80}})
	c.started()
	got := c.until("iutf8\r\n")
	for _, want := range []string{"/dev/pts/", "24 80\r\n", "4242 5 620\r\n", "xterm-256color\r\n", "\niutf8"} {
		if !strings.Contains(got, want) {
			t.Errorf("%q lacks %q", got, want)
		}
	}
	must(t, wire.Write(c.control, &wire.Resize{Size: wire.WindowSize{Rows: 50, Cols: 132}}))
	io.WriteString(c.pty, "ünï\n")
	e := c.exited()
	rest := c.exactly(c.pty, e.PTYBytes-uint64(len(got)))
	if e.Status != 5 || !strings.Contains(rest, "<ünï>\r\n") {
		t.Errorf("%+v, %q", e, rest)
	}
}

// until reads from the terminal up to and including text.
func (c *client) until(text string) string {
	c.t.Helper()
	var got []byte
	b := make([]byte, 1)
	for !bytes.HasSuffix(got, []byte(text)) {
		if _, err := io.ReadFull(c.pty, b); err != nil {
			c.t.Fatalf("%v after %q", err, got)
		}
		got = append(got, b...)
	}
	return string(got)
}

func TestTerminalSignalsAndResize(t *testing.T) {
	r := newRig(t)
	c := r.open(&wire.Start{Argv: []string{"sh", "-c", `trap 'echo size $(stty size)' WINCH; trap 'echo int; exit 9' INT; echo ready; while :; do sleep 1000 & wait; done`},
		Streams: wire.StreamPTY, Size: wire.WindowSize{Rows: 1, Cols: 2}})
	c.started()
	c.until("ready\r\n")
	must(t, wire.Write(c.control, &wire.Resize{Size: wire.WindowSize{Rows: 50, Cols: 132}}))
	c.until("size 50 132\r\n")
	io.WriteString(c.pty, "\x03")
	c.until("int\r\n")
	if e := c.exited(); e.Status != 9 {
		t.Errorf("%+v", e)
	}
	c = r.open(&wire.Start{Argv: []string{"sleep", "1000"}, Streams: wire.StreamPTY})
	c.started()
	must(t, wire.Write(c.control, &wire.Signal{Number: uint8(syscall.SIGTERM)}))
	if e := c.exited(); e.Signal != uint8(syscall.SIGTERM) {
		t.Errorf("%+v", e)
	}
}

// TestTerminalOutputComplete: bytes in the line discipline at exit are not lost.
func TestTerminalOutputComplete(t *testing.T) {
	r := newRig(t)
	for range 30 {
		c := r.open(&wire.Start{Argv: []string{"sh", "-c", "stty -opost; (sleep 1000 &) ; head -c 200000 /dev/zero | tr '\\0' x; echo end"}, Streams: wire.StreamPTY})
		c.started()
		var n uint64
		done := make(chan string, 1)
		go func() {
			b, _ := io.ReadAll(c.pty)
			n = uint64(len(b))
			done <- string(b[max(0, len(b)-4):])
		}()
		e := c.exited()
		if tail := <-done; e.PTYBytes != 200004 || n != e.PTYBytes || tail != "end\n" {
			t.Fatalf("%+v, read %d, tail %q", e, n, tail)
		}
	}
}

// TestTerminalWithRedirectedStreams: wsl2 cmd >file in a terminal.
func TestTerminalWithRedirectedStreams(t *testing.T) {
	r := newRig(t)
	c := r.open(&wire.Start{Argv: []string{"sh", "-c", "tty; test -t 1; echo $?; echo to-tty >/dev/tty; test -t 2; exit $?"}, Streams: wire.StreamPTY | wire.StreamStdout})
	c.started()
	e := c.exited()
	out := c.exactly(c.stdout, e.StdoutBytes)
	if e.Status != 0 || !strings.HasPrefix(out, "/dev/pts/") || !strings.HasSuffix(out, "\n1\n") {
		t.Errorf("%+v %q", e, out)
	}
	if got := c.exactly(c.pty, e.PTYBytes); got != "to-tty\r\n" {
		t.Errorf("terminal: %q", got)
	}
	c = r.open(&wire.Start{Argv: []string{"sh", "-c", "echo hi >/dev/tty"}, Streams: wire.StreamPTY | threeStreams})
	c.started()
	if e := c.exited(); e.Status != 0 || c.exactly(c.pty, e.PTYBytes) != "hi\r\n" {
		t.Errorf("only /dev/tty: %+v", e)
	}
}

func TestParallelSessions(t *testing.T) {
	r := newRig(t)
	var wg sync.WaitGroup
	for i := range 64 {
		wg.Go(func() {
			c := r.open(sh(fmt.Sprintf("echo %d; exit %d", i, i)))
			c.started()
			e := c.exited()
			if int(e.Status) != i || c.exactly(c.stdout, e.StdoutBytes) != fmt.Sprintf("%d\n", i) {
				t.Errorf("session %d: %+v", i, e)
			}
		})
	}
	wg.Wait()
}

func TestAssembly(t *testing.T) {
	r := newRig(t)
	t.Run("data connections first", func(t *testing.T) {
		id := newID()
		out := r.dial(wire.RoleStdout, id)
		c := r.dial(wire.RoleControl, id)
		must(t, wire.Write(c, &wire.Start{Argv: []string{"echo", "x"}, Streams: wire.StreamStdout}))
		if b, err := io.ReadAll(out); string(b) != "x\n" {
			t.Errorf("%q, %v", b, err)
		}
	})
	t.Run("wrong version", func(t *testing.T) {
		c, err := net.Dial("unix", r.path)
		must(t, err)
		defer c.Close()
		must(t, wire.Write(c, &wire.Hello{Version: wire.Version + 1, Role: wire.RoleControl}))
		m, err := wire.Read(c)
		if f, ok := m.(*wire.Failed); !ok || f.Code != wire.CodeVersion || !strings.Contains(f.Text, "the VM is older") {
			t.Errorf("%+v, %v", m, err)
		}
	})
	t.Run("garbage", func(t *testing.T) {
		for _, b := range []string{"", "GET / HTTP/1.0\r\n\r\n", "\x00\x00\x00\x00\x00", "\x01\x00\x00\x00\xff"} {
			c, err := net.Dial("unix", r.path)
			must(t, err)
			io.WriteString(c, b)
			c.(*net.UnixConn).CloseWrite()
			c.SetDeadline(time.Now().Add(limit))
			io.Copy(io.Discard, c) // ends: the guest closes it
			c.Close()
		}
	})
	t.Run("second control", func(t *testing.T) {
		c := r.open(sh("read x"))
		c.started()
		c.stdin.CloseWrite()
		c.exited()
	})
}

// TestAssemblyTimesOut: connections that never become a session are closed.
func TestAssemblyTimesOut(t *testing.T) {
	r := newRigTimeout(t, 100*time.Millisecond)
	silent, err := net.Dial("unix", r.path)
	must(t, err)
	defer silent.Close()
	for name, c := range map[string]net.Conn{
		"no Hello":          silent,
		"data alone":        r.dial(wire.RoleStdout, newID()),
		"control, no Start": r.dial(wire.RoleControl, newID()),
	} {
		c.SetDeadline(time.Now().Add(limit))
		b, err := io.ReadAll(c)
		if err != nil {
			t.Errorf("%s: %v after %q", name, err, b)
		}
	}
	id := newID()
	c := r.dial(wire.RoleControl, id)
	must(t, wire.Write(c, &wire.Start{Argv: []string{"true"}, Streams: wire.StreamStdout}))
	m, err := wire.Read(c)
	if f, ok := m.(*wire.Failed); !ok || f.Code != wire.CodeRefused || !strings.Contains(f.Text, "did not come") {
		t.Errorf("%+v, %v", m, err)
	}
}

func TestCloseIfIdle(t *testing.T) {
	r := newRig(t)
	c := r.open(sh("read x"))
	c.started()
	if r.srv.CloseIfIdle() {
		t.Error("closed with a session running")
	}
	if r.srv.Quiet() {
		t.Error("quiet with a session running")
	}
	c.stdin.CloseWrite()
	c.exited()
	// A launcher that asks too early must hear of it when asking would succeed:
	// the program's end alone does not mean that.
	for !r.srv.Quiet() {
		select {
		case <-r.quiet:
		case <-time.After(limit):
			t.Fatal("no word that the last session was served")
		}
	}
	if !r.srv.CloseIfIdle() {
		t.Error("not closed though idle")
	}
}

func TestParseStat(t *testing.T) {
	for stat, want := range map[string]procStat{
		"12 (a) b) S 1 12 77 34816 5": {77, 34816},
		"12 (x) S 1 12 77 0":          {77, 0},
		"12 (x) S 1 12 77":            {},
		"":                            {},
		"12 (x) S 1 12 bad 34816":     {0, 34816},
	} {
		if got := parseStat([]byte(stat)); got != want {
			t.Errorf("%q: %+v, want %+v", stat, got, want)
		}
	}
}
