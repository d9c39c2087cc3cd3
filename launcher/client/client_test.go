package client

import (
	"archive/tar"
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/creack/pty"

	"github.com/wsl2/wsl2/images/archive"
	"github.com/wsl2/wsl2/images/tools"
	"github.com/wsl2/wsl2/internal/wire"
	"github.com/wsl2/wsl2/launcher/api"
	"github.com/wsl2/wsl2/launcher/config"
	"github.com/wsl2/wsl2/launcher/internal/fakevm"
	"github.com/wsl2/wsl2/launcher/registry"
	"github.com/wsl2/wsl2/launcher/service"
	"github.com/wsl2/wsl2/launcher/vmproc"
)

// TestMain lets the test's executable be a client or the service of a test that
// needs real processes.
func TestMain(m *testing.M) {
	if len(os.Args) > 1 {
		switch os.Args[1] {
		case "client":
			os.Exit(clientProcess(os.Args[2:]))
		case "service":
			serviceProcess()
			os.Exit(0)
		}
	}
	os.Exit(m.Run())
}

// pathsIn are the paths of a host in dir.
func pathsIn(dir string) config.Paths {
	return config.Paths{Data: dir + "/data", ConfigFile: dir + "/wslconfig", Runtime: dir, State: dir, Cache: dir}
}

// clientProcess runs a command with the process's own streams.
func clientProcess(args []string) int {
	c := newClient(os.Getenv("TEST_HOST"))
	status, err := c.Run(RunSpec{Open: api.Open{System: true}, Argv: args},
		Stdio{In: os.Stdin, Out: os.Stdout, Err: os.Stderr, Getenv: os.Getenv, Environ: os.Environ()})
	if err != nil {
		fmt.Fprintln(os.Stderr, "wsl2:", err)
	}
	return status
}

func newClient(dir string) *Client {
	p := pathsIn(dir)
	return &Client{Paths: p, Self: api.Self(), Notice: func(text string) { fmt.Fprintln(os.Stderr, "wsl2:", text) },
		Service: Command{Path: "/proc/self/exe", Args: []string{"service"}, OpenLog: p.OpenServiceLog}}
}

// serviceProcess is a service whose VMs are fakes. It notes each start.
func serviceProcess() {
	dir := os.Getenv("TEST_HOST")
	l, err := net.FileListener(os.NewFile(service.FDListener, "listener"))
	if err != nil {
		panic(err)
	}
	f, _ := os.OpenFile(dir+"/starts", os.O_APPEND|os.O_CREATE|os.O_WRONLY, 0o600)
	fmt.Fprintln(f, os.Getpid())
	f.Close()
	l.(*net.UnixListener).SetUnlinkOnClose(true)
	fleet := &fakevm.Fleet{}
	newService(dir, fleet).Serve(context.Background(), l.(*net.UnixListener))
}

func newService(dir string, fleet *fakevm.Fleet) *service.Service {
	kernel := filepath.Join(dir, "kernel")
	os.WriteFile(kernel, []byte("k"), 0o600)
	b := &service.Booter{Paths: pathsIn(dir), Log: slog.New(slog.DiscardHandler), Getenv: func(string) string { return kernel },
		Start: func(ctx context.Context, c vmproc.Config, lock *os.File, _ func(int, error)) (service.Process, error) {
			return fleet.Start(ctx, c, lock)
		}}
	return service.New(service.Config{Paths: pathsIn(dir), Boot: b.Boot, Log: b.Log, Self: api.Self(), Linger: time.Minute, Tools: tools.Archive})
}

// host is a service in this process.
type host struct {
	t     *testing.T
	dir   string
	fleet *fakevm.Fleet
	stop  func()
}

func shortDir(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("/tmp", "w")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	return dir
}

func newHost(t *testing.T, hooks fakevm.Hooks) *host {
	t.Helper()
	h := &host{t: t, dir: shortDir(t), fleet: &fakevm.Fleet{Hooks: hooks}}
	h.serve()
	return h
}

// serve starts the host's service.
func (h *host) serve() {
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: pathsIn(h.dir).ServiceSocket(), Net: "unix"})
	if err != nil {
		h.t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	s := newService(h.dir, h.fleet)
	go func() {
		defer close(done)
		s.Serve(ctx, l)
	}()
	h.stop = sync.OnceFunc(func() { cancel(); <-done })
	h.t.Cleanup(h.stop)
}

func (h *host) client() *Client { return newClient(h.dir) }

func (h *host) addDistro(name string) {
	h.t.Helper()
	disk := filepath.Join(h.dir, name+".ext4")
	os.WriteFile(disk, nil, 0o600)
	r, err := registry.Open(pathsIn(h.dir).Registry())
	if err == nil {
		err = r.Add(registry.Distro{Name: name, ID: registry.NewID(), Disk: disk})
	}
	if err != nil {
		h.t.Fatal(err)
	}
}

// streams are a command's, as files.
type streams struct {
	in             *os.File
	out, err       *os.File
	stdout, stderr func() string
}

