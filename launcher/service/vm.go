package service

import (
	"context"
	"fmt"
	"log/slog"
	"time"

	"github.com/wsl2/wsl2/internal/wire"
	"github.com/wsl2/wsl2/launcher/api"
	"github.com/wsl2/wsl2/launcher/config"
)

// This file is the life of the VM: boot, users, idle stop, end.

// Machine is a VM that has booted: its process and its guest's PID 1.
// Implementations are safe for concurrent use. After Done every method fails.
type Machine interface {
	// Attach gives the VM a disk and returns its block slot.
	Attach(ctx context.Context, path string) (slot int, err error)
	// Detach takes it away; the guest has unmounted it.
	Detach(ctx context.Context, slot int) error
	// ShareDevice takes a virtio-fs device that no share has, which the guest mounts by tag and
	// whose server connects to socket.
	ShareDevice(ctx context.Context) (tag, socket string, err error)
	// StartDistro, StopDistro and Import are wire's requests of these names; a
	// refusal is a *GuestError. Import calls ready with the port that waits
	// for the archive.
	StartDistro(ctx context.Context, r wire.StartDistro) (port uint32, warnings string, err error)
	StopDistro(ctx context.Context, r wire.StopDistro) error
	// text is the distro's wsl-distribution.conf.
	Import(ctx context.Context, r wire.Import, ready func(port uint32)) (text string, err error)
	// Export and Maintain are the same, text being what Maintain has to tell.
	Export(ctx context.Context, r wire.Export, ready func(port uint32)) error
	Maintain(ctx context.Context, r wire.Maintain, ready func(port uint32)) (text string, err error)
	// MountDisk and ReleaseDisk are for the disks that distros share.
	MountDisk(ctx context.Context, r wire.MountDisk) (at string, err error)
	ReleaseDisk(ctx context.Context, slot int) error
	// WatchPorts asks the guest to tell what ports are open (BootRequest.PortsOpen).
	WatchPorts() error
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
	NamesPath string   // where its network looks for names of distros; "" if it has none
	Warnings  []string // of its start
}

// BootRequest is what a VM is started with.
type BootRequest struct {
	Settings config.Settings
	// Own is the ID of the distro whose own VM it is, "" for the shared one.
	Own string
	// Disk is attached from the start, as slot 0; "" for none.
	Disk string
	// Events from the guest. They are called one at a time and must not block.
	DistroExited func(name, text string)
	DistroIdle   func(name string)
	// HostExec asks for a program of the host, for a process whose client is gone.
	HostExec func(distro string, id wire.SessionID)
	// MountShare asks for a directory of the host.
	MountShare func(*wire.MountShare)
	// PortsOpen tells all ports that distros serve.
	PortsOpen func([]wire.Port)
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
	held     heldDisks
	// slots of the shared disks, by path; guarded by Manager.shared.mu.
	slots map[string]int
	// full are the slots whose disk met a full host; guarded by Manager.mu.
	full  map[int]bool
	ports vmPorts
	names string // what NamesPath says
}

// startNotices returns the notices of the VM's start, once.
func (m *Manager) startNotices(v *vm) []string {
	m.mu.Lock()
	defer m.mu.Unlock()
	n := v.warnings
	v.warnings = nil
	return n
}

// within bounds ctx by d unless d is negative; what names the failure.
func within(ctx context.Context, d time.Duration, what string) (context.Context, context.CancelFunc) {
	if d < 0 {
		return context.WithCancel(ctx)
	}
	return context.WithTimeoutCause(ctx, d, fmt.Errorf("%s within %v", what, d))
}

// vmFailure says that the VM ended.
func vmFailure(exit error) *api.Error {
	if exit == nil {
		return api.Errorf(api.CodeVM, "run the command again to start it anew", "the VM has powered off")
	}
	return api.Errorf(api.CodeVM, "run the command again to start a new VM", "the VM ended: %v", exit)
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
			v = &vm{options: o, up: make(chan struct{}), gone: make(chan struct{}), bootDisk: disk, slots: map[string]int{}, full: map[int]bool{}}
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
		HostExec:     func(name string, id wire.SessionID) { m.hostExec(v, name, id) },
		MountShare:   func(r *wire.MountShare) { m.mountShare(v, r) },
		PortsOpen:    func(list []wire.Port) { m.portsOpen(v, list) },
	})
	if err == nil {
		warnings = append(warnings, m.remount(ctx, machine, v.slots)...)
	}
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
		warnings = append([]string{fmt.Sprintf("KVM unusable: %s; using QEMU TCG (slow); a distro of version 1 needs no VM: wsl2 --set-version NAME 1", info.AccelReason)}, warnings...)
	}
	v.warnings = append(warnings, info.Warnings...)
	if info.PID != 0 { // version 1 has none
		m.log.Info("VM is up", "pid", info.PID, "accel", info.Accel, "kernel", info.KernelRelease, "boot_ms", info.BootMillis)
	}
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
	if v.machine.Info().PID == 0 {
		level = slog.LevelDebug
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
