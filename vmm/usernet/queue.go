package usernet

import (
	"context"
	"sync"

	"golang.org/x/sys/unix"
	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/stack"
)

// maxQueued bounds what waits for a guest that takes no frames, with what keeps it.
const maxQueued = 4 << 20

// queue is the frames that the guest has not taken yet, in their order.
type queue struct {
	limit int           // of size
	some  chan struct{} // has a token when the first frame has come
	turn  chan struct{} // is held by the one who waits for none
	none  chan struct{} // has a token when the last frame has gone

	mu     sync.Mutex
	frames []*stack.PacketBuffer // guarded by mu; the first one is being sent
	size   int                   // in bytes of memory; guarded by mu
	closed bool                  // guarded by mu
}

func newQueue() queue {
	return queue{limit: maxQueued, some: make(chan struct{}, 1), turn: make(chan struct{}, 1), none: make(chan struct{}, 1)}
}

// close drops what waits.
func (q *queue) close() {
	q.mu.Lock()
	defer q.mu.Unlock()
	for _, pkt := range q.frames {
		pkt.DecRef()
	}
	q.frames, q.size, q.closed = nil, 0, true
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
		notify(q.none)
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
	if q.size+size > q.limit {
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

// room waits until no frame waits. One at a time does that, so that each gets its turn and all together
// add little more than one frame each to the queue: a new connection's frames are not behind megabytes of others.
func (l *link) room(ctx context.Context) error {
	q := &l.out
	select {
	case q.turn <- struct{}{}:
	case <-ctx.Done():
		return context.Cause(ctx)
	}
	defer func() { <-q.turn }()
	for q.first() != nil {
		select {
		case <-q.none:
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
	return nil
}
