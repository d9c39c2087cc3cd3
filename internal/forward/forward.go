// Package forward carries connections and datagrams between a port of the host and one of
// the guest: the same on both sides, with a vsock connection for each TCP connection and for
// each UDP peer in between.
//
// # TCP
//
// Bytes pass as they are. The end of one direction is passed on as such (half-close); a
// connection that breaks, on either side, breaks on the other: it is reset, not closed. Who
// reads slowly slows the writer down, nothing is stored beyond one pipe each way, and
// connections on which nothing passes hold none. Bytes pass by splice(2): they go through the pipe
// as pages, and are not copied to this process and back, but for little ones, for which that costs less.
//
// # UDP
//
// Each datagram is preceded by its length (uint16, little-endian) on the connection. Datagrams
// of no bytes are datagrams, too.
package forward

import (
	"encoding/binary"
	"errors"
	"io"
	"runtime"
	"sync"
	"sync/atomic"
	"syscall"

	"golang.org/x/sys/unix"
)

// Conn is what TCP, unix and vsock connections have in common. It is no net.Conn: the guest's
// sockets need no addresses.
type Conn interface {
	io.ReadWriteCloser
	syscall.Conn
	CloseWrite() error
}

const (
	bufferSize = 64 << 10
	// pipeSize is that of the first largePipes, where the user may have so much. A kernel's own are a quarter: each end is
	// woken four times as often. All that a user's pipes hold is counted (pipe(7), pipe-user-pages-soft), and with many
	// large ones his other programs' would be tiny.
	pipeSize   = 256 << 10
	largePipes = 32
)

// Buffers are shared by the connections of a process.
type Buffers struct {
	pool, small, pipes sync.Pool
	large              atomic.Int32 // pipes
}

// get returns a buffer of this size, which is little or bufferSize.
func (b *Buffers) get(size int) *[]byte {
	if p, ok := b.of(size).Get().(*[]byte); ok {
		return p
	}
	p := make([]byte, size)
	return &p
}

func (b *Buffers) put(p *[]byte) { b.of(len(*p)).Put(p) }

func (b *Buffers) of(size int) *sync.Pool {
	if size == little {
		return &b.small
	}
	return &b.pool
}

// pipe holds bytes on their way. It is empty while it is in the pool.
type pipe struct{ r, w int }

// pipe returns one, nil if the process may have no more descriptors.
func (b *Buffers) pipe() *pipe {
	if p, ok := b.pipes.Get().(*pipe); ok {
		return p
	}
	var fds [2]int
	if unix.Pipe2(fds[:], unix.O_CLOEXEC|unix.O_NONBLOCK) != nil {
		return nil
	}
	p := &pipe{fds[0], fds[1]}
	large := b.large.Add(1) <= largePipes
	if large {
		_, _ = unix.FcntlInt(uintptr(fds[1]), unix.F_SETPIPE_SZ, pipeSize) // else it is smaller
	} else {
		b.large.Add(-1)
	}
	// A pool forgets what has not been used for some time.
	runtime.AddCleanup(p, func(fds [2]int) {
		unix.Close(fds[0])
		unix.Close(fds[1])
		if large {
			b.large.Add(-1)
		}
	}, fds)
	return p
}

// errAborted says that a peer has gone before it had read all.
var errAborted = errors.New("the other side has aborted the connection")

// Relay passes bytes between a and b until both directions have ended or one breaks, and
// closes both.
func (b *Buffers) Relay(x, y Conn) error {
	var done [2]atomic.Bool
	errs := make(chan error, 2)
	way := func(dst, src Conn, mine, other *atomic.Bool) {
		err := b.copy(dst, src)
		if err == nil && gone(src) && !other.Load() {
			err = errAborted
		}
		if err == nil {
			mine.Store(true)
			err = ignoreClosed(dst.CloseWrite())
		}
		errs <- err
	}
	go way(y, x, &done[0], &done[1])
	go way(x, y, &done[1], &done[0])
	err := <-errs
	if err == nil {
		err = <-errs
	} else {
		// Both at once, so that the other direction ends as well.
		Abort(x)
		Abort(y)
		<-errs
	}
	x.Close()
	y.Close()
	return err
}

