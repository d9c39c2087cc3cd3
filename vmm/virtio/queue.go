package virtio

import (
	"encoding/binary"
	"errors"
	"fmt"
	"math"
	"os"
	"sync"
	"sync/atomic"

	"github.com/wsl2/wsl2/vmm/eventfd"
	"github.com/wsl2/wsl2/vmm/guestmem"
)

// ErrProtocol is wrapped by every error that says how the driver broke the
// rules of a virtqueue.
var ErrProtocol = errors.New("virtqueue: driver error")

const (
	maxQueueSize = 32768 // virtio 1.2 §2.7

	// maxIndirect bounds an indirect table. Linux fills tables longer than the
	// queue, which §2.7.5.3.1 forbids and every device accepts; 1024 is what
	// QEMU takes, and the most that one preadv takes (IOV_MAX).
	maxIndirect = 1024

	descSize = 16
	usedSize = 8

	// Descriptor flags (virtio 1.2 §2.7.5).
	descNext     = 1
	descWrite    = 2
	descIndirect = 4

	availNoInterrupt = 1 // VIRTQ_AVAIL_F_NO_INTERRUPT
	usedNoNotify     = 1 // VIRTQ_USED_F_NO_NOTIFY
)

// QueueConfig is how the driver set up one split virtqueue (virtio 1.2 §2.7).
type QueueConfig struct {
	Memory   *guestmem.Memory
	Size     uint16 // a power of two, at most 32768
	Desc     guestmem.Addr
	Driver   guestmem.Addr // available ring
	Device   guestmem.Addr // used ring
	Features uint64        // negotiated
	// NextAvail and NextUsed are where to go on; 0 for a fresh queue. With
	// vhost-user NextAvail is what SET_VRING_BASE said and NextUsed is used.idx
	// as it stands in the ring.
	NextAvail, NextUsed uint16
	// Kick is signalled by the driver's notifications. It stays owned by the
	// transport, which closes it only after Device.Stop returned.
	Kick *eventfd.EventFD
	// Interrupt raises the queue's used-buffer notification. It may be called
	// from several goroutines at once and must not block on the guest.
	Interrupt func()
}

// Chain is one descriptor chain as the driver offered it: checked, indirect
// tables resolved, translated. The descriptors were copied once; the buffers
// they point to are guest memory and may change at any moment. Buffers of
// length 0 are left out. The sum of all lengths is below 2^32.
type Chain struct {
	Head     uint16
	Readable [][]byte // device-readable buffers, in order
	Writable [][]byte // device-writable buffers, in order
}

// Queue is a split virtqueue seen from the device. Pop and Wait are for one
// goroutine at a time; Push, Notify and Close may be called from several.
//
// Memory ordering: the two index words, both event words and both flag words
// are only touched through sync/atomic, whose operations are sequentially
// consistent. That covers the two places where the split ring needs a full
// barrier (publish used.idx, then read used_event; publish avail_event, then
// read avail.idx) and makes the plain accesses to ring entries and descriptors
// ordered behind the index that hands them over.
type Queue struct {
	// Immutable after NewQueue.
	cfg        QueueConfig
	eventIdx   bool
	indirect   bool
	mask       uint16
	desc       []byte // Size descriptors
	availRing  []byte // Size 16-bit heads
	usedRing   []byte // Size used elements
	availFlags word16
	availIdx   word16
	usedEvent  word16         // with eventIdx
	availEvent word16         // with eventIdx
	usedWord   *atomic.Uint32 // used.flags | used.idx<<16; the device owns both

	closed atomic.Bool

	// Owned by the goroutine that pops.
	nextAvail uint16
	seenAvail uint16 // avail.idx as last loaded
	broken    error  // the first driver error; sticky

	mu        sync.Mutex
	nextUsed  uint16
	pushed    uint32 // chains since the last Notify
	usedFlags uint16
}

// word16 is a 16-bit field of guest memory. sync/atomic has no 16-bit access:
// the field is reached through the aligned 32-bit word that holds it.
type word16 struct {
	w     *atomic.Uint32
	shift uint8
}

