// Package engine is the contract between package vmm, which decides what a
// virtual machine consists of, and the two packages that can run one:
// vmm/microvm (KVM) and vmm/qemu (TCG). Devices are the same objects in both.
package engine

import (
	"context"
	"fmt"
	"io"
	"os"

	"github.com/wsl2/wsl2/vmm/virtio"
)

// Spec is what an engine needs to run one virtual machine. It is complete and
// checked: engines report what they cannot do, they do not correct it.
type Spec struct {
	// Kernel is an ELF vmlinux or a bzImage; Initramfs (optional) a cpio archive.
	// Both stay owned by the caller and open until Start returns.
	Kernel, Initramfs *os.File
	// Cmdline is the kernel command line; the engine appends what its own
	// machine needs (virtio_mmio.device=, console=...).
	Cmdline string
	// MemoryBytes is the guest's RAM, a multiple of 2 MiB.
	MemoryBytes uint64
	// CPUs is the number of vCPUs, 1 to 64.
	CPUs int
	// Devices in the order in which the guest finds them. The last Late of them it
	// registers by itself (vmm.Config.LateSlots); an engine may name them all the same.
	Devices []virtio.Device
	Late    int
	// Console receives what the guest kernel prints, early messages included.
	// It must not block.
	Console io.Writer
}

// Engine is one virtual machine, not yet started.
type Engine interface {
	// Start creates the machine and lets its vCPUs run. It returns once they
	// run; ctx bounds only Start itself. On an error nothing is left behind.
	Start(ctx context.Context) error
	// Place is what the guest has to tell its kernel of Devices[i], as
	// virtio_mmio.device= takes it; empty for one that the kernel was told of at boot.
	Place(i int) string
	// Wait blocks until the machine has ended and everything it held (threads,
	// descriptors, mappings, processes) is released. It may be called by many
	// goroutines and any number of times after Start succeeded.
	Wait() Exit
	// Kill ends the machine at once, without the guest's help; Wait then
	// reports ReasonKilled. It is harmless on a machine that has ended.
	Kill()
}

// Reason tells why a machine ended.
type Reason int

// Reasons.
const (
	// ReasonPowerOff: the guest wrote StatusPowerOff to ExitPort: meant and clean.
	ReasonPowerOff Reason = iota
	// ReasonReset: triple fault or reset request. With panic=-1 on the command
	// line that is how a guest kernel's panic looks from outside.
	ReasonReset
	// ReasonFailed: the accelerator could not go on (KVM_EXIT_INTERNAL_ERROR,
	// KVM_EXIT_FAIL_ENTRY, QEMU died). Detail says what it reported.
	ReasonFailed
	// ReasonKilled: Kill was called.
	ReasonKilled
)

func (r Reason) String() string {
	switch r {
	case ReasonPowerOff:
		return "powered off"
	case ReasonReset:
		return "reset"
	case ReasonFailed:
		return "failed"
	case ReasonKilled:
		return "killed"
	}
	return fmt.Sprintf("Reason(%d)", int(r))
}

// Exit is how a machine ended.
type Exit struct {
	Reason Reason
	Detail string // for people; empty where Reason says all
}

// The guest ends the machine by writing one byte to an I/O port (through
// /dev/port). QEMU's isa-debug-exit device answers the same port. Without ACPI
// there is no other way to tell a wanted power-off from a crash.
const (
	ExitPort       = 0xf4
	StatusPowerOff = 0x00
)
