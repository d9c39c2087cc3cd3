package microvm

import (
	"encoding/binary"
	"slices"
	"testing"
)

type message struct {
	addr uint64
	data uint32
}

// testIOAPIC is an I/O APIC whose messages are collected.
func testIOAPIC(pins int) (a *ioapic, sent *[]message) {
	sent = new([]message)
	return newIOAPIC(pins, func(addr uint64, data uint32) { *sent = append(*sent, message{addr, data}) }), sent
}

func (a *ioapic) set(reg, v uint32) {
	a.write(ioapicSelect, binary.LittleEndian.AppendUint32(nil, reg))
	a.write(ioapicWindow, binary.LittleEndian.AppendUint32(nil, v))
}

func (a *ioapic) get(reg uint32) uint32 {
	a.write(ioapicSelect, binary.LittleEndian.AppendUint32(nil, reg))
	var b [4]byte
	a.read(ioapicWindow, b[:])
	return binary.LittleEndian.Uint32(b[:])
}

func TestIOAPICRegisters(t *testing.T) {
	a, _ := testIOAPIC(3)
	a.set(ioapicRegID, 0xffffffff)
	a.set(ioapicRegVersion, 0)
	a.set(ioapicRegRedirect+2*2, 0xffffffff)
	a.set(ioapicRegRedirect+2*2+1, 0x05ffffff)
	a.set(ioapicRegRedirect+2*3, 0x31) // no such pin
	for reg, want := range map[uint32]uint32{
		ioapicRegID:                 0x0f000000,
		ioapicRegVersion:            0x00020011,
		ioapicRegRedirect:           redirMasked,
		ioapicRegRedirect + 1:       0,
		ioapicRegRedirect + 2*2:     0xffffffff &^ redirReadOnly,
		ioapicRegRedirect + 2*2 + 1: 0x05ffffff,
		ioapicRegRedirect + 2*3:     0,
		0xff:                        0,
	} {
		if got := a.get(reg); got != want {
			t.Errorf("register %#x is %#x, want %#x", reg, got, want)
		}
	}
	a.get(0xff)
	var b [8]byte
	for _, n := range []int{1, 2, 8} { // only 32-bit accesses count
		a.write(ioapicSelect, make([]byte, n))
		a.read(ioapicSelect, b[:n])
		if b != [8]byte{} {
			t.Errorf("%d bytes read as %x", n, b)
		}
	}
	a.read(ioapicSelect, b[:4])
	if b[0] != 0xff {
		t.Errorf("a write of another width selected register %#x", b[0])
	}
}

func TestIOAPICDelivers(t *testing.T) {
	a, sent := testIOAPIC(3)
	const low, high = ioapicRegRedirect + 2*1, ioapicRegRedirect + 2*1 + 1
	a.raise(1) // masked: kept
	a.raise(1)
	a.set(high, 3<<24)
	if len(*sent) != 0 {
		t.Fatalf("a masked pin sent %x", *sent)
	}
	a.set(low, 0x31)
	a.set(low, 0x31) // delivered once
	a.raise(1)
	a.set(high, 2<<24)
	a.set(low, redirLogical|0x1<<8|1<<15|0x32) // logical, lowest priority, as a level
	a.raise(1)
	a.set(low, redirMasked|0x32)
	a.set(low, 0x32) // nothing came meanwhile
	want := []message{
		{0xfee03000, 0x4031}, {0xfee03000, 0x4031},
		{0xfee02004, 0x4132},
	}
	if !slices.Equal(*sent, want) {
		t.Errorf("sent %x, want %x", *sent, want)
	}
}

// Whatever the guest writes, messages go to local APICs.
func FuzzIOAPIC(f *testing.F) {
	f.Add([]byte{0, 4, 0x12, 0, 0, 0, 0x10, 4, 0x31, 0, 0, 0})
	f.Fuzz(func(t *testing.T, b []byte) {
		a, sent := testIOAPIC(4)
		for len(b) >= 2 {
			off, n := uint64(b[0]), int(b[1]%8)+1
			b = b[2:]
			p := make([]byte, n)
			copy(p, b)
			b = b[min(n, len(b)):]
			a.write(off, p)
			a.raise(int(off % 4))
			a.read(off, p)
		}
		for _, m := range *sent {
			if m.addr>>20 != 0xfee || m.data&^uint32(redirVector|redirDelivery|msiDataAsserted) != 0 {
				t.Errorf("a message %#x to %#x", m.data, m.addr)
			}
		}
	})
}