func newWord16(m *guestmem.Memory, a guestmem.Addr) (word16, error) {
	w, err := m.Uint32(a &^ 3)
	return word16{w: w, shift: uint8(a&2) * 8}, err
}

func (x word16) load() uint16 { return uint16(x.w.Load() >> x.shift) }

// store leaves the word's other half, which may be anyone's, as it is.
func (x word16) store(v uint16) {
	for {
		old := x.w.Load()
		if x.w.CompareAndSwap(old, old&^(0xffff<<x.shift)|uint32(v)<<x.shift) {
			return
		}
	}
}

// NewQueue checks the rings' sizes, alignments and places.
func NewQueue(cfg QueueConfig) (*Queue, error) {
	if cfg.Memory == nil || cfg.Kick == nil || cfg.Interrupt == nil {
		return nil, errors.New("virtqueue: needs memory, a kick eventfd and an interrupt")
	}
	if cfg.Size == 0 || cfg.Size > maxQueueSize || cfg.Size&(cfg.Size-1) != 0 {
		return nil, fmt.Errorf("%w: size %d is not a power of two up to %d", ErrProtocol, cfg.Size, maxQueueSize)
	}
	q := &Queue{
		cfg:       cfg,
		eventIdx:  cfg.Features&FeatureEventIdx != 0,
		indirect:  cfg.Features&FeatureIndirectDesc != 0,
		mask:      cfg.Size - 1,
		nextAvail: cfg.NextAvail,
		seenAvail: cfg.NextAvail,
		nextUsed:  cfg.NextUsed,
	}
	size := uint64(cfg.Size)
	for _, r := range []struct {
		name  string
		addr  guestmem.Addr
		align guestmem.Addr // virtio 1.2 §2.7
		skip  uint64        // flags and idx
		n     uint64
		dst   *[]byte
	}{
		{"descriptor table", cfg.Desc, 16, 0, descSize * size, &q.desc},
		{"available ring", cfg.Driver, 2, 4, 2 * size, &q.availRing},
		{"used ring", cfg.Device, 4, 4, usedSize * size, &q.usedRing},
	} {
		if r.addr%r.align != 0 {
			return nil, fmt.Errorf("%w: %s at %#x is not %d-aligned", ErrProtocol, r.name, uint64(r.addr), uint64(r.align))
		}
		b, err := cfg.Memory.Bytes(r.addr, r.skip+r.n)
		if err != nil {
			return nil, fmt.Errorf("%w: %s: %w", ErrProtocol, r.name, err)
		}
		*r.dst = b[r.skip:]
	}
	var err error
	if q.usedWord, err = cfg.Memory.Uint32(cfg.Device); err != nil {
		return nil, fmt.Errorf("%w: used ring: %w", ErrProtocol, err)
	}
	// No overflow: the rings were found in memory above, and memory does not wrap.
	words := []struct {
		name string
		addr guestmem.Addr
		dst  *word16
	}{
		{"avail.flags", cfg.Driver, &q.availFlags},
		{"avail.idx", cfg.Driver + 2, &q.availIdx},
		{"used_event", cfg.Driver + 4 + 2*guestmem.Addr(size), &q.usedEvent},
		{"avail_event", cfg.Device + 4 + usedSize*guestmem.Addr(size), &q.availEvent},
	}
	if !q.eventIdx {
		words = words[:2]
	}
	for _, w := range words {
		if *w.dst, err = newWord16(cfg.Memory, w.addr); err != nil {
			return nil, fmt.Errorf("%w: %s: %w", ErrProtocol, w.name, err)
		}
	}
	return q, nil
}

// Size returns the number of descriptors.
func (q *Queue) Size() uint16 { return q.cfg.Size }

