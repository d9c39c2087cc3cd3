package qemu

import (
	"bytes"
	"encoding/binary"
	"testing"

	"github.com/wsl2/wsl2/vmm/boot"
)

func sum(b []byte) (s byte) {
	for _, x := range b {
		s += x
	}
	return s
}

// The table must fit between its place and the pointer's, for as many CPUs as
// there may be, and lead Linux to every transport.
func TestMPTable(t *testing.T) {
	for _, cpus := range []int{1, 2, 64} {
		low := make([]byte, conventional)
		putMPTable(low, cpus)
		p := low[mpPointerAddr:][:16]
		if string(p[:4]) != "_MP_" || sum(p) != 0 {
			t.Fatalf("pointer %x", p)
		}
		table := low[binary.LittleEndian.Uint32(p[4:]):]
		n := binary.LittleEndian.Uint16(table[4:])
		if int(n) > mpPointerAddr-mpTableAddr {
			t.Fatalf("%d CPUs: table of %d bytes, room for %d", cpus, n, mpPointerAddr-mpTableAddr)
		}
		table = table[:n]
		if string(table[:4]) != "PCMP" || sum(table) != 0 {
			t.Fatalf("%d CPUs: bad table", cpus)
		}
		kinds := map[byte]int{}
		entries := 0
		for b := table[44:]; len(b) > 0; entries++ {
			kinds[b[0]]++
			if b[0] == mpProcessor {
				b = b[20:]
			} else {
				b = b[8:]
			}
		}
		if entries != int(binary.LittleEndian.Uint16(table[34:])) || kinds[mpProcessor] != cpus || kinds[mpIOAPIC] != 2 || kinds[mpInterrupt] != len(transports)+2 {
			t.Errorf("%d CPUs: entries %v", cpus, kinds)
		}
	}
	if MaxDevices != len(transports)-1 {
		t.Errorf("MaxDevices = %d with %d transports", MaxDevices, len(transports))
	}
}

func TestROM(t *testing.T) {
	e := boot.Entry{RIP: 0x1000123, RSI: 0x7000, RSP: 0x8ff0, CR3: 0x9000, GDT: 0x500}
	r := rom(e)
	if len(r)%romSize != 0 {
		t.Fatalf("%d bytes", len(r))
	}
	page := r[len(r)-0x1000:]
	// The reset vector is a jump back to the page's start.
	if v := page[0xff0:]; v[0] != 0xe9 || 0xff3+int(int16(binary.LittleEndian.Uint16(v[1:]))) != 0 {
		t.Errorf("reset vector %x", page[0xff0:])
	}
	if len(resetCode) > romGdtr || !bytes.HasPrefix(page, resetCode[:]) {
		t.Error("the code is not where it belongs")
	}
	if got := binary.LittleEndian.Uint64(page[romRip:]); got != uint64(e.RIP) {
		t.Errorf("RIP %#x", got)
	}
}
