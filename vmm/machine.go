// Package vmm runs a Linux guest in a virtual machine: a kernel, an initramfs,
// disks that come and go, and vsock. It knows nothing of what the guest does.
//
// A Machine is made of devices (vmm/virtio/...), which are the same everywhere,
// and of an engine that gives them processors and memory: vmm/microvm on KVM, or
// vmm/qemu where the host's KVM cannot run a guest.
//
//	m, err := vmm.New(vmm.Config{Kernel: "vmlinux", MemoryBytes: 1 << 30, CPUs: 2})
//	err = m.Start(ctx)
//	exit, err := m.Wait(ctx)
package vmm

import (
	"context"
	"errors"
	"fmt"
	"os"
	"sync"

	"github.com/wsl2/wsl2/vmm/engine"
	"github.com/wsl2/wsl2/vmm/kvm"
	"github.com/wsl2/wsl2/vmm/logtail"
	"github.com/wsl2/wsl2/vmm/microvm"
	"github.com/wsl2/wsl2/vmm/qemu"
	"github.com/wsl2/wsl2/vmm/virtio"
	"github.com/wsl2/wsl2/vmm/virtio/blk"
	"github.com/wsl2/wsl2/vmm/virtio/fs"
	"github.com/wsl2/wsl2/vmm/virtio/net"
	"github.com/wsl2/wsl2/vmm/virtio/rng"
	"github.com/wsl2/wsl2/vmm/virtio/vsock"
)

// Errors that callers decide on.
var (
	// ErrNotRunning: the machine has not started or has ended.
	ErrNotRunning = errors.New("the VM is not running")
	// ErrNoSlot: every disk slot is in use.
	ErrNoSlot = errors.New("every disk slot of the VM is in use")
)

// How much of the console is kept, and shown when the machine fails: a panic with its trace.
const (
	consoleBytes = 64 << 10
	consoleLines = 40
)

// Machine is one virtual machine, started at most once. Its methods are safe for
// concurrent use.
type Machine struct {
	cfg     Config
	console *logtail.Buffer
	done    chan struct{} // closed when the machine has ended and released everything
	exit    Exit          // immutable once done is closed

	mu     sync.Mutex
	state  state
	killed bool          // Kill was called
	engine engine.Engine // once chosen
	accel  Accel
	reason string // why not KVM
	slots  []*slot
	fs     []*fsSlot
}

type state int

const (
	stateNew state = iota
	stateStarting
	stateRunning
	stateEnded // or failed to start
)

// slot is one block device.
type slot struct {
	dev      *blk.Device
	readOnly bool
	busy     bool // a disk is attached, or being attached or detached; guarded by Machine.mu
}

// Exit is how a machine ended.
type Exit struct {
	Reason engine.Reason
	Detail string // for people; empty where Reason says all
	// Console is the end of what the kernel printed; empty after a power-off.
	Console string
}

// Err returns nil if the guest powered off, and else an error that says why the
// machine ended, without the console's lines.
func (e Exit) Err() error {
	what := ""
	switch e.Reason {
	case engine.ReasonPowerOff:
		return nil
	case engine.ReasonReset:
		what = "the guest's kernel crashed or restarted"
	case engine.ReasonFailed:
		what = "the VM failed"
	case engine.ReasonKilled:
		what = "the VM was killed"
	default:
		what = e.Reason.String()
	}
	if e.Detail != "" {
		what += ": " + e.Detail
	}
	return errors.New(what)
}

// New checks c and returns a machine that is not yet started. It holds no
// resources until then.
func New(c Config) (*Machine, error) {
	c, err := c.check()
	if err != nil {
		return nil, err
	}
	return &Machine{
		cfg:     c,
		console: logtail.New(consoleBytes, c.ConsoleLog),
		done:    make(chan struct{}),
	}, nil
}

// Start creates the machine and lets its vCPUs run; ctx bounds only Start. On an
// error nothing is left behind.
func (m *Machine) Start(ctx context.Context) error {
	m.mu.Lock()
	if m.state != stateNew {
		m.mu.Unlock()
		return errors.New("vmm: a machine is started once")
	}
	m.state = stateStarting
	m.mu.Unlock()

	parts, err := m.start(ctx)
	m.mu.Lock()
	defer m.mu.Unlock()
	if err != nil {
		m.state = stateEnded
		if cerr := parts.close(); cerr != nil {
			err = fmt.Errorf("%w; %w", err, cerr)
		}
		m.exit = Exit{Reason: engine.ReasonFailed, Detail: err.Error()}
		close(m.done)
		return err
	}
	m.state = stateRunning
	go m.reap(parts)
	if m.killed {
		m.engine.Kill()
	}
	return nil
}

