// Package hostexec runs programs of the host for a distro: the launcher's side of
// wire.HostExec.
//
// The guest's word is a request, never more: Policy says which programs may run,
// their environment is the launcher's own with what Start may add to it, and their
// directory is one that the distro shares, else Dir. A program is a session of its own
// on the host, so that it has no terminal but the one that the guest asked for.
package hostexec

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/creack/pty"
	"golang.org/x/sys/unix"

	"github.com/wsl2/wsl2/internal/hostpath"
	"github.com/wsl2/wsl2/internal/relay"
	"github.com/wsl2/wsl2/internal/wire"
	"github.com/wsl2/wsl2/launcher/config"
	"github.com/wsl2/wsl2/launcher/internal/guestconn"
)

// startTimeout bounds the wait for the guest's Start, which it sends at once.
const startTimeout = 10 * time.Second

// sendTimeout bounds the sending of a message to a guest that does not read.
const sendTimeout = 10 * time.Second

// maxPrograms is how many programs one Runner runs at a time: a guest that asks
// for more gets errors, and the host keeps its processes.
const maxPrograms = 64

// maxRequests is how many requests one Runner serves at a time. One that waits for
// its Start costs a goroutine and a descriptor already: what is beyond is dropped.
const maxRequests = 4 * maxPrograms

// Conn is a connection to the distro's session port.
type Conn interface {
	relay.Conn
	SetReadDeadline(time.Time) error
	SetWriteDeadline(time.Time) error
}

// Policy says which programs of the host a distro may run.
type Policy struct {
	// Off says that none may.
	Off bool
	// Programs are names, or absolute paths; one that is "*" stands for all.
	Programs []string
	// NoAgent says that it may not use the caller's SSH agent.
	NoAgent bool
}

func (p Policy) all() bool { return !p.Off && slices.Contains(p.Programs, "*") }

// allows tells whether name, as the guest gave it, may be run.
func (p Policy) allows(name string) bool {
	return p.all() || !p.Off && slices.Contains(p.Programs, name)
}

// PolicyOf is what wslconfig says.
func PolicyOf(s config.Settings) Policy {
	return Policy{Off: !s.Interop, Programs: s.HostPrograms, NoAgent: !s.SSHAgent}
}

// Dial opens a connection to a distro's session port through the VM's vsock
// socket, for Runner.Dial.
func Dial(vsockPath string, port uint32, role wire.Role, id wire.SessionID) (Conn, error) {
	c, err := guestconn.Dial(vsockPath, port, wire.Hello{Version: wire.Version, Role: role, Session: id}, nil)
	if err != nil {
		return nil, err
	}
	return c, nil
}

// environment is what the guest may add to a program's environment. Where it may
// not run everything, it must not be able to by way of LD_PRELOAD or PATH.
func (p Policy) environment(env []string) []string {
	if p.all() {
		return env
	}
	return slices.DeleteFunc(slices.Clone(env), func(kv string) bool {
		name, _, _ := strings.Cut(kv, "=")
		return name != "TERM" && name != "COLORTERM" && name != "LANG" && name != "LANGUAGE" && !strings.HasPrefix(name, "LC_")
	})
}

// Runner runs the programs that one client, or the service, is asked for. Its
// fields are not changed any more once Run has been called.
type Runner struct {
	// Dial opens a connection to the distro's session port.
	Dial func(role wire.Role, id wire.SessionID) (Conn, error)
	// Policy is asked for anew for each program.
	Policy  func() Policy
	Environ []string
	// Dir is where a program runs whose directory in the guest is not shared.
	Dir    string
	Shares hostpath.Table
	// Logf, if set, is told of each program.
	Logf func(format string, a ...any)

	mu      sync.Mutex
	running int  // programs and connections to the agent; guarded by mu
	asked   int  // requests; guarded by mu
	full    bool // one has been dropped since another one ended, and that logged; guarded by mu
}