// pipes returns streams that carry stdin from r (nil: /dev/null) and collect output.
func pipes(t *testing.T, r io.Reader) streams {
	t.Helper()
	var s streams
	if r == nil {
		s.in, _ = os.Open(os.DevNull)
	} else {
		pr, pw, err := os.Pipe()
		if err != nil {
			t.Fatal(err)
		}
		s.in = pr
		go func() { io.Copy(pw, r); pw.Close() }()
	}
	collect := func() (*os.File, func() string) {
		pr, pw, err := os.Pipe()
		if err != nil {
			t.Fatal(err)
		}
		var b bytes.Buffer
		done := make(chan struct{})
		go func() { defer close(done); io.Copy(&b, pr); pr.Close() }()
		return pw, func() string { pw.Close(); <-done; return b.String() }
	}
	s.out, s.stdout = collect()
	s.err, s.stderr = collect()
	t.Cleanup(func() { s.in.Close(); s.out.Close(); s.err.Close() })
	return s
}

func (s streams) stdio() Stdio {
	return Stdio{In: s.in, Out: s.out, Err: s.err, Getenv: func(string) string { return "" }}
}

func system(argv ...string) RunSpec { return RunSpec{Open: api.Open{System: true}, Argv: argv} }

func TestRun(t *testing.T) {
	h := newHost(t, fakevm.Hooks{})
	for _, c := range []struct {
		argv             []string
		stdin            string
		status           int
		out, errOut, err string
	}{
		{argv: []string{"true"}},
		{argv: []string{"exit", "3"}, status: 3},
		{argv: []string{"exit", "255"}, status: 255},
		{argv: []string{"die", "9"}, status: 128 + 9},
		{argv: []string{"die", "15"}, status: 128 + 15},
		{argv: []string{"echo", "a", "b"}, out: "a b\n"},
		{argv: []string{"both"}, out: "out\n", errOut: "err\n"},
		{argv: []string{"cat"}, stdin: "one\ntwo", out: "one\ntwo"},
		{argv: []string{"nosuch"}, status: 127, err: "nosuch: not found"},
	} {
		s := pipes(t, strings.NewReader(c.stdin))
		status, err := h.client().Run(system(c.argv...), s.stdio())
		if status != c.status || (err == nil) != (c.err == "") || err != nil && !strings.Contains(err.Error(), c.err) {
			t.Errorf("%q: status %d, %v", c.argv, status, err)
		}
		if out, errOut := s.stdout(), s.stderr(); out != c.out || errOut != c.errOut {
			t.Errorf("%q: stdout %q, stderr %q", c.argv, out, errOut)
		}
	}
	if n := len(h.fleet.VMs()); n != 1 {
		t.Errorf("%d VMs", n)
	}
}

// TestFailed: the guest's words reach the user, whatever failed.
func TestFailed(t *testing.T) {
	for _, code := range []wire.Code{wire.CodeNotFound, wire.CodeUnknownUser, wire.CodeInternal} {
		if err := new(session).Failed(&wire.Failed{Code: code, Text: "why"}); err == nil || !strings.Contains(err.Error(), "why") {
			t.Errorf("code %d: %v", code, err)
		}
	}
}

// What a Start carries: user, directory, environment, and no connection for /dev/null.
func TestStart(t *testing.T) {
	h := newHost(t, fakevm.Hooks{})
	s := pipes(t, nil)
	std := s.stdio()
	std.Environ = []string{"TERM=xterm", "LANG=de_DE.UTF-8", "LC_ALL=C", "LC_TIME=", "SECRET=1", "FOO=bar", "P=/x", "WSLENV=FOO:P/p:GONE:W/w:Q/z"}
	std.Getenv = func(name string) string {
		if name == "WSLENV" {
			return "FOO:P/p:GONE:W/w:Q/z"
		}
		return ""
	}
	spec := system("env")
	spec.User, spec.Cwd, spec.Shell = "me", "/srv", wire.ShellNone
	if status, err := h.client().Run(spec, std); status != 0 || err != nil {
		t.Fatal(status, err)
	}
	want := fmt.Sprintf("user=me cwd=/srv shell=0 streams=%d\nLANG=de_DE.UTF-8\nLC_ALL=C\nWSLENV=FOO:P/p:GONE:W/w:Q/z\nFOO=bar\nGONE=\n", wire.StreamStdout|wire.StreamStderr)
	if got := s.stdout(); got != want {
		t.Errorf("got %q\nwant %q", got, want)
	}
}

func TestMegabytesBothWays(t *testing.T) {
	h := newHost(t, fakevm.Hooks{})
	const n = 100 << 20
	sum := sha256.New()
	in := io.TeeReader(io.LimitReader(&pattern{}, n), sum)
	pr, pw, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer pr.Close()
	got := sha256.New()
	size := make(chan int64, 1)
	go func() { n, _ := io.Copy(got, pr); size <- n }()
	s := pipes(t, in)
	std := s.stdio()
	std.Out = pw
	status, err := h.client().Run(system("cat"), std)
	pw.Close()
	if moved := <-size; status != 0 || err != nil || moved != n || !bytes.Equal(sum.Sum(nil), got.Sum(nil)) {
		t.Fatalf("status %d, %v, %d of %d bytes", status, err, moved, n)
	}
}

