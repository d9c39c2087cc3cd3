package qemu

import (
	"debug/elf"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"

	"golang.org/x/sys/unix"

	"github.com/wsl2/wsl2/vmm/boot"
	"github.com/wsl2/wsl2/vmm/engine"
	"github.com/wsl2/wsl2/vmm/guestmem"
)

// Fields of boot_params (Linux, Documentation/arch/x86/boot.rst).
const (
	setupSects   = 0x1f1
	ramdiskImage = 0x218
	ramdiskSize  = 0x21c
	sectorSize   = 512
	entry64      = 0x200 // of a bzImage's 64-bit entry, from where it is loaded

	conventional = 0xa0000 // all that boot.Load writes itself lies below
)

// image is the guest's memory with all in place that it boots from.
type image struct {
	ram   *os.File // memfd, sealed against shrinking
	entry boot.Entry
}

// newImage loads kernel, initramfs and command line into fresh guest memory.
// The caller closes ram.
//
// vmm/boot does the work, in private memory that takes no room: it maps the files
// there. What it wrote itself is copied from it, the files from where they are.
func newImage(s engine.Spec, cmdline string) (_ *image, err error) {
	scratch, unmap, err := scratchMemory(s.MemoryBytes)
	if err != nil {
		return nil, err
	}
	defer unmap()
	e, err := boot.Load(boot.Config{
		Kernel: s.Kernel, Initramfs: s.Initramfs, Cmdline: cmdline, Memory: scratch, CPUs: s.CPUs,
	})
	if err != nil {
		return nil, fmt.Errorf("qemu: %w", err)
	}
	low, err := scratch.Bytes(0, conventional)
	if err != nil {
		return nil, fmt.Errorf("qemu: %w", err)
	}
	putMPTable(low, s.CPUs)

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
	if _, err := ram.WriteAt(low, 0); err != nil {
		return nil, fmt.Errorf("qemu: guest memory: %w", err)
	}
	if err := copyKernel(ram, s.Kernel, e, low); err != nil {
		return nil, fmt.Errorf("qemu: load kernel: %w", err)
	}
	if s.Initramfs != nil {
		p := low[e.RSI:]
		at, n := binary.LittleEndian.Uint32(p[ramdiskImage:]), binary.LittleEndian.Uint32(p[ramdiskSize:])
		if err := copyFile(ram, int64(at), s.Initramfs, 0, int64(n)); err != nil {
			return nil, fmt.Errorf("qemu: load initramfs: %w", err)
		}
	}
	return &image{ram: ram, entry: e}, nil
}

// scratchMemory maps memory laid out like the guest's.
func scratchMemory(size uint64) (*guestmem.Memory, func(), error) {
	var maps [][]byte
	unmap := func() {
		for _, m := range maps {
			_ = unix.Munmap(m)
		}
	}
	var regions []guestmem.Region
	for _, r := range boot.Layout(size) {
		m, err := unix.Mmap(-1, 0, int(r.Size), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS|unix.MAP_NORESERVE)
		if err != nil {
			unmap()
			return nil, nil, fmt.Errorf("qemu: %w", os.NewSyscallError("mmap", err))
		}
		maps = append(maps, m)
		regions = append(regions, guestmem.Region{Start: r.Start, Bytes: m})
	}
	mem, err := guestmem.New(regions...)
	if err != nil {
		unmap()
		return nil, nil, err
	}
	return mem, unmap, nil
}

// copyKernel copies the kernel's segments to where vmm/boot, which has checked
// them, put them. boot_params holds the header of a bzImage.
func copyKernel(ram, kernel *os.File, e boot.Entry, low []byte) error {
	f, err := elf.NewFile(kernel)
	var format *elf.FormatError
	switch {
	case err == nil:
		for _, p := range f.Progs {
			if p.Type != elf.PT_LOAD || p.Filesz == 0 {
				continue
			}
			if err := copyFile(ram, int64(p.Paddr), kernel, int64(p.Off), int64(p.Filesz)); err != nil {
				return err
			}
		}
		return nil
	case !errors.As(err, &format):
		return err
	}
	st, err := kernel.Stat()
	if err != nil {
		return err
	}
	sects := int64(low[e.RSI+setupSects])
	if sects == 0 {
		sects = 4
	}
	off := (sects + 1) * sectorSize
	return copyFile(ram, int64(e.RIP)-entry64, kernel, off, st.Size()-off)
}

// copyFile copies n bytes of src from off on to dst at pos, within the kernel.
func copyFile(dst *os.File, pos int64, src *os.File, off, n int64) error {
	if _, err := dst.Seek(pos, io.SeekStart); err != nil {
		return err
	}
	for n > 0 {
		k, err := unix.Sendfile(int(dst.Fd()), int(src.Fd()), &off, int(n))
		if err == unix.EINTR {
			continue
		}
		if err != nil {
			return &os.PathError{Op: "copy", Path: src.Name(), Err: err}
		}
		if k == 0 {
			return &os.PathError{Op: "copy", Path: src.Name(), Err: io.ErrUnexpectedEOF}
		}
		n -= int64(k)
	}
	return nil
}