// Run serves one HostExec to its end.
func (r *Runner) Run(id wire.SessionID) {
	if !r.begin() {
		return
	}
	defer r.end()
	control, err := r.Dial(wire.RoleHost, id)
	if err != nil {
		return // whoever asked is gone
	}
	defer control.Close()
	control.SetReadDeadline(time.Now().Add(startTimeout))
	m, err := wire.Read(control)
	start, ok := m.(*wire.Start)
	if err != nil || !ok {
		return
	}
	control.SetReadDeadline(time.Time{})
	p := &program{control: control}
	defer p.close()
	if !r.enter() {
		p.send(&wire.Failed{Code: wire.CodeBusy, Text: fmt.Sprintf("%d programs of the host run already; try again when one has ended", maxPrograms)})
		return
	}
	defer r.leave()
	if err := p.connect(r, id, start.Streams); err != nil {
		return
	}
	if err := r.start(p, start); err != nil {
		r.logf("host program %q not run: %v", start.Argv, err)
		p.send(failed(err))
		return
	}
	r.logf("host program %q runs as %d", start.Argv, p.cmd.Process.Pid)
	p.serve()
}

// Agent serves one connection to the SSH agent that listens on path.
func (r *Runner) Agent(id wire.SessionID, path string) {
	if !r.begin() {
		return
	}
	defer r.end()
	guest, err := r.Dial(wire.RoleHost, id)
	if err != nil {
		return
	}
	defer guest.Close()
	if p := r.Policy(); p.Off || p.NoAgent || path == "" || !r.enter() {
		return // ssh(1) goes on without an agent
	}
	defer r.leave()
	agent, err := net.DialUnix("unix", nil, &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		r.logf("no SSH agent: %v", err)
		return
	}
	defer agent.Close()
	go func() {
		io.Copy(agent, guest)
		agent.CloseWrite() // its last answers are still to come
	}()
	io.Copy(guest, agent)
}

func (r *Runner) logf(format string, a ...any) {
	if r.Logf != nil {
		r.Logf(format, a...)
	}
}

// begin counts a request; false if it is dropped.
func (r *Runner) begin() bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.asked == maxRequests {
		if !r.full {
			r.full = true
			r.logf("the distro asks for more than %d programs of the host at a time: what is beyond is dropped", maxRequests)
		}
		return false
	}
	r.asked++
	return true
}

func (r *Runner) end() {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.asked--
	r.full = false
}

func (r *Runner) enter() bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.running == maxPrograms {
		return false
	}
	r.running++
	return true
}

func (r *Runner) leave() {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.running--
}

// refusal is a program that Policy does not allow.
type refusal struct{ name string }

func (e *refusal) Error() string {
	return fmt.Sprintf("%s: not allowed by the host; [interop] hostPrograms in its wslconfig lists what is", e.name)
}

// ownFailure is one of ours: the program has no part in it.
type ownFailure struct{ error }

// lacking are the host's answers to who has too much already.
var lacking = []error{unix.EAGAIN, unix.ENOMEM, unix.EMFILE, unix.ENFILE}

// failed is the one place where an error becomes a code on the wire.
func failed(err error) *wire.Failed {
	f := &wire.Failed{Code: wire.CodeNotExecutable, Text: err.Error()}
	var own *ownFailure
	switch {
	case errors.As(err, &own), slices.ContainsFunc(lacking, func(e error) bool { return errors.Is(err, e) }):
		f.Code = wire.CodeInternal
	case errors.Is(err, exec.ErrNotFound), errors.Is(err, fs.ErrNotExist):
		f.Code = wire.CodeNotFound
	}
	return f
}