// pattern is an endless stream that no shift or repetition leaves alike.
type pattern struct{ n uint64 }

func (p *pattern) Read(b []byte) (int, error) {
	for i := range b {
		p.n = p.n*6364136223846793005 + 1442695040888963407
		b[i] = byte(p.n >> 56)
	}
	return len(b), nil
}

// A reader that goes away ends the program as it would a local one.
func TestReaderGoesAway(t *testing.T) {
	h := newHost(t, fakevm.Hooks{})
	cmd := h.process("yes")
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	start(t, cmd)
	io.ReadFull(out, make([]byte, 100))
	out.Close()
	if st := exitStatus(cmd.Wait()); st != 128+int(syscall.SIGPIPE) {
		t.Errorf("status %d", st)
	}
}

// process is a client in a process of its own, on this host's service.
func (h *host) process(argv ...string) *exec.Cmd {
	cmd := exec.Command("/proc/self/exe", append([]string{"client"}, argv...)...)
	cmd.Env = append(os.Environ(), "TEST_HOST="+h.dir)
	return cmd
}

func start(t *testing.T, cmd *exec.Cmd) {
	t.Helper()
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { cmd.Process.Kill(); cmd.Wait() })
}

func exitStatus(err error) int {
	var exit *exec.ExitError
	if errors.As(err, &exit) {
		return exit.ExitCode()
	}
	if err != nil {
		return -2
	}
	return 0
}

// expect reads until text has come.
func expect(t *testing.T, r io.Reader, text string) string {
	t.Helper()
	var all []byte
	b := make([]byte, 1)
	for !strings.HasSuffix(string(all), text) {
		if _, err := r.Read(b); err != nil {
			t.Fatalf("waiting for %q: %v after %q", text, err, all)
		}
		all = append(all, b[0])
	}
	return string(all)
}

func TestSignalsAreForwarded(t *testing.T) {
	h := newHost(t, fakevm.Hooks{})
	for _, sig := range []syscall.Signal{syscall.SIGTERM, syscall.SIGINT, syscall.SIGHUP, syscall.SIGQUIT, syscall.SIGUSR1, syscall.SIGUSR2} {
		cmd := h.process("wait")
		out, _ := cmd.StdoutPipe()
		start(t, cmd)
		expect(t, out, "waiting\n")
		cmd.Process.Signal(sig)
		if st := exitStatus(cmd.Wait()); st != 128+int(sig) {
			t.Errorf("%v: status %d", sig, st)
		}
	}
}

// A client that is killed ends its session and its lease.
func TestClientKilled(t *testing.T) {
	hup := make(chan struct{})
	h := newHost(t, fakevm.Hooks{Programs: map[string]fakevm.Program{"untilhup": func(s *fakevm.Session, _ []string) (uint8, uint8) {
		s.Write(wire.RoleStdout, []byte("waiting\n"))
		<-s.HangUp()
		close(hup)
		return 0, 1
	}}})
	os.WriteFile(pathsIn(h.dir).ConfigFile, []byte("[general]\ninstanceIdleTimeout=0\n[wsl2]\nvmIdleTimeout=0\n"), 0o600)
	cmd := h.process("untilhup")
	out, _ := cmd.StdoutPipe()
	start(t, cmd)
	expect(t, out, "waiting\n")
	cmd.Process.Kill()
	<-hup
	<-h.fleet.VMs()[0].Done() // idle: the lease has ended too
	if err := h.fleet.VMs()[0].Exit(); err != nil {
		t.Error(err)
	}
}

// A VM that dies ends each session with one message, and the next command has a new one.
func TestVMDies(t *testing.T) {
	h := newHost(t, fakevm.Hooks{})
	type ended struct {
		status int
		err    error
	}
	results := make(chan ended, 3)
	for range 3 {
		s := pipes(t, nil)
		pr, pw, _ := os.Pipe()
		std := s.stdio()
		std.Out = pw
		go func() {
			st, err := h.client().Run(system("wait"), std)
			pw.Close()
			results <- ended{st, err}
		}()
		expect(t, pr, "waiting\n")
	}
	h.fleet.VMs()[0].End(&vmproc.ExitError{Reason: "the guest's kernel crashed", Tail: "Kernel panic - not syncing: boom\n"})
	for range 3 {
		r := <-results
		if r.status != 125 || r.err == nil || !strings.Contains(r.err.Error(), "Kernel panic - not syncing: boom") {
			t.Errorf("%d, %v", r.status, r.err)
		}
	}
	s := pipes(t, nil)
	if st, err := h.client().Run(system("true"), s.stdio()); st != 0 || err != nil {
		t.Error(st, err)
	}
	if n := len(h.fleet.VMs()); n != 2 {
		t.Errorf("%d VMs", n)
	}
}

