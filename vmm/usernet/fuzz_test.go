package usernet

import (
	"math/rand/v2"
	"net/netip"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	"gvisor.dev/gvisor/pkg/buffer"
	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/checksum"
	"gvisor.dev/gvisor/pkg/tcpip/header"

	"github.com/wsl2/wsl2/vmm/virtio/net"
)

// isolated is a network from which nothing leads to the host.
func isolated(t testing.TB) *guest {
	return newGuest(t, func(c *Config) { c.Policy.Restricted, c.HostLoopback = true, false })
}

// packet4 is an Ethernet frame with an IPv4 packet of the guest's.
func packet4(to string, proto uint8, body []byte) []byte {
	c := testConfig()
	b := make([]byte, header.EthernetMinimumSize+header.IPv4MinimumSize, header.EthernetMinimumSize+header.IPv4MinimumSize+len(body))
	header.Ethernet(b).Encode(&header.EthernetFields{SrcAddr: string2mac(c.GuestMAC), DstAddr: string2mac(c.GatewayMAC), Type: header.IPv4ProtocolNumber})
	h := header.IPv4(b[header.EthernetMinimumSize:])
	h.Encode(&header.IPv4Fields{TotalLength: uint16(header.IPv4MinimumSize + len(body)), TTL: 64, Protocol: proto,
		SrcAddr: address(c.Guest4).addr(), DstAddr: address(netip.MustParseAddr(to)).addr()})
	h.SetChecksum(^h.CalculateChecksum())
	return append(b, body...)
}

func string2mac(m [6]byte) tcpip.LinkAddress { return tcpip.LinkAddress(m[:]) }

// syn is a TCP segment that asks for a connection.
func syn(from uint16, to string) []byte { return segment(from, to, header.TCPFlagSyn) }

// segment is one with these flags, and nothing else of use.
func segment(from uint16, to string, flags header.TCPFlags) []byte {
	dst := netip.MustParseAddrPort(to)
	b := make([]byte, header.TCPMinimumSize)
	h := header.TCP(b)
	h.Encode(&header.TCPFields{SrcPort: from, DstPort: dst.Port(), SeqNum: 1, DataOffset: header.TCPMinimumSize, Flags: flags, WindowSize: 65535})
	sum := header.PseudoHeaderChecksum(header.TCPProtocolNumber, address(testConfig().Guest4).addr(), address(dst.Addr()).addr(), uint16(len(b)))
	h.SetChecksum(^h.CalculateChecksum(sum))
	return packet4(dst.Addr().String(), uint8(header.TCPProtocolNumber), b)
}

func udpPacket(to string, body []byte) []byte {
	dst := netip.MustParseAddrPort(to)
	b := make([]byte, header.UDPMinimumSize, header.UDPMinimumSize+len(body))
	header.UDP(b).Encode(&header.UDPFields{SrcPort: 5000, DstPort: dst.Port(), Length: uint16(header.UDPMinimumSize + len(body))})
	return packet4(dst.Addr().String(), uint8(header.UDPProtocolNumber), append(b, body...))
}

func echoRequest(to string) []byte {
	b := []byte{8, 0, 0, 0, 0, 1, 0, 1, 'x'}
	h := header.ICMPv4(b)
	h.SetChecksum(^checksum.Checksum(b, 0))
	return packet4(to, uint8(header.ICMPv4ProtocolNumber), b)
}

// frame sends a frame as it is.
func (g *guest) frame(frame []byte) {
	g.t.Helper()
	var raw [net.HeaderLen]byte
	for end := time.Now().Add(deadline); ; {
		_, err := unix.Write(g.link.fd, append(raw[:], frame...))
		if err == nil {
			return
		}
		// The link's own timeout: the network has much to do.
		if err != unix.EAGAIN || time.Now().After(end) {
			g.t.Fatal(err)
		}
	}
}

// FuzzFrame: no frame of the guest's brings the network down. (Its parser is gVisor's,
// which has no such target for what we use of it.)
func FuzzFrame(f *testing.F) {
	f.Add(syn(1, "10.77.0.1:80"))
	f.Add(syn(1, "192.0.2.1:80"))
	f.Add(udpPacket("10.77.0.1:53", []byte{0, 1, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 1}))
	f.Add(udpPacket("192.0.2.1:1", []byte("x")))
	f.Add(echoRequest("10.77.0.1"))
	f.Add(echoRequest("127.0.0.1"))
	f.Add(append(append([]byte{0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 2, 0, 0, 0, 0, 2, 8, 6}, 0, 1, 8, 0, 6, 4, 0, 1), make([]byte, 20)...))
	f.Add(append([]byte{2, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 2, 0x86, 0xdd, 0x60, 0, 0, 0, 0, 8, 58, 255}, make([]byte, 40)...))
	g := isolated(f)
	f.Fuzz(func(t *testing.T, frame []byte) {
		if len(frame) > net.MaxFrame {
			return
		}
		g.net.link.deliver(buffer.MakeWithData(frame))
	})
}

