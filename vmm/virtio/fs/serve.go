package fs

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"sync"

	"golang.org/x/sys/unix"
)

// A Handler answers a FUSE request: it puts the answer into room, and returns its length.
// It is called by many goroutines at once, and keeps neither.
type Handler = func(request, room []byte) int

// maxWorkers is how many requests a server works on at a time, but for those that wait for locks.
const maxWorkers = 64

// Accept waits until the device at the other end of conn hands requests on.
func Accept(conn *Conn) error {
	if err := conn.accept(); err != nil {
		return fmt.Errorf("the file system device: %w", err)
	}
	return nil
}

// server is the other end of a device's connection.
type server struct {
	conn    *Conn
	handle  Handler
	running sync.WaitGroup

	mu      sync.Mutex
	workers int   // guarded by mu
	idle    int   // those of them that wait for a request; guarded by mu
	err     error // the first; guarded by mu
}

// Serve is the server's side of a device's connection, after Accept. It returns when the device has
// given the server up, with nil, or broken the protocol, after all requests have been answered. It closes conn.
//
// Each worker is a thread that waits for a packet, and does what it asks for itself: nothing is handed from
// one to the other. There are always some that wait, until there are maxWorkers.
func Serve(conn *Conn, handle Handler) error {
	s := &server{conn: conn, handle: handle}
	s.mu.Lock()
	s.hire()
	s.mu.Unlock()
	s.running.Wait()
	conn.Close()
	conn.unmap()
	return s.err
}

// hire starts a worker. Preconditions: mu is held.
func (s *server) hire() {
	s.workers++
	s.idle++
	s.running.Go(func() {
		err := s.work()
		s.mu.Lock()
		defer s.mu.Unlock()
		if s.err == nil && !errors.Is(err, io.EOF) && !errors.Is(err, os.ErrClosed) {
			s.err = err
		}
		s.conn.Close() // the others end as well
	})
}

// work serves packets until the connection ends.
func (s *server) work() error {
	packet, answer := make([]byte, requestHeader+inlineSize), make([]byte, answerHeader+inlineSize)
	for {
		n, err := s.conn.read(packet)
		if err != nil {
			return err
		}
		s.mu.Lock()
		if s.idle--; s.idle == 0 && s.workers < maxWorkers {
			s.hire()
		}
		s.mu.Unlock()
		r, err := s.parse(packet[:n])
		if err != nil {
			return err
		}
		if opcode := binary.LittleEndian.Uint32(r.message[4:]); opcode == opSetlkw {
			if r.slot == noSlot {
				r.message = slices.Clone(r.message)
			}
			s.running.Go(func() { s.do(r, make([]byte, answerHeader+inlineSize)) })
		} else {
			s.do(r, answer)
		}
		s.mu.Lock()
		s.idle++
		s.mu.Unlock()
	}
}

// request is one, where it lies.
type request struct {
	tag, slot uint32
	message   []byte
	room      int
}

// parse checks a packet.
func (s *server) parse(packet []byte) (r request, err error) {
	if len(packet) < requestHeader {
		return r, fmt.Errorf("a packet of %d bytes", len(packet))
	}
	n, room := binary.LittleEndian.Uint32(packet[12:]), binary.LittleEndian.Uint32(packet[4:])
	r = request{tag: binary.LittleEndian.Uint32(packet), slot: binary.LittleEndian.Uint32(packet[8:]), room: int(room)}
	switch {
	case n < inHeader || n > MaxMessage || room > MaxMessage:
		return r, fmt.Errorf("a request of %d bytes with room for %d", n, room)
	case r.slot == noSlot && int(n) == len(packet)-requestHeader && room <= inlineSize:
		r.message = packet[requestHeader:]
	case r.slot < slots && len(packet) == requestHeader && s.conn.memory != nil:
		r.message = s.conn.request(int(r.slot), int(n))
	default:
		return r, fmt.Errorf("a request of %d bytes with room for %d in slot %d, in a packet of %d", n, room, r.slot, len(packet))
	}
	return r, nil
}

// do answers a request. buf is for a packet.
func (s *server) do(r request, buf []byte) {
	room := buf[answerHeader:][:min(r.room, inlineSize)]
	if r.slot != noSlot {
		room = s.conn.answer(int(r.slot), r.room)
	}
	n := s.handle(r.message, room)
	if r.room == 0 && r.slot == noSlot { // nothing waits
		return
	}
	binary.LittleEndian.PutUint32(buf, r.tag)
	binary.LittleEndian.PutUint32(buf[4:], uint32(n))
	if r.slot != noSlot {
		n = 0
	}
	if err := s.conn.write(buf[:answerHeader+n]); err != nil && !errors.Is(err, unix.EPIPE) {
		s.conn.Close() // the device fails what is in flight
	}
}