// SIGTERM to the VM's process has the guest power off.
func TestVMTerminated(t *testing.T) {
	h := newHost(t, fakevm.Hooks{})
	s := pipes(t, nil)
	pr, pw, _ := os.Pipe()
	std := s.stdio()
	std.Out = pw
	done := make(chan error, 1)
	go func() {
		_, err := h.client().Run(system("wait"), std)
		pw.Close()
		done <- err
	}()
	expect(t, pr, "waiting\n")
	vm := h.fleet.VMs()[0]
	vm.Term()
	<-vm.Done()
	if err := vm.Exit(); err != nil {
		t.Errorf("the VM: %v", err)
	}
	if err := <-done; err == nil || !strings.Contains(err.Error(), "powered off") {
		t.Errorf("the session: %v", err)
	}
}

// PID 1 that is silent for good loses its VM; so does a VM that is never ready.
func TestGuestSilent(t *testing.T) {
	h := newHost(t, fakevm.Hooks{NoReady: true})
	os.WriteFile(pathsIn(h.dir).ConfigFile, []byte("[wsl2]\nkernelBootTimeout=100\n"), 0o600)
	s := pipes(t, nil)
	st, err := h.client().Run(system("true"), s.stdio())
	if st != 125 || err == nil || !strings.Contains(err.Error(), "not ready within 100ms") {
		t.Errorf("%d, %v", st, err)
	}
	<-h.fleet.VMs()[0].Done()
}

// TestGuestHangs: a guest that does not start the program is not waited for for
// ever, and the user hears what to do.
func TestGuestHangs(t *testing.T) {
	h := newHost(t, fakevm.Hooks{NoAnswer: true})
	c := h.client()
	c.AnswerWait = 100 * time.Millisecond
	s := pipes(t, nil)
	st, err := c.Run(system("true"), s.stdio())
	if st != 125 || err == nil || !strings.Contains(err.Error(), "has not answered for 100ms") {
		t.Errorf("%d, %v", st, err)
	}
}

func TestServiceEndsDuringSession(t *testing.T) {
	h := newHost(t, fakevm.Hooks{})
	s := pipes(t, nil)
	pr, pw, _ := os.Pipe()
	std := s.stdio()
	std.Out = pw
	result := make(chan error, 1)
	go func() {
		_, err := h.client().Run(system("wait"), std)
		result <- err
	}()
	expect(t, pr, "waiting\n")
	h.stop()
	if err := <-result; err == nil {
		t.Error("the session ended well")
	}
}

func TestTerminateEndsSession(t *testing.T) {
	h := newHost(t, fakevm.Hooks{})
	h.stop()
	h.addDistro("debian")
	h.serve()
	s := pipes(t, nil)
	pr, pw, _ := os.Pipe()
	std := s.stdio()
	std.Out = pw
	result := make(chan int, 1)
	go func() {
		st, _ := h.client().Run(RunSpec{Argv: []string{"wait"}}, std) // the default distro
		result <- st
	}()
	expect(t, pr, "waiting\n")
	c := h.client()
	var l api.List
	if err := c.Call(api.Call{Verb: api.VerbList}, &l, false); err != nil || len(l.Distros) != 1 || l.Distros[0].State != api.StateRunning || l.Distros[0].Sessions != 1 {
		t.Errorf("%+v, %v", l, err)
	}
	if err := c.Call(api.Call{Verb: api.VerbTerminate, Name: "Debian"}, nil, false); err != nil {
		t.Error(err)
	}
	if st := <-result; st != 128+15 && st != 125 {
		t.Errorf("status %d", st)
	}
	if n := h.fleet.VMs()[0].Disks(); n != 0 {
		t.Errorf("%d disks attached", n)
	}
}

func TestErrors(t *testing.T) {
	h := newHost(t, fakevm.Hooks{})
	c := h.client()
	s := pipes(t, nil)
	for name, f := range map[string]func() error{
		"wsl2 --list":   func() error { _, err := c.Run(RunSpec{Open: api.Open{Distro: "nosuch"}}, s.stdio()); return err },
		"wsl2 --import": func() error { _, err := c.Run(RunSpec{}, s.stdio()); return err },
		"`wsl2 --list`": func() error { return c.Call(api.Call{Verb: api.VerbTerminate, Name: "nosuch"}, nil, true) },
		"unknown":       func() error { return c.Call(api.Call{Verb: "nosuch", Name: "x"}, nil, true) },
	} {
		err := f()
		if name == "unknown" {
			if err == nil {
				t.Error("an unknown verb is no error")
			}
			continue
		}
		if err == nil || !strings.Contains(err.Error(), name) {
			t.Errorf("%s: %v", name, err)
		}
	}
	// A registry that cannot be read is named, kept, and read again once it is repaired.
	path := pathsIn(h.dir).Registry()
	os.MkdirAll(filepath.Dir(path), 0o700)
	later := `{"version": 1000}`
	os.WriteFile(path, []byte(later), 0o600)
	bad := newHost(t, fakevm.Hooks{})
	bad.stop()
	bad.dir = h.dir
	h.stop()
	bad.serve()
	err := bad.client().Call(api.Call{Verb: api.VerbList}, nil, true)
	if err == nil || !strings.Contains(err.Error(), path) {
		t.Errorf("registry of a later version: %v", err)
	}
	if text, _ := os.ReadFile(path); string(text) != later {
		t.Errorf("registry changed to %q", text)
	}
	os.Remove(path)
	if err := bad.client().Call(api.Call{Verb: api.VerbList}, nil, true); err != nil {
		t.Error(err)
	}
}

