package session

import (
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/wsl2/wsl2/internal/wire"
)

// InteropDir is where a distro's processes find the sockets on which they ask for
// programs of the host. $WSL_INTEROP names their session's; InteropAny is of no
// session and always there.
const (
	InteropDir = "/run/wsl2/interop"
	InteropAny = InteropDir + "/init"
)

// Browser is a link to /init that opens its argument on the host, for $BROWSER.
const Browser = "/run/wsl2/bin/xdg-open"

// What a process sends first.
const (
	AskProgram = 'H'
	askAgent   = 0
)

// interop brings processes that want a program of the host together with the
// connections that the launcher opens for it (wire.HostExec).
//
// A process connects to a socket of InteropDir, sends AskProgram and waits. For
// each connection of its host session it is sent one byte, the wire.Role, with the
// connection's descriptor (SCM_RIGHTS, unix(7)). From then on nothing of it passes
// through init.
//
// A session's socket is its $SSH_AUTH_SOCK as well, so that a session needs no
// second one: the messages of an SSH agent's client begin with a length of four
// bytes, the first of which is 0.
type interop struct {
	srv     *Server
	dir     string
	standIn func(wire.SessionID) error // asks the service

	any *askSocket // of no session; immutable

	mu      sync.Mutex
	closed  bool                          // guarded by mu
	next    int                           // names the sockets; guarded by mu
	spare   *askSocket                    // made ahead: a session's start does not wait for it; guarded by mu
	waiting map[wire.SessionID]*hostGuest // guarded by mu
}

// askSocket is a socket with a goroutine that serves it.
type askSocket struct {
	l    *net.UnixListener
	path string
	// starting is held from before a session's program can ask until its client knows that it has started.
	starting sync.Mutex
	// owner is the session whose client is asked; nil: the service.
	owner atomic.Pointer[session]
}

// hostGuest is a process of the guest that asked for a program of the host.
type hostGuest struct {
	c     *net.UnixConn
	mu    sync.Mutex // serialises writes to c: each has a deadline of its own
	owner *session   // whose client was asked; nil if that was the service
	taken bool       // the launcher has come
	asked bool       // the service has been asked
	// agent takes the launcher's connection, the first of them, in place of the process; nil for a program.
	agent chan conn
}

// newInterop makes the directory and the socket that is of no session, and serves it.
func newInterop(srv *Server, dir string, standIn func(wire.SessionID) error) (*interop, error) {
	i := &interop{srv: srv, dir: dir, standIn: standIn, waiting: map[wire.SessionID]*hostGuest{}}
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return nil, err
	}
	var err error
	i.any, err = i.listen(filepath.Join(dir, filepath.Base(InteropAny)))
	if err != nil {
		return nil, err
	}
	return i, nil
}

// close takes no more requests. Those that run are not touched.
func (i *interop) close() {
	i.any.l.Close()
	i.mu.Lock()
	defer i.mu.Unlock()
	i.closed = true
	if i.spare != nil {
		i.spare.l.Close()
		i.spare = nil
	}
}

// listen listens where every user of the distro may connect: whether a process
// may ask is the host's to decide.
func (i *interop) listen(path string) (*askSocket, error) {
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		return nil, err
	}
	if err := os.Chmod(path, 0o666); err != nil {
		l.Close()
		return nil, err
	}
	s := &askSocket{l: l, path: path}
	go i.serve(s)
	return s, nil
}

// take returns a socket for a session, which releases it.
func (i *interop) take() (*askSocket, error) {
	i.mu.Lock()
	s := i.spare
	i.spare = nil
	i.mu.Unlock()
	if s != nil {
		return s, nil
	}
	return i.make()
}

func (i *interop) make() (*askSocket, error) {
	i.mu.Lock()
	i.next++
	path := filepath.Join(i.dir, fmt.Sprint(i.next))
	i.mu.Unlock()
	return i.listen(path)
}

// release is the end of a session. What its client was asked and has not begun,
// the service is asked. If no process is left in the distro, none knows the socket,
// and the next session gets it: so a command after the other costs nothing here.
func (i *interop) release(s *askSocket, x *session) {
	s.owner.Store(nil)
	i.end(x)
	if !i.srv.cfg.Reaper.Empty() {
		s.l.Close()
		i.refill()
		return
	}
	i.keep(s)
}

// keep makes s the spare one, unless there is one.
func (i *interop) keep(s *askSocket) {
	i.mu.Lock()
	defer i.mu.Unlock()
	if i.spare != nil || i.closed {
		s.l.Close()
		return
	}
	i.spare = s
}

// refill makes the next session's socket, at a time when nobody waits for it.
func (i *interop) refill() {
	i.mu.Lock()
	wanted := i.spare == nil && !i.closed
	i.mu.Unlock()
	if !wanted {
		return
	}
	if s, err := i.make(); err == nil { // else the next session tries it again, and tells
		i.keep(s)
	}
}

// serve accepts until the socket is closed.
func (i *interop) serve(s *askSocket) {
	for {
		c, err := s.l.AcceptUnix()
		if err != nil {
			if !errors.Is(err, net.ErrClosed) {
				i.srv.cfg.Logf("interop: %v", err)
			}
			return
		}
		go i.request(c, s)
	}
}

