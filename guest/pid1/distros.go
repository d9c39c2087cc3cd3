package pid1

import (
	"context"
	"errors"
	"fmt"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/wsl2/wsl2/guest/distro"
	"github.com/wsl2/wsl2/guest/maintain"
	"github.com/wsl2/wsl2/guest/mounts"
	"github.com/wsl2/wsl2/guest/netns"
	"github.com/wsl2/wsl2/internal/cgroup"
	"github.com/wsl2/wsl2/internal/wire"
)

const (
	// startTimeout bounds a distro's start; replaying a large journal takes seconds.
	startTimeout = 60 * time.Second
	// killTimeout bounds what follows SIGKILL to a distro's init.
	killTimeout = 10 * time.Second
	// settleTimeout is what a distro's init gets to stop beyond the grace it gives
	// its processes: its own waits for killed processes and for clients, and the writing back.
	settleTimeout = 60 * time.Second
)

// distroNamespaces are a distro's own, beside cgroup (see spawn). Network, unless a distro is to have its own
// (StartDistro), and users are shared by all distros, as in WSL.
const distroNamespaces = unix.CLONE_NEWPID | unix.CLONE_NEWNS | unix.CLONE_NEWUTS | unix.CLONE_NEWIPC

// distroProc is a distro that starts, runs or stops. It is in vm.distros from
// before its process starts until that has been reaped and cleaned up after.
type distroProc struct {
	name   string
	slot   int32
	port   uint32
	cgroup string // path; "" without

	ready chan struct{} // closed when start is decided
	start *wire.Reply   // immutable once ready is closed
	ended chan struct{} // closed when its init has ended, and its mounts with it
	done  chan struct{} // closed when it is gone and the host has been told

	// Immutable once ready is closed.
	c       *child
	network *netns.Namespace // nil: the VM's
	own4    string           // its address there

	// Guarded by vm.mu.
	stops   int                         // StopDistro that were passed on and not refused
	stopErr *wire.Reply                 // what its init said on its way out
	waiting map[uint32]chan *wire.Reply // StopDistro{IfIdle} that may be refused
}

// validName is what the launcher allows (wsl.md §1.4).
func validName(name string) bool {
	if name == "" || name == "." || name == ".." || len(name) > 256 {
		return false
	}
	for _, c := range []byte(name) {
		switch {
		case c >= 'a' && c <= 'z', c >= 'A' && c <= 'Z', c >= '0' && c <= '9', c == '.', c == '_', c == '-':
		default:
			return false
		}
	}
	return true
}

// startDistro starts a distro or finds it running.
func (v *vm) startDistro(m *wire.StartDistro) *wire.Reply {
	if !validName(m.Name) {
		return refused("distro name %q: letters, digits, '.', '_' and '-' only, at most 256", m.Name)
	}
	if m.Slot != wire.SystemSlot && m.Slot != wire.RootSlot {
		if _, err := distro.Device(m.Slot); err != nil {
			return refused("%v", err)
		}
	}
	v.mu.Lock()
	if v.stopping {
		v.mu.Unlock()
		return refused("the VM is shutting down")
	}
	if d := v.distros[m.Name]; d != nil {
		stopping := d.stops > 0
		v.mu.Unlock()
		if stopping {
			return &wire.Reply{Code: wire.CodeBusy, Text: fmt.Sprintf("distro %s is stopping", m.Name)}
		}
		<-d.ready
		if d.start.Code == wire.CodeOK && d.slot != m.Slot {
			return refused("distro %s runs from disk slot %d, not %d", m.Name, d.slot, m.Slot)
		}
		return &wire.Reply{Code: d.start.Code, Text: d.start.Text, Port: d.start.Port}
	}
	d := &distroProc{
		name: m.Name, slot: m.Slot, port: v.portLocked(),
		ready: make(chan struct{}), ended: make(chan struct{}), done: make(chan struct{}),
		waiting: map[uint32]chan *wire.Reply{},
	}
	v.distros[m.Name] = d
	v.mu.Unlock()

	func() {
		// Even if launch panics: others wait for it.
		d.start = failed(wire.CodeInternal, fmt.Errorf("distro %s: /init failed to start it (see `dmesg` of the VM)", d.name))
		defer close(d.ready)
		d.start = v.launch(d, m)
	}()
	switch {
	case d.c == nil:
		v.forget(d)
	case d.start.Code != wire.CodeOK:
		<-d.done // the next start must not find this one
	}
	return &wire.Reply{Code: d.start.Code, Text: d.start.Text, Port: d.start.Port}
}

