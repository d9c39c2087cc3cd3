package kvm

import (
	"testing"
	"unsafe"

	gokvm "github.com/bobuhiro11/gokvm/kvm"
	"golang.org/x/sys/unix"
)

// The numbers and sizes are what a C program prints that includes <linux/kvm.h>
// on x86-64.
func TestNumbers(t *testing.T) {
	for _, c := range []struct {
		name      string
		got, want uintptr
	}{
		{"KVM_CHECK_EXTENSION", kvmCheckExtension, 0xae03},
		{"KVM_GET_SUPPORTED_CPUID", kvmGetSupportedCPUID, 0xc008ae05},
		{"KVM_SET_USER_MEMORY_REGION", kvmSetUserMemoryRegion, 0x4020ae46},
		{"KVM_SET_IDENTITY_MAP_ADDR", kvmSetIdentityMapAddr, 0x4008ae48},
		{"KVM_IOEVENTFD", kvmIOEventFD, 0x4040ae79},
		{"KVM_RUN", kvmRun, 0xae80},
		{"KVM_GET_REGS", kvmGetRegs, 0x8090ae81},
		{"KVM_SET_REGS", kvmSetRegs, 0x4090ae82},
		{"KVM_GET_SREGS", kvmGetSregs, 0x8138ae83},
		{"KVM_SET_SREGS", kvmSetSregs, 0x4138ae84},
		{"KVM_SET_MSRS", kvmSetMSRs, 0x4008ae89},
		{"KVM_SET_CPUID2", kvmSetCPUID2, 0x4008ae90},
		{"KVM_ENABLE_CAP", kvmEnableCap, 0x4068aea3},
		{"KVM_SIGNAL_MSI", kvmSignalMSI, 0x4020aea5},
	} {
		if c.got != c.want {
			t.Errorf("%s is %#x, want %#x", c.name, c.got, c.want)
		}
	}
}

func TestSizes(t *testing.T) {
	for _, c := range []struct {
		name      string
		got, want uintptr
	}{
		{"kvm_regs", unsafe.Sizeof(Regs{}), 144},
		{"kvm_sregs", unsafe.Sizeof(Sregs{}), 312},
		{"kvm_segment", unsafe.Sizeof(Segment{}), 24},
		{"kvm_dtable", unsafe.Sizeof(Descriptor{}), 16},
		{"kvm_cpuid_entry2", unsafe.Sizeof(CPUIDEntry2{}), 40},
		{"kvm_cpuid2.entries", unsafe.Offsetof(cpuid2{}.entries), 8},
		{"kvm_msr_entry", unsafe.Sizeof(MSREntry{}), 16},
		{"kvm_msrs.entries", unsafe.Offsetof(msrs{}.entries), 8},
		{"kvm_userspace_memory_region", unsafe.Sizeof(gokvm.UserspaceMemoryRegion{}), 32},
		{"kvm_xcrs", unsafe.Sizeof(gokvm.XCRS{}), 392},
		{"kvm_enable_cap", unsafe.Sizeof(enableCap{}), 104},
		{"kvm_msi", unsafe.Sizeof(msi{}), 32},
		{"kvm_ioeventfd", unsafe.Sizeof(ioeventfd{}), 64},
		{"kvm_run.exit_reason", unsafe.Offsetof(Run{}.exitReason), 8},
		{"kvm_run.io", unsafe.Offsetof(Run{}.data), 32},
		{"kvm_run.kvm_valid_regs", unsafe.Sizeof(Run{}), 288},
	} {
		if c.got != c.want {
			t.Errorf("%s is %d, want %d", c.name, c.got, c.want)
		}
	}
}

// ioctl must pass a pointer to the variable even if the goroutine's stack moves
// on the way: a wrapper that turns the pointer into an integer first lets the
// kernel write to the stack that was left behind, now and then. The depth of the
// call decides whether the stack has to grow just there, so every depth is tried.
// The ioctl is a pipe's FIONREAD (TIOCINQ), which needs no KVM.
func TestIoctlSurvivesStackGrowth(t *testing.T) {
	var p [2]int
	if err := unix.Pipe2(p[:], unix.O_CLOEXEC); err != nil {
		t.Fatal(err)
	}
	defer unix.Close(p[0])
	defer unix.Close(p[1])
	if _, err := unix.Write(p[1], make([]byte, 1234)); err != nil {
		t.Fatal(err)
	}
	for depth := range 1000 {
		got := make(chan int32)
		go func() { // a goroutine of its own starts with a small stack
			got <- atDepth(depth, p[0])
		}()
		if n := <-got; n != 1234 {
			t.Fatalf("at depth %d the kernel's answer went elsewhere: got %d", depth, n)
		}
	}
}

//go:noinline
func atDepth(depth, fd int) int32 {
	var pad [16]byte
	pad[depth%16] = 1
	if depth > 0 {
		return atDepth(depth-1, fd) + int32(pad[(depth+1)%16])
	}
	var n int32
	if err := ioctl(fd, unix.TIOCINQ, &n); err != nil {
		return -1
	}
	return n
}

func TestExitReasonString(t *testing.T) {
	for r, want := range map[ExitReason]string{
		ExitInternalError: "KVM_EXIT_INTERNAL_ERROR",
		ExitShutdown:      "KVM_EXIT_SHUTDOWN",
		99:                "KVM exit 99",
	} {
		if r.String() != want {
			t.Errorf("%d is %q, want %q", uint32(r), r, want)
		}
	}
}

// vcpuWith returns a VCPU whose kvm_run page holds the given exit.
func vcpuWith(reason ExitReason, data ...byte) *VCPU {
	mem := make([]byte, 8192)
	v := &VCPU{fd: -1, mem: mem, run: (*Run)(unsafe.Pointer(&mem[0]))}
	v.run.exitReason = uint32(reason)
	copy(v.run.data[:], data)
	return v
}

func TestDecodeIO(t *testing.T) {
	// outw %ax, $0x3f8, three times, data at 4096
	v := vcpuWith(ExitIO, 1, 2, 0xf8, 0x03, 3, 0, 0, 0, 0, 0x10, 0, 0, 0, 0, 0, 0)
	copy(v.mem[4096:], "abcdef")
	io := v.IO()
	if !io.Write || io.Size != 2 || io.Port != 0x3f8 || string(io.Data) != "abcdef" {
		t.Errorf("decoded %+v", io)
	}
}

func TestDecodeMMIO(t *testing.T) {
	v := vcpuWith(ExitMMIO, 0x50, 0, 0, 0xd0, 0, 0, 0, 0, 1, 2, 3, 4, 0, 0, 0, 0, 4, 0, 0, 0, 1)
	m := v.MMIO()
	if m.Addr != 0xd0000050 || !m.Write || string(m.Data) != "\x01\x02\x03\x04" {
		t.Errorf("decoded %+v", m)
	}
	// What is written to Data is what the guest reads.
	m.Data[0] = 9
	if v.run.data[8] != 9 {
		t.Error("Data is a copy")
	}
}

func TestKickAfterClose(t *testing.T) {
	v := &VCPU{closed: true}
	v.Kick() // does not touch kvm_run, which is gone
}
