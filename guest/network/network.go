// Package network brings up the VM's network card.
package network

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/wsl2/wsl2/guest/distro"
	"github.com/wsl2/wsl2/internal/wire"
)

// Card is the card's name.
const Card = "eth0"

// Up gives the card its addresses and routes. What it does is one request to the kernel for
// all of them: a distro's start waits for it.
func Up(m *wire.Network) error {
	if err := distro.Plug("/sys/class/net/" + Card); err != nil {
		return fmt.Errorf("bring up %s: %w", Card, err)
	}
	return configure(m)
}

// routeSocket is one for requests (rtnetlink(7)), which the caller closes.
func routeSocket() (int, error) {
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.NETLINK_ROUTE)
	return fd, os.NewSyscallError("socket", err)
}

func configure(m *wire.Network) error {
	fd, err := routeSocket()
	if err != nil {
		return fmt.Errorf("bring up %s: %w", Card, err)
	}
	defer unix.Close(fd)
	index, err := number(fd, Card, unix.SIOCGIFINDEX)
	if err != nil {
		return err
	}
	var r requests
	r.turnOn(Card, index)
	if err := r.address(m, index); err != nil {
		return err
	}
	return r.send(fd)
}

// number asks for one of an interface's numbers, its index for example.
func number(fd int, name string, what uint) (uint32, error) {
	ifr, err := unix.NewIfreq(name)
	if err != nil {
		return 0, err
	}
	if err := unix.IoctlIfreq(fd, what, ifr); err != nil {
		return 0, fmt.Errorf("find %s: %w", name, os.NewSyscallError("ioctl", err))
	}
	return ifr.Uint32(), nil
}

// requests are rtnetlink(7)'s messages, numbered from 0, and what each does.
type requests struct {
	b     []byte
	names []string
}

func (r *requests) add(name string, typ, flags uint16, header []byte, attrs ...attr) {
	r.b = appendMessage(r.b, typ, flags, uint32(len(r.names)), header, attrs)
	r.names = append(r.names, name)
}

// send has the kernel do them, and returns what it refused.
func (r *requests) send(fd int) error {
	if err := unix.Sendto(fd, r.b, 0, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}); err != nil {
		return fmt.Errorf("%s: %w", r.names[0], os.NewSyscallError("sendto", err))
	}
	return answers(fd, r.names)
}

// turnOn adds what an interface needs before its addresses.
func (r *requests) turnOn(name string, index uint32) {
	// No link-local address: there are no neighbours and no router's advertisements to be
	// found by it.
	noLinkLocal := appendAttr(nil, attr{unix.AF_INET6, appendAttr(nil, attr{unix.IFLA_INET6_ADDR_GEN_MODE, []byte{addrGenNone}})})
	info := unix.IfInfomsg{Family: unix.AF_UNSPEC, Index: int32(index)}
	r.add("prepare "+name, unix.RTM_NEWLINK, 0, bytesOf(&info), attr{unix.IFLA_AF_SPEC | unix.NLA_F_NESTED, noLinkLocal})
	// The other end of the wire takes every frame: nobody has to be asked for an address, and
	// no group has to be joined to be asked. What that costs is on the way of a cold start.
	const flags = unix.IFF_UP | unix.IFF_NOARP
	info.Flags, info.Change = flags, flags
	r.add("turn on "+name, unix.RTM_NEWLINK, 0, bytesOf(&info))
}

