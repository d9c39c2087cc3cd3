// Package kvm is the part of Linux's KVM API (Documentation/virt/kvm/api.rst)
// that a microVM needs: one function for each ioctl, the shared kvm_run page and
// the kick that gets a vCPU out of the guest.
//
// There are three descriptors, each with a type of its own: System (/dev/kvm)
// makes VMs, a VM makes VCPUs. A VCPU belongs to one thread: bind it (VCPU.Bind),
// set it up and run it there. Everything else may be called from any goroutine.
//
// Structures, names and the calls without pointers come from gokvm. Its calls
// that pass a pointer are not used: they convert the pointer to an integer
// before an ordinary function call, and if the goroutine's stack is moved by
// that call the kernel reads and writes the abandoned one.
package kvm

import (
	"errors"
	"fmt"
	"os"
	"unsafe"

	gokvm "github.com/bobuhiro11/gokvm/kvm"
	"golang.org/x/sys/unix"
)

// KVM's structures, laid out as in <linux/kvm.h>.
type (
	Regs        = gokvm.Regs
	Sregs       = gokvm.Sregs
	Segment     = gokvm.Segment
	Descriptor  = gokvm.Descriptor
	CPUIDEntry2 = gokvm.CPUIDEntry2
	MSREntry    = gokvm.MSREntry
	Capability  = gokvm.Capability
)

// CPUIDSignificantIndex marks CPUID leaves with sub-leaves
// (KVM_CPUID_FLAG_SIGNIFCANT_INDEX).
const CPUIDSignificantIndex = 1 << 0

// Device is where KVM is.
const Device = "/dev/kvm"

// Errors of Open, each with its own next step for the user.
var (
	ErrAbsent     = errors.New("kvm: " + Device + " does not exist: enable virtualisation (VT-x or AMD-V) in the firmware, or nested virtualisation if this is a virtual machine, and load the module (modprobe kvm_intel or kvm_amd)")
	ErrPermission = errors.New("kvm: no permission to open " + Device + ": add yourself to its group (sudo usermod -aG kvm $USER) and log in again")
	ErrVersion    = errors.New("kvm: this kernel's KVM API is not the stable one (version 12): update the kernel")
	ErrCapability = errors.New("kvm: this kernel's KVM lacks a capability: update the kernel")
)

// apiVersion is the only one there has been since Linux 2.6.22 (api.rst §4.1).
const apiVersion = 12

// required are the capabilities without which no VM is started.
var required = []struct {
	cap  uintptr
	name string
	why  string
}{
	{3, "KVM_CAP_USER_MEMORY", "guest memory is the monitor's own"},
	{7, "KVM_CAP_EXT_CPUID", "CPUID is set by the monitor"},
	{capSplitIRQChip, "KVM_CAP_SPLIT_IRQCHIP", "the local APICs are the kernel's, the I/O APIC is not"},
	{capSignalMSI, "KVM_CAP_SIGNAL_MSI", "devices interrupt by messages to the local APICs"},
	{capReadOnlyMem, "KVM_CAP_READONLY_MEM", "drivers read devices' registers as memory"},
	{36, "KVM_CAP_IOEVENTFD", "drivers notify through eventfds"},
	{72, "KVM_CAP_TSC_DEADLINE_TIMER", "the guest has no other timer"},
	{136, "KVM_CAP_IMMEDIATE_EXIT", "a vCPU must be stopped without a race"},
}

// System is an open /dev/kvm. It is safe for concurrent use.
type System struct {
	fd       int
	mmapSize int
}

// Open opens /dev/kvm and checks its version and capabilities.
func Open() (*System, error) { return open(Device) }

func open(path string) (*System, error) {
	fd, err := unix.Open(path, unix.O_RDWR|unix.O_CLOEXEC, 0)
	switch {
	case errors.Is(err, unix.ENOENT), errors.Is(err, unix.ENODEV), errors.Is(err, unix.ENXIO):
		return nil, fmt.Errorf("%w (%w)", ErrAbsent, err)
	case errors.Is(err, unix.EACCES), errors.Is(err, unix.EPERM):
		return nil, fmt.Errorf("%w (%w)", ErrPermission, err)
	case err != nil:
		return nil, &os.PathError{Op: "kvm: open", Path: path, Err: err}
	}
	s := &System{fd: fd}
	if err := s.check(); err != nil {
		unix.Close(fd)
		return nil, err
	}
	return s, nil
}

