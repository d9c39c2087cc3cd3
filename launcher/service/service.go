// Package service is the process that keeps a user's distros: the registry, the
// VM and who uses it. There is one per user, started by the first command that
// needs it (package client) and ending when nothing is left to do.
//
// # Locks and order
//
// The service holds Paths.ServiceLock for its life; its VM's process holds
// Paths.VMLock for its own, which may be longer. A service that follows one that
// was killed waits for both, so that no disk is ever opened twice.
package service

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/wsl2/wsl2/images"
	"github.com/wsl2/wsl2/internal/wire"
	"github.com/wsl2/wsl2/launcher/api"
	"github.com/wsl2/wsl2/launcher/config"
	"github.com/wsl2/wsl2/launcher/hostmount"
	"github.com/wsl2/wsl2/launcher/registry"
)

// SystemDistro is the name of the system distro, which is always there and in
// no registry, where the name is reserved.
const SystemDistro = registry.System

// linger is how long a service without VM and clients stays: the next command
// often comes soon.
const linger = 10 * time.Second

// firstRequest bounds the wait for a connection's request.
const firstRequest = 10 * time.Second

// Service serves clients. Make it with New, run it with Serve.
type Service struct {
	paths  config.Paths
	self   api.Identity
	log    *slog.Logger
	m      *Manager // of the VM that distros share
	own    ownVMs
	mounts hostMounts
	// removeRoot deletes the root directory of a distro of version 1.
	removeRoot func(ctx context.Context, root string) error
	aside      []operation // what the sweep leaves to Serve
	uid        uint32

	linger time.Duration
	tools  func(ctx context.Context) ([]byte, error)

	mu       sync.Mutex
	reg      *registry.Registry // nil until it could be read; guarded by mu
	clients  int                // open connections; guarded by mu
	leases   int                // those that are sessions; guarded by mu
	timer    *time.Timer        // ends the service; guarded by mu
	listener *net.UnixListener  // set by Serve; guarded by mu
	rebuilt  string             // what the first client is to be told of the registry; guarded by mu
	stopping bool               // no more requests; guarded by mu
	stop     chan struct{}      // closed with stopping
	conns    sync.WaitGroup
}

// Config is what a Service is made of.
type Config struct {
	Paths config.Paths
	Boot  BootFunc
	Log   *slog.Logger
	Self  api.Identity
	// Tools makes the archive of e2fsprogs for the guest (package images/tools, which
	// would cost each start of this process).
	Tools func(ctx context.Context) ([]byte, error)
	// Native makes the machines of distros of version 1, RemoveRoot deletes a root of theirs.
	Native     BootFunc
	RemoveRoot func(ctx context.Context, root string) error
	// Linger replaces the default if it is positive.
	Linger time.Duration
}

// New returns a Service. What changes that were cut off left on disk is removed.
func New(c Config) *Service {
	s := &Service{paths: c.Paths, self: c.Self, log: c.Log, uid: uint32(os.Getuid()), linger: linger, tools: c.Tools, removeRoot: c.RemoveRoot, stop: make(chan struct{})}
	if c.Linger > 0 {
		s.linger = c.Linger
	}
	settings := func() (config.Settings, []string) { return config.Load(c.Paths.ConfigFile, config.ThisHost()) }
	s.m = NewManager(c.Boot, settings, c.Log, func() { go s.touch() })
	s.m.tools = c.Tools
	s.mounts = hostMounts{run: hostmount.Run, byName: map[string]*hostMount{}}
	hostmount.Clean(c.Paths.HostMounts())
	managerFor := func(id string, engine BootFunc, settings func() (config.Settings, []string)) *Manager {
		boot := func(ctx context.Context, r BootRequest) (Machine, error) {
			r.Own = id
			return engine(ctx, r)
		}
		m := NewManager(boot, settings, c.Log.With("vm", id), func() { go s.touch() })
		m.tools, m.locks, m.book = c.Tools, s.m.locks, s.m.book
		return m
	}
	s.own.byID, s.own.native = map[string]*Manager{}, map[string]*Manager{}
	s.own.makeVM = func(id string) *Manager { return managerFor(id, c.Boot, settings) }
	s.own.makeNative = func(id string) *Manager {
		return managerFor(id, c.Native, func() (config.Settings, []string) {
			st, warnings := settings()
			st.VMIdleTimeout = 0 // there is none that would have to boot again
			return st, warnings
		})
	}
	s.m.RememberDisks(c.Paths.SharedDisks())
	book, err := newPortBook(c.Paths.PortRules())
	if err != nil {
		c.Log.Warn("what was published is forgotten", "err", err)
	}
	s.m.book = book
	if reg, err := s.registry(); err == nil {
		s.sweep(reg)
	}
	return s
}

