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
// The device sends one byte, attached, when it will hand requests on: only then may the guest be told
// to mount. From then on there are frames, little-endian, either way: length[4] of what follows, tag[4], and a FUSE message. The request's
// has room[4] before the message: how many bytes the answer may have. The server
// answers each tag once, in any order; requests without room (FORGET) get no answer.
//
// # Limits
//
// A server has no more than the queues' sizes of requests at a time, and no more than maxBytes of
// memory for them, with which it can always serve one.
package fs

import (
	"bufio"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"slices"
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
	// frameHeader is that of a request's frame: length[4] tag[4] room[4].
	frameHeader = 12
	// maxBytes bounds a server's buffers for requests in flight and for their answers.
	maxBytes = 64 << 20
)

// Of FUSE's protocol (include/uapi/linux/fuse.h): the headers, and the requests that begin and
// end a mount.
const (
	inHeader  = 40 // length[4] opcode[4] unique[8] ...
	outHeader = 16 // length[4] error[4] unique[8]
	opInit    = 26
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
	room    *sync.Cond // signalled when bytes, server or stopped change
	queues  [2]*virtio.Queue
	stopped bool
	loops   sync.WaitGroup
	server  *server // nil: there is none; guarded by mu
	mounted bool    // the guest has sent INIT and not DESTROY; guarded by mu
}

// server is one connection.
type server struct {
	conn net.Conn

	sendMu sync.Mutex // serialises frames

	// Guarded by Device.mu.
	calls map[uint32]*call
	next  uint32
	bytes int
}

// call is a request that the server has.
type call struct {
	queue  *virtio.Queue
	chain  virtio.Chain
	unique uint64
	bytes  int
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
func (d *Device) Attach(conn net.Conn) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.server != nil || d.mounted {
		return ErrBusy
	}
	s := &server{conn: conn, calls: map[uint32]*call{}}
	d.server = s
	s.sendMu.Lock()
	go func() {
		_, err := s.conn.Write([]byte{attached})
		s.sendMu.Unlock()
		if err != nil {
			s.conn.Close() // receive gives it up
		}
		d.receive(s)
	}()
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
	var frame []byte // of one request after the other
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
			if err := d.submit(c, &frame); err != nil {
				return err
			}
		}
	}
}

// submit hands a request to the server, or fails it. buf is for the frame, and grows with it.
func (d *Device) submit(c *call, buf *[]byte) error {
	var head [16]byte
	n, room := virtio.Len(c.chain.Readable), virtio.Len(c.chain.Writable)
	if virtio.Gather(head[:], c.chain.Readable) < len(head) || n < inHeader || n > MaxMessage {
		return fmt.Errorf("%w: a request of %d bytes", virtio.ErrProtocol, n)
	}
	if room > 0 && room < outHeader {
		return fmt.Errorf("%w: room for an answer of %d bytes", virtio.ErrProtocol, room)
	}
	room = min(room, MaxMessage)
	opcode := binary.LittleEndian.Uint32(head[4:])
	c.unique, c.last = binary.LittleEndian.Uint64(head[8:]), opcode == opDestroy
	c.bytes = sizes[class(n)] + sizes[class(8+room)] // what the server takes for it

	d.mu.Lock()
	s := d.server
	for s != nil && s.bytes > 0 && s.bytes+c.bytes > maxBytes && !d.stopped {
		d.room.Wait()
		s = d.server
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
	if room > 0 {
		s.calls[tag] = c
		s.bytes += c.bytes
	}
	d.mu.Unlock()

	// One copy of what the guest may go on changing: what the server gets is what it parses.
	*buf = slices.Grow((*buf)[:0], frameHeader+n)
	frame := (*buf)[:frameHeader+n]
	binary.LittleEndian.PutUint32(frame, uint32(8+n))
	binary.LittleEndian.PutUint32(frame[4:], tag)
	binary.LittleEndian.PutUint32(frame[8:], uint32(room))
	virtio.Gather(frame[frameHeader:], c.chain.Readable)
	s.sendMu.Lock()
	_, err := s.conn.Write(frame)
	s.sendMu.Unlock()
	if err != nil {
		s.conn.Close() // receive fails what is in flight
	}
	if room == 0 { // the driver wants its buffers back, no answer
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
func (d *Device) receive(s *server) {
	r := bufio.NewReaderSize(s.conn, 256<<10)
	buf := make([]byte, 4<<10)
	for {
		var head [8]byte
		if _, err := io.ReadFull(r, head[:]); err != nil {
			break
		}
		n := binary.LittleEndian.Uint32(head[:])
		if n < 4+outHeader || n > 4+MaxMessage {
			break
		}
		if int(n) > len(buf) {
			buf = make([]byte, 4+MaxMessage)
		}
		if _, err := io.ReadFull(r, buf[:n-4]); err != nil {
			break
		}
		if !d.answer(s, binary.LittleEndian.Uint32(head[4:]), buf[:n-4]) {
			break
		}
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	d.drop(s)
}

// answer gives the guest an answer; false if it is none.
func (d *Device) answer(s *server, tag uint32, message []byte) bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	c := s.calls[tag]
	if c == nil || d.server != s {
		return false
	}
	delete(s.calls, tag)
	s.bytes -= c.bytes
	d.room.Broadcast()
	if len(message) > virtio.Len(c.chain.Writable) {
		d.fail(c)
		return false
	}
	n := virtio.Scatter(c.chain.Writable, message)
	c.queue.Push(c.chain.Head, uint32(n))
	c.queue.Notify()
	if c.last || c.first && binary.LittleEndian.Uint32(message[4:]) != 0 { // a mount that was refused sends nothing more
		d.mounted = false
		d.drop(s)
	}
	return true
}

// drop gives a server up. Preconditions: mu is held.
func (d *Device) drop(s *server) {
	s.conn.Close()
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
