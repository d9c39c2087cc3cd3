package vsock

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"math"
	"net"
	"os"
	"runtime"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/wsl2/wsl2/vmm/virtio/virtiotest"
)

func TestCredit(t *testing.T) {
	// All counters are about to wrap.
	start := uint32(math.MaxUint32 - 50)
	c := credit{alloc: 100, received: start, forwarded: start, told: start, sent: start, peerAlloc: 80, peerForwarded: start}
	if c.receive(101) || !c.receive(60) || c.receive(41) || !c.receive(40) || c.receive(1) {
		t.Error("receive does not hold the buffer's bound")
	}
	if c.receive(math.MaxUint32) {
		t.Error("receive overflows")
	}
	// The guest's own buffer of 80 is the smaller one.
	c.forwarded += 59
	if c.updateDue() {
		t.Error("update due too early")
	}
	c.forwarded++
	if !c.updateDue() {
		t.Error("update not due at three quarters of the smaller buffer")
	}
	c.peerAlloc = 200
	if c.updateDue() {
		t.Error("update due too early with a large buffer of the guest's")
	}
	c.peerAlloc = 80
	var h header
	c.stamp(&h)
	if h.bufAlloc != 100 || h.fwdCnt != start+60 || c.updateDue() {
		t.Errorf("stamp: %+v", h)
	}
	c.peerAlloc = 0
	if c.updateDue() {
		t.Error("update due without news")
	}
	c.peerAlloc = 80
	if c.space() != 80 {
		t.Errorf("space is %d, want 80", c.space())
	}
	c.sent += 70
	if c.space() != 10 {
		t.Errorf("space is %d, want 10", c.space())
	}
	for _, h := range []header{
		{bufAlloc: 70, fwdCnt: start},      // full
		{bufAlloc: 10, fwdCnt: start},      // shrunk
		{bufAlloc: 80, fwdCnt: start + 71}, // took more than we sent
		{bufAlloc: 0, fwdCnt: start + 70},
	} {
		if c.observe(&h); c.space() != 0 {
			t.Errorf("space is %d with alloc %d, forwarded %d", c.space(), h.bufAlloc, h.fwdCnt-start)
		}
	}
}

// TestSlowHost: a host program that does not read stops its own connection only.
func TestSlowHost(t *testing.T) {
	const size = 4 << 20 // more than the credit and the socket hold
	_, g := start(t)
	l := g.listen(5000)
	slowHost, slowGuest := pair(t, g, l)
	var want [32]byte
	var wg sync.WaitGroup
	wg.Go(func() {
		var err error
		if want, err = stream(slowGuest, size, 9); err != nil {
			t.Error(err)
		}
	})
	h, c := pair(t, g, l)
	if err := exchange(h, c, 8<<20); err != nil {
		t.Fatal(err)
	}
	got, err := drain(slowHost, size)
	wg.Wait()
	if err != nil || got != want {
		t.Errorf("the slow connection's data differs: %v", err)
	}
}

// TestSmallBuffer: a guest's program that chooses a small buffer, even below what it
// has sent already, goes on sending.
func TestSmallBuffer(t *testing.T) {
	_, g := start(t)
	l := g.listen(5000)
	h, c := pair(t, g, l)
	for i, size := range []uint32{linuxBufSize, 16 << 10, 1 << 10} {
		c.resize(size)
		var want [32]byte
		var wg sync.WaitGroup
		wg.Go(func() {
			var err error
			if want, err = stream(c, 100_000, byte(i)); err != nil {
				t.Error(err)
			}
		})
		got, err := drain(h, 100_000)
		wg.Wait()
		if err != nil || got != want {
			t.Errorf("with %d bytes: the data differs: %v", size, err)
		}
	}
}