// registry returns the registry, reading it if that has not succeeded yet: the
// user may repair the file while the service runs.
func (s *Service) registry() (*registry.Registry, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.reg == nil {
		reg, err := registry.Open(s.paths.Registry())
		var corrupt *registry.CorruptError
		if errors.As(err, &corrupt) && corrupt.Damaged {
			var kept string
			reg, kept, err = registry.Rebuild(s.paths.Registry(), filepath.Join(s.paths.Distros(), "*", diskName), filepath.Join(s.paths.Distros(), "*", rootName))
			if err == nil {
				s.rebuilt = fmt.Sprintf("the registry was damaged (%v) and has been made anew from %d disks; `wsl2 --list` shows them, the damaged file is %s", corrupt.Reason, len(reg.List()), kept)
				s.log.Warn(s.rebuilt)
			}
		}
		if err != nil {
			return nil, err
		}
		s.reg = reg
	}
	return s.reg, nil
}

// Serve answers clients on l until nothing is left to do or ctx ends; then it
// stops the VM, if one runs, and returns. It closes l.
func (s *Service) Serve(ctx context.Context, l *net.UnixListener) error {
	s.mu.Lock()
	s.listener = l
	s.mu.Unlock()
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	if reg, err := s.registry(); err == nil && len(s.aside) > 0 {
		s.background(func() { s.deleteAside(ctx, reg) })
	}
	s.touch()
	failed := make(chan error, 1)
	go func() {
		for {
			c, err := l.AcceptUnix()
			if err != nil {
				failed <- err
				return
			}
			s.mu.Lock()
			if s.stopping {
				s.mu.Unlock()
				c.Close() // unanswered: the client starts a new service
				continue
			}
			s.clients++
			s.conns.Add(1)
			s.mu.Unlock()
			go s.serve(c)
		}
	}()
	var err error
	select {
	case <-s.stop:
	case <-ctx.Done():
	case err = <-failed:
		if errors.Is(err, net.ErrClosed) {
			err = nil // by shutdown
		}
	}
	s.shutdown()
	cancel()
	s.each((*Manager).Close)
	s.mounts.wait("")
	s.conns.Wait()
	return err
}

func (s *Service) shutdown() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.shutdownLocked()
}

// shutdownLocked refuses further requests. The socket goes first: a client that
// finds its connection closed without an answer tries again and must not find us.
// Preconditions: s.mu is held.
func (s *Service) shutdownLocked() {
	if s.stopping {
		return
	}
	s.stopping = true
	if s.listener != nil {
		s.listener.Close()
	}
	close(s.stop)
}

// background does something for which the service stays, as for a client.
func (s *Service) background(f func()) {
	s.mu.Lock()
	s.clients++
	s.mu.Unlock()
	s.conns.Go(func() {
		f()
		s.mu.Lock()
		s.clients--
		s.mu.Unlock()
		s.touch()
	})
}

// touch arms or stops the timer that ends an idle service.
func (s *Service) touch() {
	idle := s.idle()
	s.mu.Lock()
	defer s.mu.Unlock()
	stopTimer(&s.timer)
	if !idle || s.clients > 0 || s.stopping {
		return
	}
	var t *time.Timer
	t = time.AfterFunc(s.linger, func() {
		idle := s.idle()
		s.mu.Lock()
		defer s.mu.Unlock()
		if s.timer == t && s.clients == 0 && idle {
			s.shutdownLocked()
		}
	})
	s.timer = t
}

