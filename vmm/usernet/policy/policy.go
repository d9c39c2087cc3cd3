// Package policy is what a guest may reach of the network: rules about addresses, names and
// ports. It knows no packets.
package policy

import (
	"fmt"
	"net/netip"
	"strconv"
	"strings"
)

// Policy says what the guest may reach: nothing that is denied and, if Restricted, only what
// is allowed. The zero value is everything.
type Policy struct {
	Restricted  bool
	Allow, Deny []Rule
}

// Empty tells whether all is permitted.
func (p Policy) Empty() bool { return !p.Restricted && len(p.Deny) == 0 }

// Rule names peers: addresses, or names as the guest asks DNS for them.
type Rule struct {
	Net  netip.Prefix // of addresses; else it is a rule of Name
	Name string       // in small letters; *.NAME is all names below NAME; * is everything
	Port uint16       // 0 is every port
}

// Parse reads ADDRESS, ADDRESS/BITS, NAME, *.NAME or *, with :PORT behind it
// (and IPv6 addresses in brackets then).
func Parse(s string) (Rule, error) {
	var r Rule
	peer := s
	if strings.Count(s, ":") == 1 || strings.HasPrefix(s, "[") {
		var port string
		i := strings.LastIndex(s, ":")
		if strings.HasPrefix(s, "[") && strings.HasSuffix(s, "]") {
			i = -1
		}
		if i >= 0 {
			peer, port = s[:i], s[i+1:]
			n, err := strconv.ParseUint(port, 10, 16)
			if err != nil || n == 0 {
				return r, fmt.Errorf("%q is no port", port)
			}
			r.Port = uint16(n)
		}
		peer = strings.TrimSuffix(strings.TrimPrefix(peer, "["), "]")
	}
	if p, err := netip.ParsePrefix(peer); err == nil && !p.Addr().Is4In6() {
		r.Net = p.Masked()
		return r, nil
	}
	if a, err := netip.ParseAddr(peer); err == nil && a.Zone() == "" {
		a = a.Unmap()
		r.Net = netip.PrefixFrom(a, a.BitLen())
		return r, nil
	}
	if r.Name = strings.ToLower(peer); r.Name != "*." {
		r.Name = strings.TrimSuffix(r.Name, ".") // as DNS writes it
	}
	if _, err := netip.ParseAddr(r.Name); err == nil || !validPattern(r.Name) { // "192.0.2.1." is neither
		return r, fmt.Errorf("%q is no address, network or name", peer)
	}
	return r, nil
}

// String returns what Parse takes.
func (r Rule) String() string {
	peer := r.Name
	if r.Net.IsValid() {
		if peer = r.Net.String(); r.Port != 0 && r.Net.Addr().Is6() {
			peer = "[" + peer + "]"
		}
	}
	if r.Port == 0 {
		return peer
	}
	return peer + ":" + strconv.Itoa(int(r.Port))
}

func validPattern(name string) bool {
	if name == "*" {
		return true
	}
	name = strings.TrimPrefix(name, "*.")
	if name == "" || len(name) > 253 || strings.Contains("."+name+".", "..") {
		return false
	}
	for _, c := range []byte(name) {
		switch {
		case c >= 'a' && c <= 'z', c >= '0' && c <= '9', c == '-', c == '_', c == '.':
		default:
			return false
		}
	}
	return true
}

// names tells whether the rule is about a name.
func (r Rule) names(name string) bool {
	if below, ok := strings.CutPrefix(r.Name, "*."); ok {
		return strings.HasSuffix(name, "."+below)
	}
	return r.Name == "*" || r.Name == name
}

// matches tells whether the rule is about a port of an address that has these names.
func (r Rule) matches(ip netip.Addr, port uint16, names []string) bool {
	if r.Port != 0 && r.Port != port {
		return false
	}
	if r.Net.IsValid() {
		return r.Net.Contains(ip)
	}
	if r.Name == "*" {
		return true
	}
	for _, name := range names {
		if r.names(name) {
			return true
		}
	}
	return false
}

