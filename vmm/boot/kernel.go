package boot

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math"
	"os"

	"github.com/wsl2/wsl2/vmm/guestmem"
)

// ErrKernel is wrapped by every error about a file that cannot be booted.
var ErrKernel = errors.New("not a Linux kernel")

// ErrMemory is wrapped when the guest's memory is too small.
var ErrMemory = errors.New("guest memory is too small")

func notKernel(format string, args ...any) error {
	return fmt.Errorf("%w: %s; give --kernel an x86-64 vmlinux or bzImage", ErrKernel, fmt.Sprintf(format, args...))
}

// segment is a piece of the kernel file and its place in memory.
type segment struct {
	addr     guestmem.Addr
	fileOff  uint64
	fileSize uint64
	memSize  uint64 // the rest after fileSize is zero
}

// kernel is a checked kernel image.
type kernel struct {
	file       *os.File // set by parseKernel
	segments   []segment
	entry      guestmem.Addr
	start, end uint64 // physical memory the kernel needs before it has taken over
	maxCmdline int
	maxInitrd  uint64 // the highest address of an initramfs, inclusive

	// setupHeader is the bzImage's, to be copied to boot_params; nil for ELF.
	setupHeader []byte
}

// maxCmdline is x86's COMMAND_LINE_SIZE without the final 0: the kernel cuts
// longer lines without a word.
const maxCmdline = 2047

func parseKernel(f *os.File) (*kernel, error) {
	if f == nil {
		return nil, notKernel("no file")
	}
	st, err := f.Stat()
	if err != nil {
		return nil, fmt.Errorf("boot: kernel: %w", err)
	}
	if st.Mode().Type() != 0 {
		return nil, &fs.PathError{Op: "boot kernel", Path: f.Name(), Err: notKernel("it is not a regular file")}
	}
	k, err := parse(f, uint64(st.Size()))
	if err != nil {
		return nil, &fs.PathError{Op: "boot kernel", Path: f.Name(), Err: err}
	}
	k.file = f
	return k, nil
}

// parse checks an image of size bytes: after it every segment lies in the file
// and no address wraps around.
func parse(r io.ReaderAt, size uint64) (*kernel, error) {
	head := make([]byte, 4096)
	n, err := r.ReadAt(head, 0)
	if err != nil && err != io.EOF {
		return nil, err
	}
	head = head[:n]
	switch {
	case n >= 4 && string(head[:4]) == "\x7fELF":
		return parseELF(r, head, size)
	case n >= 0x206 && string(head[hdrMagic:][:4]) == magic:
		return parseBzImage(head, size)
	case n >= 2 && string(head[:2]) == "\x1f\x8b":
		return nil, notKernel("it is compressed with gzip")
	}
	return nil, notKernel("it has neither an ELF nor a bzImage header")
}

// The fields of ELF that matter here (System V ABI, figures 4-3 and 5-1).
const (
	elfHeaderSize  = 64
	elfProgramSize = 56
	elfClass64     = 2
	elfLittle      = 1
	elfExec        = 2
	elfMachineX86  = 62
	elfLoad        = 1
	// maxSegments is far above any kernel's (five).
	maxSegments = 64
)

var le = binary.LittleEndian

func parseELF(r io.ReaderAt, head []byte, size uint64) (*kernel, error) {
	if len(head) < elfHeaderSize {
		return nil, notKernel("its ELF header is cut off")
	}
	switch {
	case head[4] != elfClass64 || head[5] != elfLittle:
		return nil, notKernel("it is not a 64-bit little-endian ELF file")
	case le.Uint16(head[18:]) != elfMachineX86:
		return nil, notKernel("it is for another processor (ELF machine %d)", le.Uint16(head[18:]))
	case le.Uint16(head[16:]) != elfExec:
		return nil, notKernel("it is no static executable (ELF type %d)", le.Uint16(head[16:]))
	}
	off, entsize, num := le.Uint64(head[32:]), le.Uint16(head[54:]), int(le.Uint16(head[56:]))
	if entsize != elfProgramSize || num == 0 || num > maxSegments || off > size || uint64(num)*elfProgramSize > size-off {
		return nil, notKernel("its ELF program headers are damaged or cut off")
	}
	table := make([]byte, num*elfProgramSize)
	if _, err := r.ReadAt(table, int64(off)); err != nil {
		return nil, fmt.Errorf("read ELF program headers: %w", err)
	}
	k := &kernel{
		entry:      guestmem.Addr(le.Uint64(head[24:])),
		start:      math.MaxUint64,
		maxCmdline: maxCmdline,
		maxInitrd:  HoleStart - 1,
	}
	entryLoaded := false
	for p := range num {
		ph := table[p*elfProgramSize:][:elfProgramSize]
		if le.Uint32(ph) != elfLoad {
			continue
		}
		s := segment{
			addr:     guestmem.Addr(le.Uint64(ph[24:])), // p_paddr
			fileOff:  le.Uint64(ph[8:]),
			fileSize: le.Uint64(ph[32:]),
			memSize:  le.Uint64(ph[40:]),
		}
		if s.memSize == 0 {
			continue
		}
		if s.fileOff > size || s.fileSize > size-s.fileOff {
			return nil, notKernel("segment %d ends after the file: the file is cut off", p)
		}
		if s.fileSize > s.memSize || uint64(s.addr) > math.MaxUint64-s.memSize {
			return nil, notKernel("segment %d has impossible sizes", p)
		}
		if s.addr < highMemory {
			return nil, notKernel("segment %d lies below 1 MiB", p)
		}
		end := uint64(s.addr) + s.memSize
		entryLoaded = entryLoaded || k.entry >= s.addr && uint64(k.entry) < uint64(s.addr)+s.fileSize
		k.start, k.end = min(k.start, uint64(s.addr)), max(k.end, end)
		k.segments = append(k.segments, s)
	}
	if !entryLoaded {
		return nil, notKernel("its entry point %#x is in no segment", uint64(k.entry))
	}
	return k, nil
}

