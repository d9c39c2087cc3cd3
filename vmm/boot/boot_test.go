package boot

import (
	"bytes"
	"errors"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/wsl2/wsl2/vmm/guestmem"
)

// elf builds a vmlinux with the given segments.
type elf struct {
	entry    uint64
	segments []segment
	change   func([]byte)
}

func (e elf) bytes() []byte {
	var size uint64 = elfHeaderSize + uint64(len(e.segments))*elfProgramSize
	for _, s := range e.segments {
		size = max(size, s.fileOff+s.fileSize)
	}
	b := make([]byte, size)
	copy(b, "\x7fELF\x02\x01\x01")
	le.PutUint16(b[16:], elfExec)
	le.PutUint16(b[18:], elfMachineX86)
	le.PutUint64(b[24:], e.entry)
	le.PutUint64(b[32:], elfHeaderSize)
	le.PutUint16(b[54:], elfProgramSize)
	le.PutUint16(b[56:], uint16(len(e.segments)))
	for i, s := range e.segments {
		p := b[elfHeaderSize+i*elfProgramSize:]
		le.PutUint32(p, elfLoad)
		le.PutUint64(p[8:], s.fileOff)
		le.PutUint64(p[24:], uint64(s.addr))
		le.PutUint64(p[32:], s.fileSize)
		le.PutUint64(p[40:], s.memSize)
		for j := range s.fileSize {
			b[s.fileOff+j] = byte(i + 1)
		}
	}
	if e.change != nil {
		e.change(b)
	}
	return b
}

const base = 16 << 20

// vmlinux has a segment with an odd end and one with an odd start; both have
// zeroes after them.
func vmlinux() elf {
	return elf{entry: base, segments: []segment{
		{addr: base, fileOff: 0x1000, fileSize: 0x20123, memSize: 0x30000},
		{addr: base + 0x40010, fileOff: 0x21130, fileSize: 0x100, memSize: 0x1000},
	}}
}

// bzImage builds a bzImage with size bytes of code.
func bzImage(size int, change func([]byte)) []byte {
	const setup = 2 * sectorSize
	b := make([]byte, setup+size)
	b[hdrSetupSects] = 1
	le.PutUint32(b[hdrSysSize:], uint32(size/16))
	le.PutUint16(b[hdrBootFlag:], bootFlag)
	b[0x200], b[hdrJump] = 0xeb, 0x66
	copy(b[hdrMagic:], magic)
	le.PutUint16(b[hdrVersion:], 0x20f)
	le.PutUint32(b[hdrInitrdAddrMax:], 0x7fffffff)
	le.PutUint16(b[hdrXLoadFlags:], xlfKernel64)
	le.PutUint32(b[hdrCmdlineSize:], 2047)
	le.PutUint64(b[hdrPrefAddress:], base)
	le.PutUint32(b[hdrInitSize:], uint32(size+0x100000))
	for i := range b[setup:] {
		b[setup+i] = 0x90
	}
	if change != nil {
		change(b)
	}
	return b
}

func file(t testing.TB, content []byte) *os.File {
	t.Helper()
	f, err := os.Create(filepath.Join(t.TempDir(), "file"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	if _, err := f.Write(content); err != nil {
		t.Fatal(err)
	}
	return f
}

// memory maps size bytes of RAM as a machine does.
func memory(t testing.TB, size uint64) *guestmem.Memory {
	t.Helper()
	var regions []guestmem.Region
	for _, r := range Layout(size) {
		b, err := unix.Mmap(-1, 0, int(r.Size), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS|unix.MAP_NORESERVE)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = unix.Munmap(b) })
		regions = append(regions, guestmem.Region{Start: r.Start, Bytes: b})
	}
	m, err := guestmem.New(regions...)
	if err != nil {
		t.Fatal(err)
	}
	return m
}

