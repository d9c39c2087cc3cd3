package native

import (
	"fmt"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

// hostWide are the system calls that mean the whole host. The kernel refuses them to the root of
// a user namespace already; this keeps what programs there can reach of it small.
var hostWide = []struct{ amd64, i386 uint32 }{
	{unix.SYS_INIT_MODULE, 128}, {unix.SYS_FINIT_MODULE, 350}, {unix.SYS_DELETE_MODULE, 129},
	{unix.SYS_KEXEC_LOAD, 283}, {unix.SYS_KEXEC_FILE_LOAD, 0},
	{unix.SYS_SETTIMEOFDAY, 79}, {unix.SYS_CLOCK_SETTIME, 264}, {0, 404}, // clock_settime64
	{unix.SYS_SWAPON, 87}, {unix.SYS_SWAPOFF, 115},
	{unix.SYS_ACCT, 51}, {unix.SYS_QUOTACTL, 131}, {unix.SYS_QUOTACTL_FD, 443},
	{unix.SYS_IOPL, 110}, {unix.SYS_IOPERM, 101},
	{unix.SYS_OPEN_BY_HANDLE_AT, 342}, // of any file of the file system, whatever the root is
	{unix.SYS_BPF, 357},               // the programs that the kernel has to verify are no user's business here
}

// Offsets in struct seccomp_data (linux/seccomp.h), and x32's mark in its number (asm/unistd.h).
const (
	dataNumber = 0
	dataArch   = 4
	x32Bit     = 0x40000000
)

// filter is the program (seccomp(2)) that refuses them with EPERM.
func filter() []unix.SockFilter {
	stmt := func(code uint16, k uint32) unix.SockFilter { return unix.SockFilter{Code: code, K: k} }
	refuse := stmt(unix.BPF_RET|unix.BPF_K, unix.SECCOMP_RET_ERRNO|uint32(unix.EPERM))
	allow := stmt(unix.BPF_RET|unix.BPF_K, unix.SECCOMP_RET_ALLOW)
	// list is the comparisons with one architecture's numbers, and what follows from them.
	list := func(number func(i int) uint32) (p []unix.SockFilter) {
		for i := range hostWide {
			if n := number(i); n != 0 {
				p = append(p, unix.SockFilter{Code: unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K, Jf: 1, K: n}, refuse)
			}
		}
		return append(p, allow)
	}
	amd64 := list(func(i int) uint32 { return hostWide[i].amd64 })
	i386 := list(func(i int) uint32 { return hostWide[i].i386 })
	p := []unix.SockFilter{
		stmt(unix.BPF_LD|unix.BPF_W|unix.BPF_ABS, dataArch),
		{Code: unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K, Jt: 2, K: unix.AUDIT_ARCH_I386},
		{Code: unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K, Jt: uint8(2 + len(i386)), K: unix.AUDIT_ARCH_X86_64},
		refuse,
		stmt(unix.BPF_LD|unix.BPF_W|unix.BPF_ABS, dataNumber),
	}
	p = append(p, i386...)
	p = append(p,
		stmt(unix.BPF_LD|unix.BPF_W|unix.BPF_ABS, dataNumber),
		stmt(unix.BPF_ALU|unix.BPF_AND|unix.BPF_K, ^uint32(x32Bit))) // the same calls by x32's numbers
	return append(p, amd64...)
}

// confine sets the filter for the calling thread and what it executes.
func confine() error {
	program := filter()
	prog := unix.SockFprog{Len: uint16(len(program)), Filter: &program[0]}
	// Without SPEC_ALLOW older kernels make every program of the distro slower (Spectre mitigations).
	_, _, errno := syscall.RawSyscall(unix.SYS_SECCOMP, unix.SECCOMP_SET_MODE_FILTER, unix.SECCOMP_FILTER_FLAG_SPEC_ALLOW, uintptr(unsafe.Pointer(&prog)))
	if errno != 0 {
		return fmt.Errorf("set the filter of system calls: %w", errno)
	}
	return nil
}