// start is Start without the state; what it made is in parts, also on an error.
func (m *Machine) start(ctx context.Context) (parts *parts, err error) {
	parts, err = m.build(ctx)
	if err != nil {
		return parts, err
	}
	kernel, err := os.Open(m.cfg.Kernel)
	if err != nil {
		return parts, fmt.Errorf("vmm: kernel: %w", err)
	}
	defer kernel.Close()
	var initramfs *os.File
	if m.cfg.Initramfs != "" {
		if initramfs, err = os.Open(m.cfg.Initramfs); err != nil {
			return parts, fmt.Errorf("vmm: initramfs: %w", err)
		}
		defer initramfs.Close()
	}
	cmdline := baseCmdline
	if m.cfg.Cmdline != "" {
		cmdline += " " + m.cfg.Cmdline
	}
	late := 0
	if m.cfg.LateSlots {
		late = m.DiskSlots() - len(m.cfg.Disks) + len(parts.fs)
		if m.cfg.Network != nil {
			late++
		}
	}
	spec := engine.Spec{
		Kernel: kernel, Initramfs: initramfs, Cmdline: cmdline,
		MemoryBytes: m.cfg.MemoryBytes, CPUs: m.cfg.CPUs,
		Devices: parts.devices, Late: late, Console: m.console,
	}
	m.mu.Lock()
	accel := m.accel
	m.mu.Unlock()
	var e engine.Engine
	if accel == AccelKVM {
		e = microvm.New(spec)
	} else if e, err = qemu.New(spec, qemu.Config{}); err != nil {
		return parts, m.explain(err)
	}
	m.mu.Lock()
	m.engine = e
	killed := m.killed
	m.mu.Unlock()
	if killed {
		return parts, errors.New("vmm: killed before it started")
	}
	if err := e.Start(ctx); err != nil {
		return parts, m.explain(err)
	}
	return parts, nil
}

// explain adds to an error of TCG why it is in use.
func (m *Machine) explain(err error) error {
	if _, reason := m.Accel(); reason != "" {
		return fmt.Errorf("%w (KVM is unusable here: %s)", err, reason)
	}
	return err
}

