package service

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/wsl2/wsl2/internal/wire"
	"github.com/wsl2/wsl2/launcher/api"
	"github.com/wsl2/wsl2/launcher/config"
)

// Machine is a VM that has booted: its process and its guest's PID 1.
// Implementations are safe for concurrent use. After Done every method fails.
type Machine interface {
	// Attach gives the VM a disk and returns its block slot.
	Attach(ctx context.Context, path string) (slot int, err error)
	// Detach takes it away; the guest has unmounted it.
	Detach(ctx context.Context, slot int) error
	// StartDistro, StopDistro and Import are wire's requests of these names; a
	// refusal is a *GuestError. Import calls ready with the port that waits
	// for the archive.
	StartDistro(ctx context.Context, r wire.StartDistro) (port uint32, err error)
	StopDistro(ctx context.Context, r wire.StopDistro) error
	Import(ctx context.Context, r wire.Import, ready func(port uint32)) error
	// Shutdown asks the guest to power off; Done tells when it has.
	Shutdown(grace time.Duration) error
	// Kill ends the VM without asking the guest.
	Kill()
	// Done is closed once the VM's process has ended and holds no disk any more.
	Done() <-chan struct{}
	// Exit says how it ended, after Done; nil if the guest powered off.
	Exit() error
	// Info describes the VM.
	Info() MachineInfo
}

// MachineInfo describes a booted VM.
type MachineInfo struct {
	api.VM
	VsockPath string
}

// BootRequest is what a VM is started with.
type BootRequest struct {
	Settings config.Settings
	// Disk is attached from the start, as slot 0; "" for none.
	Disk string
	// Events from the guest. They are called one at a time and must not block.
	DistroExited func(name, text string)
	DistroIdle   func(name string)
	// DiskError is told that the host could not read or write a disk's file.
	DiskError func(slot int, err error)
}

// BootFunc starts a VM and returns once its guest is ready. ctx bounds the
// start only. On an error nothing is left running.
type BootFunc func(ctx context.Context, r BootRequest) (Machine, error)

// GuestError is a request that the guest refused.
type GuestError struct {
	Code wire.Code
	Text string
}

func (e *GuestError) Error() string { return "the guest reports: " + e.Text }

// stopGrace is what processes get between SIGTERM and SIGKILL; killAfter bounds
// the whole of a VM's clean stop, like WSL's.
const (
	stopGrace = 5 * time.Second
	killAfter = 30 * time.Second
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
	// onIdle is called with mu held when neither VM nor distros are left; it
	// must not block or call back.
	onIdle func()

	mu      sync.Mutex
	vm      *vm                // nil while there is none; guarded by mu
	distros map[string]*distro // those that are not stopped, by folded name; guarded by mu
	locked  map[string]string  // distros that may not start and why, by folded name; guarded by mu
	closing bool               // nothing is started any more; guarded by mu
	wg      sync.WaitGroup     // the goroutines below; Close waits
}

// vm is one life of the VM. Its fields are guarded by Manager.mu, but for up,
// gone and what is set before they are closed.
type vm struct {
	options  api.VMOptions
	booting  context.Context // ends when abort is called
	abort    context.CancelCauseFunc
	settings config.Settings
	warnings []string
	up       chan struct{} // closed when the start is over; then machine or err is set
	machine  Machine
	err      error
	gone     chan struct{} // closed when all is over
	users    int           // distros and imports
	stopping bool
	timer    *time.Timer // idle, nil if not armed
	bootDisk string
}

// distro is one life of a distro.
type distro struct {
	spec     DistroSpec
	vm       *vm
	slot     int
	port     uint32
	state    string        // api.StateStarting, StateRunning, StateStopping
	up       chan struct{} // closed when the start is over; then err is set or nil
	err      error
	settled  chan struct{} // closed when a stop is over, which may leave it running
	leases   map[*Lease]struct{}
	timer    *time.Timer
	idleSeen bool    // a DistroIdle came while it was being stopped
	diskErr  error   // the host's file of its disk failed; the guest may have made it read-only
	exited   *string // how its init ended before the start was over, nil if it did not
}

// DistroSpec names what is to run.
type DistroSpec struct {
	Name string
	Disk string // "" for the system distro
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
	// Notices are for the user whose command started the VM.
	Notices []string
}

