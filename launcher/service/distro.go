package service

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"syscall"
	"time"

	"github.com/wsl2/wsl2/internal/wire"
	"github.com/wsl2/wsl2/launcher/api"
	"github.com/wsl2/wsl2/launcher/config"
	"github.com/wsl2/wsl2/launcher/hostexec"
	"github.com/wsl2/wsl2/launcher/registry"
)

// This file is the life of a distro: start, idle stop, stop, end.

// distro is one life of a distro.
type distro struct {
	spec     DistroSpec
	vm       *vm
	slot     int
	port     uint32
	state    string        // api.StateStarting, StateRunning, StateStopping
	up       chan struct{} // closed when the start is over; then err is set or nil
	err      error
	settled  chan struct{} // closed when a stop is over, which may leave it running
	leases   map[*Lease]struct{}
	timer    *time.Timer
	quieter  chan struct{}    // closed when a lease is released or the guest says idle; nil if nobody waits
	idleSeen bool             // a DistroIdle came while it was being stopped
	diskErr  error            // the host's file of its disk failed; the guest may have made it read-only
	repaired []string         // told to whose command started it; immutable once up is closed
	readOnly string           // why its disk is mounted read-only, told to everybody; immutable once up is closed
	exited   *string          // how its init ended before the start was over, nil if it did not
	hosts    *hostexec.Runner // nil until the guest asks
	shares   []config.Share   // set before it is up
	// shareServers are the processes that serve them.
	shareServers  int
	shareWarnings int      // logged so far
	early         int      // asked for before it was up
	warnings      []string // of its start, for the user whose command started it
	network       string   // as in config.Settings.Networks, "" for the VM's; immutable once up is closed
	number        int      // of its address (package netproc), 0 for none; guarded by Manager.mu
}

// diskNotice tells what the guest only knows as an I/O error.
func (m *Manager) diskNotice(d *distro) string {
	m.mu.Lock()
	defer m.mu.Unlock()
	if d.diskErr == nil {
		return ""
	}
	next := "its file system may be read-only now"
	if hostFull(d.diskErr) {
		next = "the host is full: make room there"
	}
	return fmt.Sprintf("the disk of %s failed: %v; %s, then run: wsl2 --shutdown", d.spec.Name, d.diskErr, next)
}

// hostFull tells whether a disk's error is that.
func hostFull(err error) bool { return errors.Is(err, syscall.ENOSPC) }

// diskError notes the error for the distro's next sessions, or the work on the disk.
func (m *Manager) diskError(v *vm, slot int, err error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if hostFull(err) {
		v.full[slot] = true
	}
	for _, d := range m.distros {
		if d.vm == v && d.state == api.StateRunning && d.slot == slot && d.spec.Disk != "" {
			d.diskErr = err
		}
	}
}

// armDistro starts the idle timer of a running distro without leases.
// Preconditions: m.mu is held.
func (m *Manager) armDistro(d *distro) {
	if d.state != api.StateRunning || len(d.leases) > 0 || m.distros[d.spec.key()] != d {
		return
	}
	stopTimer(&d.timer)
	after := d.vm.settings.InstanceIdleTimeout
	if after < 0 {
		return
	}
	var t *time.Timer
	t = time.AfterFunc(after, func() {
		m.mu.Lock()
		// A timer that was stopped too late must not stop a distro in use.
		if d.timer != t || d.state != api.StateRunning || len(d.leases) > 0 {
			m.mu.Unlock()
			return
		}
		d.timer = nil
		d.state, d.settled, d.idleSeen = api.StateStopping, make(chan struct{}), false
		m.wg.Add(1)
		m.mu.Unlock()
		defer m.wg.Done()
		ctx, cancel := context.WithTimeout(context.Background(), killAfter)
		defer cancel()
		m.finishStop(ctx, d, stopIdle)
	})
	d.timer = t
}

// start brings a distro up. It owns d's fields until it closes d.up.
func (m *Manager) start(d *distro, options api.VMOptions) {
	err := m.startOn(d, options)
	m.mu.Lock()
	defer m.mu.Unlock()
	d.err = err
	if err != nil {
		delete(m.distros, d.spec.key())
		m.nameDistros(d.vm)
		d.leases = map[*Lease]struct{}{}
		m.log.Info("distro did not start", "distro", d.spec.Name, "err", err)
	} else {
		d.state = api.StateRunning
		if d.exited != nil {
			m.cleanUpExited(d, *d.exited)
		} else {
			m.armDistro(d) // its client may have gone meanwhile
			m.watchPorts(d.vm)
			m.planPorts(d.vm)
		}
	}
	close(d.up)
	if err != nil {
		m.checkIdle()
	}
}

