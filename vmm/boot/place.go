package boot

import (
	"errors"
	"fmt"
	"io/fs"
	"os"

	"github.com/wsl2/wsl2/vmm/guestmem"
)

// headroom is what a kernel needs besides its image and the initramfs to reach
// /init: page tables, struct pages, slabs.
const headroom = 16 << 20

// place checks that the kernel and an initramfs of the given size fit. The
// initramfs counts twice: while it is unpacked it is there twice.
func (k *kernel) place(mem *guestmem.Memory, initramfs uint64) error {
	const most = 1 << 40 // no sum below wraps
	if k.end > most || initramfs > most {
		return fmt.Errorf("boot: %w: kernel and initramfs need more than 1 TiB", ErrMemory)
	}
	need := pageUp(k.end) + 2*pageUp(initramfs) + headroom
	if have := lowMemory(mem); need > have {
		if need > HoleStart {
			return fmt.Errorf("boot: %w: kernel and initramfs need %d MiB below 3 GiB", ErrMemory, mib(need))
		}
		return fmt.Errorf("boot: %w: %d MiB, but this kernel and initramfs need at least %d MiB", ErrMemory, have>>20, mib(need))
	}
	return nil
}

// load brings the kernel's segments into memory. Memory is zero before.
func (k *kernel) load(mem *guestmem.Memory) error {
	for _, s := range k.segments {
		dst, err := mem.Bytes(s.addr, s.memSize)
		if err != nil {
			return fmt.Errorf("boot: kernel segment: %w", err)
		}
		if err := loadFile(dst[:s.fileSize], k.file, s.fileOff); err != nil {
			return fmt.Errorf("boot: load kernel: %w", err)
		}
	}
	return nil
}

// initramfs is an initramfs before it is loaded; file is nil if there is none.
type initramfs struct {
	file *os.File
	size uint64
}

func openInitramfs(f *os.File) (initramfs, error) {
	if f == nil {
		return initramfs{}, nil
	}
	st, err := f.Stat()
	if err != nil {
		return initramfs{}, fmt.Errorf("boot: initramfs: %w", err)
	}
	if st.Mode().Type() != 0 || st.Size() == 0 {
		return initramfs{}, &fs.PathError{Op: "boot initramfs", Path: f.Name(), Err: errors.New("not a regular file, or empty")}
	}
	return initramfs{file: f, size: uint64(st.Size())}, nil
}

// load puts the initramfs behind the kernel, in the rest of its last huge page, which is
// cleared anyway, and returns where it is.
func (rd initramfs) load(mem *guestmem.Memory, k *kernel) (Range, error) {
	if rd.file == nil {
		return Range{}, nil
	}
	r := Range{guestmem.Addr(pageUp(k.end)), rd.size}
	if top := min(lowMemory(mem), k.maxInitrd+1); uint64(r.Start)+r.Size > top {
		return Range{}, fmt.Errorf("boot: %w: no room for the initramfs between the kernel's end %#x and %#x", ErrMemory, k.end, top)
	}
	dst, err := mem.Bytes(r.Start, r.Size)
	if err != nil {
		return Range{}, fmt.Errorf("boot: initramfs: %w", err)
	}
	if err := loadFile(dst, rd.file, 0); err != nil {
		return Range{}, fmt.Errorf("boot: load initramfs: %w", err)
	}
	return r, nil
}

// loadFile reads len(dst) bytes of f from off on. Mapping the file over dst would
// save the copy and is slower all the same: it leaves the guest with small pages,
// and each of the thousands that a booting kernel touches costs a nested page
// fault, where a few huge pages take the copy (measured with a 13 MiB kernel:
// 9 ms to copy it, 55 ms of faults if mapped). Copying from a mapping is slower, too.
func loadFile(dst []byte, f *os.File, off uint64) error {
	if len(dst) == 0 {
		return nil
	}
	if _, err := f.ReadAt(dst, int64(off)); err != nil {
		return &os.PathError{Op: "read", Path: f.Name(), Err: err}
	}
	return nil
}

// lowMemory returns the end of the RAM that starts at 0.
func lowMemory(mem *guestmem.Memory) uint64 {
	for _, r := range mem.Regions() {
		if r.Start == 0 {
			return uint64(len(r.Bytes))
		}
	}
	return 0
}

func pageDown(n uint64) uint64 { return n &^ (pageSize - 1) }
func pageUp(n uint64) uint64   { return pageDown(n + pageSize - 1) }

// mib rounds up to the 2 MiB that memory comes in.
func mib(n uint64) uint64 { return (n + hugePage - 1) / hugePage * 2 }