// NewManager returns a Manager without a VM. settings is called at each start
// of a VM.
func NewManager(boot BootFunc, settings func() (config.Settings, []string), log *slog.Logger, onIdle func()) *Manager {
	return &Manager{boot: boot, settings: settings, log: log, onIdle: onIdle, distros: map[string]*distro{}, locked: map[string]string{}}
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
		if why := m.locked[spec.key()]; why != "" {
			m.mu.Unlock()
			return nil, Session{}, api.Errorf(api.CodeBusy, "try again when that is done", "%s is %s", spec.Name, why)
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
		s := Session{VsockPath: d.vm.machine.Info().VsockPath, Port: d.port}
		if starter {
			s.Notices = m.startNotices(d.vm)
		}
		if n := m.diskNotice(d); n != "" {
			s.Notices = append(s.Notices, n)
		}
		return lease, s, nil
	}
}

// diskNotice tells what the guest only knows as an I/O error.
func (m *Manager) diskNotice(d *distro) string {
	m.mu.Lock()
	defer m.mu.Unlock()
	if d.diskErr == nil {
		return ""
	}
	next := "its file system may be read-only now"
	// The error's type was lost on its way from the VM's process.
	if strings.Contains(d.diskErr.Error(), syscall.ENOSPC.Error()) {
		next = "the host is full: make room there"
	}
	return fmt.Sprintf("the disk of %s failed: %v; %s, then run: wsl2 --shutdown", d.spec.Name, d.diskErr, next)
}

// diskError notes the error for the distro's next sessions.
func (m *Manager) diskError(v *vm, slot int, err error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	for _, d := range m.distros {
		if d.vm == v && d.state == api.StateRunning && d.slot == slot && d.spec.Disk != "" {
			d.diskErr = err
		}
	}
}

// startNotices returns the notices of the VM's start, once.
func (m *Manager) startNotices(v *vm) []string {
	m.mu.Lock()
	defer m.mu.Unlock()
	n := v.warnings
	v.warnings = nil
	return n
}

// Release ends the lease. The last one arms the idle timer.
func (l *Lease) Release() {
	l.m.mu.Lock()
	defer l.m.mu.Unlock()
	if _, held := l.d.leases[l]; !held {
		return
	}
	delete(l.d.leases, l)
	l.m.armDistro(l.d)
}

// armDistro starts the idle timer of a running distro without leases.
// Preconditions: m.mu is held.
func (m *Manager) armDistro(d *distro) {
	if d.state != api.StateRunning || len(d.leases) > 0 || m.distros[d.spec.key()] != d {
		return
	}
	stopTimer(&d.timer)
	after := d.vm.settings.InstanceIdleTimeout
	if after < 0 {
		return
	}
	var t *time.Timer
	t = time.AfterFunc(after, func() {
		m.mu.Lock()
		// A timer that was stopped too late must not stop a distro in use.
		if d.timer != t || d.state != api.StateRunning || len(d.leases) > 0 {
			m.mu.Unlock()
			return
		}
		d.timer = nil
		d.state, d.settled, d.idleSeen = api.StateStopping, make(chan struct{}), false
		m.wg.Add(1)
		m.mu.Unlock()
		defer m.wg.Done()
		ctx, cancel := context.WithTimeout(context.Background(), killAfter)
		defer cancel()
		m.finishStop(ctx, d, stopIdle)
	})
	d.timer = t
}

func stopTimer(t **time.Timer) {
	if *t != nil {
		(*t).Stop()
		*t = nil
	}
}

// start brings a distro up. It owns d's fields until it closes d.up.
func (m *Manager) start(d *distro, options api.VMOptions) {
	err := m.startOn(d, options)
	m.mu.Lock()
	defer m.mu.Unlock()
	d.err = err
	if err != nil {
		delete(m.distros, d.spec.key())
		d.leases = map[*Lease]struct{}{}
		m.log.Info("distro did not start", "distro", d.spec.Name, "err", err)
	} else {
		d.state = api.StateRunning
		if d.exited != nil {
			m.cleanUpExited(d, *d.exited)
		} else {
			m.armDistro(d) // its client may have gone meanwhile
		}
	}
	close(d.up)
	if err != nil {
		m.checkIdle()
	}
}

