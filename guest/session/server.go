// Package session serves the sessions of one distro: programs started for
// clients on the host, over the connections that internal/wire describes.
//
// # From connection to program
//
// Each connection announces itself with a Hello; connections of the same
// SessionID meet in an assembly. The control connection's goroutine owns the
// session: it reads Start, waits for the data connections that Start names, forks
// the program and then waits for whichever comes first, the program's exit or the client's end.
//
// # Streams
//
// A stream with a connection of its own is a pipe (programs may reopen
// /dev/stdout, which a socket does not allow), relayed by one goroutine each.
// The others are the session's pty, or /dev/null. What the program wrote before it
// ended is in the pipe or the pty when its exit is known; so the relays read until
// nothing is left and Exited goes out, whoever still holds the stream open.
//
// # Ownership
//
// A session closes all of its connections and descriptors. A relay that writes
// to a client that does not read is ended by closing its connection. Only the
// discarding of output of background children outlives a session, one parked
// goroutine per stream until the last of them closes it.
package session

import (
	"errors"
	"fmt"
	"io"
	"net"
	"runtime/debug"
	"sync"
	"time"

	"github.com/wsl2/wsl2/guest/reaper"
	"github.com/wsl2/wsl2/guest/users"
	"github.com/wsl2/wsl2/internal/forward"
	"github.com/wsl2/wsl2/internal/wire"
)

// Config of a Server.
type Config struct {
	// Reaper starts the programs.
	Reaper *reaper.Reaper
	// Distro and Hostname appear in the environment (WSL_DISTRO_NAME, NAME).
	Distro, Hostname string
	// Root is the directory that holds etc and dev; "" means "/". Programs are not
	// confined to it.
	Root string
	// DefaultUser is who a session runs as that names nobody; "" leaves it to the client.
	DefaultUser string
	// Prepare, if set, is called before a user's program starts: it may wait. What it returns
	// is added to the environment, and a notice for the user.
	Prepare func(*users.User) (env []string, notice string)
	// AssemblyTimeout bounds the wait for a Hello, for Start and for a session's
	// connections; 0 means 10 s.
	AssemblyTimeout time.Duration
	// Interop is the directory of the sockets for host programs (InteropDir); ""
	// turns host programs off. StandIn asks the service for one, in place of a client.
	Interop string
	StandIn func(wire.SessionID) error
	// Shares, if set, has the host's directories.
	Shares Shares
	// OnQuiet, if set, is called when the last session has been served. It must
	// not block.
	OnQuiet func()
	// Logf, if set, is told what clients cannot be told.
	Logf func(format string, args ...any)
}

// Shares are directories of the host in the distro (package shares).
type Shares interface {
	// Deliver takes a RoleShare connection; false if nobody asked for it.
	Deliver(net.Conn, wire.SessionID) bool
	// DeliverDevice is Deliver for what a RoleShareDevice connection names.
	DeliverDevice(tag string, id wire.SessionID) bool
	// Changes takes a RoleShareChanges connection.
	Changes(net.Conn, wire.SessionID)
	// Reach is told of a path before init looks at it for somebody.
	Reach(path string)
}

// errClosing refuses sessions while the distro stops.
var errClosing = errors.New("the distro is stopping")

// conn is what vsock and unix stream connections have in common.
type conn interface {
	net.Conn
	CloseRead() error
	CloseWrite() error
}

// Server serves any number of listeners and sessions.
type Server struct {
	cfg     Config   // immutable
	interop *interop // nil if it is off; immutable
	buffers forward.Buffers

	mu       sync.Mutex
	closing  bool
	pending  map[wire.SessionID]*assembly
	active   int           // connections and sessions being served
	quiet    chan struct{} // closed while active is 0
	sessions map[*session]struct{}
	ports    map[conn]struct{} // connections to ports of the distro
}

// NewServer returns a Server.
func NewServer(cfg Config) *Server {
	if cfg.AssemblyTimeout == 0 {
		cfg.AssemblyTimeout = 10 * time.Second
	}
	if cfg.Logf == nil {
		cfg.Logf = func(string, ...any) {}
	}
	s := &Server{
		cfg:      cfg,
		pending:  map[wire.SessionID]*assembly{},
		quiet:    make(chan struct{}),
		sessions: map[*session]struct{}{},
		ports:    map[conn]struct{}{},
	}
	close(s.quiet)
	if cfg.Interop != "" {
		var err error
		if s.interop, err = newInterop(s, cfg.Interop, cfg.StandIn); err != nil {
			cfg.Logf("no programs of the host: %v", err)
		} else {
			go s.interop.refill()
		}
	}
	return s
}

