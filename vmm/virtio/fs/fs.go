// Package fs is the virtio file system device (virtio 1.2 §5.11). The requests are FUSE's,
// and a server answers them, a process of its own at the other end of a connection: the device
// hands each request on as it is, and the answer back. So what parses requests and opens files
// is not the process that runs the guest.
//
// # Life
//
// A device without a server is free. With Attach it has one until the guest unmounts
// (FUSE_DESTROY), resets the device, or the server goes. Where the guest still has it mounted then,
// every request fails with ENOTCONN until it has not; only then is the device free again.
//
// # Connection
//
// It is a socket of packets (SOCK_SEQPACKET). The device's first is one byte, attached, with a descriptor of memory: only
// then may the guest be told to mount. From then on a packet is a request or an answer, little-endian. A request's is tag[4],
// how many bytes the answer may have[4], slot[4], length[4], and the FUSE message; an answer's is tag[4], length[4] and the message. What is
// larger than inlineSize, or may be answered so, is not in packets but in a slot of the memory, which request and answer name by its number.
//
// The server answers each tag once, in any order; requests without room (FORGET) get no answer, but for those in a slot.
//
// # Limits
//
// A server has no more than the queues' sizes of requests at a time, and no more of large ones than there are slots.
package fs

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"sync"

	"golang.org/x/sys/unix"

	"github.com/wsl2/wsl2/vmm/virtio"
)

const (
	// queueSize is what Linux makes the largest request of, with a page for each
	// descriptor: 1 MiB and its headers take 260.
	queueSize = 512
	// tagSize is that of the name by which the guest mounts the file system (§5.11.4).
	tagSize = 36
	// MaxMessage is the largest request, and the largest answer: 1 MiB of data and headers.
	MaxMessage = 1<<20 + 64<<10
	// requestHeader is tag[4] room[4] slot[4] length[4], answerHeader tag[4] length[4].
	requestHeader, answerHeader = 16, 8
	// noSlot is in a request's header if the message is in the packet.
	noSlot = ^uint32(0)
)

// Of FUSE's protocol (include/uapi/linux/fuse.h): the headers, the requests that begin and
// end a mount, and the one that waits for others.
const (
	inHeader  = 40 // length[4] opcode[4] unique[8] ...
	outHeader = 16 // length[4] error[4] unique[8]
	opInit    = 26
	opSetlkw  = 33
	opDestroy = 38
)

// attached is what the device sends first.
const attached = 'A'

// ErrBusy is Attach's error for a device that is not free.
var ErrBusy = errors.New("the file system device is in use")

// Device is a virtio file system device.
type Device struct {
	tag string

	mu      sync.Mutex
	room    *sync.Cond // signalled when slots, server or stopped change
	queues  [2]*virtio.Queue
	stopped bool
	loops   sync.WaitGroup
	server  *client // nil: there is none; guarded by mu
	mounted bool    // the guest has sent INIT and not DESTROY; guarded by mu
}

// client is our end of a server's connection.
type client struct {
	conn *Conn

	// Guarded by Device.mu.
	calls map[uint32]*call
	next  uint32
	taken [slots]bool
}

// slot takes the first that is free. Preconditions: Device.mu is held.
func (s *client) slot() (uint32, bool) {
	for i, taken := range s.taken {
		if !taken {
			s.taken[i] = true
			return uint32(i), true
		}
	}
	return noSlot, false
}

// call is a request that the server has.
type call struct {
	queue  *virtio.Queue
	chain  virtio.Chain
	unique uint64
	slot   uint32
	first  bool // the FUSE_INIT of a mount
	last   bool // FUSE_DESTROY
}

var _ virtio.Device = (*Device)(nil)

// New returns a device that guests mount as tag.
func New(tag string) *Device {
	d := &Device{tag: tag, stopped: true}
	d.room = sync.NewCond(&d.mu)
	return d
}

// Tag is the name by which the guest mounts it.
func (d *Device) Tag() string { return d.tag }

// ID returns virtio.IDFS.
func (d *Device) ID() virtio.ID { return virtio.IDFS }

// Features returns 0: there is no notification queue.
func (d *Device) Features() uint64 { return 0 }

