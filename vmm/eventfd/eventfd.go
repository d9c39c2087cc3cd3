// Package eventfd wraps eventfd(2), the doorbell between vCPUs and devices.
package eventfd

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"

	"golang.org/x/sys/unix"
)

// EventFD is a non-blocking eventfd on the runtime's poller: Wait parks the
// goroutine, Close ends a Wait. It is safe for concurrent use.
type EventFD struct {
	f *os.File
}

// New creates an eventfd with a count of 0.
func New() (*EventFD, error) {
	fd, err := unix.Eventfd(0, unix.EFD_CLOEXEC|unix.EFD_NONBLOCK)
	if err != nil {
		return nil, os.NewSyscallError("eventfd", err)
	}
	return &EventFD{f: os.NewFile(uintptr(fd), "eventfd")}, nil
}

// FromFD takes ownership of fd, an eventfd made by another process.
func FromFD(fd int) (*EventFD, error) {
	if err := unix.SetNonblock(fd, true); err != nil {
		unix.Close(fd)
		return nil, fmt.Errorf("eventfd: set fd %d non-blocking: %w", fd, err)
	}
	return &EventFD{f: os.NewFile(uintptr(fd), "eventfd")}, nil
}

// FD returns the descriptor, for KVM_IRQFD and KVM_IOEVENTFD. It stays owned by
// e. It must not be used after Close. Unlike os.File.Fd it leaves the
// descriptor non-blocking.
func (e *EventFD) FD() int {
	fd := -1
	if c, err := e.f.SyscallConn(); err == nil {
		_ = c.Control(func(p uintptr) { fd = int(p) })
	}
	return fd
}

// Signal adds 1 to the count.
func (e *EventFD) Signal() error {
	var b [8]byte
	binary.NativeEndian.PutUint64(b[:], 1)
	_, err := e.f.Write(b[:])
	return err
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
