// Package port listens for the launcher: on a vsock port in a VM, on the socket that was handed
// over where there is no VM.
package port

import (
	"bytes"
	"fmt"
	"io"
	"net"
	"os"

	"github.com/mdlayher/vsock"
	"golang.org/x/sys/unix"

	"github.com/wsl2/wsl2/internal/nsinit"
)

// Conn is what the connections of both have in common.
type Conn interface {
	net.Conn
	CloseRead() error
	CloseWrite() error
}

// Listen listens on a port. Its connections are Conns.
func Listen(port uint32) (net.Listener, error) {
	if port != nsinit.Port {
		l, err := vsock.ListenContextID(unix.VMADDR_CID_ANY, port, nil)
		if err != nil {
			return nil, fmt.Errorf("listen on vsock port %d: %w", port, err)
		}
		return l, nil
	}
	f := os.NewFile(nsinit.ListenerFD, "listener")
	defer f.Close() // FileListener has one of its own
	l, err := net.FileListener(f)
	if err != nil {
		return nil, fmt.Errorf("listen on the launcher's socket: %w", err)
	}
	return monitor{l.(*net.UnixListener)}, nil
}

// monitor accepts connections as the VM's monitor does: whoever connects says which port it
// wants, and is told when it has been accepted.
type monitor struct{ *net.UnixListener }

func (l monitor) Accept() (net.Conn, error) {
	c, err := l.AcceptUnix()
	if err != nil {
		return nil, err
	}
	return &conn{UnixConn: c}, nil
}

// conn answers the port's line at its first Read, for which the one goroutine that owns it
// then has the time.
type conn struct {
	*net.UnixConn
	open bool
}

func (c *conn) Read(p []byte) (int, error) {
	if !c.open {
		if err := c.accept(); err != nil {
			return 0, err
		}
		c.open = true
	}
	return c.UnixConn.Read(p)
}

// maxLine is that of "CONNECT 4294967295\n".
const maxLine = 19

// accept reads the line and nothing behind it: a process that is given the descriptor has to
// find the rest there.
func (c *conn) accept() error {
	line := make([]byte, 0, maxLine)
	for {
		n, err := c.peek(line[len(line):maxLine])
		if err != nil {
			return err
		}
		if i := bytes.IndexByte(line[len(line):len(line)+n], '\n'); i >= 0 {
			n = i + 1
		}
		if _, err := io.ReadFull(c.UnixConn, line[len(line):len(line)+n]); err != nil {
			return err
		}
		line = line[:len(line)+n]
		switch {
		case line[len(line)-1] == '\n':
			var port uint32
			if _, err := fmt.Sscanf(string(line), "CONNECT %d\n", &port); err != nil {
				return fmt.Errorf("a connection begins with %q, not with CONNECT", line)
			}
			c.Write([]byte("OK 0\n")) //nolint:errcheck // who has gone already may have left more to read
			return nil
		case len(line) == maxLine:
			return fmt.Errorf("a connection begins with %q, not with CONNECT", line)
		}
	}
}

// peek waits for bytes and copies them without taking them.
func (c *conn) peek(p []byte) (n int, err error) {
	raw, err := c.SyscallConn()
	if err != nil {
		return 0, err
	}
	rerr := raw.Read(func(fd uintptr) bool {
		for {
			n, _, err = unix.Recvfrom(int(fd), p, unix.MSG_PEEK)
			if err != unix.EINTR {
				return err != unix.EAGAIN
			}
		}
	})
	switch {
	case rerr != nil:
		return 0, rerr
	case err != nil:
		return 0, os.NewSyscallError("recvfrom", err)
	case n == 0:
		return 0, io.EOF
	}
	return n, nil
}