// address adds the card's addresses and routes.
func (r *requests) address(m *wire.Network, index uint32) error {
	for _, f := range []struct {
		family         uint8
		guest, gateway string
	}{{unix.AF_INET, m.Guest4, m.Gateway4}, {unix.AF_INET6, m.Guest6, m.Gateway6}} {
		if f.guest == "" {
			continue
		}
		guest, err := netip.ParsePrefix(f.guest)
		if err != nil {
			return fmt.Errorf("the address of %s: %w", Card, err)
		}
		gateway, err := netip.ParseAddr(f.gateway)
		if err != nil {
			return fmt.Errorf("the gateway of %s: %w", Card, err)
		}
		// Nobody else is on the wire who could have the address.
		addr := unix.IfAddrmsg{Family: f.family, Prefixlen: uint8(guest.Bits()), Flags: unix.IFA_F_NODAD, Index: index}
		ip := guest.Addr().AsSlice()
		r.add("add "+f.guest, unix.RTM_NEWADDR, unix.NLM_F_CREATE|unix.NLM_F_REPLACE, bytesOf(&addr), attr{unix.IFA_LOCAL, ip}, attr{unix.IFA_ADDRESS, ip})
		route := unix.RtMsg{Family: f.family, Table: unix.RT_TABLE_MAIN, Protocol: unix.RTPROT_BOOT, Scope: unix.RT_SCOPE_UNIVERSE, Type: unix.RTN_UNICAST}
		r.add("route to "+f.gateway, unix.RTM_NEWROUTE, unix.NLM_F_CREATE|unix.NLM_F_REPLACE, bytesOf(&route),
			attr{unix.RTA_GATEWAY, gateway.AsSlice()}, attr{unix.RTA_OIF, u32(index)})
	}
	return nil
}

func u32(n uint32) []byte { return binary.NativeEndian.AppendUint32(nil, n) }

// attr is a struct rtattr with its value.
type attr struct {
	typ   uint16
	value []byte
}

// addrGenNone is IN6_ADDR_GEN_MODE_NONE.
const addrGenNone = 1

// appendAttr appends one attribute; b's length is a multiple of 4.
func appendAttr(b []byte, a attr) []byte {
	ne := binary.NativeEndian
	b = ne.AppendUint16(b, uint16(unix.SizeofRtAttr+len(a.value)))
	b = ne.AppendUint16(b, a.typ)
	b = append(b, a.value...)
	for len(b)%unix.NLMSG_ALIGNTO != 0 {
		b = append(b, 0)
	}
	return b
}

// appendMessage appends one netlink(7) message that wants an answer.
func appendMessage(b []byte, typ, flags uint16, seq uint32, header []byte, attrs []attr) []byte {
	start := len(b)
	ne := binary.NativeEndian
	b = ne.AppendUint32(b, 0) // the length, below
	b = ne.AppendUint16(b, typ)
	b = ne.AppendUint16(b, unix.NLM_F_REQUEST|unix.NLM_F_ACK|flags)
	b = ne.AppendUint32(b, seq)
	b = ne.AppendUint32(b, 0)
	b = append(b, header...)
	for _, a := range attrs {
		b = appendAttr(b, a)
	}
	ne.PutUint32(b[start:], uint32(len(b)-start))
	return b
}

// answers reads the kernel's answer to each request. It is there by now: rtnetlink works
// within sendto(2).
func answers(fd int, names []string) error {
	var errs []error
	buf := make([]byte, os.Getpagesize())
	for seen := 0; seen < len(names); {
		n, _, err := unix.Recvfrom(fd, buf, unix.MSG_DONTWAIT)
		if err == unix.EINTR {
			continue
		}
		if err != nil {
			return errors.Join(append(errs, fmt.Errorf("%s: %w", names[seen], os.NewSyscallError("recvfrom", err)))...)
		}
		for b := buf[:n]; len(b) >= unix.SizeofNlMsghdr+4; seen++ {
			ne := binary.NativeEndian
			size, typ, seq := ne.Uint32(b), ne.Uint16(b[4:]), ne.Uint32(b[8:])
			errno := unix.Errno(-int32(ne.Uint32(b[unix.SizeofNlMsghdr:])))
			if typ == unix.NLMSG_ERROR && errno != 0 && int(seq) < len(names) {
				errs = append(errs, fmt.Errorf("%s: %w", names[seq], errno))
			}
			b = b[min(len(b), max(int(size), unix.SizeofNlMsghdr)):]
		}
	}
	return errors.Join(errs...)
}

// bytesOf is a structure of the kernel's as it lies in memory.
func bytesOf[T any](v *T) []byte {
	return unsafe.Slice((*byte)(unsafe.Pointer(v)), unsafe.Sizeof(*v))
}

// ResolvConf is the resolv.conf(5) of a network.
func ResolvConf(m *wire.Network) string {
	const head = "# The host's own resolver answers, by whatever it uses.\n"
	return head + "nameserver " + m.Gateway4 + "\n"
}
