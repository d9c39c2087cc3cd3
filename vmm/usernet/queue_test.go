package usernet

import (
	"context"
	"encoding/binary"
	"errors"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	"gvisor.dev/gvisor/pkg/buffer"
	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/header"
	"gvisor.dev/gvisor/pkg/tcpip/stack"

	"github.com/wsl2/wsl2/vmm/virtio/net"
)

// numbered sends a frame that says which one it is.
func numbered(t *testing.T, l *link, i int) tcpip.Error {
	t.Helper()
	return numberedOf(l, i, header.TCPProtocolNumber, 0)
}

// numberedOf is numbered for a protocol, and the connection that a hash stands for.
func numberedOf(l *link, i int, proto tcpip.TransportProtocolNumber, hash uint32) tcpip.Error {
	data := binary.BigEndian.AppendUint32(make([]byte, 0, 8<<10), uint32(i))[:8<<10]
	pkt := stack.NewPacketBuffer(stack.PacketBufferOptions{ReserveHeaderBytes: header.EthernetMinimumSize, Payload: buffer.MakeWithData(data)})
	defer pkt.DecRef()
	pkt.EgressRoute.RemoteLinkAddress = l.guest
	pkt.TransportProtocolNumber, pkt.Hash = proto, hash
	l.AddHeader(pkt)
	return l.write(pkt)
}

// readFrame is read(2), which the runtime's signals interrupt now and then.
func readFrame(fd int, b []byte) (n int, err error) {
	for err = unix.EINTR; err == unix.EINTR; {
		n, err = unix.Read(fd, b)
	}
	return n, err
}

// number reads a frame and returns the number that numbered has given it.
func number(t *testing.T, far int) int {
	t.Helper()
	const at = net.HeaderLen + header.EthernetMinimumSize
	frame := make([]byte, 1<<16)
	n, err := readFrame(far, frame)
	if err != nil || n < at+4 {
		t.Fatalf("a frame of %d bytes, %v", n, err)
	}
	return int(binary.BigEndian.Uint32(frame[at:]))
}

// serving serves the link until the function that it returns is called, which wants that to end well.
func serving(t *testing.T, l *link) (end func()) {
	served := make(chan error)
	go func() { served <- l.serve() }()
	return func() {
		t.Helper()
		l.shutdown()
		if err := <-served; err != nil {
			t.Error(err)
		}
		l.close()
	}
}

// fill sends numbered frames to a guest that takes none until one is dropped, and tells how many were not.
func fill(t *testing.T, l *link) (sent int) {
	t.Helper()
	for i := range 2 * maxQueued / (8 << 10) {
		switch err := numbered(t, l, i).(type) {
		case nil:
		case *tcpip.ErrNoBufferSpace:
			return i
		default:
			t.Fatal(err)
		}
	}
	t.Fatal("the queue is never full")
	return 0
}

// TestQueue: a guest that takes nothing holds nobody up and a bounded number of frames, which it gets in their
// order when it goes on; then there is room.
func TestQueue(t *testing.T) {
	l, far := newWire(t)
	end := serving(t, l)
	sent := fill(t, l)
	l.out.mu.Lock()
	size := l.out.size
	l.out.mu.Unlock()
	if size > maxQueued {
		t.Errorf("%d bytes wait", size)
	}
	ctx, cancel := context.WithCancelCause(t.Context())
	enough := errors.New("enough")
	room := make(chan error)
	go func() { room <- l.room(ctx) }()
	eventually(t, "it waits", func() bool { return len(l.out.turn) > 0 })
	cancel(enough)
	if err := <-room; err != enough {
		t.Errorf("room in a full queue: %v", err)
	}
	go func() { room <- l.room(t.Context()) }()
	for i := range sent {
		if got := number(t, far); got != i {
			t.Fatalf("frame %d came as number %d", got, i)
		}
	}
	if err := <-room; err != nil {
		t.Error(err)
	}
	if err := numbered(t, l, sent); err != nil {
		t.Errorf("after the last one was taken: %v", err)
	}
	end()
}

// TestQueueShutdown: the end of the link ends the wait for the guest, and what waits is let go.
func TestQueueShutdown(t *testing.T) {
	l, _ := newWire(t)
	served := make(chan error)
	go func() { served <- l.serve() }()
	fill(t, l)
	room := make(chan error)
	go func() { room <- l.room(context.Background()) }()
	eventually(t, "one waits", func() bool { return len(l.out.turn) > 0 })
	l.shutdown()
	if err := <-served; err != nil {
		t.Error(err)
	}
	select {
	case err := <-room:
		if err != nil {
			t.Error(err)
		}
	case <-time.After(deadline):
		t.Error("who waits for room is not told of the end")
	}
	if l.out.first() != nil || l.out.size != 0 {
		t.Errorf("%d bytes still wait", l.out.size)
	}
	if _, ok := numbered(t, l, 0).(*tcpip.ErrClosedForSend); !ok {
		t.Error("it goes on after the end")
	}
	l.close()
}

// TestQueueFlood: datagrams that never end leave room for a connection's frames, and let its turn come.
func TestQueueFlood(t *testing.T) {
	l, far := newWire(t)
	end := serving(t, l)
	datagram := func() (full bool) {
		t.Helper()
		err := numberedOf(l, 0, header.UDPProtocolNumber, 0)
		if _, full = err.(*tcpip.ErrNoBufferSpace); err != nil && !full {
			t.Fatal(err)
		}
		return full
	}
	for !datagram() {
	}
	if err := numbered(t, l, 1); err != nil {
		t.Errorf("a connection's frame among datagrams: %v", err)
	}
	room := make(chan error)
	go func() { room <- l.room(t.Context()) }()
	frame := make([]byte, 1<<16)
	for limit, over := time.Now().Add(deadline), false; !over; {
		if _, err := readFrame(far, frame); err != nil {
			t.Fatal(err)
		}
		for !datagram() { // it is never empty
		}
		select {
		case err := <-room:
			if over = true; err != nil {
				t.Error(err)
			}
		default:
			if time.Now().After(limit) {
				t.Fatal("the turn of a connection never comes")
			}
		}
	}
	end()
}

