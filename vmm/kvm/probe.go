package kvm

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"time"

	"golang.org/x/sys/unix"
)

//go:generate testdata/generate.sh

// ErrUnusable is wrapped by Probe's error if /dev/kvm is there but does not run
// guests as a processor would, as some software hypervisors do not.
var ErrUnusable = errors.New("kvm: this host's KVM cannot run a Linux guest")

// steps name what the probe's guest does, by the numbers in testdata/probe.S.
var steps = [...]string{
	0:  "it does not run a single instruction in long mode",
	1:  "CPUID at CPL 0 does not give what KVM_SET_CPUID2 set",
	2:  "FWAIT fails at CPL 0",
	3:  "INT3 fails at CPL 0",
	4:  "POPCNT fails at CPL 0",
	5:  "CMPXCHG16B fails at CPL 0",
	6:  "XSAVE or XRSTOR fails at CPL 0",
	7:  "WRMSR of the SYSCALL registers fails",
	8:  "IRETQ does not reach CPL 3",
	9:  "CPUID at CPL 3 does not give what KVM_SET_CPUID2 set",
	10: "SYSCALL does not reach CPL 0",
	11: "SYSRET does not return to CPL 3",
	12: "OUT fails",
}

const probeDone = 12

// probeTimeout bounds Probe where its context does not. A usable KVM takes a
// few milliseconds.
const probeTimeout = time.Second

// Places in the probe's guest memory, one huge page that maps itself. Those of
// code, notes and stacks are known to testdata/probe.S as well.
const (
	probeGDT        = 0x500
	probePML4       = 0x1000
	probePDPT       = 0x2000
	probePD         = 0x3000
	probeIDT        = 0x4000
	probeStack      = 0x5800
	probeStep       = 0x6000
	probeValue      = 0x6008
	probeCodeAddr   = 0x8000
	probeMemorySize = 0x9000

	probeMagic     = 0x45425250 // "PRBE"
	probeMagicLeaf = 0x40000000
	probePort      = 0xf4
)

// Probe tells whether this host's KVM can run a 64-bit Linux, by running a guest
// of a few instructions that does what matters: long mode, exceptions, CPUID as
// set, the instructions that kernels rely on, CPL 3 and back by SYSCALL. Nil
// means yes. Errors wrap ErrAbsent, ErrPermission, ErrVersion, ErrCapability or
// ErrUnusable and say what to do or what failed. It answers within ctx, and
// within a second, whatever KVM does.
func Probe(ctx context.Context) error {
	sys, err := Open()
	if err != nil {
		return err
	}
	defer sys.Close()
	ctx, cancel := context.WithTimeout(ctx, probeTimeout)
	defer cancel()
	p, err := newProbe(sys)
	if err != nil {
		return err
	}
	verdict := make(chan error, 1)
	go func() {
		verdict <- p.run()
		// After the answer: the kernel takes some 10 ms to free a VM.
		p.close()
	}()
	select {
	case err := <-verdict:
		return err
	case <-ctx.Done():
	}
	p.vcpu.Kick()
	if err := context.Cause(ctx); !errors.Is(err, context.DeadlineExceeded) {
		return fmt.Errorf("kvm: probe: %w", err)
	}
	// Not even the guest's notes are read: it may be writing them. A KVM that
	// ignores the kick as well keeps the goroutine, and the VM, for itself.
	return fmt.Errorf("%w: the probe's guest did not come to an end in time", ErrUnusable)
}

// probe is the probe's VM.
type probe struct {
	vm   *VM
	vcpu *VCPU
	mem  []byte
}

