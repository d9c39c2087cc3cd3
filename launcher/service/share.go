package service

import (
	"context"
	"strings"
	"time"

	"github.com/wsl2/wsl2/internal/hostpath"
	"github.com/wsl2/wsl2/internal/wire"
	"github.com/wsl2/wsl2/launcher/api"
	"github.com/wsl2/wsl2/launcher/config"
	"github.com/wsl2/wsl2/launcher/share"
)

// maxShareServers is how many processes serve one distro at a time, so that a guest
// that asks again and again does not use up the host's.
const maxShareServers = 32

// maxEarly is how much a distro may ask for before it is up.
const maxEarly = 32

const (
	// shareInterval is how long the place of a process that has ended stays taken.
	shareInterval    = time.Second
	maxShareWarnings = 20
)

// shareTable is what a distro's shares are to clients.
func shareTable(list []config.Share) hostpath.Table {
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
	if d == nil || d.vm != v || v.machine == nil {
		return
	}
	if d.state == api.StateStarting { // boot.command
		if d.early < maxEarly {
			d.early++
			m.wg.Go(func() {
				<-d.up
				m.mountShare(v, r)
			})
		}
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
			Dir: s.Host, ReadOnly: s.ReadOnly, UID: r.UID, GID: r.GID, FileMask: s.FileMask, DirMask: s.DirMask, Metadata: s.Metadata}
		device := !r.Stream && !s.Stream
		m.wg.Go(func() {
			if device {
				var err error
				if spec.Tag, spec.Socket, err = shareDevice(v); err != nil {
					m.log.Debug("share is 9P", "dir", s.Host, "err", err)
				}
			}
			err := m.serveShare(spec)
			m.mu.Lock()
			if err != nil {
				m.shareWarning(d, "share", "dir", s.Host, "err", err)
			}
			m.mu.Unlock()
			select {
			case <-time.After(shareInterval):
			case <-v.gone:
			}
			m.mu.Lock()
			defer m.mu.Unlock()
			d.shareServers--
		})
		return
	}
	m.shareWarning(d, "share refused: "+refused, "share", r.Guest[:min(len(r.Guest), 200)])
}

// deviceTimeout bounds the guest's answer to a new device.
const deviceTimeout = 10 * time.Second

// shareDevice takes a virtio-fs device for a share. Without one a share is 9P.
func shareDevice(v *vm) (tag, socket string, err error) {
	ctx, cancel := context.WithTimeout(context.Background(), deviceTimeout)
	defer cancel()
	if tag, socket, err = v.machine.ShareDevice(ctx); err != nil {
		return "", "", err
	}
	return tag, socket, nil
}

// shareWarning logs, up to a number for each start of a distro: what a guest can make
// us log is bounded. Preconditions: m.mu is held.
func (m *Manager) shareWarning(d *distro, text string, args ...any) {
	if d.shareWarnings++; d.shareWarnings <= maxShareWarnings {
		m.log.Warn(text, append([]any{"distro", d.spec.Name}, args...)...)
	}
}
