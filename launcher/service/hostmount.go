package service

import (
	"context"
	"path/filepath"
	"strings"
	"sync"

	"github.com/wsl2/wsl2/launcher/api"
	"github.com/wsl2/wsl2/launcher/hostmount"
)

// hostMounts are the distros that are mounted on the host. Each mount holds a lease: the
// distro runs until it is terminated, or somebody unmounts it.
type hostMounts struct {
	run func(ctx context.Context, s hostmount.Spec, mounted func()) error // hostmount.Run but for tests

	mu     sync.Mutex
	byName map[string]*hostMount // by folded name; guarded by mu
}

// hostMount is one life of a mount.
type hostMount struct {
	dir   string
	up    chan struct{}      // closed when it is there, or has failed
	err   error              // why it failed; immutable once up is closed
	end   context.CancelFunc // begins its end
	ended context.Context    // that end has begun
	gone  chan struct{}      // closed when it is gone
}

// hostMount mounts a distro's tree, if it is not yet, and tells where.
func (s *Service) hostMount(p *peer, c api.Call) (any, error) {
	if err := hostmount.Check(); err != nil {
		return nil, err
	}
	m, spec, d, err := s.resolve(api.Open{Distro: c.Name})
	if err != nil {
		return nil, err
	}
	spec.Notice = p.notice
	client, _, end := p.watch()
	defer end()
	for {
		s.mounts.mu.Lock()
		h := s.mounts.byName[spec.key()]
		s.mounts.mu.Unlock()
		if h == nil {
			if h = s.newMount(filepath.Join(s.paths.HostMounts(), spec.Name), spec.key()); h == nil {
				continue // another client was first
			}
			go s.serveMount(h, m, spec, hostmount.Spec{Distro: spec.Name, User: d.DefaultUser, Dir: h.dir}, c.VM, p.notice)
		}
		wait := h.up
		if h.ended.Err() != nil {
			wait = h.gone
		}
		select {
		case <-wait:
		case <-client.Done():
			return nil, context.Cause(client)
		}
		switch {
		case wait == h.gone: // the next one
		case h.err != nil:
			return nil, h.err
		default:
			return api.HostMount{Dir: h.dir}, nil
		}
	}
}

// newMount notes a mount that is about to begin; nil if there is one.
func (s *Service) newMount(dir, key string) *hostMount {
	h := &hostMount{dir: dir, up: make(chan struct{}), gone: make(chan struct{})}
	h.ended, h.end = context.WithCancel(context.Background())
	s.mounts.mu.Lock()
	defer s.mounts.mu.Unlock()
	if s.mounts.byName[key] != nil {
		h.end()
		return nil
	}
	s.mounts.byName[key] = h
	return h
}

// serveMount is a mount's life. It owns h until it closes h.gone.
func (s *Service) serveMount(h *hostMount, m *Manager, d DistroSpec, spec hostmount.Spec, options api.VMOptions, notice func(string)) {
	defer close(h.gone)
	var once sync.Once
	ready := func(err error) {
		once.Do(func() {
			h.err = err
			close(h.up)
		})
	}
	lease, session, err := m.Open(h.ended, d, options, func(error) { h.end() })
	if err == nil {
		for _, n := range session.Notices {
			notice(n)
		}
		spec.VsockPath, spec.Port = session.VsockPath, session.Port
		if err = s.mounts.run(h.ended, spec, func() { ready(nil) }); err != nil {
			s.log.Warn("distro not mounted", "distro", d.Name, "err", err)
			err = api.Errorf(api.CodeFailed, "`wsl2 cp` copies files without a mount", "%s cannot be mounted: %v", d.Name, err)
		}
		lease.Release()
	}
	h.end()
	s.mounts.mu.Lock()
	delete(s.mounts.byName, d.key())
	s.mounts.mu.Unlock()
	if err == nil { // it ended before it was there
		err = api.Errorf(api.CodeFailed, "run the command again", "%s was stopped meanwhile", d.Name)
	}
	ready(err)
}

// wait waits for the end of the mount of a distro that was stopped, or of all for "".
func (h *hostMounts) wait(name string) {
	h.mu.Lock()
	var list []*hostMount
	for key, one := range h.byName {
		if name == "" || key == strings.ToLower(name) {
			list = append(list, one)
		}
	}
	h.mu.Unlock()
	for _, one := range list {
		one.end()
		<-one.gone
	}
}