// peerUID is who is at the other end (SO_PEERCRED, unix(7)).
func peerUID(c *net.UnixConn) (uint32, error) {
	raw, err := c.SyscallConn()
	if err != nil {
		return 0, err
	}
	var cred *unix.Ucred
	var cerr error
	err = raw.Control(func(fd uintptr) { cred, cerr = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED) })
	if err = errors.Join(err, cerr); err != nil {
		return 0, err
	}
	return cred.Uid, nil
}

// serve handles one connection: one request and its answer.
func (s *Service) serve(c *net.UnixConn) {
	defer func() {
		c.Close()
		s.mu.Lock()
		s.clients--
		s.mu.Unlock()
		s.touch()
		s.conns.Done()
	}()
	// The directory's and the socket's mode keep others out already.
	if uid, err := peerUID(c); err != nil || uid != s.uid {
		s.log.Warn("connection refused", "uid", uid, "err", err)
		return
	}
	c.SetReadDeadline(time.Now().Add(firstRequest))
	kind, body, err := api.Read(c)
	if err != nil {
		if err != io.EOF {
			s.log.Warn("request not read", "err", err)
		}
		return
	}
	c.SetReadDeadline(time.Time{})
	p := &peer{c: c}
	id, rest, err := api.DecodeRequest(body)
	if err != nil {
		p.fail(api.Errorf(api.CodeBadRequest, "", "the service cannot read the request (%v)", err))
		return
	}
	var call api.Call
	var open api.Open
	switch kind {
	case api.KindOpen:
		if id.Protocol == api.Protocol {
			open, err = api.DecodeOpen(rest)
		}
	case api.KindCall:
		err = json.Unmarshal(rest, &call)
	default:
		err = fmt.Errorf("unknown kind %d", kind)
	}
	if err != nil {
		p.fail(api.Errorf(api.CodeBadRequest, "", "the service cannot read the request (%v)", err))
		return
	}
	any := call.Verb == api.VerbShutdown || call.Verb == api.VerbStatus // good for every build
	if id != s.self && !any && !s.otherBuild(p, id) {
		return
	}
	s.mu.Lock()
	rebuilt := s.rebuilt
	s.rebuilt = ""
	s.mu.Unlock()
	if rebuilt != "" {
		p.notice(rebuilt)
	}
	if kind == api.KindOpen {
		s.open(p, open)
		return
	}
	result, err := s.call(p, call)
	if err != nil {
		s.fail(p, err)
		return
	}
	if call.Verb == api.VerbShutdown {
		s.shutdown() // before the answer: the next command finds no service
	}
	p.json(api.KindResult, result)
}

// fail answers with an error. A request that came too late for this service is
// not answered: the client takes it to the next one, which it must be able to start.
func (s *Service) fail(p *peer, err error) {
	if errors.Is(err, errClosing) {
		<-s.stop
		return
	}
	p.fail(err)
}

// otherBuild decides about a client of another build: if nothing is in use this
// service ends and the client starts its own. It tells whether to serve it.
func (s *Service) otherBuild(p *peer, id api.Identity) bool {
	if s.tryStopIdle() {
		s.shutdown()
		s.log.Info("making way for another build", "version", id.Version)
		p.send(api.KindReplaced, nil)
		return false
	}
	if id.Protocol != s.self.Protocol {
		p.fail(api.Errorf(api.CodeVersion, "end the sessions, or run `wsl2 --shutdown`",
			"wsl2 %s cannot speak with the service of wsl2 %s, which still has something running", id.Version, s.self.Version))
		return false
	}
	p.notice(fmt.Sprintf("the VM still runs under an earlier build of wsl2 (%s); `wsl2 --shutdown` ends that", s.self.Version))
	return true
}

// peer writes to a client. Its methods may be called concurrently.
type peer struct {
	c  *net.UnixConn
	mu sync.Mutex
}

// writeTimeout bounds what a client that does not read can hold up.
const writeTimeout = 10 * time.Second

func (p *peer) raw(b []byte) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	_, err := wire.Within(p.c, writeTimeout).Write(b)
	return err
}

func (p *peer) send(k api.Kind, body []byte) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	return api.Write(wire.Within(p.c, writeTimeout), k, body)
}

