// Package netproc keeps a VM's network in a process of its own (`wsl2-net`): both ends of
// how it is started. It parses what a hostile guest sends, and nothing of the launcher's
// or the VM's is in its reach; if it dies, the guest's connections do, and it is started
// anew.
//
// The process gets its Config as JSON on descriptor 3 and the card's link on 4 (package
// vmm/virtio/net). It ends when the link does.
package netproc

import (
	"encoding/json"
	"fmt"
	"net/netip"
	"os"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/wsl2/wsl2/launcher/config"
	"github.com/wsl2/wsl2/launcher/internal/spawn"
	"github.com/wsl2/wsl2/vmm/usernet/policy"
)

// Config is a VM's network.
type Config struct {
	GuestMAC, GatewayMAC [6]byte
	MTU                  uint16
	Guest4, Guest6       netip.Prefix // the address, and the size of its network
	Gateway4, Gateway6   netip.Addr
	HostLoopback         bool
	Policy               policy.Policy
}

// mtu is the largest packet but a few bytes, so that its sizes stay multiples of 4. Each TCP connection
// ends in our process, so that nothing of it is cut up on the host's networks.
const mtu = 65520

// Default returns the network that a VM has if nothing else is said. Its addresses are
// private ones that are seldom used: a network of the host with the same ones could not be reached.
func Default() *Config {
	// Locally administered ones (IEEE 802).
	return &Config{
		GuestMAC: [6]byte{0x02, 'w', 's', 'l', 0, 2}, GatewayMAC: [6]byte{0x02, 'w', 's', 'l', 0, 1},
		MTU:    mtu,
		Guest4: netip.PrefixFrom(netip.AddrFrom4([4]byte{10, 77, 0, 2}), 24), Gateway4: netip.AddrFrom4([4]byte{10, 77, 0, 1}),
		Guest6: netip.PrefixFrom(address6(2), 64), Gateway6: address6(1),
		HostLoopback: true,
	}
}

// address6 is fd77:736c:3200::N.
func address6(n byte) netip.Addr {
	return netip.AddrFrom16([16]byte{0: 0xfd, 1: 'w', 2: 's', 3: 'l', 4: '2', 15: n})
}

// Descriptors of the process.
const (
	fdConfig = 3
	fdLink   = 4
)

// Start starts the process and returns the card's end of its link. What the process has
// to say goes to our stderr.
func Start(c *Config) (link *os.File, err error) {
	path, err := config.FindNet()
	if err != nil {
		return nil, err
	}
	text, err := json.Marshal(c)
	if err != nil {
		return nil, err
	}
	fd, err := unix.MemfdCreate("wsl2-net-config", unix.MFD_CLOEXEC)
	if err != nil {
		return nil, os.NewSyscallError("memfd_create", err)
	}
	cf := os.NewFile(uintptr(fd), "config")
	defer cf.Close()
	if _, err := cf.WriteAt(text, 0); err != nil {
		return nil, err
	}
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, os.NewSyscallError("socketpair", err)
	}
	ours, theirs := os.NewFile(uintptr(pair[0]), "link"), os.NewFile(uintptr(pair[1]), "link")
	defer theirs.Close()
	p, err := spawn.Start(spawn.Command{
		Path: path, Args: []string{"net"}, Dir: "/", Env: []string{"PATH=/usr/bin:/bin"},
		Output: os.Stderr, Files: []*os.File{cf, theirs}, Attr: &syscall.SysProcAttr{Setpgid: true},
	})
	if err != nil {
		ours.Close()
		return nil, fmt.Errorf("start the network's process: %w", err)
	}
	go p.Wait() //nolint:errcheck // the link's end tells
	return ours, nil
}

// Main is the process's side: what it was started with.
func Main() (c *Config, link int, err error) {
	f := os.NewFile(fdConfig, "config")
	defer f.Close()
	if err := json.NewDecoder(f).Decode(&c); err != nil {
		return nil, -1, fmt.Errorf("`wsl2-net` is run by wsl2, not by hand (%w)", err)
	}
	unix.CloseOnExec(fdLink)
	return c, fdLink, nil
}
