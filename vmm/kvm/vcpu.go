package kvm

import (
	"errors"
	"fmt"
	"os"
	"runtime"
	"sync"
	"sync/atomic"
	"syscall"
	"unsafe"

	gokvm "github.com/bobuhiro11/gokvm/kvm"
	"golang.org/x/sys/unix"
)

// kickSignal gets a thread out of KVM_RUN. Any signal with a handler does that;
// the Go runtime installs one for every realtime signal, and does nothing in it
// unless somebody asked for the signal. 32 to 34 are the C library's.
const kickSignal = syscall.Signal(40)

// VCPU is a virtual CPU. Its methods are for the thread it is bound to, except
// Kick, which is for all.
type VCPU struct {
	id  int
	fd  int    // immutable until Close
	mem []byte // the kvm_run mapping, immutable until Close
	run *Run   // the start of mem

	mu     sync.Mutex
	tid    int  // of the bound thread, 0 for none; guarded by mu
	closed bool // guarded by mu
}

// ID returns the vCPU's number, which is its APIC id.
func (v *VCPU) ID() int { return v.id }

// Bind ties the calling goroutine to its thread and the vCPU to both, until the
// returned function is called: KVM wants "vcpu ioctls to be issued from the same
// thread that was used to create the vcpu" or pays for a migration, and Kick
// needs a thread to signal.
func (v *VCPU) Bind() (release func(), err error) {
	runtime.LockOSThread()
	// Go leaves signals blocked that its parent had blocked.
	var set unix.Sigset_t
	n := uint(kickSignal - 1)
	set.Val[n/64] = 1 << (n % 64)
	if err := unix.PthreadSigmask(unix.SIG_UNBLOCK, &set, nil); err != nil {
		runtime.UnlockOSThread()
		return nil, fmt.Errorf("kvm: unblock the kick signal: %w", err)
	}
	v.mu.Lock()
	v.tid = unix.Gettid()
	v.mu.Unlock()
	return func() {
		v.mu.Lock()
		v.tid = 0
		v.mu.Unlock()
		runtime.UnlockOSThread()
	}, nil
}

// Kick makes the current call of Run, if there is one, and every later one
// return ErrKicked. It may be called by any goroutine, at any time.
func (v *VCPU) Kick() {
	v.mu.Lock()
	defer v.mu.Unlock()
	if v.closed {
		return
	}
	// immediate_exit closes the gap between the last look at any flag and the
	// entry into the guest (api.rst §5).
	v.run.setImmediateExit()
	if v.tid != 0 {
		// It cannot fail: the thread is there as long as tid is set.
		_ = unix.Tgkill(os.Getpid(), v.tid, kickSignal)
	}
}

// Close unmaps kvm_run and closes the vCPU. No other call but Kick may be under
// way.
func (v *VCPU) Close() error {
	v.mu.Lock()
	defer v.mu.Unlock()
	v.closed = true
	return errors.Join(unix.Munmap(v.mem), unix.Close(v.fd))
}

// ErrKicked is what Run returns after Kick.
var ErrKicked = errors.New("kvm: vCPU kicked")

// Run is KVM_RUN (0x80, api.rst §4.10). It runs the guest until the monitor has
// something to do and returns what (valid until the next Run), or ErrKicked.
func (v *VCPU) Run() (*Run, error) {
	for {
		_, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(v.fd), kvmRun, 0)
		switch errno {
		case 0:
			return v.run, nil
		case unix.EINTR, unix.EAGAIN:
			// EINTR: our kick, or any other signal for this thread. EAGAIN: an
			// application processor was given its start-up interrupt.
			if v.run.immediateExit() {
				return nil, ErrKicked
			}
		default:
			return nil, fmt.Errorf("kvm: KVM_RUN: vCPU %d: %w", v.id, errno)
		}
	}
}

// Regs is KVM_GET_REGS (0x81, api.rst §4.11).
func (v *VCPU) Regs() (Regs, error) {
	var r Regs
	if err := ioctl(v.fd, kvmGetRegs, &r); err != nil {
		return Regs{}, fmt.Errorf("kvm: KVM_GET_REGS: vCPU %d: %w", v.id, err)
	}
	return r, nil
}