func at(t testing.TB, m *guestmem.Memory, a guestmem.Addr, n uint64) []byte {
	t.Helper()
	b, err := m.Bytes(a, n)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func TestLoadELF(t *testing.T) {
	m := memory(t, 64<<20)
	initramfs := file(t, bytes.Repeat([]byte("cpio"), 0x8001))
	e, err := Load(Config{Kernel: file(t, vmlinux().bytes()), Initramfs: initramfs, Cmdline: "console=hvc0 quiet", Memory: m, CPUs: 2})
	if err != nil {
		t.Fatal(err)
	}
	if e.RIP != base {
		t.Errorf("entry %#x", e.RIP)
	}
	for i, s := range vmlinux().segments {
		if got := at(t, m, s.addr, s.fileSize); !bytes.Equal(got, bytes.Repeat([]byte{byte(i + 1)}, int(s.fileSize))) {
			t.Errorf("segment %d is damaged", i)
		}
		if rest := at(t, m, s.addr+guestmem.Addr(s.fileSize), s.memSize-s.fileSize); !bytes.Equal(rest, make([]byte, len(rest))) {
			t.Errorf("segment %d is not zero after its end", i)
		}
	}
	bp := at(t, m, e.RSI, pageSize)
	rd := le.Uint32(bp[hdrRamdiskImage:])
	if size := le.Uint32(bp[hdrRamdiskSize:]); size != 0x20004 || rd%pageSize != 0 || uint64(rd)+uint64(size) > 64<<20 {
		t.Errorf("initramfs at %#x, %#x bytes", rd, size)
	}
	if got := at(t, m, guestmem.Addr(rd), 0x20004); !bytes.Equal(got, bytes.Repeat([]byte("cpio"), 0x8001)) {
		t.Error("the initramfs is damaged")
	}
	if got := at(t, m, guestmem.Addr(le.Uint32(bp[hdrCmdlinePtr:])), 19); string(got) != "console=hvc0 quiet\x00" {
		t.Errorf("command line %q", got)
	}
	if bp[hdrTypeOfLoader] == 0 || bp[0x1ef] != 0 {
		t.Error("Linux would ignore the initramfs, or take boot_params for damaged")
	}
}

func TestLoadBzImage(t *testing.T) {
	m := memory(t, 64<<20)
	e, err := Load(Config{Kernel: file(t, bzImage(0x30010, nil)), Cmdline: "x", Memory: m, CPUs: 1})
	if err != nil {
		t.Fatal(err)
	}
	if e.RIP != base+entry64 {
		t.Errorf("entry %#x", e.RIP)
	}
	if got := at(t, m, base, 0x30010); !bytes.Equal(got, bytes.Repeat([]byte{0x90}, 0x30010)) {
		t.Error("the kernel is damaged")
	}
	bp := at(t, m, e.RSI, pageSize)
	if le.Uint16(bp[hdrVersion:]) != 0x20f || le.Uint64(bp[hdrPrefAddress:]) != base || bp[hdrTypeOfLoader] != loaderOther {
		t.Error("the setup header was not copied and completed")
	}
}

func TestKernelErrors(t *testing.T) {
	cut := func(b []byte, n int) []byte { return b[:len(b)-n] }
	with := func(f func([]byte)) []byte { e := vmlinux(); e.change = f; return e.bytes() }
	for name, c := range map[string]struct {
		content []byte
		want    string
	}{
		"empty":               {nil, "neither"},
		"text":                {[]byte("#!/bin/sh\necho no kernel\n"), "neither"},
		"gzip":                {[]byte("\x1f\x8b\x08\x00"), "compressed"},
		"ELF header cut off":  {[]byte("\x7fELF\x02\x01"), "header is cut off"},
		"32-bit ELF":          {with(func(b []byte) { b[4] = 1 }), "64-bit"},
		"big endian":          {with(func(b []byte) { b[5] = 2 }), "little-endian"},
		"arm64":               {with(func(b []byte) { b[18] = 183 }), "another processor (ELF machine 183)"},
		"shared object":       {with(func(b []byte) { b[16] = 3 }), "ELF type 3"},
		"no program headers":  {with(func(b []byte) { le.PutUint16(b[56:], 0) }), "program headers"},
		"many headers":        {with(func(b []byte) { le.PutUint16(b[56:], 0xffff) }), "program headers"},
		"headers outside":     {with(func(b []byte) { le.PutUint64(b[32:], 1<<63) }), "program headers"},
		"headers at the end":  {with(func(b []byte) { le.PutUint64(b[32:], uint64(len(b))-8) }), "program headers"},
		"file cut off":        {cut(vmlinux().bytes(), 1), "cut off"},
		"segment wraps":       {with(func(b []byte) { le.PutUint64(b[elfHeaderSize+24:], ^uint64(0)) }), "impossible sizes"},
		"file size overflows": {with(func(b []byte) { le.PutUint64(b[elfHeaderSize+32:], ^uint64(0)) }), "cut off"},
		"file exceeds memory": {with(func(b []byte) { le.PutUint64(b[elfHeaderSize+40:], 1) }), "impossible sizes"},
		"low segment":         {with(func(b []byte) { le.PutUint64(b[elfHeaderSize+24:], 0x1000) }), "below 1 MiB"},
		"entry nowhere":       {with(func(b []byte) { le.PutUint64(b[24:], 5) }), "entry point 0x5"},
		"setup header cut":    {bzImage(0x1000, nil)[:0x210], "cut off"},
		"no signature":        {bzImage(0x1000, func(b []byte) { b[hdrBootFlag] = 0 }), "signature"},
		"old protocol":        {bzImage(0x1000, func(b []byte) { le.PutUint16(b[hdrVersion:], 0x20b) }), "protocol 2.11"},
		"32-bit bzImage":      {bzImage(0x1000, func(b []byte) { b[hdrXLoadFlags] = 0 }), "64-bit entry"},
		"header length":       {bzImage(0x1000, func(b []byte) { b[hdrJump] = 0xff }), "impossible length"},
		"bzImage cut off":     {cut(bzImage(0x1000, nil), 0x800), "cut off"},
		"only setup":          {bzImage(0x1000, nil)[:2*sectorSize], "cut off"},
		"wild address":        {bzImage(0x1000, func(b []byte) { le.PutUint64(b[hdrPrefAddress:], ^uint64(0xfff)) }), "impossible"},
		"address 0":           {bzImage(0x1000, func(b []byte) { le.PutUint64(b[hdrPrefAddress:], 0) }), "impossible"},
	} {
		_, err := Load(Config{Kernel: file(t, c.content), Memory: memory(t, 64<<20), CPUs: 1})
		if !errors.Is(err, ErrKernel) || !strings.Contains(err.Error(), c.want) || !strings.Contains(err.Error(), "give --kernel") {
			t.Errorf("%s: %v", name, err)
		}
	}
	if _, err := Load(Config{Memory: memory(t, 64<<20), CPUs: 1}); !errors.Is(err, ErrKernel) {
		t.Errorf("no kernel: %v", err)
	}
	dir, err := os.Open(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	defer dir.Close()
	if _, err := Load(Config{Kernel: dir, Memory: memory(t, 64<<20), CPUs: 1}); !errors.Is(err, ErrKernel) {
		t.Errorf("directory: %v", err)
	}
}

func TestLoadErrors(t *testing.T) {
	good := func() Config {
		return Config{Kernel: file(t, vmlinux().bytes()), Memory: memory(t, 64<<20), CPUs: 1}
	}
	for name, c := range map[string]struct {
		change func(*Config)
		want   string
	}{
		"command line": {func(c *Config) { c.Cmdline = strings.Repeat("x", 2048) }, "2048 bytes long"},
		"no vCPU":      {func(c *Config) { c.CPUs = 0 }, "1 to 64"},
		"65 vCPUs":     {func(c *Config) { c.CPUs = 65 }, "1 to 64"},
		"memory":       {func(c *Config) { c.Memory = memory(t, 16<<20) }, "at least 34 MiB"},
		"memory for the initramfs": {func(c *Config) {
			c.Initramfs = file(t, nil)
			if err := c.Initramfs.Truncate(40 << 20); err != nil {
				t.Fatal(err)
			}
		}, "at least 114 MiB"},
		"empty initramfs": {func(c *Config) { c.Initramfs = file(t, nil) }, "empty"},
	} {
		cfg := good()
		c.change(&cfg)
		if _, err := Load(cfg); err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: %v", name, err)
		}
	}
	// What the error asks for is enough.
	cfg := good()
	cfg.Memory = memory(t, 34<<20)
	if _, err := Load(cfg); err != nil {
		t.Error(err)
	}
}

func TestLoadFile(t *testing.T) {
	content := bytes.Repeat([]byte("0123456789abcde"), 1000) // no page like another
	f := file(t, content)
	for _, off := range []uint64{0, 1, 4095, 4096, 9000} {
		got := make([]byte, uint64(len(content))-off)
		if err := loadFile(got, f, off); err != nil || !bytes.Equal(got, content[off:]) {
			t.Errorf("from %d: %v, or other bytes", off, err)
		}
	}
	// One that became shorter after it was looked at.
	if err := f.Truncate(5000); err != nil {
		t.Fatal(err)
	}
	if err := loadFile(make([]byte, len(content)), f, 0); !errors.Is(err, io.EOF) {
		t.Error(err)
	}
}

func TestLayout(t *testing.T) {
	for _, c := range []struct {
		size uint64
		want []Range
	}{
		{2 << 20, []Range{{0, 2 << 20}}},
		{3 << 30, []Range{{0, 3 << 30}}},
		{3<<30 + 2<<20, []Range{{0, 3 << 30}, {4 << 30, 2 << 20}}},
		{8 << 30, []Range{{0, 3 << 30}, {4 << 30, 5 << 30}}},
	} {
		got := Layout(c.size)
		if len(got) != len(c.want) || got[0] != c.want[0] || got[len(got)-1] != c.want[len(c.want)-1] {
			t.Errorf("%d MiB: %+v", c.size>>20, got)
		}
	}
}

func TestE820(t *testing.T) {
	m := memory(t, 4<<30)
	e, err := Load(Config{Kernel: file(t, vmlinux().bytes()), Memory: m, CPUs: 1})
	if err != nil {
		t.Fatal(err)
	}
	bp := at(t, m, e.RSI, pageSize)
	type entry struct {
		start, size uint64
		kind        uint32
	}
	want := []entry{
		{0, 0x9f000, e820RAM},
		{0x9f000, 0x1000, e820Reserved},
		{1 << 20, 3<<30 - 1<<20, e820RAM},
		{4 << 30, 1 << 30, e820RAM},
	}
	if int(bp[bpE820Count]) != len(want) {
		t.Fatalf("%d entries", bp[bpE820Count])
	}
	for i, w := range want {
		p := bp[bpE820Table+20*i:]
		if got := (entry{le.Uint64(p), le.Uint64(p[8:]), le.Uint32(p[16:])}); got != w {
			t.Errorf("entry %d: %+v", i, got)
		}
	}
}

func TestMPTable(t *testing.T) {
	for _, n := range []int{1, 2, 64} {
		low := make([]byte, highMemory)
		io := IOAPIC{Addr: 0xfec00000, Pins: []int{1, 2, 32}}
		if err := writeMPTable(low, n, io); err != nil {
			t.Fatal(err)
		}
		sum := func(p []byte) (s byte) {
			for _, b := range p {
				s += b
			}
			return s
		}
		p := low[0x9fc00:][:16]
		if string(p[:4]) != "_MP_" || sum(p) != 0 {
			t.Fatalf("%d CPUs: floating pointer % x", n, p)
		}
		c := low[le.Uint32(p[4:]):]
		c = c[:le.Uint16(c[4:])]
		if string(c[:4]) != "PCMP" || sum(c) != 0 {
			t.Fatalf("%d CPUs: configuration table % x", n, c)
		}
		entries, cpus := c[44:], 0
		var pins []int
		for range le.Uint16(c[34:]) {
			length := 8
			switch entries[0] {
			case mpIOAPIC:
				if entries[3] != mpEnabled || le.Uint32(entries[4:]) != io.Addr {
					t.Errorf("%d CPUs: I/O APIC entry % x", n, entries[:8])
				}
			case mpInterrupt:
				if entries[1] != mpIntTypeINT || entries[2] != mpEdgeHigh || entries[5] != entries[7] || entries[6] != mpIOAPICID {
					t.Errorf("%d CPUs: interrupt entry % x", n, entries[:8])
				}
				pins = append(pins, int(entries[7]))
			case mpProcessor:
				length = 20
				if int(entries[1]) != cpus || entries[3]&mpEnabled == 0 || (entries[3]&mpBootstrap != 0) != (cpus == 0) {
					t.Errorf("%d CPUs: processor entry %d: % x", n, cpus, entries[:4])
				}
				cpus++
			}
			entries = entries[length:]
		}
		if cpus != n || len(entries) != 0 || !slices.Equal(pins, io.Pins) {
			t.Errorf("%d CPUs: %d in the table, pins %d, %d bytes too many", n, cpus, pins, len(entries))
		}
	}
	if err := writeMPTable(make([]byte, highMemory), MaxCPUs, IOAPIC{Pins: make([]int, 255)}); err == nil {
		t.Error("a table that is too long was written")
	}
}

// The page tables map each of the first 4 GiB to itself.
func TestPageTables(t *testing.T) {
	low := make([]byte, highMemory)
	writePageTables(low[pageTableAddr:])
	const addrMask = 0x000ffffffffff000
	walk := func(a uint64) uint64 {
		e := uint64(pageTableAddr)
		for _, shift := range []int{39, 30, 21} {
			e = le.Uint64(low[e&addrMask+a>>shift&511*8:])
			if e&pagePresent == 0 {
				return 0
			}
		}
		if e&pageHuge == 0 {
			t.Fatal("not a 2 MiB page")
		}
		return e&addrMask + a&(hugePage-1)
	}
	for _, a := range []uint64{0x7000, base, HoleStart - 1, 0xfee00000, 4<<30 - 1} {
		if got := walk(a); got != a {
			t.Errorf("%#x is mapped to %#x", a, got)
		}
	}
	if walk(4<<30) != 0 {
		t.Error("4 GiB is mapped")
	}
}

// fuzz parses an image and, if it is taken for one, loads it.
func fuzz(f *testing.F) {
	m := memory(f, 64<<20)
	f.Fuzz(func(t *testing.T, b []byte) {
		k, err := parse(bytes.NewReader(b), uint64(len(b)))
		if err != nil {
			if !errors.Is(err, ErrKernel) {
				t.Fatalf("no clear error: %v", err)
			}
			return
		}
		for _, s := range k.segments {
			if s.fileOff+s.fileSize > uint64(len(b)) || s.fileSize > s.memSize || uint64(s.addr)+s.memSize < uint64(s.addr) {
				t.Fatalf("impossible segment %+v", s)
			}
		}
		if k.place(m, 0) != nil {
			return
		}
		for _, s := range k.segments {
			if _, err := m.Bytes(s.addr, s.memSize); err != nil {
				t.Fatalf("placed, but %v", err)
			}
		}
		writeBootParams(make([]byte, pageSize), k, m, Range{})
	})
}

func FuzzELF(f *testing.F) {
	b := vmlinux().bytes()
	f.Add(b[:elfHeaderSize+2*elfProgramSize])
	f.Add((elf{entry: base, segments: []segment{{addr: base, fileOff: 0x100, fileSize: 0x10, memSize: 0x20}}}).bytes())
	fuzz(f)
}

func FuzzBzImage(f *testing.F) {
	f.Add(bzImage(0x1000, nil))
	f.Add(bzImage(0x20, nil))
	fuzz(f)
}
