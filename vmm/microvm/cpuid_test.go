package microvm

import (
	"testing"

	"github.com/wsl2/wsl2/vmm/kvm"
)

func leaf(t *testing.T, es []kvm.CPUIDEntry2, function, index uint32) kvm.CPUIDEntry2 {
	t.Helper()
	for _, e := range es {
		if e.Function == function && (e.Index == index || e.Flags&kvm.CPUIDSignificantIndex == 0) {
			return e
		}
	}
	t.Fatalf("no leaf %#x.%d", function, index)
	return kvm.CPUIDEntry2{}
}

// A host as KVM describes it: its own APIC ids and topology stand everywhere.
func host(vendor uint32) []kvm.CPUIDEntry2 {
	const sub = kvm.CPUIDSignificantIndex
	return []kvm.CPUIDEntry2{
		{Function: 0, Eax: 0x1f, Ebx: vendor},
		{Function: 1, Ebx: 0x07ff0842, Ecx: 1 << 23, Edx: 1 << 28},
		{Function: 4, Index: 0, Flags: sub, Eax: 0x1c000121 | 0x3ffc000},
		{Function: 4, Index: 3, Flags: sub, Eax: 0x1c000163 | 0x3ffc000},
		{Function: 4, Index: 4, Flags: sub},
		{Function: 0xb, Index: 0, Flags: sub, Eax: 1, Ebx: 2, Ecx: 0x100, Edx: 77},
		{Function: 0x1f, Index: 1, Flags: sub, Eax: 6, Ebx: 64, Ecx: 0x201, Edx: 77},
		{Function: 0x80000001, Ecx: ext1ECXTopoExt | ext1ECXCmpLegacy},
		{Function: 0x80000008, Eax: 0x3030, Ecx: 0x707f},
		{Function: 0x8000001d, Index: 3, Flags: sub, Eax: 0x163 | 0x3ffc000},
		{Function: 0x8000001e, Eax: 77, Ebx: 0x123, Ecx: 0x304},
		{Function: 0x80000026, Index: 0, Flags: sub, Eax: 1, Ebx: 2},
	}
}

const (
	vendorIntel = 0x756e6547
	vendorAMD   = 0x68747541
)

func TestCPUID(t *testing.T) {
	for _, vendor := range []uint32{vendorIntel, vendorAMD} {
		for _, n := range []int{1, 2, 3, 64} {
			for id := range n {
				before := host(vendor)
				es := cpuidFor(before, id, n)
				if before[1].Ebx != 0x07ff0842 {
					t.Fatal("the host's table was changed: vCPUs share it")
				}
				e := leaf(t, es, 1, 0)
				if e.Ecx&leaf1ECXHypervisor == 0 || e.Ecx&leaf1ECXTSCDeadline == 0 {
					t.Error("no hypervisor, or no TSC deadline timer")
				}
				if int(e.Ebx>>24) != id || int(e.Ebx>>16&0xff) < n || e.Ebx&0xffff != 0x0842 || (e.Edx&leaf1EDXHTT != 0) != (n > 1) {
					t.Errorf("%d of %d: leaf 1 EBX %#x EDX %#x", id, n, e.Ebx, e.Edx)
				}
				for _, f := range []uint32{0xb, 0x1f} {
					if f == 0xb {
						if e := leaf(t, es, f, 0); int(e.Edx) != id || e.Ebx != 1 || e.Eax != 0 || e.Ecx != 0x100 {
							t.Errorf("%d of %d: leaf %#x.0 %+v", id, n, f, e)
						}
					}
					if e := leaf(t, es, f, 1); int(e.Edx) != id || int(e.Ebx) != n || n > 1<<e.Eax || e.Ecx != 0x201 {
						t.Errorf("%d of %d: leaf %#x.1 %+v", id, n, f, e)
					}
				}
				if e := leaf(t, es, 4, 0); e.Eax>>14&0xfff != 0 || e.Eax&0x3fff != 0x121 || int(e.Eax>>26)+1 < n {
					t.Errorf("%d of %d: first level cache %#x", id, n, e.Eax)
				}
				if e := leaf(t, es, 4, 3); int(e.Eax>>14&0xfff)+1 < n {
					t.Errorf("%d of %d: last level cache %#x", id, n, e.Eax)
				}
				if vendor != vendorAMD {
					continue
				}
				if e := leaf(t, es, 0x80000008, 0); int(e.Ecx&0xff)+1 != n || n > 1<<(e.Ecx>>12&0xf) {
					t.Errorf("%d of %d: leaf 0x80000008 ECX %#x", id, n, e.Ecx)
				}
				if e := leaf(t, es, 0x8000001e, 0); int(e.Eax) != id || e.Ebx != uint32(id) {
					t.Errorf("%d of %d: leaf 0x8000001e %+v", id, n, e)
				}
			}
		}
	}
}

func TestSupportedXCR0(t *testing.T) {
	es := append(host(vendorIntel),
		kvm.CPUIDEntry2{Function: 0xd, Index: 1, Flags: kvm.CPUIDSignificantIndex, Eax: 0xf},
		kvm.CPUIDEntry2{Function: 0xd, Index: 0, Flags: kvm.CPUIDSignificantIndex, Eax: 0x207, Edx: 1})
	if got := supportedXCR0(es); got != 0x1_0000_0207 {
		t.Errorf("%#x", got)
	}
	if got := supportedXCR0(host(vendorIntel)); got != 0 {
		t.Errorf("%#x without XSAVE", got)
	}
}
