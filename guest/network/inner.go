package network

import (
	"errors"
	"fmt"
	"net/netip"
	"os"

	"golang.org/x/sys/unix"

	"github.com/wsl2/wsl2/guest/mounts"
	"github.com/wsl2/wsl2/guest/netns"
	"github.com/wsl2/wsl2/internal/wire"
)

// This file is the network of a distro that has a namespace of its own: a card in it with an address of
// the VM's network, at the other end of a wire a card of the VM's, and between that and the VM's own card routes.

// forwarding lets the VM pass on what is not for itself.
var (
	forwarding  = mounts.Value{Path: "/proc/sys/net/ipv4/ip_forward", Value: "1", Why: "distros with networks of their own"}
	forwarding6 = mounts.Value{Path: "/proc/sys/net/ipv6/conf/all/forwarding", Value: "1", Why: forwarding.Why}
)

// Connect gives a namespace the card, with these addresses of the VM's network m, of which the second may
// be "". The VM's own card is there.
func Connect(n *netns.Namespace, m *wire.Network, own4, own6 string) error {
	passing := []mounts.Item{forwarding}
	if _, err := os.Stat(forwarding6.Path); err != nil { // a kernel without IPv6 (--kernel)
		own6 = ""
	}
	if own6 != "" {
		passing = append(passing, forwarding6)
	}
	if err := mounts.All(passing); err != nil {
		return err
	}
	host, name, err := outer(own4)
	if err != nil {
		return err
	}
	fd, err := routeSocket()
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	if err := wireTo(fd, n, name, host); err != nil {
		return err
	}
	index, err := number(fd, name, unix.SIOCGIFINDEX)
	if err != nil {
		return err
	}
	// What comes with another source than the distro's own is no packet of its.
	filter := mounts.Value{Path: "/proc/sys/net/ipv4/conf/" + name + "/rp_filter", Value: "1", Why: "distros that say to be others"}
	if err := filter.Make(); err != nil {
		return err
	}
	var r, rules requests
	r.turnOn(name, index)
	for _, own := range []string{own4, own6} {
		if own == "" {
			continue
		}
		p, err := netip.ParsePrefix(own)
		if err != nil {
			return fmt.Errorf("the address of %s: %w", name, err)
		}
		r.routeTo(p.Addr(), name, index)
		if p.Addr().Is6() { // which has no rp_filter
			rules.sources(unix.RTM_NEWRULE, unix.NLM_F_CREATE, name, p.Addr())
		}
	}
	if err := r.send(fd); err != nil {
		return err
	}
	if own6 != "" {
		if err := rules.send(fd); err != nil && !noRules(err) {
			return err
		}
	}
	inside := *m
	inside.Guest4, inside.Guest6 = own4, own6
	return n.Do(func() error { return configure(&inside) })
}

// Disconnect takes the card away again. The kernel would as well, some time after the namespace's end.
func Disconnect(own4 string) error {
	_, name, err := outer(own4)
	if err != nil {
		return err
	}
	fd, err := routeSocket()
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	var link, rules requests
	info := unix.IfInfomsg{Family: unix.AF_UNSPEC}
	link.add("remove "+name, unix.RTM_DELLINK, 0, bytesOf(&info), attr{unix.IFLA_IFNAME, append([]byte(name), 0)})
	rules.sources(unix.RTM_DELRULE, 0, name, netip.Addr{})
	err = link.send(fd)
	if errors.Is(err, unix.ENODEV) { // root of the distro took it away
		err = nil
	}
	if rulesErr := rules.send(fd); !errors.Is(rulesErr, unix.ENOENT) && !noRules(rulesErr) {
		err = errors.Join(err, rulesErr)
	}
	return err
}

// noRules tells whether the kernel (--kernel) has no rules of routing for IPv6.
func noRules(err error) bool {
	return errors.Is(err, unix.EAFNOSUPPORT) || errors.Is(err, unix.EOPNOTSUPP)
}

// outer is the name of the VM's end of the wire to an address, and the address' number in the network.
func outer(own4 string) (host byte, name string, err error) {
	p, err := netip.ParsePrefix(own4)
	if err != nil || !p.Addr().Is4() {
		return 0, "", fmt.Errorf("%q is no IPv4 address with a network's size", own4)
	}
	host = p.Addr().As4()[3]
	return host, fmt.Sprint("distro", host), nil
}

// vethPeer is VETH_INFO_PEER (linux/veth.h).
const vethPeer = 1

