package service

import (
	"fmt"
	"os"
	"strings"

	"github.com/wsl2/wsl2/internal/wire"
	"github.com/wsl2/wsl2/launcher/api"
	"github.com/wsl2/wsl2/launcher/hostexec"
)

// hostExec stands in for a client that has gone: it runs a program of the host
// for a process of the guest that lives on. A distro that does not run gets nothing.
func (m *Manager) hostExec(v *vm, name string, id wire.SessionID) {
	m.mu.Lock()
	defer m.mu.Unlock()
	d := m.distros[strings.ToLower(name)]
	if d == nil || d.vm != v || v.machine == nil {
		return
	}
	if d.state == api.StateStarting { // boot.command
		if d.early < maxEarly {
			d.early++
			m.wg.Go(func() {
				<-d.up
				m.hostExec(v, name, id)
			})
		}
		return
	}
	if d.hosts == nil {
		path, port := v.machine.Info().VsockPath, d.port
		dir, err := os.UserHomeDir()
		if err != nil {
			dir = "/"
		}
		d.hosts = &hostexec.Runner{
			Dial: func(role wire.Role, id wire.SessionID) (hostexec.Conn, error) {
				return hostexec.Dial(path, port, role, id)
			},
			Policy: func() hostexec.Policy { s, _ := m.settings(); return hostexec.PolicyOf(s) }, Environ: os.Environ(), Dir: dir, Shares: shareTable(d.shares),
			Logf: func(format string, a ...any) { m.log.Info(fmt.Sprintf(format, a...), "distro", d.spec.Name) },
		}
	}
	m.wg.Go(func() { d.hosts.Run(id) })
}
