package session

import (
	"io"
	"net"
	"testing"
	"time"

	"github.com/wsl2/wsl2/internal/forward"
	"github.com/wsl2/wsl2/internal/wire"
)

// dialPort asks for a port of the distro and returns the connection and the answer.
func dialPort(r *rig, m wire.DialPort) (*net.UnixConn, wire.Message) {
	r.t.Helper()
	c := r.dial(wire.RolePort, wire.SessionID{})
	must(r.t, wire.Write(c, &m))
	answer, err := wire.Read(c)
	must(r.t, err)
	return c, answer
}

func portOf(a net.Addr) uint16 {
	if t, ok := a.(*net.TCPAddr); ok {
		return t.AddrPort().Port()
	}
	return a.(*net.UDPAddr).AddrPort().Port()
}

// TestPort: TCP and UDP servers of the distro, at both loopback addresses, and none at all.
func TestPort(t *testing.T) {
	r := newRig(t)
	for _, address := range []string{"127.0.0.1:0", "[::1]:0"} {
		v6 := address[0] == '['
		l, err := net.Listen("tcp", address)
		must(t, err)
		c, answer := dialPort(r, wire.DialPort{V6: v6, Number: portOf(l.Addr())})
		if _, ok := answer.(*wire.Started); !ok {
			t.Fatalf("%s: %+v", address, answer)
		}
		server, err := l.Accept()
		must(t, err)
		io.WriteString(c, "question")
		must(t, c.CloseWrite())
		if text, err := io.ReadAll(server); err != nil || string(text) != "question" {
			t.Errorf("%q, %v", text, err)
		}
		io.WriteString(server, "answer")
		server.Close()
		if text, err := io.ReadAll(c); err != nil || string(text) != "answer" {
			t.Errorf("%q, %v", text, err)
		}
		l.Close()
		_, answer = dialPort(r, wire.DialPort{V6: v6, Number: portOf(l.Addr())})
		if f, ok := answer.(*wire.Failed); !ok || f.Code != wire.CodeRefused {
			t.Errorf("nobody listens: %+v", answer)
		}

		p, err := net.ListenPacket("udp", address)
		must(t, err)
		defer p.Close()
		c, answer = dialPort(r, wire.DialPort{UDP: true, V6: v6, Number: portOf(p.LocalAddr())})
		if _, ok := answer.(*wire.Started); !ok {
			t.Fatalf("%s: %+v", address, answer)
		}
		must(t, forward.WriteDatagram(c, make([]byte, 16), []byte("ping")))
		p.SetDeadline(time.Now().Add(limit))
		buf := make([]byte, 16)
		n, from, err := p.ReadFrom(buf)
		if err != nil || string(buf[:n]) != "ping" {
			t.Fatalf("%q, %v", buf[:n], err)
		}
		_, err = p.WriteTo([]byte("pong"), from)
		must(t, err)
		if d, err := forward.ReadDatagram(c, buf); err != nil || string(d) != "pong" {
			t.Errorf("%q, %v", d, err)
		}
		// It stays open: the end of the distro (newRig) must not wait for it.
	}
	c := r.dial(wire.RolePort, wire.SessionID{})
	must(t, wire.Write(c, &wire.Resize{}))
	if m, err := wire.Read(c); err != nil || m.Type() != wire.TypeFailed {
		t.Errorf("no DialPort: %+v, %v", m, err)
	}
}
