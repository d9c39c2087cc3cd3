package service

import (
	"context"
	"log/slog"
	"strings"
	"sync"
	"time"

	"github.com/wsl2/wsl2/internal/hostpath"
	"github.com/wsl2/wsl2/launcher/api"
	"github.com/wsl2/wsl2/launcher/config"
	"github.com/wsl2/wsl2/launcher/share"
)

// stopGrace is what processes get between SIGTERM and SIGKILL. killAfter bounds the whole of
// a clean stop; it is more than the guest takes for one (guest/pid1: grace, a minute to
// write everything back, ten seconds to kill), which thus answers before.
const (
	stopGrace = 5 * time.Second
	killAfter = 90 * time.Second
)

// Manager runs distros in one VM: it starts both when they are needed and stops
// both when they are idle.
//
// A distro is kept by its leases (sessions) and, when those are gone, by what
// still runs in it; the VM is kept by its distros and imports. Each waits for
// its idle timeout before it stops.
type Manager struct {
	boot     BootFunc
	settings func() (config.Settings, []string) // reads wslconfig, with its warnings
	log      *slog.Logger
	// serveShare serves a share until its distro gives it up; share.Run but for tests.
	serveShare func(share.Spec) error
	// startPorts starts the process that forwards ports of a VM; ports.Start but for tests.
	startPorts func(vsockPath string) (portsProcess, error)
	// anchors are the directories that hostCertificates reads; anchorDirs but for tests.
	anchors []anchorDir
	// onIdle is called with mu held when neither VM nor distros are left; it
	// must not block or call back.
	onIdle func()

	mu      sync.Mutex
	vm      *vm                // nil while there is none; guarded by mu
	distros map[string]*distro // those that are not stopped, by folded name; guarded by mu
	locks   *locks
	book    *portBook
	closing bool // nothing is started any more; guarded by mu
	shared  sharedDisks
	// tools makes the archive of e2fsprogs; set before the first use.
	tools func(ctx context.Context) ([]byte, error)
	wg    sync.WaitGroup // the goroutines below; Close waits
}

// DistroSpec names what is to run.
type DistroSpec struct {
	Name string
	Disk string // "" for the system distro and the debug shell
	User string // the default user, whose the host's directories are in the distro
	// Notice, if not nil, tells the user whose command starts it what takes long.
	Notice func(text string)
}

func (s DistroSpec) key() string { return strings.ToLower(s.Name) }

// Lease keeps a distro running.
type Lease struct {
	m *Manager
	d *distro
	// ended is called, without the Manager's lock and at most once, when the
	// distro is gone before the lease was released.
	ended func(error)
}

// Session is what a lease's holder needs to start programs.
type Session struct {
	VsockPath string
	Port      uint32
	Shares    hostpath.Table
	Proxy     bool // the caller's proxies are the distro's as well
	// Notices are for the user whose command started the VM.
	Notices []string
}

// NewManager returns a Manager without a VM. settings is called at each start
// of a VM.
func NewManager(boot BootFunc, settings func() (config.Settings, []string), log *slog.Logger, onIdle func()) *Manager {
	book, _ := newPortBook("")
	return &Manager{boot: boot, settings: settings, log: log, serveShare: share.Run, startPorts: startPorts, anchors: anchorDirs, onIdle: onIdle, distros: map[string]*distro{}, locks: &locks{byName: map[string]lock{}}, book: book}
}

// errClosing says that the Manager starts nothing any more: the next service does.
var errClosing = api.Errorf(api.CodeVM, "run the command again", "wsl2 was shut down meanwhile")

// Refuse makes the Manager start nothing any more. What runs is not touched.
func (m *Manager) Refuse() {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.closing = true
}

