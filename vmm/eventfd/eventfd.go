// Package eventfd wraps eventfd(2), the doorbell between vCPUs and devices.
package eventfd

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"syscall"

	"golang.org/x/sys/unix"
)

// EventFD is a non-blocking eventfd on the runtime's poller: Wait parks the
// goroutine, Close ends a Wait. It is safe for concurrent use.
type EventFD struct {
	f  *os.File
	rc syscall.RawConn
}

// New creates an eventfd with a count of 0.
func New() (*EventFD, error) {
	fd, err := unix.Eventfd(0, unix.EFD_CLOEXEC|unix.EFD_NONBLOCK)
	if err != nil {
		return nil, os.NewSyscallError("eventfd", err)
	}
	return newEventFD(fd)
}

// FromFD takes ownership of fd, an eventfd made by another process.
func FromFD(fd int) (*EventFD, error) {
	if err := unix.SetNonblock(fd, true); err != nil {
		unix.Close(fd)
		return nil, fmt.Errorf("eventfd: set fd %d non-blocking: %w", fd, err)
	}
	return newEventFD(fd)
}

func newEventFD(fd int) (*EventFD, error) {
	f := os.NewFile(uintptr(fd), "eventfd")
	rc, err := f.SyscallConn()
	if err != nil {
		f.Close()
		return nil, fmt.Errorf("eventfd: %w", err)
	}
	return &EventFD{f: f, rc: rc}, nil
}

// FD returns the descriptor, for KVM_IRQFD and KVM_IOEVENTFD. It stays owned by
// e. It must not be used after Close. Unlike os.File.Fd it leaves the
// descriptor non-blocking.
func (e *EventFD) FD() int {
	fd := -1
	_ = e.rc.Control(func(p uintptr) { fd = int(p) })
	return fd
}

// Signal adds 1 to the count, and never blocks: a count at its limit, which
// another process may have brought about, says all already. After Close it
// returns os.ErrClosed.
func (e *EventFD) Signal() error {
	if e.rc.Control(add1) != nil {
		return os.ErrClosed
	}
	return nil
}

func add1(fd uintptr) {
	var b [8]byte
	binary.NativeEndian.PutUint64(b[:], 1)
	_, _ = unix.Write(int(fd), b[:]) // EAGAIN at the limit
}

// Wait blocks until the count is not 0 and resets it. After Close it returns
// os.ErrClosed.
func (e *EventFD) Wait() error {
	var b [8]byte
	_, err := e.f.Read(b[:])
	if errors.Is(err, os.ErrClosed) {
		return os.ErrClosed
	}
	return err
}

// Close releases the descriptor and ends every Wait.
func (e *EventFD) Close() error { return e.f.Close() }
