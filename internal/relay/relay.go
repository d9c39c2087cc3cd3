// Package relay moves bytes between a program's streams and their connections, on
// the side where the program runs.
//
// A stream is a pipe or a pty's master, which its relay closes. What the program
// wrote before it ended is in the pipe or the pty when its exit is known; so an
// Output reads until nothing is left, whoever still holds the stream open, and
// knows then how many bytes the other side has to expect.
package relay

import (
	"errors"
	"fmt"
	"io"
	"os"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// bigBuffer is what a relay moves at once when there is much to move: a whole
// pipe. Little output never touches such a buffer, whose pages would have to be
// faulted in.
const (
	smallBuffer = 1 << 10
	bigBuffer   = 64 << 10
)

var bigBuffers = sync.Pool{New: func() any { return new([bigBuffer]byte) }}

// Conn is a stream's connection.
type Conn interface {
	io.ReadWriteCloser
	CloseWrite() error
}

// Output relays one stream of the program to its connection.
type Output struct {
	src *os.File // pipe or pty master; on the runtime's poller
	dst Conn
	// discards says that output after the session is read and thrown away, so
	// that background children do not fail; false for a pty, which is hung up.
	discards bool

	// Bytes is how much has been sent. It is valid once Done is closed.
	Bytes uint64
	// Done is closed when all has been sent that the program wrote before its end.
	Done chan struct{}
}

// NewOutput returns an Output that Run has yet to run; src is on the runtime's
// poller. discards says what becomes of output that comes after Finish.
func NewOutput(src *os.File, dst Conn, discards bool) *Output {
	return &Output{src: src, dst: dst, discards: discards, Done: make(chan struct{})}
}

// Finish tells the relay that the program has ended: it sends what is there and
// does not wait for more.
func (o *Output) Finish() { o.src.SetReadDeadline(time.Unix(1, 0)) } //nolint:errcheck // it fails only on a closed file, which is finished

// Run relays until end of file, until Finish, or until the client stops
// taking the data; then the program gets SIGPIPE or EPIPE as it would in a pipeline.
// It closes src, and half-closes dst at end of file.
func (o *Output) Run() {
	defer o.src.Close()
	open := o.relay()
	close(o.Done)
	if open && o.discards {
		o.discard()
	}
}

// relay reports whether the stream is still open, with nothing left in it.
func (o *Output) relay() (open bool) {
	buf := make([]byte, smallBuffer)
	var big *[bigBuffer]byte
	defer func() {
		if big != nil {
			bigBuffers.Put(big)
		}
	}()
	read := o.src.Read
	if !o.discards {
		read = o.readPTY
	}
	for {
		n, err := read(buf)
		if n > 0 {
			sent, werr := o.dst.Write(buf[:n])
			o.Bytes += uint64(sent)
			if werr != nil {
				return false
			}
			if n == len(buf) && big == nil {
				big = bigBuffers.Get().(*[bigBuffer]byte)
				buf = big[:]
			}
		}
		switch {
		case err == nil:
		case errors.Is(err, os.ErrDeadlineExceeded):
			// The program has ended. All that it wrote can be read without waiting,
			// and no more than that is: children that go on writing keep nobody.
			left := o.buffered()
			read = func(buf []byte) (int, error) {
				if left == 0 {
					return 0, syscall.EAGAIN
				}
				n, err := o.readNow(buf[:min(len(buf), left)])
				left -= n
				return n, err
			}
		case errors.Is(err, syscall.EAGAIN):
			return true
		default: // io.EOF; EIO from a pty that nobody holds open, when the program has ended
			o.dst.CloseWrite() //nolint:errcheck // the client may be gone
			return false
		}
	}
}

// readPTY is Read on a pty's master, but waits where nobody holds the pty open (EIO):
// a program may close its streams before it ends, or open its terminal again. To
// close the master then would hang it up.
func (o *Output) readPTY(buf []byte) (n int, err error) {
	rc, err := o.src.SyscallConn()
	if err != nil {
		return 0, err
	}
	rerr := rc.Read(func(fd uintptr) bool {
		for {
			if n, err = unix.Read(int(fd), buf); err != unix.EINTR {
				return err != unix.EAGAIN && err != unix.EIO
			}
		}
	})
	switch {
	case rerr != nil:
		return 0, rerr
	case err != nil:
		return 0, err
	case n == 0:
		return 0, io.EOF
	}
	return n, nil
}

// ptyBuffer is more than a pty holds (TTYB_DEFAULT_MEM_LIMIT, 640 KiB, and the
// line discipline's 4 KiB); how much that is at a moment cannot be asked.
const ptyBuffer = 1 << 20

// buffered is how many bytes may have been written and not yet read: exact for a
// pipe, a bound for a pty.
func (o *Output) buffered() (n int) {
	if !o.discards {
		return ptyBuffer
	}
	rc, err := o.src.SyscallConn()
	if err != nil {
		return 0
	}
	// FIONREAD (pipe(7)) is the same number as TIOCINQ.
	rc.Control(func(fd uintptr) { n, err = unix.IoctlGetInt(int(fd), unix.TIOCINQ) }) //nolint:errcheck // closed: nothing to read
	return n
}

// readNow reads what is there: EAGAIN if there is nothing. A read from a pty's
// master first takes in what is still on its way through the line discipline.
func (o *Output) readNow(buf []byte) (n int, err error) {
	rc, err := o.src.SyscallConn()
	if err != nil {
		return 0, err
	}
	cerr := rc.Control(func(fd uintptr) {
		for {
			if n, err = unix.Read(int(fd), buf); err != unix.EINTR {
				return
			}
		}
	})
	switch {
	case cerr != nil:
		return 0, cerr
	case err != nil:
		return 0, err
	case n == 0:
		return 0, io.EOF
	}
	return n, nil
}

// discard keeps the stream alive for background children until they close it.
func (o *Output) discard() {
	o.src.SetReadDeadline(time.Time{}) //nolint:errcheck // a closed file ends the loop below
	buf := make([]byte, 4<<10)
	for {
		if _, err := o.src.Read(buf); err != nil {
			return
		}
	}
}

// Input relays a connection to the program until the client's end of file, an
// error, or the program's closing of the stream.
func Input(dst *os.File, src io.Reader) {
	buf := make([]byte, smallBuffer)
	var big *[bigBuffer]byte
	for {
		n, err := src.Read(buf)
		if n > 0 {
			if _, werr := dst.Write(buf[:n]); werr != nil {
				break
			}
			if n == len(buf) && big == nil {
				big = bigBuffers.Get().(*[bigBuffer]byte)
				buf = big[:]
			}
		}
		if err != nil {
			break
		}
	}
	if big != nil {
		bigBuffers.Put(big)
	}
}

// Stdin is Input to a pipe, which it closes: that is the program's end of file.
// If the program has closed its end, the client's next write fails instead of
// vanishing. The connection is closed, not only its reading side: a writer that
// waits for room would not notice that.
func Stdin(dst *os.File, src Conn) {
	Input(dst, src)
	dst.Close()
	src.Close()
}

// Pipe returns a pipe: our end on the runtime's poller, the child's blocking as
// programs expect. The user owns it, so that /dev/stdout can be reopened.
func Pipe(weRead bool, uid uint32) (mine *os.File, child int, err error) {
	var p [2]int
	if err := unix.Pipe2(p[:], unix.O_CLOEXEC); err != nil {
		return nil, -1, fmt.Errorf("make a pipe: %w", err)
	}
	our, child := p[1], p[0]
	if weRead {
		our, child = p[0], p[1]
	}
	if uid != 0 {
		err = unix.Fchown(child, int(uid), -1)
	}
	if err == nil {
		err = unix.SetNonblock(our, true)
	}
	if err != nil {
		unix.Close(p[0])
		unix.Close(p[1])
		return nil, -1, fmt.Errorf("set up a pipe: %w", err)
	}
	return os.NewFile(uintptr(our), "pipe"), child, nil
}
