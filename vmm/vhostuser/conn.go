package vhostuser

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"os"

	"golang.org/x/sys/unix"
)

// conn is the front-end channel: requests in, replies out.
type conn struct {
	c   *net.UnixConn
	oob []byte // room for maxRegions descriptors, the most that any message brings
	buf [maxPayload]byte
}

func newConn(c *net.UnixConn) *conn {
	return &conn{c: c, oob: make([]byte, unix.CmsgSpace(maxRegions*4))}
}

// read returns the next request. Its descriptors belong to the message; on an
// error none is left open. io.EOF means that the front end went away between
// two messages.
func (c *conn) read() (*message, error) {
	var hb [headerSize]byte
	fds, err := c.readHeader(hb[:])
	if err != nil {
		closeFDs(fds)
		return nil, err
	}
	m, err := c.readBody(hb[:], len(fds))
	if err != nil {
		closeFDs(fds)
		return nil, err
	}
	m.fds = fds
	return m, nil
}

// readHeader fills b and collects the descriptors that travel with its bytes:
// the sender attaches them to a message's first byte.
func (c *conn) readHeader(b []byte) (fds []int, err error) {
	for n := 0; n < len(b); {
		k, oobn, flags, _, err := c.c.ReadMsgUnix(b[n:], c.oob)
		if oobn > 0 {
			got, perr := parseFDs(c.oob[:oobn])
			fds = append(fds, got...)
			if err == nil {
				err = perr
			}
		}
		switch {
		case errors.Is(err, net.ErrClosed):
			return fds, err
		case n == 0 && errors.Is(err, unix.ECONNRESET):
			return fds, io.EOF // it was killed before it read an answer of ours
		case err != nil && !errors.Is(err, io.EOF):
			return fds, fmt.Errorf("vhost-user: read: %w", err)
		case flags&unix.MSG_CTRUNC != 0 || len(fds) > maxRegions:
			return fds, fmt.Errorf("%w: more than %d file descriptors with one message", ErrProtocol, maxRegions)
		case k == 0 && n == 0:
			return fds, io.EOF
		case k == 0:
			return fds, fmt.Errorf("%w: connection ends within a header", ErrProtocol)
		}
		n += k
	}
	return fds, nil
}

// readBody reads what the header announces. Descriptors attached to payload
// bytes are dropped by the kernel, since nobody asks for them.
func (c *conn) readBody(hb []byte, fds int) (*message, error) {
	h, err := parseHeader(hb)
	if err != nil {
		return nil, err
	}
	p := c.buf[:h.size]
	if _, err := io.ReadFull(c.c, p); err != nil {
		return nil, fmt.Errorf("%w: %v: connection ends within the payload: %w", ErrProtocol, h.request, err)
	}
	return parse(h, p, fds)
}

func (c *conn) write(b []byte) error {
	if _, err := c.c.Write(b); err != nil {
		return fmt.Errorf("vhost-user: reply: %w", err)
	}
	return nil
}

// parseFDs returns the descriptors in a control message, also beside an error.
func parseFDs(oob []byte) ([]int, error) {
	cmsgs, err := unix.ParseSocketControlMessage(oob)
	if err != nil {
		return nil, fmt.Errorf("vhost-user: control message: %w", err)
	}
	var fds []int
	for _, m := range cmsgs {
		if m.Header.Level != unix.SOL_SOCKET || m.Header.Type != unix.SCM_RIGHTS {
			continue
		}
		got, err := unix.ParseUnixRights(&m)
		if err != nil {
			return fds, fmt.Errorf("vhost-user: control message: %w", err)
		}
		fds = append(fds, got...)
	}
	return fds, nil
}

// backendChannel is the channel on which this side sends requests.
type backendChannel struct {
	f *os.File
}

// newBackendChannel takes ownership of fd, a stream socket.
func newBackendChannel(fd int) (*backendChannel, error) {
	typ, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_TYPE)
	if err != nil || typ != unix.SOCK_STREAM {
		unix.Close(fd)
		return nil, fmt.Errorf("%w: the back-end channel is not a stream socket", ErrProtocol)
	}
	return &backendChannel{f: os.NewFile(uintptr(fd), "vhost-user back-end channel")}, nil
}

// configChanged sends VHOST_USER_BACKEND_CONFIG_CHANGE_MSG. It never blocks: on
// a full socket the front end has many such messages yet to read, and reads the
// configuration after each.
func (b *backendChannel) configChanged() error {
	var msg [headerSize]byte
	binary.LittleEndian.PutUint32(msg[:], backendConfigChange)
	binary.LittleEndian.PutUint32(msg[4:], flagVersion)
	rc, err := b.f.SyscallConn()
	if err != nil {
		return err
	}
	var serr error
	if err := rc.Control(func(fd uintptr) {
		_, serr = unix.SendmsgN(int(fd), msg[:], nil, nil, unix.MSG_DONTWAIT|unix.MSG_NOSIGNAL)
	}); err != nil {
		return err
	}
	if serr != nil && !errors.Is(serr, unix.EAGAIN) {
		return os.NewSyscallError("sendmsg", serr)
	}
	return nil
}

func (b *backendChannel) close() { b.f.Close() }
