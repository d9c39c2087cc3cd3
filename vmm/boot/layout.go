// Package boot puts a Linux kernel into guest memory the way a 64-bit boot
// loader would (Documentation/arch/x86/boot.rst, "64-bit Boot Protocol"), with
// neither firmware nor decompression: the kernel, the initramfs, the command
// line, boot_params (the "zero page") with its E820 map, an MP table, a GDT and
// identity-mapped page tables. The result is the address to jump to and the
// registers' contents; the accelerator's package sets them.
//
// Guest physical memory below 1 MiB:
//
//	0x00500  GDT
//	0x07000  boot_params
//	0x08000  initial stack, downwards
//	0x09000  page tables: PML4, PDPT, four page directories (4 GiB)
//	0x20000  command line
//	0x9f000  MP configuration table
//	0x9fc00  MP floating pointer, where the kernel looks second
//
// Memory has a hole from HoleStart to 4 GiB for devices.
package boot

import (
	"fmt"
	"os"

	"github.com/wsl2/wsl2/vmm/guestmem"
)

// The places above, and the hole.
const (
	gdtAddr        = 0x500
	bootParamsAddr = 0x7000
	stackTop       = 0x8ff0
	pageTableAddr  = 0x9000
	cmdlineAddr    = 0x20000
	mpTableAddr    = 0x9f000
	mpPointerAddr  = 0x9fc00
	lowMemoryEnd   = 0x9f000 // E820: RAM ends here
	highMemory     = 0x100000

	HoleStart = 3 << 30
	HoleEnd   = 4 << 30
)

const (
	pageSize = 4096
	// hugePage is the alignment that lets transparent huge pages back the guest.
	hugePage = 2 << 20
)

// Layout returns the guest physical ranges of size bytes of RAM.
func Layout(size uint64) []Range {
	if size <= HoleStart {
		return []Range{{0, size}}
	}
	return []Range{{0, HoleStart}, {HoleEnd, size - HoleStart}}
}

// Range is a piece of guest physical memory.
type Range struct {
	Start guestmem.Addr
	Size  uint64
}

// Config is what to boot.
type Config struct {
	// Kernel is an ELF vmlinux or a bzImage; Initramfs may be nil. They are read
	// while Load runs.
	Kernel, Initramfs *os.File
	Cmdline           string
	// Memory is laid out by Layout, and zero.
	Memory *guestmem.Memory
	CPUs   int
	IOAPIC IOAPIC
}

// IOAPIC is the machine's I/O APIC, for the MP table.
type IOAPIC struct {
	Addr uint32
	// Pins are those with an edge-triggered device, not 0, below 256. Pin p is
	// Linux's interrupt p.
	Pins []int
}

// Entry is the state in which the boot processor starts (boot.rst, "64-bit Boot
// Protocol"): long mode, paging on, interrupts off.
type Entry struct {
	RIP guestmem.Addr // the kernel's 64-bit entry point
	RSI guestmem.Addr // boot_params
	RSP guestmem.Addr
	CR3 guestmem.Addr // page tables that map the first 4 GiB to themselves
	GDT guestmem.Addr // with CodeSelector, DataSelector and TSSSelector, up to GDTLimit
}

// Load puts everything into memory.
func Load(cfg Config) (Entry, error) {
	k, err := parseKernel(cfg.Kernel)
	if err != nil {
		return Entry{}, err
	}
	if len(cfg.Cmdline) > k.maxCmdline {
		return Entry{}, fmt.Errorf("boot: the kernel command line is %d bytes long, %s takes %d", len(cfg.Cmdline), cfg.Kernel.Name(), k.maxCmdline)
	}
	initramfs, err := openInitramfs(cfg.Initramfs)
	if err != nil {
		return Entry{}, err
	}
	if err := k.place(cfg.Memory, initramfs.size); err != nil {
		return Entry{}, err
	}
	if err := k.load(cfg.Memory); err != nil {
		return Entry{}, err
	}
	rd, err := initramfs.load(cfg.Memory, k)
	if err != nil {
		return Entry{}, err
	}
	low, err := cfg.Memory.Bytes(0, highMemory)
	if err != nil {
		return Entry{}, fmt.Errorf("boot: %w", err)
	}
	copy(low[cmdlineAddr:], cfg.Cmdline)
	low[cmdlineAddr+len(cfg.Cmdline)] = 0
	writeBootParams(low[bootParamsAddr:bootParamsAddr+pageSize], k, cfg.Memory, rd)
	writeGDT(low[gdtAddr:])
	writePageTables(low[pageTableAddr:])
	if err := writeMPTable(low, cfg.CPUs, cfg.IOAPIC); err != nil {
		return Entry{}, err
	}
	return Entry{RIP: k.entry, RSI: bootParamsAddr, RSP: stackTop, CR3: pageTableAddr, GDT: gdtAddr}, nil
}
