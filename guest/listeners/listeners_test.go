package listeners

import (
	"context"
	"encoding/binary"
	"errors"
	"maps"
	"net"
	"net/netip"
	"reflect"
	"slices"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// message is what the kernel says of a socket.
func message(address string, port uint16, cookie uint64, attrs ...[]byte) []byte {
	a := netip.MustParseAddr(address)
	b := make([]byte, messageSize)
	b[0] = unix.AF_INET
	if a.Is6() {
		b[0] = unix.AF_INET6
	}
	binary.BigEndian.PutUint16(b[4:], port)
	copy(b[8:], a.AsSlice())
	binary.NativeEndian.PutUint32(b[44:], uint32(cookie))
	binary.NativeEndian.PutUint32(b[48:], uint32(cookie>>32))
	for _, attr := range attrs {
		b = append(b, attr...)
	}
	return b
}

func attribute(kind uint16, value ...byte) []byte {
	b := binary.NativeEndian.AppendUint16(nil, uint16(4+len(value)))
	b = append(binary.NativeEndian.AppendUint16(b, kind), value...)
	return append(b, make([]byte, -len(b)&3)...)
}

// TestParse: which sockets loopback leads to, and how.
func TestParse(t *testing.T) {
	cgroup := attribute(attrCgroupID, binary.NativeEndian.AppendUint64(nil, 1<<40)...)
	for _, c := range []struct {
		b    []byte
		want Listener // Port 0: none
	}{
		{message("0.0.0.0", 80, 5, cgroup), Listener{V4: true, Port: 80, Cgroup: 1 << 40}},
		{message("127.0.0.1", 80, 5, attribute(99, 1, 2, 3), cgroup), Listener{V4: true, Port: 80, Cgroup: 1 << 40}},
		{message("::", 80, 5, attribute(attrV6Only, 0), cgroup), Listener{V4: true, V6: true, Port: 80, Cgroup: 1 << 40}},
		{message("::", 80, 5, attribute(attrV6Only, 1), cgroup), Listener{V6: true, Port: 80, Cgroup: 1 << 40}},
		{message("::1", 80, 5, cgroup), Listener{V6: true, Port: 80, Cgroup: 1 << 40}},
		{message("::ffff:127.0.0.1", 80, 5, cgroup), Listener{V4: true, Port: 80, Cgroup: 1 << 40}},
		{message("127.0.0.53", 53, 5, cgroup), Listener{}},
		{message("10.0.0.1", 80, 5), Listener{}},
		{message("fe80::1", 80, 5), Listener{}},
		{message("0.0.0.0", 0, 5), Listener{}},
		{message("0.0.0.0", 80, 5)[:messageSize-1], Listener{}},
		{message("0.0.0.0", 80, 5, []byte{3, 0, 21, 0}), Listener{V4: true, Port: 80}},  // an attribute that is too short
		{message("0.0.0.0", 80, 5, []byte{90, 0, 21, 0}), Listener{V4: true, Port: 80}}, // and one too long
	} {
		got, ok := parse(c.b, unix.IPPROTO_TCP)
		if ok != (c.want.Port != 0) || ok && (got.Listener != c.want || got.cookie != 5) {
			t.Errorf("%x: %+v, %v; want %+v", c.b, got, ok, c.want)
		}
	}
	if s, _ := parse(message("0.0.0.0", 80, 1<<33|7), unix.IPPROTO_UDP); !s.UDP || s.cookie != 1<<33|7 {
		t.Errorf("%+v", s)
	}
}

// FuzzParse: the kernel's messages are well formed; whatever is not must not end PID 1.
func FuzzParse(f *testing.F) {
	f.Add(message("::", 80, 5, attribute(attrV6Only, 1), attribute(attrCgroupID, 1, 2, 3, 4, 5, 6, 7, 8)))
	f.Add([]byte{})
	f.Fuzz(func(t *testing.T, b []byte) {
		if s, ok := parse(b, unix.IPPROTO_TCP); ok && (s.Port == 0 || !s.V4 && !s.V6 || len(b) < messageSize) {
			t.Fatalf("%x: %+v", b, s)
		}
	})
}

// TestUpdate: what was opened is taken up, what is gone is dropped, and what is there
// without having been told of is about to close.
func TestUpdate(t *testing.T) {
	at := func(port uint16) Listener { return Listener{V4: true, Port: port} }
	w := Watcher{open: map[uint64]Listener{1: at(80), 2: at(81)}}
	w.update([]socket{{at(80), 1}, {at(82), 3}, {at(83), 4}}, map[uint64]bool{3: true, 9: true}, true)
	if want := map[uint64]Listener{1: at(80), 3: at(82)}; !maps.Equal(w.open, want) {
		t.Errorf("%v, want %v", w.open, want)
	}
	// A dump that passes over one of them is not the last word.
	now := []socket{{at(80), 1}, {at(82), 3}, {at(84), 5}}
	if w.lacks(now, map[uint64]bool{5: true}) || !w.lacks(now[1:], nil) || !w.lacks(now, map[uint64]bool{6: true}) {
		t.Error("what a dump lacks is not seen, or it lacks nothing")
	}
}

// TestRing reads records as the kernel writes them: discarded ones, one that is still being
// written, and across the end of the buffer.
func TestRing(t *testing.T) {
	page := unix.Getpagesize()
	r := &ring{consumer: make([]byte, page), producer: make([]byte, page+2*ringSize)}
	put := func(pos uint64, head uint32, data ...byte) uint64 {
		for _, off := range []int{page, page + ringSize} { // mapped twice
			b := r.producer[off:]
			at := int(pos % ringSize)
			record := append(binary.NativeEndian.AppendUint32(nil, head), 0, 0, 0, 0)
			record = append(record, data...)
			for i, x := range record {
				if at+i < ringSize {
					b[at+i] = x
				} else if off == page {
					r.producer[page+ringSize+at+i-ringSize] = x
				}
			}
		}
		return pos + uint64(8+(len(data)+7)&^7)
	}
	var got []string
	drain := func() bool { return r.drain(func(b []byte) { got = append(got, string(b)) }) }
	if drain() {
		t.Error("an empty ring has records")
	}
	start := uint64(ringSize - 24)
	binary.NativeEndian.PutUint64(r.consumer, start)
	pos := put(start, 5, []byte("first")...)
	pos = put(pos, 3|unix.BPF_RINGBUF_DISCARD_BIT, []byte("no!")...)
	busy := pos
	pos = put(pos, 6|unix.BPF_RINGBUF_BUSY_BIT, []byte("second")...)
	pos = put(pos, 5, []byte("third")...)
	binary.NativeEndian.PutUint64(r.producer, pos)
	if !drain() || drain() || !slices.Equal(got, []string{"first"}) {
		t.Errorf("%q before the second is written", got)
	}
	put(busy, 6, []byte("second")...)
	if !drain() || !slices.Equal(got, []string{"first", "second", "third"}) {
		t.Errorf("%q", got)
	}
	if at := binary.NativeEndian.Uint64(r.consumer); at != pos {
		t.Errorf("read up to %d of %d", at, pos)
	}
}

// TestJumps: labels become distances, counted from the next instruction.
func TestJumps(t *testing.T) {
	p := newProgram()
	p.jump(unix.BPF_JEQ, r2, -1, "out")
	p.set64(r1, pseudoMapFD, 0x1122334455667788)
	p.label("out")
	p.exit()
	want := []byte{
		0xbf, 0x16, 0, 0, 0, 0, 0, 0, // r6 = r1
		0x15, 0x02, 2, 0, 0xff, 0xff, 0xff, 0xff, // if r2 == -1 goto +2
		0x18, 0x11, 0, 0, 0x88, 0x77, 0x66, 0x55, // r1 = map
		0, 0, 0, 0, 0x44, 0x33, 0x22, 0x11,
		0x95, 0, 0, 0, 0, 0, 0, 0, // exit
	}
	if got := p.bytes(); !reflect.DeepEqual(got, want) {
		t.Errorf("%x\nwant %x", got, want)
	}
}

// TestPoll: what this machine's kernel says of its sockets, with neither rights nor events.
func TestPoll(t *testing.T) {
	l, err := net.Listen("tcp", "[::]:0") // IPv4, too
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	port := l.Addr().(*net.TCPAddr).AddrPort().Port()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	there := false
	err = Poll(ctx, NewNamespaces(t.Logf), func(list []Listener) {
		i := slices.IndexFunc(list, func(l Listener) bool { return l.Port == port && !l.UDP })
		switch {
		case i < 0 && there:
			cancel() // as it should be
		case i < 0:
			t.Errorf("port %d is not among %+v", port, list)
			cancel()
		default:
			if there = true; !list[i].V4 || !list[i].V6 {
				t.Errorf("%+v", list[i])
			}
			l.Close()
		}
	})
	if !errors.Is(err, context.Canceled) {
		t.Errorf("%v: its end is not seen", err)
	}
}
