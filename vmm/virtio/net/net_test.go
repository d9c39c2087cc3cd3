package net

import (
	"bytes"
	"encoding/binary"
	"errors"
	"os"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/wsl2/wsl2/vmm/virtio"
	"github.com/wsl2/wsl2/vmm/virtio/virtiotest"
)

// wire is the other ends of the links that a device opened.
type wire struct {
	t      testing.TB
	opened chan int
	errs   chan error
	fail   error // of Open
}

func newDevice(t testing.TB) (*Device, *wire) {
	t.Helper()
	w := &wire{t: t, opened: make(chan int, 16), errs: make(chan error, 1024)}
	d, err := New(Config{
		MAC: [6]byte{2, 0, 0, 0, 0, 1}, MTU: 65520,
		Open: func() (*os.File, error) {
			if w.fail != nil {
				return nil, w.fail
			}
			pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
			if err != nil {
				return nil, err
			}
			w.opened <- pair[1]
			return os.NewFile(uintptr(pair[0]), "link"), nil
		},
		OnError: func(err error) { w.errs <- err },
	})
	if err != nil {
		t.Fatal(err)
	}
	d.reopen = 0
	t.Cleanup(func() { d.Close() })
	return d, w
}

// peer waits for the link, of which it has taken the first record.
func (w *wire) peer() *peer {
	w.t.Helper()
	select {
	case fd := <-w.opened:
		p := &peer{w.t, fd}
		w.t.Cleanup(p.close)
		return p
	case <-time.After(virtiotest.Timeout):
		w.t.Fatal("no link was opened")
		return nil
	}
}

func (w *wire) waitError() error {
	w.t.Helper()
	select {
	case err := <-w.errs:
		return err
	case <-time.After(virtiotest.Timeout):
		w.t.Fatal("no error was reported")
		return nil
	}
}

// peer is the other end of a link.
type peer struct {
	t  testing.TB
	fd int
}

func (p *peer) close() {
	if p.fd >= 0 {
		unix.Close(p.fd)
		p.fd = -1
	}
}

func (p *peer) read() []byte {
	p.t.Helper()
	poll := []unix.PollFd{{Fd: int32(p.fd), Events: unix.POLLIN}}
	if n, err := unix.Poll(poll, int(virtiotest.Timeout.Milliseconds())); err != nil || n == 0 {
		p.t.Fatalf("nothing on the link: %v", err)
	}
	b := make([]byte, 1<<17)
	n, err := unix.Read(p.fd, b)
	if err != nil {
		p.t.Fatal(err)
	}
	return b[:n]
}

// readFeatures takes the record that begins a session.
func (p *peer) readFeatures(offloads bool) {
	p.t.Helper()
	b := p.read()
	if on, ok := Offloads(b); !ok || on != offloads {
		p.t.Fatalf("first record % x: offloads %v, %v", b, on, ok)
	}
}

func (p *peer) write(h Header, frame []byte) {
	p.t.Helper()
	var raw [HeaderLen]byte
	h.Put(&raw)
	if _, err := unix.Write(p.fd, append(raw[:], frame...)); err != nil {
		p.t.Fatal(err)
	}
}

// guestFrame is a frame as a driver sends it.
func guestFrame(h Header, frame []byte) []byte {
	var raw [HeaderLen]byte
	h.Put(&raw)
	return append(append(raw[:], 0xee, 0xee), frame...)
}

// frame returns n bytes that do not repeat themselves.
func frame(n int, seed byte) []byte {
	b := make([]byte, n)
	for i := range b {
		b[i] = byte(i) ^ byte(i>>8) ^ seed
	}
	return b
}