func (m *Manager) startOn(d *distro, options api.VMOptions) error {
	v, bootSlot, err := m.acquireVM(context.Background(), options, d.spec.Disk)
	if err != nil {
		return err
	}
	m.mu.Lock()
	d.vm = v
	m.mu.Unlock()
	ctx, cancel := within(context.Background(), v.settings.DistroStartTimeout, "distro "+d.spec.Name+" did not start")
	defer cancel()
	asked := false // the guest, to start it
	fail := func(err error) error {
		if ctx.Err() != nil {
			err = context.Cause(ctx)
		}
		err = m.explain(v, d.spec.Name, err)
		m.undoStart(v, d, asked)
		m.releaseVM(v)
		return err
	}
	slot := wire.SystemSlot
	if d.spec.Name == registry.DebugShell {
		slot = wire.RootSlot
	}
	if d.spec.Disk != "" {
		if d.slot = bootSlot; bootSlot < 0 {
			if d.slot, err = m.attach(ctx, v, d.spec.Disk); err != nil {
				d.slot = -1
				return fail(err)
			}
		}
		slot = d.slot
	}
	asked = true
	if slot != wire.RootSlot { // what is mounted there is there for all
		d.shares = v.settings.Shares.Of(d.spec.Name)
	}
	settings := v.settings
	if bootSlot < 0 { // the VM has not just read them
		settings, _ = m.settings() // whoever started it has been told the warnings
	}
	request := wire.StartDistro{
		Name: d.spec.Name, Slot: int32(slot), Hostname: hostname(), Hosts: hostEntries("/etc/hosts", hostname()), Timezone: timezone(), SafeMode: settings.SafeMode,
		Limits: settings.Limits[d.spec.key()], User: d.spec.User,
	}
	for _, s := range d.shares {
		request.Shares = append(request.Shares, s.Share)
	}
	if settings.Network.HostCertificates {
		var dropped int
		if request.Certificates, dropped = hostCertificates(m.anchors); dropped > 0 {
			m.log.Warn("distros do not get all of the host's certificates", "distro", d.spec.Name, "dropped", dropped, "most", maxCertificates, "most_bytes", maxCertificateBytes)
		}
	}
	m.joinNetwork(d, settings.Networks[d.spec.key()], &request)
	err = d.begin(ctx, v.machine, request)
	var refused *GuestError
	if errors.As(err, &refused) && slot >= 0 && (refused.Code == wire.CodeUnchecked || refused.Code == wire.CodeDisk) {
		err = m.startDamaged(v, d, request, err)
	}
	if err != nil {
		return fail(err)
	}
	return nil
}

// begin has the guest start the distro.
func (d *distro) begin(ctx context.Context, machine Machine, request wire.StartDistro) (err error) {
	var warnings string
	if d.port, warnings, err = machine.StartDistro(ctx, request); err == nil && warnings != "" {
		d.warnings = strings.Split(warnings, "\n")
	}
	return err
}

// checkTimeout bounds the check of a file system: e2fsck reads all of its metadata.
const checkTimeout = 30 * time.Minute

// startDamaged starts a distro whose disk was refused with this error: repaired if
// that takes no decision, else read-only.
func (m *Manager) startDamaged(v *vm, d *distro, request wire.StartDistro, failure error) error {
	ctx, cancel := within(context.Background(), checkTimeout, "the disk of "+d.spec.Name+" was not checked")
	defer cancel()
	if d.spec.Notice != nil {
		d.spec.Notice(fmt.Sprintf("the file system of %s has errors and is being checked", d.spec.Name))
	}
	err := m.preen(ctx, v.machine, request.Slot)
	m.log.Warn("damaged disk", "distro", d.spec.Name, "refused", failure, "check", err)
	if err == nil {
		request.Checked = true
		if err = d.begin(ctx, v.machine, request); err == nil {
			d.repaired = []string{fmt.Sprintf("the file system of %s had errors; they were repaired", d.spec.Name)}
			return nil
		}
	}
	request.ReadOnly = true
	if err = d.begin(ctx, v.machine, request); err != nil {
		return failure
	}
	d.readOnly = fmt.Sprintf("the file system of %[1]s is damaged and mounted read-only; save what you need, then run: wsl2 --terminate %[1]s; wsl2 --manage %[1]s --repair", d.spec.Name)
	return nil
}

