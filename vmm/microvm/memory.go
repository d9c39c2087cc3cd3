package microvm

import (
	"errors"
	"fmt"
	"os"
	"unsafe"

	"golang.org/x/sys/unix"
)

const (
	hugePage = 2 << 20
	// maxMemory keeps addresses within the 36 bits that every x86-64 has.
	maxMemory = 60 << 30
)

// mapRAM maps size bytes of zeroed memory aligned to huge pages. Nothing is
// allocated until the guest touches it. The bytes are not for the garbage
// collector and not for core dumps.
func mapRAM(size uint64) (b []byte, unmap func() error, err error) {
	whole, err := unix.MmapPtr(-1, 0, nil, uintptr(size)+hugePage,
		unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS|unix.MAP_NORESERVE)
	if err != nil {
		return nil, nil, fmt.Errorf("microvm: map %d MiB of guest memory: %w", size>>20, err)
	}
	// Give back what lies before and after the aligned part.
	before := -uintptr(whole) & (hugePage - 1)
	p := unsafe.Add(whole, before)
	if before > 0 {
		err = unix.MunmapPtr(whole, before)
	}
	if after := hugePage - before; after > 0 && err == nil {
		err = unix.MunmapPtr(unsafe.Add(p, size), after)
	}
	if err != nil {
		return nil, nil, errors.Join(fmt.Errorf("microvm: trim guest memory: %w", err), unix.MunmapPtr(whole, uintptr(size)+hugePage))
	}
	b = unsafe.Slice((*byte)(p), size)
	for _, advice := range []int{unix.MADV_HUGEPAGE, unix.MADV_DONTDUMP} {
		// EINVAL: this kernel has no transparent huge pages; the guest is slower.
		if err := unix.Madvise(b, advice); err != nil && !errors.Is(err, unix.EINVAL) {
			return nil, nil, errors.Join(os.NewSyscallError("madvise", err), unix.MunmapPtr(p, uintptr(size)))
		}
	}
	return b, func() error { return os.NewSyscallError("munmap", unix.MunmapPtr(p, uintptr(size))) }, nil
}
