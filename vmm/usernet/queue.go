package usernet

import (
	"context"
	"hash/maphash"
	"sync"

	"golang.org/x/sys/unix"
	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/header"
	"gvisor.dev/gvisor/pkg/tcpip/stack"

	"github.com/wsl2/wsl2/vmm/virtio/net"
)

const (
	// maxQueued bounds what waits for a guest that takes no frames, with what keeps it. What connections send is held by
	// their endpoints as well, whose buffers are bounded: a frame of theirs that was dropped would cost 200 ms.
	maxQueued = 64 << 20
	// maxOthers bounds it for all else to be added.
	maxOthers = 2 << 20
)

// queue is the frames that the guest has not taken yet: of each connection in their order, and of those in turn, so that a
// new one's first answer, the reply to a few bytes or to a question are not behind megabytes of others (as fq_codel has it,
// RFC 8290 §4.1; without its measure of delay, as who has much to send waits for room).
type queue struct {
	limit int           // of size
	seed  maphash.Seed  // of flowOf
	some  chan struct{} // has a token when the first frame has come
	turn  chan struct{} // is held by the one who waits
	gone  chan struct{} // has a token when the frame has gone that it waits for, or the queue is closed

	mu      sync.Mutex
	flows   map[uint32]*flow // those with frames, and those that had some before their last turn; by flowOf; guarded by mu
	fresh   []*flow          // in their first turn; guarded by mu
	rest    []*flow          // the others; guarded by mu
	sending *flow            // whose first frame is being sent, or nil; guarded by mu
	frames  int              // guarded by mu
	size    int              // in bytes of memory; guarded by mu
	sends   uint64           // frames that have left the queue; guarded by mu
	await   uint64           // the number of them that is waited for; guarded by mu
	closed  bool             // guarded by mu
}

// flow is the frames of a connection, or of several whose numbers are the same.
type flow struct {
	number uint32
	frames []*stack.PacketBuffer
	credit int // bytes that it may send before it is another one's turn
}

// maxFlows is how many there are at most: those that come anew for ever let the others have their turns, and cost no memory.
const maxFlows = 1024

// flowOf is the number of a frame's flow. The stack has numbered TCP's connections; others are known by their headers.
func (q *queue) flowOf(pkt *stack.PacketBuffer) uint32 {
	if pkt.Hash != 0 {
		return pkt.Hash % maxFlows
	}
	var head [header.EthernetMinimumSize + header.IPv4MaximumHeaderSize + 4]byte // with both ports
	n := 0
	for _, b := range pkt.AsSlices() {
		n += copy(head[n:], b)
	}
	ip := head[header.EthernetMinimumSize:max(n, header.EthernetMinimumSize)]
	var from, to, ports int
	switch header.Ethernet(head[:]).Type() {
	case header.IPv4ProtocolNumber:
		if len(ip) < header.IPv4MinimumSize {
			return 0
		}
		from, to, ports = 12, 20, int(header.IPv4(ip).HeaderLength())
		if header.IPv4(ip).More() || header.IPv4(ip).FragmentOffset() != 0 {
			ports = len(ip) // of most fragments they are elsewhere
		}
	case header.IPv6ProtocolNumber:
		from, to, ports = 8, 40, 40
	default:
		return 0
	}
	var h maphash.Hash
	h.SetSeed(q.seed)
	h.Write(ip[min(from, len(ip)):min(to, len(ip))])
	h.Write(ip[min(ports, len(ip)):min(ports+4, len(ip))])
	return uint32(h.Sum64() % maxFlows)
}

// quantum is what a flow may send in a turn: no less than a frame.
const quantum = net.MaxFrame

func newQueue() queue {
	return queue{limit: maxQueued, some: make(chan struct{}, 1), turn: make(chan struct{}, 1), gone: make(chan struct{}, 1), seed: maphash.MakeSeed(), flows: map[uint32]*flow{}}
}

