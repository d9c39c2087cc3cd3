package service

import (
	"context"
	"errors"
	"strings"
	"sync"

	"github.com/wsl2/wsl2/launcher/api"
)

// heldDisks are the disks of distros that have ended while something else in the VM
// still uses them: another distro has mounted what they bound below /mnt/wsl. They stay attached
// until that is over or the VM ends.
type heldDisks struct {
	mu     sync.Mutex // held while the guest is asked, too
	byPath map[string]heldDisk
}

type heldDisk struct {
	distro string // folded name
	slot   int
}

// hold keeps the disk of a distro that has ended.
func (v *vm) hold(d *distro) {
	v.held.mu.Lock()
	defer v.held.mu.Unlock()
	if v.held.byPath == nil {
		v.held.byPath = map[string]heldDisk{}
	}
	v.held.byPath[d.spec.Disk] = heldDisk{d.spec.key(), d.slot}
}

// release takes the held disks from the VM for which want says so, and fails at the
// first that is still used.
func (m *Manager) release(ctx context.Context, v *vm, want func(path string, h heldDisk) bool) error {
	v.held.mu.Lock()
	defer v.held.mu.Unlock()
	for path, h := range v.held.byPath {
		if !want(path, h) {
			continue
		}
		err := v.machine.ReleaseDisk(ctx, h.slot)
		if err == nil {
			err = v.machine.Detach(ctx, h.slot)
		}
		if refused := (*GuestError)(nil); errors.As(err, &refused) {
			return api.Errorf(api.CodeBusy, "end what uses it in other distros (it was below /mnt/wsl), or run: wsl2 --shutdown",
				"the disk of %s is still in use in the VM: %s", h.distro, refused.Text)
		}
		if err != nil {
			return err
		}
		delete(v.held.byPath, path)
	}
	return nil
}

// releaseDistro makes sure that the disk of a distro that does not run is free.
func (m *Manager) releaseDistro(ctx context.Context, name string) error {
	m.mu.Lock()
	v := m.vm
	if v == nil || v.machine == nil || v.stopping {
		m.mu.Unlock()
		return nil
	}
	m.mu.Unlock()
	return m.release(ctx, v, func(_ string, h heldDisk) bool { return h.distro == strings.ToLower(name) })
}

// attach gives the VM the disk of a distro.
func (m *Manager) attach(ctx context.Context, v *vm, disk string) (slot int, err error) {
	if err := m.release(ctx, v, func(path string, _ heldDisk) bool { return path == disk }); err != nil {
		return -1, err
	}
	return v.machine.Attach(ctx, disk)
}