func TestNotRunning(t *testing.T) {
	c := newClient(shortDir(t))
	if err := c.Call(api.Call{Verb: api.VerbShutdown}, nil, false); !errors.Is(err, ErrNotRunning) {
		t.Error(err)
	}
}

// Many clients at once start one service.
func TestStartRace(t *testing.T) {
	dir := shortDir(t)
	var cmds []*exec.Cmd
	h := &host{t: t, dir: dir}
	for range 20 {
		cmd := h.process("echo", "hello")
		cmd.Stdin = strings.NewReader("")
		var out bytes.Buffer
		cmd.Stdout, cmd.Stderr = &out, &out
		start(t, cmd)
		cmds = append(cmds, cmd)
	}
	for _, cmd := range cmds {
		if st := exitStatus(cmd.Wait()); st != 0 || cmd.Stdout.(*bytes.Buffer).String() != "hello\n" {
			t.Errorf("status %d: %s", st, cmd.Stdout)
		}
	}
	if pids := h.starts(); len(pids) != 1 {
		t.Errorf("services started: %v", pids)
	}
	h.endServices()
}

func (h *host) starts() (pids []int) {
	text, _ := os.ReadFile(h.dir + "/starts")
	for _, f := range strings.Fields(string(text)) {
		pid, _ := strconv.Atoi(f)
		pids = append(pids, pid)
	}
	return pids
}

// endServices asks the service process to end and waits until its socket is gone.
func (h *host) endServices() {
	h.t.Helper()
	if err := newClient(h.dir).Call(api.Call{Verb: api.VerbShutdown}, nil, false); err != nil && !errors.Is(err, ErrNotRunning) {
		h.t.Error(err)
	}
}

// A service keeps nothing open that the command which started it was left by its caller.
func TestServiceInheritsNothing(t *testing.T) {
	h := &host{t: t, dir: shortDir(t)}
	defer h.endServices()
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	cmd := h.process("true")
	cmd.ExtraFiles = []*os.File{w}
	start(t, cmd)
	w.Close()
	if st := exitStatus(cmd.Wait()); st != 0 {
		t.Fatal(st)
	}
	r.SetReadDeadline(time.Now().Add(10 * time.Second))
	if _, err := r.Read(make([]byte, 1)); err != io.EOF {
		t.Errorf("the service keeps the caller's pipe: %v", err)
	}
}

// A service that was killed leaves its socket; the next command replaces it.
func TestStaleSocket(t *testing.T) {
	h := &host{t: t, dir: shortDir(t)}
	run := func() {
		t.Helper()
		cmd := h.process("echo", "hello")
		if out, err := cmd.CombinedOutput(); err != nil || string(out) != "hello\n" {
			t.Fatalf("%v: %s", err, out)
		}
	}
	run()
	pid := h.starts()[0]
	fd, err := syscall.Open(fmt.Sprintf("/proc/%d", pid), syscall.O_RDONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer syscall.Close(fd)
	syscall.Kill(pid, syscall.SIGKILL)
	if _, err := os.Lstat(pathsIn(h.dir).ServiceSocket()); err != nil {
		t.Fatalf("no stale socket: %v", err)
	}
	run()
	if pids := h.starts(); len(pids) != 2 {
		t.Errorf("services started: %v", pids)
	}
	h.endServices()
	// A plain file in its place.
	os.Remove(pathsIn(h.dir).ServiceSocket())
	os.WriteFile(pathsIn(h.dir).ServiceSocket(), nil, 0o600)
	run()
	h.endServices()
}

func TestNoService(t *testing.T) {
	dir := shortDir(t)
	l, err := net.Listen("unix", pathsIn(dir).ServiceSocket())
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			io.WriteString(c, "SSH-2.0-hello\r\n")
			c.Close()
		}
	}()
	if err := newClient(dir).Call(api.Call{Verb: api.VerbList}, nil, true); err == nil || !strings.Contains(err.Error(), "no service of wsl2") {
		t.Error(err)
	}
}