// ignoreClosed forgives a peer that has ended both directions before we end ours.
func ignoreClosed(err error) error {
	if errors.Is(err, unix.ENOTCONN) {
		return nil
	}
	return err
}

// little is what costs less to be copied than to go through a pipe.
const little = 4 << 10

// copy passes on what src sends until it ends. What comes in little pieces is read and written; once a piece fills
// the buffer, what follows goes through a pipe, until that has little again.
func (b *Buffers) copy(dst, src Conn) error {
	from, err := src.SyscallConn()
	if err != nil {
		return err
	}
	to, err := dst.SyscallConn()
	if err != nil {
		return err
	}
	for n := 0; ; {
		if n < little {
			n, err = b.copySome(dst, from, little)
		} else {
			n, err = b.spliceSome(dst, to, from)
		}
		if err != nil || n == 0 {
			return err
		}
	}
}

// spliceSome passes on what a pipe holds; what no pipe takes, it copies.
func (b *Buffers) spliceSome(dst io.Writer, to, from syscall.RawConn) (int, error) {
	p, n, err := b.fill(from)
	switch {
	case err == errNoPipe:
		return b.copySome(dst, from, bufferSize)
	case err == nil && n > 0:
		// One that is not empty goes to no pool.
		if err = p.drain(to, n); err == nil {
			b.pipes.Put(p)
		}
	}
	return n, err
}

// errNoPipe says that there are bytes, but none that a pipe takes.
var errNoPipe = errors.New("no pipe")

// readable tells whether read(2) has bytes where splice(2) has none: that one stops at TCP's
// urgent data, and takes it for the end once the peer has ended.
func readable(fd int) bool {
	var b [1]byte
	n, _, err := unix.Recvfrom(fd, b[:], unix.MSG_PEEK|unix.MSG_DONTWAIT)
	return err == nil && n > 0
}

// fill waits for bytes and moves what fits to a pipe; none is the end.
func (b *Buffers) fill(from syscall.RawConn) (p *pipe, n int, err error) {
	waited := from.Read(func(fd uintptr) bool {
		if p = b.pipe(); p == nil {
			err = errNoPipe
			return true
		}
		n, err = splice(int(fd), p.w, pipeSize)
		if n > 0 {
			return true
		}
		b.pipes.Put(p) // still empty
		p = nil
		if (err == nil || err == unix.EAGAIN) && readable(int(fd)) {
			err = errNoPipe
		}
		return err != unix.EAGAIN
	})
	if waited != nil {
		return nil, 0, waited
	}
	return p, n, err
}

// drain moves the n bytes in the pipe on.
func (p *pipe) drain(to syscall.RawConn, n int) (err error) {
	waited := to.Write(func(fd uintptr) bool {
		for n > 0 {
			var moved int
			if moved, err = splice(p.r, int(fd), n); err != nil {
				return err != unix.EAGAIN
			}
			n -= moved
		}
		return true
	})
	runtime.KeepAlive(p)
	if waited != nil {
		return waited
	}
	return err
}

func splice(from, to, most int) (int, error) {
	for {
		n, err := unix.Splice(from, nil, to, nil, most, unix.SPLICE_F_NONBLOCK|unix.SPLICE_F_MOVE)
		if err != unix.EINTR {
			return int(n), err
		}
	}
}

// copySome passes on one buffer of this size (get).
func (b *Buffers) copySome(dst io.Writer, from syscall.RawConn, size int) (int, error) {
	p, n, err := b.read(from, 0, size)
	if err == nil && n > 0 {
		_, err = dst.Write((*p)[:n])
	}
	if p != nil {
		b.put(p)
	}
	return n, err
}

