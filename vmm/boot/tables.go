package boot

import (
	"fmt"

	"github.com/wsl2/wsl2/vmm/guestmem"
)

// boot_params beyond the setup header (boot.rst, "zero-page").
const (
	bpE820Count   = 0x1e8
	bpE820Table   = 0x2d0
	e820EntrySize = 20
	e820RAM       = 1
	e820Reserved  = 2
)

func writeBootParams(p []byte, k *kernel, mem *guestmem.Memory, initramfs Range) {
	if k.setupHeader != nil {
		copy(p[hdrSetupSects:], k.setupHeader)
	} else {
		le.PutUint16(p[hdrBootFlag:], bootFlag)
		copy(p[hdrMagic:], magic)
		le.PutUint16(p[hdrVersion:], version212)
		le.PutUint32(p[hdrCmdlineSize:], maxCmdline)
	}
	p[hdrTypeOfLoader] = loaderOther
	p[hdrLoadFlags] |= loadedHigh
	le.PutUint32(p[hdrCmdlinePtr:], cmdlineAddr)
	le.PutUint32(p[hdrRamdiskImage:], uint32(initramfs.Start))
	le.PutUint32(p[hdrRamdiskSize:], uint32(initramfs.Size))

	n := 0
	add := func(start, end uint64, kind uint32) {
		e := p[bpE820Table+n*e820EntrySize:]
		le.PutUint64(e, start)
		le.PutUint64(e[8:], end-start)
		le.PutUint32(e[16:], kind)
		n++
	}
	for _, r := range mem.Regions() {
		start, end := uint64(r.Start), uint64(r.Start)+uint64(len(r.Bytes))
		if start == 0 {
			add(0, lowMemoryEnd, e820RAM)
			add(lowMemoryEnd, 0xa0000, e820Reserved)
			start = highMemory
		}
		add(start, end, e820RAM)
	}
	p[bpE820Count] = byte(n)
}

// Segment selectors that the 64-bit boot protocol prescribes (__BOOT_CS,
// __BOOT_DS), and a TSS because long mode wants one.
const (
	CodeSelector = 0x10
	DataSelector = 0x18
	TSSSelector  = 0x20
	GDTLimit     = 6*8 - 1
)

func writeGDT(p []byte) {
	for i, e := range [...]uint64{
		CodeSelector / 8:  0x00af9b000000ffff, // 64-bit code, read, accessed
		DataSelector / 8:  0x00cf93000000ffff, // data, write, accessed
		TSSSelector / 8:   0x00008b000000ffff, // 64-bit TSS at 0, busy
		TSSSelector/8 + 1: 0,
	} {
		le.PutUint64(p[8*i:], e)
	}
}

const (
	pagePresent  = 1 << 0
	pageWritable = 1 << 1
	pageHuge     = 1 << 7
)

// writePageTables maps the first 4 GiB to themselves with 2 MiB pages: more than
// the "kernel, zero page, command line" demanded, in 2,053 words.
func writePageTables(p []byte) {
	const (
		pdpt = pageTableAddr + 1*pageSize
		pd   = pageTableAddr + 2*pageSize
	)
	le.PutUint64(p, pdpt|pagePresent|pageWritable)
	for i := range 4 {
		le.PutUint64(p[pageSize+8*i:], uint64(pd+i*pageSize)|pagePresent|pageWritable)
	}
	p = p[2*pageSize : 6*pageSize]
	for i := range 4 * 512 {
		le.PutUint64(p[8*i:], uint64(i)*hugePage|pagePresent|pageWritable|pageHuge)
	}
}

// MaxCPUs is how many processors the MP table has room for and this package
// accepts.
const MaxCPUs = 64

