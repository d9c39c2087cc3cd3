package service

import (
	"context"
	"errors"
	"strings"
	"sync"
	"time"

	"github.com/wsl2/wsl2/internal/wire"
	"github.com/wsl2/wsl2/launcher/api"
)

// This file is what the Manager does with the disks of distros that do not run.

// lockReason is why a distro may not start; it is told to who tries.
type lockReason string

const (
	beingImported     lockReason = "being imported"
	beingExported     lockReason = "being exported"
	beingUnregistered lockReason = "being unregistered"
	beingRenamed      lockReason = "being renamed"
	beingMoved        lockReason = "being moved"
	beingResized      lockReason = "being resized"
	beingCompacted    lockReason = "being compacted"
	beingCloned       lockReason = "being cloned"
	beingRepaired     lockReason = "being repaired"
	beingConverted    lockReason = "being converted"
)

// state is what lists show meanwhile.
func (r lockReason) state() string {
	switch r {
	case beingImported:
		return api.StateInstalling
	case beingExported:
		return api.StateExporting
	case beingUnregistered:
		return api.StateUninstalling
	}
	return api.StateChanging
}

type lock struct {
	name string // as the user spelt it
	why  lockReason
}

func (l lock) refuse() error {
	return api.Errorf(api.CodeBusy, "try again when that is done", "%s is %s", l.name, l.why)
}

// locks are the distros that may not start; a user's Managers have them in common.
type locks struct {
	mu     sync.Mutex
	byName map[string]lock // by folded name; guarded by mu
}

// refuse returns why the distro of this folded name may not start, nil if it may.
func (l *locks) refuse(key string) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if held, ok := l.byName[key]; ok {
		return held.refuse()
	}
	return nil
}

// Lock keeps the named distro from starting until Unlock; why is told to who
// tries. It fails if it is locked already.
func (m *Manager) Lock(name string, why lockReason) error {
	m.locks.mu.Lock()
	defer m.locks.mu.Unlock()
	key := strings.ToLower(name)
	if l, ok := m.locks.byName[key]; ok {
		return l.refuse()
	}
	m.locks.byName[key] = lock{name, why}
	return nil
}

// Unlock ends Lock.
func (m *Manager) Unlock(name string) {
	m.locks.mu.Lock()
	defer m.locks.mu.Unlock()
	delete(m.locks.byName, strings.ToLower(name))
}

// Locked returns the distros that are locked, by folded name: their spelling and
// what lists show of them.
func (m *Manager) Locked() map[string][2]string {
	m.locks.mu.Lock()
	defer m.locks.mu.Unlock()
	locked := make(map[string][2]string, len(m.locks.byName))
	for key, l := range m.locks.byName {
		locked[key] = [2]string{l.name, l.why.state()}
	}
	return locked
}

// lastMoment is what the sessions and processes of a distro that somebody else
// has just left get to be gone: a client ends before the service has seen it.
const lastMoment = 500 * time.Millisecond

// isQuieter wakes who waits for the distro to become idle. Preconditions: the
// Manager's mu is held.
func (d *distro) isQuieter() {
	if d.quieter != nil {
		close(d.quieter)
		d.quieter = nil
	}
}