// Pop takes the next available chain; ok is false if there is none. On an error
// (loop, bad address, index out of range; it wraps ErrProtocol) the queue is
// broken until a reset and every further Pop returns that error.
// The Chain's slices are valid until the next Pop into the same Chain: pass one
// to reuse its backing arrays.
// After Close there is no chain any more, so that a driver that goes on offering
// cannot keep a device from stopping.
func (q *Queue) Pop(c *Chain) (ok bool, err error) {
	if q.broken != nil {
		return false, q.broken
	}
	if q.closed.Load() {
		return false, nil
	}
	if q.seenAvail == q.nextAvail {
		if !q.loadAvail() {
			return false, nil
		}
		// The driver may have at most Size chains outstanding. Reading used
		// after avail makes the difference too small, never too large.
		q.mu.Lock()
		outstanding := q.seenAvail - q.nextUsed
		q.mu.Unlock()
		if outstanding > q.cfg.Size || q.seenAvail-q.nextAvail > q.cfg.Size {
			return false, q.fail("avail.idx %d is more than %d chains ahead of %d", q.seenAvail, q.cfg.Size, q.nextAvail)
		}
	}
	head := binary.LittleEndian.Uint16(q.availRing[2*int(q.nextAvail&q.mask):])
	c.Head = head
	c.Readable = c.Readable[:0]
	c.Writable = c.Writable[:0]
	if err := q.walk(c, head); err != nil {
		return false, err
	}
	q.nextAvail++
	return true, nil
}

// loadAvail reloads avail.idx and reports whether a chain is available.
func (q *Queue) loadAvail() bool {
	q.seenAvail = q.availIdx.load()
	return q.seenAvail != q.nextAvail
}

// available looks at the ring without taking note of what it saw: Pop checks
// the index it loads, and must be the one to load it.
func (q *Queue) available() bool {
	return q.seenAvail != q.nextAvail || q.availIdx.load() != q.nextAvail
}

func (q *Queue) fail(format string, args ...any) error {
	q.broken = fmt.Errorf("%w: "+format, append([]any{ErrProtocol}, args...)...)
	return q.broken
}

// walk follows the chain from head, through at most one indirect table, which
// ends it (virtio 1.2 §2.7.5.3).
func (q *Queue) walk(c *Chain, head uint16) error {
	table, size, isIndirect := q.desc, uint32(q.cfg.Size), false
	var total uint64
	for i, seen := uint32(head), uint32(0); ; {
		if i >= size {
			return q.fail("descriptor %d of a table of %d", i, size)
		}
		// As many descriptors as the table has is a loop's first return.
		if seen++; seen > size {
			return q.fail("chain %d has a loop", head)
		}
		// The two loads are the only look at this descriptor.
		d := table[descSize*i : descSize*i+descSize]
		addr := guestmem.Addr(binary.LittleEndian.Uint64(d))
		rest := binary.LittleEndian.Uint64(d[8:])
		n, flags, next := uint32(rest), uint16(rest>>32), uint16(rest>>48)

		if flags&descIndirect != 0 {
			switch {
			case !q.indirect:
				return q.fail("indirect descriptor in chain %d was not negotiated", head)
			case isIndirect:
				return q.fail("chain %d nests indirect tables", head)
			case flags&descNext != 0:
				return q.fail("chain %d goes on behind an indirect descriptor", head)
			case n == 0 || n%descSize != 0 || n/descSize > maxIndirect:
				return q.fail("chain %d has an indirect table of %d bytes", head, n)
			}
			b, err := q.cfg.Memory.Bytes(addr, uint64(n))
			if err != nil {
				return q.fail("indirect table of chain %d: %w", head, err)
			}
			table, size, isIndirect = b, n/descSize, true
			i, seen = 0, 0
			continue
		}

		if n > 0 {
			if total += uint64(n); total > math.MaxUint32 {
				return q.fail("chain %d is longer than 4 GiB", head)
			}
			b, err := q.cfg.Memory.Bytes(addr, uint64(n))
			if err != nil {
				return q.fail("chain %d: %w", head, err)
			}
			if flags&descWrite != 0 {
				c.Writable = append(c.Writable, b)
			} else {
				if len(c.Writable) > 0 {
					return q.fail("chain %d has a readable buffer behind a writable one", head)
				}
				c.Readable = append(c.Readable, b)
			}
		}
		if flags&descNext == 0 {
			return nil
		}
		i = uint32(next)
	}
}

// Push returns a chain to the driver with n bytes written to its writable
// buffers. The driver sees it at once but is interrupted only by Notify. Each
// popped chain is pushed exactly once, in any order.
func (q *Queue) Push(head uint16, n uint32) {
	q.mu.Lock()
	e := q.usedRing[usedSize*int(q.nextUsed&q.mask):]
	binary.LittleEndian.PutUint64(e, uint64(head)|uint64(n)<<32)
	q.nextUsed++
	q.pushed++
	q.publish()
	q.mu.Unlock()
}

