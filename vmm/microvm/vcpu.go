package microvm

import (
	"errors"
	"fmt"

	"github.com/wsl2/wsl2/vmm/boot"
	"github.com/wsl2/wsl2/vmm/engine"
	"github.com/wsl2/wsl2/vmm/kvm"
)

type vcpu struct{ *kvm.VCPU }

// MSRs that firmware would have set.
const (
	msrMiscEnable     = 0x1a0
	miscFastString    = 1 << 0 // without it Linux avoids rep movsb
	msrMTRRDefType    = 0x2ff
	mtrrEnabled       = 1 << 11
	mtrrTypeWriteBack = 6
)

// createVCPUs makes all vCPUs and prepares the first. The others wait for the
// first one's INIT and SIPI, inside KVM.
func (m *machine) createVCPUs(sys *kvm.System, vm *kvm.VM, entry boot.Entry) ([]*vcpu, error) {
	supported, err := sys.SupportedCPUID()
	if err != nil {
		return nil, err
	}
	var vcpus []*vcpu
	for id := range m.spec.CPUs {
		c, err := vm.CreateVCPU(id)
		if err != nil {
			return nil, err
		}
		m.onRelease(c.Close)
		vcpus = append(vcpus, &vcpu{c})
		if err := c.SetCPUID2(cpuidFor(supported, id, m.spec.CPUs)); err != nil {
			return nil, err
		}
		// The guest sets XCR0 itself. A host that is emulated may not tell KVM of
		// it, whose CPUID leaf 0xD then gives the sizes of the state after reset:
		// the guest takes XSAVE for broken and does without AVX.
		if xcr0 := supportedXCR0(supported); xcr0 != 0 {
			if err := c.SetXCR0(xcr0); err != nil {
				return nil, err
			}
		}
		if err := c.SetMSRs(
			kvm.MSREntry{Index: msrMiscEnable, Data: miscFastString},
			kvm.MSREntry{Index: msrMTRRDefType, Data: mtrrEnabled | mtrrTypeWriteBack},
		); err != nil {
			return nil, err
		}
	}
	return vcpus, enterKernel(vcpus[0].VCPU, entry)
}

// enterKernel sets the registers that the 64-bit boot protocol asks for.
func enterKernel(c *kvm.VCPU, e boot.Entry) error {
	s, err := c.Sregs()
	if err != nil {
		return err
	}
	kvm.LongMode{
		CR3:  uint64(e.CR3),
		GDT:  kvm.Descriptor{Base: uint64(e.GDT), Limit: boot.GDTLimit},
		Code: boot.CodeSelector,
		Data: boot.DataSelector,
		TSS:  boot.TSSSelector,
	}.Apply(&s)
	if err := c.SetSregs(&s); err != nil {
		return err
	}
	const rflagsReserved = 1 << 1
	return c.SetRegs(&kvm.Regs{
		RIP:    uint64(e.RIP),
		RSI:    uint64(e.RSI),
		RSP:    uint64(e.RSP),
		RFLAGS: rflagsReserved,
	})
}

// run runs the vCPU on a thread of its own until the machine ends and returns
// how, from this vCPU's point of view.
func (v *vcpu) run(m *machine) engine.Exit {
	release, err := v.Bind()
	if err != nil {
		return engine.Exit{Reason: engine.ReasonFailed, Detail: err.Error()}
	}
	defer release()
	for {
		run, err := v.Run()
		if err != nil {
			if errors.Is(err, kvm.ErrKicked) {
				return engine.Exit{Reason: engine.ReasonKilled} // it was settled before the kick
			}
			return engine.Exit{Reason: engine.ReasonFailed, Detail: err.Error() + "\n" + v.Failure()}
		}
		switch run.Reason() {
		case kvm.ExitIO:
			if exit, ended := m.ports.access(v.IO()); ended {
				return exit
			}
		case kvm.ExitMMIO:
			m.bus.access(v.MMIO())
		case kvm.ExitShutdown:
			return engine.Exit{Reason: engine.ReasonReset, Detail: "triple fault"}
		case kvm.ExitIntr:
		case kvm.ExitSystemEvent:
			return engine.Exit{Reason: engine.ReasonReset, Detail: v.Failure()}
		default:
			return engine.Exit{Reason: engine.ReasonFailed, Detail: fmt.Sprintf("KVM cannot run the guest any further: %s", v.Failure())}
		}
	}
}