// choose decides on the accelerator.
func (m *Machine) choose(ctx context.Context) error {
	accel, reason := m.cfg.Accel, ""
	if accel != AccelTCG {
		probe := kvm.Probe
		if m.cfg.Verdict != "" {
			probe = func(ctx context.Context) error { return kvm.ProbeOnce(ctx, m.cfg.Verdict) }
		}
		switch err := probe(ctx); {
		case err == nil:
			accel = AccelKVM
		case ctx.Err() != nil:
			return context.Cause(ctx)
		case accel == AccelKVM:
			return fmt.Errorf("vmm: %w; --accel tcg does without", err)
		default:
			accel, reason = AccelTCG, err.Error()
		}
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	m.accel, m.reason = accel, reason
	return nil
}

// parts are the devices of a machine, in the guest's order.
type parts struct {
	devices []virtio.Device
	fs      []*fs.Device // the last of devices
	closers []func() error
}

// close releases what the devices hold on the host. They are stopped.
func (p *parts) close() error {
	var errs []error
	for i := len(p.closers) - 1; i >= 0; i-- {
		errs = append(errs, p.closers[i]())
	}
	p.closers = nil
	return errors.Join(errs...)
}

// build chooses the accelerator and makes the devices.
func (m *Machine) build(ctx context.Context) (*parts, error) {
	p := &parts{}
	if err := m.choose(ctx); err != nil {
		return p, err
	}
	if m.cfg.VsockPath != "" {
		v, err := vsock.New(vsock.Config{GuestCID: m.cfg.GuestCID, Path: m.cfg.VsockPath})
		if err != nil {
			return p, fmt.Errorf("vmm: %w", err)
		}
		p.closers = append(p.closers, v.Close)
		p.devices = append(p.devices, v)
	}
	p.devices = append(p.devices, rng.New())
	n, cards, fsSlots := m.cfg.DiskSlots, 0, m.cfg.FSSlots
	if m.cfg.Network != nil {
		cards = 1
	}
	if accel, _ := m.Accel(); accel == AccelTCG {
		fsSlots = min(fsSlots, 1) // a place that disks would have
		if n = min(n, qemu.MaxDevices-len(p.devices)-cards-fsSlots); n < len(m.cfg.Disks) {
			return p, fmt.Errorf("vmm: %d disks: without KVM a VM has room for %d", len(m.cfg.Disks), n)
		}
	}
	for i := range n {
		if i == len(m.cfg.Disks) && cards > 0 {
			if err := m.addCard(p); err != nil {
				return p, err
			}
			cards = 0
		}
		s, err := m.newSlot(i)
		if err != nil {
			return p, err
		}
		p.closers = append(p.closers, s.dev.Close)
		p.devices = append(p.devices, s.dev)
		m.mu.Lock()
		m.slots = append(m.slots, s)
		m.mu.Unlock()
	}
	if cards > 0 {
		if err := m.addCard(p); err != nil {
			return p, err
		}
	}
	for i := range fsSlots {
		d := fs.New(fmt.Sprintf("wsl2fs%d", i))
		p.closers = append(p.closers, d.Close)
		p.fs, p.devices = append(p.fs, d), append(p.devices, d)
	}
	m.mu.Lock()
	m.fs = newFSSlots(p.fs, len(p.devices)-len(p.fs))
	m.mu.Unlock()
	return p, nil
}

// addCard makes the network card.
func (m *Machine) addCard(p *parts) error {
	c := m.cfg.Network
	d, err := net.New(net.Config{MAC: c.MAC, MTU: c.MTU, Open: c.Open, OnError: c.OnError})
	if err != nil {
		return fmt.Errorf("vmm: %w", err)
	}
	p.closers = append(p.closers, d.Close)
	p.devices = append(p.devices, d)
	return nil
}

// newSlot makes block device i, with its disk if one is attached from the start.
func (m *Machine) newSlot(i int) (*slot, error) {
	c := blk.Config{Serial: fmt.Sprintf("slot%d", i)}
	if f := m.cfg.OnDiskError; f != nil {
		c.OnError = func(err error) { f(i, err) }
	}
	s := &slot{}
	if i < len(m.cfg.Disks) {
		d := m.cfg.Disks[i]
		disk, err := blk.Open(d.Path, d.ReadOnly)
		if err != nil {
			return nil, fmt.Errorf("vmm: disk %d: %w", i, err)
		}
		if d.Serial != "" {
			c.Serial = d.Serial
		}
		c.Disk, c.ReadOnly = disk, d.ReadOnly
		s.readOnly, s.busy = d.ReadOnly, true
	}
	var err error
	if s.dev, err = blk.New(c); err != nil {
		if c.Disk != nil {
			err = errors.Join(err, c.Disk.Close())
		}
		return nil, fmt.Errorf("vmm: disk %d: %w", i, err)
	}
	return s, nil
}

// reap waits for the engine's end, releases the devices and settles the exit.
func (m *Machine) reap(p *parts) {
	e := m.engine.Wait()
	if e.Reason == engine.ReasonFailed && m.cfg.Verdict != "" {
		kvm.Forget(m.cfg.Verdict)
	}
	m.mu.Lock()
	m.state = stateEnded
	m.mu.Unlock()
	// AttachDisk looks at the state after it attached: no disk comes behind this.
	err := p.close()
	m.exit = Exit{Reason: e.Reason, Detail: e.Detail}
	if err != nil {
		// A disk whose last bytes could not be synced is worth a failure.
		if m.exit.Reason == engine.ReasonPowerOff {
			m.exit.Reason = engine.ReasonFailed
		}
		if m.exit.Detail != "" {
			m.exit.Detail += "; "
		}
		m.exit.Detail += err.Error()
	}
	if m.exit.Reason != engine.ReasonPowerOff {
		m.exit.Console = m.ConsoleTail()
	}
	close(m.done)
}

// Wait blocks until the machine has ended and released everything, or until ctx
// ends, whose error it returns. The machine must have been started.
func (m *Machine) Wait(ctx context.Context) (Exit, error) {
	select {
	case <-m.done:
		return m.exit, nil
	default:
	}
	select {
	case <-m.done:
		return m.exit, nil
	case <-ctx.Done():
		return Exit{}, context.Cause(ctx)
	}
}

// Done is closed when the machine has ended and released everything, also by a
// Start that failed.
func (m *Machine) Done() <-chan struct{} { return m.done }

// Kill ends the machine at once, without the guest's help: what the guest has
// not written yet is lost, as in a power failure. Wait reports the end.
func (m *Machine) Kill() {
	m.mu.Lock()
	m.killed = true
	e, running := m.engine, m.state == stateStarting || m.state == stateRunning
	m.mu.Unlock()
	if e != nil && running {
		e.Kill()
	}
}

// Stop asks the guest to power off, waits for that, and kills the machine when
// ctx ends first or if Config.Shutdown is nil. It returns nil if the guest
// powered off; all is released when it returns, whatever it returns. If asking
// fails, the guest may still be on its way down: Stop waits all the same.
func (m *Machine) Stop(ctx context.Context) error {
	m.mu.Lock()
	started := m.state == stateRunning || m.state == stateEnded
	m.mu.Unlock()
	if !started {
		return ErrNotRunning
	}
	var asked error
	if m.cfg.Shutdown == nil {
		m.Kill()
	} else if !m.ended() {
		asked = m.cfg.Shutdown(ctx)
	}
	select {
	case <-m.done:
	case <-ctx.Done():
		m.Kill()
		<-m.done
	}
	err := m.exit.Err()
	if err == nil {
		return nil
	}
	if asked != nil {
		err = fmt.Errorf("%w (asked to power off: %w)", err, asked)
	}
	return err
}

func (m *Machine) ended() bool {
	select {
	case <-m.done:
		return true
	default:
		return false
	}
}

// Accel tells what runs the guest, AccelKVM or AccelTCG, and if that is TCG
// because KVM is unusable, why. It is valid once Start has returned.
func (m *Machine) Accel() (a Accel, reason string) {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.accel, m.reason
}

// ConsoleTail returns the last lines that the guest's kernel printed.
func (m *Machine) ConsoleTail() string { return m.console.Tail(consoleLines) }