func (p *peer) json(k api.Kind, v any) error {
	body, err := json.Marshal(v)
	if err != nil {
		return err
	}
	return p.send(k, body)
}

func (p *peer) fail(err error) { p.json(api.KindError, api.AsError(err)) }

// progressEvery is how often a client is told.
const progressEvery = 100 * time.Millisecond

// progress returns what tells the client how far a piece of work is.
func (p *peer) progress(what string) images.Progress {
	var last time.Time
	return func(done, total int64) {
		if now := time.Now(); done == total || now.Sub(last) >= progressEvery {
			last = now
			p.json(api.KindProgress, api.Progress{What: what, Done: done, Total: total})
		}
	}
}

func (p *peer) notice(text string) { p.send(api.KindNotice, []byte(text)) }

// watch returns a context that ends when the client closes its connection, a
// channel that is closed when it says that it has sent its archive, and what ends
// the watch. Nothing else may read from the connection.
func (p *peer) watch() (ctx context.Context, sent <-chan struct{}, end func()) {
	ctx, cancel := context.WithCancelCause(context.Background())
	done, told := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(done)
		if kind, _, err := api.Read(p.c); err == nil && kind == api.KindSent {
			close(told)
			var b [1]byte
			p.c.Read(b[:])
		}
		cancel(errClientGone)
	}()
	return ctx, told, func() {
		p.c.SetReadDeadline(time.Unix(1, 0))
		<-done
	}
}

var errClientGone = errors.New("the client has gone")

// open handles a session: the connection is its lease.
func (s *Service) open(p *peer, o api.Open) {
	m, spec, d, err := s.resolve(o)
	if err != nil {
		p.fail(err)
		return
	}
	spec.Notice = p.notice
	ctx, _, end := p.watch()
	defer end()
	lease, session, err := m.Open(ctx, spec, o.VM, func(err error) { p.json(api.KindEnded, api.AsError(err)) })
	if err != nil {
		if ctx.Err() == nil {
			s.fail(p, err)
		}
		return
	}
	defer lease.Release()
	s.mu.Lock()
	s.leases++
	s.mu.Unlock()
	defer func() {
		s.mu.Lock()
		s.leases--
		s.mu.Unlock()
	}()
	for _, n := range append(session.Notices, m.portNotices(spec.Name)...) {
		p.notice(n)
	}
	opened := api.Opened{Distro: spec.Name, VsockPath: session.VsockPath, Port: session.Port, DefaultUser: d.DefaultUser, Shares: session.Shares, Proxy: session.Proxy}
	if f := d.FirstRun; f != nil {
		opened.FirstRun, opened.SetUp, opened.SetUpUID = true, f.Command, f.UID
	}
	if p.raw(api.AppendOpened(nil, &opened)) != nil {
		return
	}
	<-ctx.Done()
}

// resolve finds the distro that a session is asked for, and its VM.
func (s *Service) resolve(o api.Open) (*Manager, DistroSpec, registry.Distro, error) {
	var none registry.Distro
	fail := func(err error) (*Manager, DistroSpec, registry.Distro, error) { return nil, DistroSpec{}, none, err }
	if o.DebugShell && o.Distro == "" {
		return s.m, DistroSpec{Name: registry.DebugShell}, none, nil
	}
	if o.System {
		return s.m, DistroSpec{Name: SystemDistro}, none, nil
	}
	reg, err := s.registry()
	if err != nil {
		return fail(err)
	}
	name := o.Distro
	if name == "" {
		if name = reg.Default(); name == "" {
			return fail(api.Errorf(api.CodeNoDefault, "import one: wsl2 --import NAME FILE.tar (`wsl2 --system` needs none)", "no distro is installed"))
		}
	}
	d, err := reg.Get(name)
	if err != nil {
		return fail(notFound(name))
	}
	if o.DebugShell {
		return s.managerOf(d), DistroSpec{Name: registry.DebugShell}, none, nil
	}
	if d.Version == 1 && o.VM != (api.VMOptions{}) {
		return fail(noDisk(d, "no VM, for which --kernel and --accel are"))
	}
	if _, err := os.Stat(d.Disk); err != nil {
		return fail(api.Errorf(api.CodeFailed, "put it back, or give the distro up: wsl2 --unregister "+d.Name, "the disk of %s is missing: %v", d.Name, err))
	}
	return s.managerOf(d), DistroSpec{Name: d.Name, Disk: d.Disk, User: d.DefaultUser}, d, nil
}

