package qemu

import (
	"fmt"
	"os"

	"golang.org/x/sys/unix"

	"github.com/wsl2/wsl2/vmm/boot"
	"github.com/wsl2/wsl2/vmm/engine"
	"github.com/wsl2/wsl2/vmm/guestmem"
)

const conventional = 0xa0000 // the memory below 640 KiB, where the MP table is

// image is the guest's memory with all in place that it boots from.
type image struct {
	ram   *os.File // memfd, sealed against changes of its size
	entry boot.Entry
}

// newImage loads kernel, initramfs and command line into fresh guest memory.
// The caller closes ram.
func newImage(s engine.Spec, cmdline string) (_ *image, err error) {
	fd, err := unix.MemfdCreate("guest memory", unix.MFD_CLOEXEC|unix.MFD_ALLOW_SEALING)
	if err != nil {
		return nil, fmt.Errorf("qemu: %w", os.NewSyscallError("memfd_create", err))
	}
	ram := os.NewFile(uintptr(fd), "guest memory")
	defer func() {
		if err != nil {
			ram.Close()
		}
	}()
	if err := ram.Truncate(int64(s.MemoryBytes)); err != nil {
		return nil, fmt.Errorf("qemu: guest memory: %w", err)
	}
	if _, err := unix.FcntlInt(ram.Fd(), unix.F_ADD_SEALS, unix.F_SEAL_SHRINK|unix.F_SEAL_GROW); err != nil {
		return nil, fmt.Errorf("qemu: seal guest memory: %w", err)
	}
	mem, unmap, err := mapMemory(ram, s.MemoryBytes)
	if err != nil {
		return nil, err
	}
	defer unmap()
	e, err := boot.Load(boot.Config{
		Kernel: s.Kernel, Initramfs: s.Initramfs, Cmdline: cmdline, Memory: mem, CPUs: s.CPUs,
	})
	if err != nil {
		return nil, fmt.Errorf("qemu: %w", err)
	}
	low, err := mem.Bytes(0, conventional)
	if err != nil {
		return nil, fmt.Errorf("qemu: %w", err)
	}
	putMPTable(low, s.CPUs)
	return &image{ram: ram, entry: e}, nil
}

// mapMemory maps guest RAM of size bytes as QEMU takes it from the file: one range
// behind the other.
func mapMemory(ram *os.File, size uint64) (*guestmem.Memory, func(), error) {
	var maps [][]byte
	unmap := func() {
		for _, m := range maps {
			_ = unix.Munmap(m)
		}
	}
	var regions []guestmem.Region
	var off uint64
	for _, r := range boot.Layout(size) {
		m, err := unix.Mmap(int(ram.Fd()), int64(off), int(r.Size), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
		if err != nil {
			unmap()
			return nil, nil, fmt.Errorf("qemu: map guest memory: %w", os.NewSyscallError("mmap", err))
		}
		maps = append(maps, m)
		regions = append(regions, guestmem.Region{Start: r.Start, Bytes: m})
		off += r.Size
	}
	mem, err := guestmem.New(regions...)
	if err != nil {
		unmap()
		return nil, nil, err
	}
	return mem, unmap, nil
}
