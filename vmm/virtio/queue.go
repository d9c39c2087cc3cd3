package virtio

import (
	"github.com/wsl2/wsl2/vmm/eventfd"
	"github.com/wsl2/wsl2/vmm/guestmem"
)

// QueueConfig is how the driver set up one split virtqueue (virtio 1.2 §2.7).
type QueueConfig struct {
	Memory   *guestmem.Memory
	Size     uint16 // a power of two, at most 32768
	Desc     guestmem.Addr
	Driver   guestmem.Addr // available ring
	Device   guestmem.Addr // used ring
	Features uint64        // negotiated
	// NextAvail and NextUsed are where to go on; 0 for a fresh queue
	// (vhost-user's SET_VRING_BASE).
	NextAvail, NextUsed uint16
	// Kick is signalled by the driver's notifications. It stays owned by the
	// transport, which closes it only after Device.Stop returned.
	Kick *eventfd.EventFD
	// Interrupt raises the queue's used-buffer notification.
	Interrupt func()
}

// Chain is one descriptor chain as the driver offered it: checked, indirect
// tables resolved, translated. The descriptors were copied once; the buffers
// they point to are guest memory and may change at any moment.
type Chain struct {
	Head     uint16
	Readable [][]byte // device-readable buffers, in order
	Writable [][]byte // device-writable buffers, in order
}

// Queue is a split virtqueue seen from the device. Pop is for one goroutine at
// a time; Push and Notify may be called from several.
type Queue struct {
	cfg QueueConfig
}

// NewQueue checks the rings' sizes, alignments and places.
func NewQueue(cfg QueueConfig) (*Queue, error) { return &Queue{cfg: cfg}, nil }

// Size returns the number of descriptors.
func (q *Queue) Size() uint16 { return q.cfg.Size }

// Pop takes the next available chain; ok is false if there is none. On an error
// (loop, bad address, index out of range) the queue is broken until a reset.
// The Chain's slices are valid until the next Pop into the same Chain: pass one
// to reuse its backing arrays.
func (q *Queue) Pop(c *Chain) (ok bool, err error) { return false, nil }

// Push returns a chain to the driver with n bytes written to its writable
// buffers. The driver sees it at once but is interrupted only by Notify.
func (q *Queue) Push(head uint16, n uint32) {}

// Notify interrupts the driver if it wants to know of the chains pushed since
// the last Notify (event index or VIRTQ_AVAIL_F_NO_INTERRUPT).
func (q *Queue) Notify() {}

// Wait blocks until a chain may be available: it enables the driver's
// notifications, checks the ring again and sleeps on the kick eventfd. After
// Close it returns os.ErrClosed. Notifications are off between Wait's return
// and the next Wait.
func (q *Queue) Wait() error { return nil }

// Close ends Wait; the queue's memory is not touched after the device's
// goroutines have returned. It leaves the kick eventfd open.
func (q *Queue) Close() {}

// Indices returns the next available and used indices, for GET_VRING_BASE.
func (q *Queue) Indices() (avail, used uint16) { return 0, 0 }
