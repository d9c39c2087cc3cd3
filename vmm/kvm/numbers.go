package kvm

import (
	"unsafe"

	gokvm "github.com/bobuhiro11/gokvm/kvm"
)

// The ioctls that carry a pointer, with the structures that <linux/kvm.h> gives
// them: the size is part of the number. (Functions in gokvm, hence variables.)
var (
	kvmCheckExtension      = gokvm.IIO(0x03)
	kvmGetSupportedCPUID   = gokvm.IIOWR(0x05, 8) // struct kvm_cpuid2 without its entries
	kvmSetUserMemoryRegion = gokvm.IIOW(0x46, unsafe.Sizeof(gokvm.UserspaceMemoryRegion{}))
	kvmSetIdentityMapAddr  = gokvm.IIOW(0x48, 8)
	kvmIOEventFD           = gokvm.IIOW(0x79, unsafe.Sizeof(ioeventfd{}))
	kvmRun                 = gokvm.IIO(0x80)
	kvmGetRegs             = gokvm.IIOR(0x81, unsafe.Sizeof(Regs{}))
	kvmSetRegs             = gokvm.IIOW(0x82, unsafe.Sizeof(Regs{}))
	kvmGetSregs            = gokvm.IIOR(0x83, unsafe.Sizeof(Sregs{}))
	kvmSetSregs            = gokvm.IIOW(0x84, unsafe.Sizeof(Sregs{}))
	kvmSetMSRs             = gokvm.IIOW(0x89, 8) // struct kvm_msrs without its entries
	kvmSetCPUID2           = gokvm.IIOW(0x90, 8) // struct kvm_cpuid2 without its entries
	kvmEnableCap           = gokvm.IIOW(0xa3, unsafe.Sizeof(enableCap{}))
	kvmSignalMSI           = gokvm.IIOW(0xa5, unsafe.Sizeof(msi{}))
	kvmSetXCRs             = gokvm.IIOW(0xa7, unsafe.Sizeof(gokvm.XCRS{}))
)

// Capabilities, KVM_CAP_*.
const (
	capNRVCPUs      = 9
	capMaxVCPUs     = 66
	capSignalMSI    = 77
	capReadOnlyMem  = 81
	capSplitIRQChip = 121
)

// enableCap is struct kvm_enable_cap.
type enableCap struct {
	cap, flags uint32
	args       [4]uint64
	_          [64]byte
}

// msi is struct kvm_msi.
type msi struct {
	addrLow, addrHigh uint32
	data              uint32
	flags, devid      uint32
	_                 [12]byte
}

// ioeventfd is struct kvm_ioeventfd.
type ioeventfd struct {
	datamatch uint64
	addr      uint64
	len       uint32
	fd        int32
	flags     uint32
	_         [36]byte
}

const memReadOnly = 1 << 1 // KVM_MEM_READONLY

const ioeventfdDatamatch = 1 << 0 // KVM_IOEVENTFD_FLAG_DATAMATCH
