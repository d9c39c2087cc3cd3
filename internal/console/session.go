// Package console carries a program of the other side of the VM's wall in the
// caller's own streams: as if it ran here.
//
// A terminal among the streams becomes raw, and everything that is typed goes to
// a pty of the program; streams that are no terminal have a connection each, byte
// for byte. Signals are handed on, and so are the terminal's size and the exit status. The
// launcher's client runs programs of a distro with it, and the guest's host-exec
// runs programs of the host.
package console

import (
	"errors"
	"fmt"
	"io"
	"os"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/wsl2/wsl2/internal/wire"
)

// Stdio are the caller's standard streams.
type Stdio struct{ In, Out, Err *os.File }

// Exit statuses of a launcher itself, those of env(1).
const (
	StatusFailed        = 125
	StatusNotExecutable = 126
	StatusNotFound      = 127
	statusSignal        = 128
)

// answerWait is the default of Session.AnswerWait: many times what an emulated and
// overloaded guest takes.
const answerWait = time.Minute

// sendWait bounds the sending of a message to a peer that does not read.
const sendWait = 10 * time.Second

// Conn is one of a session's connections.
type Conn interface {
	io.ReadWriteCloser
	CloseWrite() error
	SetReadDeadline(time.Time) error
	SetWriteDeadline(time.Time) error
}

// Peer is the side on which the program runs.
type Peer interface {
	// Open opens the connection for role. For the first one, the control
	// connection, it also sends start.
	Open(role wire.Role, start *wire.Start) (Conn, error)
	// Notice tells the user something that is no error.
	Notice(text string)
	// Message takes a message on the control connection that is none of a
	// session's; false if it makes no sense.
	Message(m wire.Message) bool
	// Failed is what the user is told of a program that could not be started.
	Failed(f *wire.Failed) error
	// Silent is what the user is told of a peer that has not answered for wait.
	Silent(wait time.Duration) error
	// Broken explains a session that broke off with err.
	Broken(err error) error
	// Gone tells, without waiting, whether the peer has ended: then a signal that
	// ended the program was the peer's end, and none of its own.
	Gone() bool
}

// Session is one run of one program.
type Session struct {
	Peer Peer
	Stdio
	// AnswerWait bounds the wait for the program's start, which is the only sign of
	// a peer that hangs; 0 is a minute. A program may run for ever.
	AnswerWait time.Duration
	// Aside says that the program is none of the user's: signals are not for it, and end
	// the caller as they would end any process.
	Aside bool

	streams wire.Streams

	control Conn
	writeMu sync.Mutex // serialises frames on control; guards control while it is opened

	tty     *terminal // nil if none of the streams is one
	outputs []*output
	pty     Conn // nil without a terminal
	stdin   Conn // nil unless stdin has a connection of its own

	hangup chan int // a status to end with at once
}

