package usernet

import (
	"fmt"
	"net/netip"
	"sync"
	"time"
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
		if !n.cfg.HostLoopback || !n.cfg.Policy.Permits(dst, []string{hostName}) {
			return dst, prohibit
		}
		loopback := netip.AddrFrom4([4]byte{127, 0, 0, 1})
		if ip.Is6() {
			loopback = netip.IPv6Loopback()
		}
		return netip.AddrPortFrom(loopback, dst.Port()), forward
	}
	switch {
	case !ip.IsGlobalUnicast(), // loopback, unspecified, multicast, and link-local ones with the metadata of clouds
		ip.Is4() && (ip.As4()[0] == 0 || ip.As4()[0] >= 240):
		if n.cfg.Policy.AllowsLinkLocal(dst) {
			return dst, forward
		}
		return dst, prohibit
	case n.ours(ip):
		return dst, silent
	case !n.permits(dst):
		return dst, prohibit
	}
	return dst, forward
}

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
	if names := n.dns.seen.of(dst.Addr()); len(names) > 0 {
		what += fmt.Sprintf(" (%q)", names)
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
