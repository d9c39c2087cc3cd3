package virtiotest

import (
	"encoding/binary"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/wsl2/wsl2/vmm/eventfd"
	"github.com/wsl2/wsl2/vmm/guestmem"
	"github.com/wsl2/wsl2/vmm/virtio"
)

// Descriptor flags (virtio 1.2 §2.7.5).
const (
	DescNext     = 1
	DescWrite    = 2
	DescIndirect = 4
)

// Desc is a split virtqueue's descriptor.
type Desc struct {
	Addr  guestmem.Addr
	Len   uint32
	Flags uint16
	Next  uint16
}

func (d Desc) put(b []byte) {
	binary.LittleEndian.PutUint64(b, uint64(d.Addr))
	binary.LittleEndian.PutUint32(b[8:], d.Len)
	binary.LittleEndian.PutUint16(b[12:], d.Flags)
	binary.LittleEndian.PutUint16(b[14:], d.Next)
}

// Ring is the driver's side of one virtqueue. It is safe for concurrent use.
type Ring struct {
	Queue *virtio.Queue // the device's side
	Size  uint16

	g         *Guest
	kick      *eventfd.EventFD
	eventIdx  bool
	indirect  bool
	kicks     atomic.Int64
	interrupt chan struct{} // capacity 1: an edge that is not lost
	irqs      atomic.Int64
	done      chan struct{} // ends the interrupt handler
	ended     chan struct{}

	desc       []byte
	availRing  []byte
	usedRing   []byte
	availWord  *atomic.Uint32 // flags | idx<<16
	usedWord   *atomic.Uint32
	usedEvent  *atomic.Uint32 // low half
	availEvent *atomic.Uint32 // low half

	mu        sync.Mutex
	freed     sync.Cond // descriptors became free
	free      []uint16
	nextAvail uint16
	kicked    uint16 // nextAvail at the last decision to kick
	lastUsed  uint16
	inFlight  map[uint16]*Request // by head
	closed    bool
}

func newRing(t testing.TB, g *Guest, size uint16, features uint64, direct bool) *Ring {
	t.Helper()
	n := int(size)
	descAddr, desc := g.Alloc(t, 16*n)
	availAddr, avail := g.Alloc(t, 8+2*n)
	usedAddr, used := g.Alloc(t, 8+8*n)
	word := func(a guestmem.Addr) *atomic.Uint32 {
		w, err := g.Memory.Uint32(a)
		if err != nil {
			t.Fatal(err)
		}
		return w
	}
	kick, err := eventfd.New()
	if err != nil {
		t.Fatal(err)
	}
	r := &Ring{
		Size: size, g: g, kick: kick,
		eventIdx:  features&virtio.FeatureEventIdx != 0,
		indirect:  features&virtio.FeatureIndirectDesc != 0 && !direct,
		interrupt: make(chan struct{}, 1),
		done:      make(chan struct{}),
		ended:     make(chan struct{}),
		desc:      desc, availRing: avail[4:], usedRing: used[4:],
		availWord: word(availAddr), usedWord: word(usedAddr),
		availEvent: word(usedAddr + 4 + 8*guestmem.Addr(n)),
		inFlight:   map[uint16]*Request{},
	}
	if n >= 2 { // with one descriptor used_event shares its word with the ring
		r.usedEvent = word(availAddr + 4 + 2*guestmem.Addr(n))
	} else if r.eventIdx {
		t.Fatal("virtiotest: a queue of 1 with the event index is not supported")
	}
	r.freed.L = &r.mu
	for i := range size {
		r.free = append(r.free, size-1-i)
	}
	q, err := virtio.NewQueue(virtio.QueueConfig{
		Memory: g.Memory, Size: size, Desc: descAddr, Driver: availAddr, Device: usedAddr,
		Features: features, Kick: r.kick,
		Interrupt: func() {
			r.irqs.Add(1)
			select {
			case r.interrupt <- struct{}{}:
			default:
			}
		},
	})
	if err != nil {
		t.Fatal(err)
	}
	r.Queue = q
	go r.handleInterrupts()
	return r
}

