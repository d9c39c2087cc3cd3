package session

import (
	"fmt"
	"net"
	"time"

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
	if udp, ok := to.(*net.UDPConn); ok {
		s.buffers.RelayDatagrams(udp, c) //nolint:errcheck // see above
		return
	}
	from, ok := c.(forward.Conn)
	tcp, isTCP := to.(*net.TCPConn)
	if !ok || !isTCP {
		to.Close()
		s.cfg.Logf("BUG: a port's connection of type %T cannot be relayed", c)
		return
	}
	s.buffers.Relay(from, tcp) //nolint:errcheck // see above
}

// dialLoopback does not use net.Dialer: /init would link a resolver. Only a full backlog takes
// time here, which the kernel bounds (tcp_syn_retries).
func dialLoopback(m *wire.DialPort) (net.Conn, error) {
	ip := net.IP{127, 0, 0, 1}
	if m.V6 {
		ip = net.IPv6loopback
	}
	if m.UDP {
		return net.DialUDP("udp", nil, &net.UDPAddr{IP: ip, Port: int(m.Number)})
	}
	return net.DialTCP("tcp", nil, &net.TCPAddr{IP: ip, Port: int(m.Number)})
}
