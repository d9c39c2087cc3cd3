package usernet

import (
	"fmt"
	"net/netip"
	"sync"
	"time"

	"github.com/wsl2/wsl2/vmm/usernet/policy"
)

// verdict is what becomes of a packet that begins a flow.
type verdict int

const (
	forward  verdict = iota // to to
	local                   // to the stack's own address: echo, DNS
	silent                  // nobody would answer
	prohibit                // by policy: the guest is told
)

// decide says where a flow to dst goes. It is the only way to the host's sockets.
func (n *Network) decide(dst netip.AddrPort) (to netip.AddrPort, v verdict) {
	ip := dst.Addr()
	if ip.Is4In6() {
		return dst, silent // on no wire
	}
	if ip == n.cfg.Gateway4 || ip == n.cfg.Gateway6 {
		if dst.Port() == dnsPort || dst.Port() == 0 {
			return dst, local
		}
		// By its own name only: whoever answers for another one could make the host's loopback be its address.
		if !n.cfg.HostLoopback || !n.cfg.Policy.Permits(dst, policy.Names{Asked: []string{hostName}}) {
			return dst, prohibit
		}
		loopback := netip.AddrFrom4([4]byte{127, 0, 0, 1})
		if ip.Is6() {
			loopback = netip.IPv6Loopback()
		}
		return netip.AddrPortFrom(loopback, dst.Port()), forward
	}
	switch {
	case policy.Guarded(ip):
		if n.cfg.Policy.AllowsGuarded(dst) {
			return dst, forward
		}
		return dst, prohibit
	case !routable(ip):
		return dst, prohibit
	case n.ours(ip):
		return dst, silent
	case !n.permits(dst):
		return dst, prohibit
	}
	return dst, forward
}

// routable tells whether an address is one that networks carry packets to, whatever is there: none of
// loopback, multicast and the like, nor a form of IPv6 for such a one of IPv4.
func routable(ip netip.Addr) bool {
	if in, ok := policy.Embedded(ip); ok {
		return routable(in) && !policy.Guarded(in)
	}
	if ip.Is4() {
		return ip.IsGlobalUnicast() && ip.As4()[0] != 0 && ip.As4()[0] < 240
	}
	return ip.IsGlobalUnicast() && !compatible.Contains(ip)
}

// compatible are IPv6's old forms of IPv4 addresses (RFC 4291, 2.5.5.1).
var compatible = netip.MustParsePrefix("::/96")

// ours tells whether an address belongs to the wire between guest and gateway.
func (n *Network) ours(ip netip.Addr) bool {
	bits := 24
	guest := n.cfg.Guest4
	if ip.Is6() {
		bits, guest = 64, n.cfg.Guest6
	}
	p, err := guest.Prefix(bits)
	return err == nil && p.Contains(ip)
}

// permits applies the policy to an address that is known by the names that DNS gave the guest.
func (n *Network) permits(dst netip.AddrPort) bool {
	return n.cfg.Policy.Permits(dst, n.dns.seen.of(dst.Addr()))
}

// refused logs what policy kept the guest from, not more often than one can read.
func (n *Network) refused(proto string, dst netip.AddrPort) {
	what := dst.String()
	if names := n.dns.seen.of(dst.Addr()); len(names.Asked) > 0 {
		what += fmt.Sprintf(" (%q)", names.Asked)
	}
	n.log.printf("refused: %s to %s", proto, what)
}

// limitedLog passes on a burst of lines, then a few per second; what is left out is
// counted.
type limitedLog struct {
	logf func(string, ...any)

	mu      sync.Mutex
	tokens  float64
	last    time.Time
	dropped int
}

const (
	logBurst = 32
	logRate  = 2 // per second
)

func (l *limitedLog) printf(format string, args ...any) {
	now := time.Now()
	l.mu.Lock()
	if l.last.IsZero() {
		l.tokens = logBurst
	}
	l.tokens = min(logBurst, l.tokens+now.Sub(l.last).Seconds()*logRate)
	l.last = now
	if l.tokens < 1 {
		l.dropped++
		l.mu.Unlock()
		return
	}
	l.tokens--
	dropped := l.dropped
	l.dropped = 0
	l.mu.Unlock()
	if dropped > 0 {
		l.logf("%d lines were left out", dropped)
	}
	l.logf(format, args...)
}
