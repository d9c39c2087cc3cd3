package vsock

import (
	"errors"
	"io"
	"net"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/wsl2/wsl2/vmm/virtio/virtiotest"
)

const guestCID = 3

// Sizes that Linux 6.12's driver uses.
const (
	linuxRXBuf   = 4096 - 320 // SKB_WITH_OVERHEAD(4096), header included
	linuxBufSize = 256 << 10  // VSOCK_DEFAULT_BUFFER_SIZE
	linuxPacket  = 64 << 10
)

func newDevice(t testing.TB, cfg Config) *Device {
	t.Helper()
	if cfg.Path == "" {
		// t.TempDir's paths can be too long for a unix socket.
		dir, err := os.MkdirTemp("", "vsock")
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { os.RemoveAll(dir) })
		cfg.Path = filepath.Join(dir, "v.sock")
	}
	if cfg.GuestCID == 0 {
		cfg.GuestCID = guestCID
	}
	d, err := New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := d.Close(); err != nil {
			t.Error(err)
		}
	})
	return d
}

// guest is a driver that behaves as Linux's virtio_transport.c and
// virtio_transport_common.c do, credit included. Its sockets are guestConns.
type guest struct {
	t testing.TB
	*virtiotest.Guest
	d *Device

	quit chan struct{}
	wg   sync.WaitGroup
	stop sync.Once

	txMu   sync.Mutex
	tx     []*virtiotest.Request // header and linuxPacket bytes each, used in turns
	txBusy []bool
	txNext int

	rx []*virtiotest.Request

	mu        sync.Mutex
	conns     map[key]*guestConn
	listeners map[uint32]chan *guestConn
	replies   []func()
	replyCond sync.Cond
	port      uint32
	resets    int // RSTs received
	requested int // CREDIT_REQUESTs received
	stray     int // packets for no connection
	onPacket  func(h header) bool
}

type guestOptions struct {
	virtiotest.Options
	rxBufs   int                 // 0: all
	onPacket func(h header) bool // called first for every packet; true: handled
}

func startGuest(t testing.TB, d *Device, o guestOptions) *guest {
	t.Helper()
	g := &guest{t: t, d: d, quit: make(chan struct{}), conns: map[key]*guestConn{}, listeners: map[uint32]chan *guestConn{}, port: 1000, onPacket: o.onPacket}
	g.replyCond.L = &g.mu
	g.Guest = virtiotest.Start(t, d, o.Options)
	tx, rx := g.Ring(queueTX), g.Ring(queueRX)
	for range int(min(tx.Size, 32)) {
		g.tx = append(g.tx, tx.Prepare(t, [][]byte{make([]byte, headerLen), make([]byte, linuxPacket)}))
		g.txBusy = append(g.txBusy, false)
	}
	n := int(rx.Size)
	if o.rxBufs > 0 {
		n = o.rxBufs
	}
	for range n {
		g.rx = append(g.rx, rx.Prepare(t, nil, linuxRXBuf))
	}
	rx.SubmitAll(g.rx...)
	g.wg.Add(2)
	go g.rxWork()
	go g.replyWork()
	t.Cleanup(g.shutdown)
	return g
}

// shutdown resets the device and ends the driver.
func (g *guest) shutdown() {
	g.stop.Do(func() {
		close(g.quit)
		g.Guest.Stop()
		g.mu.Lock()
		g.replyCond.Broadcast()
		conns := g.conns
		g.conns = map[key]*guestConn{}
		g.mu.Unlock()
		for _, c := range conns {
			c.mu.Lock()
			c.done = true
			c.cond.Broadcast()
			c.mu.Unlock()
		}
		g.wg.Wait()
	})
}

func (g *guest) stopped() bool {
	select {
	case <-g.quit:
		return true
	default:
		return false
	}
}

// send offers one packet; stamp runs in the order of the tx queue.
func (g *guest) send(h header, data []byte, stamp func(*header)) {
	g.txMu.Lock()
	defer g.txMu.Unlock()
	i := g.txNext
	g.txNext = (i + 1) % len(g.tx)
	if g.txBusy[i] {
		select {
		case <-g.tx[i].Done():
		case <-g.quit:
			return
		}
	}
	if g.stopped() {
		return
	}
	g.txBusy[i] = true
	if stamp != nil {
		stamp(&h)
	}
	h.put((*[headerLen]byte)(g.tx[i].Readable[0]))
	copy(g.tx[i].Readable[1], data)
	g.tx[i].Submit()
}

// reply sends from the rx worker, which must not wait for the tx queue.
func (g *guest) reply(f func()) {
	g.mu.Lock()
	g.replies = append(g.replies, f)
	g.replyCond.Signal()
	g.mu.Unlock()
}

// settle waits until all replies so far are in the tx queue.
func (g *guest) settle() {
	done := make(chan struct{})
	g.reply(func() { close(done) })
	<-done
}

func (g *guest) replyWork() {
	defer g.wg.Done()
	for {
		g.mu.Lock()
		for len(g.replies) == 0 && !g.stopped() {
			g.replyCond.Wait()
		}
		todo := g.replies
		g.replies = nil
		g.mu.Unlock()
		if g.stopped() {
			return
		}
		for _, f := range todo {
			f()
		}
	}
}