// launch starts the distro's init and waits until it serves or fails. d.c stays
// nil if there is no process that watch looks after.
func (v *vm) launch(d *distroProc, m *wire.StartDistro) *wire.Reply {
	v.setUp()
	if d.slot >= 0 {
		device, _ := distro.Device(d.slot)
		if r := checkDisk(device); r != nil {
			return r
		}
	}
	fd := -1
	var err error
	if d.cgroup, fd, err = makeCgroup(d.name); err != nil {
		v.log.Errorf("distro %s runs without a cgroup of its own: %v", d.name, err)
	} else {
		defer unix.Close(fd)
	}
	if err := cgroup.Limit(d.cgroup, m.Limits); err != nil {
		cgroup.Remove(context.Background(), d.cgroup) //nolint:errcheck // what remains is used again
		return failed(wire.CodeInternal, err)
	}
	namespaces := uintptr(distroNamespaces)
	if d.slot == wire.RootSlot {
		namespaces = 0
	} else if m.OwnNetwork {
		namespaces |= unix.CLONE_NEWNET
	}
	c, err := v.spawn(distro.Argv0, d.port, d.name, namespaces, fd)
	if err != nil {
		cgroup.Remove(context.Background(), d.cgroup) //nolint:errcheck // what remains is used again
		return failed(wire.CodeInternal, err)
	}
	// The clock is a safety net: the init reports or dies.
	timer := time.AfterFunc(startTimeout, func() { c.proc.Signal(unix.SIGKILL) })
	defer timer.Stop()
	answer := make(chan *wire.Reply, 1)
	d.c = c
	go v.read(d, answer)
	var networkErr error
	if namespaces&unix.CLONE_NEWNET != 0 {
		networkErr = v.ownNetwork(d, m)
	}
	go v.watch(d)
	if networkErr != nil {
		c.proc.Signal(unix.SIGKILL) //nolint:errcheck // it is gone already
		<-d.ended
		return failed(wire.CodeInternal, fmt.Errorf("make the network of %s: %w", d.name, networkErr))
	}
	if err := c.send(m); err != nil {
		c.proc.Signal(unix.SIGKILL) //nolint:errcheck // it is gone already
	}
	r, answered := <-answer
	if !answered {
		r = failed(wire.CodeInternal, fmt.Errorf("distro %s: its init ended while starting (see `dmesg` of the VM)", d.name))
	}
	if r.Code != wire.CodeOK {
		<-d.ended // it may have the disk mounted until then
	}
	v.network.wait()
	return r
}

// setUp makes the part of the root that only distros need.
func (v *vm) setUp() {
	v.setup.Do(func() {
		if err := errors.Join(mounts.All(forDistros), mounts.All([]mounts.Item{v.network.resolvConf()}), registerMZ()); err != nil {
			v.log.Errorf("%v", err)
		}
	})
}

// checkDisk returns nil if a disk is attached to the device's slot and nothing
// uses it, else the reply that says so.
func checkDisk(device string) *wire.Reply {
	if err := distro.AttachedDisk(device); err != nil {
		return failed(wire.CodeDisk, err)
	}
	if err := distro.Released(device); errors.Is(err, distro.ErrInUse) {
		return failed(wire.CodeBusy, err)
	} else if err != nil {
		return failed(wire.CodeDisk, err)
	}
	return nil
}

