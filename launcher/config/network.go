package config

import (
	"fmt"
	"slices"
	"strings"

	"github.com/wsl2/wsl2/internal/ini"
	"github.com/wsl2/wsl2/vmm/usernet/policy"
)

// Network is what a VM's network is like: networkingMode of [wsl2], and [network].
type Network struct {
	Off          bool // no network at all
	HostLoopback bool // host.wsl2.internal reaches what listens on the host's loopback
	Policy       policy.Policy
	Bandwidth    uint64 // bytes per second that the VM may send, and receive; 0 is no limit
	AutoProxy    bool   // sessions take the caller's proxies over
	// HostCertificates lets distros trust the authorities that this host's administrator has added.
	HostCertificates bool
}

// Proxied tells whether sessions take the caller's proxies over.
func (n Network) Proxied() bool { return n.AutoProxy && !n.Off }

// What Settings.Networks says of a distro.
const (
	OwnNetwork = "own"  // a namespace with addresses of its own
	NoNetwork  = "none" // nothing but loopback
)

// setDistroNetwork stores a distro's; the result is a warning, empty if the value was good.
func (s *Settings) setDistroNetwork(distro string, e ini.Entry) (warning string) {
	value := strings.ToLower(e.Value)
	switch value {
	case OwnNetwork, NoNetwork:
	case "shared":
		return ""
	default:
		warning = fmt.Sprintf("Invalid value '%s' for key '%s.%s', want shared, own or none (which is used),", e.Value, e.Section, e.Key)
		value = NoNetwork // who writes this wants less, not more
	}
	if s.Networks == nil {
		s.Networks = map[string]string{}
	}
	s.Networks[distro] = value
	return warning
}

// otherModes are WSL's that there are none of here (docs/network.md says why).
var otherModes = []string{"mirrored", "bridged", "virtioproxy"}

func (n *Network) setMode(v string) string {
	switch mode := strings.ToLower(v); {
	case mode == "nat":
		n.Off = false
	case mode == "none":
		n.Off = true
	case slices.Contains(otherModes, mode):
		return "There are the networking modes nat and none (nat is used):"
	default:
		n.Off = true // who writes this may want less than nat
		return "Networking mode must be nat or none (none is used):"
	}
	return ""
}

func (n *Network) setAutoProxy(v string) string {
	on, ok := ini.Bool(v)
	if !ok {
		return "Invalid boolean value"
	}
	n.AutoProxy = on
	return ""
}

func (n *Network) setHostCertificates(v string) string {
	on, ok := ini.Bool(v)
	n.HostCertificates = on
	if !ok {
		return "Invalid boolean value"
	}
	return ""
}

func (n *Network) setHostLoopback(v string) string {
	on, ok := ini.Bool(v)
	n.HostLoopback = on
	if !ok {
		return "Invalid boolean value (the host's loopback is out of reach)"
	}
	return ""
}

// minBandwidth lets the largest packet through in a second.
const minBandwidth = 64 << 10

func (n *Network) setBandwidth(v string) string {
	bytes, err := ParseSize(v)
	if err != nil || bytes < minBandwidth {
		n.Bandwidth = minBandwidth // who writes this wants less, not more
		return "Bandwidth must be at least 64KB per second (which is used):"
	}
	n.Bandwidth = bytes
	return ""
}

// setAllow makes what is not on the list forbidden. What is wrong on it is not allowed.
func (n *Network) setAllow(v string) string {
	n.Policy.Restricted = true
	return setRules(&n.Policy.Allow, v)
}

// setDeny forbids what is on the list, and everything if it cannot be understood.
func (n *Network) setDeny(v string) string {
	msg := setRules(&n.Policy.Deny, v)
	if msg != "" {
		n.Policy.Restricted = true
		msg += " (all but what network.allow says is forbidden)"
	}
	return msg
}

func setRules(list *[]policy.Rule, v string) (problem string) {
	for _, text := range strings.FieldsFunc(v, func(r rune) bool { return r == ',' || r == ' ' || r == '\t' }) {
		r, err := policy.Parse(text)
		if err != nil {
			problem = fmt.Sprintf("Invalid rule: %v, in", err)
			continue
		}
		*list = append(*list, r)
	}
	return problem
}
