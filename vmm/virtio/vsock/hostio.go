package vsock

import (
	"unsafe"

	"golang.org/x/sys/unix"
)

// System calls on the host's sockets. All are non-blocking and on the path of
// every packet, hence RawSyscall: they copy at most a few rx buffers' worth and
// do not wait for anyone.

// readv reads into iov, which must not be empty.
func readv(fd int, iov []unix.Iovec) (int, unix.Errno) {
	for {
		n, _, errno := unix.RawSyscall(unix.SYS_READV, uintptr(fd), uintptr(unsafe.Pointer(&iov[0])), uintptr(len(iov)))
		if errno == unix.EINTR {
			continue
		}
		if errno != 0 {
			return 0, errno
		}
		return int(n), 0
	}
}

// maxIovecs is UIO_MAXIOV: more in one call is EMSGSIZE.
const maxIovecs = 1024

// writev writes iov, of which it may take only the start. msg is scratch memory
// on the heap. A write to a closed socket is EPIPE and no signal.
func writev(fd int, iov []unix.Iovec, msg *unix.Msghdr) (int, unix.Errno) {
	if len(iov) == 1 {
		return write(fd, iovecBytes(iov[0]))
	}
	iov = iov[:min(len(iov), maxIovecs)]
	msg.Iov = &iov[0]
	msg.SetIovlen(len(iov))
	for {
		n, _, errno := unix.RawSyscall(unix.SYS_SENDMSG, uintptr(fd), uintptr(unsafe.Pointer(msg)), unix.MSG_NOSIGNAL|unix.MSG_DONTWAIT)
		if errno == unix.EINTR {
			continue
		}
		if errno != 0 {
			return 0, errno
		}
		return int(n), 0
	}
}

// write is writev of one buffer, which must not be empty.
func write(fd int, b []byte) (int, unix.Errno) {
	for {
		n, _, errno := unix.RawSyscall6(unix.SYS_SENDTO, uintptr(fd), uintptr(unsafe.Pointer(&b[0])), uintptr(len(b)), unix.MSG_NOSIGNAL|unix.MSG_DONTWAIT, 0, 0)
		if errno == unix.EINTR {
			continue
		}
		if errno != 0 {
			return 0, errno
		}
		return int(n), 0
	}
}

// skip drops the first n bytes of iov, in place.
func skip(iov []unix.Iovec, n int) []unix.Iovec {
	for len(iov) > 0 && uint64(n) >= iov[0].Len {
		n -= int(iov[0].Len)
		iov = iov[1:]
	}
	if n > 0 {
		iov[0] = iovec(iovecBytes(iov[0])[n:])
	}
	return iov
}

// backlog holds guest data that a host socket had no room for. Its owner keeps
// it within the credit that the guest was given.
type backlog struct {
	b   []byte
	off int
}

func (q *backlog) len() int { return len(q.b) - q.off }

func (q *backlog) append(iov []unix.Iovec, n int) {
	if q.off > 0 && len(q.b)+n > cap(q.b) {
		q.b = q.b[:copy(q.b, q.b[q.off:])]
		q.off = 0
	}
	for _, v := range iov {
		q.b = append(q.b, iovecBytes(v)...)
	}
}

// data is what was appended and not dropped.
func (q *backlog) data() []byte { return q.b[q.off:] }

// drop forgets the first n bytes, and the memory once there are none left.
func (q *backlog) drop(n int) {
	if q.off += n; q.off == len(q.b) {
		*q = backlog{}
	}
}
