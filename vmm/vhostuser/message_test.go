package vhostuser

import (
	"bytes"
	"encoding/binary"
	"testing"
)

// encode is the inverse of parse.
func (m *message) encode() []byte {
	var p []byte
	switch specs[m.request].payload {
	case payloadU64:
		p = u64s(m.u64)
	case payloadVringState:
		p = u32s(m.ring, m.num)
	case payloadVringFD:
		v := uint64(m.ring)
		if m.noFD {
			v |= vringNoFD
		}
		p = u64s(v)
	case payloadVringAddr:
		p = append(u32s(m.addr.index, m.addr.flags), u64s(m.addr.desc, m.addr.used, m.addr.avail, m.addr.log)...)
	case payloadMemTable:
		p = u32s(uint32(len(m.regions)), 0)
		for _, r := range m.regions {
			p = append(p, u64s(r.guest, r.size, r.user, r.offset)...)
		}
	case payloadConfig:
		p = append(u32s(m.config.offset, uint32(len(m.config.data)), m.config.flags), m.config.data...)
	}
	flags := uint32(flagVersion)
	if m.needReply {
		flags |= flagNeedReply
	}
	return append(u32s(uint32(m.request), flags, uint32(len(p))), p...)
}

// FuzzMessage feeds any bytes as one message: parse must not panic, must keep
// its promises about what it accepts, and must lose nothing of it.
func FuzzMessage(f *testing.F) {
	for r, s := range specs {
		m := message{
			request: r, needReply: true, u64: 1 << 40, ring: 3, num: 256,
			addr:    vringAddr{index: 1, desc: 0x1000, used: 0x2000, avail: 0x3000},
			regions: []memRegion{{0, 1 << 20, 1 << 40, 0}, {1 << 32, 1 << 30, 1 << 41, 1 << 20}},
			config:  configAccess{offset: 8, data: make([]byte, 60)},
		}
		fds := s.fds
		switch s.payload {
		case payloadVringFD:
			fds = 1
		case payloadMemTable:
			fds = len(m.regions)
		}
		f.Add(m.encode(), fds)
	}
	f.Fuzz(func(t *testing.T, b []byte, fds int) {
		if len(b) < headerSize {
			return
		}
		h, err := parseHeader(b)
		if err != nil {
			return
		}
		if h.size > maxPayload {
			t.Fatalf("payload of %d bytes accepted", h.size)
		}
		p := b[headerSize:]
		if uint64(len(p)) < uint64(h.size) {
			return
		}
		p = p[:h.size]
		m, err := parse(h, p, fds)
		if err != nil {
			return
		}
		if n := m.config.offset + uint32(len(m.config.data)); n > maxConfigSize {
			t.Fatalf("configuration up to %d accepted", n)
		}
		if len(m.regions) > maxRegions || len(m.regions) > 0 && fds != len(m.regions) {
			t.Fatalf("%d regions with %d descriptors accepted", len(m.regions), fds)
		}
		if specs[h.request].payload == payloadNone {
			return
		}
		want := bytes.Clone(b[:headerSize+len(p)])
		binary.LittleEndian.PutUint32(want[4:], h.flags&(flagVersionMask|flagNeedReply))
		if specs[h.request].payload == payloadMemTable {
			clear(want[headerSize+4 : headerSize+8]) // padding
		}
		if got := m.encode(); !bytes.Equal(got, want) {
			t.Fatalf("%v: %x became %x", h.request, want, got)
		}
	})
}
