package guestmem

import (
	"errors"
	"math"
	"testing"

	"golang.org/x/sys/unix"
)

// mapped returns n bytes that are page-aligned, as guest memory is.
func mapped(t testing.TB, n int) []byte {
	t.Helper()
	b, err := unix.Mmap(-1, 0, n, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Munmap(b) })
	return b
}

// holed is 8 KiB at 0, a hole, and 4 KiB at 1 MiB.
func holed(t testing.TB) *Memory {
	t.Helper()
	m, err := New(Region{1 << 20, mapped(t, 4096)}, Region{0, mapped(t, 8192)})
	if err != nil {
		t.Fatal(err)
	}
	return m
}

func TestNewRefuses(t *testing.T) {
	b := make([]byte, 4096)
	for name, regions := range map[string][]Region{
		"an empty region":     {{0, nil}},
		"a region that wraps": {{math.MaxUint64 - 4095, b}, {0, b}},
		"an overlap":          {{0, b}, {4095, b}},
		"a double":            {{4096, b}, {4096, b}},
	} {
		if _, err := New(regions...); err == nil {
			t.Errorf("%s was accepted", name)
		}
	}
	if _, err := New(Region{0, b}, Region{4096, b}); err != nil {
		t.Errorf("adjacent regions: %v", err)
	}
}

func TestBytes(t *testing.T) {
	m := holed(t)
	if m.Size() != 12288 || len(m.Regions()) != 2 || m.Regions()[0].Start != 0 {
		t.Errorf("size %d, regions %v", m.Size(), m.Regions())
	}
	for _, c := range []struct {
		addr Addr
		n    uint64
		ok   bool
	}{
		{0, 8192, true}, {0, 8193, false}, {8191, 1, true}, {8191, 2, false}, {8192, 0, false},
		{8192, 1, false}, {1<<20 - 1, 2, false}, {1 << 20, 4096, true}, {1<<20 + 4095, 1, true},
		{1<<20 + 4096, 0, false}, {100, 0, true}, {0, math.MaxUint64, false},
		{math.MaxUint64, 1, false}, {math.MaxUint64, math.MaxUint64, false},
	} {
		b, err := m.Bytes(c.addr, c.n)
		if (err == nil) != c.ok || err != nil && !errors.Is(err, ErrRange) {
			t.Errorf("%d bytes at %#x: %v", c.n, c.addr, err)
		}
		if err == nil && (uint64(len(b)) != c.n || cap(b) != len(b)) {
			t.Errorf("%d bytes at %#x: length %d, capacity %d", c.n, c.addr, len(b), cap(b))
		}
	}
	b, _ := m.Bytes(1<<20+8, 1)
	b[0] = 42
	if m.Regions()[1].Bytes[8] != 42 {
		t.Error("the bytes are not those of the region")
	}
}

func TestUint32(t *testing.T) {
	m := holed(t)
	w, err := m.Uint32(8188)
	if err != nil {
		t.Fatal(err)
	}
	w.Store(0x04030201)
	if b, _ := m.Bytes(8188, 4); b[0] != 1 || b[3] != 4 {
		t.Errorf("% x", b)
	}
	for _, a := range []Addr{1, 2, 3, 8190, 8192, math.MaxUint64 - 3} {
		if _, err := m.Uint32(a); err == nil {
			t.Errorf("a word at %#x", a)
		}
	}
}

// FuzzBytes holds every answer against the regions, byte by byte at the ends.
func FuzzBytes(f *testing.F) {
	f.Add(uint64(0), uint64(1))
	f.Add(uint64(8190), uint64(4))
	f.Add(uint64(1<<20), uint64(4096))
	f.Add(uint64(math.MaxUint64), uint64(2))
	m := holed(f)
	inside := func(a, n uint64) bool {
		for _, r := range m.Regions() {
			start, end := uint64(r.Start), r.end()
			if a >= start && a < end && n <= end-a {
				return true
			}
		}
		return false
	}
	f.Fuzz(func(t *testing.T, a, n uint64) {
		b, err := m.Bytes(Addr(a), n)
		if (err == nil) != inside(a, n) {
			t.Fatalf("%d bytes at %#x: %v", n, a, err)
		}
		if err == nil && uint64(len(b)) != n {
			t.Fatalf("%d bytes at %#x: got %d", n, a, len(b))
		}
	})
}
