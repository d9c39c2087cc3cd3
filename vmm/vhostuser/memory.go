package vhostuser

import (
	"errors"
	"fmt"
	"os"

	"golang.org/x/sys/unix"

	"github.com/wsl2/wsl2/vmm/guestmem"
)

// memTable is the guest's memory as SET_MEM_TABLE described it, mapped here.
type memTable struct {
	regions []memRegion
	maps    [][]byte // whole mappings, for munmap
	memory  *guestmem.Memory
}

// mapTable maps every region; fds[i] belongs to regions[i] and stays owned by
// the caller (a mapping needs no descriptor).
func mapTable(regions []memRegion, fds []int) (_ *memTable, err error) {
	t := &memTable{regions: regions}
	defer func() {
		if err != nil {
			t.unmap()
		}
	}()
	var parts []guestmem.Region
	for i, r := range regions {
		if err := checkMemFD(fds[i], r); err != nil {
			return nil, err
		}
		// Offsets need not be page-aligned on the wire.
		pad := r.offset % uint64(os.Getpagesize())
		m, err := unix.Mmap(fds[i], int64(r.offset-pad), int(r.size+pad), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
		if err != nil {
			return nil, fmt.Errorf("vhost-user: map guest memory at %#x: %w", r.guest, os.NewSyscallError("mmap", err))
		}
		t.maps = append(t.maps, m)
		parts = append(parts, guestmem.Region{Start: guestmem.Addr(r.guest), Bytes: m[pad:]})
	}
	if t.memory, err = guestmem.New(parts...); err != nil {
		return nil, fmt.Errorf("%w: SET_MEM_TABLE: %w", ErrProtocol, err)
	}
	return t, nil
}

// checkMemFD makes sure that the file holds the region and can never shrink: a
// page that vanished under a mapping would end this process by SIGBUS.
func checkMemFD(fd int, r memRegion) error {
	seals, err := unix.FcntlInt(uintptr(fd), unix.F_GET_SEALS, 0)
	if err != nil || seals&unix.F_SEAL_SHRINK == 0 {
		return fmt.Errorf("%w: SET_MEM_TABLE: guest memory must be a memfd sealed against shrinking (QEMU: memory-backend-memfd,share=on)", ErrProtocol)
	}
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return os.NewSyscallError("fstat", err)
	}
	if uint64(st.Size) < r.offset+r.size {
		return fmt.Errorf("%w: SET_MEM_TABLE: region of %#x bytes at offset %#x ends behind its file of %#x bytes", ErrProtocol, r.size, r.offset, st.Size)
	}
	return nil
}

// translate turns a front-end user address, in which rings are announced, into
// the guest physical address that the same byte has.
func (t *memTable) translate(user uint64) (guestmem.Addr, error) {
	for _, r := range t.regions {
		if user >= r.user && user-r.user < r.size {
			return guestmem.Addr(r.guest + (user - r.user)), nil
		}
	}
	return 0, fmt.Errorf("%w: user address %#x is in no memory region", ErrProtocol, user)
}

// unmap ends the mappings; nothing may use the memory any more.
func (t *memTable) unmap() error {
	var errs []error
	for _, m := range t.maps {
		errs = append(errs, os.NewSyscallError("munmap", unix.Munmap(m)))
	}
	t.maps, t.memory = nil, nil
	return errors.Join(errs...)
}