// request serves one process until it closes its connection.
func (i *interop) request(c *net.UnixConn, s *askSocket) {
	defer c.Close()
	s.starting.Lock() // its program may ask before we know that it runs
	x := s.owner.Load()
	s.starting.Unlock()
	first := make([]byte, 1)
	if _, err := io.ReadFull(c, first); err != nil {
		return
	}
	switch {
	case first[0] == AskProgram:
		w := &hostGuest{c: c, owner: x}
		id, err := i.wait(w)
		if err != nil {
			i.srv.cfg.Logf("interop: %v", err)
			return
		}
		defer i.forget(id)
		// An owner that is one no more has looked at those who wait before this one was known.
		if x == nil || s.owner.Load() != x || x.send(&wire.HostExec{Session: id}) != nil {
			i.orphan(id)
		}
		c.Read(first) //nolint:errcheck // its end is all that is expected
	case first[0] == askAgent && x != nil && x.mayAsk(c):
		i.agent(c, x, first)
	}
}

// wait makes w known under an ID of its own.
func (i *interop) wait(w *hostGuest) (id wire.SessionID, err error) {
	// Not crypto/rand: its self-tests would cost every start of /init.
	if _, err := unix.Getrandom(id[:], 0); err != nil {
		return id, err
	}
	i.mu.Lock()
	defer i.mu.Unlock()
	i.waiting[id] = w
	return id, nil
}

func (i *interop) forget(id wire.SessionID) {
	i.mu.Lock()
	defer i.mu.Unlock()
	delete(i.waiting, id)
}

// agent carries one connection to the SSH agent of the session's client. first
// has been read of it.
func (i *interop) agent(c *net.UnixConn, x *session, first []byte) {
	came := make(chan conn, 1)
	id, err := i.wait(&hostGuest{c: c, agent: came})
	if err != nil {
		i.srv.cfg.Logf("interop: %v", err)
		return
	}
	defer func() {
		i.forget(id)
		select {
		case late := <-came:
			late.Close()
		default:
		}
	}()
	if x.send(&wire.HostExec{Session: id, Kind: wire.HostAgent}) != nil {
		return
	}
	timer := time.NewTimer(i.srv.cfg.AssemblyTimeout)
	defer timer.Stop()
	select {
	case host := <-came:
		defer host.Close()
		host.SetReadDeadline(time.Time{}) //nolint:errcheck // the read tells
		go func() {
			io.Copy(c, host) //nolint:errcheck // either end closes
			c.CloseWrite()   // not both ways: a refusal that comes while it still writes would be SIGPIPE
		}()
		if _, err := host.Write(first); err == nil {
			io.Copy(host, c) //nolint:errcheck // either end closes
		}
		c.SetReadDeadline(time.Now().Add(controlTimeout)) //nolint:errcheck // the read tells
		io.Copy(io.Discard, c)                            //nolint:errcheck // what is left of the request
	case <-timer.C:
	}
}

// mayAsk tells whether the process at the other end may use the keys of x's
// client: it runs as x's user, or as root, who could trace it anyway.
func (x *session) mayAsk(c *net.UnixConn) bool {
	rc, err := c.SyscallConn()
	if err != nil {
		return false
	}
	var cred *unix.Ucred
	cerr := rc.Control(func(fd uintptr) { cred, err = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED) })
	return cerr == nil && err == nil && (cred.Uid == 0 || cred.Uid == x.uid)
}

// orphan hands a request whose client is gone to the service, once.
func (i *interop) orphan(id wire.SessionID) {
	i.mu.Lock()
	w := i.waiting[id]
	wanted := w != nil && !w.asked
	if wanted {
		w.owner, w.asked = nil, true
	}
	i.mu.Unlock()
	if !wanted {
		return
	}
	if err := i.standIn(id); err != nil {
		i.srv.cfg.Logf("interop: %v", err)
	}
}

// end is the end of a session: what its client was asked and has not begun, the
// service is asked.
func (i *interop) end(x *session) {
	var left []wire.SessionID
	i.mu.Lock()
	for id, w := range i.waiting {
		if w.owner == x && !w.taken {
			left = append(left, id)
		}
	}
	i.mu.Unlock()
	for _, id := range left {
		i.orphan(id)
	}
}

// deliver hands a connection to the process that waits for it, and tells whether
// there is one. It owns the connection then.
func (i *interop) deliver(c conn, hello *wire.Hello) (bool, error) {
	i.mu.Lock()
	w, again := i.waiting[hello.Session], false
	if w != nil {
		again, w.taken = w.taken, true
	}
	agent := w != nil && w.agent != nil
	first := agent && hello.Role == wire.RoleHost && !again
	if first {
		w.agent <- c // while it is not forgotten: who waits closes it
	}
	i.mu.Unlock()
	switch {
	case w == nil:
		return false, nil
	case first:
		return true, nil
	case agent:
		c.Close()
		return true, fmt.Errorf("a second connection for an SSH agent")
	}
	defer c.Close()
	raw, ok := c.(syscall.Conn)
	if !ok {
		return true, fmt.Errorf("a connection of type %T has no descriptor", c)
	}
	rc, err := raw.SyscallConn()
	if err != nil {
		return true, err
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	w.c.SetWriteDeadline(time.Now().Add(controlTimeout)) //nolint:errcheck // the write tells
	defer w.c.SetWriteDeadline(time.Time{})              //nolint:errcheck // see wire.Within
	cerr := rc.Control(func(fd uintptr) {
		_, _, err = w.c.WriteMsgUnix([]byte{byte(hello.Role)}, unix.UnixRights(int(fd)), nil)
	})
	return true, errors.Join(cerr, err)
}
