package session

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/wsl2/wsl2/guest/reaper"
	"github.com/wsl2/wsl2/internal/relay"
	"github.com/wsl2/wsl2/internal/wire"
)

// session is one program and its client.
type session struct {
	srv     *Server
	control conn
	sendMu  sync.Mutex             // serialises frames on control
	conns   [wire.RolePTY + 1]conn // data connections by role; immutable once running

	uid     uint32 // the program's user; set by start
	process *reaper.Process
	outputs []*relay.Output
	// By role, nil where the stream has no connection; for Exited's counts.
	stdout, stderr, pty *relay.Output
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
	x.conns, err = s.gather(a, id, start.Streams.Roles(), deadline)
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
	x.sendMu.Lock()
	defer x.sendMu.Unlock()
	return wire.Write(wire.Within(x.control, controlTimeout), m)
}

// serve starts the program and stays until its exit has been reported or its
// client is gone.
func (x *session) serve(r io.Reader, m *wire.Start) {
	defer x.closeConns()
	var socket *askSocket
	var err error
	begun := func() {}
	if i := x.srv.interop; i != nil {
		if socket, err = i.take(); err != nil {
			x.srv.cfg.Logf("no programs of the host: %v", err)
		} else {
			defer i.release(socket, x)
			socket.starting.Lock()
			begun = sync.OnceFunc(socket.starting.Unlock)
			defer begun()
			env := []string{"WSL_INTEROP=" + socket.path, "BROWSER=" + Browser}
			if m.Agent {
				env = append(env, "SSH_AUTH_SOCK="+socket.path)
			}
			m.Env = append(env, m.Env...) // what the client says wins
		}
	}
	notice, err := x.start(m)
	if socket != nil { // only now is it known whose session it is
		socket.owner.Store(x)
	}
	if err != nil {
		begun()
		x.send(toFailed(err)) //nolint:errcheck // the client may be gone
		return
	}
	err = x.send(&wire.Started{PID: uint32(x.process.PID), Notice: notice})
	begun()
	for _, o := range x.outputs {
		go o.Run()
	}
	if x.stdin != nil {
		// Wakes an input that waits for room in the pipe; its own Close may be second.
		defer x.stdin.Close()
		go relay.Stdin(x.stdin, x.conns[wire.RoleStdin])
	}
	if x.master != nil {
		go relay.Input(x.master, x.conns[wire.RolePTY])
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
		o.Finish()
	}
	for _, o := range x.outputs {
		select {
		case <-o.Done:
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
		o *relay.Output
		n *uint64
	}{{x.stdout, &m.StdoutBytes}, {x.stderr, &m.StderrBytes}, {x.pty, &m.PTYBytes}} {
		if c.o != nil {
			*c.n = c.o.Bytes
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
	x.uid = p.user.UID
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
		x.pty = relay.NewOutput(master, x.conns[wire.RolePTY], false)
		x.outputs = append(x.outputs, x.pty)
	}
	fds, err := x.streams(m.Streams, tty, p.user.UID, &theirs, &ours)
	if err != nil {
		return "", err
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
	if notice != "" {
		p.notices = append(p.notices, notice)
	}
	return strings.Join(p.notices, "\n"), err
}

// streams opens the program's standard streams: a pipe for each that is wanted on a connection
// of its own, and for the others tty or, if that is -1, /dev/null.
func (x *session) streams(wanted wire.Streams, tty int, uid uint32, theirs, ours *closer) (fds []uintptr, err error) {
	fallback := tty
	fds = make([]uintptr, 3, 4) // one more for a terminal that carries none of them
	for i, s := range []struct {
		bit  wire.Streams
		role wire.Role
		out  **relay.Output
	}{
		{wire.StreamStdin, wire.RoleStdin, nil},
		{wire.StreamStdout, wire.RoleStdout, &x.stdout},
		{wire.StreamStderr, wire.RoleStderr, &x.stderr},
	} {
		if wanted&s.bit == 0 {
			if fallback < 0 {
				if fallback, err = unix.Open("/dev/null", unix.O_RDWR|unix.O_CLOEXEC, 0); err != nil {
					return nil, fmt.Errorf("open /dev/null: %w", err)
				}
				null := fallback
				theirs.add(func() { unix.Close(null) })
			}
			fds[i] = uintptr(fallback)
			continue
		}
		mine, child, err := relay.Pipe(s.role != wire.RoleStdin, uid)
		if err != nil {
			return nil, err
		}
		theirs.add(func() { unix.Close(child) })
		ours.add(func() { mine.Close() })
		fds[i] = uintptr(child)
		if s.out == nil {
			x.stdin = mine
			continue
		}
		*s.out = relay.NewOutput(mine, x.conns[s.role], true)
		x.outputs = append(x.outputs, *s.out)
	}
	return fds, nil
}

// closer collects what has to be closed.
type closer struct{ list []func() }

func (c *closer) add(f func()) { c.list = append(c.list, f) }

func (c *closer) close() {
	for _, f := range c.list {
		f()
	}
}