// SetRegs is KVM_SET_REGS (0x82, api.rst §4.12).
func (v *VCPU) SetRegs(r *Regs) error {
	if err := ioctl(v.fd, kvmSetRegs, r); err != nil {
		return fmt.Errorf("kvm: KVM_SET_REGS: vCPU %d: %w", v.id, err)
	}
	return nil
}

// Sregs is KVM_GET_SREGS (0x83, api.rst §4.13).
func (v *VCPU) Sregs() (Sregs, error) {
	var r Sregs
	if err := ioctl(v.fd, kvmGetSregs, &r); err != nil {
		return Sregs{}, fmt.Errorf("kvm: KVM_GET_SREGS: vCPU %d: %w", v.id, err)
	}
	return r, nil
}

// SetSregs is KVM_SET_SREGS (0x84, api.rst §4.14).
func (v *VCPU) SetSregs(r *Sregs) error {
	if err := ioctl(v.fd, kvmSetSregs, r); err != nil {
		return fmt.Errorf("kvm: KVM_SET_SREGS: vCPU %d: %w", v.id, err)
	}
	return nil
}

// SetCPUID2 is KVM_SET_CPUID2 (0x90, api.rst §4.76): "defines the vcpu responses
// to the cpuid instruction".
func (v *VCPU) SetCPUID2(entries []CPUIDEntry2) error {
	c := &cpuid2{n: uint32(len(entries))}
	if copy(c.entries[:], entries) < len(entries) {
		return fmt.Errorf("kvm: %d CPUID entries, KVM takes %d", len(entries), maxCPUIDEntries)
	}
	if err := ioctl(v.fd, kvmSetCPUID2, c); err != nil {
		return fmt.Errorf("kvm: KVM_SET_CPUID2: vCPU %d: %w", v.id, err)
	}
	return nil
}

// SetXCR0 is KVM_SET_XCRS (0xa7, api.rst §4.62, KVM_CAP_XCRS) for the only
// register there is: the extended states that XSAVE handles.
func (v *VCPU) SetXCR0(value uint64) error {
	x := &gokvm.XCRS{NrXRCS: 1}
	x.Registers[0].Value = value
	if err := ioctl(v.fd, kvmSetXCRs, x); err != nil {
		return fmt.Errorf("kvm: KVM_SET_XCRS: vCPU %d: XCR0 %#x: %w", v.id, value, err)
	}
	return nil
}

// msrs is struct kvm_msrs with room for the few that we set.
type msrs struct {
	n       uint32
	_       uint32
	entries [16]MSREntry
}

// SetMSRs is KVM_SET_MSRS (0x89, api.rst §4.17). Entries must be at most 16. It
// stops at the first MSR that KVM refuses and names it.
func (v *VCPU) SetMSRs(entries ...MSREntry) error {
	m := msrs{n: uint32(len(entries))}
	if copy(m.entries[:], entries) < len(entries) {
		return fmt.Errorf("kvm: %d MSRs at once, at most %d", len(entries), len(m.entries))
	}
	// The result is the number of MSRs set, so this cannot be ioctl.
	for {
		n, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(v.fd), kvmSetMSRs, uintptr(unsafe.Pointer(&m)))
		switch {
		case errno == unix.EINTR:
			continue
		case errno != 0:
			return fmt.Errorf("kvm: KVM_SET_MSRS: vCPU %d: %w", v.id, errno)
		case int(n) < len(entries):
			return fmt.Errorf("kvm: KVM_SET_MSRS: vCPU %d: MSR %#x refused", v.id, entries[n].Index)
		}
		return nil
	}
}

// Run is the page that KVM shares with the monitor, struct kvm_run (api.rst §5),
// up to the union with the exits' details. The kernel writes it while Run runs.
type Run struct {
	entry      atomic.Uint32 // request_interrupt_window, immediate_exit, padding
	_          uint32
	exitReason uint32
	_          uint32
	_          [2]uint64 // cr8, apic_base
	data       [256]byte
}
