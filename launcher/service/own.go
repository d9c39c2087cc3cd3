package service

import (
	"strings"
	"sync"

	"github.com/wsl2/wsl2/launcher/api"
	"github.com/wsl2/wsl2/launcher/config"
	"github.com/wsl2/wsl2/launcher/registry"
)

// This file is the VMs of a user: the one that distros share (Service.m), and one for each
// distro with `vm = own`, which shares neither kernel nor memory with any other. A distro of version 1 has
// a Manager of its own as well, whose machines are none (Native).

// ownVMs are the Managers of those distros, and of those of version 1, by the distros' IDs. They
// stay, without a VM, until the service ends.
type ownVMs struct {
	makeVM, makeNative func(id string) *Manager

	mu     sync.Mutex
	byID   map[string]*Manager // guarded by mu
	native map[string]*Manager // of version 1; guarded by mu
}

// ofVersion1 returns the Manager of a distro of version 1.
func (o *ownVMs) ofVersion1(id string) *Manager {
	o.mu.Lock()
	defer o.mu.Unlock()
	m := o.native[id]
	if m == nil {
		m = o.makeNative(id)
		o.native[id] = m
	}
	return m
}

// forget closes the Manager under which a root was made that is no distro's, or has another there: one that
// nobody else has been told of.
func (o *ownVMs) forget(id string) {
	o.mu.Lock()
	m := o.native[id]
	o.mu.Unlock()
	if m == nil {
		return
	}
	m.Close() // first: until then it is one of those that the service stops
	o.mu.Lock()
	delete(o.native, id)
	o.mu.Unlock()
}

// list returns them with their distros' IDs.
func (o *ownVMs) list() map[string]*Manager {
	o.mu.Lock()
	defer o.mu.Unlock()
	all := make(map[string]*Manager, len(o.byID))
	for id, m := range o.byID {
		all[id] = m
	}
	return all
}

// pidOf returns the pid of the init of a distro of version 1, 0 while it does not run.
func (o *ownVMs) pidOf(d registry.Distro) int {
	o.mu.Lock()
	m := o.native[d.ID]
	o.mu.Unlock()
	if m == nil || d.Version != 1 {
		return 0
	}
	if vm := m.VM(); vm != nil {
		return vm.PID
	}
	return 0
}

// managers returns the Managers of all VMs, the shared one first.
func (s *Service) managers() []*Manager {
	all := []*Manager{s.m}
	for _, m := range s.own.list() {
		all = append(all, m)
	}
	s.own.mu.Lock()
	defer s.own.mu.Unlock()
	for _, m := range s.own.native {
		all = append(all, m)
	}
	return all
}

// managerOf returns the Manager of a distro's VM. While the distro runs, that is where it
// does, whatever wslconfig says by now; a command in it does not wait for wslconfig to be read.
func (s *Service) managerOf(d registry.Distro) *Manager {
	if d.Version == 1 {
		return s.own.ofVersion1(d.ID)
	}
	if s.m.runs(d.Name) {
		return s.m
	}
	s.own.mu.Lock()
	defer s.own.mu.Unlock()
	m := s.own.byID[d.ID]
	if m != nil && m.runs(d.Name) {
		return m
	}
	settings, _ := config.Load(s.paths.ConfigFile, config.ThisHost())
	if !settings.OwnVM[strings.ToLower(d.Name)] {
		return s.m
	}
	if m == nil {
		m = s.own.makeVM(d.ID)
		s.own.byID[d.ID] = m
	}
	return m
}

// runs tells whether the distro is not stopped.
func (m *Manager) runs(name string) bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.distros[strings.ToLower(name)] != nil
}

// states are the distros that are not stopped, of all VMs.
func (s *Service) states() map[string]RunState {
	all := map[string]RunState{}
	for _, m := range s.managers() {
		for name, state := range m.States() {
			if m == s.m || name != registry.DebugShell {
				all[name] = state
			}
		}
	}
	return all
}

// ownStatus describes the distros' own VMs that run.
func (s *Service) ownStatus(reg *registry.Registry) (list []api.OwnVM) {
	own := s.own.list()
	for _, d := range reg.List() {
		if m := own[d.ID]; m != nil {
			if vm := m.VM(); vm != nil {
				list = append(list, api.OwnVM{Distro: d.Name, VM: *vm})
			}
		}
	}
	return list
}

// each does something with all Managers at once.
func (s *Service) each(f func(*Manager)) {
	var wg sync.WaitGroup
	for _, m := range s.managers() {
		wg.Go(func() { f(m) })
	}
	wg.Wait()
}

// idle tells whether no VM and no distro is left.
func (s *Service) idle() bool {
	for _, m := range s.managers() {
		if !m.Idle() {
			return false
		}
	}
	return true
}

// tryStopIdle stops every VM if nothing is in use in any; then nothing is started any
// more. VMs that were idle may have been stopped in any case.
func (s *Service) tryStopIdle() bool {
	all := s.managers()
	for i, m := range all {
		if !m.TryStopIdle() {
			for _, stopped := range all[:i] {
				stopped.accept()
			}
			return false
		}
	}
	return true
}

// accept takes Refuse back.
func (m *Manager) accept() {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.closing = false
}
