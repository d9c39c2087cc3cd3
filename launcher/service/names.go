package service

import (
	"fmt"
	"os"
	"slices"
	"strings"

	"github.com/wsl2/wsl2/internal/wire"
	"github.com/wsl2/wsl2/launcher/api"
	"github.com/wsl2/wsl2/launcher/config"
	"github.com/wsl2/wsl2/launcher/netproc"
)

// This file is the addresses and names of distros in the VM's network, which answers for DISTRO.wsl2.internal
// from a file that is written here.

// sharedNumber is that of the address which distros have by default: the VM's.
const sharedNumber = netproc.FirstOwn - 1

// joinNetwork gives a distro that is about to start its place in the VM's network.
func (m *Manager) joinNetwork(d *distro, network string, request *wire.StartDistro) {
	m.mu.Lock()
	defer m.mu.Unlock()
	d.network = network
	request.OwnNetwork = network != "" && request.Slot != wire.RootSlot
	switch {
	case d.vm.settings.Network.Off || network == config.NoNetwork || request.Slot == wire.RootSlot:
	case !request.OwnNetwork:
		d.number = sharedNumber
	default:
		if d.number = m.freeNumber(d.vm); d.number != 0 {
			ip4, ip6 := netproc.Own(d.number)
			request.Own4, request.Own6 = ip4+netproc.Bits4, ip6+netproc.Bits6
		}
	}
	m.nameDistros(d.vm)
}

// freeNumber is one that no distro of the VM has, 0 if there is none. Preconditions: m.mu is held.
func (m *Manager) freeNumber(v *vm) int {
	used := map[int]bool{}
	for _, d := range m.distros {
		used[d.number] = used[d.number] || d.vm == v
	}
	for n := netproc.FirstOwn; n <= netproc.LastOwn; n++ {
		if !used[n] {
			return n
		}
	}
	return 0
}

// nameDistros writes down which distros there are. Preconditions: m.mu is held.
func (m *Manager) nameDistros(v *vm) {
	// The file of one that has ended is its successor's.
	if v == nil || v.machine == nil || m.vm != v || v.machine.Info().NamesPath == "" {
		return
	}
	var lines []string
	for _, d := range m.distros {
		if d.vm == v && d.number != 0 && d.state != api.StateStopped && isDNSName(d.spec.Name) {
			ip4, _ := netproc.Own(d.number)
			lines = append(lines, fmt.Sprintf("%s\t%s\n", ip4, d.spec.Name))
		}
	}
	slices.Sort(lines)
	text := strings.Join(lines, "")
	if text == v.names {
		return
	}
	// Renamed into its place: the network's process reads at any time.
	path := v.machine.Info().NamesPath
	err := os.WriteFile(path+".new", []byte(text), 0o600)
	if err == nil {
		err = os.Rename(path+".new", path)
	}
	if err != nil {
		m.log.Warn("names of distros are not known in the VM", "err", err)
		return
	}
	v.names = text
}

// What a label and a whole name may have in bytes (RFC 1035, 2.3.4; without the last dot).
const (
	maxLabel   = 63
	maxDNSName = 253
)

// isDNSName tells whether a distro's name may stand before that of the VM's network. Some have empty labels, or long ones.
func isDNSName(name string) bool {
	if len(name)+len(".wsl2.internal") > maxDNSName {
		return false
	}
	for label := range strings.SplitSeq(name, ".") {
		if label == "" || len(label) > maxLabel {
			return false
		}
	}
	return true
}
