package microvm

import (
	"math/bits"

	"github.com/wsl2/wsl2/vmm/kvm"
)

// CPUID bits and leaves that are set here (Intel SDM vol. 2A, CPUID; AMD APM
// vol. 3, appendix E; Documentation/virt/kvm/x86/cpuid.rst).
const (
	leaf1ECXTSCDeadline = 1 << 24
	leaf1ECXHypervisor  = 1 << 31
	leaf1EDXHTT         = 1 << 28

	ext1ECXCmpLegacy = 1 << 1
	ext1ECXTopoExt   = 1 << 22
)

// cpuidFor returns the CPUID table of the vCPU with the given APIC id out of n:
// what KVM supports, with a topology of one package of n cores, one thread each.
// KVM leaves two bits to its users. Without "hypervisor" Linux does not look for
// kvmclock, and without "TSC deadline" it calibrates timers against a PIT that
// this machine lacks.
func cpuidFor(supported []kvm.CPUIDEntry2, id, n int) []kvm.CPUIDEntry2 {
	es := make([]kvm.CPUIDEntry2, len(supported), len(supported)+2)
	copy(es, supported)

	// The lowest bits of an APIC id that number the cores of a package.
	shift := uint32(bits.Len(uint(n - 1)))
	apic, cores := uint32(id), uint32(n)
	topology := make([]bool, 2) // sub-leaves of leaf 0xB seen
	for i := range es {
		e := &es[i]
		switch e.Function {
		case 0x1:
			e.Ebx = e.Ebx&0x0000ffff | apic<<24 | 1<<shift<<16
			e.Ecx |= leaf1ECXHypervisor | leaf1ECXTSCDeadline
			e.Edx &^= leaf1EDXHTT
			if n > 1 {
				e.Edx |= leaf1EDXHTT
			}
		case 0x4: // caches: levels 1 and 2 are a core's own, level 3 the package's
			if e.Eax&0x1f != 0 {
				e.Eax = e.Eax&^0xfffc000 | (1<<shift-1)<<26
				if level := e.Eax >> 5 & 7; level >= 3 {
					e.Eax |= (1<<shift - 1) << 14
				}
			}
		case 0xb, 0x1f:
			setTopology(e, shift, cores, apic)
			if e.Function == 0xb && e.Index < 2 {
				topology[e.Index] = true
			}
		case 0x80000001:
			e.Ecx &^= ext1ECXCmpLegacy
			if n > 1 && isAMD(es) {
				e.Ecx |= ext1ECXCmpLegacy
			}
		case 0x80000008:
			if isAMD(es) {
				e.Ecx = e.Ecx&^0xf0ff | shift<<12 | (cores - 1)
			}
		case 0x8000001d: // AMD's leaf 4
			if e.Eax&0x1f != 0 {
				e.Eax &^= 0x3ffc000
				if level := e.Eax >> 5 & 7; level >= 3 {
					e.Eax |= (cores - 1) << 14
				}
			}
		case 0x8000001e:
			e.Eax, e.Ebx, e.Ecx = apic, apic&0xff, 0
		case 0x80000026: // would have to agree with all of the above: absent
			e.Eax, e.Ebx, e.Ecx, e.Edx = 0, 0, e.Index, 0
		}
	}
	for sub, there := range topology {
		if !there && maxLeaf(es) >= 0xb {
			e := kvm.CPUIDEntry2{Function: 0xb, Index: uint32(sub), Flags: kvm.CPUIDSignificantIndex}
			setTopology(&e, shift, cores, apic)
			es = append(es, e)
		}
	}
	return es
}

// supportedXCR0 returns the extended states that the guest may enable (CPUID leaf
// 0xD), 0 if there is no XSAVE.
func supportedXCR0(es []kvm.CPUIDEntry2) uint64 {
	for _, e := range es {
		if e.Function == 0xd && e.Index == 0 {
			return uint64(e.Edx)<<32 | uint64(e.Eax)
		}
	}
	return 0
}

// setTopology fills a sub-leaf of leaf 0xB or 0x1F: threads, cores, end.
func setTopology(e *kvm.CPUIDEntry2, shift, cores, apic uint32) {
	const levelThread, levelCore = 1, 2
	e.Eax, e.Ebx, e.Ecx, e.Edx = 0, 0, e.Index&0xff, apic
	switch e.Index {
	case 0:
		e.Ebx, e.Ecx = 1, e.Ecx|levelThread<<8
	case 1:
		e.Eax, e.Ebx, e.Ecx = shift, cores, e.Ecx|levelCore<<8
	}
}

func maxLeaf(es []kvm.CPUIDEntry2) uint32 {
	for _, e := range es {
		if e.Function == 0 {
			return e.Eax
		}
	}
	return 0
}

// isAMD tells AMD's and Hygon's meaning of the 0x8000xxxx leaves from Intel's.
func isAMD(es []kvm.CPUIDEntry2) bool {
	for _, e := range es {
		if e.Function == 0 {
			const auth, hygo = 0x68747541, 0x6f677948
			return e.Ebx == auth || e.Ebx == hygo
		}
	}
	return false
}
