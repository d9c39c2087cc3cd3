package pid1

import (
	"errors"

	"github.com/wsl2/wsl2/guest/distro"
	m "github.com/wsl2/wsl2/guest/mounts"
	"github.com/wsl2/wsl2/guest/netns"
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

// ownNetwork makes what there is in the network namespace of a distro whose init, with this pid, waits to be told more.
func (v *vm) ownNetwork(d *distroProc, pid int, start *wire.StartDistro) error {
	n, err := netns.Of(pid)
	if err != nil {
		return err
	}
	d.network = n
	// The process may have died, and its pid be that of one in the VM's own namespace.
	own, err := netns.Cookie()
	if err != nil {
		return err
	}
	if err := n.Do(func() error { return notOurs(own) }); err != nil {
		return err
	}
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

// notOurs fails in the namespace with this cookie.
func notOurs(own uint64) error {
	cookie, err := netns.Cookie()
	if err == nil && cookie == own {
		err = errors.New("its init has ended before it had its network; start it again")
	}
	return err
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
