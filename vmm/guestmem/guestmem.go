// Package guestmem is the guest's physical memory as the VMM's devices see it.
//
// A guest physical address is a type of its own, Addr, and Memory.Bytes is the
// one checked translation to host memory (overflow, holes, end of RAM), so that
// no address a guest wrote ever indexes a slice directly. The guest changes the
// bytes behind a returned slice at any moment: copy what is to be judged once,
// then judge the copy.
package guestmem

import (
	"errors"
	"fmt"
	"math"
	"slices"
	"sync/atomic"
	"unsafe"
)

// Addr is a guest physical address.
type Addr uint64

// ErrRange is wrapped by every error about a range that is not guest RAM.
var ErrRange = errors.New("not in guest memory")

// Region is one contiguous piece of guest RAM. Bytes stays owned by whoever
// mapped it and must outlive every Memory built on it.
type Region struct {
	Start Addr
	Bytes []byte
}

func (r Region) end() uint64 { return uint64(r.Start) + uint64(len(r.Bytes)) }

// Memory is an immutable set of regions. It is safe for concurrent use; the
// contents of the bytes it hands out are not synchronised with the guest.
type Memory struct {
	regions []Region // sorted by Start, disjoint, none empty; immutable after New
}

// New returns the Memory of the given regions, which must be non-empty and
// disjoint, and must not wrap around the end of the address space.
func New(regions ...Region) (*Memory, error) {
	rs := slices.Clone(regions)
	slices.SortFunc(rs, func(a, b Region) int {
		switch {
		case a.Start < b.Start:
			return -1
		case a.Start > b.Start:
			return 1
		}
		return 0
	})
	for i, r := range rs {
		if len(r.Bytes) == 0 {
			return nil, fmt.Errorf("guestmem: region at %#x is empty", r.Start)
		}
		if uint64(r.Start) > math.MaxUint64-uint64(len(r.Bytes)) {
			return nil, fmt.Errorf("guestmem: region at %#x wraps around", r.Start)
		}
		if i > 0 && rs[i-1].end() > uint64(r.Start) {
			return nil, fmt.Errorf("guestmem: regions at %#x and %#x overlap", rs[i-1].Start, r.Start)
		}
	}
	return &Memory{regions: rs}, nil
}

// Regions returns the regions in ascending order; the caller must not change them.
func (m *Memory) Regions() []Region { return m.regions }

// Size returns the sum of all regions' lengths in bytes.
func (m *Memory) Size() uint64 {
	var n uint64
	for _, r := range m.regions {
		n += uint64(len(r.Bytes))
	}
	return n
}

// Bytes returns the n bytes of guest memory at a, which must lie in one region.
// The slice's capacity ends with the range.
func (m *Memory) Bytes(a Addr, n uint64) ([]byte, error) {
	for _, r := range m.regions {
		if a < r.Start || uint64(a) >= r.end() {
			continue
		}
		off := uint64(a - r.Start)
		if n > uint64(len(r.Bytes))-off {
			break
		}
		return r.Bytes[off : off+n : off+n], nil
	}
	return nil, fmt.Errorf("guestmem: %d bytes at %#x: %w", n, uint64(a), ErrRange)
}

// Uint32 returns the 32-bit word at a for atomic access; a must be 4-aligned.
// The word is in the host's (little-endian) byte order.
func (m *Memory) Uint32(a Addr) (*atomic.Uint32, error) {
	if a%4 != 0 {
		return nil, fmt.Errorf("guestmem: atomic word at %#x is not 4-aligned", uint64(a))
	}
	b, err := m.Bytes(a, 4)
	if err != nil {
		return nil, err
	}
	p := unsafe.Pointer(unsafe.SliceData(b))
	if uintptr(p)%4 != 0 {
		return nil, fmt.Errorf("guestmem: region of %#x is not aligned on the host", uint64(a))
	}
	return (*atomic.Uint32)(p), nil
}
