// Package pid1 is PID 1 of the VM: what the kernel starts as /init.
//
// Its duties:
//   - say Ready to the host, before anything else: that is what a user waits for;
//   - make the VM's own minimal root: proc, sys, dev, cgroups, loopback;
//   - start, watch and stop distros, each a process with namespaces of its own (package distro);
//   - start work on disks outside of distros (package diskjob);
//   - reap every process whose parent died in the VM's own pid namespace;
//   - stop everything and power off when told to, or when the host's service is gone.
//
// It never exits and never panics on purpose: the kernel would panic with it.
// Nothing it does may wait for the host for ever: the control channel is
// written by a goroutine of its own with a bounded queue, and requests run on goroutines of their own.
package pid1

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"runtime/debug"
	"sync"
	"time"

	"github.com/mdlayher/vsock"
	"golang.org/x/sys/unix"

	"github.com/wsl2/wsl2/guest/distro"
	"github.com/wsl2/wsl2/guest/exporter"
	"github.com/wsl2/wsl2/guest/importer"
	"github.com/wsl2/wsl2/guest/kmsg"
	"github.com/wsl2/wsl2/guest/listeners"
	"github.com/wsl2/wsl2/guest/maintain"
	"github.com/wsl2/wsl2/guest/mounts"
	"github.com/wsl2/wsl2/guest/network"
	"github.com/wsl2/wsl2/guest/reaper"
	"github.com/wsl2/wsl2/internal/wire"
)

const (
	// connectTimeout bounds the dial of the control channel.
	connectTimeout = 10 * time.Second
	// sendTimeout bounds one message to a host that does not read. A service that
	// is stuck for longer is as good as gone.
	sendTimeout = 30 * time.Second
	// lostGrace is what processes get when the service is gone.
	lostGrace = 5 * time.Second
	// firstPort is the first vsock port given to a distro or an import.
	firstPort = 2048
)

type vm struct {
	log *kmsg.Logger
	rp  *reaper.Reaper

	writeMu sync.Mutex // serialises frames on control
	control *vsock.Conn

	network  vmNetwork
	setup    sync.Once // the part of the root that only distros need
	watching sync.Once // of ports
	watched  *listeners.Namespaces

	sharedMu sync.Mutex     // serialises what is done with shared disks
	shared   map[int32]bool // slots of disks that MountDisk has taken; guarded by sharedMu

	mu       sync.Mutex
	distros  map[string]*distroProc
	nextPort uint32
	stopping bool // no distro or import is started any more
	// repairs is work in place on file systems, not to be cut off half-way. Added to
	// with mu held and stopping not set.
	repairs sync.WaitGroup
}

// Run is the main function of PID 1. It does not return.
func Run() {
	started := bootNanos()
	v := &vm{
		log:      kmsg.New("wsl2-init"),
		distros:  map[string]*distroProc{},
		shared:   map[int32]bool{},
		nextPort: firstPort,
	}
	v.watched = listeners.NewNamespaces(v.log.Errorf)
	defer func() {
		if p := recover(); p != nil {
			v.log.Errorf("BUG: PID 1 panicked: %v", p)
			v.log.Errorf("%s", debug.Stack())
		}
		v.powerOff()
	}()
	if err := v.connect(started); err != nil {
		// No /dev yet: the log would have nowhere to go.
		mounts.All(base) //nolint:errcheck // about to power off
		v.log.Errorf("no control channel to the host: %v; powering off", err)
		return
	}
	if err := mounts.All(base); err != nil {
		v.log.Errorf("%v", err)
	}
	v.rp = reaper.New(nil)
	if err := network.Loopback(); err != nil {
		v.log.Errorf("%v", err)
	}
	err := v.serve(bufio.NewReader(v.control))
	v.log.Printf("control channel: %v; stopping every distro and powering off", err)
	v.stopAll(lostGrace)
}

func bootNanos() uint64 {
	var ts unix.Timespec
	unix.ClockGettime(unix.CLOCK_BOOTTIME, &ts) //nolint:errcheck // it cannot fail
	return uint64(ts.Nano())
}

// connect dials the host and says Ready.
func (v *vm) connect(started uint64) error {
	ctx, cancel := context.WithTimeout(context.Background(), connectTimeout)
	defer cancel()
	c, err := vsock.DialContext(ctx, vsock.Host, wire.PortControl, nil)
	if err != nil {
		return err
	}
	v.control = c
	var u unix.Utsname
	if err := unix.Uname(&u); err != nil {
		return fmt.Errorf("uname: %w", err)
	}
	return wire.Write(c, &wire.Ready{
		Version:       wire.Version,
		KernelRelease: unix.ByteSliceToString(u.Release[:]),
		BootNanos:     started,
		InitNanos:     bootNanos(),
	})
}

// send writes one frame. A host that does not take it within sendTimeout has its
// channel closed, which ends serve.
func (v *vm) send(m wire.Message) {
	v.writeMu.Lock()
	defer v.writeMu.Unlock()
	if err := wire.Write(wire.Within(v.control, sendTimeout), m); err != nil {
		v.log.Errorf("%v", err)
		if !errors.Is(err, wire.ErrTooLarge) {
			v.control.Close()
		}
	}
}