func (r *Ring) close() {
	r.mu.Lock()
	r.closed = true
	r.freed.Broadcast()
	r.mu.Unlock()
	close(r.done)
	<-r.ended
	r.kick.Close()
}

// Kicks returns how often the driver notified the device.
func (r *Ring) Kicks() int { return int(r.kicks.Load()) }

// Interrupts returns how often the device interrupted the driver.
func (r *Ring) Interrupts() int { return int(r.irqs.Load()) }

// SetDesc writes descriptor i of the table.
func (r *Ring) SetDesc(i uint16, d Desc) { d.put(r.desc[16*int(i):]) }

// Offer makes head available, whatever it is, without a kick. Mixed with Send
// the caller minds that Send takes descriptors from the table's start.
func (r *Ring) Offer(head uint16) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.offer(head)
}

func (r *Ring) offer(head uint16) {
	binary.LittleEndian.PutUint16(r.availRing[2*int(r.nextAvail%r.Size):], head)
	r.nextAvail++
	r.availWord.Store(uint32(r.nextAvail) << 16)
}

// SetAvailIdx stores any avail.idx.
func (r *Ring) SetAvailIdx(idx uint16) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.nextAvail = idx
	r.availWord.Store(uint32(idx) << 16)
}

// Kick notifies the device whether it asked for it or not.
func (r *Ring) Kick() {
	r.kicks.Add(1)
	_ = r.kick.Signal()
}

// notify kicks if the device wants it. Preconditions: r.mu is held.
func (r *Ring) notify() {
	from, to := r.kicked, r.nextAvail
	r.kicked = to
	if r.eventIdx {
		event := uint16(r.availEvent.Load())
		if to-event-1 >= to-from {
			return
		}
	} else if r.usedWord.Load()&1 != 0 {
		return
	}
	r.Kick()
}

func (r *Ring) handleInterrupts() {
	defer close(r.ended)
	for {
		r.reap()
		select {
		case <-r.interrupt:
		case <-r.done:
			return
		}
	}
}

// reap completes what the device returned, and asks for the next interrupt.
func (r *Ring) reap() {
	r.mu.Lock()
	defer r.mu.Unlock()
	for {
		for idx := uint16(r.usedWord.Load() >> 16); r.lastUsed != idx; r.lastUsed++ {
			e := r.usedRing[8*int(r.lastUsed%r.Size):]
			head := binary.LittleEndian.Uint32(e)
			req := r.inFlight[uint16(head)]
			if req == nil || head > 0xffff {
				continue // offered raw: nobody waits
			}
			delete(r.inFlight, uint16(head))
			req.written = binary.LittleEndian.Uint32(e[4:])
			r.free = append(r.free, req.ids...)
			req.ids = req.ids[:0]
			req.done <- struct{}{}
		}
		r.freed.Broadcast()
		if !r.eventIdx {
			return
		}
		// A driver must look again after it moved used_event.
		r.usedEvent.Store(uint32(r.lastUsed))
		if uint16(r.usedWord.Load()>>16) == r.lastUsed {
			return
		}
	}
}

// UsedIdx returns used.idx as the device published it.
func (r *Ring) UsedIdx() uint16 { return uint16(r.usedWord.Load() >> 16) }

// Request is one chain, prepared in guest memory; it can be submitted any
// number of times, one after the other.
type Request struct {
	// Readable and Writable are the buffers in guest memory.
	Readable, Writable [][]byte

	r       *Ring
	descs   []Desc
	bufs    []buffer
	table   buffer // indirect table
	ids     []uint16
	written uint32
	done    chan struct{}
}

