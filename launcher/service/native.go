package service

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/wsl2/wsl2/internal/nsinit"
	"github.com/wsl2/wsl2/internal/wire"
	"github.com/wsl2/wsl2/launcher/api"
	"github.com/wsl2/wsl2/launcher/config"
	"github.com/wsl2/wsl2/launcher/native"
	"github.com/wsl2/wsl2/launcher/registry"
)

// This file is version 1 of distros. To its Manager such a distro has a machine like any other, to
// whose guest a directory is attached in place of a disk; but there is no VM: what it would start in
// there is started in namespaces of the host's own kernel.

// Native makes those machines. Boot is a BootFunc.
type Native struct {
	Paths config.Paths
	Log   *slog.Logger
}

// Boot starts nothing: there is nothing to wait for before the distro.
func (n *Native) Boot(_ context.Context, r BootRequest) (Machine, error) {
	init, err := config.FindInit()
	if err != nil {
		return nil, api.Errorf(api.CodeVM, "`make build` makes it beside wsl2", "%v", err)
	}
	return &nativeMachine{
		req: r, root: r.Disk, log: n.Log, done: make(chan struct{}), processes: map[*native.Process]struct{}{},
		spec: native.Spec{Init: init, Socket: n.Paths.ForVM(r.Own).NativeSocket()},
	}, nil
}

// Sweep removes the sockets and cgroups that a service left which was killed: who listened there has ended with it.
func (n *Native) Sweep() {
	left, _ := filepath.Glob(n.Paths.NativeSocket() + "-*")
	init, _ := config.FindInit() // without it no distro has run
	for _, path := range left {
		native.Sweep(path, init)
	}
}

// Remove deletes a root with all that is in it, but for what ctx leaves no time.
func (n *Native) Remove(ctx context.Context, root string) error {
	if !exists(root) {
		native.Forget(root)
		return os.ErrNotExist
	}
	if os.Remove(root) == nil { // it was empty
		native.Forget(root)
		return nil
	}
	m, err := n.Boot(ctx, BootRequest{Own: registry.NewID(), Disk: root})
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeoutCause(ctx, removeTimeout, fmt.Errorf("deleting it takes longer than %v", removeTimeout))
	defer cancel()
	job := m.(*nativeMachine)
	_, err = job.work(ctx, nsinit.Remove, nil, func(id uint32) wire.Message { return &wire.RemoveRoot{ID: id} })
	if err == nil {
		err = os.Remove(root)
	}
	if err != nil {
		return fmt.Errorf("delete the root %s: %w", root, err)
	}
	native.Forget(root)
	return nil
}

// removeTimeout bounds the deletion of a root of any number of files.
const removeTimeout = 30 * time.Minute

// nativeMachine is a Machine for one distro of version 1, in which it runs or one piece of work is
// done on its root.
type nativeMachine struct {
	req  BootRequest
	spec native.Spec
	log  *slog.Logger
	done chan struct{}

	events sync.Mutex // the request's events come one at a time

	mu     sync.Mutex
	root   string        // guarded by mu
	nextID uint32        // guarded by mu
	distro *nativeDistro // nil while it does not run; guarded by mu
	// processes are those that run, the distro's init and what works on the root; guarded by mu.
	processes map[*native.Process]struct{}
	closed    bool // guarded by mu
}

// nativeDistro is one life of the distro's init.
type nativeDistro struct {
	p    *native.Process
	name string

	// Guarded by nativeMachine.mu.
	asked    int                         // StopDistro that were not refused
	refusals map[uint32]chan *wire.Reply // StopDistro{IfIdle} that may be refused
	stopErr  *wire.Reply                 // what it said on its way out
}

func (m *nativeMachine) Attach(_ context.Context, path string) (int, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.root = path
	return 0, nil
}

func (m *nativeMachine) Detach(context.Context, int) error { return nil }

