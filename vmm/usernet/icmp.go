package usernet

import (
	"encoding/binary"
	"errors"
	"net/netip"
	"os"
	"time"

	"golang.org/x/sys/unix"
	"gvisor.dev/gvisor/pkg/buffer"
	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/checksum"
	"gvisor.dev/gvisor/pkg/tcpip/header"
	"gvisor.dev/gvisor/pkg/tcpip/network/ipv4"
	"gvisor.dev/gvisor/pkg/tcpip/network/ipv6"
	"gvisor.dev/gvisor/pkg/tcpip/stack"
)

// pingTimeout is how long an answer to a ping may take.
const pingTimeout = 10 * time.Second

// quoted is what ICMP errors quote of a packet at most: its headers, and enough of
// what follows for its sender to know which connection is meant.
const quoted = 128

// quote copies the beginning of a packet that has been parsed.
func quote(pkt *stack.PacketBuffer) []byte {
	b := make([]byte, 0, quoted)
	for _, part := range [][]byte{pkt.NetworkHeader().Slice(), pkt.TransportHeader().Slice()} {
		b = append(b, part[:min(len(part), cap(b)-len(b))]...)
	}
	return b
}

// reason is why a packet did not get where it should.
type reason struct{ type4, code4, type6, code6 uint8 }

var (
	noRoute    = reason{3, 0, 1, 0}
	noHost     = reason{3, 1, 1, 3}
	noPort     = reason{3, 3, 1, 4}
	prohibited = reason{3, 13, 1, 1}
	expired    = reason{11, 0, 3, 0}
)

// reasonOf is what an error of the host's sockets means in ICMP; ok is false for
// one that says nothing about the way.
func reasonOf(err error) (r reason, ok bool) {
	switch {
	case errors.Is(err, unix.ECONNREFUSED):
		return noPort, true
	case errors.Is(err, unix.EHOSTUNREACH), errors.Is(err, unix.EHOSTDOWN):
		return noHost, true
	case errors.Is(err, unix.ENETUNREACH), errors.Is(err, unix.EADDRNOTAVAIL), errors.Is(err, unix.ENETDOWN):
		return noRoute, true
	case errors.Is(err, unix.EACCES), errors.Is(err, unix.EPERM):
		return prohibited, true
	}
	return reason{}, false
}

// unreachable tells the guest that the packet which begins with orig got no further.
// from is who says so: the gateway, or the peer itself.
func (n *Network) unreachable(from netip.Addr, orig []byte, r reason) {
	if len(orig) == 0 {
		return
	}
	if header.IPVersion(orig) == header.IPv4Version {
		p := make([]byte, header.IPv4MinimumSize+header.ICMPv4MinimumSize+len(orig))
		h := header.ICMPv4(p[header.IPv4MinimumSize:])
		h.SetType(header.ICMPv4Type(r.type4))
		h.SetCode(header.ICMPv4Code(r.code4))
		copy(h.Payload(), orig)
		h.SetChecksum(header.ICMPv4Checksum(h, 0))
		n.send4(from, header.IPv4(orig).SourceAddress(), header.ICMPv4ProtocolNumber, p)
		return
	}
	p := make([]byte, header.IPv6MinimumSize+header.ICMPv6ErrorHeaderSize+len(orig))
	h := header.ICMPv6(p[header.IPv6MinimumSize:])
	h.SetType(header.ICMPv6Type(r.type6))
	h.SetCode(header.ICMPv6Code(r.code6))
	copy(p[header.IPv6MinimumSize+header.ICMPv6ErrorHeaderSize:], orig)
	n.sendICMP6(from, header.IPv6(orig).SourceAddress(), p)
}

// nobody tells the guest that there is no such host on its wire. To all hosts there goes what nobody misses.
func (n *Network) nobody(dst netip.Addr, orig []byte) {
	if dst.Is4() && dst.As4()[3] == 255 {
		return
	}
	n.unreachable(n.gateway(dst), orig, noHost)
}

// send4 completes the IPv4 header at p's beginning and sends the packet.
func (n *Network) send4(from netip.Addr, to tcpip.Address, proto tcpip.TransportProtocolNumber, p []byte) {
	h := header.IPv4(p)
	h.Encode(&header.IPv4Fields{
		TotalLength: uint16(len(p)), TTL: 64, Protocol: uint8(proto),
		SrcAddr: address(from).addr(), DstAddr: to,
	})
	h.SetChecksum(^h.CalculateChecksum())
	n.raw(ipv4.ProtocolNumber, p)
}

