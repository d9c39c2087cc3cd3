package net

import (
	"bytes"
	"testing"

	"github.com/wsl2/wsl2/vmm/virtio/virtiotest"
)

// FuzzHeader: what of a guest's header is passed on lies within the frame and was negotiated.
func FuzzHeader(f *testing.F) {
	add := func(h Header, n int, features uint64) {
		var raw [HeaderLen]byte
		h.Put(&raw)
		f.Add(raw[:], n, features)
	}
	add(Header{}, 60, 0)
	add(Header{Flags: NeedsCsum, CsumStart: 34, CsumOffset: 16}, 60, offered)
	add(Header{Flags: NeedsCsum, GSO: GSOTCPv4, GSOSize: 1448, CsumStart: 34, CsumOffset: 16}, 65000, offered)
	add(Header{Flags: NeedsCsum, GSO: GSOTCPv6, GSOSize: 1, CsumStart: 0xffff, CsumOffset: 0xffff}, 65000, offered)
	f.Fuzz(func(t *testing.T, b []byte, n int, features uint64) {
		if len(b) < HeaderLen {
			return
		}
		in := ParseHeader((*[HeaderLen]byte)(b))
		var again [HeaderLen]byte
		if in.Put(&again); !bytes.Equal(again[:], b[:HeaderLen]) {
			t.Fatalf("% x became % x", b[:HeaderLen], again)
		}
		h, err := in.check(n, features)
		if err != nil {
			return
		}
		if n < etherLen || n > MaxFrame {
			t.Fatalf("a frame of %d bytes", n)
		}
		if h.Flags&^NeedsCsum != 0 {
			t.Fatalf("flags %#x", h.Flags)
		}
		if h.Flags == NeedsCsum && (features&featureCsum == 0 || int(h.CsumStart)+int(h.CsumOffset)+2 > n) {
			t.Fatalf("checksum at %d+%d of %d", h.CsumStart, h.CsumOffset, n)
		}
		switch h.GSO {
		case GSONone:
		case GSOTCPv4, GSOTCPv6:
			if h.GSOSize == 0 || h.Flags != NeedsCsum || features&(featureHostTSO4|featureHostTSO6) == 0 {
				t.Fatalf("%+v with features %#x", h, features)
			}
		default:
			t.Fatalf("segmentation %d", h.GSO)
		}
	})
}

// FuzzSend: whatever a driver offers as a frame, the device takes it, and the link gets
// it whole or not at all.
func FuzzSend(f *testing.F) {
	f.Add(guestFrame(Header{}, frame(60, 1)), 3)
	f.Add(guestFrame(Header{Flags: NeedsCsum, GSO: GSOTCPv4, GSOSize: 1448, CsumStart: 34, CsumOffset: 16}, frame(3000, 1)), 12)
	f.Add([]byte{1}, 0)
	f.Fuzz(func(t *testing.T, b []byte, cut int) {
		if len(b) == 0 || len(b) > 1<<17 {
			return
		}
		cut = int(uint(cut) % uint(len(b)))
		d, w := newDevice(t)
		g := virtiotest.Start(t, d, virtiotest.Options{MemoryBytes: 1 << 20})
		defer d.Close()
		defer g.Stop()
		g.Ring(queueTX).Do(t, [][]byte{b[:cut], b[cut:]})
		last := frame(61, 2)
		g.Ring(queueTX).Do(t, [][]byte{guestFrame(Header{}, last)})
		p := w.peer()
		defer p.close()
		p.readFeatures(true)
		for {
			got := p.read()
			if bytes.Equal(got[HeaderLen:], last) {
				return
			}
			if !bytes.Equal(got[HeaderLen:], b[guestHeaderLen:]) {
				t.Fatalf("% x came as % x", b, got)
			}
		}
	})
}
