package client

import (
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/wsl2/wsl2/internal/wire"
	"github.com/wsl2/wsl2/launcher/api"
)

// RunSpec is one command in a distro.
type RunSpec struct {
	Open api.Open
	User string // "" = the distro's default user
	Cwd  string // "" or "~" = home, else absolute in the distro
	// HostCwd says that Cwd is a path on the host, relative to the caller's directory.
	HostCwd bool
	Shell   wire.Shell
	Argv    []string
}

// Stdio are the caller's standard streams and environment.
type Stdio struct {
	In, Out, Err *os.File
	Getenv       func(string) string
	Environ      []string
}

// Exit statuses of the launcher itself, those of env(1).
const (
	StatusFailed        = 125
	StatusNotExecutable = 126
	StatusNotFound      = 127
	statusSignal        = 128
)

// endedWait bounds the wait for the service's word on why a session broke off.
const endedWait = 10 * time.Second

// answerWait is the default of Client.AnswerWait: many times what an emulated and
// overloaded guest takes.
const answerWait = time.Minute

// session is one running session.
type session struct {
	c       *Client
	io      Stdio
	lease   *net.UnixConn
	opened  api.Opened
	id      wire.SessionID
	streams wire.Streams

	control *guestConn
	writeMu sync.Mutex // serialises frames on control; guards control while it is dialled

	tty     *terminal // nil if none of the streams is one
	outputs []*output
	pty     *guestConn // nil without a terminal
	stdin   *guestConn // nil unless stdin has a connection of its own

	hangup chan int // a status to end with at once
}

// Run runs one command and returns its exit status. The error, if any, is for
// the user, and the status is then the launcher's own.
func (c *Client) Run(spec RunSpec, std Stdio) (status int, err error) {
	lease, opened, err := c.open(&spec.Open)
	if err != nil {
		return StatusFailed, err
	}
	defer lease.Close()
	s := &session{c: c, io: std, lease: lease, opened: opened, hangup: make(chan int, 1)}
	defer s.close()
	return s.run(spec)
}

func (s *session) run(spec RunSpec) (int, error) {
	start := wire.Start{Shell: spec.Shell, Argv: spec.Argv, User: spec.User, Cwd: spec.Cwd}
	if start.User == "" {
		start.User = s.opened.DefaultUser
	}
	if spec.HostCwd {
		var err error
		if start.Cwd, err = guestDir(spec.Cwd, nil); err != nil { // nothing is shared with a distro yet
			return StatusFailed, err
		}
	}
	s.streams = s.classify()
	start.Streams = s.streams
	start.Env = guestEnv(s.io, s.tty != nil, nil) // nothing is shared with a distro yet
	rand.Read(s.id[:])

	if s.tty != nil {
		start.Size = s.tty.size()
		// First the signals: one that ended us in between would leave the terminal raw.
		defer s.watchSignals()()
		defer s.tty.restore()
		s.tty.raw()
	}
	if err := s.connect(&start); err != nil {
		return StatusFailed, s.broken(err)
	}
	if s.tty == nil {
		// Catching a signal takes the runtime two changes of threads: the guest is
		// at work meanwhile. One that ends us before ends the session.
		defer s.watchSignals()()
	}
	s.startCopies()
	ended := make(chan result, 1)
	go s.restoring(func() {
		st, err := s.follow()
		ended <- result{st, err}
	})
	select {
	case r := <-ended:
		return r.status, r.err
	case st := <-s.hangup:
		return st, nil
	}
}

// restoring runs f on a goroutine of its own. Should it panic, the terminal is
// put back first: Run's own defers do not run then.
func (s *session) restoring(f func()) {
	if s.tty != nil {
		defer func() {
			if v := recover(); v != nil {
				s.tty.restore()
				panic(v)
			}
		}()
	}
	f()
}

type result struct {
	status int
	err    error
}

// classify decides how each standard stream travels: terminals share one pty,
// each other stream has a connection of its own, byte for byte. Without a
// terminal /dev/null needs none: it is what the guest takes for a stream that is
// not carried.
func (s *session) classify() (streams wire.Streams) {
	files := [...]struct {
		f   *os.File
		bit wire.Streams
	}{{s.io.In, wire.StreamStdin}, {s.io.Out, wire.StreamStdout}, {s.io.Err, wire.StreamStderr}}
	var kinds [3]fileKind
	for i, x := range files {
		kinds[i] = kindOf(x.f)
	}
	s.tty = newTerminal(s.io, kinds)
	for i, x := range files {
		if kinds[i] == kindOther || kinds[i] == kindPipe || kinds[i] == kindNull && s.tty != nil {
			streams |= x.bit
		}
	}
	if s.tty != nil {
		streams |= wire.StreamPTY
	}
	return streams
}

