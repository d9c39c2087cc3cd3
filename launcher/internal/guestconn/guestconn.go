// Package guestconn connects to a guest port through the VMM's vsock socket.
package guestconn

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"net"
	"strconv"

	"github.com/wsl2/wsl2/internal/wire"
)

// Conn is a connection to a guest port through the VM's vsock socket. Reads
// skip the VMM's "OK N\n", which comes when the guest has accepted.
type Conn struct {
	*net.UnixConn
	accepted bool
	rest     []byte // read behind the OK line, not yet handed on
}

// errRefused says that nobody listens on the guest's port.
var errRefused = errors.New("the guest does not take the connection")

// Dial connects to port and sends Hello and, if it is not nil, Start. It waits for nobody: connect(2) fails where
// the VM's socket has no room, and a new connection has room for what is sent.
func Dial(vsockPath string, port uint32, hello wire.Hello, start *wire.Start) (*Conn, error) {
	c, err := net.DialUnix("unix", nil, &net.UnixAddr{Name: vsockPath, Net: "unix"})
	if err != nil {
		return nil, err
	}
	b := make([]byte, 0, 512)
	b = append(strconv.AppendUint(append(b, "CONNECT "...), uint64(port), 10), '\n')
	if b, err = wire.Append(b, &hello); err == nil && start != nil {
		b, err = wire.Append(b, start)
	}
	if err == nil {
		_, err = c.Write(b)
	}
	if err != nil {
		c.Close()
		return nil, err
	}
	return &Conn{UnixConn: c}, nil
}

// maxOKLine is longer than any "OK N\n".
const maxOKLine = 32

func (g *Conn) Read(p []byte) (int, error) {
	if len(g.rest) > 0 {
		n := copy(p, g.rest)
		g.rest = g.rest[n:]
		return n, nil
	}
	if g.accepted {
		return g.UnixConn.Read(p)
	}
	// The line is read in as few calls as it comes in, with what is behind it.
	line := make([]byte, 0, 512)
	for {
		n, err := g.UnixConn.Read(line[len(line):cap(line)])
		line = line[:len(line)+n]
		if i := bytes.IndexByte(line, '\n'); i >= 0 {
			if !bytes.HasPrefix(line, []byte("OK ")) {
				return 0, fmt.Errorf("unexpected answer %q of the VM", line[:i])
			}
			g.accepted, g.rest = true, line[i+1:]
			if len(g.rest) == 0 && err == nil {
				return g.UnixConn.Read(p)
			}
			n := copy(p, g.rest)
			g.rest = g.rest[n:]
			return n, nil
		}
		if err == io.EOF {
			return 0, errRefused
		}
		if err != nil {
			return 0, err
		}
		if len(line) > maxOKLine {
			return 0, fmt.Errorf("unexpected answer %q of the VM", line[:maxOKLine])
		}
	}
}

// Unread takes what was read but not handed on: from then on the connection itself may be read.
func (g *Conn) Unread() []byte {
	rest := g.rest
	g.rest = nil
	return rest
}

// ReadFrom and WriteTo of the embedded connection would bypass Read.
func (g *Conn) WriteTo(w io.Writer) (int64, error) {
	return io.Copy(w, struct{ io.Reader }{g})
}
