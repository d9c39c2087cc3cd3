package vmm

import (
	"context"
	"errors"
	"fmt"

	"github.com/wsl2/wsl2/vmm/virtio/blk"
)

// DiskSlots returns how many disks can be attached at a time; valid once Start
// has returned. Without KVM that may be fewer than Config.DiskSlots.
func (m *Machine) DiskSlots() int {
	m.mu.Lock()
	defer m.mu.Unlock()
	return len(m.slots)
}

// AttachDisk gives the running guest a disk and returns its slot, the lowest that
// is free: /dev/vda + slot in the guest. The disk grows from nothing: the hardware has
// the new capacity when AttachDisk returns, and the guest's kernel follows by itself. With
// Config.LateSlots the guest may have to register the slot's device first.
func (m *Machine) AttachDisk(ctx context.Context, d Disk) (int, error) {
	if d.Serial != "" {
		return -1, configError("disk %s: only disks attached from the start have a serial number of their own", d.Path)
	}
	if err := ctx.Err(); err != nil {
		return -1, context.Cause(ctx)
	}
	i, s, err := m.reserve(d)
	if err != nil {
		return -1, fmt.Errorf("vmm: attach %s: %w", d.Path, err)
	}
	if err := m.attach(s, d); err != nil {
		m.free(s)
		return -1, fmt.Errorf("vmm: attach %s: %w", d.Path, err)
	}
	return i, nil
}

// reserve takes a free slot for d.
func (m *Machine) reserve(d Disk) (int, *slot, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.state != stateRunning {
		return -1, nil, ErrNotRunning
	}
	for i, s := range m.slots {
		// A slot that the guest knows as read-only stays so.
		if !s.busy && (!s.readOnly || d.ReadOnly) {
			s.busy = true
			return i, s, nil
		}
	}
	return -1, nil, fmt.Errorf("%w (%d): stop a distro to free one", ErrNoSlot, len(m.slots))
}

func (m *Machine) free(s *slot) {
	m.mu.Lock()
	s.busy = false
	m.mu.Unlock()
}

func (m *Machine) attach(s *slot, d Disk) error {
	disk, err := blk.Open(d.Path, d.ReadOnly)
	if err != nil {
		return err
	}
	if err := s.dev.Attach(disk); err != nil {
		return errors.Join(err, disk.Close())
	}
	m.mu.Lock()
	running := m.state == stateRunning
	m.mu.Unlock()
	if !running {
		// The machine ended meanwhile, and the device was closed before the disk
		// was in it, or after; closing it again makes sure.
		return errors.Join(ErrNotRunning, s.dev.Close())
	}
	return nil
}

// DetachDisk takes the disk out of a slot and closes its image: requests in
// flight are waited for, and what the guest wrote is synced. The guest should have
// unmounted it. If ctx ends first the slot stays in use; DetachDisk may be
// called again.
func (m *Machine) DetachDisk(ctx context.Context, slot int) error {
	m.mu.Lock()
	if m.state != stateRunning {
		m.mu.Unlock()
		return fmt.Errorf("vmm: detach slot %d: %w", slot, ErrNotRunning)
	}
	if slot < 0 || slot >= len(m.slots) {
		n := len(m.slots)
		m.mu.Unlock()
		return fmt.Errorf("vmm: detach slot %d: the VM has slots 0 to %d", slot, n-1)
	}
	s := m.slots[slot]
	m.mu.Unlock()
	err := s.dev.Detach(ctx)
	if emptied(ctx, err) {
		m.free(s)
	}
	if err != nil {
		return fmt.Errorf("vmm: detach slot %d: %w", slot, err)
	}
	return nil
}

// emptied reports whether a Detach that returned err took the disk out: it did
// unless there was none or ctx ended the wait. A disk that could not be synced is
// out, whatever has become of ctx meanwhile.
func emptied(ctx context.Context, err error) bool {
	return !errors.Is(err, blk.ErrNoDisk) && (ctx.Err() == nil || !errors.Is(err, ctx.Err()))
}
