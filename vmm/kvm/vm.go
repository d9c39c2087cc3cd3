package kvm

import (
	"errors"
	"fmt"
	"unsafe"

	gokvm "github.com/bobuhiro11/gokvm/kvm"
	"golang.org/x/sys/unix"
)

// VM is a virtual machine's descriptor. It is safe for concurrent use.
type VM struct {
	fd       int
	mmapSize int
}

// Close closes the VM. The kernel frees it when its vCPUs are closed as well;
// the last of these closes waits for an RCU grace period (some 10 ms).
func (vm *VM) Close() error { return unix.Close(vm.fd) }

// SetTSSAddr is KVM_SET_TSS_ADDR (0x47, api.rst §4.36): three pages below 4 GiB
// that "must not conflict with any memory slot or any mmio address", which Intel
// processors need for real mode.
func (vm *VM) SetTSSAddr(addr uint32) error {
	if err := gokvm.SetTSSAddr(uintptr(vm.fd), addr); err != nil {
		return fmt.Errorf("kvm: KVM_SET_TSS_ADDR: %w", err)
	}
	return nil
}

// SetIdentityMapAddr is KVM_SET_IDENTITY_MAP_ADDR (0x48, api.rst §4.47): one
// page, for the same purpose, before the first vCPU is created.
func (vm *VM) SetIdentityMapAddr(addr uint64) error {
	if err := ioctl(vm.fd, kvmSetIdentityMapAddr, &addr); err != nil {
		return fmt.Errorf("kvm: KVM_SET_IDENTITY_MAP_ADDR: %w", err)
	}
	return nil
}

// EnableSplitIRQChip is KVM_CAP_SPLIT_IRQCHIP (api.rst §7.5) with KVM_ENABLE_CAP
// (0xa3, §4.71), before the first vCPU is created: "create a local apic for each
// processor in the kernel. This can be used instead of KVM_CREATE_IRQCHIP if the
// userspace VMM wishes to emulate the IOAPIC and PIC (and also the PIT)". No route
// is reserved for a level-triggered input of that I/O APIC.
func (vm *VM) EnableSplitIRQChip() error {
	if err := ioctl(vm.fd, kvmEnableCap, &enableCap{cap: capSplitIRQChip}); err != nil {
		return fmt.Errorf("kvm: KVM_CAP_SPLIT_IRQCHIP: %w", err)
	}
	return nil
}

// SetUserMemoryRegion is KVM_SET_USER_MEMORY_REGION (0x46, api.rst §4.35): it
// puts mem at guest physical address addr. mem is page-aligned, outside Go's
// heap and stays mapped as long as the VM.
func (vm *VM) SetUserMemoryRegion(slot uint32, addr uint64, mem []byte) error {
	return vm.setMemory(slot, addr, mem, 0)
}

// SetReadOnlyMemoryRegion is SetUserMemoryRegion with KVM_MEM_READONLY (api.rst
// §4.35, KVM_CAP_READONLY_MEM): "writes to this memory will be posted to
// userspace as KVM_EXIT_MMIO exits", or to the ioeventfd at their address.
func (vm *VM) SetReadOnlyMemoryRegion(slot uint32, addr uint64, mem []byte) error {
	return vm.setMemory(slot, addr, mem, memReadOnly)
}

func (vm *VM) setMemory(slot uint32, addr uint64, mem []byte, flags uint32) error {
	r := gokvm.UserspaceMemoryRegion{
		Slot:          slot,
		Flags:         flags,
		GuestPhysAddr: addr,
		MemorySize:    uint64(len(mem)),
		UserspaceAddr: uint64(uintptr(unsafe.Pointer(unsafe.SliceData(mem)))),
	}
	if err := ioctl(vm.fd, kvmSetUserMemoryRegion, &r); err != nil {
		return fmt.Errorf("kvm: KVM_SET_USER_MEMORY_REGION: %d bytes at %#x: %w", len(mem), addr, err)
	}
	return nil
}

// SignalMSI is KVM_SIGNAL_MSI (0xa5, api.rst §4.70): "directly inject a MSI
// message", address and data as on the bus (Intel SDM vol. 3A §11.11). It wakes
// the vCPU that is meant and waits for nothing. An error may be the guest's doing:
// no local APIC takes the message, which KVM refuses at times and drops at others.
func (vm *VM) SignalMSI(addr uint64, data uint32) error {
	m := msi{addrLow: uint32(addr), addrHigh: uint32(addr >> 32), data: data}
	if err := ioctl(vm.fd, kvmSignalMSI, &m); err != nil {
		return fmt.Errorf("kvm: KVM_SIGNAL_MSI: %#x to %#x: %w", data, addr, err)
	}
	return nil
}

// AssignIOEventFD is KVM_IOEVENTFD (0x79, api.rst §4.59): "a guest write in the
// registered address will signal the provided event instead of triggering an
// exit", if it is 4 bytes long and its value is value. It lasts as long as the
// VM; the kernel holds its own reference to fd.
func (vm *VM) AssignIOEventFD(fd int, addr uint64, value uint32) error {
	r := ioeventfd{datamatch: uint64(value), addr: addr, len: 4, fd: int32(fd), flags: ioeventfdDatamatch}
	if err := ioctl(vm.fd, kvmIOEventFD, &r); err != nil {
		return fmt.Errorf("kvm: KVM_IOEVENTFD: %#x: %w", addr, err)
	}
	return nil
}

// CreateVCPU is KVM_CREATE_VCPU (0x41, api.rst §4.7) and the mapping of its
// kvm_run page. id is the vCPU's APIC id.
func (vm *VM) CreateVCPU(id int) (*VCPU, error) {
	for {
		fd, err := gokvm.CreateVCPU(uintptr(vm.fd), id)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil {
			return nil, fmt.Errorf("kvm: KVM_CREATE_VCPU: vCPU %d: %w", id, err)
		}
		mem, err := unix.Mmap(int(fd), 0, vm.mmapSize, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
		if err != nil {
			unix.Close(int(fd))
			return nil, fmt.Errorf("kvm: map kvm_run of vCPU %d: %w", id, err)
		}
		return &VCPU{id: id, fd: int(fd), mem: mem, run: (*Run)(unsafe.Pointer(unsafe.SliceData(mem)))}, nil
	}
}
