// Package usernet is the network behind a guest's card, in user space and without
// privileges: what the guest sends to the world is sent by this process through the
// host's sockets, so that the host's routes, VPNs and firewall hold for it.
//
// The guest's side is gVisor's TCP/IP, which answers for every address there is. Each
// TCP connection ends there, and a socket of the host's is connected to the same place
// before the guest hears of an answer: refused is refused, unreachable is unreachable,
// and silence is silence. UDP flows and pings have a socket of the host's each as well.
//
// On the gateway's address are the host (Config.HostLoopback) and a DNS server,
// which asks the host's own.
//
// # Trust
//
// Frames come from a hostile guest. What they may cost is bounded: connections, flows,
// pings and questions by number, their buffers by what is waiting to be read. What
// they may reach is decided in policy.go, for each packet that begins something. Nothing
// listens on an address of the host.
package usernet

import (
	"context"
	"fmt"
	"net/netip"
	"sync"
	"time"

	"golang.org/x/sys/unix"
	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/header"
	"gvisor.dev/gvisor/pkg/tcpip/network/arp"
	"gvisor.dev/gvisor/pkg/tcpip/network/ipv4"
	"gvisor.dev/gvisor/pkg/tcpip/network/ipv6"
	"gvisor.dev/gvisor/pkg/tcpip/stack"
	"gvisor.dev/gvisor/pkg/tcpip/transport/icmp"
	"gvisor.dev/gvisor/pkg/tcpip/transport/tcp"
	"gvisor.dev/gvisor/pkg/tcpip/transport/udp"

	"github.com/wsl2/wsl2/vmm/usernet/policy"
)

// Config is a network.
type Config struct {
	// The two ends of the wire.
	GuestMAC, GatewayMAC [6]byte
	MTU                  uint16
	Guest4, Gateway4     netip.Addr
	Guest6, Gateway6     netip.Addr
	// HostLoopback lets the guest reach what listens on the host's loopback, at the
	// gateway's addresses.
	HostLoopback bool
	Policy       policy.Policy
	// BytesPerSecond is what the guest may send, and what it may receive; 0 is no limit.
	BytesPerSecond uint64
	DNS            DNSConfig
	// patience is with a guest that asks for a connection and does not go on; half a minute by default.
	patience time.Duration
	// Logf is told what an administrator might want to know. It must not block for long.
	Logf func(format string, args ...any)
}

// Network is one guest's network.
type Network struct {
	cfg    Config
	link   *link
	stack  *stack.Stack
	limits limits
	dns    *resolver
	log    limitedLog

	ctx    context.Context // ends with Serve
	cancel context.CancelFunc
	tasks  sync.WaitGroup // everything that Serve waits for

	handshakes handshakes

	mu    sync.Mutex
	ended bool // no task begins any more that the link's goroutine does not begin; guarded by mu
}

// begin counts a task that the stack has started by itself; false if it is too late for it.
func (n *Network) begin() bool {
	n.mu.Lock()
	defer n.mu.Unlock()
	if !n.ended {
		n.tasks.Add(1)
	}
	return !n.ended
}

// nic is the stack's only interface.
const nic = 1

// New returns a network for the guest's card at the other end of fd (package
// vmm/virtio/net says what is spoken there). Serve does the work.
func New(cfg Config, fd int) (*Network, error) {
	if cfg.Logf == nil {
		cfg.Logf = func(string, ...any) {}
	}
	if cfg.patience == 0 {
		cfg.patience = 30 * time.Second
	}
	n := &Network{cfg: cfg, limits: newLimits()}
	n.log.logf = cfg.Logf
	n.ctx, n.cancel = context.WithCancel(context.Background())
	n.dns = newResolver(n)
	var err error
	if n.link, err = newLink(fd, cfg); err != nil {
		n.cancel()
		return nil, err
	}
	n.stack = stack.New(stack.Options{
		NetworkProtocols:   []stack.NetworkProtocolFactory{ipv4.NewProtocol, ipv6.NewProtocol, arp.NewProtocol},
		TransportProtocols: []stack.TransportProtocolFactory{tcp.NewProtocol, udp.NewProtocol, icmp.NewProtocol4, icmp.NewProtocol6},
	})
	if err := n.configure(); err != nil {
		n.cancel()
		n.stack.Destroy()
		return nil, err
	}
	return n, nil
}

// Bounds of a connection's buffers in the stack; windows grow within them as a
// connection needs it.
const (
	minBuffer     = 4 << 10
	defaultBuffer = 1 << 20
	maxBuffer     = 4 << 20
)

// bufferOf is the fixed size of each of a connection's two buffers, of which there are so many by then; 0
// for one whose windows grow as it needs it. All together may hold 2 GB, whatever guest and peers do: the first
// few as much as they like, and no more of any kind than its bound, for a place is free only if
// the number says so.
func bufferOf(connections int) int64 {
	switch {
	case connections <= 64:
		return 0
	case connections <= 1024:
		return 256 << 10
	}
	return 32 << 10
}

