package kvm

import (
	"encoding/binary"
	"fmt"
	"strings"

	gokvm "github.com/bobuhiro11/gokvm/kvm"
)

// ExitReason says why KVM_RUN returned (KVM_EXIT_*).
type ExitReason uint32

// Exits that a microVM's monitor tells apart.
const (
	ExitIO            = ExitReason(gokvm.EXITIO)
	ExitHLT           = ExitReason(gokvm.EXITHLT)
	ExitMMIO          = ExitReason(gokvm.EXITMMIO)
	ExitShutdown      = ExitReason(gokvm.EXITSHUTDOWN)
	ExitFailEntry     = ExitReason(gokvm.EXITFAILENTRY)
	ExitIntr          = ExitReason(gokvm.EXITINTR)
	ExitInternalError = ExitReason(gokvm.EXITINTERNALERROR)
	ExitSystemEvent   = ExitReason(24)
	ExitMemoryFault   = ExitReason(39)
)

func (r ExitReason) String() string {
	switch r {
	case ExitIO:
		return "KVM_EXIT_IO"
	case ExitHLT:
		return "KVM_EXIT_HLT"
	case ExitMMIO:
		return "KVM_EXIT_MMIO"
	case ExitShutdown:
		return "KVM_EXIT_SHUTDOWN"
	case ExitFailEntry:
		return "KVM_EXIT_FAIL_ENTRY"
	case ExitIntr:
		return "KVM_EXIT_INTR"
	case ExitInternalError:
		return "KVM_EXIT_INTERNAL_ERROR"
	case ExitSystemEvent:
		return "KVM_EXIT_SYSTEM_EVENT"
	case ExitMemoryFault:
		return "KVM_EXIT_MEMORY_FAULT"
	}
	return fmt.Sprintf("KVM exit %d", uint32(r))
}

const immediateExit = 1 << 8 // the second byte of entry

func (r *Run) setImmediateExit()   { r.entry.Store(immediateExit) }
func (r *Run) immediateExit() bool { return r.entry.Load()&immediateExit != 0 }

// Reason returns why the guest was left.
func (r *Run) Reason() ExitReason { return ExitReason(r.exitReason) }

// IO is an access to I/O ports, KVM_EXIT_IO.
type IO struct {
	Port  uint16
	Size  int  // bytes of one access: 1, 2 or 4
	Write bool // the guest writes
	// Data has one element of Size bytes for each repetition of a string
	// instruction: what was written, or room for the answer.
	Data []byte
}

// IO decodes KVM_EXIT_IO. Data is valid until the next VCPU.Run.
func (v *VCPU) IO() IO {
	d := &v.run.data
	size := int(d[1])
	count := int(binary.NativeEndian.Uint32(d[4:]))
	off := int(binary.NativeEndian.Uint64(d[8:]))
	return IO{
		Port:  binary.NativeEndian.Uint16(d[2:]),
		Size:  size,
		Write: d[0] == gokvm.EXITIOOUT,
		Data:  v.mem[off : off+size*count],
	}
}

// MMIO is an access to a guest physical address without memory, KVM_EXIT_MMIO.
type MMIO struct {
	Addr  uint64
	Write bool
	Data  []byte // 1 to 8 bytes: what was written, or room for the answer
}

// MMIO decodes KVM_EXIT_MMIO. Data is valid until the next VCPU.Run.
func (v *VCPU) MMIO() MMIO {
	d := &v.run.data
	n := min(binary.NativeEndian.Uint32(d[16:]), 8)
	return MMIO{
		Addr:  binary.NativeEndian.Uint64(d[0:]),
		Write: d[20] != 0,
		Data:  d[8 : 8+n],
	}
}

// internalErrors are KVM_INTERNAL_ERROR_*, by number.
var internalErrors = [...]string{
	1: "instruction emulation failed",
	2: "two exceptions at once",
	3: "event delivery failed",
	4: "unexpected hardware exit",
}

// Failure describes an exit after which the vCPU cannot go on, with its
// registers, on a few lines for people.
func (v *VCPU) Failure() string {
	var b strings.Builder
	d := &v.run.data
	reason := v.run.Reason()
	fmt.Fprintf(&b, "vCPU %d: %v", v.id, reason)
	switch reason {
	case ExitInternalError:
		suberror := binary.NativeEndian.Uint32(d[0:])
		ndata := min(binary.NativeEndian.Uint32(d[4:]), 16)
		text := "unknown"
		if int(suberror) < len(internalErrors) && suberror > 0 {
			text = internalErrors[suberror]
		}
		fmt.Fprintf(&b, " %d (%s)", suberror, text)
		const flagInstruction = 1 // KVM_INTERNAL_ERROR_EMULATION_FLAG_INSTRUCTION_BYTES
		if suberror == 1 && ndata >= 4 && binary.NativeEndian.Uint64(d[8:])&flagInstruction != 0 {
			fmt.Fprintf(&b, " at % x", d[17:17+min(d[16], 15)])
			break
		}
		for i := range ndata {
			fmt.Fprintf(&b, " %#x", binary.NativeEndian.Uint64(d[8+8*i:]))
		}
	case ExitFailEntry:
		fmt.Fprintf(&b, ": hardware reason %#x", binary.NativeEndian.Uint64(d[0:]))
	case ExitSystemEvent:
		fmt.Fprintf(&b, ": type %d", binary.NativeEndian.Uint32(d[0:]))
	}
	b.WriteString(v.registers())
	return b.String()
}

func (v *VCPU) registers() string {
	r, err := v.Regs()
	if err != nil {
		return "; registers unknown: " + err.Error()
	}
	s, err := v.Sregs()
	if err != nil {
		return "; registers unknown: " + err.Error()
	}
	return fmt.Sprintf("\nRIP=%#x RSP=%#x RFLAGS=%#x CS=%#x SS=%#x CR0=%#x CR2=%#x CR3=%#x CR4=%#x EFER=%#x"+
		"\nRAX=%#x RBX=%#x RCX=%#x RDX=%#x RSI=%#x RDI=%#x RBP=%#x",
		r.RIP, r.RSP, r.RFLAGS, s.CS.Selector, s.SS.Selector, s.CR0, s.CR2, s.CR3, s.CR4, s.EFER,
		r.RAX, r.RBX, r.RCX, r.RDX, r.RSI, r.RDI, r.RBP)
}