// process starts /init in a role.
func (m *nativeMachine) process(ctx context.Context, role, name string, shares []wire.Share, limits wire.Limits) (*native.Process, uint32, error) {
	m.mu.Lock()
	s := m.spec
	s.Role, s.Name, s.Root, s.Shares, s.Limits = role, name, m.root, shares, limits
	m.nextID++
	id, closed := m.nextID, m.closed
	m.mu.Unlock()
	if closed {
		return nil, 0, errClosing
	}
	s.Logf = func(format string, args ...any) {
		m.log.Warn("version 1: "+fmt.Sprintf(format, args...), "distro", name)
	}
	p, err := native.Start(ctx, s)
	if err != nil {
		return nil, 0, err
	}
	m.mu.Lock()
	m.processes[p] = struct{}{}
	closed = m.closed
	m.mu.Unlock()
	go func() {
		<-p.Ended()
		m.mu.Lock()
		delete(m.processes, p)
		m.mu.Unlock()
	}()
	if closed {
		p.Kill()
		<-p.Ended()
		p.Close()
		return nil, 0, errClosing
	}
	return p, id, nil
}

func (m *nativeMachine) StartDistro(ctx context.Context, r wire.StartDistro) (port uint32, warnings string, err error) {
	switch {
	case r.Slot < 0:
		return 0, "", needsVM("there is no virtual machine whose shell that could be")
	case r.OwnNetwork:
		return 0, "", needsVM("wslconfig keeps %s from the network of others, which version 1 cannot", r.Name)
	case m.req.Settings.OwnVM[strings.ToLower(r.Name)]: // who wants that does not trust it
		return 0, "", needsVM("wslconfig has vm=own for %s, and version 1 shares the host's kernel", r.Name)
	}
	p, id, err := m.process(ctx, nsinit.Distro, r.Name, r.Shares, r.Limits)
	if none := new(native.ErrNoCgroup); errors.As(err, &none) {
		return 0, "", needsVM("wslconfig limits what %s may use, and %v (%s)", r.Name, none, none.Next)
	}
	if err != nil {
		return 0, "", err
	}
	d := &nativeDistro{p: p, name: r.Name, refusals: map[uint32]chan *wire.Reply{}}
	r.ID, r.Slot = id, wire.DirSlot
	answer := make(chan *wire.Reply, 1)
	go m.read(d, answer)
	if err := p.Send(&r); err != nil {
		p.Kill()
	}
	var reply *wire.Reply
	select {
	case reply = <-answer:
	case <-ctx.Done():
		p.Kill()
		<-p.Ended()
		p.Close()
		return 0, "", context.Cause(ctx)
	}
	if reply == nil || reply.Code != wire.CodeOK {
		if reply == nil {
			<-p.Ended()
			reply = &wire.Reply{Code: wire.CodeInternal, Text: "its init ended while starting: " + exitText(p.Status()) + " (the service's log tells more)"}
		}
		p.Kill()
		<-p.Ended()
		p.Close()
		return 0, "", &GuestError{Code: reply.Code, Text: reply.Text}
	}
	m.mu.Lock()
	m.distro = d
	m.mu.Unlock()
	go m.watch(d)
	said := append(m.unmet(r.Name), p.Warnings...)
	if reply.Text != "" {
		said = append(said, reply.Text)
	}
	return nsinit.Port, strings.Join(said, "\n"), nil
}

// unmet says what wslconfig asks for that does not hold here: of the network and the kernel, which are the host's, and of
// shares, which are bind mounts.
func (m *nativeMachine) unmet(distro string) (warnings []string) {
	if n := m.req.Settings.Network; n.Off || !n.Policy.Empty() || n.Bandwidth != 0 {
		warnings = append(warnings, fmt.Sprintf("what wslconfig says of the network does not hold in a distro of version 1, which has the host's: wsl2 --set-version %s 2", distro))
	}
	if s := m.req.Settings; s.Kernel != "" || s.KernelCommandLine != "" {
		warnings = append(warnings, fmt.Sprintf("what wslconfig says of the kernel does not hold in a distro of version 1, which has the host's: wsl2 --set-version %s 2", distro))
	}
	for _, s := range m.req.Settings.Shares.Of(distro) {
		var options []string
		if s.FileMask != 0 || s.DirMask != 0 {
			options = append(options, "umask, fmask and dmask")
		}
		if s.Metadata {
			options = append(options, "metadata")
		}
		if len(options) > 0 {
			warnings = append(warnings, fmt.Sprintf("%s of the share %s do not hold in a distro of version 1, which sees files as they are on the host: wsl2 --set-version %s 2", strings.Join(options, ", "), s.Guest, distro))
		}
	}
	return warnings
}