// Open starts what is needed for a session in a distro and returns its lease;
// the holder releases it. ctx ends the wait, not the start.
func (m *Manager) Open(ctx context.Context, spec DistroSpec, options api.VMOptions, ended func(error)) (*Lease, Session, error) {
	for {
		m.mu.Lock()
		if m.closing {
			m.mu.Unlock()
			return nil, Session{}, errClosing
		}
		// Whoever locks it looks for it afterwards, with mu held.
		if err := m.locks.refuse(spec.key()); err != nil {
			m.mu.Unlock()
			return nil, Session{}, err
		}
		d := m.distros[spec.key()]
		var ending chan struct{}
		switch {
		case d == nil:
		case d.state == api.StateStopping:
			ending = d.settled
		case d.state == api.StateRunning && d.vm.stopping:
			ending = d.vm.gone
		}
		if ending != nil {
			m.mu.Unlock()
			select {
			case <-ending:
				continue
			case <-ctx.Done():
				return nil, Session{}, context.Cause(ctx)
			}
		}
		if d != nil && d.vm != nil {
			if err := d.vm.conflict(options); err != nil {
				m.mu.Unlock()
				return nil, Session{}, err
			}
		}
		starter := d == nil
		if starter {
			d = &distro{spec: spec, state: api.StateStarting, up: make(chan struct{}), slot: -1, leases: map[*Lease]struct{}{}}
			m.distros[spec.key()] = d
			m.wg.Go(func() { m.start(d, options) })
		}
		lease := &Lease{m: m, d: d, ended: ended}
		d.leases[lease] = struct{}{}
		stopTimer(&d.timer)
		m.mu.Unlock()

		select {
		case <-d.up:
		default:
			select {
			case <-d.up:
			case <-ctx.Done():
				lease.Release()
				return nil, Session{}, context.Cause(ctx)
			}
		}
		if d.err != nil {
			return nil, Session{}, d.err
		}
		s := Session{VsockPath: d.vm.machine.Info().VsockPath, Port: d.port, Shares: shareTable(d.shares), Proxy: d.vm.settings.Network.Proxied() && d.network != config.NoNetwork}
		if starter {
			s.Notices = append(append(m.startNotices(d.vm), d.repaired...), d.warnings...)
		}
		if d.readOnly != "" {
			s.Notices = append(s.Notices, d.readOnly)
		}
		if n := m.diskNotice(d); n != "" {
			s.Notices = append(s.Notices, n)
		}
		return lease, s, nil
	}
}

// Release ends the lease. The last one arms the idle timer.
func (l *Lease) Release() {
	l.m.mu.Lock()
	defer l.m.mu.Unlock()
	if _, held := l.d.leases[l]; !held {
		return
	}
	delete(l.d.leases, l)
	l.d.isQuieter()
	l.m.armDistro(l.d)
}

func stopTimer(t **time.Timer) {
	if *t != nil {
		(*t).Stop()
		*t = nil
	}
}

// checkIdle reports when nothing is left. Preconditions: m.mu is held.
func (m *Manager) checkIdle() {
	if m.vm == nil && len(m.distros) == 0 && m.onIdle != nil {
		m.onIdle()
	}
}

// Idle tells whether neither VM nor distros are left.
func (m *Manager) Idle() bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.vm == nil && len(m.distros) == 0
}

// Shutdown stops all distros and the VM, with force without asking the guest,
// and returns when it is gone.
func (m *Manager) Shutdown(force bool) {
	m.mu.Lock()
	v := m.vm
	m.mu.Unlock()
	if v == nil {
		return
	}
	if force {
		v.abort(api.Errorf(api.CodeVM, "", "the VM was shut down while it started"))
	}
	<-v.up
	if v.err == nil {
		m.shutdownVM(v, force)
	}
}

// TryStopIdle stops everything if nothing is in use: no leases, no processes,
// no imports. It tells whether all is stopped; then nothing is started any more.
func (m *Manager) TryStopIdle() bool {
	m.mu.Lock()
	v := m.vm
	if v == nil && len(m.distros) == 0 {
		m.closing = true
		m.mu.Unlock()
		return true
	}
	if v == nil || v.machine == nil || v.stopping {
		m.mu.Unlock()
		return false
	}
	var idle []*distro
	for _, d := range m.distros {
		if d.state != api.StateRunning || len(d.leases) > 0 {
			m.mu.Unlock()
			return false
		}
		idle = append(idle, d)
	}
	if v.users > len(idle) {
		m.mu.Unlock()
		return false // an import
	}
	for _, d := range idle {
		stopTimer(&d.timer)
		d.state, d.settled, d.idleSeen = api.StateStopping, make(chan struct{}), false
	}
	m.mu.Unlock()
	ctx, cancel := context.WithTimeout(context.Background(), killAfter)
	defer cancel()
	all := true
	for _, d := range idle {
		all = m.finishStop(ctx, d, stopIdle) == nil && all
	}
	m.mu.Lock()
	all = all && v.users == 0 && !v.stopping
	if all {
		v.stopping, m.closing = true, true
		stopTimer(&v.timer)
	}
	m.mu.Unlock()
	if all {
		m.powerOff(v)
	}
	return all
}

// Close ends everything and waits for the Manager's goroutines.
func (m *Manager) Close() {
	m.Refuse()
	m.Shutdown(false)
	m.wg.Wait()
}

// RunState is a distro's state for lists.
type RunState struct {
	State    string
	Sessions int
}

// States returns the distros that are not stopped, by folded name.
func (m *Manager) States() map[string]RunState {
	m.mu.Lock()
	defer m.mu.Unlock()
	states := make(map[string]RunState, len(m.distros))
	for key, d := range m.distros {
		states[key] = RunState{d.state, len(d.leases)}
	}
	return states
}

// VM describes the running VM, nil if there is none.
func (m *Manager) VM() *api.VM {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.vm == nil || m.vm.machine == nil {
		return nil
	}
	info := m.vm.machine.Info().VM
	return &info
}