// A service of another build makes way if nothing runs, and serves with a word if
// something does.
func TestOtherBuild(t *testing.T) {
	h := &host{t: t, dir: shortDir(t)}
	if out, err := h.process("true").CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	other := newClient(h.dir)
	var notices []string
	other.Notice = func(s string) { notices = append(notices, s) }
	other.Self.Build = "another"
	other.Service = Command{Path: "/proc/self/exe", Args: []string{"service"}, Env: append(os.Environ(), "TEST_HOST="+h.dir),
		OpenLog: pathsIn(h.dir).OpenServiceLog}

	cmd := h.process("wait")
	out, _ := cmd.StdoutPipe()
	start(t, cmd)
	expect(t, out, "waiting\n")
	s := pipes(t, nil)
	if st, err := other.Run(system("true"), s.stdio()); st != 0 || err != nil || len(notices) != 1 {
		t.Errorf("beside a session: %d, %v, %q", st, err, notices)
	}
	other.Self.Protocol++
	if _, err := other.Run(system("true"), s.stdio()); err == nil || !strings.Contains(err.Error(), "--shutdown") {
		t.Errorf("another protocol: %v", err)
	}
	other.Self.Protocol--
	cmd.Process.Signal(syscall.SIGTERM)
	cmd.Wait()
	if n := len(h.starts()); n != 1 {
		t.Fatalf("%d services so far", n)
	}
	// Nothing runs, as soon as the service has seen the session's end: it is
	// replaced (by one that again is not other's build, so that some
	// replacements are the most that other tries).
	for len(h.starts()) < 2 {
		other.Run(system("true"), s.stdio())
	}
	h.endServices()
}

func tarball(t *testing.T, size int) string {
	t.Helper()
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	w.WriteHeader(&tar.Header{Name: "bin/sh", Mode: 0o755, Size: int64(size)})
	io.CopyN(w, &pattern{}, int64(size))
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(t.TempDir(), "a.tar")
	if err := os.WriteFile(path, b.Bytes(), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

func (h *host) doImport(name, dir, path string) error {
	h.t.Helper()
	a, err := archive.Open(path, nil)
	if err != nil {
		return err
	}
	_, err = h.client().Import(api.Call{Name: name, Dir: dir}, a, nil)
	return err
}

// left are the files in the data directory besides the registry.
func (h *host) left() (list []string) {
	filepath.WalkDir(pathsIn(h.dir).Data, func(path string, d os.DirEntry, err error) error {
		if err == nil && !d.IsDir() && d.Name() != "registry.json" {
			list = append(list, path)
		}
		return nil
	})
	return list
}

func TestImport(t *testing.T) {
	var got int64
	h := newHost(t, fakevm.Hooks{Import: func(r io.Reader) error {
		var err error
		got, err = io.Copy(io.Discard, r)
		return err
	}})
	path := tarball(t, 3<<20)
	if err := h.doImport("debian", "", path); err != nil {
		t.Fatal(err)
	}
	if st, _ := os.Stat(path); st.Size() != got {
		t.Errorf("%d of %d bytes arrived", got, st.Size())
	}
	disk := filepath.Join(pathsIn(h.dir).Distros(), "debian", "disk.ext4")
	if l := h.left(); len(l) != 1 || l[0] != disk {
		t.Errorf("files %v", l)
	}
	if n := h.fleet.VMs()[0].Disks(); n != 0 {
		t.Errorf("%d disks attached", n)
	}
	s := pipes(t, nil)
	if st, err := h.client().Run(RunSpec{Argv: []string{"true"}}, s.stdio()); st != 0 || err != nil {
		t.Error(st, err)
	}
	for _, name := range []string{"debian", "DEBIAN", "../x", "system", ""} {
		if err := h.doImport(name, "", path); err == nil {
			t.Errorf("imported %q", name)
		}
	}
	elsewhere := filepath.Join(h.dir, "elsewhere")
	if err := h.doImport("other", elsewhere, path); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(elsewhere + "/disk.ext4"); err != nil {
		t.Error(err)
	}
	if err := h.doImport("third", elsewhere, path); err == nil || !strings.Contains(err.Error(), "disk.ext4") {
		t.Errorf("a disk was overwritten: %v", err)
	}
	for _, name := range []string{"debian", "other"} {
		if err := h.client().Call(api.Call{Verb: api.VerbUnregister, Name: name}, nil, true); err != nil {
			t.Error(err)
		}
	}
	if l := h.left(); len(l) != 0 {
		t.Errorf("after --unregister: %v", l)
	}
	if _, err := os.Stat(elsewhere); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("its directory: %v", err)
	}
}

// Whatever fails, nothing is left and the name is free.
func TestImportFails(t *testing.T) {
	refuse := true
	var mu sync.Mutex
	h := newHost(t, fakevm.Hooks{Import: func(r io.Reader) error {
		mu.Lock()
		defer mu.Unlock()
		if refuse {
			io.ReadFull(r, make([]byte, 1000))
			return errors.New("entry 7: path leaves the root")
		}
		_, err := io.Copy(io.Discard, r)
		return err
	}})
	path := tarball(t, 8<<20)
	check := func(what string, err error, want string) {
		t.Helper()
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v", what, err)
		}
		// The service may still be cleaning up after a client that went away: the
		// name is locked as long.
		var l api.List
		if err := h.client().Call(api.Call{Verb: api.VerbList}, &l, true); err != nil || len(l.Distros) != 0 {
			t.Errorf("%s: %+v, %v", what, l, err)
		}
	}
	check("guest refuses", h.doImport("debian", "", path), "entry 7")
	if l := h.left(); len(l) != 0 {
		t.Errorf("left %v", l)
	}

	// The guest takes it, but the file turns out to be bad behind the tar's end.
	mu.Lock()
	refuse = false
	mu.Unlock()
	bad, err := archive.Open(path, nil)
	if err != nil {
		t.Fatal(err)
	}
	broken := filepath.Join(t.TempDir(), "b.tar.gz")
	gz := gzipped(t, path)
	gz[len(gz)-5] ^= 1 // the length in the trailer
	os.WriteFile(broken, gz, 0o600)
	bad.Close()
	check("bad checksum", h.doImport("debian", "", broken), "damaged")

	// No space, no mke2fs and such are the service's to find: a directory that
	// cannot be made stands for them.
	check("no directory", h.doImport("other", "/dev/null/x", path), "/dev/null")

	// The name is free in the end.
	for {
		err := h.doImport("debian", "", path)
		if err == nil {
			break
		}
		var e *api.Error
		if !errors.As(err, &e) || e.Code != api.CodeBusy {
			t.Fatal(err)
		}
	}
	if n := h.fleet.VMs()[0].Disks(); n != 0 {
		t.Errorf("%d disks attached", n)
	}
}