// needsVM says that version 2 can what is asked for.
func needsVM(format string, args ...any) error {
	return &GuestError{Code: wire.CodeRefused, Text: fmt.Sprintf(format, args...) + "; version 2 can: wsl2 --set-version NAME 2"}
}

// read takes what the distro's init says until its channel ends, checked like any input: the
// distro's root can trace its init. answer gets the first Reply and is closed if there is none.
func (m *nativeMachine) read(d *nativeDistro, answer chan<- *wire.Reply) {
	started := false
	event := func(f func()) {
		m.events.Lock()
		defer m.events.Unlock()
		f()
	}
	for {
		msg, err := wire.Read(d.p.R)
		if err != nil {
			if !started {
				close(answer)
			}
			d.p.Kill() // it has given up on us, or is gone
			return
		}
		switch msg := msg.(type) {
		case *wire.Reply:
			if !started {
				started = true
				answer <- msg
				continue
			}
			m.mu.Lock()
			if ch := d.refusals[msg.ID]; ch != nil {
				delete(d.refusals, msg.ID)
				d.asked--
				ch <- msg // has room for one
			} else {
				d.stopErr = msg
			}
			m.mu.Unlock()
		case *wire.DistroIdle:
			event(func() { m.req.DistroIdle(d.name) })
		case *wire.HostExec:
			event(func() { m.req.HostExec(d.name, msg.Session) })
		default:
			m.log.Warn("unexpected message of a distro's init, which is killed", "distro", d.name, "type", msg.Type())
			d.p.Kill() // nor is it asked any further
			if !started {
				close(answer)
			}
			return
		}
	}
}

// watch tells of the end of the distro's init that nobody has asked for.
func (m *nativeMachine) watch(d *nativeDistro) {
	<-d.p.Ended()
	d.p.Close()
	m.mu.Lock()
	if m.distro == d {
		m.distro = nil
	}
	asked := d.asked > 0
	m.mu.Unlock()
	if !asked {
		m.events.Lock()
		defer m.events.Unlock()
		m.req.DistroExited(d.name, exitText(d.p.Status()))
	}
}

// exitText explains the end of a distro's init. The kernel reports reboot(2) inside of a pid
// namespace as a signal (reboot(2), "Behavior inside PID namespaces").
func exitText(status syscall.WaitStatus) string {
	switch {
	case !status.Signaled():
		return fmt.Sprintf("the distro's init ended: exit status %d", status.ExitStatus())
	case status.Signal() == unix.SIGHUP:
		return "the distro was rebooted from inside"
	case status.Signal() == unix.SIGINT:
		return "the distro was powered off from inside"
	}
	return fmt.Sprintf("the distro's init was killed by signal %d (%v)", int(status.Signal()), status.Signal())
}