// TestQueueTurns: what a connection sends comes in its order, and does not wait for all that another one has sent before.
func TestQueueTurns(t *testing.T) {
	l, far := newWire(t)
	end := serving(t, l)
	const size, bulk, few = 8 << 10, 100, 5
	send := func(i int, hash uint32) {
		t.Helper()
		if err := numberedOf(l, i, header.TCPProtocolNumber, hash); err != nil {
			t.Fatal(err)
		}
	}
	for i := range bulk {
		send(i, 1)
	}
	l.out.mu.Lock()
	waiting := l.out.frames
	l.out.mu.Unlock()
	for i := range few {
		send(1000+i, 2)
	}
	const turn = quantum/size + 2 // and what is under way
	if waiting < 3*turn {
		t.Fatalf("only %d frames wait", waiting)
	}
	next := map[bool]int{false: 0, true: 1000}
	for range bulk + few {
		got := number(t, far)
		other := got >= 1000
		if got != next[other] {
			t.Fatalf("frame %d came as number %d", next[other], got)
		}
		if next[other]++; other && next[false] > bulk-waiting+turn {
			t.Errorf("%d came behind %d frames of %d that waited", got, next[false], waiting)
		}
	}
	eventually(t, "the queue is empty", func() bool { return l.out.first() == nil })
	if len(l.out.flows) != 0 || l.out.size != 0 {
		t.Errorf("%d flows and %d bytes are left", len(l.out.flows), l.out.size)
	}
	end()
}

// TestQueueNewFlows: connections that come anew for ever are not remembered for ever, and let the others have their turns.
func TestQueueNewFlows(t *testing.T) {
	l, far := newWire(t)
	end := serving(t, l)
	const bulk, others = 50, 20000
	send := func(i int, hash uint32) {
		t.Helper()
		if err := numberedOf(l, i, header.TCPProtocolNumber, hash); err != nil {
			t.Fatal(err)
		}
	}
	for i := range bulk {
		send(i, 1)
	}
	came, flows := 0, 0
	for i := range others {
		send(1000, uint32(2+i))
		if number(t, far) < 1000 {
			came++
		}
		l.out.mu.Lock()
		flows = max(flows, len(l.out.flows))
		l.out.mu.Unlock()
	}
	if came < bulk || flows > maxFlows {
		t.Errorf("%d of %d frames had their turn among those of %d flows", came, bulk, flows)
	}
	end()
}

// TestFlowOf: the frames of a connection, of a flow of datagrams, of a question's answer are known by their headers.
func TestFlowOf(t *testing.T) {
	q := newQueue()
	of := func(packet []byte) uint32 {
		pkt := stack.NewPacketBuffer(stack.PacketBufferOptions{Payload: buffer.MakeWithData(packet)})
		defer pkt.DecRef()
		return q.flowOf(pkt)
	}
	v6 := func(port byte) []byte {
		b := append([]byte{2, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 2, 0x86, 0xdd, 0x60, 0, 0, 0, 0, 8, 17, 64}, make([]byte, 40)...)
		b[len(b)-5] = port
		return b
	}
	fragment := func(port string) []byte {
		b := udpPacket("10.77.0.1:"+port, []byte("x"))
		b[header.EthernetMinimumSize+6] |= 0x20 // more follow
		return b
	}
	for _, c := range []struct {
		what string
		a, b []byte
		same bool
	}{
		{"datagrams of a flow", udpPacket("10.77.0.1:53", []byte("a")), udpPacket("10.77.0.1:53", []byte("another one")), true},
		{"datagrams to two ports", udpPacket("10.77.0.1:53", []byte("a")), udpPacket("10.77.0.1:54", []byte("a")), false},
		{"datagrams to two addresses", udpPacket("10.77.0.1:53", []byte("a")), udpPacket("10.77.0.3:53", []byte("a")), false},
		{"fragments", fragment("1"), fragment("2"), true},
		{"IPv6 of a flow", v6(1), v6(1), true},
		{"IPv6 of two", v6(1), v6(2), false},
		{"no packets", []byte{1}, make([]byte, 40), true},
		{"half a packet", udpPacket("10.77.0.1:53", nil)[:30], udpPacket("10.77.0.1:54", nil)[:30], true},
	} {
		// Two numbers may be one by chance, and not by every seed.
		same := true
		for range 3 {
			q.seed = newQueue().seed
			same = same && of(c.a) == of(c.b)
		}
		if same != c.same {
			t.Errorf("%s: one flow: %v", c.what, same)
		}
	}
}

// TestQueueSmallest: with the smallest limit, too, two of the largest frames fit.
func TestQueueSmallest(t *testing.T) {
	pair := socketpair(t)
	defer unix.Close(pair[1])
	c := testConfig()
	c.BytesPerSecond = 1
	l, err := newLink(pair[0], c)
	if err != nil {
		t.Fatal(err)
	}
	defer l.close()
	for range 2 {
		pkt := stack.NewPacketBuffer(stack.PacketBufferOptions{Payload: buffer.MakeWithData(make([]byte, net.MaxFrame))})
		pkt.TransportProtocolNumber = header.TCPProtocolNumber
		if err := l.write(pkt); err != nil {
			t.Error(err)
		}
		pkt.DecRef()
	}
	l.out.close()
}