// Used is a chain that goes back to the driver with Len bytes written to it.
type Used struct {
	Head uint16
	Len  uint32
}

// PushAll is Push of several chains, which the driver sees all at once or not yet: those
// that hold one network frame, say (VIRTIO_NET_F_MRG_RXBUF).
func (q *Queue) PushAll(used []Used) {
	q.mu.Lock()
	for _, u := range used {
		e := q.usedRing[usedSize*int(q.nextUsed&q.mask):]
		binary.LittleEndian.PutUint64(e, uint64(u.Head)|uint64(u.Len)<<32)
		q.nextUsed++
		q.pushed++
	}
	q.publish()
	q.mu.Unlock()
}

// publish stores used.flags and used.idx. Preconditions: q.mu is held.
func (q *Queue) publish() { q.usedWord.Store(uint32(q.usedFlags) | uint32(q.nextUsed)<<16) }

// Notify interrupts the driver if it wants to know of the chains pushed since
// the last Notify (event index or VIRTQ_AVAIL_F_NO_INTERRUPT).
func (q *Queue) Notify() {
	q.mu.Lock()
	n := q.pushed
	q.pushed = 0
	var want bool
	switch {
	case n == 0:
	case q.eventIdx:
		// §2.7.7.1: used_event is one of the n indices before nextUsed.
		want = uint32(q.nextUsed-1-q.usedEvent.load()) < n
	default:
		want = q.availFlags.load()&availNoInterrupt == 0
	}
	q.mu.Unlock()
	if want {
		q.cfg.Interrupt()
	}
}

// Wait blocks until a chain may be available: it enables the driver's
// notifications, checks the ring again and sleeps on the kick eventfd. After
// Close it returns os.ErrClosed. Notifications are off between Wait's return
// and the next Wait.
//
// A queue that was used once keeps a thread for its goroutine, which so wakes up
// soonest; until then, as with empty disk slots, it has none.
func (q *Queue) Wait() error {
	if q.closed.Load() {
		return os.ErrClosed
	}
	if q.broken != nil {
		return q.broken
	}
	// Work that arrived since the last Pop needs no change of the notifications.
	if q.available() {
		return nil
	}
	wait := (*eventfd.EventFD).Wait
	if q.nextAvail == q.cfg.NextAvail {
		wait = (*eventfd.EventFD).Park
	}
	q.enableNotify()
	for {
		if q.closed.Load() {
			return os.ErrClosed
		}
		if q.available() {
			q.disableNotify()
			return nil
		}
		// A count left over from an earlier kick only costs one more round.
		if err := wait(q.cfg.Kick); err != nil {
			return err
		}
	}
}

func (q *Queue) enableNotify() {
	if q.eventIdx {
		q.availEvent.store(q.nextAvail)
		return
	}
	q.setUsedFlags(0)
}

// disableNotify does nothing with the event index: once the driver has passed
// avail_event it does not notify again until the next enableNotify.
func (q *Queue) disableNotify() {
	if !q.eventIdx {
		q.setUsedFlags(usedNoNotify)
	}
}

func (q *Queue) setUsedFlags(flags uint16) {
	q.mu.Lock()
	if q.usedFlags != flags {
		q.usedFlags = flags
		q.publish()
	}
	q.mu.Unlock()
}

// Close ends Wait; the queue's memory is not touched after the device's
// goroutines have returned. It leaves the kick eventfd open, with a count that
// the next session takes for one spurious notification.
func (q *Queue) Close() {
	q.closed.Store(true)
	_ = q.cfg.Kick.Signal() // fails only if the eventfd is closed, which ends Wait too
}

// Indices returns the next available and used indices, for GET_VRING_BASE. It
// must not run beside Pop: call it after Device.Stop.
func (q *Queue) Indices() (avail, used uint16) {
	q.mu.Lock()
	defer q.mu.Unlock()
	return q.nextAvail, q.nextUsed
}