func (m *nativeMachine) StopDistro(ctx context.Context, r wire.StopDistro) error {
	refusal := make(chan *wire.Reply, 1)
	m.mu.Lock()
	d := m.distro
	if d == nil {
		m.mu.Unlock()
		return &GuestError{Code: wire.CodeUnknownDistro, Text: fmt.Sprintf("distro %q is not running", r.Name)}
	}
	m.nextID++
	r.ID = m.nextID
	d.asked++
	if r.IfIdle {
		d.refusals[r.ID] = refusal
	}
	m.mu.Unlock()
	if err := d.p.Send(&r); err != nil {
		d.p.Kill()
	}
	select {
	case reply := <-refusal:
		return &GuestError{Code: reply.Code, Text: reply.Text}
	case <-d.p.Ended():
	case <-ctx.Done():
		// Nothing of a killed namespace is left when its init has ended.
		d.p.Kill()
		<-d.p.Ended()
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.distro == d {
		m.distro = nil
	}
	if d.stopErr != nil {
		return &GuestError{Code: d.stopErr.Code, Text: d.stopErr.Text}
	}
	return nil
}

// work has /init work on the root and returns its Reply's text.
func (m *nativeMachine) work(ctx context.Context, role string, ready func(port uint32), build func(id uint32) wire.Message) (string, error) {
	m.mu.Lock()
	name := filepath.Base(filepath.Dir(m.root))
	m.mu.Unlock()
	p, id, err := m.process(ctx, role, name, nil, wire.Limits{})
	if err != nil {
		return "", err
	}
	defer p.Close()
	defer context.AfterFunc(ctx, p.Kill)()
	if err := p.Send(build(id)); err != nil {
		p.Kill()
	}
	var reply *wire.Reply
	for reply == nil {
		msg, err := wire.Read(p.R)
		if err != nil {
			break
		}
		switch msg := msg.(type) {
		case *wire.ImportReady:
			if ready != nil {
				ready(nsinit.Port)
				ready = nil // whatever it says, once
			}
		case *wire.Reply:
			reply = msg
		}
	}
	<-p.Ended()
	switch {
	case ctx.Err() != nil:
		return "", context.Cause(ctx)
	case reply == nil:
		return "", fmt.Errorf("%s of the root ended without a result: %s (the service's log tells more)", role, exitText(p.Status()))
	case reply.Code != wire.CodeOK:
		return "", &GuestError{Code: reply.Code, Text: reply.Text}
	}
	return reply.Text, nil
}

func (m *nativeMachine) Import(ctx context.Context, r wire.Import, ready func(port uint32)) (string, error) {
	return m.work(ctx, nsinit.Import, ready, func(id uint32) wire.Message { return &wire.Import{ID: id, Slot: wire.DirSlot, Archive: r.Archive} })
}

func (m *nativeMachine) Export(ctx context.Context, r wire.Export, ready func(port uint32)) error {
	_, err := m.work(ctx, nsinit.Export, ready, func(id uint32) wire.Message { return &wire.Export{ID: id, Slot: wire.DirSlot, Archive: r.Archive} })
	return err
}

func (m *nativeMachine) Maintain(context.Context, wire.Maintain, func(uint32)) (string, error) {
	return "", needsVM("there is no disk to work on")
}

func (m *nativeMachine) MountDisk(context.Context, wire.MountDisk) (string, error) {
	return "", needsVM("disks are mounted by a kernel of one's own")
}

func (m *nativeMachine) ReleaseDisk(context.Context, int) error { return nil }

// ShareDevice: shares of version 1 are bind mounts.
func (m *nativeMachine) ShareDevice(context.Context) (tag, socket string, err error) {
	return "", "", needsVM("version 1 has no virtio-fs devices")
}

// WatchPorts: the network of version 1 is the host's, and so are the ports.
func (m *nativeMachine) WatchPorts() error { return nil }

// Shutdown returns when the distro has stopped.
func (m *nativeMachine) Shutdown(grace time.Duration) error {
	m.mu.Lock()
	d := m.distro
	m.mu.Unlock()
	if d != nil {
		ctx, cancel := context.WithTimeout(context.Background(), killAfter)
		defer cancel()
		if err := m.StopDistro(ctx, wire.StopDistro{Name: d.name, GraceMillis: uint32(grace.Milliseconds())}); err != nil {
			m.log.Warn("distro not stopped cleanly", "distro", d.name, "err", err)
		}
	}
	m.Kill()
	return nil
}

// Kill ends the distro, and what works on its root.
func (m *nativeMachine) Kill() {
	m.mu.Lock()
	first, running := !m.closed, slices.Collect(maps.Keys(m.processes))
	m.closed = true
	m.mu.Unlock()
	for _, p := range running {
		p.Kill()
		<-p.Ended()
	}
	if first {
		close(m.done)
	}
}

func (m *nativeMachine) Done() <-chan struct{} { return m.done }

func (m *nativeMachine) Exit() error { return nil }

// Info has the pid of the distro's init where a VM has its own.
func (m *nativeMachine) Info() MachineInfo {
	info := MachineInfo{VsockPath: m.spec.Socket}
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.distro != nil {
		info.PID = m.distro.p.PID
	}
	return info
}