// TestGathered: what connections send in a row arrives by one write each, in order,
// and what the host does not take is kept or counted.
func TestGathered(t *testing.T) {
	s := &session{conns: map[key]*conn{}}
	var err error
	if s.poll, err = newPoller(); err != nil {
		t.Fatal(err)
	}
	defer s.poll.close()
	connect := func() (c *conn, host int) {
		fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { unix.Close(fds[1]) })
		c = s.newConn(fds[0])
		t.Cleanup(func() { s.free(c) })
		c.state, c.alloc, c.peerAlloc = stateEstablished, 1<<20, 1<<20
		if err := s.addSocket(c); err != nil {
			t.Fatal(err)
		}
		return c, fds[1]
	}
	deliver := func(c *conn, text string) {
		s.deliver(c, []unix.Iovec{iovec([]byte(text))}, uint32(len(text)))
	}
	b := make([]byte, 1<<20)
	got := func(fd int) string {
		n, _ := unix.Read(fd, b)
		return string(b[:max(n, 0)])
	}

	one, hostOne := connect()
	two, hostTwo := connect()
	deliver(one, "a")
	deliver(one, "b")
	if text := got(hostOne); text != "" {
		t.Errorf("%q before it is passed on", text)
	}
	deliver(two, "x") // another's: what was gathered goes first
	if text := got(hostOne); text != "ab" {
		t.Errorf("one: %q", text)
	}
	deliver(one, "c")
	if text := got(hostTwo); text != "x" {
		t.Errorf("two: %q", text)
	}
	s.passOn()
	if text := got(hostOne); text != "c" || one.forwarded != 3 {
		t.Errorf("one: %q, %d forwarded", text, one.forwarded)
	}

	// More pieces than one write takes.
	for range maxIovecs + 1 {
		deliver(one, "d")
	}
	s.passOn()
	if text := got(hostOne); text != strings.Repeat("d", maxIovecs+1) {
		t.Errorf("one: %d bytes", len(text))
	}

	// More than the socket takes: the rest waits, and so does what comes after it.
	one.grown = true // it stays as small as it is
	big := strings.Repeat("e", 500_000)
	deliver(one, big)
	deliver(one, "f")
	s.passOn()
	if one.backlog.len() == 0 || !one.watchOut {
		t.Errorf("%d bytes wait", one.backlog.len())
	}
	deliver(one, "g")
	var all strings.Builder
	for all.Len() < len(big)+2 {
		text := got(hostOne)
		if text == "" {
			t.Fatalf("%d bytes came, %d wait", all.Len(), one.backlog.len())
		}
		all.WriteString(text)
		s.flush(one)
	}
	if all.String() != big+"fg" || one.forwarded != one.received {
		t.Errorf("%d bytes, %d of %d forwarded", all.Len(), one.forwarded, one.received)
	}

	// The host has gone: the guest gets its credit back and is told.
	deliver(two, "y")
	unix.Shutdown(hostTwo, unix.SHUT_RD)
	deliver(two, "z")
	s.passOn()
	if !two.noWrite || two.forwarded != two.received || two.shutdown&shutdownReceive == 0 {
		t.Errorf("a host that has gone: %+v", two)
	}

	// Beyond the credit: what was sent before arrives, then the connection ends.
	deliver(one, "h")
	s.deliver(one, nil, one.alloc)
	if text := got(hostOne); text != "h" || one.state != stateClosed {
		t.Errorf("%q, state %d", text, one.state)
	}
}

