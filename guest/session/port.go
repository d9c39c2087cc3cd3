package session

import (
	"context"
	"fmt"
	"time"

	"github.com/mdlayher/socket"
	"golang.org/x/sys/unix"

	"github.com/wsl2/wsl2/internal/forward"
	"github.com/wsl2/wsl2/internal/wire"
)

// port connects c to a port of the distro (package forward).
func (s *Server) port(c conn) {
	m, err := wire.Read(c)
	dial, ok := m.(*wire.DialPort)
	if err != nil || !ok {
		s.refuse(c, fmt.Errorf("%w: no DialPort behind Hello (%v)", wire.ErrMalformed, err))
		return
	}
	defer c.Close()
	s.mu.Lock()
	s.ports[c] = struct{}{}
	s.mu.Unlock()
	defer func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		delete(s.ports, c)
	}()
	c.SetReadDeadline(time.Time{})                     //nolint:errcheck // a dead connection shows at the next read
	c.SetWriteDeadline(time.Now().Add(controlTimeout)) //nolint:errcheck // Write tells
	to, err := dialLoopback(dial)
	if err != nil {
		wire.Write(c, &wire.Failed{Code: wire.CodeRefused, Text: err.Error()}) //nolint:errcheck // the launcher may be gone
		return
	}
	if err := wire.Write(c, &wire.Started{}); err != nil {
		to.Close()
		return
	}
	c.SetWriteDeadline(time.Time{}) //nolint:errcheck // a dead connection shows at the next write
	// How it ends is its peers' business.
	from, ok := c.(forward.Conn)
	switch {
	case dial.UDP:
		s.buffers.RelayDatagrams(to, c) //nolint:errcheck // see above
	case ok:
		s.buffers.Relay(from, to) //nolint:errcheck // see above
	default:
		to.Close()
		s.cfg.Logf("BUG: a port's connection of type %T cannot be relayed", c)
	}
}

// dialTimeout bounds a connection over loopback, where only a full backlog takes time.
const dialTimeout = 2 * time.Minute

// dialLoopback does not use package net, of which /init would have to link TCP, UDP and a
// resolver.
func dialLoopback(m *wire.DialPort) (*socket.Conn, error) {
	family, to := unix.AF_INET, unix.Sockaddr(&unix.SockaddrInet4{Port: int(m.Number), Addr: [4]byte{127, 0, 0, 1}})
	if m.V6 {
		family, to = unix.AF_INET6, &unix.SockaddrInet6{Port: int(m.Number), Addr: [16]byte{15: 1}}
	}
	kind, name := unix.SOCK_STREAM, "tcp"
	if m.UDP {
		kind, name = unix.SOCK_DGRAM, "udp"
	}
	c, err := socket.Socket(family, kind, 0, name, nil)
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(context.Background(), dialTimeout)
	defer cancel()
	if _, err = c.Connect(ctx, to); err == nil && !m.UDP {
		err = c.SetsockoptInt(unix.IPPROTO_TCP, unix.TCP_NODELAY, 1)
	}
	if err != nil {
		c.Close()
		return nil, err
	}
	return c, nil
}