// preen has the guest repair the file system in a slot as far as nothing can be lost.
func (m *Manager) preen(ctx context.Context, machine Machine, slot int32) error {
	tools, err := m.tools(ctx)
	if err != nil {
		return err
	}
	archive := newArchive()
	_, err = handing(archive, tools, func(ready func(Session)) (string, error) {
		return machine.Maintain(ctx, wire.Maintain{Slot: slot, Task: wire.TaskPreen, Archive: archive}, func(port uint32) {
			ready(Session{VsockPath: machine.Info().VsockPath, Port: port})
		})
	})
	return err
}

// undoStart takes the disk back from a start that failed. A guest that was asked
// to start may still be at it, if it did not answer in time: it is told to stop
// first, and if it does not, only the VM's end makes the disk free.
func (m *Manager) undoStart(v *vm, d *distro, asked bool) {
	ctx, cancel := context.WithTimeout(context.Background(), killAfter)
	defer cancel()
	var err error
	var refused *GuestError
	if asked {
		err = v.machine.StopDistro(ctx, wire.StopDistro{Name: d.spec.Name})
		if errors.As(err, &refused) && refused.Code == wire.CodeUnknownDistro {
			err = nil
		}
	}
	if err == nil && d.slot >= 0 {
		err = v.machine.Detach(ctx, d.slot)
	}
	if err == nil {
		return
	}
	select {
	case <-v.machine.Done():
	default:
		m.log.Warn("start not undone", "distro", d.spec.Name, "err", err)
		m.shutdownVM(v, false)
	}
}

// explain turns an error met while talking to the guest into what is to be
// told: if the VM has ended, or ends because of it, how it ended.
func (m *Manager) explain(v *vm, name string, err error) error {
	var refused *GuestError
	if errors.As(err, &refused) {
		return guestFailure(name, refused)
	}
	if errors.Is(err, errControlLost) {
		<-v.machine.Done() // lostControl kills it if it does not end by itself
	}
	select {
	case <-v.machine.Done():
		return vmFailure(v.machine.Exit())
	default:
		return err
	}
}

// guestFailure maps a refusal of the guest to words and the next step.
func guestFailure(name string, e *GuestError) *api.Error {
	switch e.Code {
	case wire.CodeDisk, wire.CodeUnchecked:
		return api.Errorf(api.CodeFailed, "wsl2 --manage "+name+" --repair may repair it",
			"the disk of %s cannot be mounted: %s", name, e.Text)
	case wire.CodeNoSpace:
		return api.Errorf(api.CodeNoSpace, "free some space on the host", "no space left: %s", e.Text)
	case wire.CodeArchive:
		return api.Errorf(api.CodeArchive, "check the file (tar -tf FILE)", "the archive cannot be unpacked: %s", e.Text)
	case wire.CodeNoShell:
		return api.Errorf(api.CodeArchive, "give an archive of a distro's root directory", "the archive is not that of a Linux distro: %s", e.Text)
	case wire.CodeVersion:
		return api.Errorf(api.CodeVersion, "", "%s", e.Text)
	case wire.CodeBusy:
		return api.Errorf(api.CodeBusy, "try again when it is done", "%s is busy: %s", name, e.Text)
	}
	return api.Errorf(api.CodeFailed, "wsl2 doctor may tell more", "%s: %s", name, e.Text)
}

// dropLeases takes all leases from a distro that is gone and returns what is
// to be called without the lock. Preconditions: m.mu is held.
func (m *Manager) dropLeases(d *distro) (ended []func(error)) {
	stopTimer(&d.timer)
	for l := range d.leases {
		ended = append(ended, l.ended)
	}
	d.leases = map[*Lease]struct{}{}
	d.state = api.StateStopped
	return ended
}

// distroIdle handles the guest's event.
func (m *Manager) distroIdle(v *vm, name string) {
	m.mu.Lock()
	defer m.mu.Unlock()
	d := m.distros[strings.ToLower(name)]
	if d == nil || d.vm != v {
		return
	}
	d.idleSeen = true
	d.isQuieter()
	m.armDistro(d)
}

// distroExited handles the guest's event: the distro's init has ended by itself.
func (m *Manager) distroExited(v *vm, name, text string) {
	m.mu.Lock()
	defer m.mu.Unlock()
	d := m.distros[strings.ToLower(name)]
	switch {
	case d == nil || d.vm != v:
	case d.state == api.StateStarting:
		d.exited = &text // the answer to its start is still being handled
	case d.state == api.StateRunning:
		m.cleanUpExited(d, text)
	}
}