// Serve accepts connections until l is closed; then it returns nil. Any other
// error of Accept is returned.
func (s *Server) Serve(l net.Listener) error {
	for {
		c, err := l.Accept()
		if errors.Is(err, net.ErrClosed) {
			return nil
		}
		if err != nil {
			return fmt.Errorf("accept a session's connection: %w", err)
		}
		half, ok := c.(conn)
		if !ok || !s.enter() {
			c.Close()
			continue
		}
		go s.handle(half)
	}
}

// CloseIfIdle makes the server refuse new sessions if none is being served, and
// reports whether it did.
func (s *Server) CloseIfIdle() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.active == 0 {
		s.closing = true
	}
	return s.closing
}

// Quiet reports whether no session is being served.
func (s *Server) Quiet() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.active == 0
}

// Close makes the server refuse new sessions. Those that run are not touched.
func (s *Server) Close() {
	s.mu.Lock()
	s.closing = true
	s.mu.Unlock()
	if s.interop != nil {
		s.interop.close()
	}
}

// Wait waits until no session is left or timeout has passed, and then cuts off
// those that are left. Connections to ports, whose servers have ended, are cut off first.
func (s *Server) Wait(timeout time.Duration) {
	s.mu.Lock()
	for c := range s.ports {
		c.Close()
	}
	quiet := s.quiet
	s.mu.Unlock()
	timer := time.NewTimer(timeout)
	defer timer.Stop()
	select {
	case <-quiet:
		return
	case <-timer.C:
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	for x := range s.sessions {
		x.closeConns()
	}
	for _, a := range s.pending {
		a.close()
	}
}

func (s *Server) enter() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closing {
		return false
	}
	if s.active == 0 {
		s.quiet = make(chan struct{})
	}
	s.active++
	return true
}

func (s *Server) leave() {
	s.mu.Lock()
	s.active--
	last := s.active == 0
	if last {
		close(s.quiet)
	}
	s.mu.Unlock()
	if last && s.cfg.OnQuiet != nil {
		s.cfg.OnQuiet()
	}
}

// handle serves one connection: it hands a data connection to its assembly, or
// runs the session of a control connection.
func (s *Server) handle(c conn) {
	defer s.leave()
	defer func() {
		// A mistake in one session must not end the distro, whose init this is.
		if v := recover(); v != nil {
			s.cfg.Logf("BUG: session panicked: %v\n%s", v, debug.Stack())
			c.Close()
		}
	}()
	c.SetReadDeadline(time.Now().Add(s.cfg.AssemblyTimeout))
	m, err := wire.Read(c)
	if err != nil {
		s.refuse(c, err)
		return
	}
	hello, ok := m.(*wire.Hello)
	if !ok {
		s.refuse(c, fmt.Errorf("%w: %v instead of Hello", wire.ErrMalformed, m.Type()))
		return
	}
	if s.interop != nil && hello.Role != wire.RoleControl {
		if taken, err := s.interop.deliver(c, hello); taken {
			if err != nil {
				s.cfg.Logf("interop: %v", err)
			}
			return
		}
	}
	switch hello.Role {
	case wire.RoleControl:
		s.control(c, hello.Session)
	case wire.RoleStdin, wire.RoleStdout, wire.RoleStderr, wire.RolePTY:
		c.SetReadDeadline(time.Time{})
		if err := s.join(c, hello); err != nil {
			s.refuse(c, err)
		}
	case wire.RoleShare:
		c.SetReadDeadline(time.Time{}) //nolint:errcheck // a dead connection shows at the next read
		if s.cfg.Shares == nil || !s.cfg.Shares.Deliver(c, hello.Session) {
			s.refuse(c, errors.New("nobody waits for this share"))
		}
	case wire.RoleShareDevice:
		m, err := wire.Read(c)
		device, ok := m.(*wire.ShareDevice)
		if err != nil || !ok {
			s.refuse(c, fmt.Errorf("%w: no ShareDevice behind Hello (%v)", wire.ErrMalformed, err))
			return
		}
		if s.cfg.Shares == nil || !s.cfg.Shares.DeliverDevice(device.Tag, hello.Session) {
			s.refuse(c, errors.New("nobody waits for this share"))
			return
		}
		c.Close()
	case wire.RoleShareChanges:
		if s.cfg.Shares == nil {
			s.refuse(c, errors.New("the distro has no shares"))
			return
		}
		c.SetReadDeadline(time.Time{}) //nolint:errcheck // a dead connection shows at the next read
		s.cfg.Shares.Changes(c, hello.Session)
	case wire.RoleFiles:
		s.files(c)
	case wire.RolePort:
		s.port(c)
	default:
		s.refuse(c, fmt.Errorf("%w: role %d on a distro's port", wire.ErrMalformed, hello.Role))
	}
}

