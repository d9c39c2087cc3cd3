package vmm

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"

	"golang.org/x/sys/unix"
)

// Accel says what runs the guest's instructions.
type Accel int

// Accelerators.
const (
	// AccelAuto is KVM where that can run a guest, else TCG.
	AccelAuto Accel = iota
	// AccelKVM is our own VMM on /dev/kvm.
	AccelKVM
	// AccelTCG is QEMU's translator, with our devices.
	AccelTCG
)

func (a Accel) String() string {
	switch a {
	case AccelAuto:
		return "auto"
	case AccelKVM:
		return "kvm"
	case AccelTCG:
		return "tcg"
	}
	return fmt.Sprintf("Accel(%d)", int(a))
}

// ParseAccel is the inverse of Accel.String.
func ParseAccel(s string) (Accel, error) {
	for a := AccelAuto; a <= AccelTCG; a++ {
		if s == a.String() {
			return a, nil
		}
	}
	return 0, fmt.Errorf("unknown accelerator %q: auto, kvm or tcg", s)
}

// Bounds of a machine.
const (
	MaxCPUs = 64
	// MinMemory is what the smallest kernel and initramfs can run in; larger
	// ones say what they need when they are loaded.
	MinMemory = 64 << 20
	// MaxDiskSlots is the number of one-letter disk names, /dev/vda to /dev/vdz.
	MaxDiskSlots = 26

	memoryUnit = 2 << 20
)

// Disk is a raw disk image: a sparse file or a block device. It is locked while
// it is attached.
type Disk struct {
	Path     string
	ReadOnly bool
	// Serial is what the guest reads as serial number, at most 20 bytes. It
	// belongs to the slot: only disks attached from the start have one of
	// their own, and a disk attached later must leave it empty.
	Serial string
}

// Network is a network card. With LateSlots it is the first of the devices that the guest
// registers by itself.
type Network struct {
	MAC [6]byte
	MTU uint16
	// Open and OnError are those of package virtio/net's Config.
	Open    func() (*os.File, error)
	OnError func(error)
}

// Config is what a machine consists of.
type Config struct {
	Accel Accel
	// Verdict (optional) is a file that remembers that this host's KVM passed the
	// probe (kvm.ProbeOnce), in a directory of the user's own. Without it each
	// start probes.
	Verdict string
	// Kernel is the path of an ELF vmlinux or a bzImage, Initramfs (optional)
	// that of a cpio archive, which only some kernels take compressed.
	Kernel, Initramfs string
	// Cmdline is appended to the kernel command line that every machine has.
	Cmdline string
	// MemoryBytes is the guest's RAM, rounded down to 2 MiB.
	MemoryBytes uint64
	// CPUs is the number of vCPUs, 1 to MaxCPUs.
	CPUs int

	// Disks are attached from the start: disk i in slot i, which the guest sees
	// as /dev/vda + i.
	Disks []Disk
	// DiskSlots is how many disks can be attached at a time, at least
	// len(Disks). A machine may have room for fewer: see Machine.DiskSlots.
	DiskSlots int
	// LateSlots leaves slots without a disk out of the kernel command line on
	// KVM: each takes half a millisecond of the boot. The guest registers them by
	// itself when it hears of a disk, one after the other behind the last
	// device that it knows, with the next page of addresses and the same interrupt.
	// That takes a kernel with a writable virtio_mmio.device (kernelcfg/patches).
	LateSlots bool

	// GuestCID is the guest's vsock context ID, from 3.
	GuestCID uint64
	// VsockPath is the unix socket through which the host reaches the guest's
	// vsock ports (package vsock says how); it must not exist yet. Without it
	// there is no vsock device.
	VsockPath string

	// Network (optional) is the guest's network card.
	Network *Network

	// ConsoleLog (optional) receives what the guest's kernel prints, cleaned of
	// what terminals would interpret. It must not block.
	ConsoleLog io.Writer
	// Shutdown (optional) asks the guest to power off. Stop calls it.
	Shutdown func(ctx context.Context) error
	// OnDiskError (optional) is told of the host's errors with a disk image; the
	// guest sees I/O errors. It must not block.
	OnDiskError func(slot int, err error)
}

// ErrConfig is wrapped by every error about a Config that no host can run.
var ErrConfig = errors.New("vmm")

func configError(format string, a ...any) error {
	return fmt.Errorf("%w: %w", ErrConfig, fmt.Errorf(format, a...))
}

// check returns c made complete.
func (c Config) check() (Config, error) {
	if c.Accel < AccelAuto || c.Accel > AccelTCG {
		return c, configError("%v: give auto, kvm or tcg", c.Accel)
	}
	if c.CPUs < 1 || c.CPUs > MaxCPUs {
		return c, configError("%d processors: a VM has 1 to %d", c.CPUs, MaxCPUs)
	}
	c.MemoryBytes -= c.MemoryBytes % memoryUnit
	if c.MemoryBytes < MinMemory {
		return c, configError("%s of memory: a VM needs at least %s", size(c.MemoryBytes), size(MinMemory))
	}
	var info unix.Sysinfo_t
	if err := unix.Sysinfo(&info); err == nil {
		if host := info.Totalram * uint64(info.Unit); c.MemoryBytes > host {
			return c, configError("%s of memory: this host has %s; give the VM less", size(c.MemoryBytes), size(host))
		}
	}
	switch c.DiskSlots = max(c.DiskSlots, len(c.Disks)); {
	case c.DiskSlots > MaxDiskSlots:
		return c, configError("%d disk slots: a VM has at most %d", c.DiskSlots, MaxDiskSlots)
	case strings.ContainsAny(c.Cmdline, "\x00\n"):
		return c, configError("the kernel command line must be one line: %q", c.Cmdline)
	}
	if err := checkKernel(c.Kernel); err != nil {
		return c, err
	}
	return c, checkInitramfs(c.Initramfs)
}

// size writes a number of bytes for people.
func size(n uint64) string {
	switch {
	case n >= 10<<30 || n >= 1<<30 && n%(1<<30) == 0:
		return fmt.Sprintf("%d GiB", n>>30)
	case n >= 1<<20 || n == 0:
		return fmt.Sprintf("%d MiB", n>>20)
	}
	return fmt.Sprintf("%d bytes", n)
}

// baseCmdline is what every machine boots with. What comes later on the line,
// Config.Cmdline, wins.
var baseCmdline = strings.Join([]string{
	// A panic ends the VM at once; a triple fault is the reset that needs no device.
	"panic=-1", "reboot=t",
	"quiet",
	// LOCK prefixes stay on a machine with one processor, too: taking them out
	// is a tenth of the boot.
	"noreplace-smp",
	// What the kernel does not unpack of an initramfs can be read there; and
	// giving its memory back is more work than keeping it.
	"retain_initrd",
	// The kernel is built without that mitigation (kernelcfg/security.config) and
	// would say so: a hundred characters, two exits each, through the early console.
	"spec_rstack_overflow=off",
	// A network device that nobody asked for, with all its files in /sys and /proc: half of
	// what our own card costs. `ip link add type dummy` makes those that are wanted.
	"dummy.numdummies=0",
	// The host's counter is as good as its clock; watching it costs wake-ups.
	"tsc=reliable",
}, " ")