// Names are those by which DNS led to an address: the ones that were asked for, and the
// others that the answers were about (CNAME). A rule forbids by any of them, but
// allows by what was asked alone: the rest is what somebody's server says.
type Names struct{ Asked, Aliases []string }

// Permits tells whether a peer may be reached that was found by these names.
func (p Policy) Permits(dst netip.AddrPort, names Names) bool {
	to := []netip.AddrPort{dst}
	if ip, ok := Embedded(dst.Addr()); ok {
		to = append(to, netip.AddrPortFrom(ip, dst.Port()))
	}
	allowed := !p.Restricted
	for _, dst := range to {
		if matchesAny(p.Deny, dst, names.Asked) || matchesAny(p.Deny, dst, names.Aliases) {
			return false
		}
		allowed = allowed || matchesAny(p.Allow, dst, names.Asked)
	}
	return allowed
}

// nat64 are the prefixes behind which a network's translator sends to IPv4 addresses, the
// last four bytes (RFC 6052, RFC 8215). Prefixes of a network's own cannot be known.
var nat64 = []netip.Prefix{netip.MustParsePrefix("64:ff9b::/96"), netip.MustParsePrefix("64:ff9b:1::/48")}

// Embedded returns the IPv4 address to which one of IPv6 may lead.
func Embedded(ip netip.Addr) (netip.Addr, bool) {
	for _, p := range nat64 {
		if p.Contains(ip) {
			b := ip.As16()
			return netip.AddrFrom4([4]byte(b[12:])), true
		}
	}
	return netip.Addr{}, false
}

// metadata are the addresses at which clouds tell machines their secrets, beside
// link-local ones (169.254.169.254).
var metadata = []netip.Prefix{
	netip.MustParsePrefix("fd00:ec2::/32"),      // AWS, instances and containers
	netip.MustParsePrefix("fd20:ce::254/128"),   // Google
	netip.MustParsePrefix("100.100.100.200/32"), // Alibaba
	netip.MustParsePrefix("168.63.129.16/32"),   // Azure
	netip.MustParsePrefix("192.0.0.192/32"),     // Oracle
	netip.MustParsePrefix("fd00:c1::a9fe:a9fe/128"),
	netip.MustParsePrefix("fd00:42::42/128"), // Scaleway
}

// Guarded tells whether an address is of those that no name and no rule for everything
// leads to: link-local ones and metadata.
func Guarded(ip netip.Addr) bool {
	if ip.IsLinkLocalUnicast() {
		return true
	}
	for _, p := range metadata {
		if p.Contains(ip) {
			return true
		}
	}
	return false
}

func matchesAny(rules []Rule, dst netip.AddrPort, names []string) bool {
	for _, r := range rules {
		if r.matches(dst.Addr(), dst.Port(), names) {
			return true
		}
	}
	return false
}

// PermitsName tells whether DNS may be asked for a name: what must not be reached at
// any port need not be known.
func (p Policy) PermitsName(name string) bool {
	for _, r := range p.Deny {
		if r.Port == 0 && r.Name != "" && r.names(name) {
			return false
		}
	}
	for _, r := range p.Allow {
		if r.Name != "" && r.names(name) {
			return true
		}
	}
	return !p.Restricted
}

// AllowsGuarded tells whether a Guarded address is allowed by its number. (IPv6's link-local
// ones have no meaning without an interface.)
func (p Policy) AllowsGuarded(dst netip.AddrPort) bool {
	if ip := dst.Addr(); !Guarded(ip) || ip.Is6() && ip.IsLinkLocalUnicast() || matchesAny(p.Deny, dst, nil) {
		return false
	}
	for _, r := range p.Allow {
		if r.Net.Bits() > 0 && r.matches(dst.Addr(), dst.Port(), nil) {
			return true
		}
	}
	return false
}