// refuse answers a connection that cannot be served and closes it.
func (s *Server) refuse(c conn, err error) {
	defer c.Close()
	if errors.Is(err, io.EOF) {
		return
	}
	code := wire.CodeRefused
	var version *wire.VersionError
	if errors.As(err, &version) {
		code = wire.CodeVersion
	}
	s.cfg.Logf("refused a connection: %v", err)
	c.SetWriteDeadline(time.Now().Add(s.cfg.AssemblyTimeout))
	wire.Write(c, &wire.Failed{Code: code, Text: err.Error()}) //nolint:errcheck // the peer may be gone
}

// assembly gathers the data connections of one session.
type assembly struct {
	conns   [wire.RolePTY + 1]conn // guarded by Server.mu, indexed by role
	control bool                   // guarded by Server.mu: a control connection has claimed it
	arrived chan struct{}          // holds one token when a connection came
	timer   *time.Timer            // ends an assembly that no control connection claims
}

// close closes the connections. Preconditions: Server.mu is held.
func (a *assembly) close() {
	for i, c := range a.conns {
		if c != nil {
			c.Close()
			a.conns[i] = nil
		}
	}
}

// assemblyLocked returns the assembly of id, made if need be. Preconditions:
// s.mu is held.
func (s *Server) assemblyLocked(id wire.SessionID) *assembly {
	a := s.pending[id]
	if a == nil {
		a = &assembly{arrived: make(chan struct{}, 1)}
		s.pending[id] = a
	}
	return a
}

// join adds a data connection to its assembly, which owns it from then on.
func (s *Server) join(c conn, hello *wire.Hello) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	a := s.assemblyLocked(hello.Session)
	if a.conns[hello.Role] != nil {
		return fmt.Errorf("%w: a second connection for role %d", wire.ErrMalformed, hello.Role)
	}
	a.conns[hello.Role] = c
	if a.control {
		select {
		case a.arrived <- struct{}{}:
		default:
		}
	} else if a.timer == nil {
		a.timer = time.AfterFunc(s.cfg.AssemblyTimeout, func() {
			s.mu.Lock()
			defer s.mu.Unlock()
			if !a.control {
				a.close()
				delete(s.pending, hello.Session)
			}
		})
	}
	return nil
}

// claim binds a control connection to its assembly.
func (s *Server) claim(id wire.SessionID) (*assembly, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	a := s.assemblyLocked(id)
	if a.control {
		return nil, fmt.Errorf("%w: a second control connection", wire.ErrMalformed)
	}
	a.control = true
	if a.timer != nil {
		a.timer.Stop()
	}
	return a, nil
}

// gather waits until all of the wanted roles have a connection and returns
// them. The session owns them then; those nobody asked for are closed.
func (s *Server) gather(a *assembly, id wire.SessionID, roles []wire.Role, deadline time.Time) (conns [wire.RolePTY + 1]conn, err error) {
	var expired <-chan time.Time
	for {
		s.mu.Lock()
		missing := wire.Role(0)
		for _, r := range roles {
			if a.conns[r] == nil {
				missing = r
			}
		}
		if missing == 0 {
			for _, r := range roles {
				conns[r], a.conns[r] = a.conns[r], nil
			}
			s.mu.Unlock()
			return conns, nil
		}
		s.mu.Unlock()
		if expired == nil {
			timer := time.NewTimer(time.Until(deadline))
			defer timer.Stop()
			expired = timer.C
		}
		select {
		case <-a.arrived:
		case <-expired:
			return conns, fmt.Errorf("the connection for role %d of the session did not come within %v", missing, s.cfg.AssemblyTimeout)
		}
	}
}

// drop forgets an assembly and closes what is left in it.
func (s *Server) drop(a *assembly, id wire.SessionID) {
	s.mu.Lock()
	defer s.mu.Unlock()
	a.close()
	if s.pending[id] == a {
		delete(s.pending, id)
	}
}
