package session

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/wsl2/wsl2/guest/reaper"
	"github.com/wsl2/wsl2/internal/wire"
)

// session is one program and its client.
type session struct {
	srv     *Server
	control conn
	conns   [wire.RolePTY + 1]conn // data connections by role; immutable once running

	process *reaper.Process
	outputs []*output
	// By role, nil where the stream has no connection; for Exited's counts.
	stdout, stderr, pty *output
	master              *os.File // the pty's, or nil; closed by its output
	stdin               *os.File // the program's stdin pipe, or nil; closed by its input

	closeOnce sync.Once
}

// control serves a control connection from its Start to its end.
func (s *Server) control(c conn, id wire.SessionID) {
	a, err := s.claim(id)
	if err != nil {
		s.refuse(c, err)
		return
	}
	defer s.drop(a, id)
	deadline := time.Now().Add(s.cfg.AssemblyTimeout)
	r := bufio.NewReaderSize(c, 512)
	m, err := wire.Read(r)
	if err != nil {
		s.refuse(c, err)
		return
	}
	start, ok := m.(*wire.Start)
	if !ok {
		s.refuse(c, fmt.Errorf("%w: %v instead of Start", wire.ErrMalformed, m.Type()))
		return
	}
	x := &session{srv: s, control: c}
	x.conns, err = s.gather(a, id, roles(start.Streams), deadline)
	if err != nil {
		s.refuse(c, err)
		return
	}
	if !s.register(x) {
		x.closeConns()
		return
	}
	defer s.unregister(x)
	c.SetReadDeadline(time.Time{}) //nolint:errcheck // a dead connection shows at the next read
	x.serve(r, start)
}

// roles lists the connections that a session with these streams consists of.
func roles(streams wire.Streams) []wire.Role {
	list := make([]wire.Role, 0, 4)
	for _, s := range []struct {
		bit  wire.Streams
		role wire.Role
	}{
		{wire.StreamStdin, wire.RoleStdin},
		{wire.StreamStdout, wire.RoleStdout},
		{wire.StreamStderr, wire.RoleStderr},
		{wire.StreamPTY, wire.RolePTY},
	} {
		if streams&s.bit != 0 {
			list = append(list, s.role)
		}
	}
	return list
}

// register makes x known to Wait, which may cut it off; false if the server is closing.
func (s *Server) register(x *session) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closing {
		return false
	}
	s.sessions[x] = struct{}{}
	return true
}

func (s *Server) unregister(x *session) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.sessions, x)
}

// closeConns closes every connection of the session, which wakes up whoever
// reads from them or writes to them.
func (x *session) closeConns() {
	x.closeOnce.Do(func() {
		for _, c := range x.conns {
			if c != nil {
				c.Close()
			}
		}
		x.control.Close()
	})
}

// controlTimeout bounds the sending of a message to a client that does not read.
const controlTimeout = 10 * time.Second

func (x *session) send(m wire.Message) error {
	x.control.SetWriteDeadline(time.Now().Add(controlTimeout)) //nolint:errcheck // Write tells
	return wire.Write(x.control, m)
}

// serve starts the program and stays until its exit has been reported or its
// client is gone.
func (x *session) serve(r io.Reader, m *wire.Start) {
	defer x.closeConns()
	notice, err := x.start(m)
	if err != nil {
		x.send(toFailed(err)) //nolint:errcheck // the client may be gone
		return
	}
	err = x.send(&wire.Started{PID: uint32(x.process.PID), Notice: notice})
	for _, o := range x.outputs {
		go o.run()
	}
	if x.stdin != nil {
		// Wakes an input that waits for room in the pipe; its own Close may be second.
		defer x.stdin.Close()
		go stdin(x.stdin, x.conns[wire.RoleStdin])
	}
	if x.master != nil {
		go input(x.master, x.conns[wire.RolePTY])
	}
	if err != nil {
		x.hangup()
		return
	}
	gone := make(chan struct{})
	go x.requests(r, gone)

	var status syscall.WaitStatus
	select {
	case status = <-x.process.Exited:
	case <-gone:
		x.hangup()
		return
	}
	for _, o := range x.outputs {
		o.finish()
	}
	for _, o := range x.outputs {
		select {
		case <-o.done:
		case <-gone:
			x.hangup()
			return
		}
	}
	x.send(x.exited(status)) //nolint:errcheck // the client may be gone
}

// exited builds the last message of the session. Preconditions: all outputs are done.
func (x *session) exited(status syscall.WaitStatus) *wire.Exited {
	m := &wire.Exited{}
	if status.Signaled() {
		m.Signal = uint8(status.Signal())
	} else {
		m.Status = uint8(status.ExitStatus())
	}
	for _, c := range []struct {
		o *output
		n *uint64
	}{{x.stdout, &m.StdoutBytes}, {x.stderr, &m.StderrBytes}, {x.pty, &m.PTYBytes}} {
		if c.o != nil {
			*c.n = c.o.bytes
		}
	}
	return m
}

// requests serves the client's messages until the control connection ends;
// then it closes gone. A message that makes no sense ends the connection too.
func (x *session) requests(r io.Reader, gone chan<- struct{}) {
	defer close(gone)
	for {
		m, err := wire.Read(r)
		if err != nil {
			if !errors.Is(err, io.EOF) && !errors.Is(err, net.ErrClosed) {
				x.srv.cfg.Logf("session of pid %d: %v", x.process.PID, err)
			}
			return
		}
		switch m := m.(type) {
		case *wire.Resize:
			x.onMaster(func(fd int) { setSize(fd, m.Size) }) //nolint:errcheck // the terminal may be hung up
		case *wire.Signal:
			x.signal(syscall.Signal(m.Number))
		default:
			x.srv.cfg.Logf("session of pid %d: unexpected %v", x.process.PID, m.Type())
			return
		}
	}
}