func newProbe(sys *System) (p *probe, err error) {
	p = &probe{}
	defer func() {
		if err != nil {
			p.close()
		}
	}()
	if p.mem, err = unix.Mmap(-1, 0, probeMemorySize, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS); err != nil {
		return nil, fmt.Errorf("kvm: probe: map memory: %w", err)
	}
	if p.vm, err = sys.CreateVM(); err != nil {
		return nil, err
	}
	if err = p.vm.SetUserMemoryRegion(0, 0, p.mem); err != nil {
		return nil, err
	}
	if p.vcpu, err = p.vm.CreateVCPU(0); err != nil {
		return nil, err
	}
	features, err := p.setCPUID(sys)
	if err != nil {
		return nil, err
	}
	p.writeTables()
	s, err := p.vcpu.Sregs()
	if err != nil {
		return nil, err
	}
	mode := LongMode{
		CR3:  probePML4,
		GDT:  Descriptor{Base: probeGDT, Limit: 8*8 - 1},
		IDT:  Descriptor{Base: probeIDT, Limit: 4*16 - 1},
		Code: 0x08, Data: 0x10, TSS: 0x30,
		CR4: 1<<9 | 1<<10, // OSFXSR, OSXMMEXCPT
	}
	if features&probeXSAVE != 0 {
		mode.CR4 |= 1 << 18 // OSXSAVE
	}
	mode.Apply(&s)
	if err = p.vcpu.SetSregs(&s); err != nil {
		return nil, err
	}
	return p, p.vcpu.SetRegs(&Regs{RIP: probeCodeAddr, RSP: probeStack, RFLAGS: 2, RDI: features})
}

// Features that the guest exercises, if this host has them: bits of its RDI.
const (
	probePOPCNT     = 1 << 0
	probeCMPXCHG16B = 1 << 1
	probeXSAVE      = 1 << 2
)

// setCPUID gives the guest all that is supported, with a mark of our own in
// place of the hypervisor's name, and returns what to exercise.
func (p *probe) setCPUID(sys *System) (features uint64, err error) {
	entries, err := sys.SupportedCPUID()
	if err != nil {
		return 0, err
	}
	marked := false
	for i := range entries {
		switch e := &entries[i]; e.Function {
		case 1:
			for bit, f := range map[int]uint64{23: probePOPCNT, 13: probeCMPXCHG16B, 26: probeXSAVE} {
				if e.Ecx>>bit&1 != 0 {
					features |= f
				}
			}
		case probeMagicLeaf:
			e.Ebx, marked = probeMagic, true
		}
	}
	if !marked {
		entries = append(entries, CPUIDEntry2{Function: probeMagicLeaf, Eax: probeMagicLeaf, Ebx: probeMagic})
	}
	return features, p.vcpu.SetCPUID2(entries)
}

func (p *probe) writeTables() {
	put := func(addr int, v uint64) { binary.LittleEndian.PutUint64(p.mem[addr:], v) }
	const presentWritableUser = 7
	put(probePML4, probePDPT|presentWritableUser)
	put(probePDPT, probePD|presentWritableUser)
	put(probePD, 1<<7|presentWritableUser) // 2 MiB at 0
	for i, d := range []uint64{
		0, 0x00af9b000000ffff, 0x00cf93000000ffff, // CPL 0: code, data
		0, 0x00cff3000000ffff, 0x00affb000000ffff, // CPL 3: 32-bit code (none), data, code
		0x00008b000000ffff, 0, // TSS
	} {
		put(probeGDT+8*i, d)
	}
	// Vector 3: an interrupt gate to CPL 0 code.
	handler := uint64(probeCodeAddr + probeBreakpoint)
	put(probeIDT+3*16, handler&0xffff|0x08<<16|0x8e<<40|handler>>16<<48)
	copy(p.mem[probeCodeAddr:], probeCode[:])
}

// run runs the guest and judges how far it came.
func (p *probe) run() error {
	release, err := p.vcpu.Bind()
	if err != nil {
		return err
	}
	defer release()
	run, err := p.vcpu.Run()
	if errors.Is(err, ErrKicked) {
		return err // nobody waits for it any more
	}
	step := binary.LittleEndian.Uint64(p.mem[probeStep:])
	value := binary.LittleEndian.Uint64(p.mem[probeValue:])
	switch {
	case err != nil:
		return fmt.Errorf("%w: %s (%w)", ErrUnusable, stepName(step), err)
	case run.Reason() == ExitIO && step == probeDone && p.vcpu.IO().Port == probePort:
		return nil
	}
	return fmt.Errorf("%w: %s (found %#x, then %v)", ErrUnusable, stepName(step), value, run.Reason())
}

func stepName(step uint64) string {
	if step < uint64(len(steps)) {
		return steps[step]
	}
	return "the guest's memory is not what the guest wrote"
}

// close releases everything, in the order that KVM needs.
func (p *probe) close() {
	if p.vcpu != nil {
		p.vcpu.Close()
	}
	if p.vm != nil {
		p.vm.Close()
	}
	if p.mem != nil {
		_ = unix.Munmap(p.mem)
	}
}