// connect opens the session's connections. Nothing is waited for: CONNECT line,
// Hello and Start travel at once.
func (s *session) connect(start *wire.Start) (err error) {
	control, err := s.dial(wire.RoleControl, start)
	if err != nil {
		return err
	}
	s.writeMu.Lock()
	s.control = control
	s.writeMu.Unlock()
	for _, x := range []struct {
		bit  wire.Streams
		role wire.Role
	}{{wire.StreamStdin, wire.RoleStdin}, {wire.StreamStdout, wire.RoleStdout}, {wire.StreamStderr, wire.RoleStderr}, {wire.StreamPTY, wire.RolePTY}} {
		if s.streams&x.bit == 0 {
			continue
		}
		g, err := s.dial(x.role, nil)
		if err != nil {
			return err
		}
		switch x.role {
		case wire.RoleStdin:
			s.stdin = g
		case wire.RoleStdout:
			s.outputs = append(s.outputs, newOutput(g, s.io.Out, "stdout", x.role))
		case wire.RoleStderr:
			s.outputs = append(s.outputs, newOutput(g, s.io.Err, "stderr", x.role))
		case wire.RolePTY:
			s.pty = g
			s.outputs = append(s.outputs, newOutput(g, s.tty, "the terminal", x.role))
		}
	}
	return nil
}

// dial opens one connection to the distro's session port.
func (s *session) dial(role wire.Role, start *wire.Start) (*guestConn, error) {
	return dialGuest(s.opened.VsockPath, s.opened.Port, wire.Hello{Version: wire.Version, Role: role, Session: s.id}, start)
}

// startCopies starts the streams' goroutines. They end with their connections,
// those that read the caller's streams with the process.
func (s *session) startCopies() {
	for _, o := range s.outputs {
		go s.restoring(o.copy)
	}
	if s.stdin != nil {
		go s.restoring(s.copyStdin)
	}
	if s.tty != nil && s.tty.in != nil {
		go s.restoring(s.copyTerminal)
	}
}

// copyStdin carries stdin to the guest and its end as a half-close.
func (s *session) copyStdin() {
	buf := make([]byte, firstBuffer)
	for {
		n, err := s.io.In.Read(buf)
		if n > 0 {
			if _, werr := s.stdin.Write(buf[:n]); werr != nil {
				return // the program has closed its stdin or ended
			}
			if n == len(buf) && n < bigBuffer {
				buf = make([]byte, bigBuffer)
			}
		}
		if err != nil {
			// A read error is an end as well: there is no way to hand it on.
			s.stdin.CloseWrite()
			return
		}
	}
}

// copyTerminal carries what is typed. A terminal that is gone is a hang-up.
func (s *session) copyTerminal() {
	buf := make([]byte, 4096)
	for {
		s.tty.awaitForeground()
		n, err := s.tty.in.Read(buf)
		if n > 0 {
			if _, werr := s.pty.Write(buf[:n]); werr != nil {
				return
			}
		}
		if err != nil {
			s.end(statusSignal + int(unix.SIGHUP))
			return
		}
	}
}

// end ends the session at once with a status; the guest hangs it up.
func (s *session) end(status int) {
	select {
	case s.hangup <- status:
	default:
	}
}

// follow reads the control connection to the session's end.
func (s *session) follow() (int, error) {
	wait := s.c.AnswerWait
	if wait == 0 {
		wait = answerWait
	}
	s.control.SetReadDeadline(time.Now().Add(wait))
	for {
		m, err := wire.Read(s.control)
		if errors.Is(err, os.ErrDeadlineExceeded) {
			return StatusFailed, api.Errorf(api.CodeFailed, "`wsl2 --shutdown --force` ends the VM; the next command starts it anew",
				"the guest has not answered for %v: its kernel may hang", wait)
		}
		if err != nil {
			return StatusFailed, s.broken(err)
		}
		switch m := m.(type) {
		case *wire.Started:
			s.control.SetReadDeadline(time.Time{})
			if m.Notice != "" {
				s.c.Notice(m.Notice)
			}
		case *wire.Failed:
			return failedStatus(m)
		case *wire.Exited:
			return s.exited(m)
		default:
			return StatusFailed, fmt.Errorf("unexpected message %v from the guest", m.Type())
		}
	}
}

// failedStatus maps why a program did not start to an exit status.
func failedStatus(f *wire.Failed) (int, error) {
	err := errors.New(f.Text)
	switch f.Code {
	case wire.CodeNotFound:
		return StatusNotFound, err
	case wire.CodeNotExecutable:
		return StatusNotExecutable, err
	case wire.CodeUnknownUser:
		err = api.Errorf(api.CodeFailed, "`wsl2 -u root -- getent passwd` lists the users", "%s", f.Text)
	}
	return StatusFailed, err
}

