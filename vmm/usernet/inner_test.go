package usernet

import (
	"context"
	"fmt"
	"io"
	"net"
	"net/netip"
	"strings"
	"testing"
	"time"

	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/adapters/gonet"
	"gvisor.dev/gvisor/pkg/tcpip/stack"
)

// TestInnerAddress: a guest that routes for others has network for them: connections, datagrams and what
// is refused come back to the address that sent.
func TestInnerAddress(t *testing.T) {
	g := newGuest(t, nil)
	inner := map[bool]netip.Addr{true: netip.MustParseAddr("10.77.0.9"), false: netip.MustParseAddr("fd77::9")}
	for _, a := range inner {
		own := tcpip.ProtocolAddress{Protocol: proto(a), AddressWithPrefix: address(a).addr().WithPrefix()}
		if err := g.stack.AddProtocolAddress(1, own, stack.AddressProperties{}); err != nil {
			t.Fatal(err)
		}
	}
	for host, gateway := range map[string]netip.Addr{"127.0.0.1": g.net.cfg.Gateway4, "[::1]": g.net.cfg.Gateway6} {
		local := full(netip.AddrPortFrom(inner[gateway.Is4()], 0))
		to := full(netip.AddrPortFrom(gateway, uint16(listen(t, host+":0", echo))))
		ctx, cancel := context.WithTimeout(t.Context(), deadline)
		defer cancel()
		c, err := gonet.DialTCPWithBind(ctx, g.stack, local, to, proto(gateway))
		if err != nil {
			t.Fatalf("TCP to %v: %v", gateway, err)
		}
		c.SetDeadline(time.Now().Add(deadline)) //nolint:errcheck // it has one
		echoes(t, c, random(1<<20))

		// A port that is closed: only an ICMP error can tell.
		s, err := net.ListenPacket("udp", host+":0")
		if err != nil {
			t.Fatal(err)
		}
		s.Close()
		to.Port = netip.MustParseAddrPort(s.LocalAddr().String()).Port()
		u, err := gonet.DialUDP(g.stack, &local, &to, proto(gateway))
		if err != nil {
			t.Fatal(err)
		}
		defer u.Close()
		eventually(t, fmt.Sprintf("a refusal by %v", gateway), func() bool { _, err = u.Write([]byte("x")); return err != nil })
		if !strings.Contains(err.Error(), "refused") {
			t.Errorf("UDP to a closed port of %v: %v", gateway, err)
		}

		// And one that is not.
		if s, err = net.ListenPacket("udp", host+":0"); err != nil {
			t.Fatal(err)
		}
		defer s.Close()
		go func() {
			b := make([]byte, 16)
			if n, from, err := s.ReadFrom(b); err == nil {
				s.WriteTo(b[:n], from) //nolint:errcheck // what does not come back is missed
			}
		}()
		to.Port = netip.MustParseAddrPort(s.LocalAddr().String()).Port()
		d, err := gonet.DialUDP(g.stack, &local, &to, proto(gateway))
		if err != nil {
			t.Fatal(err)
		}
		defer d.Close()
		d.SetDeadline(time.Now().Add(deadline)) //nolint:errcheck // it has one
		b := make([]byte, 16)
		if _, err := io.WriteString(d, "ping"); err != nil {
			t.Fatal(err)
		}
		if n, err := d.Read(b); err != nil || string(b[:n]) != "ping" {
			t.Errorf("UDP to %v: %q, %v", gateway, b[:n], err)
		}
	}
}