// TestGarbage floods the network with frames that are none, and with damaged ones; it still
// answers, and holds no more than before.
func TestGarbage(t *testing.T) {
	g := isolated(t)
	r := rand.New(rand.NewPCG(1, 2))
	seeds := [][]byte{syn(1, "10.77.0.1:80"), syn(1, "192.0.2.1:80"), udpPacket("10.77.0.1:53", []byte("no question")), echoRequest("10.77.0.1")}
	for i := range 5000 {
		frame := append([]byte(nil), seeds[r.IntN(len(seeds))]...)
		if i%3 == 0 {
			frame = make([]byte, r.IntN(2000))
			for k := range frame {
				frame[k] = byte(r.Uint32())
			}
			copy(frame, seeds[0][:header.EthernetMinimumSize+r.IntN(20)])
		} else {
			for range 1 + r.IntN(4) {
				frame[header.EthernetMinimumSize+r.IntN(len(frame)-header.EthernetMinimumSize)] = byte(r.Uint32())
			}
		}
		g.frame(frame)
	}
	if err := g.ping("10.77.0.1"); err != nil {
		t.Error(err)
	}
	// One to where nobody is may just be on its way.
	eventually(t, "there are no connections", func() bool { return len(g.net.limits.tcp) == 0 })
}

// TestSYNFlood: connections that are asked for and never made are bounded, and so is
// what is remembered of them. Others are served again when they have been given up.
func TestSYNFlood(t *testing.T) {
	g := newGuest(t, func(c *Config) { c.patience = time.Second })
	port := listen(t, "127.0.0.1:0", echo)
	// To a port that accepts, from addresses that will not go on: the guest's stack
	// resets what it does not know, so they are of nobody.
	to := netip.AddrPortFrom(g.net.cfg.Gateway4, uint16(port)).String()
	for i := range 4 * maxHandshakes {
		frame := syn(uint16(1024+i), to)
		h := header.IPv4(frame[header.EthernetMinimumSize:])
		h.SetSourceAddress(address(netip.AddrFrom4([4]byte{10, 77, 0, byte(10 + i%200)})).addr())
		g.frame(frame)
	}
	if err := g.ping("10.77.0.1"); err != nil {
		t.Error(err)
	}
	held := func() int {
		g.net.handshakes.mu.Lock()
		defer g.net.handshakes.mu.Unlock()
		return len(g.net.handshakes.open)
	}
	if n := held(); n > 2*maxHandshakes {
		t.Errorf("%d packets are held", n)
	}
	eventually(t, "the connections are given up", func() bool { return len(g.net.limits.tcp) == 0 && held() == 0 })
	eventually(t, "others are served again", func() bool { // one that takes longer than patience is given up as well
		c, err := g.dial(to)
		if err == nil {
			c.Close()
		}
		return err == nil
	})
}

// TestSegmentsAtGivingUp: what the guest sends to a connection at the moment at which it is given up does no harm.
func TestSegmentsAtGivingUp(t *testing.T) {
	g := newGuest(t, func(c *Config) { c.patience = time.Second })
	port := listen(t, "127.0.0.1:0", echo)
	to := netip.AddrPortFrom(g.net.cfg.Gateway4, uint16(port)).String()
	const connections = 100
	send := func(flags header.TCPFlags) {
		for i := range connections {
			frame := segment(uint16(1024+i), to, flags)
			h := header.IPv4(frame[header.EthernetMinimumSize:])
			h.SetSourceAddress(address(netip.AddrFrom4([4]byte{10, 77, 0, 10})).addr())
			g.frame(frame)
		}
	}
	send(header.TCPFlagSyn)
	eventually(t, "the connections are half open", func() bool { return len(g.net.limits.tcp) > 0 })
	eventually(t, "the connections are given up", func() bool {
		send(header.TCPFlagAck) // of nothing that was sent: it is reset, and the connection as before
		return len(g.net.limits.tcp) == 0
	})
}

// TestServeEndsHalfOpen: who waits for a guest that does not go on does not keep the network
// from ending.
func TestServeEndsHalfOpen(t *testing.T) {
	port := listen(t, "127.0.0.1:0", echo)
	pair := socketpair(t)
	n, err := New(testConfig(), pair[0])
	if err != nil {
		t.Fatal(err)
	}
	n.cfg.HostLoopback = true
	ended := make(chan error, 1)
	go func() { ended <- n.Serve(t.Context()) }()
	var raw [net.HeaderLen]byte
	if _, err := unix.Write(pair[1], append(raw[:], syn(1, netip.AddrPortFrom(n.cfg.Gateway4, uint16(port)).String())...)); err != nil {
		t.Fatal(err)
	}
	// The SYN-ACK: it is half open now.
	if k, err := unix.Read(pair[1], make([]byte, 1<<16)); err != nil || k == 0 {
		t.Fatal(k, err)
	}
	unix.Close(pair[1])
	select {
	case err := <-ended:
		if err != nil {
			t.Error(err)
		}
	case <-time.After(deadline):
		t.Error("Serve goes on")
	}
}
