package pid1

import (
	"errors"

	"github.com/wsl2/wsl2/guest/distro"
	m "github.com/wsl2/wsl2/guest/mounts"
	"github.com/wsl2/wsl2/guest/netns"
	"github.com/wsl2/wsl2/guest/network"
	"github.com/wsl2/wsl2/guest/reaper"
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

// ownNetwork makes what there is in the network namespace of a distro whose init waits to be told more.
func (v *vm) ownNetwork(d *distroProc, start *wire.StartDistro) error {
	n, err := namespaceOf(d.c.proc)
	if err != nil {
		return err
	}
	d.network = n
	if err := n.Do(network.Loopback); err != nil {
		return err
	}
	if start.Own4 != "" {
		v.network.wait()
		if v.network.m == nil {
			return errors.New("the VM has no network card")
		}
		d.own4 = start.Own4
		if err := network.Connect(n, v.network.m, start.Own4, start.Own6); err != nil {
			return err
		}
	}
	return v.watched.Add(n)
}

// namespaceOf is the network namespace of a process that was started with one of its own.
func namespaceOf(p *reaper.Process) (*netns.Namespace, error) {
	n, err := netns.Of(p.PID)
	if err != nil {
		return nil, err
	}
	// Until now it was not reaped, and its pid nobody else's: neither another distro's nor one in the VM's own namespace.
	if err := p.Signal(0); err != nil {
		n.Close()
		return nil, errors.New("its init has ended before it had its network; start it again")
	}
	return n, nil
}

// leaveNetwork lets the namespace of a distro that has ended end, too.
func (v *vm) leaveNetwork(d *distroProc) {
	if d.network == nil {
		return
	}
	v.watched.Remove(d.network)
	d.network.Close()
	if d.own4 != "" {
		if err := network.Disconnect(d.own4); err != nil {
			v.log.Errorf("distro %s: %v", d.name, err)
		}
	}
}
