//go:build kvm

package kvm

import (
	"errors"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/wsl2/wsl2/vmm/eventfd"
)

// realMode is a VM of one page of memory at 0x1000 that starts to run code
// there, in real mode. It has no interrupt controllers unless prepare makes them.
func realMode(t *testing.T, prepare func(*VM), code ...byte) (*VCPU, []byte) {
	t.Helper()
	check := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	sys, err := Open()
	check(err)
	t.Cleanup(func() { check(sys.Close()) })
	mem, err := unix.Mmap(-1, 0, 4096, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
	check(err)
	t.Cleanup(func() { check(unix.Munmap(mem)) })
	copy(mem, code)
	vm, err := sys.CreateVM()
	check(err)
	t.Cleanup(func() { check(vm.Close()) })
	check(vm.SetUserMemoryRegion(0, 0x1000, mem))
	check(vm.SetIdentityMapAddr(0xfffbc000))
	check(vm.SetTSSAddr(0xfffbd000))
	if prepare != nil {
		prepare(vm)
	}
	v, err := vm.CreateVCPU(0)
	check(err)
	t.Cleanup(func() { check(v.Close()) })
	s, err := v.Sregs()
	check(err)
	s.CS.Base, s.CS.Selector = 0, 0
	check(v.SetSregs(&s))
	check(v.SetRegs(&Regs{RIP: 0x1000, RSP: 0x1800, RFLAGS: 2}))
	return v, mem
}

func run(t *testing.T, v *VCPU, want ExitReason) *Run {
	t.Helper()
	r, err := v.Run()
	if err != nil {
		t.Fatal(err)
	}
	if r.Reason() != want {
		t.Fatalf("%v, want %v; %s", r.Reason(), want, v.Failure())
	}
	return r
}

func bind(t *testing.T, v *VCPU) {
	t.Helper()
	release, err := v.Bind()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(release)
}

func TestExits(t *testing.T) {
	v, _ := realMode(t, nil,
		0xb0, 0x42, // mov $0x42, %al
		0xe6, 0x10, // out %al, $0x10
		0xe5, 0x11, // in $0x11, %ax
		0xa3, 0x00, 0x40, // mov %ax, 0x4000
		0xa0, 0x00, 0x50, // mov 0x5000, %al
		0xe6, 0x12, // out %al, $0x12
		0xf4, // hlt
	)
	bind(t, v)
	run(t, v, ExitIO)
	if io := v.IO(); !io.Write || io.Port != 0x10 || io.Size != 1 || string(io.Data) != "\x42" {
		t.Errorf("first exit: %+v", io)
	}
	run(t, v, ExitIO)
	io := v.IO()
	if io.Write || io.Port != 0x11 || io.Size != 2 || len(io.Data) != 2 {
		t.Errorf("second exit: %+v", io)
	}
	copy(io.Data, "\x34\x12")
	run(t, v, ExitMMIO)
	if m := v.MMIO(); !m.Write || m.Addr != 0x4000 || string(m.Data) != "\x34\x12" {
		t.Errorf("third exit: %+v", m)
	}
	run(t, v, ExitMMIO)
	m := v.MMIO()
	if m.Write || m.Addr != 0x5000 || len(m.Data) != 1 {
		t.Errorf("fourth exit: %+v", m)
	}
	m.Data[0] = 0x77
	run(t, v, ExitIO)
	if io := v.IO(); string(io.Data) != "\x77" {
		t.Errorf("fifth exit: %+v", io)
	}
	run(t, v, ExitHLT)
	if r, err := v.Regs(); err != nil || r.RIP != 0x100f {
		t.Errorf("halted at %#x, %v", r.RIP, err)
	}
}

// A write that an ioeventfd takes is no exit; another value or width is.
func TestIOEventFD(t *testing.T) {
	e, err := eventfd.New()
	if err != nil {
		t.Fatal(err)
	}
	defer e.Close()
	v, _ := realMode(t, func(vm *VM) {
		if err := vm.AssignIOEventFD(e.FD(), 0x5050, 1); err != nil {
			t.Fatal(err)
		}
		if err := vm.AssignIOEventFD(e.FD(), 0x5050, 1); !errors.Is(err, unix.EEXIST) {
			t.Errorf("assigned twice: %v", err)
		}
	},
		0x66, 0xc7, 0x06, 0x50, 0x50, 1, 0, 0, 0, // movl $1, 0x5050
		0x66, 0xc7, 0x06, 0x50, 0x50, 2, 0, 0, 0, // movl $2, 0x5050
		0xf4,
	)
	bind(t, v)
	run(t, v, ExitMMIO)
	if m := v.MMIO(); m.Addr != 0x5050 || m.Data[0] != 2 {
		t.Errorf("%+v", m)
	}
	if err := e.Wait(); err != nil {
		t.Error(err)
	}
	run(t, v, ExitHLT)
}

// Read-only memory is read without an exit; a write is one, or an ioeventfd's,
// and changes nothing.
func TestReadOnlyMemory(t *testing.T) {
	page, err := unix.Mmap(-1, 0, 0x1000, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Munmap(page) })
	e, err := eventfd.New()
	if err != nil {
		t.Fatal(err)
	}
	defer e.Close()
	page[0x60] = 0x11
	v, _ := realMode(t, func(vm *VM) {
		if err := errors.Join(vm.SetReadOnlyMemoryRegion(1, 0x5000, page), vm.AssignIOEventFD(e.FD(), 0x5064, 1)); err != nil {
			t.Fatal(err)
		}
	},
		0xa0, 0x60, 0x50, // mov 0x5060, %al
		0xe6, 0x10, // out %al, $0x10
		0x66, 0xc7, 0x06, 0x64, 0x50, 1, 0, 0, 0, // movl $1, 0x5064
		0x66, 0xc7, 0x06, 0x64, 0x50, 3, 0, 0, 0, // movl $3, 0x5064
		0xa0, 0x60, 0x50, // mov 0x5060, %al
		0xe6, 0x10, // out %al, $0x10
		0xf4,
	)
	bind(t, v)
	run(t, v, ExitIO)
	if io := v.IO(); io.Data[0] != 0x11 {
		t.Errorf("read %#x", io.Data)
	}
	run(t, v, ExitMMIO)
	if m := v.MMIO(); !m.Write || m.Addr != 0x5064 || m.Data[0] != 3 {
		t.Errorf("%+v", m)
	}
	if err := e.Wait(); err != nil {
		t.Error(err)
	}
	page[0x60] = 0x22 // as the device's doing
	run(t, v, ExitIO)
	if io := v.IO(); io.Data[0] != 0x22 {
		t.Errorf("read %#x after a change", io.Data)
	}
	run(t, v, ExitHLT)
	if page[0x64] != 0 {
		t.Error("the guest wrote to read-only memory")
	}
}