// read waits for data and returns it in a buffer of this size (get), behind so many bytes of room.
func (b *Buffers) read(raw syscall.RawConn, room, size int) (p *[]byte, n int, err error) {
	waited := raw.Read(func(fd uintptr) bool {
		p = b.get(size)
		for {
			if n, err = unix.Read(int(fd), (*p)[room:]); err != unix.EINTR {
				break
			}
		}
		if err == unix.EAGAIN {
			b.put(p)
			p = nil
			return false
		}
		return true
	})
	if waited != nil {
		return nil, 0, waited
	}
	return p, n, err
}

// gone tells whether the other side of a unix or vsock connection takes nothing any more.
// It has closed the connection then, and not just ended its direction.
func gone(c Conn) bool {
	raw, err := c.SyscallConn()
	if err != nil {
		return true
	}
	var failed error
	err = raw.Control(func(fd uintptr) { failed = unix.Send(int(fd), nil, unix.MSG_NOSIGNAL|unix.MSG_DONTWAIT) })
	return err != nil || failed == unix.EPIPE
}

// Abort closes a connection so that the other side sees it break.
func Abort(c Conn) {
	if raw, err := c.SyscallConn(); err == nil {
		// Closed without a reset it is closed as well.
		raw.Control(func(fd uintptr) { //nolint:errcheck // see above
			unix.SetsockoptLinger(int(fd), unix.SOL_SOCKET, unix.SO_LINGER, &unix.Linger{Onoff: 1}) //nolint:errcheck // see above
		})
	}
	c.Close()
}

// MaxDatagram is the largest payload of UDP over IPv4 and IPv6.
const MaxDatagram = 65527

// Overhead is what precedes each datagram.
const Overhead = 2

// WriteDatagram sends one, of at most MaxDatagram bytes, with one write. buf is for that: it
// has room for both.
func WriteDatagram(w io.Writer, buf, datagram []byte) error {
	binary.LittleEndian.PutUint16(buf, uint16(len(datagram)))
	n := copy(buf[Overhead:], datagram)
	_, err := w.Write(buf[:Overhead+n])
	return err
}

// ReadDatagram reads one, into buf if it has room. The end between two is io.EOF.
func ReadDatagram(r io.Reader, buf []byte) ([]byte, error) {
	var head [Overhead]byte
	if _, err := io.ReadFull(r, head[:]); err != nil {
		return nil, err
	}
	n := int(binary.LittleEndian.Uint16(head[:]))
	if n > MaxDatagram {
		return nil, errors.New("a datagram that is too long")
	}
	if n > cap(buf) {
		buf = make([]byte, n)
	}
	if _, err := io.ReadFull(r, buf[:n]); err != nil {
		return nil, io.ErrUnexpectedEOF
	}
	return buf[:n], nil
}

// Datagrams is a UDP socket that is connected.
type Datagrams interface {
	io.ReadWriteCloser
	syscall.Conn
}

// RelayDatagrams passes datagrams between a connected UDP socket and a connection that
// carries them framed, until the connection ends, and closes both.
func (b *Buffers) RelayDatagrams(udp Datagrams, c io.ReadWriteCloser) error {
	raw, err := udp.SyscallConn()
	if err != nil {
		return err
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		for {
			p, n, err := b.read(raw, Overhead, bufferSize)
			if p == nil {
				return // closed
			}
			var broken error
			if err == nil { // else nobody listens: the sender is not told, as with any lost datagram
				binary.LittleEndian.PutUint16(*p, uint16(n))
				_, broken = c.Write((*p)[:Overhead+n])
			}
			b.put(p)
			if broken != nil {
				return
			}
		}
	}()
	var datagram []byte
	for {
		if datagram, err = ReadDatagram(c, datagram[:0]); err != nil {
			break
		}
		udp.Write(datagram) //nolint:errcheck // UDP promises nothing
	}
	c.Close()
	udp.Close()
	<-done
	if err == io.EOF {
		return nil
	}
	return err
}
