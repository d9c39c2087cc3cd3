package usernet

import (
	"context"
	"sync"

	"golang.org/x/sys/unix"
	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/header"
	"gvisor.dev/gvisor/pkg/tcpip/stack"
)

// maxQueued bounds what waits for a guest that takes no frames, with what keeps it.
const maxQueued = 4 << 20

// queue is the frames that the guest has not taken yet, in their order.
type queue struct {
	limit int           // of size
	some  chan struct{} // has a token when the first frame has come
	turn  chan struct{} // is held by the one who waits
	gone  chan struct{} // has a token when the frame has gone that it waits for, or the queue is closed

	mu     sync.Mutex
	frames []*stack.PacketBuffer // guarded by mu; the first one is being sent
	size   int                   // in bytes of memory; guarded by mu
	sends  uint64                // frames that have left the queue; guarded by mu
	await  uint64                // the number of them that is waited for; guarded by mu
	closed bool                  // guarded by mu
}

func newQueue() queue {
	return queue{limit: maxQueued, some: make(chan struct{}, 1), turn: make(chan struct{}, 1), gone: make(chan struct{}, 1)}
}

// close drops what waits.
func (q *queue) close() {
	q.mu.Lock()
	defer q.mu.Unlock()
	for _, pkt := range q.frames {
		pkt.DecRef()
	}
	q.frames, q.size, q.closed = nil, 0, true
	notify(q.gone)
}

// first is the frame to be sent next, or nil.
func (q *queue) first() *stack.PacketBuffer {
	q.mu.Lock()
	defer q.mu.Unlock()
	if len(q.frames) == 0 {
		return nil
	}
	return q.frames[0]
}

// sent removes the first frame.
func (q *queue) sent() {
	q.mu.Lock()
	defer q.mu.Unlock()
	pkt := q.frames[0]
	q.frames[0] = nil
	q.size -= pkt.MemSize()
	pkt.DecRef()
	if q.frames = q.frames[1:]; len(q.frames) == 0 {
		q.frames = nil
	}
	if q.sends++; q.sends == q.await {
		notify(q.gone)
	}
}

func notify(c chan struct{}) {
	select {
	case c <- struct{}{}:
	default:
	}
}

// WritePackets implements stack.LinkWriter.
func (l *link) WritePackets(pkts stack.PacketBufferList) (int, tcpip.Error) {
	sent := 0
	for _, pkt := range pkts.AsSlice() {
		if err := l.write(pkt); err != nil {
			return sent, err
		}
		sent++
	}
	return sent, nil
}

// limitOf is what the queue may hold for a frame of this kind to be added. Datagrams come however full it is, and
// have to leave room for the connections that wait for their turn.
func (q *queue) limitOf(pkt *stack.PacketBuffer) int {
	if pkt.TransportProtocolNumber == header.UDPProtocolNumber {
		return q.limit / 2
	}
	switch h := pkt.NetworkHeader().Slice(); { // of a fragment, it is all that tells
	case pkt.NetworkProtocolNumber == header.IPv4ProtocolNumber && len(h) >= header.IPv4MinimumSize && header.IPv4(h).TransportProtocol() == header.UDPProtocolNumber,
		pkt.NetworkProtocolNumber == header.IPv6ProtocolNumber && len(h) >= header.IPv6MinimumSize && header.IPv6(h).NextHeader() == uint8(header.IPv6FragmentExtHdrIdentifier):
		return q.limit / 2
	}
	return q.limit
}

// write sends a frame at once if none waits and the guest takes it, and else leaves that to drain; without room
// for it in the queue, it is dropped.
func (l *link) write(pkt *stack.PacketBuffer) tcpip.Error {
	q := &l.out
	q.mu.Lock()
	defer q.mu.Unlock()
	if q.closed {
		return &tcpip.ErrClosedForSend{}
	}
	if len(q.frames) == 0 && l.down == nil {
		switch errno := l.send(pkt, false); errno {
		case 0:
			return nil
		case unix.EAGAIN:
		case unix.ENOBUFS, unix.ENOMEM, unix.EMSGSIZE:
			return &tcpip.ErrNoBufferSpace{}
		default:
			return &tcpip.ErrClosedForSend{}
		}
	}
	size := pkt.MemSize()
	if q.size+size > q.limitOf(pkt) {
		return &tcpip.ErrNoBufferSpace{}
	}
	q.size += size
	if q.frames = append(q.frames, pkt.IncRef()); len(q.frames) == 1 {
		notify(q.some)
	}
	return nil
}

// drain sends what waits, as the guest and its limit let it, until the link is shut down.
func (l *link) drain() {
	for {
		select {
		case <-l.out.some:
		case <-l.over:
			return
		}
		for pkt := l.out.first(); pkt != nil; pkt = l.out.first() {
			if l.throttle(l.down, pkt.Size()) {
				l.send(pkt, true) // what fails is lost, and fails for good after shutdown
			}
			l.out.sent()
		}
	}
}

// room waits until the frames that are queued now have gone; not for those that come meanwhile, which may never end. One
// at a time does that, so that each gets its turn and all together add little more than one frame each to
// the queue: a new connection's frames are not behind megabytes of others.
func (l *link) room(ctx context.Context) error {
	q := &l.out
	select {
	case q.turn <- struct{}{}:
	case <-ctx.Done():
		return context.Cause(ctx)
	}
	defer func() { <-q.turn }()
	q.mu.Lock()
	q.await = q.sends + uint64(len(q.frames))
	q.mu.Unlock()
	for q.waits() {
		select {
		case <-q.gone:
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
	return nil
}

// waits tells whether the frame that is waited for is still here.
func (q *queue) waits() bool {
	q.mu.Lock()
	defer q.mu.Unlock()
	return q.sends < q.await && !q.closed
}