// The MP table (MultiProcessor Specification 1.4, chapter 4).
const (
	mpPointerSize   = 16
	mpHeaderSize    = 44
	mpProcessorSize = 20
	mpBusSize       = 8
	mpInterruptSize = 8

	mpIOAPICSize = 8

	mpBus            = 1
	mpIOAPIC         = 2
	mpInterrupt      = 3
	mpProcessor      = 0
	mpLocalInterrupt = 4
	mpEnabled        = 1 << 0
	mpBootstrap      = 1 << 1
	mpLAPICVersion   = 0x14
	mpIOAPICVersion  = 0x11
	mpAllAPICs       = 0xff
	mpIntTypeINT     = 0
	mpIntTypeNMI     = 1
	mpIntTypeExtINT  = 3
	mpEdgeHigh       = 0x1<<2 | 0x1
	mpIOAPICID       = 0xf0 // behind those of all local APICs
	localAPIC        = 0xfee00000
	mpCPUSignature   = 0x600 // family 6
	mpFeatureFPU     = 1 << 0
	mpFeatureAPIC    = 1 << 9
	mpSpecRev        = 4 // 1.4
)

// writeMPTable tells the kernel of n processors with APIC ids 0 to n-1 and of the
// I/O APIC's pins. The machine has no 8259, so that Linux takes the whole I/O APIC
// for its own, and pin p for interrupt p.
func writeMPTable(low []byte, n int, io IOAPIC) error {
	if n < 1 || n > MaxCPUs {
		return fmt.Errorf("boot: %d vCPUs asked for, 1 to %d are possible", n, MaxCPUs)
	}
	if size := mpHeaderSize + n*mpProcessorSize + mpBusSize + mpIOAPICSize + (len(io.Pins)+2)*mpInterruptSize; size > mpPointerAddr-mpTableAddr {
		return fmt.Errorf("boot: an MP table of %d vCPUs and %d interrupts has %d bytes, %d are possible", n, len(io.Pins), size, mpPointerAddr-mpTableAddr)
	}
	t := low[mpTableAddr:mpPointerAddr]
	size, entries := mpHeaderSize, 0
	entry := func(kind byte, length int) []byte {
		e := t[size:][:length]
		e[0] = kind
		size += length
		entries++
		return e
	}
	for id := range n {
		e := entry(mpProcessor, mpProcessorSize)
		e[1], e[2], e[3] = byte(id), mpLAPICVersion, mpEnabled
		if id == 0 {
			e[3] |= mpBootstrap
		}
		le.PutUint32(e[4:], mpCPUSignature)
		le.PutUint32(e[8:], mpFeatureFPU|mpFeatureAPIC)
	}
	copy(entry(mpBus, mpBusSize)[2:], "ISA   ")
	e := entry(mpIOAPIC, mpIOAPICSize)
	e[1], e[2], e[3] = mpIOAPICID, mpIOAPICVersion, mpEnabled
	le.PutUint32(e[4:], io.Addr)
	for _, p := range io.Pins {
		e := entry(mpInterrupt, mpInterruptSize)
		e[1], e[2], e[5], e[6], e[7] = mpIntTypeINT, mpEdgeHigh, byte(p), mpIOAPICID, byte(p)
	}
	for lint, kind := range [...]byte{mpIntTypeExtINT, mpIntTypeNMI} {
		e := entry(mpLocalInterrupt, mpInterruptSize)
		e[1], e[6], e[7] = kind, mpAllAPICs, byte(lint)
	}
	copy(t, "PCMP")
	le.PutUint16(t[4:], uint16(size))
	t[6] = mpSpecRev
	copy(t[8:], "WSL2    MICROVM     ") // OEM id, 8 bytes; product id, 12
	le.PutUint16(t[34:], uint16(entries))
	le.PutUint32(t[36:], localAPIC)
	t[7] = checksum(t[:size])

	p := low[mpPointerAddr:][:mpPointerSize]
	copy(p, "_MP_")
	le.PutUint32(p[4:], mpTableAddr)
	p[8], p[9] = 1, mpSpecRev // length in 16 bytes
	p[10] = checksum(p)
	return nil
}

// checksum returns what makes p's bytes add up to 0, given that its own byte is 0.
func checksum(p []byte) byte {
	var sum byte
	for _, b := range p {
		sum += b
	}
	return -sum
}