// The setup header of a bzImage (boot.rst, "The Real-Mode Kernel Header"), by
// offset from the start of the file and of boot_params.
const (
	hdrSetupSects    = 0x1f1
	hdrSysSize       = 0x1f4
	hdrBootFlag      = 0x1fe
	hdrJump          = 0x201 // the jump's distance: where the header ends, from 0x202
	hdrMagic         = 0x202
	hdrVersion       = 0x206
	hdrTypeOfLoader  = 0x210
	hdrLoadFlags     = 0x211
	hdrRamdiskImage  = 0x218
	hdrRamdiskSize   = 0x21c
	hdrCmdlinePtr    = 0x228
	hdrInitrdAddrMax = 0x22c
	hdrXLoadFlags    = 0x236
	hdrCmdlineSize   = 0x238
	hdrPrefAddress   = 0x258
	hdrInitSize      = 0x260
	hdrEnd           = 0x264 // of what is read here

	version212  = 0x20c // the first with xloadflags
	xlfKernel64 = 1 << 0
	loadedHigh  = 1 << 0
	entry64     = 0x200 // of the 64-bit entry point, from the load address
	sectorSize  = 512
	bootFlag    = 0xaa55
	magic       = "HdrS"
	loaderOther = 0xff // "no assigned id"
)

func parseBzImage(head []byte, size uint64) (*kernel, error) {
	if len(head) < hdrEnd {
		return nil, notKernel("its setup header is cut off")
	}
	if le.Uint16(head[hdrBootFlag:]) != bootFlag {
		return nil, notKernel("its boot sector has no signature")
	}
	if v := le.Uint16(head[hdrVersion:]); v < version212 || le.Uint16(head[hdrXLoadFlags:])&xlfKernel64 == 0 {
		return nil, notKernel("it has no 64-bit entry point (boot protocol %d.%02d)", v>>8, v&0xff)
	}
	sects := uint64(head[hdrSetupSects])
	if sects == 0 {
		sects = 4 // "for backwards compatibility"
	}
	off := (sects + 1) * sectorSize
	if off >= size {
		return nil, notKernel("it is cut off after the setup code")
	}
	hdrLen := hdrMagic + int(head[hdrJump])
	if hdrLen < hdrEnd || hdrLen > 0x290 || hdrLen > len(head) {
		return nil, notKernel("its setup header has an impossible length")
	}
	start, initSize := le.Uint64(head[hdrPrefAddress:]), uint64(le.Uint32(head[hdrInitSize:]))
	s := segment{
		addr:     guestmem.Addr(start),
		fileOff:  off,
		fileSize: size - off,
	}
	s.memSize = max(s.fileSize, initSize)
	// syssize, the length of the code in 16-byte units, tells a truncated file.
	if code := uint64(le.Uint32(head[hdrSysSize:])) * 16; code > s.fileSize+15 {
		return nil, notKernel("it is cut off: %d bytes of %d", s.fileSize, code)
	}
	if s.fileSize <= entry64 {
		return nil, notKernel("it is cut off before its entry point")
	}
	if start < highMemory || start > math.MaxUint64-s.memSize || start%pageSize != 0 {
		return nil, notKernel("its preferred address %#x is impossible", start)
	}
	k := &kernel{
		segments:    []segment{s},
		entry:       s.addr + entry64,
		start:       start,
		end:         start + s.memSize,
		maxCmdline:  maxCmdline,
		maxInitrd:   uint64(le.Uint32(head[hdrInitrdAddrMax:])),
		setupHeader: append([]byte(nil), head[hdrSetupSects:hdrLen]...),
	}
	if n := le.Uint32(head[hdrCmdlineSize:]); n < maxCmdline {
		k.maxCmdline = int(n)
	}
	return k, nil
}
