package service

import (
	"context"
	"encoding/json"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"time"

	"github.com/wsl2/wsl2/images"
	"github.com/wsl2/wsl2/internal/wire"
	"github.com/wsl2/wsl2/launcher/api"
	"github.com/wsl2/wsl2/launcher/registry"
	"github.com/wsl2/wsl2/vmm/virtio/blk"
)

// This file is `wsl2 --mount`: disks that the distros of a VM share. As in WSL they do
// not keep the VM, and come back with its next start, until --shutdown or the host's reboot.

// mountTimeout bounds what the guest does for one mount; replaying a journal takes seconds.
const mountTimeout = time.Minute

// sharedDisks are the Manager's. Its mu is taken before the Manager's.
type sharedDisks struct {
	mu   sync.Mutex       // serialises what is done with them in the guest
	file string           // remembers them for the next service; "": nobody does
	list []api.SharedDisk // guarded by Manager.mu
}

// RememberDisks has the file remember the shared disks, and takes up those that stand in it.
func (m *Manager) RememberDisks(file string) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.shared.file = file
	text, err := os.ReadFile(file)
	if err == nil {
		err = json.Unmarshal(text, &m.shared.list)
	}
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		m.log.Warn("shared disks are forgotten", "err", err)
	}
}

// ForgetDisks lets the next VM start without shared disks.
func (m *Manager) ForgetDisks() {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.shared.list = nil
	m.saveDisks()
}

// SharedDisks returns those that are attached, or will be at the VM's next start.
func (m *Manager) SharedDisks() []api.SharedDisk {
	m.mu.Lock()
	defer m.mu.Unlock()
	return slices.Clone(m.shared.list)
}

// saveDisks writes the list down. Preconditions: m.mu is held.
func (m *Manager) saveDisks() {
	if m.shared.file == "" {
		return
	}
	if len(m.shared.list) == 0 {
		os.Remove(m.shared.file)
		return
	}
	text, err := json.Marshal(m.shared.list)
	if err == nil {
		err = os.WriteFile(m.shared.file, text, 0o600)
	}
	if err != nil {
		m.log.Warn("shared disks are not remembered", "err", err)
	}
}

// remember notes a disk and, if mounted is not nil, what is mounted of it.
func (m *Manager) remember(path string, mounted *api.Mount) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.closing {
		return
	}
	i := slices.IndexFunc(m.shared.list, func(d api.SharedDisk) bool { return d.Disk == path })
	if i < 0 {
		i = len(m.shared.list)
		m.shared.list = append(m.shared.list, api.SharedDisk{Disk: path, Mounts: []api.Mount{}})
	}
	if mounted != nil {
		d := &m.shared.list[i]
		d.Mounts = append(slices.Clone(d.Mounts), *mounted) // SharedDisks gives the old ones out
	}
	m.saveDisks()
}

func (m *Manager) forget(path string) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.shared.list = slices.DeleteFunc(slices.Clone(m.shared.list), func(d api.SharedDisk) bool { return d.Disk == path })
	m.saveDisks()
}

// Mount attaches the disk, if it is not yet, and mounts it. After a failure to mount it stays attached.
func (m *Manager) Mount(ctx context.Context, path string, how api.Mount, o api.VMOptions) (api.Mount, []string, error) {
	v, _, err := m.acquireVM(ctx, o, "")
	if err != nil {
		return how, nil, err
	}
	defer m.releaseVM(v)
	m.shared.mu.Lock()
	defer m.shared.mu.Unlock()
	notices := m.startNotices(v)
	how, err = m.mountOn(ctx, v.machine, v.slots, path, how)
	if err != nil && !errors.As(err, new(*api.Error)) {
		err = m.explain(v, path, err)
	}
	return how, notices, err
}

// mountOn does it in a VM whose shared disks have these slots. Preconditions: m.shared.mu is held.
func (m *Manager) mountOn(ctx context.Context, machine Machine, slots map[string]int, path string, how api.Mount) (api.Mount, error) {
	ctx, cancel := within(ctx, mountTimeout, path+" was not mounted")
	defer cancel()
	slot, attached := slots[path]
	if !attached {
		var err error
		if slot, err = machine.Attach(ctx, path); err != nil {
			return how, err
		}
		slots[path] = slot
	}
	m.remember(path, nil)
	at, err := machine.MountDisk(ctx, wire.MountDisk{Slot: int32(slot), Partition: how.Partition, Name: how.Name, FSType: how.FSType, Options: how.Options})
	var refused *GuestError
	if errors.As(err, &refused) {
		return how, api.Errorf(api.CodeFailed, "to detach it: wsl2 --unmount "+path, "the disk was attached but failed to mount: %s", refused.Text)
	}
	if err != nil {
		return how, err
	}
	how.At = at
	m.remember(path, &how)
	return how, nil
}