// read takes the frames of a distro's init until its channel ends. They are
// checked like any input: the distro's root can trace its init. answer, which has
// room for one, gets the first Reply and is closed if there is none.
func (v *vm) read(d *distroProc, answer chan<- *wire.Reply) {
	started := false
	for {
		m, err := wire.Read(d.c.r)
		if err != nil {
			if !started {
				close(answer)
			}
			// Beside systemd, which does not end with it, nothing serves the distro any more.
			d.c.proc.Signal(unix.SIGKILL) //nolint:errcheck // it is gone already
			return
		}
		switch m := m.(type) {
		case *wire.Reply:
			switch {
			case !started:
				started = true
				m.Port = d.port
				if m.Code != wire.CodeOK {
					m.Port = 0
				}
				answer <- m
			default:
				v.stopReply(d, m)
			}
		case *wire.DistroIdle:
			// Also while it stops: a stop that is refused must not swallow it.
			v.send(&wire.DistroIdle{Name: d.name})
		case *wire.HostExec:
			v.send(&wire.HostExec{Session: m.Session, Distro: d.name})
		case *wire.MountShare:
			m.Distro = d.name
			v.send(m)
		default:
			v.log.Errorf("distro %s: unexpected %v", d.name, m.Type())
		}
	}
}

// stopReply hands an answer to StopDistro to whoever asked.
func (v *vm) stopReply(d *distroProc, m *wire.Reply) {
	v.mu.Lock()
	defer v.mu.Unlock()
	if ch := d.waiting[m.ID]; ch != nil {
		delete(d.waiting, m.ID)
		d.stops--
		ch <- m // has room for one
		return
	}
	d.stopErr = m
}

// watch waits for the end of a distro's init, cleans up, and tells the host if
// nobody had asked for it.
func (v *vm) watch(d *distroProc) {
	status := <-d.c.proc.Exited
	if d.cgroup != "" {
		cgroup.Remove(context.Background(), d.cgroup) //nolint:errcheck // what remains is used again
	}
	v.leaveNetwork(d)
	if d.slot >= 0 {
		device, _ := distro.Device(d.slot)
		if err := unshare(device, false); err != nil {
			v.log.Errorf("distro %s: %v", d.name, err)
		}
		if errors.Is(distro.Released(device), distro.ErrInUse) { // interpreters that binfmt_misc holds open (flag F)
			if err := (mounts.Value{Path: binfmtMisc + "/status", Value: "-1"}).Make(); err != nil {
				v.log.Errorf("distro %s: %v", d.name, err)
			}
		}
	}
	if err := registerMZ(); err != nil {
		v.log.Errorf("%v", err)
	}
	close(d.ended)
	<-d.ready
	v.mu.Lock()
	asked := d.stops > 0
	v.mu.Unlock()
	// While it is on the list: a start that follows must not be taken for the one
	// that has ended.
	if !asked && d.start.Code == wire.CodeOK {
		v.send(&wire.DistroExited{Name: d.name, Text: exitText(status)})
	}
	v.forget(d)
	d.c.channel.Close()
}

// exitText explains the end of a distro's init. The kernel reports reboot(2)
// inside a pid namespace as a signal (reboot(2), "Behavior inside PID namespaces").
func exitText(status syscall.WaitStatus) string {
	if status.Signaled() {
		switch status.Signal() {
		case unix.SIGHUP:
			return "the distro was rebooted from inside"
		case unix.SIGINT:
			return "the distro was powered off from inside"
		}
	}
	return "the distro's init ended: " + describe(status)
}

// forget takes a distro that is gone off the list.
func (v *vm) forget(d *distroProc) {
	v.mu.Lock()
	delete(v.distros, d.name)
	v.mu.Unlock()
	close(d.done)
}