// close drops what waits.
func (q *queue) close() {
	q.mu.Lock()
	defer q.mu.Unlock()
	for _, f := range q.flows {
		for _, pkt := range f.frames {
			pkt.DecRef()
		}
	}
	q.flows, q.fresh, q.rest, q.sending = nil, nil, nil, nil
	q.frames, q.size, q.closed = 0, 0, true
	notify(q.gone)
}

// add is the end of a flow. Preconditions: mu is held, and the queue is not closed.
func (q *queue) add(pkt *stack.PacketBuffer) {
	number := q.flowOf(pkt)
	f := q.flows[number]
	if f == nil {
		f = &flow{number: number, credit: quantum}
		q.flows[number] = f
		q.fresh = append(q.fresh, f)
	}
	f.frames = append(f.frames, pkt.IncRef())
	q.size += pkt.MemSize()
	if q.frames++; q.frames == 1 {
		notify(q.some)
	}
}

// first is the frame to be sent next, or nil; the same until sent.
func (q *queue) first() *stack.PacketBuffer {
	q.mu.Lock()
	defer q.mu.Unlock()
	for q.sending == nil {
		list := &q.fresh
		if len(*list) == 0 {
			list = &q.rest
		}
		if len(*list) == 0 {
			return nil
		}
		f := (*list)[0]
		switch {
		case len(f.frames) > 0 && f.credit > 0:
			q.sending = f
			continue
		case len(f.frames) > 0:
			f.credit += quantum
			q.rest = append(q.rest, f)
		case list == &q.fresh && len(q.rest) > 0: // one that always comes back at once would always be first
			q.rest = append(q.rest, f)
		default:
			delete(q.flows, f.number)
		}
		(*list)[0] = nil
		*list = (*list)[1:]
	}
	return q.sending.frames[0]
}

// sent removes the frame that first has returned.
func (q *queue) sent() {
	q.mu.Lock()
	defer q.mu.Unlock()
	f := q.sending
	q.sending = nil
	pkt := f.frames[0]
	f.frames[0] = nil
	if f.frames = f.frames[1:]; len(f.frames) == 0 {
		f.frames = nil
	}
	f.credit -= pkt.Size()
	q.size -= pkt.MemSize()
	q.frames--
	pkt.DecRef()
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

// limitOf is what the queue may hold for a frame of this kind to be added. What is no connection's comes however full it is, and has
// to leave room for them.
func (q *queue) limitOf(pkt *stack.PacketBuffer) int {
	if pkt.TransportProtocolNumber == header.TCPProtocolNumber {
		return q.limit
	}
	return q.others()
}

func (q *queue) others() int { return min(q.limit/2, maxOthers) }

// write sends a frame at once if none waits and the guest takes it, and else leaves that to drain; without room
// for it in the queue, it is dropped.
func (l *link) write(pkt *stack.PacketBuffer) tcpip.Error {
	q := &l.out
	q.mu.Lock()
	defer q.mu.Unlock()
	if q.closed {
		return &tcpip.ErrClosedForSend{}
	}
	if q.frames == 0 && l.down == nil {
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
	if q.size+pkt.MemSize() > q.limitOf(pkt) {
		return &tcpip.ErrNoBufferSpace{}
	}
	q.add(pkt)
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

// room waits until as many frames have gone as are queued now; not for all that come meanwhile, which may never end. One
// at a time does that, so that each gets its turn and all together add little more than one frame each to
// the queue.
func (l *link) room(ctx context.Context) error {
	q := &l.out
	select {
	case q.turn <- struct{}{}:
	case <-ctx.Done():
		return context.Cause(ctx)
	}
	defer func() { <-q.turn }()
	q.mu.Lock()
	q.await = q.sends + uint64(q.frames)
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

// crowded tells that even those who have little to send should wait for room.
func (q *queue) crowded() bool {
	q.mu.Lock()
	defer q.mu.Unlock()
	return q.size > q.others()
}

// waits tells whether the frame that is waited for is still here.
func (q *queue) waits() bool {
	q.mu.Lock()
	defer q.mu.Unlock()
	return q.sends < q.await && !q.closed
}
