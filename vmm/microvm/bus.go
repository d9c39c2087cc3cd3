package microvm

import (
	"errors"
	"fmt"
	"io"
	"strings"

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

// irqs are the PIC's inputs that nothing else in this machine uses, in the order
// in which devices get them. 2 is the cascade, 0 the timer, 8 the RTC; 7 and 15
// are where the PIC reports spurious interrupts. Later devices share.
var irqs = []uint32{5, 6, 9, 10, 11, 12, 14, 3, 4, 13, 1}

// bus is the virtio-mmio devices and their interrupt lines. It is immutable once
// the vCPUs run.
type bus struct {
	vm      *kvm.VM
	mem     *guestmem.Memory
	devices []*mmio.Transport
	lines   map[uint32]*eventfd.EventFD // by GSI
}

func newBus(vm *kvm.VM, mem *guestmem.Memory) *bus {
	return &bus{vm: vm, mem: mem, lines: make(map[uint32]*eventfd.EventFD)}
}

// add plugs the devices in. What drivers do wrong is reported to log.
func (b *bus) add(devices []virtio.Device, log io.Writer) error {
	if len(devices) > maxDevices {
		return fmt.Errorf("microvm: %d devices, at most %d are possible", len(devices), maxDevices)
	}
	for i, dev := range devices {
		line, err := b.line(irqs[i%len(irqs)])
		if err != nil {
			return err
		}
		t, err := mmio.New(dev, mmio.Config{
			Memory: b.mem,
			// The line's eventfd is closed after the device is stopped, and its
			// counter is full after 2^64-2 signals: Signal cannot fail.
			Interrupt: func() { _ = line.Signal() },
			Failed:    func(err error) { fmt.Fprintf(log, "wsl2: %v\n", err) },
		})
		if err != nil {
			return err
		}
		b.devices = append(b.devices, t)
		for queue, kick := range t.Kicks() {
			if err := b.vm.AssignIOEventFD(kick.FD(), deviceAddr(i)+mmio.RegQueueNotify, uint32(queue)); err != nil {
				return err
			}
		}
	}
	return nil
}

// line returns the eventfd that pulses gsi. Devices that share a line share the
// eventfd, so that KVM makes one edge after the other.
func (b *bus) line(gsi uint32) (*eventfd.EventFD, error) {
	if l := b.lines[gsi]; l != nil {
		return l, nil
	}
	l, err := eventfd.New()
	if err != nil {
		return nil, fmt.Errorf("microvm: %w", err)
	}
	b.lines[gsi] = l
	return l, b.vm.AssignIRQFD(l.FD(), gsi)
}

// close stops all devices, then releases the interrupt lines.
func (b *bus) close() error {
	var errs []error
	for _, t := range b.devices {
		errs = append(errs, t.Close())
	}
	for _, l := range b.lines {
		errs = append(errs, l.Close())
	}
	return errors.Join(errs...)
}

func deviceAddr(i int) uint64 { return busBase + uint64(i)*mmio.Size }

// access serves one exit. Addresses without a device read as all ones.
func (b *bus) access(a kvm.MMIO) {
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
		b.devices[i].Write(off, a.Data)
	} else {
		b.devices[i].Read(off, a.Data)
	}
}

// params names the devices to the kernel (Documentation/admin-guide/
// kernel-parameters.txt, virtio_mmio.device=).
func (b *bus) params() string {
	var s strings.Builder
	for i := range b.devices {
		fmt.Fprintf(&s, " virtio_mmio.device=4K@%#x:%d", deviceAddr(i), irqs[i%len(irqs)])
	}
	return s.String()
}

// devices returns what is on the bus: first the console, if there is one, which
// writes to log.
func (m *machine) devices(log io.Writer) []virtio.Device {
	if m.spec.Console == nil {
		return m.spec.Devices
	}
	return append([]virtio.Device{console.New(log)}, m.spec.Devices...)
}

// cmdline returns the kernel command line with what this machine adds. noapic
// means the I/O APIC, of which the MP table does not tell: only with it does
// Linux leave the PIC's way to the boot processor open (setup_local_APIC).
func (m *machine) cmdline() string {
	s := m.spec.Cmdline + " noapic"
	if m.spec.Console != nil {
		s += " earlyprintk=serial,0x3f8 console=hvc0"
	}
	return s + m.bus.params()
}