// start makes a process of a Start.
func (r *Runner) start(p *program, m *wire.Start) error {
	if len(m.Argv) == 0 || m.Argv[0] == "" {
		return errors.New("no program given")
	}
	name := m.Argv[0]
	policy := r.Policy()
	if !policy.allows(name) {
		return &refusal{name}
	}
	if strings.ContainsRune(name, '/') && !filepath.IsAbs(name) {
		return fmt.Errorf("%s: give a name or an absolute path of the host", name)
	}
	program := name
	if name == "wsl2" { // this one, wherever it is installed
		if self, err := os.Executable(); err == nil {
			program = self
		}
	}
	cmd := exec.Command(program, m.Argv[1:]...)
	cmd.Args[0] = name
	if cmd.Err != nil {
		return fmt.Errorf("%s: not found on the host: %w", name, cmd.Err)
	}
	// Later entries win.
	cmd.Env = append(slices.Clone(r.Environ), policy.environment(m.Env)...)
	cmd.Dir = "/"
	dirs := []string{r.Dir}
	if dir, ok := r.Shares.ToHost(m.Cwd); ok {
		dirs = []string{dir, r.Dir}
	}
	// A directory that cannot be entered would look like a program that is not there.
	if i := slices.IndexFunc(dirs, func(dir string) bool { return unix.Access(dir+"/.", unix.X_OK) == nil }); i >= 0 {
		cmd.Dir = dirs[i]
	}
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	var theirs []*os.File
	defer func() {
		for _, f := range theirs {
			f.Close()
		}
	}()
	var tty *os.File
	if m.Streams&wire.StreamPTY != 0 {
		var err error
		if p.master, tty, err = pty.Open(); err != nil {
			return &ownFailure{fmt.Errorf("make a terminal: %w", err)}
		}
		theirs = append(theirs, tty)
		p.size(m.Size)
		p.output(wire.RolePTY, p.master, false)
	}
	files := make([]*os.File, 3)
	for i, s := range []struct {
		bit  wire.Streams
		role wire.Role
	}{{wire.StreamStdin, wire.RoleStdin}, {wire.StreamStdout, wire.RoleStdout}, {wire.StreamStderr, wire.RoleStderr}} {
		if m.Streams&s.bit == 0 {
			files[i] = tty // or nil, which is /dev/null
			continue
		}
		mine, fd, err := relay.Pipe(s.role != wire.RoleStdin, 0)
		if err != nil {
			return &ownFailure{err}
		}
		files[i] = os.NewFile(uintptr(fd), "pipe")
		theirs = append(theirs, files[i])
		if s.role == wire.RoleStdin {
			p.stdin = mine
		} else {
			p.output(s.role, mine, true)
		}
	}
	// Not a nil *os.File: that would be an io.Reader that is not nil.
	if files[0] != nil {
		cmd.Stdin = files[0]
	}
	if files[1] != nil {
		cmd.Stdout = files[1]
	}
	if files[2] != nil {
		cmd.Stderr = files[2]
	}
	if tty != nil {
		cmd.SysProcAttr.Setctty = true
		cmd.SysProcAttr.Ctty = slices.Index(files, tty)
		if cmd.SysProcAttr.Ctty < 0 {
			cmd.ExtraFiles = []*os.File{tty}
			cmd.SysProcAttr.Ctty = 3
		}
	}
	if err := cmd.Start(); err != nil {
		return err
	}
	p.cmd = cmd
	return nil
}

// program is one running program and its connections. Its goroutines end when
// those are closed.
type program struct {
	control Conn
	conns   [wire.RolePTY + 1]Conn
	cmd     *exec.Cmd
	stdin   *os.File // nil where it has no connection
	master  *os.File // the pty's; nil without one
	outputs [wire.RolePTY + 1]*relay.Output

	mu     sync.Mutex
	reaped bool // its pid may be another's; guarded by mu
}

func (p *program) connect(r *Runner, id wire.SessionID, streams wire.Streams) (err error) {
	for _, role := range streams.Roles() {
		if p.conns[role], err = r.Dial(role, id); err != nil {
			return err
		}
	}
	return nil
}

// output prepares the relay of a stream.
func (p *program) output(role wire.Role, src *os.File, discards bool) {
	p.outputs[role] = relay.NewOutput(src, p.conns[role], discards)
}

// close ends what a program that did not start, or has ended, leaves.
func (p *program) close() {
	for _, c := range p.conns {
		if c != nil {
			c.Close()
		}
	}
	if p.cmd == nil {
		for _, f := range []*os.File{p.stdin, p.master} {
			if f != nil {
				f.Close()
			}
		}
	}
}

func (p *program) send(m wire.Message) error {
	return wire.Write(wire.Within(p.control, sendTimeout), m)
}

