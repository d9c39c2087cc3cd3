// Package ports makes what distros serve reachable on the host: each port on loopback, and
// those that the user publishes on other addresses as well.
//
// The service decides (Plan); a process of its own listens and relays (`wsl2 port-forwarder`, one for
// each VM, from the first port on), so that what a hostile guest or peer makes it do, or need,
// harms neither service nor VM.
package ports

import (
	"cmp"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strconv"
	"strings"

	"github.com/wsl2/wsl2/internal/wire"
)

// Rule publishes a port of a distro.
type Rule struct {
	Distro string `json:"distro"`
	UDP    bool   `json:"udp,omitempty"`
	Port   uint16 `json:"port"`
	// HostPort is the same by default.
	HostPort uint16 `json:"hostPort"`
	// Address is where the host listens; the zero Addr is all of its addresses.
	Address netip.Addr `json:"address"`
	// Allow are the peers that may connect, beside the host itself; none are all.
	Allow []netip.Prefix `json:"allow,omitempty"`
}

// errRule is the usage.
var errRule = errors.New("want DISTRO:PORT[:HOSTPORT][/udp]")

// ParseRule reads DISTRO:PORT[:HOSTPORT][/udp].
func ParseRule(text string) (r Rule, err error) {
	rest, proto, given := strings.Cut(text, "/")
	if given && proto != "tcp" && proto != "udp" {
		return r, errRule
	}
	r.UDP = proto == "udp"
	words := strings.Split(rest, ":")
	if len(words) < 2 || len(words) > 3 || words[0] == "" {
		return r, errRule
	}
	r.Distro = words[0]
	if r.Port, err = parsePort(words[1]); err != nil {
		return r, err
	}
	r.HostPort = r.Port
	if len(words) == 3 {
		r.HostPort, err = parsePort(words[2])
	}
	return r, err
}

func parsePort(text string) (uint16, error) {
	n, err := strconv.ParseUint(text, 10, 16)
	if err != nil || n == 0 {
		return 0, fmt.Errorf("%q is no port (1 to 65535)", text)
	}
	return uint16(n), nil
}

// Restrict adds the address to listen on ("" for all) and the peers, addresses or CIDRs.
func (r *Rule) Restrict(address string, allow []string) (err error) {
	if address != "" {
		if r.Address, err = netip.ParseAddr(address); err != nil || r.Address.Zone() != "" {
			return fmt.Errorf("%q is no address to listen on", address)
		}
		r.Address = r.Address.Unmap()
	}
	for _, a := range allow {
		p, err := netip.ParsePrefix(a)
		if err != nil {
			var ip netip.Addr
			if ip, err = netip.ParseAddr(a); err == nil {
				p, err = ip.Prefix(ip.BitLen())
			}
		}
		if err != nil {
			return fmt.Errorf("%q is no address or network (192.168.1.0/24)", a)
		}
		r.Allow = append(r.Allow, p.Masked())
	}
	return nil
}

// ParseRules reads those of wslconfig, separated by semicolons:
// DISTRO:PORT[:HOSTPORT][/udp] [address=ADDR] [allow=CIDR,...].
func ParseRules(text string) (list []Rule, err error) {
	for _, one := range strings.Split(text, ";") {
		words := strings.Fields(one)
		if len(words) == 0 {
			continue
		}
		r, err := ParseRule(words[0])
		if err != nil {
			return nil, err
		}
		for _, w := range words[1:] {
			key, value, _ := strings.Cut(w, "=")
			switch {
			case key == "address" && value != "":
				err = r.Restrict(value, nil)
			case key == "allow" && value != "":
				err = r.Restrict("", strings.Split(value, ","))
			default:
				err = fmt.Errorf("want address=ADDR or allow=CIDR,..., not %q", w)
			}
			if err != nil {
				return nil, err
			}
		}
		list = append(list, r)
	}
	return list, nil
}