func TestSend(t *testing.T) {
	for _, direct := range []bool{false, true} {
		d, w := newDevice(t)
		g := virtiotest.Start(t, d, virtiotest.Options{Direct: direct})
		tso := Header{Flags: NeedsCsum, GSO: GSOTCPv4, HdrLen: 54, GSOSize: 1448, CsumStart: 34, CsumOffset: 16}
		var p *peer
		for i, tc := range []struct {
			h     Header
			frame []byte
			want  Header
		}{
			{Header{}, frame(14, 1), Header{}},
			{Header{}, frame(1514, 2), Header{}},
			{Header{}, frame(MaxFrame, 3), Header{}},
			{Header{Flags: NeedsCsum, CsumStart: 34, CsumOffset: 16}, frame(60, 4), Header{Flags: NeedsCsum, CsumStart: 34, CsumOffset: 16}},
			{tso, frame(65000, 5), Header{Flags: NeedsCsum, GSO: GSOTCPv4, GSOSize: 1448, CsumStart: 34, CsumOffset: 16}},
			// What no feature stands for is not passed on.
			{Header{Flags: 0x7e, HdrLen: 7, GSOSize: 9, CsumStart: 5, CsumOffset: 6}, frame(60, 6), Header{}},
		} {
			b := guestFrame(tc.h, tc.frame)
			// Cut anywhere, also in the header (virtio 1.2 §2.7.4).
			cut := []int{3, guestHeaderLen, len(b) / 2}[i%3]
			g.Ring(queueTX).Do(t, [][]byte{b[:cut], b[cut:]})
			if p == nil {
				p = w.peer()
				p.readFeatures(true)
			}
			got := p.read()
			if h := ParseHeader((*[HeaderLen]byte)(got)); h != tc.want {
				t.Errorf("frame %d: header %+v, want %+v", i, h, tc.want)
			}
			if !bytes.Equal(got[HeaderLen:], tc.frame) {
				t.Errorf("frame %d: %d bytes are not the %d that were sent", i, len(got)-HeaderLen, len(tc.frame))
			}
		}
	}
}

func TestSendRefused(t *testing.T) {
	d, w := newDevice(t)
	g := virtiotest.Start(t, d, virtiotest.Options{})
	for _, b := range [][]byte{
		{1, 2, 3},
		guestFrame(Header{}, frame(13, 0)),
		guestFrame(Header{}, frame(MaxFrame+1, 0)),
		guestFrame(Header{Flags: NeedsCsum, CsumStart: 34, CsumOffset: 26}, frame(60, 0)),
		guestFrame(Header{Flags: NeedsCsum, CsumStart: 0xffff, CsumOffset: 0xffff}, frame(60, 0)),
		guestFrame(Header{Flags: NeedsCsum, CsumStart: 2, CsumOffset: 2}, frame(60, 0)),
		guestFrame(Header{GSO: GSOTCPv4, GSOSize: 100}, frame(60, 0)),
		guestFrame(Header{Flags: NeedsCsum, CsumStart: 34, GSO: GSOTCPv6}, frame(60, 0)),
		guestFrame(Header{Flags: NeedsCsum, CsumStart: 34, GSO: 3, GSOSize: 100}, frame(60, 0)),
		guestFrame(Header{Flags: NeedsCsum, CsumStart: 34, GSO: GSOTCPv4 | 0x80, GSOSize: 100}, frame(60, 0)),
	} {
		g.Ring(queueTX).Do(t, [][]byte{b})
	}
	good := frame(100, 9)
	g.Ring(queueTX).Do(t, [][]byte{guestFrame(Header{}, good)})
	p := w.peer()
	p.readFeatures(true)
	if got := p.read(); !bytes.Equal(got[HeaderLen:], good) {
		t.Errorf("the first frame on the link is % x", got)
	}
}

// open makes the guest send a frame and returns the link without it.
func open(t *testing.T, g *virtiotest.Guest, w *wire, offloads bool) *peer {
	t.Helper()
	g.Ring(queueTX).Do(t, [][]byte{guestFrame(Header{}, frame(60, 0))})
	p := w.peer()
	p.readFeatures(offloads)
	p.read()
	return p
}

func TestReceive(t *testing.T) {
	d, w := newDevice(t)
	g := virtiotest.Start(t, d, virtiotest.Options{})
	p := open(t, g, w, true)
	const size = 2000
	var bufs []*virtiotest.Request // that the device has, oldest first
	for i, n := range []int{14, size - guestHeaderLen, size - guestHeaderLen + 1, 60000, MaxFrame} {
		for len(bufs) < (n+guestHeaderLen)/size+3 {
			bufs = append(bufs, g.Ring(queueRX).Send(t, nil, 7, size-7)) // in pieces
		}
		want := frame(n, byte(i))
		h := Header{Flags: NeedsCsum, GSO: GSOTCPv6, HdrLen: 54, GSOSize: 1400, CsumStart: 54, CsumOffset: 16}
		p.write(h, want)
		var got []byte
		buffers := 1
		for k := 0; k < buffers; k++ {
			written, data := bufs[k].Wait(t)
			data = data[:written]
			if k == 0 {
				buffers = int(binary.LittleEndian.Uint16(data[HeaderLen:]))
				if got := ParseHeader((*[HeaderLen]byte)(data)); got != h {
					t.Errorf("%d bytes: header %+v", n, got)
				}
			}
			got = append(got, data...)
		}
		bufs = bufs[buffers:]
		if most := (n + guestHeaderLen + size - 1) / size; buffers != most {
			t.Errorf("%d bytes: %d buffers, want %d", n, buffers, most)
		}
		if !bytes.Equal(got[guestHeaderLen:], want) {
			t.Errorf("%d bytes came as %d other ones", n, len(got)-guestHeaderLen)
		}
	}
}