// onMaster calls f with the pty master's descriptor, if there is one and open.
func (x *session) onMaster(f func(fd int)) {
	if x.master == nil {
		return
	}
	if rc, err := x.master.SyscallConn(); err == nil {
		rc.Control(func(fd uintptr) { f(int(fd)) }) //nolint:errcheck // closed: nobody to tell
	}
}

// signal delivers to the terminal's foreground group, or to the program's group.
func (x *session) signal(sig syscall.Signal) {
	group := 0
	x.onMaster(func(fd int) { group = foreground(fd) })
	if group > 1 {
		syscall.Kill(-group, sig) //nolint:errcheck // the group may just have ended
		return
	}
	x.process.SignalGroup(sig) //nolint:errcheck // the program may just have ended
}

// start opens the streams and forks the program. On an error nothing is left
// open but the connections.
func (x *session) start(m *wire.Start) (notice string, err error) {
	p, err := newProgram(&x.srv.cfg, m)
	if err != nil {
		return "", err
	}
	var theirs, ours closer // the child's ends; and ours, kept if all goes well
	defer theirs.close()
	defer func() {
		if err != nil {
			ours.close()
		}
	}()
	attr := &syscall.ProcAttr{
		Env: p.env,
		Sys: &syscall.SysProcAttr{
			Setsid:     true,
			Credential: &syscall.Credential{Uid: p.user.UID, Gid: p.user.GID, Groups: p.groups()},
		},
	}
	tty := -1
	if m.Streams&wire.StreamPTY != 0 {
		var master *os.File
		if master, tty, err = openPTY(x.srv.cfg.Root, p.user.UID, m.Size); err != nil {
			return "", err
		}
		theirs.add(func() { unix.Close(tty) })
		ours.add(func() { master.Close() })
		x.master = master
		x.pty = newOutput(master, x.conns[wire.RolePTY], false)
		x.outputs = append(x.outputs, x.pty)
	}
	// fallback is the stream without a connection: the terminal or /dev/null.
	fallback := tty
	fds := make([]uintptr, 3, 4)
	for i, s := range []struct {
		bit  wire.Streams
		role wire.Role
		out  **output
	}{
		{wire.StreamStdin, wire.RoleStdin, nil},
		{wire.StreamStdout, wire.RoleStdout, &x.stdout},
		{wire.StreamStderr, wire.RoleStderr, &x.stderr},
	} {
		if m.Streams&s.bit == 0 {
			if fallback < 0 {
				if fallback, err = unix.Open("/dev/null", unix.O_RDWR|unix.O_CLOEXEC, 0); err != nil {
					return "", fmt.Errorf("open /dev/null: %w", err)
				}
				null := fallback
				theirs.add(func() { unix.Close(null) })
			}
			fds[i] = uintptr(fallback)
			continue
		}
		mine, child, err := pipe(s.role != wire.RoleStdin, p.user.UID)
		if err != nil {
			return "", err
		}
		theirs.add(func() { unix.Close(child) })
		ours.add(func() { mine.Close() })
		fds[i] = uintptr(child)
		if s.out == nil {
			x.stdin = mine
			continue
		}
		*s.out = newOutput(mine, x.conns[s.role], true)
		x.outputs = append(x.outputs, *s.out)
	}
	if tty >= 0 {
		attr.Sys.Setctty = true
		attr.Sys.Ctty = -1
		for i, fd := range fds {
			if int(fd) == tty {
				attr.Sys.Ctty = i
			}
		}
		if attr.Sys.Ctty < 0 { // a terminal that carries no stream: only /dev/tty
			attr.Sys.Ctty = len(fds)
			fds = append(fds, uintptr(tty))
		}
	}
	attr.Files = fds
	notice, err = p.exec(func(path string, argv []string, dir string) (err error) {
		attr.Dir = dir
		x.process, err = x.srv.cfg.Reaper.Start(path, argv, attr)
		return err
	})
	return notice, err
}

// pipe returns a pipe: our end on the runtime's poller, the child's blocking as
// programs expect. The user owns it, so that /dev/stdout can be reopened.
func pipe(weRead bool, uid uint32) (mine *os.File, child int, err error) {
	var p [2]int
	if err := unix.Pipe2(p[:], unix.O_CLOEXEC); err != nil {
		return nil, -1, fmt.Errorf("make a pipe: %w", err)
	}
	our, child := p[1], p[0]
	if weRead {
		our, child = p[0], p[1]
	}
	if uid != 0 {
		err = unix.Fchown(child, int(uid), -1)
	}
	if err == nil {
		err = unix.SetNonblock(our, true)
	}
	if err != nil {
		unix.Close(p[0])
		unix.Close(p[1])
		return nil, -1, fmt.Errorf("set up a pipe: %w", err)
	}
	return os.NewFile(uintptr(our), "pipe"), child, nil
}

// closer collects what has to be closed.
type closer struct{ list []func() }

func (c *closer) add(f func()) { c.list = append(c.list, f) }

func (c *closer) close() {
	for _, f := range c.list {
		f()
	}
}