// TestSlowGuest: the same the other way; the guest is asked for credit.
func TestSlowGuest(t *testing.T) {
	const size = 4 << 20
	_, g := start(t)
	l := g.listen(5000)
	slowHost, slowGuest := pair(t, g, l)
	var want [32]byte
	var wg sync.WaitGroup
	wg.Go(func() {
		var err error
		if want, err = stream(slowHost, size, 9); err != nil {
			t.Error(err)
		}
	})
	h, c := pair(t, g, l)
	if err := exchange(h, c, 8<<20); err != nil {
		t.Fatal(err)
	}
	got, err := drain(slowGuest, size)
	wg.Wait()
	if err != nil || got != want {
		t.Errorf("the slow connection's data differs: %v", err)
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.requested == 0 {
		t.Error("the device never asked for credit")
	}
}

// TestScarceBuffers: with a single rx buffer a bulk stream leaves room for others.
func TestScarceBuffers(t *testing.T) {
	d := newDevice(t, Config{})
	g := startGuest(t, d, guestOptions{rxBufs: 1})
	l := g.listen(5000)
	bulkHost, bulkGuest := pair(t, g, l)
	var wg sync.WaitGroup
	wg.Go(func() {
		for b := make([]byte, 100000); ; {
			if _, err := bulkHost.Write(b); err != nil {
				return
			}
		}
	})
	wg.Go(func() { io.Copy(io.Discard, struct{ io.Reader }{bulkGuest}) })
	h, c := pair(t, g, l)
	if err := exchange(h, c, 1<<20); err != nil {
		t.Fatal(err)
	}
	bulkHost.Close()
	wg.Wait()
}

// TestOverrun: a guest that ignores its credit loses that connection.
func TestOverrun(t *testing.T) {
	_, g := start(t)
	l := g.listen(5000)
	h, c := pair(t, g, l)
	data := make([]byte, linuxPacket)
	for range 40 {
		g.send(c.header(opRW, len(data)), data, c.stampLocked)
	}
	if err := waitDone(c); err != nil {
		t.Fatal(err)
	}
	if n, err := io.Copy(io.Discard, h); err != nil || n >= int64(40*len(data)) {
		t.Errorf("host read %d bytes, %v", n, err)
	}
	h, c = pair(t, g, l)
	if err := exchange(h, c, 100000); err != nil {
		t.Error(err)
	}
}

// waitDone waits until c was reset by the device.
func waitDone(c *guestConn) error {
	done := make(chan struct{})
	go func() {
		c.mu.Lock()
		for !c.done {
			c.cond.Wait()
		}
		c.mu.Unlock()
		close(done)
	}()
	select {
	case <-done:
		return nil
	case <-time.After(virtiotest.Timeout):
		return errors.New("the device did not reset the connection")
	}
}

// TestHalfClose closes each direction from each side, and uses the other.
func TestHalfClose(t *testing.T) {
	big := randomBytes(1 << 20)
	for _, tc := range []struct {
		name string
		cut  func(h *net.UnixConn, c *guestConn)
		// toGuest and toHost say which directions still work.
		toGuest, toHost bool
	}{
		{"host sends no more", func(h *net.UnixConn, c *guestConn) { h.CloseWrite() }, false, true},
		{"host reads no more", func(h *net.UnixConn, c *guestConn) { h.CloseRead() }, true, false},
		{"guest sends no more", func(h *net.UnixConn, c *guestConn) { c.CloseWrite() }, true, false},
		{"guest reads no more", func(h *net.UnixConn, c *guestConn) { c.CloseRead() }, false, true},
	} {
		t.Run(tc.name, func(t *testing.T) {
			d, g := start(t)
			h, c := pair(t, g, g.listen(5000))
			tc.cut(h, c)
			if tc.toGuest {
				go func() { h.Write(big); h.CloseWrite() }()
				if b, err := io.ReadAll(c); err != nil || !bytes.Equal(b, big) {
					t.Errorf("guest read %d bytes, %v", len(b), err)
				}
			} else if n, err := c.Read(make([]byte, 1)); n != 0 || err != io.EOF {
				t.Errorf("guest read %d, %v, want end of file", n, err)
			}
			if tc.toHost {
				go func() { c.Write(big); c.CloseWrite() }()
				if b, err := io.ReadAll(h); err != nil || !bytes.Equal(b, big) {
					t.Errorf("host read %d bytes, %v", len(b), err)
				}
			}
			switch tc.name {
			case "host reads no more":
				if err := writeUntilError(c); err != errGuestPipe {
					t.Errorf("guest wrote to a deaf host: %v", err)
				}
			case "guest reads no more":
				if err := writeUntilError(h); !errors.Is(err, unix.EPIPE) {
					t.Errorf("host wrote to a deaf guest: %v", err)
				}
			case "guest sends no more":
				if n, err := h.Read(make([]byte, 1)); n != 0 || err != io.EOF {
					t.Errorf("host read %d, %v, want end of file", n, err)
				}
			}
			h.Close()
			c.Close()
			waitIdle(t, d, g)
		})
	}
}

func writeUntilError(w io.Writer) error {
	for b := make([]byte, 1000); ; {
		if _, err := w.Write(b); err != nil {
			return err
		}
	}
}

// TestLinger: what the guest sent before it closed reaches a host that reads late.
func TestLinger(t *testing.T) {
	for name, end := range map[string]func(*guestConn){
		"close": func(c *guestConn) { c.Close() },
		"reset": (*guestConn).reset,
	} {
		t.Run(name, func(t *testing.T) {
			d, g := start(t)
			h, c := pair(t, g, g.listen(5000))
			data := randomBytes(400_000) // more than fits into the socket
			if _, err := c.Write(data); err != nil {
				t.Fatal(err)
			}
			h.Write([]byte("never read"))
			end(c)
			if b, err := io.ReadAll(h); !bytes.Equal(b, data) || err != nil && name == "close" {
				t.Errorf("host read %d bytes of %d, %v", len(b), len(data), err)
			}
			waitIdle(t, d, g)
		})
	}
}

// TestHostCloses with data unread on both sides, while the guest writes.
func TestHostCloses(t *testing.T) {
	d, g := start(t)
	h, c := pair(t, g, g.listen(5000))
	if _, err := h.Write(randomBytes(10000)); err != nil {
		t.Fatal(err)
	}
	if _, err := c.Write(randomBytes(10000)); err != nil {
		t.Fatal(err)
	}
	h.Close()
	if err := writeUntilError(c); err != errGuestPipe {
		t.Errorf("guest wrote to a closed host: %v", err)
	}
	if b, err := io.ReadAll(c); len(b) != 10000 || err != nil {
		t.Errorf("guest read %d bytes, %v", len(b), err)
	}
	c.Close()
	waitIdle(t, d, g)
}

// TestPortReuse: Linux forgets a socket that was shut down from outside before
// its program has read all, and may connect from the same port again.
func TestPortReuse(t *testing.T) {
	d, g := start(t)
	l := hostListen(t, d, "7")
	for range 50 {
		c, err := g.dialFrom(99, 7)
		if err != nil {
			t.Fatal(err)
		}
		h, err := l.Accept()
		if err != nil {
			t.Fatal(err)
		}
		h.Write([]byte("unread"))
		h.Close()
		c.mu.Lock()
		for c.peerShut != shutdownBoth {
			c.cond.Wait()
		}
		c.mu.Unlock()
	}
	// A second REQUEST on a live connection is the guest's mistake.
	c, err := g.dialFrom(99, 7)
	if err != nil {
		t.Fatal(err)
	}
	c.control(opRequest, 0)
	if err := waitDone(c); err != nil {
		t.Error(err)
	}
}

// TestDeafGuest: neither a REQUEST nor a SHUTDOWN may wait for ever.
func TestDeafGuest(t *testing.T) {
	d := newDevice(t, Config{})
	d.answerTimeout = time.Millisecond
	rst := make(chan header, 16)
	g := startGuest(t, d, guestOptions{onPacket: func(h header) bool {
		if h.op == opRST {
			rst <- h
		}
		return h.op == opRST || h.op == opRequest && h.dstPort == 1 || h.op == opShutdown
	}})
	if _, err := d.Dial(t.Context(), 1); !errors.Is(err, ErrRefused) {
		t.Errorf("Dial of a deaf guest: %v", err)
	}
	if h := <-rst; h.dstPort != 1 {
		t.Errorf("RST for port %d", h.dstPort)
	}
	l := g.listen(5000)
	// The guest that answers late, here, is answered by RST.
	h, err := net.Dial("unix", d.cfg.Path)
	if err != nil {
		t.Fatal(err)
	}
	h.Write([]byte("CONNECT 5000\n"))
	h.Close()
	g.accept(l)
	if h := <-rst; h.dstPort != 5000 {
		t.Errorf("RST for port %d", h.dstPort)
	}
}

func TestLimit(t *testing.T) {
	d := newDevice(t, Config{MaxConns: 2})
	g := startGuest(t, d, guestOptions{})
	l := g.listen(5000)
	hostListen(t, d, "7")
	h, c := pair(t, g, l)
	pair(t, g, l)
	if _, err := d.Dial(t.Context(), 5000); !errors.Is(err, ErrRefused) {
		t.Errorf("a third connection from the host: %v", err)
	}
	if _, err := g.dial(7); err == nil {
		t.Error("a third connection from the guest was accepted")
	}
	h.Close()
	io.ReadAll(c)
	c.Close()
	g.settle()
	if _, err := g.dial(7); err != nil {
		t.Errorf("no connection although there is room: %v", err)
	}
}

// TestBadPackets sends what no driver should, and expects RST or silence.
func TestBadPackets(t *testing.T) {
	d := newDevice(t, Config{})
	got := make(chan header, 16)
	g := startGuest(t, d, guestOptions{onPacket: func(h header) bool {
		if h.op == opRST && (h.dstPort == 666 || h.srcCID != hostCID) {
			got <- h
			return true
		}
		return false
	}})
	l := g.listen(5000)
	hostListen(t, d, "7")
	rw := header{srcCID: guestCID, dstCID: hostCID, srcPort: 666, dstPort: 7, typ: typeStream, op: opRW}
	with := func(f func(*header)) header { h := rw; f(&h); return h }
	for _, tc := range []struct {
		name string
		h    header
		rst  bool
	}{
		{"data for no connection", rw, true},
		{"response to nothing", with(func(h *header) { h.op = opResponse }), true},
		{"shutdown of nothing", with(func(h *header) { h.op = opShutdown; h.flags = 3 }), true},
		{"unknown op", with(func(h *header) { h.op = 99 }), true},
		{"invalid op", with(func(h *header) { h.op = 0 }), true},
		{"reset of nothing", with(func(h *header) { h.op = opRST }), false},
		{"seqpacket", with(func(h *header) { h.op = opRequest; h.typ = 2 }), true},
		{"unknown type", with(func(h *header) { h.op = opRequest; h.typ = 77 }), true},
		{"another's CID", with(func(h *header) { h.op = opRequest; h.srcCID = 4 }), false},
		{"to another CID", with(func(h *header) { h.op = opRequest; h.dstCID = 5 }), true},
		{"to the hypervisor", with(func(h *header) { h.op = opRequest; h.dstCID = 0 }), true},
		{"CID beyond 32 bits", with(func(h *header) { h.op = opRequest; h.dstCID |= 1 << 32 }), true},
		{"nobody listens", with(func(h *header) { h.op = opRequest; h.dstPort = 8 }), true},
		{"length beyond the buffer", with(func(h *header) { h.op = opRequest; h.len = linuxPacket + 1 }), true},
		{"huge length", with(func(h *header) { h.op = opRequest; h.len = math.MaxUint32 }), true},
	} {
		g.send(tc.h, nil, nil)
		// A marker behind it: what arrives before the marker's RST is the answer.
		g.send(with(func(h *header) { h.dstPort = 4711 }), nil, nil)
		var rst bool
		for h := range got {
			if h.srcPort == 4711 {
				break
			}
			rst = true
			if h.typ != tc.h.typ || h.srcCID != tc.h.dstCID || h.srcPort != tc.h.dstPort {
				t.Errorf("%s: RST is %+v", tc.name, h)
			}
		}
		if rst != tc.rst {
			t.Errorf("%s: reset %v, want %v", tc.name, rst, tc.rst)
		}
	}

	// Packets that end their connection.
	for _, tc := range []struct {
		name string
		op   uint16
		len  uint32
	}{
		{"unknown op", 99, 0},
		{"another response", opResponse, 0},
		{"length beyond the buffer", opRW, linuxPacket + 1},
		{"huge length", opRW, math.MaxUint32},
	} {
		h, c := pair(t, g, l)
		g.send(c.header(tc.op, int(tc.len)), nil, c.stampLocked)
		if err := waitDone(c); err != nil {
			t.Errorf("%s: %v", tc.name, err)
		}
		if b, err := io.ReadAll(h); len(b) > 0 {
			t.Errorf("%s: host read %d bytes, %v", tc.name, len(b), err)
		}
	}
	// A chain shorter than a header, then one that writes to nobody.
	g.Ring(queueTX).Do(t, [][]byte{make([]byte, headerLen-1)})
	g.Ring(queueTX).Do(t, nil, 100)
	h, c := pair(t, g, l)
	if err := exchange(h, c, 100000); err != nil {
		t.Error(err)
	}
}

// TestReplyFlood: without rx buffers the device takes only so many packets that
// need an answer, and goes on when there are buffers.
func TestReplyFlood(t *testing.T) {
	const flood = 10 * maxReplies
	d := newDevice(t, Config{})
	vg := virtiotest.Start(t, d, virtiotest.Options{})
	tx, rx := vg.Ring(queueTX), vg.Ring(queueRX)
	h := header{srcCID: guestCID, dstCID: hostCID, srcPort: 1, dstPort: 7, typ: typeStream, op: opRequest}
	var raw [headerLen]byte
	h.put(&raw)
	var wg sync.WaitGroup
	wg.Go(func() {
		reqs := make([]*virtiotest.Request, tx.Size)
		for i := range flood {
			r := &reqs[i%len(reqs)]
			if *r == nil {
				*r = tx.Prepare(t, [][]byte{raw[:]})
			} else {
				<-(*r).Done()
			}
			(*r).Submit()
		}
	})
	for range flood {
		n, b := rx.Do(t, nil, linuxRXBuf)
		if got := parseHeader((*[headerLen]byte)(b)); n != headerLen || got.op != opRST {
			t.Fatalf("got %d bytes: %+v", n, got)
		}
	}
	wg.Wait()
}

// TestBrokenQueue: a driver error ends the session and is reported, once.
func TestBrokenQueue(t *testing.T) {
	for name, harm := range map[string]func(g *guest){
		"tx index": func(g *guest) { g.Ring(queueTX).SetAvailIdx(40000); g.Ring(queueTX).Kick() },
		"tx loop":  func(g *guest) { harmDesc(g.Ring(queueTX)) },
		"tiny rx buffer": func(g *guest) {
			// Behind those that are offered already.
			g.Ring(queueRX).Send(t, nil, 10)
			go func() {
				for {
					if _, err := g.d.Dial(t.Context(), 5000); err != nil {
						return
					}
				}
			}()
		},
	} {
		t.Run(name, func(t *testing.T) {
			d := newDevice(t, Config{})
			g := startGuest(t, d, guestOptions{rxBufs: 4})
			h, _ := pair(t, g, g.listen(5000))
			harm(g)
			if err := g.WaitFailed(t); err == nil {
				t.Error("Failed without an error")
			}
			if _, err := h.Read(make([]byte, 1)); err == nil {
				t.Error("the connection outlived its queue")
			}
			if _, err := net.Dial("unix", d.cfg.Path); !errors.Is(err, unix.ECONNREFUSED) {
				t.Errorf("connecting to a failed device: %v", err)
			}
		})
	}
}

func harmDesc(r *virtiotest.Ring) {
	for i := range r.Size {
		r.SetDesc(i, virtiotest.Desc{Addr: 0x10_0000, Len: 1, Flags: virtiotest.DescNext, Next: i})
	}
	r.Offer(0)
	r.Kick()
}

// TestStopUnderLoad stops in the middle of everything and looks for leaks.
func TestStopUnderLoad(t *testing.T) {
	before := openFiles(t)
	for range 3 {
		d := newDevice(t, Config{})
		g := startGuest(t, d, guestOptions{})
		l := g.listen(5000)
		hl := hostListen(t, d, "7")
		var wg sync.WaitGroup
		var flowing sync.WaitGroup
		run := func(a, b io.ReadWriteCloser) {
			for _, p := range []io.ReadWriteCloser{a, b} {
				flowing.Add(1)
				wg.Go(func() {
					var once sync.Once
					b := make([]byte, 30000)
					for {
						n, err := p.Read(b)
						once.Do(flowing.Done)
						if n == 0 || err != nil {
							return
						}
					}
				})
				wg.Go(func() { writeUntilError(p) })
			}
		}
		var hosts []net.Conn
		for range 20 {
			h, c := pair(t, g, l)
			run(h, c)
			c2, err := g.dial(7)
			if err != nil {
				t.Fatal(err)
			}
			h2, err := hl.Accept()
			if err != nil {
				t.Fatal(err)
			}
			run(h2, c2)
			hosts = append(hosts, h, h2)
		}
		flowing.Wait()
		g.shutdown()
		wg.Wait() // every read and write ended
		for _, h := range hosts {
			h.Close()
		}
		hl.Close()
		if err := d.Close(); err != nil {
			t.Error(err)
		}
	}
	noSessions(t)
	if after := openFiles(t); len(after) > len(before) {
		t.Errorf("open files:\n%s\nbefore:\n%s", strings.Join(after, "\n"), strings.Join(before, "\n"))
	}
}

func openFiles(t testing.TB) (files []string) {
	t.Helper()
	entries, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		if to, err := os.Readlink("/proc/self/fd/" + e.Name()); err == nil { // not ReadDir's own
			files = append(files, fmt.Sprintf("%s → %s", e.Name(), to))
		}
	}
	return files
}

