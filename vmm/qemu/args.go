package qemu

import (
	"fmt"
	"os"
	"strings"

	"github.com/wsl2/wsl2/vmm/engine"
	"github.com/wsl2/wsl2/vmm/virtio"
	"github.com/wsl2/wsl2/vmm/virtio/fs"
)

// Where microvm (QEMU's hw/i386/microvm.c), with its second I/O APIC, has its
// virtio-mmio transports: transport i is at mmioBase + i*mmioSize, interrupts by
// pin i of that I/O APIC and calls its bus virtio-mmio-bus.i.
const (
	mmioBase = 0xfeb00000
	mmioSize = 512
)

// transports are those in use. The pins become Linux's IRQs of the same number;
// left out are those that Linux has other uses for: 0 is the timer, 2 the
// cascade, 4 the serial port, 8 the RTC.
var transports = []int{1, 3, 5, 6, 7, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22, 23}

// MaxDevices is the number of virtio devices that the machine has room for: one
// transport is the console's.
const MaxDevices = 19

// bounceMB is the size of the guest's bounce buffer for disk I/O; see
// cmdline.
const bounceMB = 16

// swiotlbSlab is the unit of swiotlb= (Linux's IO_TLB_SHIFT).
const swiotlbSlab = 2 << 10

// fdTable numbers the descriptors that QEMU inherits.
type fdTable struct {
	files []*os.File
}

// add returns the number that f will have in the child: os/exec puts
// ExtraFiles behind the three standard ones.
func (t *fdTable) add(f *os.File) int {
	t.files = append(t.files, f)
	return 2 + len(t.files)
}

// path names an inherited file where QEMU wants a path.
func (t *fdTable) path(f *os.File) string { return fmt.Sprintf("/proc/self/fd/%d", t.add(f)) }

// channels are QEMU's ends of the connections between it and this process.
type channels struct {
	serial, console, monitor *os.File
	devices                  []*os.File // as Spec.Devices
	ram, rom                 *os.File
}

// args builds QEMU's command line and the table of what it inherits. Every
// object is named by a descriptor: nothing lies in the file system.
func args(s engine.Spec, ch channels, sandbox bool) ([]string, *fdTable) {
	t := &fdTable{}
	a := []string{
		"-no-user-config", "-nodefaults", "-display", "none",
		// A reset ends the machine.
		"-no-reboot",
		// No ACPI, no option ROMs: nothing is probed that the guest does not need.
		// PIT and PIC stay: without KVM's clock the guest measures its timers
		// against them; and so does the RTC, its only source of the date.
		// acpi=on is what the second I/O APIC takes (see mptable.go). The tables
		// stay where no guest finds them: there is no firmware to put them in place.
		"-M", "microvm,acpi=on,ioapic2=on,pit=on,pic=on,rtc=on,x-option-roms=off,auto-kernel-cmdline=off,memory-backend=mem",
		// The kernel is in memory already; all that is left to do is a jump.
		"-bios", t.path(ch.rom),
		// One thread for all vCPUs: with one for each, QEMU 7.2 let guests die now and
		// then at an instruction that another vCPU was patching (jump labels).
		"-accel", "tcg,thread=single",
		"-cpu", "max",
		"-smp", fmt.Sprint(s.CPUs),
		"-m", fmt.Sprintf("%dM", s.MemoryBytes>>20),
		// A memfd: QEMU passes it on to the devices.
		"-object", fmt.Sprintf("memory-backend-file,id=mem,size=%d,share=on,mem-path=%s", s.MemoryBytes, t.path(ch.ram)),
		"-global", "virtio-mmio.force-legacy=false",
		"-device", fmt.Sprintf("isa-debug-exit,iobase=%#x,iosize=4", engine.ExitPort),
		"-chardev", fmt.Sprintf("socket,id=serial,fd=%d", t.add(ch.serial)),
		"-serial", "chardev:serial",
		"-chardev", fmt.Sprintf("socket,id=console,fd=%d", t.add(ch.console)),
		"-device", fmt.Sprintf("virtio-serial-device,max_ports=1,bus=virtio-mmio-bus.%d", transports[MaxDevices]),
		"-device", "virtconsole,chardev=console",
		"-chardev", fmt.Sprintf("socket,id=monitor,fd=%d", t.add(ch.monitor)),
		"-mon", "chardev=monitor,mode=control",
	}
	if sandbox {
		a = append(a, "-sandbox", "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny")
	}
	for i, d := range s.Devices {
		back := fmt.Sprintf("chardev=vu%d", i)
		if d.ID() == virtio.IDNet {
			a = append(a,
				"-chardev", fmt.Sprintf("socket,id=vu%d,path=%s/%s", i, t.path(ch.devices[i]), doorName),
				"-netdev", fmt.Sprintf("vhost-user,id=net%d,%s", i, back))
			back = fmt.Sprintf("netdev=net%d", i)
		} else {
			a = append(a, "-chardev", fmt.Sprintf("socket,id=vu%d,fd=%d", i, t.add(ch.devices[i])))
		}
		a = append(a, "-device", fmt.Sprintf("%s,%s,bus=virtio-mmio-bus.%d", deviceArg(d), back, transports[i]))
	}
	return a, t
}