// exited waits until all output has been written and returns the status.
func (s *session) exited(m *wire.Exited) (int, error) {
	var lost error
	for _, o := range s.outputs {
		want := m.StdoutBytes
		switch o.role {
		case wire.RoleStderr:
			want = m.StderrBytes
		case wire.RolePTY:
			want = m.PTYBytes
		}
		if got, err := o.await(want); err != nil {
			lost = err
		} else if got < want {
			lost = fmt.Errorf("%d of %d bytes of %s were lost on the way", want-got, want, o.name)
		}
	}
	if lost != nil {
		return StatusFailed, lost
	}
	if m.Signal != 0 && s.leaseOver() {
		// The signal was the guest's, which had lost its service.
		return StatusFailed, s.broken(io.EOF)
	}
	if m.Signal != 0 {
		return statusSignal + int(m.Signal), nil
	}
	return int(m.Status), nil
}

// leaseOver tells, without waiting, whether the service has something to say, or
// is gone.
func (s *session) leaseOver() (over bool) {
	raw, err := s.lease.SyscallConn()
	if err != nil {
		return true
	}
	raw.Control(func(fd uintptr) {
		var b [1]byte
		_, _, err := unix.Recvfrom(int(fd), b[:], unix.MSG_PEEK|unix.MSG_DONTWAIT)
		over = err != unix.EAGAIN
	})
	return over
}

// broken explains a session that broke off: the service knows whether the VM or
// the distro is gone.
func (s *session) broken(err error) error {
	s.lease.SetReadDeadline(time.Now().Add(endedWait))
	kind, body, rerr := api.Read(s.lease)
	switch {
	case rerr == nil && kind == api.KindEnded:
		return api.DecodeError(body)
	case rerr == nil:
		return fmt.Errorf("unexpected word %d of the service", kind)
	case errors.Is(rerr, os.ErrDeadlineExceeded):
		if err == io.EOF {
			err = errors.New("it closed the connection")
		}
		return api.Errorf(api.CodeFailed, "run the command again; `wsl2 --terminate "+s.opened.Distro+"` restarts the distro", "the session with the guest broke off: %v", err)
	}
	return api.Errorf(api.CodeFailed, "run the command again to start it anew", "the service of wsl2 has ended, and with it the VM (its log is %s)", s.c.Paths.ServiceLog())
}

func (s *session) close() {
	for _, g := range []*guestConn{s.control, s.stdin} {
		if g != nil {
			g.Close()
		}
	}
	for _, o := range s.outputs {
		o.conn.Close()
	}
}

func (s *session) send(m wire.Message) {
	s.writeMu.Lock()
	defer s.writeMu.Unlock()
	if s.control != nil {
		wire.Write(s.control, m) // a lost connection is follow's to report
	}
}

// Buffers of the streams: small for the many commands that say little.
const (
	firstBuffer = 16 << 10
	bigBuffer   = 256 << 10
)

// output carries one of the guest's streams to one of ours.
type output struct {
	conn *guestConn
	to   io.Writer
	name string
	role wire.Role

	mu     sync.Mutex
	moved  sync.Cond
	n      uint64 // bytes that came; guarded by mu
	done   bool   // no more will come; guarded by mu
	closed bool   // our stream takes no more (EPIPE); guarded by mu
	err    error  // our stream failed otherwise; guarded by mu
}

func newOutput(g *guestConn, to io.Writer, name string, role wire.Role) *output {
	o := &output{conn: g, to: to, name: name, role: role}
	o.moved.L = &o.mu
	return o
}

func (o *output) copy() {
	buf := make([]byte, firstBuffer)
	for {
		n, err := o.conn.Read(buf)
		if n > 0 {
			if _, werr := o.to.Write(buf[:n]); werr != nil {
				o.fail(werr)
				return
			}
			o.add(uint64(n))
			if n == len(buf) && n < bigBuffer {
				buf = make([]byte, bigBuffer)
			}
		}
		if err != nil {
			o.mu.Lock()
			o.done = true
			o.moved.Broadcast()
			o.mu.Unlock()
			return
		}
	}
}

func (o *output) add(n uint64) {
	o.mu.Lock()
	o.n += n
	o.moved.Signal()
	o.mu.Unlock()
}

// fail closes the guest's end, so that the program there meets what a local one
// would: SIGPIPE, or EPIPE if it ignores that.
func (o *output) fail(err error) {
	o.conn.Close()
	o.mu.Lock()
	defer o.mu.Unlock()
	o.done, o.closed = true, true
	if !errors.Is(err, syscall.EPIPE) && !errors.Is(err, syscall.EIO) { // EIO: a terminal that is gone
		o.err = fmt.Errorf("write to %s: %w", o.name, errors.Unwrap(err))
	}
	o.moved.Broadcast()
}

// await waits for want bytes to be written, or for the stream's end. A stream
// that our reader closed has all that it wants.
func (o *output) await(want uint64) (uint64, error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	for o.n < want && !o.done {
		o.moved.Wait()
	}
	if o.closed {
		return want, o.err
	}
	return o.n, nil
}