// Run runs the program of start, whose Streams and Size it fills in, and returns
// its exit status. environ, if not nil, is added to start's with the knowledge
// whether there is a terminal. The error, if any, is for the user, and the status is
// then the launcher's own. A Session runs once.
func (s *Session) Run(start wire.Start, environ func(terminal bool) []string) (int, error) {
	defer s.close()
	s.hangup = make(chan int, 1)
	s.streams = s.classify()
	start.Streams = s.streams
	if environ != nil {
		start.Env = append(start.Env, environ(s.tty != nil)...)
	}

	if s.tty != nil {
		start.Size = s.tty.size()
		// First the signals: one that ended us in between would leave the terminal raw.
		defer s.watchSignals()()
		defer s.tty.restore()
		s.tty.raw()
	}
	if err := s.connect(&start); err != nil {
		return StatusFailed, s.Peer.Broken(err)
	}
	if s.tty == nil && !s.Aside {
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
func (s *Session) restoring(f func()) {
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
func (s *Session) classify() (streams wire.Streams) {
	files := [...]struct {
		f   *os.File
		bit wire.Streams
	}{{s.In, wire.StreamStdin}, {s.Out, wire.StreamStdout}, {s.Err, wire.StreamStderr}}
	var kinds [3]fileKind
	for i, x := range files {
		kinds[i] = kindOf(x.f)
	}
	s.tty = newTerminal(s.Stdio, kinds)
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
func (s *Session) connect(start *wire.Start) (err error) {
	control, err := s.Peer.Open(wire.RoleControl, start)
	if err != nil {
		return err
	}
	s.writeMu.Lock()
	s.control = control
	s.writeMu.Unlock()
	for _, role := range s.streams.Roles() {
		g, err := s.Peer.Open(role, nil)
		if err != nil {
			return err
		}
		switch role {
		case wire.RoleStdin:
			s.stdin = g
		case wire.RoleStdout:
			s.outputs = append(s.outputs, newOutput(g, s.Out, "stdout", role))
		case wire.RoleStderr:
			s.outputs = append(s.outputs, newOutput(g, s.Err, "stderr", role))
		case wire.RolePTY:
			s.pty = g
			s.outputs = append(s.outputs, newOutput(g, s.tty, "the terminal", role))
		}
	}
	return nil
}

// startCopies starts the streams' goroutines. They end with their connections,
// those that read the caller's streams with the process.
func (s *Session) startCopies() {
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
func (s *Session) copyStdin() {
	buf := make([]byte, firstBuffer)
	for {
		n, err := s.In.Read(buf)
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
func (s *Session) copyTerminal() {
	buf := make([]byte, 4096)
	for {
		if !s.tty.await() {
			return
		}
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
func (s *Session) end(status int) {
	select {
	case s.hangup <- status:
	default:
	}
}

// follow reads the control connection to the session's end.
func (s *Session) follow() (int, error) {
	wait := s.AnswerWait
	if wait == 0 {
		wait = answerWait
	}
	s.control.SetReadDeadline(time.Now().Add(wait))
	for {
		m, err := wire.Read(s.control)
		if errors.Is(err, os.ErrDeadlineExceeded) {
			return StatusFailed, s.Peer.Silent(wait)
		}
		if err != nil {
			return StatusFailed, s.Peer.Broken(err)
		}
		switch m := m.(type) {
		case *wire.Started:
			s.control.SetReadDeadline(time.Time{})
			if m.Notice != "" {
				s.Peer.Notice(m.Notice)
			}
		case *wire.Failed:
			return failedStatus(m.Code), s.Peer.Failed(m)
		case *wire.Exited:
			return s.exited(m)
		default:
			if !s.Peer.Message(m) {
				return StatusFailed, fmt.Errorf("unexpected message %v from the other side", m.Type())
			}
		}
	}
}

// failedStatus maps why a program did not start to an exit status.
func failedStatus(c wire.Code) int {
	switch c {
	case wire.CodeNotFound:
		return StatusNotFound
	case wire.CodeNotExecutable:
		return StatusNotExecutable
	}
	return StatusFailed
}

// exited waits until all output has been written and returns the status.
func (s *Session) exited(m *wire.Exited) (int, error) {
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
	if m.Signal != 0 && s.Peer.Gone() {
		return StatusFailed, s.Peer.Broken(io.EOF)
	}
	if m.Signal != 0 {
		return statusSignal + int(m.Signal), nil
	}
	return int(m.Status), nil
}

func (s *Session) close() {
	for _, g := range []Conn{s.control, s.stdin} {
		if g != nil {
			g.Close()
		}
	}
	for _, o := range s.outputs {
		o.conn.Close()
	}
}

// send sends a message, or ends the session of a peer that does not take it. A
// connection that is lost otherwise is follow's to report: Exited may have come on it.
func (s *Session) send(m wire.Message) {
	s.writeMu.Lock()
	defer s.writeMu.Unlock()
	if s.control == nil {
		return
	}
	if err := wire.Write(wire.Within(s.control, sendWait), m); errors.Is(err, os.ErrDeadlineExceeded) {
		s.control.Close() // half a frame may be on its way
	}
}

// Buffers of the streams: small for the many commands that say little.
const (
	firstBuffer = 16 << 10
	bigBuffer   = 256 << 10
)

// output carries one of the guest's streams to one of ours.
type output struct {
	conn Conn
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

func newOutput(g Conn, to io.Writer, name string, role wire.Role) *output {
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
		o.err = fmt.Errorf("write to %s: %w", o.name, err)
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
