package listeners

import (
	"encoding/binary"
	"fmt"
	"os"
	"sync/atomic"
	"unsafe"

	"golang.org/x/sys/unix"
)

// ringSize is that of the buffer of records; 2,700 of them are more than come between two looks.
const ringSize = 64 << 10

// ring is our end of a BPF ring buffer (Documentation/bpf/ringbuf.rst): a page with our
// position, one with the kernel's, and the records, mapped twice in a row.
type ring struct {
	f        *os.File
	consumer []byte
	producer []byte // and the records
}

// newRing maps the buffer of a descriptor, which it owns from then on.
func newRing(fd int) (*ring, error) {
	page := os.Getpagesize()
	consumer, err := unix.Mmap(fd, 0, page, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		unix.Close(fd)
		return nil, fmt.Errorf("map the ring buffer: %w", err)
	}
	producer, err := unix.Mmap(fd, int64(page), page+2*ringSize, unix.PROT_READ, unix.MAP_SHARED)
	if err == nil {
		err = unix.SetNonblock(fd, true) // for the runtime's poller
	}
	if err != nil {
		unix.Munmap(consumer) //nolint:errcheck // about to fail
		unix.Close(fd)
		return nil, fmt.Errorf("map the ring buffer: %w", err)
	}
	return &ring{f: os.NewFile(uintptr(fd), "ring"), consumer: consumer, producer: producer}, nil
}

func position(page []byte) *uint64 { return (*uint64)(unsafe.Pointer(&page[0])) }

// drain calls f with each record that is there.
func (r *ring) drain(f func(record []byte)) (any bool) {
	at := atomic.LoadUint64(position(r.consumer))
	for at < atomic.LoadUint64(position(r.producer)) {
		b := r.producer[os.Getpagesize()+int(at%ringSize):]
		n := atomic.LoadUint32((*uint32)(unsafe.Pointer(&b[0])))
		if n&unix.BPF_RINGBUF_BUSY_BIT != 0 {
			break // being written; its end wakes us again
		}
		size := n &^ unix.BPF_RINGBUF_DISCARD_BIT
		if n&unix.BPF_RINGBUF_DISCARD_BIT == 0 {
			f(b[unix.BPF_RINGBUF_HDR_SZ:][:size])
		}
		at += (uint64(size) + unix.BPF_RINGBUF_HDR_SZ + 7) &^ 7
		atomic.StoreUint64(position(r.consumer), at)
		any = true
	}
	return any
}

// wait returns when there are records, having called f with them, or the ring is closed.
func (r *ring) wait(f func(cookie, what uint64)) error {
	raw, err := r.f.SyscallConn()
	if err != nil {
		return err
	}
	return raw.Read(func(uintptr) bool {
		return r.drain(func(record []byte) {
			if len(record) == recordSize {
				f(binary.LittleEndian.Uint64(record), binary.LittleEndian.Uint64(record[8:]))
			}
		})
	})
}

// close ends wait. The memory goes with the process: a wait may still be looking at it.
func (r *ring) close() { r.f.Close() }