// Same tells whether the rules publish the same port of the same distro.
func (r Rule) Same(o Rule) bool {
	return strings.EqualFold(r.Distro, o.Distro) && r.UDP == o.UDP && r.Port == o.Port
}

// String is the rule as ParseRule reads it.
func (r Rule) String() string {
	s := fmt.Sprintf("%s:%d", r.Distro, r.Port)
	if r.HostPort != r.Port {
		s += fmt.Sprint(":", r.HostPort)
	}
	if r.UDP {
		s += "/udp"
	}
	return s
}

// allows tells whether a peer that is not the host itself may connect.
func (r Rule) allows(peer netip.Addr) bool {
	if len(r.Allow) == 0 {
		return true
	}
	peer = peer.Unmap().WithZone("")
	return slices.ContainsFunc(r.Allow, func(p netip.Prefix) bool { return p.Contains(peer) })
}

// Range is of ports, both ends included.
type Range struct{ First, Last uint16 }

// ParseRanges reads a list such as "5432, 6000-6010".
func ParseRanges(text string) (list []Range, err error) {
	for _, word := range strings.FieldsFunc(text, func(c rune) bool { return c == ',' || c == ' ' || c == '\t' }) {
		first, last, given := strings.Cut(word, "-")
		var r Range
		if r.First, err = parsePort(first); err != nil {
			return nil, err
		}
		if r.Last = r.First; given {
			if r.Last, err = parsePort(last); err != nil {
				return nil, err
			}
		}
		if r.Last < r.First {
			return nil, fmt.Errorf("%q is no range of ports", word)
		}
		list = append(list, r)
	}
	return list, nil
}

// Policy is what the user allows.
type Policy struct {
	Localhost  bool    // ports appear on the host's loopback
	Ignore     []Range // those that do not
	Privileged bool    // those below ip_unprivileged_port_start may, if the host lets us
	Rules      []Rule
}

// Forward is a port that a distro serves, and what the host is to make of it.
type Forward struct {
	Distro   string
	Session  uint32 // the distro's vsock port
	UDP      bool
	Port     uint16
	V4, V6   bool // where it serves
	Loopback bool // on the host's loopback, too
	Rules    []Rule
}

// maxForwards is how many ports of the host a VM may take.
const maxForwards = 512

// Plan decides which of the ports that a guest says are open the host is to have. sessions
// are the session ports of the distros that run, by name.
func Plan(open []wire.Port, sessions map[string]uint32, policy Policy) (list []Forward) {
	for _, p := range open {
		session, running := sessions[p.Distro]
		if !running || p.Number == 0 || !p.V4 && !p.V6 {
			continue
		}
		f := Forward{Distro: p.Distro, Session: session, UDP: p.UDP, Port: p.Number, V4: p.V4, V6: p.V6}
		f.Loopback = policy.Localhost && !slices.ContainsFunc(policy.Ignore, func(r Range) bool { return p.Number >= r.First && p.Number <= r.Last })
		for _, r := range policy.Rules {
			if r.Same(Rule{Distro: p.Distro, UDP: p.UDP, Port: p.Number}) {
				f.Rules = append(f.Rules, r)
			}
		}
		if f.Loopback || len(f.Rules) > 0 {
			list = append(list, f)
		}
	}
	slices.SortFunc(list, func(a, b Forward) int {
		return cmp.Or(strings.Compare(a.Distro, b.Distro), cmp.Compare(a.Port, b.Port), strings.Compare(a.proto(), b.proto()))
	})
	// A guest may say one twice.
	list = slices.CompactFunc(list, func(a, b Forward) bool { return a.key() == b.key() })
	return list[:min(len(list), maxForwards)]
}

func (f Forward) proto() string {
	if f.UDP {
		return "udp"
	}
	return "tcp"
}

// key tells Forwards apart.
type key struct {
	distro string
	udp    bool
	port   uint16
}

func (f Forward) key() key { return key{f.Distro, f.UDP, f.Port} }