func (m *Manager) startOn(d *distro, options api.VMOptions) error {
	v, bootSlot, err := m.acquireVM(context.Background(), options, d.spec.Disk)
	if err != nil {
		return err
	}
	m.mu.Lock()
	d.vm = v
	m.mu.Unlock()
	ctx, cancel := within(context.Background(), v.settings.DistroStartTimeout, "distro "+d.spec.Name+" did not start")
	defer cancel()
	asked := false // the guest, to start it
	fail := func(err error) error {
		if ctx.Err() != nil {
			err = context.Cause(ctx)
		}
		err = m.explain(v, d.spec.Name, err)
		m.undoStart(v, d, asked)
		m.releaseVM(v)
		return err
	}
	slot := wire.SystemSlot
	if d.spec.Disk != "" {
		if d.slot = bootSlot; bootSlot < 0 {
			if d.slot, err = v.machine.Attach(ctx, d.spec.Disk); err != nil {
				d.slot = -1
				return fail(err)
			}
		}
		slot = d.slot
	}
	asked = true
	d.port, err = v.machine.StartDistro(ctx, wire.StartDistro{Name: d.spec.Name, Slot: int32(slot), Hostname: hostname()})
	if err != nil {
		return fail(err)
	}
	return nil
}

// undoStart takes the disk back from a start that failed. A guest that was asked
// to start may still be at it, if it did not answer in time: it is told to stop
// first, and if it does not, only the VM's end makes the disk free.
func (m *Manager) undoStart(v *vm, d *distro, asked bool) {
	ctx, cancel := context.WithTimeout(context.Background(), killAfter)
	defer cancel()
	var err error
	var refused *GuestError
	if asked {
		err = v.machine.StopDistro(ctx, wire.StopDistro{Name: d.spec.Name})
		if errors.As(err, &refused) && refused.Code == wire.CodeUnknownDistro {
			err = nil
		}
	}
	if err == nil && d.slot >= 0 {
		err = v.machine.Detach(ctx, d.slot)
	}
	if err == nil {
		return
	}
	select {
	case <-v.machine.Done():
	default:
		m.log.Warn("start not undone", "distro", d.spec.Name, "err", err)
		m.shutdownVM(v, false)
	}
}

// within bounds ctx by d unless d is negative; what names the failure.
func within(ctx context.Context, d time.Duration, what string) (context.Context, context.CancelFunc) {
	if d < 0 {
		return context.WithCancel(ctx)
	}
	return context.WithTimeoutCause(ctx, d, fmt.Errorf("%s within %v", what, d))
}

// explain turns an error met while talking to the guest into what is to be
// told: if the VM has ended, or ends because of it, how it ended.
func (m *Manager) explain(v *vm, name string, err error) error {
	var refused *GuestError
	if errors.As(err, &refused) {
		return guestFailure(name, refused)
	}
	if errors.Is(err, errControlLost) {
		<-v.machine.Done() // lostControl kills it if it does not end by itself
	}
	select {
	case <-v.machine.Done():
		return vmFailure(v.machine.Exit())
	default:
		return err
	}
}

// vmFailure says that the VM ended.
func vmFailure(exit error) *api.Error {
	if exit == nil {
		return api.Errorf(api.CodeVM, "run the command again to start it anew", "the VM has powered off")
	}
	return api.Errorf(api.CodeVM, "run the command again to start a new VM", "the VM ended: %v", exit)
}

// guestFailure maps a refusal of the guest to words and the next step.
func guestFailure(name string, e *GuestError) *api.Error {
	switch e.Code {
	case wire.CodeDisk:
		return api.Errorf(api.CodeFailed, "`fsck.ext4 -f` on its disk may repair it (wsl2 --list --json shows the path), after wsl2 --shutdown",
			"the disk of %s cannot be mounted: %s", name, e.Text)
	case wire.CodeNoSpace:
		return api.Errorf(api.CodeNoSpace, "free some space on the host", "no space left: %s", e.Text)
	case wire.CodeArchive:
		return api.Errorf(api.CodeArchive, "check the file (tar -tf FILE)", "the archive cannot be unpacked: %s", e.Text)
	case wire.CodeNoShell:
		return api.Errorf(api.CodeArchive, "give an archive of a distro's root directory", "the archive is not that of a Linux distro: %s", e.Text)
	case wire.CodeVersion:
		return api.Errorf(api.CodeVersion, "", "%s", e.Text)
	case wire.CodeBusy:
		return api.Errorf(api.CodeBusy, "try again when it is done", "%s is busy: %s", name, e.Text)
	}
	return api.Errorf(api.CodeFailed, "wsl2 doctor may tell more", "%s: %s", name, e.Text)
}