// noSessions fails if a session's goroutine is left. One that has closed
// session.done may need the CPU once more to end.
func noSessions(t testing.TB) {
	t.Helper()
	b := make([]byte, 1<<20)
	for deadline := time.Now().Add(virtiotest.Timeout); ; runtime.Gosched() {
		stacks := string(b[:runtime.Stack(b, true)])
		if !strings.Contains(stacks, "(*session).run") {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("a session's goroutine is left:\n%s", stacks)
		}
	}
}

// The driver hears of the packets it sent after a while, or when half of the
// queue waits for that.
func TestAnnounce(t *testing.T) {
	stray := make([]byte, headerLen) // no answer follows
	(&header{srcCID: guestCID, dstCID: hostCID, typ: typeStream, op: opRST}).put((*[headerLen]byte)(stray))
	asking := make([]byte, headerLen) // an RST does
	(&header{srcCID: guestCID, dstCID: hostCID, typ: typeStream, op: opRW}).put((*[headerLen]byte)(asking))

	t.Run("after a while", func(t *testing.T) {
		g := virtiotest.Start(t, newDevice(t, Config{}), virtiotest.Options{})
		g.Ring(queueTX).Do(t, [][]byte{stray})
	})
	t.Run("half of the queue", func(t *testing.T) {
		d := newDevice(t, Config{})
		d.txDelay = time.Hour
		g := virtiotest.Start(t, d, virtiotest.Options{})
		rx, tx := g.Ring(queueRX), g.Ring(queueTX)
		answer := rx.Send(t, nil, linuxRXBuf)
		var sent []*virtiotest.Request
		for range tx.Size/2 - 2 {
			sent = append(sent, tx.Send(t, [][]byte{stray}))
		}
		sent = append(sent, tx.Send(t, [][]byte{asking}))
		answer.Wait(t)
		if n := tx.Interrupts(); n != 0 || int(tx.UsedIdx()) != len(sent) {
			t.Errorf("%d of %d packets taken, %d interrupts", tx.UsedIdx(), len(sent), n)
		}
		for _, r := range append(sent, tx.Send(t, [][]byte{stray})) {
			r.Wait(t)
		}
	})
}