func (n *Network) configure() error {
	s := n.stack
	if err := s.CreateNIC(nic, n.link); err != nil {
		return stackError("make the card", err)
	}
	for _, a := range []struct {
		proto          tcpip.NetworkProtocolNumber
		gateway, guest netip.Addr
	}{{ipv4.ProtocolNumber, n.cfg.Gateway4, n.cfg.Guest4}, {ipv6.ProtocolNumber, n.cfg.Gateway6, n.cfg.Guest6}} {
		own := tcpip.ProtocolAddress{Protocol: a.proto, AddressWithPrefix: address(a.gateway).addr().WithPrefix()}
		if err := s.AddProtocolAddress(nic, own, stack.AddressProperties{}); err != nil {
			return stackError("give the gateway its address", err)
		}
		// Who the guest is, is known: no packet waits for it to say so.
		if err := s.AddStaticNeighbor(nic, a.proto, address(a.guest).addr(), tcpip.LinkAddress(n.cfg.GuestMAC[:])); err != nil {
			return stackError("name the guest", err)
		}
	}
	// By way of the guest, which routes for the network namespaces in it.
	s.SetRouteTable([]tcpip.Route{
		{Destination: header.IPv4EmptySubnet, Gateway: address(n.cfg.Guest4).addr(), NIC: nic},
		{Destination: header.IPv6EmptySubnet, Gateway: address(n.cfg.Guest6).addr(), NIC: nic},
	})
	// It answers for every address, and under every address.
	if err := s.SetPromiscuousMode(nic, true); err != nil {
		return stackError("open the card", err)
	}
	if err := s.SetSpoofing(nic, true); err != nil {
		return stackError("open the card", err)
	}
	sack, moderate := tcpip.TCPSACKEnabled(true), tcpip.TCPModerateReceiveBufferOption(true)
	for _, o := range []tcpip.SettableTransportProtocolOption{
		&sack, &moderate,
		&tcpip.TCPReceiveBufferSizeRangeOption{Min: minBuffer, Default: defaultBuffer, Max: maxBuffer},
		&tcpip.TCPSendBufferSizeRangeOption{Min: minBuffer, Default: defaultBuffer, Max: maxBuffer},
	} {
		if err := s.SetTransportProtocolOption(tcp.ProtocolNumber, o); err != nil {
			return stackError("set up TCP", err)
		}
	}
	forwarder := tcp.NewForwarder(s, 0, 2*maxHandshakes, n.connectTCP)
	s.SetTransportProtocolHandler(tcp.ProtocolNumber, n.handshakes.remember(n.ctx, forwarder.HandlePacket))
	s.SetTransportProtocolHandler(udp.ProtocolNumber, n.connectUDP)
	s.SetTransportProtocolHandler(icmp.ProtocolNumber4, n.ping)
	s.SetTransportProtocolHandler(icmp.ProtocolNumber6, n.ping)
	return nil
}

func stackError(what string, err tcpip.Error) error { return fmt.Errorf("usernet: %s: %s", what, err) }

// Serve moves packets until ctx ends or the guest's card has gone, both of which
// return nil. The descriptor given to New is closed when it returns.
func (n *Network) Serve(ctx context.Context) error {
	stop := context.AfterFunc(ctx, n.link.shutdown)
	err := n.link.serve()
	stop()
	n.cancel()
	n.mu.Lock()
	n.ended = true
	n.mu.Unlock()
	n.link.shutdown()
	// Ends every connection with the guest, and with that what waits for one.
	n.stack.Destroy()
	n.tasks.Wait()
	n.link.close()
	return err
}

// address is a netip.Addr on its way to the stack.
type address netip.Addr

func (a address) addr() tcpip.Address { return tcpip.AddrFromSlice(netip.Addr(a).AsSlice()) }

// addrPort is the other way.
func addrPort(a tcpip.Address, port uint16) netip.AddrPort {
	ip, _ := netip.AddrFromSlice(a.AsSlice())
	return netip.AddrPortFrom(ip, port)
}

// limits are what all flows of the guest together may use of the host.
type limits struct {
	tcp, udp, pings, questions chan struct{}
}

const (
	// maxHandshakes is how many connections may wait for their peers at a time, see handshakes.
	maxHandshakes = 1024
	maxTCP        = 16 << 10
	maxUDP        = 4 << 10
	maxPings      = 128
	maxQuestions  = 256

	// spareFiles are descriptors for what is no flow.
	spareFiles = 64
)

// newLimits shares the descriptors that the process may have: each flow takes one.
// (The Go runtime has raised the soft limit to the hard one.)
func newLimits() limits {
	files := uint64(maxTCP + maxUDP + maxPings + maxQuestions)
	var l unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &l); err == nil && l.Cur < files+spareFiles {
		files = max(l.Cur, 2*spareFiles) - spareFiles
	}
	part := func(most int) chan struct{} {
		return make(chan struct{}, max(1, uint64(most)*files/(maxTCP+maxUDP+maxPings+maxQuestions)))
	}
	return limits{tcp: part(maxTCP), udp: part(maxUDP), pings: part(maxPings), questions: part(maxQuestions)}
}

// take tries to get one of a limited number; the result gives it back, and is nil if
// there is none left.
func take(limit chan struct{}) (release func()) {
	select {
	case limit <- struct{}{}:
		return func() { <-limit }
	default:
		return nil
	}
}