// conflict refuses options that the running VM does not have.
func (v *vm) conflict(o api.VMOptions) error {
	switch {
	case o.Accel != "" && o.Accel != v.options.Accel:
		return api.Errorf(api.CodeVMOptions, "run `wsl2 --shutdown` first", "the VM already runs, and not with --accel %s", o.Accel)
	case o.Kernel != "" && o.Kernel != v.options.Kernel:
		return api.Errorf(api.CodeVMOptions, "run `wsl2 --shutdown` first", "the VM already runs, and not with --kernel %s", o.Kernel)
	}
	return nil
}

// acquireVM returns the running VM with one more user, starting it if there is
// none. If this call started it, disk is attached already and its slot is returned,
// else -1.
func (m *Manager) acquireVM(ctx context.Context, o api.VMOptions, disk string) (*vm, int, error) {
	for {
		m.mu.Lock()
		v, slot := m.vm, -1
		if v == nil && m.closing {
			m.mu.Unlock()
			return nil, -1, errClosing
		} else if v == nil {
			v = &vm{options: o, up: make(chan struct{}), gone: make(chan struct{}), bootDisk: disk}
			v.booting, v.abort = context.WithCancelCause(context.Background())
			m.vm = v
			if disk != "" {
				slot = 0
			}
			m.wg.Go(func() { m.bootVM(v) })
		} else if v.stopping {
			m.mu.Unlock()
			select {
			case <-v.gone:
				continue
			case <-ctx.Done():
				return nil, -1, context.Cause(ctx)
			}
		} else if err := v.conflict(o); err != nil {
			m.mu.Unlock()
			return nil, -1, err
		}
		v.users++
		stopTimer(&v.timer)
		m.mu.Unlock()
		select {
		case <-v.up:
		case <-ctx.Done():
			m.releaseVM(v)
			return nil, -1, context.Cause(ctx)
		}
		if v.err != nil {
			return nil, -1, v.err
		}
		return v, slot, nil
	}
}

// releaseVM gives up a use of the VM; the last arms its idle timer.
func (m *Manager) releaseVM(v *vm) {
	m.mu.Lock()
	defer m.mu.Unlock()
	v.users--
	m.armVM(v)
}

// armVM starts the idle timer of a VM without users. Preconditions: m.mu is held.
func (m *Manager) armVM(v *vm) {
	if v.users > 0 || v.stopping || m.vm != v || v.machine == nil {
		return
	}
	stopTimer(&v.timer)
	after := v.settings.VMIdleTimeout
	if after < 0 {
		return
	}
	var t *time.Timer
	t = time.AfterFunc(after, func() {
		m.mu.Lock()
		if v.timer != t || v.users > 0 || v.stopping || m.vm != v {
			m.mu.Unlock()
			return
		}
		v.timer, v.stopping = nil, true
		m.wg.Add(1)
		m.mu.Unlock()
		defer m.wg.Done()
		m.powerOff(v)
	})
	v.timer = t
}

// bootVM starts the VM's process and guest.
func (m *Manager) bootVM(v *vm) {
	var warnings []string
	v.settings, warnings = m.settings()
	if v.options.Accel != "" {
		v.settings.Accel = v.options.Accel
	}
	if v.options.Kernel != "" {
		v.settings.Kernel = v.options.Kernel
	}
	ctx, cancel := within(v.booting, v.settings.BootTimeout, "the VM's guest was not ready")
	defer cancel()
	machine, err := m.boot(ctx, BootRequest{
		Settings: v.settings, Disk: v.bootDisk,
		DistroExited: func(name, text string) { m.distroExited(v, name, text) },
		DistroIdle:   func(name string) { m.distroIdle(v, name) },
		DiskError:    func(slot int, err error) { m.diskError(v, slot, err) },
	})
	m.mu.Lock()
	defer m.mu.Unlock()
	if err != nil {
		m.log.Warn("VM did not start", "err", err)
		v.err = err
		if m.vm == v {
			m.vm = nil
		}
		close(v.up)
		close(v.gone)
		m.checkIdle()
		return
	}
	v.machine = machine
	info := machine.Info()
	if info.Accel == "tcg" && info.AccelReason != "" {
		warnings = append([]string{fmt.Sprintf("KVM unusable: %s; using QEMU TCG (slow)", info.AccelReason)}, warnings...)
	}
	v.warnings = warnings
	m.log.Info("VM is up", "pid", info.PID, "accel", info.Accel, "kernel", info.KernelRelease, "boot_ms", info.BootMillis)
	m.wg.Go(func() { m.watch(v) })
	m.armVM(v)
	close(v.up)
}