// cleanUpExited frees what a running distro had whose init has ended.
// Preconditions: m.mu is held.
func (m *Manager) cleanUpExited(d *distro, text string) {
	d.settled = make(chan struct{})
	ended := m.dropLeases(d)
	d.state = api.StateStopping
	m.wg.Go(func() {
		for _, f := range ended {
			f(api.Errorf(api.CodeFailed, "run the command again to start it anew", "distro %s has ended: %s", d.spec.Name, text))
		}
		ctx, cancel := context.WithTimeout(context.Background(), killAfter)
		defer cancel()
		// The guest answers once the disk is unmounted.
		m.finishStop(ctx, d, stopExited)
	})
}

// stopKind is why a distro is stopped.
type stopKind int

const (
	stopIdle   stopKind = iota // nobody uses it: the guest may refuse, and it runs on
	stopAsked                  // the user says so
	stopExited                 // its init has ended: what is left is to unmount
)

// finishStop stops a distro in StateStopping. After an error it runs on.
func (m *Manager) finishStop(ctx context.Context, d *distro, kind stopKind) error {
	v := d.vm
	err := v.machine.StopDistro(ctx, wire.StopDistro{Name: d.spec.Name, IfIdle: kind == stopIdle, GraceMillis: uint32(stopGrace.Milliseconds())})
	var refused *GuestError
	if errors.As(err, &refused) && refused.Code == wire.CodeUnknownDistro {
		err, refused = nil, nil // its init has ended by itself, and with it its mounts
	}
	held := refused != nil && refused.Code == wire.CodeHeld
	if held {
		v.hold(d)
		err, refused = nil, nil // it is gone, too
	}
	if refused != nil && kind != stopExited {
		m.mu.Lock()
		defer m.mu.Unlock()
		d.state = api.StateRunning
		if d.idleSeen || refused.Code != wire.CodeBusy { // idle by now, or worth another try
			m.armDistro(d)
		}
		close(d.settled)
		if refused.Code != wire.CodeBusy {
			m.log.Warn("distro not stopped", "distro", d.spec.Name, "err", err)
		}
		return api.Errorf(api.CodeFailed, "`wsl2 --shutdown` stops the whole VM", "%s cannot be stopped: %s", d.spec.Name, refused.Text)
	}
	if err == nil && d.slot >= 0 && !held {
		if err = v.machine.Detach(ctx, d.slot); err != nil {
			err = fmt.Errorf("detach its disk: %w", err)
		}
	}
	if err == nil && !held { // it may have been what held others
		if err := m.release(ctx, v, func(string, heldDisk) bool { return true }); err != nil {
			m.log.Info("disk still held", "err", err)
		}
	}
	if err != nil {
		m.log.Warn("distro not stopped cleanly", "distro", d.spec.Name, "err", err)
		// Its disk may still be in use there: only the VM's end makes it free.
		select {
		case <-v.machine.Done():
		default:
			m.shutdownVM(v, false)
		}
	}
	m.mu.Lock()
	delete(m.distros, d.spec.key())
	ended := m.dropLeases(d)
	m.planPorts(v)
	m.nameDistros(v)
	close(d.settled)
	m.checkIdle()
	m.mu.Unlock()
	for _, f := range ended {
		f(api.Errorf(api.CodeFailed, "", "distro %s was terminated", d.spec.Name))
	}
	m.releaseVM(v)
	return nil
}

// Terminate stops a distro with whatever runs in it. It is not an error if it
// does not run.
func (m *Manager) Terminate(ctx context.Context, name string) error {
	for {
		m.mu.Lock()
		d := m.distros[strings.ToLower(name)]
		if d == nil {
			m.mu.Unlock()
			return nil
		}
		var wait chan struct{}
		switch d.state {
		case api.StateStarting:
			wait = d.up
		case api.StateStopping:
			wait = d.settled
		default:
			stopTimer(&d.timer)
			d.state, d.settled = api.StateStopping, make(chan struct{})
			m.mu.Unlock()
			stop, cancel := context.WithTimeout(context.WithoutCancel(ctx), killAfter)
			defer cancel()
			return m.finishStop(stop, d, stopAsked)
		}
		m.mu.Unlock()
		select {
		case <-wait:
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
}