// A frame for which there is no room waits for buffers, and nothing is lost.
func TestReceiveStarved(t *testing.T) {
	d, w := newDevice(t)
	g := virtiotest.Start(t, d, virtiotest.Options{})
	p := open(t, g, w, true)
	want := frame(5000, 7)
	p.write(Header{}, want)
	var bufs []*virtiotest.Request
	for range 3 {
		bufs = append(bufs, g.Ring(queueRX).Send(t, nil, 2000))
	}
	var got []byte
	for _, b := range bufs {
		n, data := b.Wait(t)
		got = append(got, data[:n]...)
	}
	if !bytes.Equal(got[guestHeaderLen:], want) {
		t.Error("another frame came")
	}
}

// Without VIRTIO_NET_F_MRG_RXBUF each buffer takes one frame, and what is larger is lost.
func TestReceiveUnmerged(t *testing.T) {
	d, w := newDevice(t)
	g := virtiotest.Start(t, d, virtiotest.Options{Features: ^uint64(offloads)})
	p := open(t, g, w, false)
	a := g.Ring(queueRX).Send(t, nil, 2000)
	b := g.Ring(queueRX).Send(t, nil, 2000)
	p.write(Header{}, frame(3000, 1))
	p.write(Header{}, frame(1000, 2))
	p.write(Header{}, frame(500, 3))
	for i, r := range []*virtiotest.Request{a, b} {
		n, data := r.Wait(t)
		want := frame([]int{1000, 500}[i], byte(2+i))
		if n != guestHeaderLen+len(want) || !bytes.Equal(data[guestHeaderLen:n], want) {
			t.Errorf("buffer %d has %d bytes, of another frame", i, n)
		}
		if k := binary.LittleEndian.Uint16(data[HeaderLen:]); k != 1 {
			t.Errorf("buffer %d: num_buffers is %d", i, k)
		}
	}
}

// A link that takes no more holds the guest's frames back, in order.
func TestSendBlocked(t *testing.T) {
	d, w := newDevice(t)
	g := virtiotest.Start(t, d, virtiotest.Options{MemoryBytes: 64 << 20})
	p := open(t, g, w, true)
	var reqs []*virtiotest.Request
	const n = 100 // of 60 kB: more than a socket's buffer holds
	for i := range n {
		reqs = append(reqs, g.Ring(queueTX).Send(t, [][]byte{guestFrame(Header{}, frame(60000, byte(i)))}))
	}
	for i := range n {
		if got := p.read(); !bytes.Equal(got[HeaderLen:], frame(60000, byte(i))) {
			t.Fatalf("frame %d came as another one", i)
		}
	}
	for _, r := range reqs {
		r.Wait(t)
	}
}

func TestLinkEnds(t *testing.T) {
	d, w := newDevice(t)
	g := virtiotest.Start(t, d, virtiotest.Options{})
	p := open(t, g, w, true)
	p.close()
	if err := w.waitError(); !strings.Contains(err.Error(), "has gone") {
		t.Errorf("reported %v", err)
	}
	// The next frame finds a new one.
	p = open(t, g, w, true)
	b := g.Ring(queueRX).Send(t, nil, 2000)
	p.write(Header{}, frame(77, 7))
	if n, data := b.Wait(t); !bytes.Equal(data[guestHeaderLen:n], frame(77, 7)) {
		t.Error("another frame came")
	}
}

func TestOpenFails(t *testing.T) {
	d, w := newDevice(t)
	w.fail = errors.New("no such program")
	g := virtiotest.Start(t, d, virtiotest.Options{})
	for range 3 { // lost, like on a wire that is cut
		g.Ring(queueTX).Do(t, [][]byte{guestFrame(Header{}, frame(60, 0))})
		if err := w.waitError(); !errors.Is(err, w.fail) {
			t.Errorf("reported %v", err)
		}
	}
	d.reopen = time.Hour
	for range 3 {
		g.Ring(queueTX).Do(t, [][]byte{guestFrame(Header{}, frame(60, 0))})
	}
	if n := len(w.errs); n > 1 {
		t.Errorf("%d more errors within the interval", n)
	}
}