// A message to the local APIC wakes the processor; one to another does not.
func TestInterrupt(t *testing.T) {
	var vm *VM
	v, code := realMode(t, func(m *VM) {
		vm = m
		if err := vm.EnableSplitIRQChip(); err != nil {
			t.Fatal(err)
		}
	},
		0x0f, 0x01, 0x1e, 0x30, 0x10, // lidt 0x1030: no memory is at 0
		0xe6, 0x10, // out %al, $0x10: ready
		0xfb,       // sti
		0xf4,       // hlt
		0xeb, 0xfd, // jmp to it
	)
	const vector = 0x25
	// 0x1030: IDTR; 0x1100: the table; 0x1040: the handler.
	copy(code[0x30:], []byte{0xff, 0x03, 0x00, 0x11, 0, 0})
	copy(code[0x40:], []byte{0xe6, 0x11, 0xf4}) // out %al, $0x11; hlt
	copy(code[0x100+4*vector:], []byte{0x40, 0x10, 0, 0})
	sys, err := Open()
	if err != nil {
		t.Fatal(err)
	}
	defer sys.Close()
	cpuid, err := sys.SupportedCPUID()
	if err != nil {
		t.Fatal(err)
	}
	const (
		msrAPICBase  = 0x1b
		bootX2APIC   = 0xfee00d00 // enabled, as x2APIC, of the boot processor
		msrX2APICSVR = 0x80f      // spurious interrupt vector
		svrEnabled   = 0x1ff
	)
	if err := errors.Join(v.SetCPUID2(cpuid), v.SetMSRs(MSREntry{Index: msrAPICBase, Data: bootX2APIC}, MSREntry{Index: msrX2APICSVR, Data: svrEnabled})); err != nil {
		t.Fatal(err)
	}
	bind(t, v)
	run(t, v, ExitIO)
	// KVM says nothing of a message that no local APIC takes, or refuses it, as its
	// table of them has room for that id or not. It must not come to another's.
	_ = vm.SignalMSI(0xfee05000, vector+1)
	if err := vm.SignalMSI(0xfee00000, vector); err != nil {
		t.Fatal(err)
	}
	run(t, v, ExitIO)
	if io := v.IO(); io.Port != 0x11 {
		t.Errorf("%+v", io)
	}
}