// QueueSizes returns the high priority queue and one for requests.
func (d *Device) QueueSizes() []uint16 { return []uint16{queueSize, queueSize} }

// ReadConfig reads tag[36] num_request_queues[4].
func (d *Device) ReadConfig(off uint32, p []byte) {
	var c [tagSize + 4]byte
	copy(c[:tagSize], d.tag)
	c[tagSize] = 1
	clear(p)
	if off < uint32(len(c)) {
		copy(p, c[off:])
	}
}

// WriteConfig does nothing: all is read-only.
func (d *Device) WriteConfig(uint32, []byte) {}

// Attach gives a free device its server. The device owns conn, unless it is ErrBusy.
func (d *Device) Attach(conn *net.UnixConn) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.server != nil || d.mounted {
		return ErrBusy
	}
	c, err := blocking(conn)
	if err != nil {
		return fmt.Errorf("the connection of the file system's server: %w", err)
	}
	if err := c.share(); err != nil {
		c.Close()
		c.unmap()
		return fmt.Errorf("memory for the file system's server: %w", err)
	}
	s := &client{conn: c, calls: map[uint32]*call{}}
	d.server = s
	go d.receive(s)
	return nil
}

// Free tells whether Attach would succeed.
func (d *Device) Free() bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.server == nil && !d.mounted
}

// Close ends the server's connection.
func (d *Device) Close() error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.server != nil {
		d.drop(d.server)
	}
	return nil
}

// Start serves both queues.
func (d *Device) Start(s virtio.Session) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if !d.stopped {
		return errors.New("fs: started twice")
	}
	d.stopped = false
	for i, q := range s.Queues {
		if q == nil || i >= len(d.queues) {
			continue
		}
		d.queues[i] = q
		d.loops.Go(func() {
			if err := d.serve(q); err != nil {
				s.Failed(fmt.Errorf("fs: %w", err))
			}
		})
	}
	return nil
}

// Stop ends the session, and with it a mount: whoever drives the device next makes his own.
func (d *Device) Stop() {
	d.mu.Lock()
	if d.stopped {
		d.mu.Unlock()
		return
	}
	d.stopped, d.mounted = true, false
	if s := d.server; s != nil && (len(s.calls) > 0 || s.next > 0) {
		s.calls = map[uint32]*call{} // their memory is the guest's again
		d.drop(s)
	}
	for _, q := range d.queues {
		if q != nil {
			q.Close()
		}
	}
	d.queues = [2]*virtio.Queue{}
	d.room.Broadcast()
	d.mu.Unlock()
	d.loops.Wait()
}

// serve hands requests on until the queue is closed.
func (d *Device) serve(q *virtio.Queue) error {
	packet := make([]byte, requestHeader+inlineSize) // of one request after the other
	for {
		if err := q.Wait(); err != nil {
			return nil // closed
		}
		for {
			c := &call{queue: q}
			ok, err := q.Pop(&c.chain)
			if err != nil {
				return err
			}
			if !ok {
				break
			}
			if err := d.submit(c, packet); err != nil {
				return err
			}
		}
	}
}