// A card that is turned on says so to groups of IPv6: no link is opened for that.
func TestGroupTalk(t *testing.T) {
	d, w := newDevice(t)
	g := virtiotest.Start(t, d, virtiotest.Options{})
	for _, group := range []byte{2, 0x16} { // routers; RFC 3810
		g.Ring(queueTX).Do(t, [][]byte{guestFrame(Header{}, append([]byte{0x33, 0x33, 0, 0, 0, group}, frame(60, 0)...))})
	}
	// Who asks for a neighbour wants an answer.
	want := append([]byte{0x33, 0x33, 0xff, 0, 0, 1}, frame(60, 0)...)
	g.Ring(queueTX).Do(t, [][]byte{guestFrame(Header{}, want)})
	p := w.peer()
	p.readFeatures(true)
	if got := p.read(); !bytes.Equal(got[HeaderLen:], want) {
		t.Errorf("the first frame is % x", got)
	}
}

// A driver that resets the card goes on with the same link.
func TestRestart(t *testing.T) {
	d, w := newDevice(t)
	g := virtiotest.Start(t, d, virtiotest.Options{})
	p := open(t, g, w, true)
	g.Stop()
	g = virtiotest.Start(t, d, virtiotest.Options{Features: ^uint64(featureGuestTSO4)})
	p.readFeatures(false)
	want := frame(90, 4)
	g.Ring(queueTX).Do(t, [][]byte{guestFrame(Header{}, want)})
	if got := p.read(); !bytes.Equal(got[HeaderLen:], want) {
		t.Error("another frame came")
	}
	if n := len(w.opened); n != 0 {
		t.Errorf("%d more links were opened", n)
	}
}

// TestRestartFull: a link that takes no more at a reset is told of the new driver's features even so, before its first frame.
func TestRestartFull(t *testing.T) {
	d, w := newDevice(t)
	g := virtiotest.Start(t, d, virtiotest.Options{MemoryBytes: 64 << 20})
	p := open(t, g, w, true)
	for i := range 100 { // more than a socket's buffer holds
		g.Ring(queueTX).Send(t, [][]byte{guestFrame(Header{}, frame(60000, byte(i)))})
	}
	poll := []unix.PollFd{{Fd: int32(d.link), Events: unix.POLLOUT}}
	for end := time.Now().Add(virtiotest.Timeout); ; {
		if n, err := unix.Poll(poll, 0); err == nil && n == 0 {
			break
		}
		if time.Now().After(end) {
			t.Fatal("the link is not full")
		}
	}
	g.Stop()
	g = virtiotest.Start(t, d, virtiotest.Options{Features: ^uint64(featureGuestTSO4)})
	want := frame(90, 4)
	g.Ring(queueTX).Send(t, [][]byte{guestFrame(Header{}, want)})
	b := p.read()
	for on, ok := Offloads(b); !ok; on, ok = Offloads(b) {
		if on {
			t.Fatal("offloads that the driver has not")
		}
		if bytes.Equal(b[HeaderLen:], want) {
			t.Fatal("the frame comes before the features")
		}
		b = p.read()
	}
	if on, _ := Offloads(b); on {
		t.Error("the features are another driver's")
	}
	if got := p.read(); !bytes.Equal(got[HeaderLen:], want) {
		t.Error("another frame came")
	}
}

func TestConfigSpace(t *testing.T) {
	d, _ := newDevice(t)
	c := make([]byte, 16)
	d.ReadConfig(0, c)
	if want := []byte{2, 0, 0, 0, 0, 1, 1, 0, 1, 0, 0xf0, 0xff, 0, 0, 0, 0}; !bytes.Equal(c, want) {
		t.Errorf("% x, want % x", c, want)
	}
	d.ReadConfig(10, c[:2])
	if c[0] != 0xf0 || c[1] != 0xff {
		t.Errorf("the MTU reads as % x", c[:2])
	}
}

func TestNewRefuses(t *testing.T) {
	if _, err := New(Config{MTU: 1500}); err == nil {
		t.Error("a card without a link")
	}
	if _, err := New(Config{MTU: 1279, Open: func() (*os.File, error) { return nil, nil }}); err == nil {
		t.Error("a card with an MTU that IPv6 does not allow")
	}
}

// The queue breaks with a chain that cannot be an rx buffer.
func TestReceiveShortBuffer(t *testing.T) {
	d, w := newDevice(t)
	g := virtiotest.Start(t, d, virtiotest.Options{})
	p := open(t, g, w, true)
	g.Ring(queueRX).Send(t, nil, guestHeaderLen)
	p.write(Header{}, frame(60, 0))
	if err := g.WaitFailed(t); !errors.Is(err, virtio.ErrProtocol) {
		t.Errorf("failed with %v", err)
	}
}