// Kick ends Run in a guest that never leaves by itself, and each later Run.
func TestKick(t *testing.T) {
	for range 50 {
		v, _ := realMode(t, nil, 0xe6, 0x10, 0xeb, 0xfe) // out %al, $0x10; jmp .
		bind(t, v)
		run(t, v, ExitIO)
		kicked := make(chan struct{})
		go func() { v.Kick(); close(kicked) }()
		for range 2 {
			if _, err := v.Run(); !errors.Is(err, ErrKicked) {
				t.Fatal(err)
			}
		}
		<-kicked
	}
}

// Other signals for the thread, such as the runtime's own, do not end Run.
func TestOtherSignals(t *testing.T) {
	v, _ := realMode(t, nil, 0xb9, 0xff, 0xff, // mov $0xffff, %cx
		0x66, 0x60, 0x66, 0x61, // pushal; popal
		0xe2, 0xfa, // loop
		0xf4)
	bind(t, v)
	tid := unix.Gettid()
	stop, stopped := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(stopped)
		for {
			select {
			case <-stop:
				return
			default:
				_ = unix.Tgkill(unix.Getpid(), tid, unix.SIGURG)
			}
		}
	}()
	run(t, v, ExitHLT)
	close(stop)
	<-stopped
}

func TestShutdownAndFailure(t *testing.T) {
	// Exception without a vector table, twice over.
	v, _ := realMode(t, nil, 0x0f, 0x01, 0x1e, 0x10, 0x10, 0x0f, 0x0b) // lidt 0x1010 (limit 0); ud2
	bind(t, v)
	run(t, v, ExitShutdown)

	// Running code where no memory is.
	v, _ = realMode(t, nil, 0xea, 0x00, 0x90, 0x00, 0x00) // ljmp $0, $0x9000
	bind(t, v)
	run(t, v, ExitInternalError)
	if s := v.Failure(); !strings.Contains(s, "KVM_EXIT_INTERNAL_ERROR 1 (instruction emulation failed)") || !strings.Contains(s, "RIP=0x9000") {
		t.Error(s)
	}
}

func TestRefusals(t *testing.T) {
	v, _ := realMode(t, nil, 0xf4)
	if err := v.SetMSRs(MSREntry{Index: 0x1a0, Data: 1}, MSREntry{Index: 0xdead0000, Data: 1}); err == nil || !strings.Contains(err.Error(), "0xdead0000") {
		t.Error(err)
	}
	if err := v.SetMSRs(make([]MSREntry, 17)...); err == nil {
		t.Error("17 MSRs taken")
	}
	if err := v.SetCPUID2(make([]CPUIDEntry2, maxCPUIDEntries+1)); err == nil {
		t.Error("too many CPUID entries taken")
	}
}
