package pid1

import (
	"github.com/wsl2/wsl2/guest/distro"
	m "github.com/wsl2/wsl2/guest/mounts"
	"github.com/wsl2/wsl2/guest/network"
	"github.com/wsl2/wsl2/internal/wire"
)

// vmNetwork is the VM's network card, from the moment at which the host tells of it.
type vmNetwork struct {
	m  *wire.Network // nil if there is no card; written before any request is served
	up chan struct{} // closed when it is up, or failed
}

// startNetwork brings the card up beside the start of the first distro.
func (v *vm) startNetwork(m *wire.Network) {
	if v.network.m != nil {
		v.log.Errorf("a second %v", m.Type())
		return
	}
	v.network = vmNetwork{m: m, up: make(chan struct{})}
	go func() {
		defer close(v.network.up)
		if err := network.Up(m); err != nil {
			v.log.Errorf("%v", err)
		}
	}()
}

// wait returns when the card is up, or will not be.
func (n vmNetwork) wait() {
	if n.up != nil {
		<-n.up
	}
}

// resolvConf is what distros link to.
func (n vmNetwork) resolvConf() m.Item {
	text := "# The VM has no network, hence no name server.\n"
	if n.m != nil {
		text = network.ResolvConf(n.m)
	}
	return m.File{Path: distro.ResolvConf, Content: distro.GeneratedBy("generateResolvConf") + text, Why: "distros link to it"}
}