func (g *guest) rxWork() {
	defer g.wg.Done()
	for i := 0; ; i = (i + 1) % len(g.rx) {
		req := g.rx[i]
		select {
		case <-req.Done(): // the device returns rx buffers in order
		case <-g.quit:
			return
		}
		if n := req.Written(); n >= headerLen {
			b := req.Writable[0][:n]
			h := parseHeader((*[headerLen]byte)(b))
			if int(h.len) != n-headerLen {
				g.t.Errorf("packet says %d bytes, %d were written", h.len, n-headerLen)
			}
			g.receive(h, b[headerLen:])
		}
		if g.stopped() {
			return
		}
		req.Submit()
	}
}

func (g *guest) receive(h header, data []byte) {
	if h.srcCID != hostCID || h.dstCID != guestCID || h.typ != typeStream {
		if g.onPacket == nil || !g.onPacket(h) {
			g.t.Errorf("bad packet from the device: %+v", h)
		}
		return
	}
	if g.onPacket != nil && g.onPacket(h) {
		return
	}
	k := makeKey(h.dstPort, h.srcPort)
	g.mu.Lock()
	if h.op == opRST {
		g.resets++
	}
	if h.op == opCreditRequest {
		g.requested++
	}
	c := g.conns[k]
	l := g.listeners[h.dstPort]
	if c == nil && h.op == opRequest && l != nil {
		c = g.newConn(k, connEstablished)
		c.observe(&h)
		g.mu.Unlock()
		g.reply(func() { c.control(opResponse, 0) })
		l <- c
		return
	}
	if c == nil {
		g.stray++
	}
	g.mu.Unlock()
	if c == nil {
		if h.op != opRST {
			g.reply(func() { g.send(h.reply(), nil, nil) })
		}
		return
	}
	c.receive(&h, data)
}

const (
	connConnecting = iota
	connEstablished
)

// guestConn is a connected AF_VSOCK stream socket of the guest.
type guestConn struct {
	g    *guest
	key  key
	mu   sync.Mutex
	cond sync.Cond

	credit    // seen from the guest; alloc etc. are the guest's own buffer
	state     int
	buf       []byte
	peerShut  uint32
	shut      uint32
	done      bool // RST received or sent
	refused   bool
	hostSent  uint64 // bytes received
	unhandled error
}

// newConn adds a connection. Preconditions: g.mu is held.
func (g *guest) newConn(k key, state int) *guestConn {
	c := &guestConn{g: g, key: k, state: state}
	c.cond.L = &c.mu
	c.alloc = linuxBufSize
	g.conns[k] = c
	return c
}

func (c *guestConn) header(op uint16, n int) header {
	return header{srcCID: guestCID, dstCID: hostCID, srcPort: c.key.guestPort(), dstPort: c.key.hostPort(), typ: typeStream, op: op, len: uint32(n)}
}

func (c *guestConn) stampLocked(h *header) {
	c.mu.Lock()
	c.credit.stamp(h)
	c.mu.Unlock()
}

func (c *guestConn) control(op uint16, flags uint32) {
	h := c.header(op, 0)
	h.flags = flags
	c.g.send(h, nil, c.stampLocked)
}

// forget removes c from the table (vsock_remove_sock).
func (c *guestConn) forget() {
	c.g.mu.Lock()
	if c.g.conns[c.key] == c {
		delete(c.g.conns, c.key)
	}
	c.g.mu.Unlock()
}

// receive is virtio_transport_recv_pkt for a known socket.
func (c *guestConn) receive(h *header, data []byte) {
	c.mu.Lock()
	defer c.mu.Unlock()
	defer c.cond.Broadcast()
	c.observe(h)
	if c.state == connConnecting {
		switch h.op {
		case opResponse:
			c.state = connEstablished
		case opRST:
			c.refused, c.done = true, true
			c.forget()
		default:
			c.g.t.Errorf("op %d while connecting", h.op)
		}
		return
	}
	switch h.op {
	case opRW:
		if len(data) == 0 {
			c.g.t.Error("RW packet without data")
		}
		if !c.credit.receive(h.len) {
			c.g.t.Errorf("the device overran our credit: %d more bytes", h.len)
			return
		}
		if c.shut&shutdownReceive == 0 {
			c.buf = append(c.buf, data...)
		}
		c.hostSent += uint64(h.len)
	case opCreditUpdate:
	case opCreditRequest:
		c.g.reply(func() { c.control(opCreditUpdate, 0) })
	case opShutdown:
		c.peerShut |= h.flags
		if c.peerShut == shutdownBoth {
			if len(c.buf) == 0 && !c.done {
				c.done = true
				c.g.reply(func() { c.control(opRST, 0) })
			}
			c.forget()
		}
	case opRST:
		c.done = true
		c.peerShut = shutdownBoth
		c.forget()
	default:
		c.g.t.Errorf("op %d on an established connection", h.op)
	}
}