// watch cleans up when the VM ends, wanted or not.
func (m *Manager) watch(v *vm) {
	<-v.machine.Done()
	exit := v.machine.Exit()
	m.mu.Lock()
	if m.vm == v {
		m.vm = nil
	}
	stopTimer(&v.timer)
	level, failure := slog.LevelInfo, vmFailure(exit)
	if exit != nil {
		level = slog.LevelError
	}
	m.log.Log(context.Background(), level, "VM has ended", "exit", exit)
	var ended []func(error)
	for key, d := range m.distros {
		// One that is starting or stopping is cleaned up by who does that.
		if d.vm == v && d.state == api.StateRunning {
			delete(m.distros, key)
			ended = append(ended, m.dropLeases(d)...)
		}
	}
	close(v.gone)
	m.checkIdle()
	m.mu.Unlock()
	for _, f := range ended {
		f(failure)
	}
}

// dropLeases takes all leases from a distro that is gone and returns what is
// to be called without the lock. Preconditions: m.mu is held.
func (m *Manager) dropLeases(d *distro) (ended []func(error)) {
	stopTimer(&d.timer)
	for l := range d.leases {
		ended = append(ended, l.ended)
	}
	d.leases = map[*Lease]struct{}{}
	d.state = api.StateStopped
	return ended
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

// distroIdle handles the guest's event.
func (m *Manager) distroIdle(v *vm, name string) {
	m.mu.Lock()
	defer m.mu.Unlock()
	d := m.distros[strings.ToLower(name)]
	if d == nil || d.vm != v {
		return
	}
	d.idleSeen = true
	m.armDistro(d)
}

// distroExited handles the guest's event: the distro's init has ended by itself.
func (m *Manager) distroExited(v *vm, name, text string) {
	m.mu.Lock()
	defer m.mu.Unlock()
	d := m.distros[strings.ToLower(name)]
	switch {
	case d == nil || d.vm != v:
	case d.state == api.StateStarting:
		d.exited = &text // the answer to its start is still being handled
	case d.state == api.StateRunning:
		m.cleanUpExited(d, text)
	}
}

// cleanUpExited frees what a running distro had whose init has ended.
// Preconditions: m.mu is held.
func (m *Manager) cleanUpExited(d *distro, text string) {
	d.settled = make(chan struct{})
	ended := m.dropLeases(d)
	d.state = api.StateStopping
	m.wg.Go(func() {
		for _, f := range ended {
			f(api.Errorf(api.CodeFailed, "run the command again to start it anew", "distro %s has ended: %s", d.spec.Name, text))
		}
		ctx, cancel := context.WithTimeout(context.Background(), killAfter)
		defer cancel()
		// The guest answers once the disk is unmounted.
		m.finishStop(ctx, d, stopExited)
	})
}

// stopKind is why a distro is stopped.
type stopKind int

const (
	stopIdle   stopKind = iota // nobody uses it: the guest may refuse, and it runs on
	stopAsked                  // the user says so
	stopExited                 // its init has ended: what is left is to unmount
)

// finishStop stops a distro in StateStopping. After an error it runs on.
func (m *Manager) finishStop(ctx context.Context, d *distro, kind stopKind) error {
	v := d.vm
	err := v.machine.StopDistro(ctx, wire.StopDistro{Name: d.spec.Name, IfIdle: kind == stopIdle, GraceMillis: uint32(stopGrace.Milliseconds())})
	var refused *GuestError
	if errors.As(err, &refused) && refused.Code == wire.CodeUnknownDistro {
		err, refused = nil, nil // its init has ended by itself, and with it its mounts
	}
	if refused != nil && kind != stopExited {
		m.mu.Lock()
		defer m.mu.Unlock()
		d.state = api.StateRunning
		if d.idleSeen || refused.Code != wire.CodeBusy { // idle by now, or worth another try
			m.armDistro(d)
		}
		close(d.settled)
		if refused.Code != wire.CodeBusy {
			m.log.Warn("distro not stopped", "distro", d.spec.Name, "err", err)
		}
		return api.Errorf(api.CodeFailed, "`wsl2 --shutdown` stops the whole VM", "%s cannot be stopped: %s", d.spec.Name, refused.Text)
	}
	if err == nil && d.slot >= 0 {
		if err = v.machine.Detach(ctx, d.slot); err != nil {
			err = fmt.Errorf("detach its disk: %w", err)
		}
	}
	if err != nil {
		m.log.Warn("distro not stopped cleanly", "distro", d.spec.Name, "err", err)
		// Its disk may still be in use there: only the VM's end makes it free.
		select {
		case <-v.machine.Done():
		default:
			m.shutdownVM(v, false)
		}
	}
	m.mu.Lock()
	delete(m.distros, d.spec.key())
	ended := m.dropLeases(d)
	close(d.settled)
	m.checkIdle()
	m.mu.Unlock()
	for _, f := range ended {
		f(api.Errorf(api.CodeFailed, "", "distro %s was terminated", d.spec.Name))
	}
	m.releaseVM(v)
	return nil
}

// Terminate stops a distro with whatever runs in it. It is not an error if it
// does not run.
func (m *Manager) Terminate(ctx context.Context, name string) error {
	for {
		m.mu.Lock()
		d := m.distros[strings.ToLower(name)]
		if d == nil {
			m.mu.Unlock()
			return nil
		}
		var wait chan struct{}
		switch d.state {
		case api.StateStarting:
			wait = d.up
		case api.StateStopping:
			wait = d.settled
		default:
			stopTimer(&d.timer)
			d.state, d.settled = api.StateStopping, make(chan struct{})
			m.mu.Unlock()
			stop, cancel := context.WithTimeout(context.WithoutCancel(ctx), killAfter)
			defer cancel()
			return m.finishStop(stop, d, stopAsked)
		}
		m.mu.Unlock()
		select {
		case <-wait:
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
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

func (m *Manager) shutdownVM(v *vm, force bool) {
	m.mu.Lock()
	first := !v.stopping
	v.stopping = true
	stopTimer(&v.timer)
	m.mu.Unlock()
	switch {
	case force:
		v.machine.Kill()
	case first:
		m.powerOff(v)
	}
	<-v.gone
}

// powerOff lets the guest end the VM and kills it if it does not.
func (m *Manager) powerOff(v *vm) {
	err := v.machine.Shutdown(stopGrace)
	t := time.NewTimer(killAfter)
	defer t.Stop()
	if err == nil {
		select {
		case <-v.machine.Done():
		case <-t.C:
			err = fmt.Errorf("it did not power off within %v", killAfter)
		}
	}
	if err != nil {
		m.log.Warn("VM is killed", "err", err)
		v.machine.Kill()
	}
	<-v.gone
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

// Lock keeps the named distro from starting until Unlock; why is told to who
// tries. It fails if it is locked already.
func (m *Manager) Lock(name, why string) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	key := strings.ToLower(name)
	if now := m.locked[key]; now != "" {
		return api.Errorf(api.CodeBusy, "try again when that is done", "%s is %s", name, now)
	}
	m.locked[key] = why
	return nil
}

// Unlock ends Lock.
func (m *Manager) Unlock(name string) {
	m.mu.Lock()
	defer m.mu.Unlock()
	delete(m.locked, strings.ToLower(name))
}

// Import unpacks an archive onto the empty disk: it starts the VM if need be,
// attaches the disk, calls ready with where to send the archive, and returns
// when the guest is done with it. The disk is detached in any case.
func (m *Manager) Import(ctx context.Context, name, disk string, archive wire.SessionID, o api.VMOptions, ready func(s Session)) error {
	v, slot, err := m.acquireVM(ctx, o, disk)
	if err != nil {
		return err
	}
	defer m.releaseVM(v)
	machine := v.machine
	if slot < 0 {
		if slot, err = machine.Attach(ctx, disk); err != nil {
			return m.explain(v, name, err)
		}
	}
	err = machine.Import(ctx, wire.Import{Slot: int32(slot), Archive: archive}, func(port uint32) {
		ready(Session{VsockPath: machine.Info().VsockPath, Port: port, Notices: m.startNotices(v)})
	})
	if err != nil {
		err = m.explain(v, name, err)
	}
	detach, cancel := context.WithTimeout(context.WithoutCancel(ctx), killAfter)
	defer cancel()
	if derr := machine.Detach(detach, slot); derr != nil {
		select {
		case <-machine.Done():
		default:
			m.log.Warn("disk not detached", "disk", disk, "err", derr)
			m.shutdownVM(v, false)
		}
		if err == nil {
			err = m.explain(v, name, derr)
		}
	}
	return err
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
