//go:build e2e

package main

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/wsl2/wsl2/vmm/kvm"
)

// createVM makes a VM and a vCPU: what a KVM that is only a name refuses.
func createVM(dev *os.File) error {
	const createVM, createVCPU = 0xae01, 0xae41 // KVM_CREATE_VM, KVM_CREATE_VCPU
	vm, err := unix.IoctlRetInt(int(dev.Fd()), createVM)
	if err != nil {
		return fmt.Errorf("KVM_CREATE_VM: %w", err)
	}
	vcpu, err := unix.IoctlRetInt(vm, createVCPU)
	if err != nil {
		return fmt.Errorf("KVM_CREATE_VCPU: %w", err)
	}
	unix.Close(vcpu)
	return unix.Close(vm)
}

// interrupts are what a guest gets in the test of l1's exitAfterInjection.
const interrupts = 100

// countWakeUps interrupts a guest and prints how often this machine interrupted
// itself for perf meanwhile: irq_work is IWI in /proc/interrupts.
func countWakeUps() error {
	sys, err := kvm.Open()
	if err != nil {
		return err
	}
	defer sys.Close()
	vm, err := sys.CreateVM()
	if err != nil {
		return err
	}
	defer vm.Close()
	mem, err := unix.Mmap(-1, 0, 0x4000, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
	if err != nil {
		return err
	}
	const (
		start, handler, vector = 0x1000, 0x1100, 0x25
		msrAPICBase            = 0x1b
		bootX2APIC             = 0xfee00d00 // enabled, as x2APIC, of the boot processor
		msrX2APICSVR           = 0x80f      // spurious interrupt vector
		svrEnabled             = 0x1ff
	)
	copy(mem[start:], []byte{0xfb, 0xeb, 0xfe}) // sti; jmp .
	copy(mem[handler:], []byte{
		0xe6, 0x11, // out %al, $0x11
		0x66, 0xb9, 0x0b, 0x08, 0, 0, // mov $0x80b, %ecx: end of interrupt
		0x66, 0x31, 0xc0, 0x66, 0x31, 0xd2, 0x0f, 0x30, // xor %eax, %eax; xor %edx, %edx; wrmsr
		0xcf, // iret
	})
	binary.LittleEndian.PutUint32(mem[4*vector:], handler)
	cpuid, err := sys.SupportedCPUID()
	if err != nil {
		return err
	}
	if err := errors.Join(vm.SetUserMemoryRegion(0, 0, mem), vm.SetIdentityMapAddr(0xfffbc000), vm.SetTSSAddr(0xfffbd000), vm.EnableSplitIRQChip()); err != nil {
		return err
	}
	v, err := vm.CreateVCPU(0)
	if err != nil {
		return err
	}
	defer v.Close()
	s, err := v.Sregs()
	if err != nil {
		return err
	}
	s.CS.Base, s.CS.Selector = 0, 0
	err = errors.Join(v.SetSregs(&s), v.SetRegs(&kvm.Regs{RIP: start, RSP: 0x3000, RFLAGS: 2}), v.SetCPUID2(cpuid),
		v.SetMSRs(kvm.MSREntry{Index: msrAPICBase, Data: bootX2APIC}, kvm.MSREntry{Index: msrX2APICSVR, Data: svrEnabled}))
	if err != nil {
		return err
	}
	release, err := v.Bind()
	if err != nil {
		return err
	}
	defer release()
	before, err := wakeUps()
	if err != nil {
		return err
	}
	for i := range interrupts {
		if err := vm.SignalMSI(0xfee00000, vector); err != nil {
			return err
		}
		r, err := v.Run()
		if err != nil {
			return err
		}
		if r.Reason() != kvm.ExitIO || v.IO().Port != 0x11 {
			return fmt.Errorf("interrupt %d: %v; %s", i, r.Reason(), v.Failure())
		}
	}
	after, err := wakeUps()
	fmt.Println(after - before)
	return err
}

func wakeUps() (n int, err error) {
	text, err := os.ReadFile("/proc/interrupts")
	if err != nil {
		return 0, err
	}
	for line := range strings.Lines(string(text)) {
		f := strings.Fields(line)
		if f[0] != "IWI:" {
			continue
		}
		for _, c := range f[1:] {
			if k, err := strconv.Atoi(c); err == nil {
				n += k
			}
		}
		return n, nil
	}
	return 0, errors.New("/proc/interrupts tells of no IWI")
}

// Every interrupt that a guest gets is one for the machine as well.
func TestRigExitsAfterInjection(t *testing.T) {
	r := rig(t, as("injection", "--timeout", "3m"))
	var n int
	if _, err := fmt.Sscan(string(r.stdout), &n); r.code != 0 || err != nil || n < interrupts {
		t.Errorf("exit status %d, %d wake-ups for %d interrupts\n%s", r.code, n, interrupts, r.stderr)
	}
}