func (s *System) check() error {
	v, err := gokvm.GetAPIVersion(uintptr(s.fd))
	if err != nil {
		return fmt.Errorf("%w (KVM_GET_API_VERSION: %w)", ErrVersion, err)
	}
	if v != apiVersion {
		return fmt.Errorf("%w (it is %d)", ErrVersion, v)
	}
	for _, c := range required {
		if s.capability(c.cap) == 0 {
			return fmt.Errorf("%w (%s: %s)", ErrCapability, c.name, c.why)
		}
	}
	n, err := gokvm.GetVCPUMMmapSize(uintptr(s.fd))
	if err != nil {
		return fmt.Errorf("kvm: KVM_GET_VCPU_MMAP_SIZE: %w", err)
	}
	if n < unsafe.Sizeof(Run{}) {
		return fmt.Errorf("kvm: kvm_run is %d bytes, expected at least %d", n, unsafe.Sizeof(Run{}))
	}
	s.mmapSize = int(n)
	return nil
}

// capability is KVM_CHECK_EXTENSION (0x03, api.rst §4.4): 0 if absent. It is not
// gokvm's because that one's Capability has 8 bits and KVM's numbers more.
func (s *System) capability(c uintptr) int {
	n, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(s.fd), kvmCheckExtension, c)
	if errno != 0 {
		return 0
	}
	return int(n)
}

// MaxVCPUs returns how many vCPUs a VM may have (KVM_CAP_MAX_VCPUS).
func (s *System) MaxVCPUs() int {
	if n := s.capability(capMaxVCPUs); n > 0 {
		return n
	}
	return max(s.capability(capNRVCPUs), 4) // api.rst §4.7: 4 if nothing is said
}

// Close closes /dev/kvm. VMs made from it live on.
func (s *System) Close() error { return unix.Close(s.fd) }

// maxCPUIDEntries is KVM_MAX_CPUID_ENTRIES.
const maxCPUIDEntries = 256

// cpuid2 is struct kvm_cpuid2 with room for all entries KVM can have.
type cpuid2 struct {
	n       uint32
	_       uint32
	entries [maxCPUIDEntries]CPUIDEntry2
}

// SupportedCPUID is KVM_GET_SUPPORTED_CPUID (0x05, api.rst §4.46): "x86 cpuid
// features which are supported by both the hardware and kvm in its default
// configuration".
func (s *System) SupportedCPUID() ([]CPUIDEntry2, error) {
	c := &cpuid2{n: maxCPUIDEntries}
	if err := ioctl(s.fd, kvmGetSupportedCPUID, c); err != nil {
		return nil, fmt.Errorf("kvm: KVM_GET_SUPPORTED_CPUID: %w", err)
	}
	return c.entries[:min(c.n, maxCPUIDEntries)], nil
}

// CreateVM is KVM_CREATE_VM (0x01, api.rst §4.2): "a VM is created with no
// virtual cpus and no memory".
func (s *System) CreateVM() (*VM, error) {
	for {
		// A signal, such as the runtime's preemption, may interrupt it.
		fd, err := gokvm.CreateVM(uintptr(s.fd))
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil {
			return nil, fmt.Errorf("kvm: KVM_CREATE_VM: %w", err)
		}
		return &VM{fd: int(fd), mmapSize: s.mmapSize}, nil
	}
}

// ioctl passes p to the kernel. The conversion to an integer stands inside the
// call of Syscall, the one place where the compiler keeps p alive and in place.
// A signal before the work began is no failure; KVM_RUN alone does not go
// through here.
func ioctl[T any](fd int, op uintptr, p *T) error {
	for {
		_, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), op, uintptr(unsafe.Pointer(p)))
		switch errno {
		case 0:
			return nil
		case unix.EINTR:
		default:
			return errno
		}
	}
}
