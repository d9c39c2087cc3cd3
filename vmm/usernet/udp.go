package usernet

import (
	"context"
	"errors"
	"net"
	"net/netip"
	"os"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/checksum"
	"gvisor.dev/gvisor/pkg/tcpip/header"
	"gvisor.dev/gvisor/pkg/tcpip/stack"
	"gvisor.dev/gvisor/pkg/tcpip/transport/udp"
)

// How long a flow without packets is kept: as Linux's connection tracking does, longer
// once packets went both ways (nf_conntrack_udp_timeout, _stream).
const (
	udpTimeout       = 30 * time.Second
	udpStreamTimeout = 120 * time.Second
)

// connectUDP is called by the stack for the first packet of each flow of the guest's,
// on the goroutine that reads all frames: it must not block.
func (n *Network) connectUDP(id stack.TransportEndpointID, pkt *stack.PacketBuffer) (handled bool) {
	dst := addrPort(id.LocalAddress, id.LocalPort)
	to, v := n.decide(dst)
	switch v {
	case silent:
		n.nobody(dst.Addr(), quote(pkt))
		return true
	case local:
		n.serveDNSPacket(id, pkt)
		return true
	case prohibit:
		if dst.Addr().IsMulticast() || dst.Addr() == broadcast {
			return true // announcements, which nobody misses
		}
		n.refused("UDP", dst)
		n.unreachable(n.gateway(dst.Addr()), quote(pkt), prohibited)
		return true
	}
	release := take(n.limits.udp)
	if release == nil {
		n.log.printf("dropped: UDP to %v: the guest has %d flows, as many as it may", dst, cap(n.limits.udp))
		return true
	}
	g := &guestConn{}
	first := pkt.Clone()
	defer first.DecRef()
	ep, err := udp.NewForwarderRequest(n.stack, id, first).CreateEndpoint(&g.queue)
	if err != nil {
		release()
		return true // the flow exists by now, or the packet was damaged
	}
	g.ep = ep
	orig := quote(pkt)
	n.tasks.Go(func() {
		defer release()
		defer ep.Close()
		n.relayUDP(g, dst.Addr(), to, orig)
	})
	return true
}

var broadcast = netip.AddrFrom4([4]byte{255, 255, 255, 255})

// relayUDP carries a flow with peer, which is at to for us, until nothing has come for some time, or the host's socket
// fails. Its errors, a closed port for example, are the guest's to know.
func (n *Network) relayUDP(g *guestConn, peer netip.Addr, to netip.AddrPort, orig []byte) {
	ctx, cancel := context.WithCancelCause(n.ctx)
	defer cancel(nil)
	host, err := dialUDP(ctx, to)
	if err != nil {
		n.udpError(err, peer, orig)
		return
	}
	defer host.Close()
	stop := context.AfterFunc(ctx, func() { _ = host.SetDeadline(time.Unix(1, 0)) })
	defer stop()

	// The timer ends the flow; activity puts it off.
	var answered atomic.Bool
	timer := time.AfterFunc(udpTimeout, func() { cancel(errIdle) })
	defer timer.Stop()
	active := func() {
		if answered.Load() {
			timer.Reset(udpStreamTimeout)
		} else {
			timer.Reset(udpTimeout)
		}
	}
	var up sync.WaitGroup
	up.Go(func() {
		for {
			b, size, err := g.readSome(ctx)
			if err != nil {
				cancel(err)
				return
			}
			active()
			_, err = host.Write((*b)[:size])
			chunks.Put(b)
			// An error may be about a packet before. The flow goes on: a server that
			// starts later is found by the next packet.
			n.udpError(err, peer, orig)
		}
	})
	defer up.Wait()
	defer cancel(nil)
	rc, err := host.SyscallConn()
	if err != nil {
		return
	}
	for {
		b, size, err := recvSome(rc)
		if err != nil {
			if _, ok := reasonOf(err); ok {
				n.udpError(err, peer, orig)
				continue
			}
			return
		}
		answered.Store(true)
		active()
		r := payload((*b)[:size])
		_, werr := g.ep.Write(&r, tcpip.WriteOptions{})
		chunks.Put(b)
		if _, full := werr.(*tcpip.ErrNoBufferSpace); werr != nil && !full {
			if _, again := werr.(*tcpip.ErrWouldBlock); !again {
				return
			}
		}
	}
}

// dialUDP connects a socket, which waits for nobody. The net package lets every socket broadcast; the guest is not to reach all
// of the host's network at once.
func dialUDP(ctx context.Context, to netip.AddrPort) (*net.UDPConn, error) {
	d := net.Dialer{Control: func(_, _ string, c syscall.RawConn) (err error) {
		err2 := c.Control(func(fd uintptr) { err = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_BROADCAST, 0) })
		return errors.Join(os.NewSyscallError("setsockopt", err), err2)
	}}
	c, err := d.DialContext(ctx, "udp", to.String())
	if err != nil {
		return nil, err
	}
	return c.(*net.UDPConn), nil
}

var errIdle = errors.New("no packets for some time")

func (n *Network) udpError(err error, peer netip.Addr, orig []byte) {
	why, ok := reasonOf(err)
	if !ok {
		return
	}
	from := n.gateway(peer)
	if why == noPort {
		from = peer // it is there
	}
	n.unreachable(from, orig, why)
}

// sendUDP sends a datagram back to where a packet of the guest's came from; one that is too large
// is lost.
func (n *Network) sendUDP(id stack.TransportEndpointID, data []byte) {
	ip := header.IPv4MinimumSize
	if id.LocalAddress.Len() == header.IPv6AddressSize {
		ip = header.IPv6MinimumSize
	}
	size := header.UDPMinimumSize + len(data)
	if ip+size > int(n.cfg.MTU) {
		return
	}
	p := append(make([]byte, ip+header.UDPMinimumSize, ip+size), data...)
	h := header.UDP(p[ip:])
	h.Encode(&header.UDPFields{SrcPort: id.LocalPort, DstPort: id.RemotePort, Length: uint16(size)})
	sum := header.PseudoHeaderChecksum(header.UDPProtocolNumber, id.LocalAddress, id.RemoteAddress, uint16(size))
	c := ^checksum.Checksum(h, sum)
	if c == 0 { // which would say that there is none (RFC 768)
		c = 0xffff
	}
	h.SetChecksum(c)
	from := addrPort(id.LocalAddress, 0).Addr()
	if from.Is4() {
		n.send4(from, id.RemoteAddress, header.UDPProtocolNumber, p)
		return
	}
	n.send6(from, id.RemoteAddress, header.UDPProtocolNumber, p)
}