// remount brings the shared disks into a VM that has started. What cannot be is forgotten and told.
func (m *Manager) remount(ctx context.Context, machine Machine, slots map[string]int) (warnings []string) {
	m.shared.mu.Lock()
	defer m.shared.mu.Unlock()
	for _, d := range m.SharedDisks() {
		m.forget(d.Disk)
		if len(d.Mounts) == 0 { // it failed to mount, and was left attached
			continue
		}
		for _, how := range d.Mounts {
			if _, err := m.mountOn(ctx, machine, slots, d.Disk, how); err != nil {
				warnings = append(warnings, "not mounted again: "+d.Disk+": "+err.Error())
			}
		}
	}
	return warnings
}

// Unmount takes a shared disk away, or all of them ("").
func (m *Manager) Unmount(ctx context.Context, path string) error {
	m.mu.Lock()
	starting := m.vm
	m.mu.Unlock()
	if starting != nil { // it mounts them before it is up
		select {
		case <-starting.up:
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
	m.shared.mu.Lock()
	defer m.shared.mu.Unlock()
	m.mu.Lock()
	v := m.vm
	running := v != nil && v.machine != nil
	stopping := running && v.stopping
	m.mu.Unlock()
	if stopping {
		select {
		case <-v.gone: // the disk is in use until then
		case <-ctx.Done():
			return context.Cause(ctx)
		}
		running = false
	}
	var errs []error
	found := false
	for _, d := range m.SharedDisks() {
		if path != "" && d.Disk != path {
			continue
		}
		found = true
		if running {
			if err := m.detachShared(ctx, v, d.Disk); err != nil {
				errs = append(errs, err)
				continue
			}
		}
		m.forget(d.Disk)
	}
	if !found && path != "" {
		return api.Errorf(api.CodeNotFound, "wsl2 --status shows those that are", "the disk %s is not attached", path)
	}
	return errors.Join(errs...)
}

// detachShared takes a disk from the VM if it has it. Preconditions: m.shared.mu is held.
func (m *Manager) detachShared(ctx context.Context, v *vm, path string) error {
	slot, attached := v.slots[path]
	if !attached {
		return nil
	}
	ctx, cancel := within(ctx, mountTimeout, path+" was not unmounted")
	defer cancel()
	err := v.machine.ReleaseDisk(ctx, slot)
	var refused *GuestError
	if errors.As(err, &refused) {
		return api.Errorf(api.CodeBusy, "end what uses it in the distros", "failed to detach the disk %s: %s", path, refused.Text)
	}
	if err == nil {
		err = v.machine.Detach(ctx, slot)
	}
	if err != nil {
		return m.explain(v, path, err)
	}
	delete(v.slots, path)
	return nil
}

// mount handles the verb.
func (s *Service) mount(p *peer, reg *registry.Registry, c api.Call) (any, error) {
	if !filepath.IsAbs(c.Image) || c.Mount == nil {
		return nil, api.Errorf(api.CodeBadRequest, "", "disk %q is not absolute", c.Image)
	}
	st, err := os.Stat(c.Image)
	if err != nil {
		return nil, err
	}
	for _, d := range reg.List() {
		if disk, err := os.Stat(d.Disk); err == nil && os.SameFile(st, disk) {
			return nil, api.Errorf(api.CodeBusy, "wsl2 -d "+d.Name+" shows what is on it", "%s is the disk of the distro %s", c.Image, d.Name)
		}
	}
	if !slices.ContainsFunc(s.m.SharedDisks(), func(d api.SharedDisk) bool { return d.Disk == c.Image }) {
		// Here, where errors keep their kind.
		if format, err := images.DetectDisk(c.Image); err == nil && format != images.Raw {
			return nil, api.Errorf(api.CodeBadRequest, "convert it: qemu-img convert -O raw "+c.Image+" "+c.Image+".raw", "%s is a %s image, and only raw ones can be mounted", c.Image, format)
		}
		lock, err := blk.Open(c.Image, false)
		if err != nil {
			return nil, diskBusy(err, c.Image)
		}
		lock.Close()
	}
	how, notices, err := s.m.Mount(context.Background(), c.Image, *c.Mount, c.VM)
	for _, n := range notices {
		p.notice(n)
	}
	if err != nil {
		return nil, err
	}
	s.log.Info("mounted", "disk", c.Image, "at", how.At)
	return api.SharedDisk{Disk: c.Image, Mounts: []api.Mount{how}}, nil
}