// Prepare copies readable into guest memory and allocates writable buffers of
// the lengths given.
func (r *Ring) Prepare(t testing.TB, readable [][]byte, writable ...int) *Request {
	t.Helper()
	req := &Request{r: r, done: make(chan struct{}, 1)}
	add := func(n int, flags uint16) []byte {
		b := r.g.alloc.get(n)
		if b.bytes == nil {
			t.Fatalf("virtiotest: guest memory exhausted by %d bytes; raise Options.MemoryBytes", n)
		}
		req.bufs = append(req.bufs, b)
		req.descs = append(req.descs, Desc{Addr: b.addr, Len: uint32(n), Flags: flags | DescNext})
		return b.bytes
	}
	for _, p := range readable {
		b := add(len(p), 0)
		copy(b, p)
		req.Readable = append(req.Readable, b)
	}
	for _, n := range writable {
		req.Writable = append(req.Writable, add(n, DescWrite))
	}
	if len(req.descs) == 0 {
		t.Fatal("virtiotest: a chain needs a buffer")
	}
	req.descs[len(req.descs)-1].Flags &^= DescNext
	if r.indirect && len(req.descs) > 1 {
		if req.table = r.g.alloc.get(16 * len(req.descs)); req.table.bytes == nil {
			t.Fatal("virtiotest: guest memory exhausted by an indirect table; raise Options.MemoryBytes")
		}
		for i, d := range req.descs {
			d.Next = uint16(i + 1)
			d.put(req.table.bytes[16*i:])
		}
		req.descs = []Desc{{Addr: req.table.addr, Len: uint32(len(req.table.bytes)), Flags: DescIndirect}}
	}
	if len(req.descs) > int(r.Size) {
		t.Fatalf("virtiotest: a chain of %d descriptors on a queue of %d", len(req.descs), r.Size)
	}
	return req
}

// Submit offers the request, waiting for free descriptors, and kicks if the
// device wants it. The request must not be in flight.
func (q *Request) Submit() {
	r := q.r
	r.mu.Lock()
	defer r.mu.Unlock()
	q.submit()
	r.notify()
}

// SubmitAll offers all requests before it kicks once.
func (r *Ring) SubmitAll(reqs ...*Request) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, q := range reqs {
		q.submit()
	}
	r.notify()
}

func (q *Request) submit() {
	r := q.r
	for len(r.free) < len(q.descs) && !r.closed {
		r.notify() // the device may be asleep on what we wait for
		r.freed.Wait()
	}
	if r.closed {
		return
	}
	cut := len(r.free) - len(q.descs)
	q.ids = append(q.ids[:0], r.free[cut:]...)
	r.free = r.free[:cut]
	for i, d := range q.descs {
		if d.Flags&DescNext != 0 {
			d.Next = q.ids[i+1]
		}
		r.SetDesc(q.ids[i], d)
	}
	r.inFlight[q.ids[0]] = q
	r.offer(q.ids[0])
}

// Done receives one value per completed submission; use it or Wait.
func (q *Request) Done() <-chan struct{} { return q.done }

// Written is the number of bytes the device says it wrote; valid after Done.
func (q *Request) Written() int { return int(q.written) }

// Wait waits for the device to return the chain. It returns the number of
// bytes that the device says it wrote and the writable buffers, joined.
func (q *Request) Wait(t testing.TB) (written int, data []byte) {
	t.Helper()
	timer := time.NewTimer(Timeout)
	defer timer.Stop()
	select {
	case <-q.done:
	case <-timer.C:
		t.Fatal("virtiotest: the device did not return the chain")
	}
	for _, b := range q.Writable {
		data = append(data, b...)
	}
	return int(q.written), data
}

// Free gives the request's memory back. It must not be in flight.
func (q *Request) Free() {
	for _, b := range q.bufs {
		q.r.g.alloc.put(b)
	}
	if q.table.bytes != nil {
		q.r.g.alloc.put(q.table)
	}
	q.bufs, q.table = nil, buffer{}
}

// Send is Prepare and Submit.
func (r *Ring) Send(t testing.TB, readable [][]byte, writable ...int) *Request {
	t.Helper()
	q := r.Prepare(t, readable, writable...)
	q.Submit()
	return q
}

// Do is Send, Wait and Free.
func (r *Ring) Do(t testing.TB, readable [][]byte, writable ...int) (written int, data []byte) {
	t.Helper()
	q := r.Send(t, readable, writable...)
	written, data = q.Wait(t)
	q.Free()
	return written, data
}