// serve answers requests until the channel ends or breaks.
func (v *vm) serve(r io.Reader) error {
	for {
		m, err := wire.Read(r)
		if err != nil {
			return err
		}
		switch m := m.(type) {
		case *wire.Network:
			v.startNetwork(m)
		case *wire.StartDistro:
			v.request(m.ID, func() *wire.Reply { return v.startDistro(m) })
		case *wire.StopDistro:
			v.request(m.ID, func() *wire.Reply { return v.stopDistro(m) })
		case *wire.Import:
			v.request(m.ID, func() *wire.Reply { return v.diskJob(importer.Argv0, m.ID, m.Slot, m) })
		case *wire.Export:
			v.request(m.ID, func() *wire.Reply { return v.diskJob(exporter.Argv0, m.ID, m.Slot, m) })
		case *wire.Maintain:
			v.request(m.ID, func() *wire.Reply { return v.diskJob(maintain.Argv0, m.ID, m.Slot, m) })
		case *wire.MountDisk:
			v.request(m.ID, func() *wire.Reply { return v.mountDisk(m) })
		case *wire.ReleaseDisk:
			v.request(m.ID, func() *wire.Reply { return v.releaseDisk(m.Slot) })
		case *wire.SwapOn:
			v.request(m.ID, func() *wire.Reply { return swapOn(m.Slot) })
		case *wire.WatchPorts:
			v.watching.Do(func() { go v.watchPorts() })
		case *wire.RegisterDevice:
			v.request(m.ID, func() *wire.Reply {
				if err := distro.RegisterDevice(m.Device); err != nil {
					return refused("%v", err)
				}
				return &wire.Reply{}
			})
		case *wire.Shutdown:
			v.stopAll(time.Duration(m.GraceMillis) * time.Millisecond)
			v.powerOff()
		default:
			return fmt.Errorf("unexpected %v", m.Type())
		}
	}
}

// request runs f on a goroutine of its own and sends its reply. A panic there
// is a failed request, not the VM's end.
func (v *vm) request(id uint32, f func() *wire.Reply) {
	go func() {
		reply := &wire.Reply{Code: wire.CodeInternal}
		defer func() {
			if p := recover(); p != nil {
				v.log.Errorf("BUG: request panicked: %v: %s", p, debug.Stack())
				reply.Text = fmt.Sprintf("/init failed: %v", p)
			}
			reply.ID = id
			v.send(reply)
		}()
		reply = f()
	}()
}

func refused(format string, args ...any) *wire.Reply {
	return &wire.Reply{Code: wire.CodeRefused, Text: fmt.Sprintf(format, args...)}
}

func failed(code wire.Code, err error) *wire.Reply {
	return &wire.Reply{Code: code, Text: err.Error()}
}

// port returns a vsock port that nothing else has. Preconditions: v.mu is held.
func (v *vm) portLocked() uint32 {
	p := v.nextPort
	if v.nextPort++; v.nextPort == unix.VMADDR_PORT_ANY {
		v.nextPort = firstPort
	}
	return p
}

// stopAll stops every distro at once, waits for all of them and unmounts what
// they shared.
func (v *vm) stopAll(grace time.Duration) {
	v.mu.Lock()
	v.stopping = true
	var names []string
	for name := range v.distros {
		names = append(names, name)
	}
	v.mu.Unlock()
	var wg sync.WaitGroup
	for _, name := range names {
		wg.Go(func() {
			r := v.stopDistro(&wire.StopDistro{Name: name, GraceMillis: uint32(grace / time.Millisecond)})
			if r.Code != wire.CodeOK {
				v.log.Errorf("stop %s: %s", name, r.Text)
			}
		})
	}
	wg.Wait()
	v.releaseAll()
	v.repairs.Wait() // the host's patience bounds it
}

// The byte and the I/O port by which the VM ends on purpose; the same as
// StatusPowerOff and ExitPort of vmm/engine, which the guest may not import.
const (
	exitPort       = 0xf4
	statusPowerOff = 0x00
)

// powerOff ends the VM. It does not return.
func (v *vm) powerOff() {
	unix.Sync()
	if f, err := os.OpenFile("/dev/port", os.O_WRONLY, 0); err != nil {
		v.log.Errorf("power off: %v", err)
	} else if _, err := f.WriteAt([]byte{statusPowerOff}, exitPort); err != nil {
		v.log.Errorf("power off: %v", err)
	}
	// Not one of our VMs, or it takes its time.
	for _, how := range []int{unix.LINUX_REBOOT_CMD_POWER_OFF, unix.LINUX_REBOOT_CMD_RESTART} {
		if err := unix.Reboot(how); err != nil {
			v.log.Errorf("reboot: %v", err)
		}
	}
	for {
		_ = unix.Pause() // select{} alone would be a deadlock to the runtime
	}
}
