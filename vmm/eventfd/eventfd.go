// Package eventfd wraps eventfd(2), the doorbell between vCPUs and devices.
package eventfd

import (
	"encoding/binary"
	"fmt"
	"os"
	"sync"
	"sync/atomic"
	"unsafe"

	"golang.org/x/sys/unix"
)

// EventFD is a non-blocking eventfd. It is safe for concurrent use.
//
// It is not on the runtime's poller: there, each signal would wake the poller's
// thread, whoever waits, and interrupt lines are signalled for KVM alone.
type EventFD struct {
	closed atomic.Bool
	// mu is held shared by all that use fd, for as long as they do, and
	// exclusively to close it: fd never names another file under them.
	mu sync.RWMutex
	fd int // immutable
}

// New creates an eventfd with a count of 0.
func New() (*EventFD, error) {
	fd, err := unix.Eventfd(0, unix.EFD_CLOEXEC|unix.EFD_NONBLOCK)
	if err != nil {
		return nil, os.NewSyscallError("eventfd", err)
	}
	return &EventFD{fd: fd}, nil
}

// FromFD takes ownership of fd, an eventfd made by another process.
func FromFD(fd int) (*EventFD, error) {
	if err := unix.SetNonblock(fd, true); err != nil {
		unix.Close(fd)
		return nil, fmt.Errorf("eventfd: set fd %d non-blocking: %w", fd, err)
	}
	return &EventFD{fd: fd}, nil
}

// FD returns the descriptor, for KVM_IRQFD and KVM_IOEVENTFD. It stays owned by
// e and must not be used after Close.
func (e *EventFD) FD() int { return e.fd }

// Signal adds 1 to the count, and never blocks: a count at its limit, which
// another process may have brought about, says all already. After Close it
// returns os.ErrClosed.
func (e *EventFD) Signal() error {
	e.mu.RLock()
	defer e.mu.RUnlock()
	if e.closed.Load() {
		return os.ErrClosed
	}
	e.add1()
	return nil
}

// Preconditions: e.mu is held.
func (e *EventFD) add1() {
	var b [8]byte
	binary.NativeEndian.PutUint64(b[:], 1)
	// RawSyscall: the scheduler need not hear of a call that cannot block.
	unix.RawSyscall(unix.SYS_WRITE, uintptr(e.fd), uintptr(unsafe.Pointer(&b)), uintptr(len(b))) // EAGAIN at the limit
}

// take resets the count and reports whether it was not 0. Preconditions: e.mu is
// held.
func (e *EventFD) take() bool {
	var b [8]byte
	n, _, _ := unix.RawSyscall(unix.SYS_READ, uintptr(e.fd), uintptr(unsafe.Pointer(&b)), uintptr(len(b)))
	if n != uintptr(len(b)) {
		return false
	}
	if e.closed.Load() {
		e.add1() // it was Close's, which is for all who wait
	}
	return true
}

// Wait blocks until the count is not 0 and resets it. After Close it returns
// os.ErrClosed. It keeps the calling goroutine's thread, which makes it the
// fastest way to wait: the kernel wakes that thread, and no scheduler looks for
// what else there might be to do.
func (e *EventFD) Wait() error {
	e.mu.RLock()
	defer e.mu.RUnlock()
	for !e.closed.Load() {
		p := []unix.PollFd{{Fd: int32(e.fd), Events: unix.POLLIN}}
		if _, err := unix.Poll(p, -1); err != nil && err != unix.EINTR {
			return os.NewSyscallError("poll", err)
		}
		if e.take() && !e.closed.Load() {
			return nil
		}
	}
	return os.ErrClosed
}

// Park is Wait without a thread: the goroutine waits on the runtime's poller.
// Coming and going cost more, so it is for what will probably never happen.
func (e *EventFD) Park() error {
	e.mu.RLock()
	defer e.mu.RUnlock()
	if e.closed.Load() {
		return os.ErrClosed
	}
	// A duplicate joins the poller, and leaves it with the end of the wait.
	fd, err := unix.FcntlInt(uintptr(e.fd), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		return os.NewSyscallError("fcntl", err)
	}
	f := os.NewFile(uintptr(fd), "eventfd")
	defer f.Close()
	rc, err := f.SyscallConn()
	if err != nil {
		return fmt.Errorf("eventfd: %w", err)
	}
	err = rc.Read(func(uintptr) bool { return e.closed.Load() || e.take() })
	if e.closed.Load() {
		return os.ErrClosed
	}
	return err
}

// Close ends every Wait and Park and releases the descriptor.
func (e *EventFD) Close() error {
	if e.closed.Swap(true) {
		return os.ErrClosed
	}
	e.mu.RLock()
	e.add1()
	e.mu.RUnlock()
	e.mu.Lock()
	defer e.mu.Unlock()
	return os.NewSyscallError("close", unix.Close(e.fd))
}