// wireTo makes both cards. They have the same address: a card without ARP sends to its own.
func wireTo(fd int, n *netns.Namespace, name string, host byte) error {
	mtu, err := number(fd, Card, unix.SIOCGIFMTU)
	if err != nil {
		return err
	}
	attrs := func(name string) []attr {
		return []attr{
			{unix.IFLA_IFNAME, append([]byte(name), 0)},
			{unix.IFLA_ADDRESS, []byte{0x02, 'w', 's', 'l', 1, host}},
			{unix.IFLA_MTU, u32(mtu)},
		}
	}
	info := unix.IfInfomsg{Family: unix.AF_UNSPEC}
	peer := append([]byte(nil), bytesOf(&info)...)
	for _, a := range append(attrs(Card), attr{unix.IFLA_NET_NS_FD, u32(uint32(n.Fd()))}) {
		peer = appendAttr(peer, a)
	}
	kind := appendAttr(nil, attr{unix.IFLA_INFO_KIND, []byte("veth")})
	kind = appendAttr(kind, attr{unix.IFLA_INFO_DATA | unix.NLA_F_NESTED, appendAttr(nil, attr{vethPeer | unix.NLA_F_NESTED, peer})})
	var r requests
	r.add("make "+name, unix.RTM_NEWLINK, unix.NLM_F_CREATE|unix.NLM_F_EXCL, bytesOf(&info), append(attrs(name), attr{unix.IFLA_LINKINFO | unix.NLA_F_NESTED, kind})...)
	if err := r.send(fd); errors.Is(err, unix.EOPNOTSUPP) {
		return fmt.Errorf("%w: the kernel has no CONFIG_VETH, which network = own needs; use network = shared", err)
	} else {
		return err
	}
}

// Rules of routing before the kernel's own table of routes, which has 32766 (linux/fib_rules.h).
const (
	prefSource  = 32000 // the distro's own source: as for others
	prefForged  = 32001 // any other
	toTable     = 1     // FR_ACT_TO_TBL
	blackhole   = 6     // FR_ACT_BLACKHOLE
	ruleIIFName = 3     // FRA_IIFNAME
	rulePref    = 6     // FRA_PRIORITY
)

// sources adds, or deletes, the rules that pass on from an interface what has this source of IPv6, and nothing else. What is for the
// VM's own addresses no rule is asked about.
func (r *requests) sources(typ, flags uint16, name string, ip netip.Addr) {
	iif := attr{ruleIIFName, append([]byte(name), 0)}
	own := unix.RtMsg{Family: unix.AF_INET6, Table: unix.RT_TABLE_MAIN, Type: toTable} // it is struct fib_rule_hdr, too
	attrs := []attr{iif, {rulePref, u32(prefSource)}}
	if ip.IsValid() {
		own.Src_len = uint8(ip.BitLen())
		attrs = append(attrs, attr{unix.RTA_SRC, ip.AsSlice()})
	}
	r.add("rule for "+name, typ, flags, bytesOf(&own), attrs...)
	forged := unix.RtMsg{Family: unix.AF_INET6, Type: blackhole}
	r.add("rule against others than "+name, typ, flags, bytesOf(&forged), iif, attr{rulePref, u32(prefForged)})
}

// routeTo adds that an address is behind an interface.
func (r *requests) routeTo(ip netip.Addr, name string, index uint32) {
	family := uint8(unix.AF_INET)
	if ip.Is6() {
		family = unix.AF_INET6
	}
	route := unix.RtMsg{Family: family, Dst_len: uint8(ip.BitLen()), Table: unix.RT_TABLE_MAIN, Protocol: unix.RTPROT_BOOT, Scope: unix.RT_SCOPE_LINK, Type: unix.RTN_UNICAST}
	r.add("route to "+ip.String()+" by "+name, unix.RTM_NEWROUTE, unix.NLM_F_CREATE|unix.NLM_F_REPLACE, bytesOf(&route),
		attr{unix.RTA_DST, ip.AsSlice()}, attr{unix.RTA_OIF, u32(index)})
}

// Loopback brings up lo of the calling thread's namespace.
func Loopback() error {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("bring up lo: %w", err)
	}
	defer unix.Close(fd)
	req, err := unix.NewIfreq("lo")
	if err != nil {
		return err
	}
	req.SetUint16(unix.IFF_UP | unix.IFF_RUNNING)
	if err := unix.IoctlIfreq(fd, unix.SIOCSIFFLAGS, req); err != nil {
		return fmt.Errorf("bring up lo: %w", err)
	}
	return nil
}