// send6 completes the IPv6 header at p's beginning and sends the packet.
func (n *Network) send6(from netip.Addr, to tcpip.Address, proto tcpip.TransportProtocolNumber, p []byte) {
	header.IPv6(p).Encode(&header.IPv6Fields{
		PayloadLength: uint16(len(p) - header.IPv6MinimumSize), TransportProtocol: proto, HopLimit: 64, SrcAddr: address(from).addr(), DstAddr: to,
	})
	n.raw(ipv6.ProtocolNumber, p)
}

// sendICMP6 completes p, with an ICMPv6 message behind room for the IPv6 header, and sends it.
func (n *Network) sendICMP6(from netip.Addr, to tcpip.Address, p []byte) {
	body := p[header.IPv6MinimumSize:]
	h := header.ICMPv6(body)
	h.SetChecksum(0)
	sum := header.PseudoHeaderChecksum(header.ICMPv6ProtocolNumber, address(from).addr(), to, uint16(len(body)))
	h.SetChecksum(^checksum.Checksum(body, sum))
	n.send6(from, to, header.ICMPv6ProtocolNumber, p)
}

func (n *Network) raw(proto tcpip.NetworkProtocolNumber, p []byte) {
	// What does not fit is lost, like any ICMP.
	_ = n.stack.WritePacketToRemote(nic, tcpip.LinkAddress(n.cfg.GuestMAC[:]), proto, buffer.MakeWithData(p))
}

// ping handles ICMP that is for none of the stack's sockets; true if that is all that is
// to be done. Echo requests to the world are asked there; the gateway answers for itself.
func (n *Network) ping(id stack.TransportEndpointID, pkt *stack.PacketBuffer) bool {
	is4 := pkt.NetworkProtocolNumber == ipv4.ProtocolNumber
	icmp := pkt.TransportHeader().Slice()
	data := pkt.Data().AsRange().ToSlice()
	message := append(append(make([]byte, 0, len(icmp)+len(data)), icmp...), data...)
	const echo4, echo6 = 8, 128
	if len(message) < header.ICMPv4MinimumSize || is4 && message[0] != echo4 || !is4 && message[0] != echo6 {
		return true
	}
	dst := addrPort(id.LocalAddress, 0)
	to, v := n.decide(dst)
	if v == local {
		return false
	}
	orig := quote(pkt)
	switch v {
	case prohibit:
		n.refused("ping", dst)
		n.unreachable(n.gateway(dst.Addr()), orig, prohibited)
		return true
	case silent:
		n.nobody(dst.Addr(), orig)
		return true
	}
	release := take(n.limits.pings)
	if release == nil {
		return true
	}
	ttl := 64
	if is4 {
		ttl = int(header.IPv4(pkt.NetworkHeader().Slice()).TTL())
	} else {
		ttl = int(header.IPv6(pkt.NetworkHeader().Slice()).HopLimit())
	}
	n.tasks.Go(func() {
		defer release()
		n.echo(to.Addr(), id.RemoteAddress, message, ttl, orig)
	})
	return true
}

func (n *Network) gateway(like netip.Addr) netip.Addr {
	if like.Is4() {
		return n.cfg.Gateway4
	}
	return n.cfg.Gateway6
}

// echo asks a host, through an unprivileged ping socket, and passes its answer on.
func (n *Network) echo(dst netip.Addr, guest tcpip.Address, message []byte, ttl int, orig []byte) {
	f, err := pingSocket(dst, ttl)
	if err != nil {
		if errors.Is(err, errNoPings) {
			n.log.printf("no pings: this user may send none (sysctl net.ipv4.ping_group_range)")
			return
		}
		if r, ok := reasonOf(err); ok {
			n.unreachable(n.gateway(dst), orig, r)
		}
		return
	}
	defer f.Close()
	if err := f.SetDeadline(time.Now().Add(pingTimeout)); err != nil {
		return
	}
	// The kernel puts an identifier of its own in.
	ident := binary.BigEndian.Uint16(message[4:])
	if _, err = f.Write(message); err == nil {
		answer := make([]byte, len(message))
		var size int
		if size, err = f.Read(answer); err == nil && size >= header.ICMPv4MinimumSize {
			n.echoReply(dst, guest, ident, answer[:size])
			return
		}
	}
	if r, ok := reasonOf(err); ok {
		from := n.gateway(dst)
		if who, typ := f.blame(dst); who.IsValid() {
			from = who
			if dst.Is4() && typ == expired.type4 || dst.Is6() && typ == expired.type6 {
				r = expired
			}
		}
		n.unreachable(from, orig, r)
	}
}

