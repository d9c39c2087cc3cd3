package usernet

import (
	"os"
	"syscall"

	"golang.org/x/sys/unix"
)

// recvSome waits until a socket of the host's has something, and only then takes a
// buffer of the pool for it, which the caller puts back. n is 0 at a stream's end.
func recvSome(rc syscall.RawConn) (b *[]byte, n int, err error) {
	waitErr := rc.Read(func(fd uintptr) bool {
		b = chunks.Get().(*[]byte)
		for {
			n, _, err = unix.Recvfrom(int(fd), *b, unix.MSG_DONTWAIT)
			if err != unix.EINTR {
				break
			}
		}
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
