// Package netproc keeps a VM's network in a process of its own (`wsl2-net`): both ends of
// how it is started. It parses what a hostile guest sends, and nothing of the launcher's
// or the VM's is in its reach; if it dies, the guest's connections do, and it is started
// anew.
//
// The process gets its Config as arguments and the card's link on descriptor 3 (package
// vmm/virtio/net). It ends when the link does.
package netproc

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"strconv"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/wsl2/wsl2/launcher/config"
	"github.com/wsl2/wsl2/launcher/internal/spawn"
	"github.com/wsl2/wsl2/vmm/usernet/policy"
)

// MTU is the largest packet but a few bytes, so that its sizes stay multiples of 4. Each TCP connection
// ends in our process, so that nothing of it is cut up on the host's networks.
const MTU = 65520

// The two ends of the wire, with locally administered addresses (IEEE 802).
var (
	GuestMAC   = [6]byte{0x02, 'w', 's', 'l', 0, 2}
	GatewayMAC = [6]byte{0x02, 'w', 's', 'l', 0, 1}
)

// The network's addresses are private ones that are seldom used: a network of the host with
// the same ones could not be reached.
const (
	Guest4, Gateway4 = "10.77.0.2", "10.77.0.1"
	Guest6, Gateway6 = "fd77:736c:3200::2", "fd77:736c:3200::1"
	Bits4, Bits6     = "/24", "/64"
)

// FirstOwn and LastOwn are the first and the last number for Own.
const FirstOwn, LastOwn = 3, 254

// Own returns the addresses of a distro with a network namespace of its own, number n of the network.
func Own(n int) (ip4, ip6 string) {
	a4, a6 := netip.MustParseAddr(Guest4).As4(), netip.MustParseAddr(Guest6).As16()
	a4[3], a6[15] = byte(n), byte(n)
	return netip.AddrFrom4(a4).String(), netip.AddrFrom16(a6).String()
}

// Config is what of a VM's network can be chosen.
type Config struct {
	HostLoopback bool
	Policy       policy.Policy
	// BytesPerSecond is what the guest may send, and receive; 0 is no limit.
	BytesPerSecond uint64
	// Names is a file of the distros' names, as hosts(5); "" for none.
	Names string
}

// Words of the arguments.
const (
	argLoopback   = "host-loopback"
	argRestricted = "restricted"
	argAllow      = "allow"
	argDeny       = "deny"
	argRate       = "bytes-per-second"
	argNames      = "names"
)

// Args returns c as the arguments of the process.
func (c Config) Args() []string {
	args := []string{"net"} // what `ps` shows
	if c.HostLoopback {
		args = append(args, argLoopback)
	}
	if c.Policy.Restricted {
		args = append(args, argRestricted)
	}
	if c.BytesPerSecond > 0 {
		args = append(args, argRate, strconv.FormatUint(c.BytesPerSecond, 10))
	}
	if c.Names != "" {
		args = append(args, argNames, c.Names)
	}
	for _, r := range c.Policy.Allow {
		args = append(args, argAllow, r.String())
	}
	for _, r := range c.Policy.Deny {
		args = append(args, argDeny, r.String())
	}
	return args
}

// Parse is the inverse of Args.
func Parse(args []string) (c Config, err error) {
	if len(args) == 0 || args[0] != "net" {
		return c, errors.New("`wsl2-net` is run by wsl2, not by hand")
	}
	for i := 1; i < len(args); i++ {
		list := &c.Policy.Allow
		switch args[i] {
		case argLoopback:
			c.HostLoopback = true
			continue
		case argRestricted:
			c.Policy.Restricted = true
			continue
		case argDeny:
			list = &c.Policy.Deny
		case argAllow, argRate, argNames:
		default:
			return c, fmt.Errorf("unknown argument %q", args[i])
		}
		if i++; i == len(args) {
			return c, fmt.Errorf("nothing behind %s", args[i-1])
		}
		switch args[i-1] {
		case argRate:
			if c.BytesPerSecond, err = strconv.ParseUint(args[i], 10, 64); err != nil {
				return c, err
			}
			continue
		case argNames:
			c.Names = args[i]
			continue
		}
		r, err := policy.Parse(args[i])
		if err != nil {
			return c, err
		}
		*list = append(*list, r)
	}
	return c, nil
}

// Link is the link's descriptor in the process.
const Link = 3

// Start starts the process and returns the card's end of its link. What the process has
// to say goes to our stderr.
func Start(args []string) (link *os.File, err error) {
	path, err := config.FindNet()
	if err != nil {
		return nil, err
	}
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, os.NewSyscallError("socketpair", err)
	}
	ours, theirs := os.NewFile(uintptr(pair[0]), "link"), os.NewFile(uintptr(pair[1]), "link")
	defer theirs.Close()
	p, err := spawn.Start(spawn.Command{
		Path: path, Args: args, Dir: "/", Env: []string{"PATH=/usr/bin:/bin"},
		Output: os.Stderr, Files: []*os.File{theirs}, Attr: &syscall.SysProcAttr{Setpgid: true},
	})
	if err != nil {
		ours.Close()
		return nil, fmt.Errorf("start the network's process: %w", err)
	}
	go p.Wait() //nolint:errcheck // the link's end tells
	return ours, nil
}