// stopDistro stops a distro. Its Reply means that the disk may be detached.
func (v *vm) stopDistro(m *wire.StopDistro) *wire.Reply {
	v.mu.Lock()
	d := v.distros[m.Name]
	v.mu.Unlock()
	if d == nil {
		return &wire.Reply{Code: wire.CodeUnknownDistro, Text: fmt.Sprintf("distro %q is not running", m.Name)}
	}
	<-d.ready
	if d.c == nil {
		return &wire.Reply{}
	}
	refusal := make(chan *wire.Reply, 1)
	v.mu.Lock()
	if m.IfIdle {
		d.waiting[m.ID] = refusal
	}
	d.stops++
	v.mu.Unlock()
	// Each is passed on: one that may be refused says nothing about the next.
	if err := d.c.send(m); err != nil {
		v.log.Errorf("distro %s: %v; killing it", d.name, err)
		d.c.proc.Signal(unix.SIGKILL) //nolint:errcheck // it is gone already
	}
	timer := time.NewTimer(time.Duration(m.GraceMillis)*time.Millisecond + settleTimeout)
	defer timer.Stop()
	select {
	case <-d.done:
	case r := <-refusal:
		return r
	case <-timer.C:
		v.log.Errorf("distro %s does not stop; killing it", d.name)
		d.c.proc.Signal(unix.SIGKILL) //nolint:errcheck // it may just have ended
		kill := time.NewTimer(killTimeout)
		defer kill.Stop()
		select {
		case <-d.done:
		case <-kill.C:
			return &wire.Reply{Code: wire.CodeBusy, Text: fmt.Sprintf("distro %s does not end although killed: a process waits for I/O that does not come; shut the VM down", d.name)}
		}
	}
	v.mu.Lock()
	stopErr := d.stopErr
	v.mu.Unlock()
	if stopErr != nil {
		return &wire.Reply{Code: stopErr.Code, Text: stopErr.Text}
	}
	if d.slot >= 0 {
		device, _ := distro.Device(d.slot)
		if err := distro.Released(device); err != nil {
			return failed(wire.CodeHeld, err)
		}
	}
	return &wire.Reply{}
}

// diskJob runs work on a disk outside of any distro (package diskjob), by /init
// as argv0, and passes its messages on. m is the request with this ID.
func (v *vm) diskJob(argv0 string, id uint32, slot int32, m wire.Message) *wire.Reply {
	device, err := distro.Device(slot)
	if err != nil {
		return refused("%v", err)
	}
	v.mu.Lock()
	stopping := v.stopping
	port := v.portLocked()
	if argv0 == maintain.Argv0 && !stopping {
		v.repairs.Add(1)
		defer v.repairs.Done()
	}
	v.mu.Unlock()
	if stopping {
		return refused("the VM is shutting down")
	}
	if r := checkDisk(device); r != nil {
		return r
	}
	c, err := v.spawn(argv0, port, fmt.Sprint(slot), unix.CLONE_NEWNS, -1)
	if err != nil {
		return failed(wire.CodeInternal, err)
	}
	defer c.channel.Close()
	reply := failed(wire.CodeInternal, fmt.Errorf("%s ended without a result (see `dmesg` of the VM)", argv0))
	if err := c.send(m); err == nil {
		reply = v.relayJob(c, id, port, reply)
	}
	// The disk is unmounted when the process is gone.
	status := <-c.proc.Exited
	if reply.Code == wire.CodeOK && (!status.Exited() || status.ExitStatus() != 0) {
		return failed(wire.CodeInternal, errors.New(argv0+" ended: "+describe(status)))
	}
	if reply.Code == wire.CodeOK {
		if err := distro.Released(device); err != nil {
			return failed(wire.CodeBusy, err)
		}
	}
	return reply
}

// relayJob passes ImportReady on and returns the job's reply.
func (v *vm) relayJob(c *child, id, port uint32, otherwise *wire.Reply) *wire.Reply {
	for {
		m, err := wire.Read(c.r)
		if err != nil {
			return otherwise
		}
		switch m := m.(type) {
		case *wire.ImportReady:
			v.send(&wire.ImportReady{ID: id, Port: port})
		case *wire.Reply:
			return m
		}
	}
}
