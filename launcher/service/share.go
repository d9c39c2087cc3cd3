package service

import (
	"strings"

	"github.com/wsl2/wsl2/internal/hostpath"
	"github.com/wsl2/wsl2/internal/wire"
	"github.com/wsl2/wsl2/launcher/api"
	"github.com/wsl2/wsl2/launcher/share"
)

// maxShareServers is how many processes serve one distro at a time, so that a guest
// that asks again and again does not use up the host's.
const maxShareServers = 32

// shareTable is what a distro's shares are to clients.
func shareTable(list []wire.Share) hostpath.Table {
	var t hostpath.Table
	for _, s := range list {
		t = append(t, hostpath.Share{Host: s.Host, Guest: s.Guest})
	}
	return t
}

// mountShare handles the guest's event: somebody in the distro uses one of its shares.
func (m *Manager) mountShare(v *vm, r *wire.MountShare) {
	m.mu.Lock()
	defer m.mu.Unlock()
	d := m.distros[strings.ToLower(r.Distro)]
	if d == nil || d.vm != v || d.state == api.StateStarting || v.machine == nil {
		return
	}
	refused := "it is not shared with the distro"
	for _, s := range d.shares {
		if s.Guest != r.Guest {
			continue
		}
		if d.shareServers == maxShareServers {
			refused = "too many are served"
			break
		}
		d.shareServers++
		spec := share.Spec{VsockPath: v.machine.Info().VsockPath, Port: d.port, Session: r.Session,
			Dir: s.Host, ReadOnly: s.ReadOnly, UID: r.UID, GID: r.GID}
		m.wg.Go(func() {
			if err := m.serveShare(spec); err != nil {
				m.log.Warn("share", "distro", d.spec.Name, "dir", s.Host, "err", err)
			}
			m.mu.Lock()
			defer m.mu.Unlock()
			d.shareServers--
		})
		return
	}
	m.log.Warn("share refused: "+refused, "distro", d.spec.Name, "share", r.Guest)
}
