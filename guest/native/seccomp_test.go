package native

import (
	"encoding/binary"
	"testing"

	"golang.org/x/sys/unix"
)

// run is the kernel's interpreter for what the filter uses.
func run(t *testing.T, p []unix.SockFilter, number, arch uint32) uint32 {
	t.Helper()
	data := binary.LittleEndian.AppendUint32(binary.LittleEndian.AppendUint32(nil, number), arch)
	var a uint32
	for pc := 0; pc < len(p); pc++ {
		switch i := p[pc]; i.Code {
		case unix.BPF_LD | unix.BPF_W | unix.BPF_ABS:
			a = binary.LittleEndian.Uint32(data[i.K:])
		case unix.BPF_ALU | unix.BPF_AND | unix.BPF_K:
			a &= i.K
		case unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K:
			if a == i.K {
				pc += int(i.Jt)
			} else {
				pc += int(i.Jf)
			}
		case unix.BPF_RET | unix.BPF_K:
			return i.K
		default:
			t.Fatalf("instruction %d: %+v", pc, i)
		}
	}
	t.Fatal("it runs over its end")
	return 0
}

func TestFilter(t *testing.T) {
	const refused, allowed = unix.SECCOMP_RET_ERRNO | uint32(unix.EPERM), uint32(unix.SECCOMP_RET_ALLOW)
	p := filter()
	for _, c := range []struct {
		name         string
		number, arch uint32
		want         uint32
	}{
		{"read", unix.SYS_READ, unix.AUDIT_ARCH_X86_64, allowed},
		{"execve", unix.SYS_EXECVE, unix.AUDIT_ARCH_X86_64, allowed},
		{"init_module", unix.SYS_INIT_MODULE, unix.AUDIT_ARCH_X86_64, refused},
		{"open_by_handle_at", unix.SYS_OPEN_BY_HANDLE_AT, unix.AUDIT_ARCH_X86_64, refused},
		{"bpf", unix.SYS_BPF, unix.AUDIT_ARCH_X86_64, refused},
		{"quotactl_fd of i386", 443, unix.AUDIT_ARCH_I386, refused},
		{"adjtimex, which reads the clock as well", unix.SYS_ADJTIMEX, unix.AUDIT_ARCH_X86_64, allowed},
		{"init_module of x32", unix.SYS_INIT_MODULE | x32Bit, unix.AUDIT_ARCH_X86_64, refused},
		{"read of i386", 3, unix.AUDIT_ARCH_I386, allowed},
		{"init_module of i386", 128, unix.AUDIT_ARCH_I386, refused},
		{"clock_settime64 of i386", 404, unix.AUDIT_ARCH_I386, refused},
		{"i386's init_module, which is here rt_sigtimedwait", 128, unix.AUDIT_ARCH_X86_64, allowed},
		{"anything of another machine", unix.SYS_READ, unix.AUDIT_ARCH_AARCH64, refused},
	} {
		if got := run(t, p, c.number, c.arch); got != c.want {
			t.Errorf("%s: %#x, want %#x", c.name, got, c.want)
		}
	}
}
