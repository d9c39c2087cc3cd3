package microvm

import (
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"sync"

	"golang.org/x/sys/unix"

	"github.com/wsl2/wsl2/vmm/eventfd"
	"github.com/wsl2/wsl2/vmm/guestmem"
	"github.com/wsl2/wsl2/vmm/kvm"
	"github.com/wsl2/wsl2/vmm/mmio"
	"github.com/wsl2/wsl2/vmm/virtio"
	"github.com/wsl2/wsl2/vmm/virtio/console"
)

const (
	busBase = 0xd0000000
	// maxDevices keeps the kernel command line within its limit.
	maxDevices = 32
)

// bus is the virtio-mmio devices and the I/O APIC that their interrupts go
// through: device i has pin i+1 alone, which is also its number in Linux, where
// 0 is none; late devices (engine.Spec) share the last pin, because a kernel
// that masks a pin, as it does with all of them, leaves the guest a dozen times. It is immutable
// once the vCPUs run.
//
// Of the three accesses of a driver to its device's registers for each interrupt
// and request, none reaches the monitor: InterruptStatus is read as memory, and
// the kernel signals an eventfd in place of an exit for the write of the queue's
// number to QueueNotify, and for that of InterruptUsed alone to InterruptACK. At
// the eventfd of the latter nobody waits, so that the bit stays set once it was:
// a driver then looks at its queues for every interrupt, which it has to anyway.
//
// The kernel is told of a device's eventfds when a driver first writes to it: most
// slots for disks stay empty, and each eventfd costs the start of a VM 15 µs.
type bus struct {
	vm      *kvm.VM
	mem     *guestmem.Memory
	devices []*mmio.Transport
	named   int         // without the late ones
	wired   []sync.Once // for each device
	log     io.Writer
	ioapic  *ioapic
	pages   []byte           // of the devices, one behind the other
	acks    *eventfd.EventFD // swallows InterruptACK
}

func newBus(vm *kvm.VM, mem *guestmem.Memory) *bus { return &bus{vm: vm, mem: mem} }

// add plugs the devices in, of which the last late ones are not named to the
// kernel. What drivers do wrong is reported to log.
func (b *bus) add(devices []virtio.Device, late int, log io.Writer) error {
	if len(devices) > maxDevices {
		return fmt.Errorf("microvm: %d devices, at most %d are possible", len(devices), maxDevices)
	}
	var err error
	if b.acks, err = eventfd.New(); err != nil {
		return fmt.Errorf("microvm: %w", err)
	}
	if len(devices) > 0 {
		if b.pages, err = unix.Mmap(-1, 0, len(devices)*mmio.Size, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS); err != nil {
			return fmt.Errorf("microvm: map the registers of devices: %w", err)
		}
		if err := b.vm.SetReadOnlyMemoryRegion(uint32(len(b.mem.Regions())), busBase, b.pages); err != nil {
			return err
		}
	}
	b.named = len(devices) - late
	b.ioapic = newIOAPIC(1+b.named, func(addr uint64, data uint32) { _ = b.vm.SignalMSI(addr, data) })
	for i, dev := range devices {
		t, err := mmio.New(dev, mmio.Config{
			Memory:    b.mem,
			Page:      b.pages[i*mmio.Size:][:mmio.Size],
			Interrupt: func() { b.ioapic.raise(b.pin(i)) },
			Failed:    func(err error) { fmt.Fprintf(log, "wsl2: %v\n", err) },
		})
		if err != nil {
			return err
		}
		b.devices = append(b.devices, t)
	}
	b.wired, b.log = make([]sync.Once, len(devices)), log
	return nil
}

// wire gives the kernel the eventfds of device i. Without them its accesses are
// exits, which Transport.Write serves.
func (b *bus) wire(i int) error {
	kicks, err := b.devices[i].Kicks()
	if err != nil {
		return err
	}
	for queue, kick := range kicks {
		if err := b.vm.AssignIOEventFD(kick.FD(), deviceAddr(i)+mmio.RegQueueNotify, uint32(queue)); err != nil {
			return err
		}
	}
	return b.vm.AssignIOEventFD(b.acks.FD(), deviceAddr(i)+mmio.RegInterruptACK, mmio.InterruptUsed)
}

// close stops all devices, then releases what the kernel and they used. The vCPUs
// have ended.
func (b *bus) close() error {
	var errs []error
	for _, t := range b.devices {
		errs = append(errs, t.Close())
	}
	if b.acks != nil {
		errs = append(errs, b.acks.Close())
	}
	if b.pages != nil {
		errs = append(errs, os.NewSyscallError("munmap", unix.Munmap(b.pages)))
	}
	return errors.Join(errs...)
}

// pins are the pins of the I/O APIC that devices are at.
func (b *bus) pins() []int {
	pins := make([]int, b.named)
	for i := range pins {
		pins[i] = b.pin(i)
	}
	return pins
}

func (b *bus) pin(i int) int { return min(i+1, b.named) }

func deviceAddr(i int) uint64 { return busBase + uint64(i)*mmio.Size }

// access serves one exit. Addresses without a device read as all ones.
func (b *bus) access(a kvm.MMIO) {
	if a.Addr-ioapicAddr < ioapicSize {
		if off := a.Addr % ioapicSize; a.Write {
			b.ioapic.write(off, a.Data)
		} else {
			b.ioapic.read(off, a.Data)
		}
		return
	}
	i := (a.Addr - busBase) / mmio.Size
	if a.Addr < busBase || i >= uint64(len(b.devices)) {
		if !a.Write {
			for i := range a.Data {
				a.Data[i] = 0xff
			}
		}
		return
	}
	if off := a.Addr % mmio.Size; a.Write {
		b.wired[i].Do(func() {
			if err := b.wire(int(i)); err != nil {
				fmt.Fprintf(b.log, "wsl2: the device at %#x is slower than it could be: %v\n", deviceAddr(int(i)), err)
			}
		})
		b.devices[i].Write(off, a.Data)
	} else {
		b.devices[i].Read(off, a.Data)
	}
}

// params names the devices to the kernel (Documentation/admin-guide/
// kernel-parameters.txt, virtio_mmio.device=) but for the late ones.
func (b *bus) params() string {
	var s strings.Builder
	for i := range b.named {
		fmt.Fprintf(&s, " virtio_mmio.device=4K@%#x:%d", deviceAddr(i), b.pin(i))
	}
	return s.String()
}

// Place implements engine.Engine.
func (m *machine) Place(i int) string {
	if m.spec.Console != nil {
		i++
	}
	if i < m.bus.named {
		return ""
	}
	return fmt.Sprintf("4K@%#x:%d", deviceAddr(i), m.bus.pin(i))
}

// devices returns what is on the bus: first the console, if there is one, which
// writes to log.
func (m *machine) devices(log io.Writer) []virtio.Device {
	if m.spec.Console == nil {
		return m.spec.Devices
	}
	return append([]virtio.Device{console.New(log)}, m.spec.Devices...)
}

// cmdline returns the kernel command line with what this machine adds.
func (m *machine) cmdline() string {
	s := m.spec.Cmdline
	if m.spec.Console != nil {
		s += " earlyprintk=serial,0x3f8 console=hvc0"
	}
	return s + m.bus.params()
}