// card is a network card, as virtio/net makes them.
type card interface {
	MAC() [6]byte
	MTU() uint16
}

func macString(mac [6]byte) string {
	return fmt.Sprintf("%02x:%02x:%02x:%02x:%02x:%02x", mac[0], mac[1], mac[2], mac[3], mac[4], mac[5])
}

// deviceArg is the vhost-user front end for d, without its connection; empty
// for a device that QEMU has none for.
func deviceArg(d virtio.Device) string {
	switch d.ID() {
	case virtio.IDBlock:
		sizes := d.QueueSizes()
		return fmt.Sprintf("vhost-user-blk,num-queues=%d,queue-size=%d,iommu_platform=on", len(sizes), sizes[0])
	case virtio.IDFS:
		// QEMU has the configuration space; what the server reads goes through the bounce buffer, see cmdline.
		sizes := d.QueueSizes()
		return fmt.Sprintf("vhost-user-fs-device,queue-size=%d,tag=%s,iommu_platform=on", sizes[0], d.(*fs.Device).Tag())
	case virtio.IDVsock:
		return "vhost-user-vsock-device"
	case virtio.IDEntropy:
		return "vhost-user-rng"
	case virtio.IDNet:
		// QEMU has the configuration space, and a control queue of its own.
		if c, ok := d.(card); ok {
			return fmt.Sprintf("virtio-net-device,mac=%s,host_mtu=%d,mq=off,guest_announce=off", macString(c.MAC()), c.MTU())
		}
	}
	return ""
}

// cmdline completes the kernel command line with what this machine needs.
//
// tsc_early_khz: see tscKHz. tsc=reliable: TCG hands out one counter to all
// vCPUs, and the clock that would watch it is worse. no_timer_check: the kernel
// would panic if a busy host delivers fewer than four ticks in 60 ms.
//
// clearcpuid=cx16: QEMU before 8.0 takes the flags that CMPXCHG16B leaves alone from
// an outdated operand when the instruction before has set them (translate.c calls its
// helper without gen_update_cc_op); an interrupt right after it saves, and its IRET
// restores, a reserved, a nested-task or an alignment-check bit, and the kernel dies.
// The kernel's allocator is what uses it; programs still find it in CPUID.
//
// swiotlb=force: TCG keeps translated code by guest physical page and notices
// stores of the vCPUs, not of another process: a disk block of program text that
// a device of ours writes straight into a page that held other code before (the
// page cache does just that) would be executed as what it was. So disk I/O goes
// through the guest's bounce buffer (that is what iommu_platform=on is for) and
// the guest's own copy from there is what TCG sees. Socket data and entropy are
// copied by the guest's CPUs anyway before anything could execute them.
func cmdline(s engine.Spec, tscKHz uint64) string {
	var b strings.Builder
	b.WriteString(s.Cmdline)
	add := func(format string, a ...any) {
		if b.Len() > 0 {
			b.WriteByte(' ')
		}
		fmt.Fprintf(&b, format, a...)
	}
	transport := func(i int) {
		add("virtio_mmio.device=%d@%#x:%d", mmioSize, mmioBase+i*mmioSize, i)
	}
	// The first words through the serial port; then the virtio console, or the
	// serial port again for a kernel that has no driver for that.
	add("tsc=reliable tsc_early_khz=%d no_timer_check clearcpuid=cx16", tscKHz)
	add("earlyprintk=serial,0x3f8 console=ttyS0 console=hvc0")
	bounce := false
	for i, d := range s.Devices {
		transport(transports[i])
		bounce = bounce || d.ID() == virtio.IDBlock || d.ID() == virtio.IDFS
	}
	transport(transports[MaxDevices])
	if bounce {
		add("swiotlb=%d,force", bounceMB<<20/swiotlbSlab)
	}
	return b.String()
}