// submit hands a request to the server, or fails it. packet is for it.
func (d *Device) submit(c *call, packet []byte) error {
	var head [16]byte
	n, room := virtio.Len(c.chain.Readable), virtio.Len(c.chain.Writable)
	if virtio.Gather(head[:], c.chain.Readable) < len(head) || n < inHeader || n > MaxMessage {
		return fmt.Errorf("%w: a request of %d bytes", virtio.ErrProtocol, n)
	}
	opcode := binary.LittleEndian.Uint32(head[4:])
	if (room > 0 || opcode == opInit || opcode == opDestroy) && room < outHeader {
		return fmt.Errorf("%w: room for an answer of %d bytes", virtio.ErrProtocol, room)
	}
	room = min(room, MaxMessage)
	c.unique, c.slot, c.last = binary.LittleEndian.Uint64(head[8:]), noSlot, opcode == opDestroy
	large := n > inlineSize || room > inlineSize

	d.mu.Lock()
	s := d.server
	for ; large && s != nil && !d.stopped; s = d.server {
		if slot, ok := s.slot(); ok {
			c.slot = slot
			break
		}
		d.room.Wait()
	}
	if d.stopped {
		d.mu.Unlock()
		return nil
	}
	if opcode == opInit && s != nil && !d.mounted {
		d.mounted, c.first = true, true
	}
	if s == nil {
		d.fail(c)
		d.mu.Unlock()
		return nil
	}
	s.next++
	tag := s.next
	waits := room > 0 || large
	if waits {
		s.calls[tag] = c
	}
	d.mu.Unlock()

	// One copy of what the guest may go on changing: what the server gets is what it parses.
	binary.LittleEndian.PutUint32(packet, tag)
	binary.LittleEndian.PutUint32(packet[4:], uint32(room))
	binary.LittleEndian.PutUint32(packet[8:], c.slot)
	binary.LittleEndian.PutUint32(packet[12:], uint32(n))
	size := requestHeader
	if large {
		s.conn.mu.RLock()
		if s.conn.memory != nil { // else the server was given up, and the request has failed
			virtio.Gather(s.conn.request(int(c.slot), n), c.chain.Readable)
		}
		s.conn.mu.RUnlock()
	} else {
		size += virtio.Gather(packet[requestHeader:][:n], c.chain.Readable)
	}
	if err := s.conn.write(packet[:size]); err != nil {
		s.conn.Close() // receive fails what is in flight
	}
	if !waits { // the driver wants its buffers back, no answer
		d.mu.Lock()
		if !d.stopped {
			c.queue.Push(c.chain.Head, 0)
			c.queue.Notify()
		}
		d.mu.Unlock()
	}
	return nil
}

// receive hands the server's answers to the guest until the connection ends.
func (d *Device) receive(s *client) {
	packet := make([]byte, answerHeader+inlineSize)
	for {
		n, err := s.conn.read(packet)
		if err != nil || n < answerHeader || !d.answer(s, packet[:n]) {
			break
		}
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	d.drop(s)
}

// answer gives the guest an answer; false if it is none.
func (d *Device) answer(s *client, packet []byte) bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	tag := binary.LittleEndian.Uint32(packet)
	c := s.calls[tag]
	if c == nil || d.server != s {
		return false
	}
	delete(s.calls, tag)
	n, message := int(binary.LittleEndian.Uint32(packet[4:])), packet[answerHeader:]
	room := min(virtio.Len(c.chain.Writable), MaxMessage)
	if n > room || n < outHeader && room > 0 || c.slot == noSlot && n != len(message) {
		d.fail(c)
		return false
	}
	// The server may change what is in the slot: nothing depends on it here but what a mount's end says.
	if c.slot != noSlot {
		message = s.conn.answer(int(c.slot), n)
		s.taken[c.slot] = false
		d.room.Broadcast()
	}
	refused := c.first && n >= outHeader && binary.LittleEndian.Uint32(message[4:]) != 0 // such a mount sends nothing more
	n = virtio.Scatter(c.chain.Writable, message)
	c.queue.Push(c.chain.Head, uint32(n))
	c.queue.Notify()
	if c.last || refused {
		d.mounted = false
		d.drop(s)
	}
	return true
}

// drop gives a server up. Preconditions: mu is held.
func (d *Device) drop(s *client) {
	s.conn.Close()
	s.conn.unmap()
	if d.server != s {
		return
	}
	d.server = nil
	for _, c := range s.calls {
		d.fail(c)
	}
	s.calls = map[uint32]*call{}
	d.room.Broadcast()
}

// fail answers a request with ENOTCONN. Preconditions: mu is held, and the device is not stopped.
func (d *Device) fail(c *call) {
	if c.first || c.last {
		d.mounted = false
	}
	n := 0
	if len(c.chain.Writable) > 0 {
		answer := make([]byte, outHeader)
		binary.LittleEndian.PutUint32(answer, outHeader)
		errno := -int32(unix.ENOTCONN)
		binary.LittleEndian.PutUint32(answer[4:], uint32(errno))
		binary.LittleEndian.PutUint64(answer[8:], c.unique)
		n = virtio.Scatter(c.chain.Writable, answer)
	}
	c.queue.Push(c.chain.Head, uint32(n))
	c.queue.Notify()
}