// StopIdle stops a distro that nobody uses. One with sessions or processes is
// refused: what runs there is the user's to end. It is not an error if it does not run.
func (m *Manager) StopIdle(ctx context.Context, name string) error {
	patience := time.NewTimer(lastMoment)
	defer patience.Stop()
	for {
		m.mu.Lock()
		d := m.distros[strings.ToLower(name)]
		if d == nil {
			m.mu.Unlock()
			return m.releaseDistro(ctx, name)
		}
		var wait chan struct{}
		late, what := patience.C, "sessions"
		switch {
		case d.state == api.StateStarting:
			wait, late = d.up, nil
		case d.state == api.StateStopping:
			wait, late = d.settled, nil
		default:
			if d.quieter == nil {
				d.quieter = make(chan struct{})
			}
			wait = d.quieter
			if len(d.leases) > 0 {
				break
			}
			stopTimer(&d.timer)
			d.state, d.settled, d.idleSeen = api.StateStopping, make(chan struct{}), false
			m.mu.Unlock()
			stop, cancel := context.WithTimeout(context.WithoutCancel(ctx), killAfter)
			err := m.finishStop(stop, d, stopIdle)
			cancel()
			if err == nil {
				return m.releaseDistro(ctx, name)
			}
			what = "processes"
			m.mu.Lock()
		}
		m.mu.Unlock()
		select {
		case <-wait:
		case <-late:
			return inUse(name, what)
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
}

func inUse(name, what string) error {
	return api.Errorf(api.CodeBusy, "end them, or stop the distro with all that runs in it: wsl2 --terminate "+name, "%s has running %s", name, what)
}

// Import unpacks an archive onto the empty disk: it starts the VM if need be,
// attaches the disk, calls ready with where to send the archive, and returns
// when the guest is done with it, with the distro's wsl-distribution.conf. The disk is
// detached in any case.
func (m *Manager) Import(ctx context.Context, name, disk string, archive wire.SessionID, o api.VMOptions, ready func(s Session)) (conf string, err error) {
	err = m.onDisk(ctx, name, disk, o, ready, func(machine Machine, slot int32, ready func(uint32)) (err error) {
		conf, err = machine.Import(ctx, wire.Import{Slot: slot, Archive: archive}, ready)
		return err
	})
	return conf, err
}

// Export is the same for the archive of a distro's disk.
func (m *Manager) Export(ctx context.Context, name, disk string, archive wire.SessionID, o api.VMOptions, ready func(s Session)) error {
	return m.onDisk(ctx, name, disk, o, ready, func(machine Machine, slot int32, ready func(uint32)) error {
		return machine.Export(ctx, wire.Export{Slot: slot, Archive: archive}, ready)
	})
}

// Maintain has the guest work on a disk and returns what it has to tell.
// ready is called for the tasks that need tools.
func (m *Manager) Maintain(ctx context.Context, name, disk string, r wire.Maintain, o api.VMOptions, ready func(s Session)) (text string, err error) {
	err = m.onDisk(ctx, name, disk, o, ready, func(machine Machine, slot int32, ready func(uint32)) (err error) {
		r.Slot = slot
		text, err = machine.Maintain(ctx, r, ready)
		return err
	})
	return text, err
}

// onDisk has the guest work on a disk that no distro runs from.
func (m *Manager) onDisk(ctx context.Context, name, disk string, o api.VMOptions, ready func(Session), work func(machine Machine, slot int32, ready func(port uint32)) error) error {
	v, slot, err := m.acquireVM(ctx, o, disk)
	if err != nil {
		return err
	}
	defer m.releaseVM(v)
	machine := v.machine
	if slot < 0 {
		if slot, err = m.attach(ctx, v, disk); err != nil {
			return m.explain(v, name, err)
		}
	}
	err = work(machine, int32(slot), func(port uint32) {
		ready(Session{VsockPath: machine.Info().VsockPath, Port: port, Notices: m.startNotices(v)})
	})
	if err != nil {
		var refused *GuestError
		silent := !errors.As(err, &refused)
		err = m.explain(v, name, err)
		if silent {
			m.shutdownVM(v, false) // the guest may still write to the disk
		}
	}
	detach, cancel := context.WithTimeout(context.WithoutCancel(ctx), killAfter)
	defer cancel()
	if derr := machine.Detach(detach, slot); derr != nil {
		select {
		case <-machine.Done():
		default:
			m.log.Warn("disk not detached", "disk", disk, "err", derr)
			m.shutdownVM(v, false)
		}
		if err == nil {
			err = m.explain(v, name, derr)
		}
	}
	// Told before the disk was detached. To the guest it was some I/O error.
	m.mu.Lock()
	full := v.full[slot]
	delete(v.full, slot)
	m.mu.Unlock()
	if err != nil && full {
		return api.Errorf(api.CodeNoSpace, "free some space on the host", "no space left on the host for %s", disk)
	}
	return err
}