func (c *guestConn) Read(p []byte) (int, error) {
	c.mu.Lock()
	for len(c.buf) == 0 && !c.done && c.peerShut&shutdownSend == 0 && c.shut&shutdownReceive == 0 {
		c.cond.Wait()
	}
	n := copy(p, c.buf)
	if n == 0 {
		c.mu.Unlock()
		return 0, io.EOF
	}
	if c.buf = c.buf[n:]; len(c.buf) == 0 {
		c.buf = nil
	}
	c.forwarded += uint32(n)
	delta := c.forwarded - c.told
	update := c.alloc-delta < linuxPacket || len(c.buf) == 0
	update = update && !c.done && c.peerShut != shutdownBoth
	c.mu.Unlock()
	if update {
		c.control(opCreditUpdate, 0)
	}
	return n, nil
}

var errGuestPipe = errors.New("EPIPE in the guest")

// room is what may be sent: Linux takes no more of the peer's buffer than its own
// has (virtio_transport_tx_buf_size). Preconditions: c.mu is held.
func (c *guestConn) room() uint32 {
	used, size := c.sent-c.peerForwarded, min(c.peerAlloc, c.alloc)
	return size - min(used, size)
}

// resize is SO_VM_SOCKETS_BUFFER_SIZE.
func (c *guestConn) resize(n uint32) {
	c.mu.Lock()
	c.alloc = n
	c.mu.Unlock()
	c.control(opCreditUpdate, 0)
}

func (c *guestConn) Write(p []byte) (n int, err error) {
	for len(p) > 0 {
		c.mu.Lock()
		for c.room() == 0 && !c.done && c.peerShut&shutdownReceive == 0 {
			c.cond.Wait()
		}
		if c.done || c.peerShut&shutdownReceive != 0 {
			c.mu.Unlock()
			return n, errGuestPipe
		}
		k := min(int(c.room()), len(p), linuxPacket)
		c.sent += uint32(k)
		c.mu.Unlock()
		c.g.send(c.header(opRW, k), p[:k], c.stampLocked)
		p, n = p[k:], n+k
	}
	return n, nil
}

func (c *guestConn) CloseWrite() {
	c.mu.Lock()
	c.shut |= shutdownSend
	c.mu.Unlock()
	c.control(opShutdown, c.shut)
}

func (c *guestConn) CloseRead() {
	c.mu.Lock()
	c.shut |= shutdownReceive
	c.mu.Unlock()
	c.control(opShutdown, c.shut)
}

// Close is virtio_transport_close; it waits for the device's answer.
func (c *guestConn) Close() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.done {
		return nil
	}
	if c.peerShut == shutdownBoth {
		c.mu.Unlock()
		c.control(opRST, 0)
		c.mu.Lock()
		return nil
	}
	c.shut = shutdownBoth
	c.mu.Unlock()
	c.control(opShutdown, shutdownBoth)
	c.mu.Lock()
	for !c.done {
		c.cond.Wait()
	}
	return nil
}

func (c *guestConn) reset() {
	c.control(opRST, 0)
	c.forget()
	c.mu.Lock()
	c.done = true
	c.cond.Broadcast()
	c.mu.Unlock()
}

func (g *guest) listen(port uint32) chan *guestConn {
	ch := make(chan *guestConn, 4096)
	g.mu.Lock()
	g.listeners[port] = ch
	g.mu.Unlock()
	return ch
}

func (g *guest) accept(l chan *guestConn) *guestConn {
	g.t.Helper()
	select {
	case c := <-l:
		return c
	case <-time.After(virtiotest.Timeout):
		g.t.Fatal("nobody connected")
		return nil
	}
}

// dial connects to a host port from a guest port of its own choice.
func (g *guest) dial(port uint32) (*guestConn, error) {
	g.mu.Lock()
	g.port++
	from := g.port
	g.mu.Unlock()
	return g.dialFrom(from, port)
}

func (g *guest) dialFrom(from, port uint32) (*guestConn, error) {
	g.mu.Lock()
	c := g.newConn(makeKey(from, port), connConnecting)
	g.mu.Unlock()
	c.control(opRequest, 0)
	c.mu.Lock()
	defer c.mu.Unlock()
	for c.state == connConnecting && !c.done {
		c.cond.Wait()
	}
	if c.refused || c.state == connConnecting {
		return nil, unix.ECONNRESET
	}
	return c, nil
}

// hostDial connects a host program to a guest port.
func hostDial(t testing.TB, d *Device, port uint32) *net.UnixConn {
	t.Helper()
	c, err := d.Dial(t.Context(), port)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return c.(*net.UnixConn)
}

// hostListen listens where the guest reaches host port port.
func hostListen(t testing.TB, d *Device, port string) *net.UnixListener {
	t.Helper()
	l, err := net.ListenUnix("unix", &net.UnixAddr{Net: "unix", Name: d.cfg.Path + "_" + port})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	return l
}

// pair returns the two ends of a connection from the host to guest port 5000.
func pair(t testing.TB, g *guest, l chan *guestConn) (*net.UnixConn, *guestConn) {
	t.Helper()
	h := hostDial(t, g.d, 5000)
	return h, g.accept(l)
}
