package vsock

import (
	"os"
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

// poller is an edge-triggered epoll set. Its waits keep the thread: one for
// hundreds of sockets, which the kernel wakes without a scheduler in between, and
// one system call learns of all that is ready.
type poller struct {
	fd     int
	n      int // events that the last look found
	events [maxEvents]unix.EpollEvent
}

func newPoller() (*poller, error) {
	fd, err := unix.EpollCreate1(unix.EPOLL_CLOEXEC)
	if err != nil {
		return nil, os.NewSyscallError("epoll_create1", err)
	}
	return &poller{fd: fd}, nil
}

// poll looks at the set without blocking.
func (p *poller) poll() {
	// RawSyscall: it cannot block, so the scheduler need not hear of it.
	n, _, errno := unix.RawSyscall6(unix.SYS_EPOLL_PWAIT, uintptr(p.fd),
		uintptr(unsafe.Pointer(&p.events[0])), maxEvents, 0, 0, 0)
	if p.n = int(n); errno != 0 {
		p.n = 0
	}
}

// wait blocks until there are events or the deadline passes; zero is none.
func (p *poller) wait(deadline time.Time) (expired bool, err error) {
	timeout := -1
	if !deadline.IsZero() {
		// Rounded up: never before the deadline.
		timeout = int(max(0, time.Until(deadline)+time.Millisecond-1) / time.Millisecond)
	}
	p.n, err = unix.EpollWait(p.fd, p.events[:], timeout)
	if err != nil {
		p.n = 0
		if err == unix.EINTR {
			return false, nil
		}
		return false, os.NewSyscallError("epoll_wait", err)
	}
	return p.n == 0, nil
}

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

func (p *poller) close() { unix.Close(p.fd) }