func (n *Network) echoReply(from netip.Addr, guest tcpip.Address, ident uint16, answer []byte) {
	binary.BigEndian.PutUint16(answer[4:], ident)
	if from.Is4() {
		p := append(make([]byte, header.IPv4MinimumSize), answer...)
		h := header.ICMPv4(p[header.IPv4MinimumSize:])
		h.SetChecksum(0)
		h.SetChecksum(^checksum.Checksum(h, 0))
		n.send4(from, guest, header.ICMPv4ProtocolNumber, p)
		return
	}
	n.sendICMP6(from, guest, append(make([]byte, header.IPv6MinimumSize), answer...))
}

// errNoPings: no ping socket is to be had; EACCES later is about the address, that of all hosts of a network.
var errNoPings = errors.New("this user may send no pings")

// pingFile is a connected ping socket.
type pingFile struct{ *os.File }

func pingSocket(dst netip.Addr, ttl int) (_ *pingFile, err error) {
	domain, proto := unix.AF_INET, unix.IPPROTO_ICMP
	if dst.Is6() {
		domain, proto = unix.AF_INET6, unix.IPPROTO_ICMPV6
	}
	fd, err := unix.Socket(domain, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, proto)
	if err == unix.EACCES {
		return nil, errNoPings
	}
	if err != nil {
		return nil, os.NewSyscallError("socket", err)
	}
	defer func() {
		if err != nil {
			unix.Close(fd)
		}
	}()
	var peer unix.Sockaddr
	if dst.Is4() {
		peer = &unix.SockaddrInet4{Addr: dst.As4()}
		err = errors.Join(unix.SetsockoptInt(fd, unix.IPPROTO_IP, unix.IP_RECVERR, 1), unix.SetsockoptInt(fd, unix.IPPROTO_IP, unix.IP_TTL, max(ttl, 1)))
	} else {
		peer = &unix.SockaddrInet6{Addr: dst.As16()}
		err = errors.Join(unix.SetsockoptInt(fd, unix.IPPROTO_IPV6, unix.IPV6_RECVERR, 1), unix.SetsockoptInt(fd, unix.IPPROTO_IPV6, unix.IPV6_UNICAST_HOPS, max(ttl, 1)))
	}
	if err != nil {
		return nil, os.NewSyscallError("setsockopt", err)
	}
	if err := unix.Connect(fd, peer); err != nil {
		return nil, os.NewSyscallError("connect", err)
	}
	return &pingFile{os.NewFile(uintptr(fd), "ping")}, nil
}

// blame returns who sent the ICMP error that the socket met, and its type.
func (f *pingFile) blame(dst netip.Addr) (who netip.Addr, typ uint8) {
	rc, err := f.SyscallConn()
	if err != nil {
		return who, 0
	}
	oob := make([]byte, 256)
	var size int
	err2 := rc.Control(func(fd uintptr) {
		_, size, _, _, err = unix.Recvmsg(int(fd), nil, oob, unix.MSG_ERRQUEUE|unix.MSG_DONTWAIT)
	})
	if err != nil || err2 != nil {
		return who, 0
	}
	messages, err := unix.ParseSocketControlMessage(oob[:size])
	if err != nil {
		return who, 0
	}
	for _, m := range messages {
		// struct sock_extended_err, 16 bytes with the type at 5, then the offender's sockaddr.
		const errLen = 16
		const in4, in6 = errLen + 4, errLen + 8
		switch {
		case m.Header.Level == unix.SOL_IP && m.Header.Type == unix.IP_RECVERR && dst.Is4() && len(m.Data) >= in4+4:
			who = netip.AddrFrom4([4]byte(m.Data[in4:]))
		case m.Header.Level == unix.SOL_IPV6 && m.Header.Type == unix.IPV6_RECVERR && dst.Is6() && len(m.Data) >= in6+16:
			who = netip.AddrFrom16([16]byte(m.Data[in6:]))
		default:
			continue
		}
		if who.IsUnspecified() || who.IsLoopback() {
			return netip.Addr{}, 0
		}
		return who, m.Data[5]
	}
	return who, 0
}
