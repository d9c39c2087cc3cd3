// Package microvm runs a virtual machine on KVM. It implements engine.Engine.
//
// The machine has what a Linux guest needs and nothing that Linux would probe in
// vain: RAM, the kernel's in-kernel local APICs and their timers, kvmclock,
// virtio-mmio devices named on the command line, an I/O APIC with a pin for each
// of them, and a few I/O ports. No firmware, PCI, ACPI, PIC, PIT or RTC.
//
// Guest physical address space:
//
//	0           RAM, up to 3 GiB of it
//	0xd0000000  virtio-mmio devices, one page each
//	0xfec00000  I/O APIC
//	0xfee00000  local APICs (in KVM)
//	0xfffbc000  identity map page and TSS for Intel's real mode (in KVM)
//	4 GiB       the rest of RAM
//
// Goroutines: one for each vCPU, locked to its thread, and one that waits for
// them and releases everything. Devices have their own. The first vCPU that
// leaves for good, or Kill, settles how the machine ended and kicks the others.
package microvm

import (
	"context"
	"errors"
	"fmt"
	"sync"

	"github.com/wsl2/wsl2/vmm/boot"
	"github.com/wsl2/wsl2/vmm/engine"
	"github.com/wsl2/wsl2/vmm/guestmem"
	"github.com/wsl2/wsl2/vmm/kvm"
)

// Below 4 GiB, above RAM and away from the devices.
const (
	identityMapAddr = 0xfffbc000
	tssAddr         = 0xfffbd000
)

// machine is the engine.Engine.
type machine struct {
	spec engine.Spec
	done chan struct{} // closed when everything is released

	mu      sync.Mutex
	started bool
	ended   bool        // exit is settled; no vCPU runs, or will soon not
	exit    engine.Exit // valid if ended
	vcpus   []*vcpu     // to be kicked; set once, before any runs

	// Used by Start, then by the releasing goroutine.
	cleanup []func() error
	running sync.WaitGroup // vCPUs

	ports *ports
	bus   *bus
}

// New returns a machine that is not yet started. It holds no resources.
func New(spec engine.Spec) engine.Engine {
	return &machine{spec: spec, done: make(chan struct{})}
}

var errKilled = errors.New("microvm: killed before it started")

// Start implements engine.Engine.
func (m *machine) Start(ctx context.Context) error {
	m.mu.Lock()
	if m.started {
		m.mu.Unlock()
		return errors.New("microvm: started twice")
	}
	m.started = true
	m.mu.Unlock()

	vcpus, err := m.create(ctx)
	if err != nil {
		return errors.Join(err, m.release())
	}
	m.mu.Lock()
	if m.ended {
		m.mu.Unlock()
		return errors.Join(errKilled, m.release())
	}
	m.vcpus = vcpus
	m.mu.Unlock()

	m.running.Add(len(vcpus))
	for _, v := range vcpus {
		go func() {
			defer m.running.Done()
			m.end(v.run(m))
		}()
	}
	go func() {
		m.running.Wait()
		err := m.release()
		m.mu.Lock()
		if err != nil && m.exit.Detail == "" {
			m.exit.Detail = err.Error()
		}
		m.mu.Unlock()
		close(m.done)
	}()
	return nil
}

// Wait implements engine.Engine.
func (m *machine) Wait() engine.Exit {
	<-m.done
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.exit
}

// Kill implements engine.Engine.
func (m *machine) Kill() { m.end(engine.Exit{Reason: engine.ReasonKilled}) }

// end settles how the machine ended, unless that is settled, and stops it.
func (m *machine) end(exit engine.Exit) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.ended {
		return
	}
	m.ended, m.exit = true, exit
	for _, v := range m.vcpus {
		v.Kick()
	}
}

// onRelease registers f to be called by release, last registered first.
func (m *machine) onRelease(f func() error) { m.cleanup = append(m.cleanup, f) }

func (m *machine) release() error {
	var errs []error
	for i := len(m.cleanup) - 1; i >= 0; i-- {
		errs = append(errs, m.cleanup[i]())
	}
	m.cleanup = nil
	return errors.Join(errs...)
}

func (m *machine) validate() error {
	s := m.spec
	switch {
	case s.CPUs < 1 || s.CPUs > boot.MaxCPUs:
		return fmt.Errorf("microvm: %d vCPUs asked for, 1 to %d are possible", s.CPUs, boot.MaxCPUs)
	case s.MemoryBytes == 0 || s.MemoryBytes%hugePage != 0:
		return fmt.Errorf("microvm: %d bytes of memory asked for, not a multiple of 2 MiB", s.MemoryBytes)
	case s.MemoryBytes > maxMemory:
		return fmt.Errorf("microvm: %d GiB of memory asked for, at most %d GiB are possible", s.MemoryBytes>>30, uint64(maxMemory)>>30)
	}
	return nil
}

// create makes everything up to vCPUs that are ready to run.
func (m *machine) create(ctx context.Context) ([]*vcpu, error) {
	if err := m.validate(); err != nil {
		return nil, err
	}
	sys, err := kvm.Open()
	if err != nil {
		return nil, err
	}
	defer sys.Close()
	if n := sys.MaxVCPUs(); m.spec.CPUs > n {
		return nil, fmt.Errorf("microvm: %d vCPUs asked for, this host's KVM allows %d", m.spec.CPUs, n)
	}
	// Registered first, released last: the vCPUs' memory must outlive them.
	mem, err := m.mapMemory()
	if err != nil {
		return nil, err
	}
	vm, err := sys.CreateVM()
	if err != nil {
		return nil, err
	}
	m.onRelease(vm.Close)
	for i, r := range mem.Regions() {
		if err := vm.SetUserMemoryRegion(uint32(i), uint64(r.Start), r.Bytes); err != nil {
			return nil, err
		}
	}
	if err := vm.SetIdentityMapAddr(identityMapAddr); err != nil {
		return nil, err
	}
	if err := vm.SetTSSAddr(tssAddr); err != nil {
		return nil, err
	}
	if err := vm.EnableSplitIRQChip(); err != nil {
		return nil, err
	}
	if err := ctx.Err(); err != nil {
		return nil, err
	}

	screen := newScreen(m.spec.Console)
	m.onRelease(screen.flush)
	m.ports = newPorts(screen)
	m.bus = newBus(vm, mem)
	m.onRelease(m.bus.close)
	if err := m.bus.add(m.devices(screen), m.spec.Late, screen); err != nil {
		return nil, err
	}
	entry, err := boot.Load(boot.Config{
		Kernel:    m.spec.Kernel,
		Initramfs: m.spec.Initramfs,
		Cmdline:   m.cmdline(),
		Memory:    mem,
		CPUs:      m.spec.CPUs,
		IOAPIC:    boot.IOAPIC{Addr: ioapicAddr, Pins: m.bus.pins()},
	})
	if err != nil {
		return nil, err
	}
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	return m.createVCPUs(sys, vm, entry)
}

// mapMemory maps the guest's RAM.
func (m *machine) mapMemory() (*guestmem.Memory, error) {
	var regions []guestmem.Region
	for _, r := range boot.Layout(m.spec.MemoryBytes) {
		b, unmap, err := mapRAM(r.Size)
		if err != nil {
			return nil, err
		}
		m.onRelease(unmap)
		regions = append(regions, guestmem.Region{Start: r.Start, Bytes: b})
	}
	return guestmem.New(regions...)
}