func (p *program) size(s wire.WindowSize) {
	pty.Setsize(p.master, &pty.Winsize{Rows: s.Rows, Cols: s.Cols})
}

// serve relays until the program has ended or whoever asked for it is gone.
func (p *program) serve() {
	started := p.send(&wire.Started{PID: uint32(p.cmd.Process.Pid)})
	for _, o := range p.outputs {
		if o != nil {
			go o.Run()
		}
	}
	if p.stdin != nil {
		defer p.stdin.Close() // wakes an input that waits for room in the pipe
		go relay.Stdin(p.stdin, p.conns[wire.RoleStdin])
	}
	if p.master != nil {
		go relay.Input(p.master, p.conns[wire.RolePTY])
	}
	gone, ended := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(ended)
		p.reap()
	}()
	if started != nil {
		close(gone)
	} else {
		go p.requests(gone, ended)
	}
	select {
	case <-ended:
	case <-gone:
		p.hangup() // it may ignore that, as under nohup(1); the goroutine above reaps it
		return
	}
	for _, o := range p.outputs {
		if o != nil {
			o.Finish()
		}
	}
	for _, o := range p.outputs {
		if o == nil {
			continue
		}
		select {
		case <-o.Done:
		case <-gone:
			return
		}
	}
	p.send(p.exited())
	// The guest closes when it has read it all; ours would cut off what is on its way.
	<-gone
}

// exited builds the last message. Preconditions: all outputs are done.
func (p *program) exited() *wire.Exited {
	m := &wire.Exited{}
	if ws := p.cmd.ProcessState.Sys().(syscall.WaitStatus); ws.Signaled() {
		m.Signal = uint8(ws.Signal())
	} else {
		m.Status = uint8(ws.ExitStatus())
	}
	for role, n := range map[wire.Role]*uint64{wire.RoleStdout: &m.StdoutBytes, wire.RoleStderr: &m.StderrBytes, wire.RolePTY: &m.PTYBytes} {
		if o := p.outputs[role]; o != nil {
			*n = o.Bytes
		}
	}
	return m
}

// requests serves the guest until the control connection ends or says what makes
// no sense; then it closes gone.
func (p *program) requests(gone chan<- struct{}, ended <-chan struct{}) {
	defer close(gone)
	for {
		m, err := wire.Read(p.control)
		if err != nil {
			return
		}
		select {
		case <-ended: // and its terminal with it
			continue
		default:
		}
		switch m := m.(type) {
		case *wire.Resize:
			if p.master != nil {
				p.size(m.Size)
			}
		case *wire.Signal:
			p.signal(syscall.Signal(m.Number))
		default:
			return
		}
	}
}

// reap waits for the program's end. It is reaped while nobody sends it a signal.
func (p *program) reap() {
	for unix.Waitid(unix.P_PID, p.cmd.Process.Pid, nil, unix.WEXITED|unix.WNOWAIT, nil) == unix.EINTR {
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	p.cmd.Wait()
	p.reaped = true
}

// kill sends a signal to a process group while the program's pid is its own.
func (p *program) kill(group int, sig syscall.Signal) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if !p.reaped {
		unix.Kill(-group, sig)
	}
}

// signal delivers to the terminal's foreground group, or to the program's.
func (p *program) signal(sig syscall.Signal) {
	group := p.cmd.Process.Pid
	if p.master != nil {
		if rc, err := p.master.SyscallConn(); err == nil {
			rc.Control(func(fd uintptr) {
				if g, err := unix.IoctlGetInt(int(fd), unix.TIOCGPGRP); err == nil && g > 1 {
					group = g
				}
			})
		}
	}
	p.kill(group, sig)
}

// hangup is the end of the line, as for a program whose terminal is closed.
func (p *program) hangup() {
	for _, o := range p.outputs {
		if o != nil {
			o.Finish()
		}
	}
	for _, sig := range []syscall.Signal{unix.SIGHUP, unix.SIGCONT} {
		p.kill(p.cmd.Process.Pid, sig)
	}
	p.close()
}
