package fs

import (
	"bufio"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
)

// A Handler answers a FUSE request: it puts the answer into room, and returns its length.
// It is called by many goroutines at once, and keeps neither.
type Handler = func(request, room []byte) int

// Accept waits until the device at the other end of conn hands requests on.
func Accept(conn net.Conn) error {
	var b [1]byte
	if _, err := io.ReadFull(conn, b[:]); err != nil {
		return fmt.Errorf("the file system device: %w", err)
	}
	if b[0] != attached {
		return fmt.Errorf("the file system device says %#x", b[0])
	}
	return nil
}

// Serve is the server's side of a device's connection, after Accept. It returns when the device has
// given the server up, with nil, or broken the protocol, after all requests have been answered. It closes conn.
func Serve(conn net.Conn, handle Handler) error {
	var running sync.WaitGroup
	defer running.Wait()
	defer conn.Close()
	var sendMu sync.Mutex // serialises frames
	var buffers pool
	r := bufio.NewReaderSize(conn, 256<<10)
	for {
		var head [frameHeader]byte
		if _, err := io.ReadFull(r, head[:]); err != nil {
			if errors.Is(err, io.EOF) || errors.Is(err, net.ErrClosed) {
				return nil
			}
			return err
		}
		n, room := binary.LittleEndian.Uint32(head[:]), binary.LittleEndian.Uint32(head[8:])
		if n < 8+inHeader || n > 8+MaxMessage || room > MaxMessage {
			return fmt.Errorf("a frame of %d bytes with room for %d", n, room)
		}
		request := buffers.get(int(n - 8))
		if _, err := io.ReadFull(r, *request); err != nil {
			return err
		}
		if room == 0 { // nothing waits, and what does not is not counted by the device: one at a time
			handle(*request, nil)
			buffers.put(request)
			continue
		}
		running.Go(func() {
			b := buffers.get(int(8 + room))
			answer := *b
			n := handle(*request, answer[8:])
			buffers.put(request)
			defer buffers.put(b)
			binary.LittleEndian.PutUint32(answer, uint32(4+n))
			copy(answer[4:8], head[4:8])
			sendMu.Lock()
			defer sendMu.Unlock()
			conn.Write(answer[:8+n]) //nolint:errcheck // the reader sees the connection's end
		})
	}
}