func gzipped(t *testing.T, path string) []byte {
	t.Helper()
	out, err := exec.Command("gzip", "-1", "-c", path).Output()
	if err != nil {
		t.Fatal(err)
	}
	return out
}

// A client that dies before it sends anything: the guest is not left waiting.
func TestImportClientDies(t *testing.T) {
	h := newHost(t, fakevm.Hooks{})
	request, err := api.AppendCall(nil, api.Self(), &api.Call{Verb: api.VerbImport, Name: "debian"})
	if err != nil {
		t.Fatal(err)
	}
	conn, err := dialUnix(pathsIn(h.dir).ServiceSocket())
	if err != nil {
		t.Fatal(err)
	}
	conn.Write(request)
	kind, _, err := api.Read(conn)
	if err != nil || kind != api.KindReady {
		t.Fatal(kind, err)
	}
	conn.Close()
	h.stop() // waits for the service's handlers
	if l := h.left(); len(l) != 0 {
		t.Errorf("left %v", l)
	}
}

// An archive that comes from a pipe may never end: the client hears of the VM's
// death nevertheless.
func TestImportVMDies(t *testing.T) {
	started := make(chan struct{})
	h := newHost(t, fakevm.Hooks{Import: func(r io.Reader) error {
		io.ReadFull(r, make([]byte, 1000))
		close(started)
		_, err := io.Copy(io.Discard, r)
		return err
	}})
	pr, pw, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer pw.Close()
	text, _ := os.ReadFile(tarball(t, 8000))
	pw.Write(text[:6000])
	a, err := archive.Open("-", pr)
	if err != nil {
		t.Fatal(err)
	}
	result := make(chan error, 1)
	go func() { _, err := h.client().Import(api.Call{Name: "debian"}, a, nil); result <- err }()
	<-started
	h.fleet.VMs()[0].End(&vmproc.ExitError{Reason: "the guest's kernel crashed"})
	if err := <-result; err == nil || !strings.Contains(err.Error(), "crashed") {
		t.Error(err)
	}
	h.stop()
	if l := h.left(); len(l) != 0 {
		t.Errorf("left %v", l)
	}
}

// What a killed service left of an import is removed by the next.
func TestSweep(t *testing.T) {
	dir := shortDir(t)
	p := pathsIn(dir)
	h := &host{t: t, dir: dir, fleet: &fakevm.Fleet{}}
	os.MkdirAll(p.Distros()+"/half", 0o700)
	os.WriteFile(p.Distros()+"/half/disk.ext4.partial", []byte("x"), 0o600)
	note := func(name string) []byte {
		dir := p.Distros() + "/" + name
		text, _ := json.Marshal(map[string]any{"name": name, "make": []string{dir + "/disk.ext4.partial", dir + "/disk.ext4"}, "dirs": []string{dir}})
		return text
	}
	os.WriteFile(p.Distros()+"/.change-half", note("half"), 0o600)
	os.WriteFile(p.Distros()+"/.change-cut", note("cut")[:5], 0o600)
	// A registered one whose note was not removed in time is complete.
	os.MkdirAll(p.Distros()+"/done", 0o700)
	os.WriteFile(p.Distros()+"/done/disk.ext4", []byte("x"), 0o600)
	os.WriteFile(p.Distros()+"/.change-done", note("done"), 0o600)
	r, _ := registry.Open(p.Registry())
	if err := r.Add(registry.Distro{Name: "done", ID: "1", Disk: p.Distros() + "/done/disk.ext4"}); err != nil {
		t.Fatal(err)
	}
	h.serve()
	if l := h.left(); len(l) != 1 || l[0] != p.Distros()+"/done/disk.ext4" {
		t.Errorf("left %v", l)
	}
	if _, err := os.Stat(p.Distros() + "/half"); !errors.Is(err, os.ErrNotExist) {
		t.Error(err)
	}
}

