package usernet

import (
	"io"
	"os"
	"syscall"

	"golang.org/x/sys/unix"
)

// recvSome waits until a socket of the host's has something, and only then takes a
// buffer of the pool for it, which the caller puts back. n is 0 at a stream's end.
func recvSome(rc syscall.RawConn) (b *[]byte, n int, err error) {
	waitErr := rc.Read(func(fd uintptr) bool {
		b = chunks.Get().(*[]byte)
		n, err = recv(int(fd), *b, 0)
		if err != nil {
			chunks.Put(b)
			b = nil
		}
		return err != unix.EAGAIN
	})
	if waitErr != nil {
		return nil, 0, waitErr
	}
	return b, n, os.NewSyscallError("recv", err)
}

// unread is where bytes would be read to that are only counted; nothing is ever written there.
var unread [maxSegment]byte

// awaitBytes waits until a stream has bytes to be read, and tells how many, maxSegment at most; 0 at its end. TCP counts with MSG_TRUNC
// and copies nothing (tcp(7)), up to urgent data.
func awaitBytes(rc syscall.RawConn) (n int, err error) {
	waitErr := rc.Read(func(fd uintptr) bool {
		n, err = recv(int(fd), unread[:], unix.MSG_PEEK|unix.MSG_TRUNC)
		return err != unix.EAGAIN
	})
	if waitErr != nil {
		return 0, waitErr
	}
	return n, os.NewSyscallError("recv", err)
}

// received is bytes that a socket has, as a tcpip.Payloader: the stack reads them to where it needs them.
type received struct {
	raw  syscall.RawConn
	left int
}

// Len implements tcpip.Payloader.
func (r *received) Len() int { return r.left }

// Read implements tcpip.Payloader. It never ends before Len bytes: the stack would wait for them.
func (r *received) Read(b []byte) (n int, err error) {
	switch {
	case r.left == 0:
		return 0, io.EOF
	case len(b) == 0: // so the stack asks whether it is the end
		return 0, nil
	}
	cerr := r.raw.Control(func(fd uintptr) { n, err = recv(int(fd), b[:min(len(b), r.left)], 0) })
	switch {
	case cerr != nil:
		return 0, cerr
	case err != nil:
		return 0, os.NewSyscallError("recv", err)
	case n == 0:
		return 0, io.ErrUnexpectedEOF
	}
	r.left -= n
	return n, nil
}

// recv does not wait.
func recv(fd int, b []byte, flags int) (n int, err error) {
	for err = unix.EINTR; err == unix.EINTR; {
		n, _, err = unix.Recvfrom(fd, b, flags|unix.MSG_DONTWAIT)
	}
	return n, err
}
