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
	kvmIRQLine             = gokvm.IIOW(0x61, unsafe.Sizeof(irqLevel{}))
	kvmIRQFD               = gokvm.IIOW(0x76, unsafe.Sizeof(irqfd{}))
	kvmIOEventFD           = gokvm.IIOW(0x79, unsafe.Sizeof(ioeventfd{}))
	kvmRun                 = gokvm.IIO(0x80)
	kvmGetRegs             = gokvm.IIOR(0x81, unsafe.Sizeof(Regs{}))
	kvmSetRegs             = gokvm.IIOW(0x82, unsafe.Sizeof(Regs{}))
	kvmGetSregs            = gokvm.IIOR(0x83, unsafe.Sizeof(Sregs{}))
	kvmSetSregs            = gokvm.IIOW(0x84, unsafe.Sizeof(Sregs{}))
	kvmSetMSRs             = gokvm.IIOW(0x89, 8) // struct kvm_msrs without its entries
	kvmSetCPUID2           = gokvm.IIOW(0x90, 8) // struct kvm_cpuid2 without its entries
	kvmSetXCRs             = gokvm.IIOW(0xa7, unsafe.Sizeof(gokvm.XCRS{}))
)

// irqLevel is struct kvm_irq_level.
type irqLevel struct{ irq, level uint32 }

// irqfd is struct kvm_irqfd.
type irqfd struct {
	fd, gsi, flags, resampleFD uint32
	_                          [16]byte
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

const ioeventfdDatamatch = 1 << 0 // KVM_IOEVENTFD_FLAG_DATAMATCH