func TestTerminal(t *testing.T) {
	hup := make(chan struct{})
	h := newHost(t, fakevm.Hooks{Programs: map[string]fakevm.Program{"ttyhup": func(s *fakevm.Session, _ []string) (uint8, uint8) {
		s.Write(wire.RolePTY, []byte("here\r\n"))
		<-s.HangUp()
		close(hup)
		return 0, 1
	}}})
	master, tty, err := pty.Open()
	if err != nil {
		t.Fatal(err)
	}
	defer master.Close()
	defer tty.Close()
	pty.Setsize(master, &pty.Winsize{Rows: 40, Cols: 100})
	before := modes(t, tty)
	cmd := h.process("shell")
	cmd.Stdin, cmd.Stdout, cmd.Stderr = tty, tty, tty
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true, Setctty: true}
	start(t, cmd)
	expect(t, master, "$ ")
	if modes(t, tty) == before {
		t.Error("the terminal is not raw")
	}
	io.WriteString(master, "hello\r")
	expect(t, master, "got hello\r\n$ ")
	io.WriteString(master, "exit 7\r")
	if st := exitStatus(cmd.Wait()); st != 7 {
		t.Errorf("status %d", st)
	}
	if after := modes(t, tty); after != before {
		t.Errorf("modes %v, before %v", after, before)
	}

	// Size and resize; SIGTERM restores the terminal.
	cmd = h.process("size")
	cmd.Stdin, cmd.Stdout, cmd.Stderr = tty, tty, tty
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true, Setctty: true}
	start(t, cmd)
	expect(t, master, "100x40\r\n")
	pty.Setsize(master, &pty.Winsize{Rows: 24, Cols: 80})
	expect(t, master, "80x24\r\n")
	cmd.Process.Signal(syscall.SIGTERM)
	if st := exitStatus(cmd.Wait()); st != 128+15 {
		t.Errorf("status %d", st)
	}
	if after := modes(t, tty); after != before {
		t.Errorf("modes after SIGTERM %v, before %v", after, before)
	}

	// Only stdin is the terminal: stdout is carried byte for byte.
	cmd = h.process("echo", "bytes")
	var out bytes.Buffer
	cmd.Stdin, cmd.Stdout = tty, &out
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true, Setctty: true}
	if err := cmd.Run(); err != nil || out.String() != "bytes\n" {
		t.Errorf("%v: %q", err, out.String())
	}

	// The terminal goes away.
	cmd = h.process("ttyhup")
	cmd.Stdin, cmd.Stdout, cmd.Stderr = tty, tty, tty
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true, Setctty: true}
	start(t, cmd)
	expect(t, master, "here\r\n")
	tty.Close()
	master.Close()
	<-hup
	if st := exitStatus(cmd.Wait()); st != 128+1 {
		t.Errorf("status %d", st)
	}
}

// modes of a terminal, to compare.
func modes(t *testing.T, f *os.File) string {
	t.Helper()
	cmd := exec.Command("stty", "-g")
	cmd.Stdin = f
	out, err := cmd.Output()
	if err != nil {
		t.Fatal(err)
	}
	return string(out)
}

func TestStatus(t *testing.T) {
	h := newHost(t, fakevm.Hooks{Accel: "tcg", Reason: "it is broken"})
	c := h.client()
	var notices []string
	c.Notice = func(text string) { notices = append(notices, text) }
	s := pipes(t, nil)
	for range 2 {
		if st, err := c.Run(system("true"), s.stdio()); st != 0 || err != nil {
			t.Fatal(st, err)
		}
	}
	if len(notices) != 1 || notices[0] != "KVM unusable: it is broken; using QEMU TCG (slow); a distro of version 1 needs no VM: wsl2 --set-version NAME 1" {
		t.Errorf("notices %q", notices)
	}
	var st api.Status
	if err := c.Call(api.Call{Verb: api.VerbStatus}, &st, false); err != nil || st.VM == nil || st.VM.Accel != "tcg" || st.VM.KernelRelease != "6.12.0-fake" || st.PID != os.Getpid() {
		t.Errorf("%+v, %v", st, err)
	}
}

func BenchmarkTrue(b *testing.B) {
	dir, _ := os.MkdirTemp("/tmp", "w")
	defer os.RemoveAll(dir)
	fleet := &fakevm.Fleet{}
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: pathsIn(dir).ServiceSocket(), Net: "unix"})
	if err != nil {
		b.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() { newService(dir, fleet).Serve(ctx, l); close(done) }()
	null, _ := os.OpenFile(os.DevNull, os.O_RDWR, 0)
	std := Stdio{In: null, Out: null, Err: null, Getenv: func(string) string { return "" }}
	c := newClient(dir)
	for b.Loop() {
		if st, err := c.Run(system("true"), std); st != 0 || err != nil {
			b.Fatal(st, err)
		}
	}
	cancel()
	<-done
}
