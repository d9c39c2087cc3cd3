package vsock

import (
	"errors"
	"os"
	"syscall"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Events that the poller reports besides host sockets; negative, where a
// socket's generation is not.
const (
	eventRX = -1 - iota
	eventTX
	eventListener
	eventStop
)

// maxEvents is how many events one look at the epoll set takes.
const maxEvents = 64

// poller is an edge-triggered epoll set that itself sits in the runtime's
// poller. So the goroutine that waits on hundreds of sockets is one parked
// goroutine, no thread; and one system call learns of all that is ready.
type poller struct {
	f      *os.File
	rc     syscall.RawConn
	fd     int
	look   func(uintptr) bool // look, bound once
	n      int
	errno  unix.Errno
	events [maxEvents]unix.EpollEvent
}

func newPoller() (*poller, error) {
	fd, err := unix.EpollCreate1(unix.EPOLL_CLOEXEC)
	if err != nil {
		return nil, os.NewSyscallError("epoll_create1", err)
	}
	if err := unix.SetNonblock(fd, true); err != nil { // else os.File would not poll it
		unix.Close(fd)
		return nil, os.NewSyscallError("fcntl", err)
	}
	p := &poller{f: os.NewFile(uintptr(fd), "vsock epoll"), fd: fd}
	if p.rc, err = p.f.SyscallConn(); err != nil {
		p.f.Close()
		return nil, err
	}
	p.look = func(uintptr) bool { return p.poll() != 0 || p.errno != 0 }
	return p, nil
}

// poll looks at the set without blocking and returns the number of events.
func (p *poller) poll() int {
	// RawSyscall: it cannot block, so the scheduler need not hear of it.
	n, _, errno := unix.RawSyscall6(unix.SYS_EPOLL_PWAIT, uintptr(p.fd),
		uintptr(unsafe.Pointer(&p.events[0])), maxEvents, 0, 0, 0)
	p.n, p.errno = int(n), errno
	if errno != 0 {
		p.n = 0
		if errno == unix.EINTR {
			p.errno = 0
		}
	}
	return p.n
}

// wait blocks until there are events or the deadline (see setDeadline) passes;
// once it passed, every wait returns at once until there is a new one.
func (p *poller) wait() (expired bool, err error) {
	err = p.rc.Read(p.look)
	if errors.Is(err, os.ErrDeadlineExceeded) {
		p.n = 0
		return true, nil
	}
	if err == nil && p.errno != 0 {
		return false, os.NewSyscallError("epoll_pwait", p.errno)
	}
	return false, err
}

// setDeadline ends waits at t; the zero time: never.
func (p *poller) setDeadline(t time.Time) { _ = p.f.SetReadDeadline(t) }

// add registers fd, edge-triggered; ref tells its events apart: one of the
// constants above, or a connection's generation.
func (p *poller) add(fd, ref int, events uint32) error {
	return p.ctl(unix.EPOLL_CTL_ADD, fd, ref, events)
}

// modify changes what fd is watched for, and looks at its state anew.
func (p *poller) modify(fd, ref int, events uint32) error {
	return p.ctl(unix.EPOLL_CTL_MOD, fd, ref, events)
}

func (p *poller) ctl(op, fd, ref int, events uint32) error {
	ev := unix.EpollEvent{Events: events | unix.EPOLLET, Fd: int32(fd), Pad: int32(ref)}
	return os.NewSyscallError("epoll_ctl", unix.EpollCtl(p.fd, op, fd, &ev))
}

func (p *poller) close() { p.f.Close() }
