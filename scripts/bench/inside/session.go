package main

import (
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/wsl2/wsl2/internal/wire"
)

// socket is a blocking socket with nothing of Go's runtime between us and the
// kernel: a blocked call that the scheduler knows of has its monitor thread wake
// every 20 µs, on the one CPU that is measured.
type socket int

func (s socket) Read(p []byte) (int, error) {
	for {
		n, err := rawIO(unix.SYS_READ, int(s), p)
		switch {
		case err == unix.EINTR:
		case err == unix.EAGAIN: // SO_RCVTIMEO
			return 0, errHang
		case err != nil:
			return 0, err
		case n == 0 && len(p) > 0:
			return 0, io.EOF
		default:
			return n, nil
		}
	}
}

func (s socket) Write(p []byte) (int, error) {
	for done := 0; done < len(p); {
		n, err := rawIO(unix.SYS_WRITE, int(s), p[done:])
		switch {
		case err == unix.EINTR:
			continue
		case err == unix.EAGAIN: // SO_SNDTIMEO
			return done, errHang
		case err != nil:
			return done, err
		}
		done += n
	}
	return len(p), nil
}

// rawIO is read(2) or write(2), unknown to the scheduler. SO_RCVTIMEO and
// SO_SNDTIMEO bound it.
func rawIO(call uintptr, fd int, p []byte) (int, error) {
	n, _, errno := unix.RawSyscall(call, uintptr(fd), uintptr(unsafe.Pointer(unsafe.SliceData(p))), uintptr(len(p)))
	if errno != 0 {
		return 0, errno
	}
	return int(n), nil
}

func (s socket) Close() error      { return unix.Close(int(s)) }
func (s socket) CloseWrite() error { return unix.Shutdown(int(s), unix.SHUT_WR) }

// dialVsock connects to a guest's port by the host's AF_VSOCK (vhost-vsock).
func dialVsock(cid, port uint32) (socket, error) {
	fd, err := unix.Socket(unix.AF_VSOCK, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return -1, fmt.Errorf("vsock: %w", err)
	}
	if err := setTimeouts(fd); err != nil {
		unix.Close(fd)
		return -1, err
	}
	if err := unix.Connect(fd, &unix.SockaddrVM{CID: cid, Port: port}); err != nil {
		unix.Close(fd)
		return -1, fmt.Errorf("connect to port %d of CID %d: %w", port, cid, err)
	}
	return socket(fd), nil
}

// setTimeouts lets no call on a socket wait for longer than hangs.
func setTimeouts(fd int) error { return setTimeoutsTo(fd, hangs) }

func setTimeoutsTo(fd int, limit time.Duration) error {
	tv := unix.NsecToTimeval(limit.Nanoseconds())
	t := &tv
	return errors.Join(unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, t), unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_SNDTIMEO, t))
}

// session is one program in the guest, with stdout and perhaps stdin carried.
type session struct{ control, stdin, stdout socket }

// startSession sends what a client of wsl2 sends.
func startSession(dial func() (socket, error), stdin bool, argv ...string) (s *session, err error) {
	start := &wire.Start{Argv: argv, Streams: wire.StreamStdout}
	if stdin {
		start.Streams |= wire.StreamStdin
	}
	var id wire.SessionID
	rand.Read(id[:])
	open := func(role wire.Role, more wire.Message) (socket, error) {
		c, err := dial()
		if err != nil {
			return -1, err
		}
		b, err := wire.Append(nil, &wire.Hello{Version: wire.Version, Role: role, Session: id})
		if err == nil && more != nil {
			b, err = wire.Append(b, more)
		}
		if err == nil {
			_, err = c.Write(b)
		}
		return c, err
	}
	s = &session{stdin: -1}
	if s.control, err = open(wire.RoleControl, start); err != nil {
		return nil, err
	}
	if stdin {
		if s.stdin, err = open(wire.RoleStdin, nil); err != nil {
			return nil, err
		}
	}
	if s.stdout, err = open(wire.RoleStdout, nil); err != nil {
		return nil, err
	}
	return s, nil
}

// wait reads the control connection until the program has ended.
func (s *session) wait() error {
	for {
		m, err := wire.Read(s.control)
		if err != nil {
			return fmt.Errorf("session: %w", err)
		}
		switch m := m.(type) {
		case *wire.Started:
		case *wire.Failed:
			return fmt.Errorf("session: %s", m.Text)
		case *wire.Exited:
			if m.Status != 0 || m.Signal != 0 {
				return fmt.Errorf("session: exit status %d, signal %d", m.Status, m.Signal)
			}
			return nil
		}
	}
}

func (s *session) close() {
	for _, c := range []socket{s.control, s.stdin, s.stdout} {
		if c >= 0 {
			c.Close()
		}
	}
}