func notFound(name string) error {
	return api.Errorf(api.CodeNotFound, "`wsl2 --list` shows those that exist, `wsl2 --install` and `wsl2 --import` make one", "there is no distro %q", name)
}

// call handles every other request.
func (s *Service) call(p *peer, c api.Call) (any, error) {
	switch c.Verb {
	case api.VerbShutdown:
		s.each((*Manager).Refuse) // or a command that waits for the end would start all anew
		s.m.ForgetDisks()
		s.each(func(m *Manager) { m.Shutdown(c.Force) })
		s.mounts.wait("")
		return struct{}{}, nil
	case api.VerbStatus:
		return s.status(), nil
	case api.VerbHostMount:
		return s.hostMount(p, c)
	}
	reg, err := s.registry()
	if err != nil {
		return nil, err
	}
	switch c.Verb {
	case api.VerbList:
		return s.list(reg), nil
	case api.VerbImport:
		return s.importDistro(p, reg, c)
	case api.VerbMount:
		return s.mount(p, reg, c)
	case api.VerbUnmount:
		return struct{}{}, s.m.Unmount(context.Background(), c.Image)
	case api.VerbInPlace:
		return s.importInPlace(reg, c)
	case api.VerbPorts:
		return s.ports(p, reg, c)
	case api.VerbDefaultVersion:
		return struct{}{}, reg.SetDefaultVersion(c.Version)
	}
	d, err := reg.Get(c.Name)
	if err != nil {
		return nil, notFound(c.Name)
	}
	switch c.Verb {
	case api.VerbTerminate:
		return struct{}{}, s.terminate(d.Name)
	case api.VerbSetDefault:
		return struct{}{}, reg.SetDefault(d.Name)
	case api.VerbUnregister:
		return struct{}{}, s.unregister(reg, d)
	}
	return s.manage(p, reg, d, c)
}

// terminate stops a distro in whatever VM it runs.
func (s *Service) terminate(name string) error {
	for _, m := range s.managers() {
		if err := m.Terminate(context.Background(), name); err != nil {
			return err
		}
	}
	s.mounts.wait(name)
	return nil
}

func (s *Service) list(reg *registry.Registry) api.List {
	l := api.List{Distros: []api.Distro{}}
	states, locked := s.states(), s.m.Locked()
	own := s.own.list()
	def := reg.Default()
	for _, d := range reg.List() {
		key := strings.ToLower(d.Name)
		row := api.Distro{Name: d.Name, Default: d.Name == def, State: api.StateStopped, Version: d.Version, Disk: d.Disk, DefaultUser: d.DefaultUser}
		row.OwnVM = own[d.ID] != nil && own[d.ID].runs(d.Name)
		row.SizeBytes, row.UsedBytes = diskUse(d.Disk)
		row.PID = s.own.pidOf(d)
		if st, ok := states[key]; ok {
			row.State, row.Sessions = st.State, st.Sessions
		} else if lock, ok := locked[key]; ok {
			row.State = lock[1]
		}
		delete(locked, key)
		l.Distros = append(l.Distros, row)
	}
	for _, lock := range locked {
		l.Distros = append(l.Distros, api.Distro{Name: lock[0], State: api.StateInstalling, Version: 2})
	}
	return l
}

func (s *Service) status() api.Status {
	st := api.Status{Version: s.self.Version, PID: os.Getpid(), Running: len(s.states()), VM: s.m.VM(), Disks: s.m.SharedDisks()}
	if reg, err := s.registry(); err == nil {
		st.Default, st.Distros, st.OwnVMs, st.DefaultVersion = reg.Default(), len(reg.List()), s.ownStatus(reg), reg.DefaultVersion()
	}
	s.mu.Lock()
	st.Sessions = s.leases
	s.mu.Unlock()
	return st
}
