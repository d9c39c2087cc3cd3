// Package qemu runs a virtual machine where KVM cannot: QEMU's TCG is the CPU
// and the board (microvm: interrupt controllers, one serial port, virtio-mmio
// transports), while every virtio device is ours, offered to QEMU by vhost-user.
//
// QEMU is a child in a process group of its own that dies with this process,
// sandboxed by its own seccomp filter. It inherits all it works with as
// descriptors: the guest's memory with kernel and initramfs in it, a ROM of a few
// instructions, one socket for each device, two for the guest's output and one for
// its monitor; nothing lies in the file system, where another user could reach it.
package qemu

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"runtime"
	"strings"
	"sync"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/wsl2/wsl2/vmm/engine"
	"github.com/wsl2/wsl2/vmm/logtail"
	"github.com/wsl2/wsl2/vmm/vhostuser"
	"github.com/wsl2/wsl2/vmm/virtio"
)

// ErrNotInstalled is wrapped by New's error where QEMU is not to be found.
var ErrNotInstalled = errors.New("QEMU is not installed")

// Program is QEMU's name in $PATH.
const Program = "qemu-system-x86_64"

// Config says how to run QEMU. The zero value is complete.
type Config struct {
	// Program is QEMU's path or its name in $PATH; Program if empty.
	Program string
}

// machine is one QEMU. The life of its parts: Start makes them all, run (one
// goroutine) ends them all once the process is gone, and closes done.
type machine struct {
	spec engine.Spec
	path string

	done chan struct{}
	exit engine.Exit // immutable once done is closed

	mu      sync.Mutex
	process *os.Process // nil before Start and after the end
	killed  bool        // Kill was called
	fault   error       // the first device or monitor that could not go on
}

// New returns a machine for s that QEMU will run.
func New(s engine.Spec, c Config) (engine.Engine, error) {
	if s.CPUs < 1 || s.CPUs > 64 {
		return nil, fmt.Errorf("qemu: %d vCPUs; a machine has 1 to 64", s.CPUs)
	}
	if s.MemoryBytes == 0 || s.MemoryBytes%(2<<20) != 0 {
		return nil, fmt.Errorf("qemu: %d bytes of memory are not a multiple of 2 MiB", s.MemoryBytes)
	}
	if n := len(s.Devices); n > MaxDevices {
		return nil, fmt.Errorf("qemu: %d virtio devices; QEMU's microvm has room for %d: use fewer disk slots", n, MaxDevices)
	}
	for i, d := range s.Devices {
		if deviceArg(d) == "" {
			return nil, fmt.Errorf("qemu: device %d: no vhost-user front end for virtio device type %d", i, d.ID())
		}
	}
	if c.Program == "" {
		c.Program = Program
	}
	path, err := exec.LookPath(c.Program)
	if err != nil {
		return nil, fmt.Errorf("%w (%w): apt-get install qemu-system-x86", ErrNotInstalled, err)
	}
	return &machine{spec: s, path: path, done: make(chan struct{})}, nil
}

// Start implements engine.Engine. The vCPUs run when it returns.
func (m *machine) Start(ctx context.Context) error {
	m.mu.Lock()
	killed := m.killed
	m.mu.Unlock()
	if killed {
		return errors.New("qemu: killed before it was started")
	}
	khz := tscKHz(ctx)
	err := m.start(ctx, khz, true)
	var refused *sandboxError
	if errors.As(err, &refused) {
		// A QEMU built without seccomp; the sandbox is a second wall, not the first.
		err = m.start(ctx, khz, false)
	}
	return err
}

// sandboxError: QEMU did not start because of -sandbox.
type sandboxError struct{ error }

func (m *machine) start(ctx context.Context, tscKHz uint64, sandbox bool) error {
	p, err := m.launch(tscKHz, sandbox)
	if err != nil {
		return err
	}
	var cause error
	select {
	case <-p.monitor.running:
		go m.run(p)
		return nil
	case <-p.ended:
	case <-ctx.Done():
		cause = context.Cause(ctx)
		m.endProcess()
	}
	p.release()
	switch {
	case cause != nil:
		return fmt.Errorf("qemu: start: %w", cause)
	case sandbox && strings.Contains(p.said(), "sandbox"):
		return &sandboxError{fmt.Errorf("qemu: %s", p.said())}
	}
	m.mu.Lock()
	killed, fault := m.killed, m.fault
	m.mu.Unlock()
	if killed {
		return errors.New("qemu: killed while it was starting")
	}
	return fmt.Errorf("qemu: did not start: %s", p.account(fault))
}

// Wait implements engine.Engine.
func (m *machine) Wait() engine.Exit {
	<-m.done
	return m.exit
}

// Kill implements engine.Engine.
func (m *machine) Kill() {
	m.mu.Lock()
	m.killed = true
	m.mu.Unlock()
	m.endProcess()
}

// endProcess kills QEMU if it runs. os.Process signals by pidfd: never another
// process that got the number since.
func (m *machine) endProcess() {
	m.mu.Lock()
	p := m.process
	m.mu.Unlock()
	if p != nil {
		_ = p.Kill()
	}
}

// fail ends the machine because a part of it on this side cannot go on: the
// guest would wait for that part for ever.
func (m *machine) fail(err error) {
	m.mu.Lock()
	if m.fault == nil {
		m.fault = err
	}
	m.mu.Unlock()
	m.endProcess()
}

// process is a QEMU that was launched, and what serves it here.
type process struct {
	cmd     *exec.Cmd
	stderr  *logtail.Buffer
	monitor *monitor
	// ended is closed when the process was reaped; waitErr is immutable then.
	ended   chan struct{}
	waitErr error

	output   []*net.UnixConn // serial port and virtio console
	doors    []*door
	mu       sync.Mutex
	backends []*vhostuser.Backend // guarded by mu while a door is open
	released bool                 // guarded by mu
	parts    sync.WaitGroup       // output, monitor, backends
}

// launch starts QEMU and the goroutines that serve it. On an error nothing is
// left behind.
func (m *machine) launch(tscKHz uint64, sandbox bool) (_ *process, err error) {
	p := &process{stderr: logtail.New(maxStderr, nil), ended: make(chan struct{})}
	var ch channels
	theirs := func() []*os.File { return append(ch.devices, ch.serial, ch.console, ch.monitor, ch.ram, ch.rom) }
	defer func() {
		for _, f := range theirs() {
			f.Close() // QEMU has its own by now
		}
		if err != nil {
			p.closeParts()
		}
	}()
	// The child's ends first: what has none is not served.
	pair := func(child **os.File) (*net.UnixConn, error) {
		c, f, err := socketpair()
		*child = f
		return c, err
	}
	for _, f := range []**os.File{&ch.serial, &ch.console} {
		c, err := pair(f)
		if err != nil {
			return nil, err
		}
		p.output = append(p.output, c)
	}
	img, err := newImage(m.spec, cmdline(m.spec, tscKHz))
	if err != nil {
		return nil, err
	}
	ch.ram = img.ram
	if ch.rom, err = memfile("firmware", rom(img.entry)); err != nil {
		return nil, err
	}
	mon, err := pair(&ch.monitor)
	if err != nil {
		return nil, err
	}
	p.monitor = newMonitor(mon)
	var serve []func() error
	for i, d := range m.spec.Devices {
		offer := func(c *net.UnixConn) *vhostuser.Backend {
			return vhostuser.New(c, d, func(err error) { m.fail(deviceError(i, d, err)) })
		}
		if d.ID() == virtio.IDNet {
			door, dir, err := newDoor()
			if err != nil {
				return nil, err
			}
			p.doors = append(p.doors, door)
			ch.devices = append(ch.devices, dir)
			serve = append(serve, func() error { return p.serveBehind(door, offer) })
			continue
		}
		var f *os.File
		c, err := pair(&f)
		if err != nil {
			return nil, err
		}
		ch.devices = append(ch.devices, f)
		b := offer(c)
		p.backends = append(p.backends, b)
		serve = append(serve, b.Serve)
	}

	argv, fds := args(m.spec, ch, sandbox)
	p.cmd = &exec.Cmd{
		Path: m.path, Args: append([]string{Program}, argv...),
		Env: []string{"PATH=/usr/bin:/bin", "LC_ALL=C"}, Dir: "/",
		Stderr: p.stderr, ExtraFiles: fds.files,
		SysProcAttr: &syscall.SysProcAttr{
			Setpgid:   true, // ^C in the terminal is the guest's matter
			Pdeathsig: syscall.SIGKILL,
		},
	}
	if err := m.exec(p); err != nil {
		return nil, fmt.Errorf("qemu: start %s: %w", m.path, err)
	}
	p.parts.Go(p.monitor.serve)
	out := &output{w: m.spec.Console}
	for _, c := range p.output {
		p.parts.Go(func() { out.drain(c) })
	}
	for i, f := range serve {
		p.parts.Go(func() {
			if err := f(); err != nil {
				m.fail(deviceError(i, m.spec.Devices[i], err))
			}
		})
	}
	return p, nil
}

func deviceError(i int, d virtio.Device, err error) error {
	return fmt.Errorf("virtio device %d (type %d): %w", i, d.ID(), err)
}

// serveBehind serves the device for which QEMU comes to a door.
func (p *process) serveBehind(d *door, offer func(*net.UnixConn) *vhostuser.Backend) error {
	c, err := d.accept()
	if err != nil {
		return nil // closed: the process has ended
	}
	b := offer(c)
	p.mu.Lock()
	p.backends = append(p.backends, b)
	if p.released {
		b.Close()
	}
	p.mu.Unlock()
	return b.Serve()
}

// exec starts the process and reaps it. Linux sends Pdeathsig when the thread
// ends that forked, not the process: one thread stays for as long as QEMU runs,
// asleep in wait.
func (m *machine) exec(p *process) error {
	started := make(chan error)
	go func() {
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		if err := p.cmd.Start(); err != nil {
			started <- err
			return
		}
		m.mu.Lock()
		m.process = p.cmd.Process
		killed := m.killed
		m.mu.Unlock()
		if killed {
			m.endProcess()
		}
		started <- nil
		p.waitErr = p.cmd.Wait()
		m.mu.Lock()
		m.process = nil
		m.mu.Unlock()
		close(p.ended)
	}()
	return <-started
}

// run waits for the end of a machine that runs.
func (m *machine) run(p *process) {
	<-p.ended
	p.release()
	m.mu.Lock()
	killed, fault := m.killed, m.fault
	m.mu.Unlock()
	m.exit = p.outcome(killed, fault)
	close(m.done)
}

// release ends what served the process once that is gone: the console and the
// monitor after their last byte, the devices at once.
func (p *process) release() {
	<-p.ended
	for _, d := range p.doors {
		d.close()
	}
	p.mu.Lock()
	p.released = true
	for _, b := range p.backends {
		b.Close()
	}
	p.mu.Unlock()
	p.parts.Wait()
	p.closeParts()
}

// closeParts closes this side's ends; whatever served them has returned, or was
// never started.
func (p *process) closeParts() {
	for _, c := range p.output {
		c.Close()
	}
	if p.monitor != nil {
		p.monitor.c.Close()
	}
	for _, d := range p.doors {
		d.close()
	}
	for _, b := range p.backends {
		b.Close()
	}
}

// powerOffStatus is QEMU's exit status when the guest wrote
// engine.StatusPowerOff to isa-debug-exit: (value << 1) | 1. QEMU's own errors
// end it with 1, too, but before the vCPUs run.
const powerOffStatus = engine.StatusPowerOff<<1 | 1

// outcome tells why a machine that ran has ended. The parts have returned.
func (p *process) outcome(killed bool, fault error) engine.Exit {
	st, _ := p.cmd.ProcessState.Sys().(syscall.WaitStatus)
	switch {
	case fault != nil && st.Signaled():
		return engine.Exit{Reason: engine.ReasonFailed, Detail: p.account(fault)}
	case killed && st.Signaled():
		return engine.Exit{Reason: engine.ReasonKilled}
	case st.Exited() && st.ExitStatus() == powerOffStatus:
		return engine.Exit{Reason: engine.ReasonPowerOff}
	case st.Exited() && st.ExitStatus() == 0:
		switch p.monitor.shutdown {
		case "guest-shutdown":
			return engine.Exit{Reason: engine.ReasonPowerOff}
		case "guest-reset", "guest-panic":
			return engine.Exit{Reason: engine.ReasonReset}
		}
	}
	return engine.Exit{Reason: engine.ReasonFailed, Detail: p.account(fault)}
}

// account says in one line how the process ended and what it said.
func (p *process) account(fault error) string {
	var parts []string
	if fault != nil {
		parts = append(parts, fault.Error())
	} else {
		parts = append(parts, "QEMU: "+p.cmd.ProcessState.String())
		if p.monitor.shutdown != "" {
			parts = append(parts, "its monitor said "+p.monitor.shutdown)
		}
	}
	if p.monitor.refused != nil {
		parts = append(parts, p.monitor.refused.Error())
	}
	if s := p.said(); s != "" {
		parts = append(parts, s)
	}
	return strings.Join(parts, "; ")
}

// maxStderr is how much of QEMU's stderr is kept: its last message fits.
const maxStderr = 4 << 10

// said is what QEMU wrote to stderr at last, as one line.
func (p *process) said() string {
	s := strings.ReplaceAll(p.stderr.Tail(maxStderr), Program+": ", "")
	return strings.ReplaceAll(s, "\n", "; ")
}

// output joins the guest's two outputs.
type output struct {
	mu sync.Mutex
	w  io.Writer // nil: nobody listens; guarded by mu
}

// drain passes on what c brings until QEMU closes it. It reads on whatever the
// writer says: a full socket would hold up the guest.
func (o *output) drain(c *net.UnixConn) {
	buf := make([]byte, 4<<10)
	for {
		n, err := c.Read(buf)
		if n > 0 {
			o.mu.Lock()
			if o.w != nil {
				_, _ = o.w.Write(buf[:n])
			}
			o.mu.Unlock()
		}
		if err != nil {
			return
		}
	}
}

// socketpair returns a connection and, for the child, its other end.
func socketpair() (*net.UnixConn, *os.File, error) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, nil, fmt.Errorf("qemu: %w", os.NewSyscallError("socketpair", err))
	}
	ours, theirs := os.NewFile(uintptr(fds[0]), "qemu"), os.NewFile(uintptr(fds[1]), "qemu's end")
	c, err := net.FileConn(ours)
	ours.Close()
	if err != nil {
		theirs.Close()
		return nil, nil, fmt.Errorf("qemu: %w", err)
	}
	return c.(*net.UnixConn), theirs, nil
}

// memfile returns an anonymous file with the given contents.
func memfile(name string, contents []byte) (*os.File, error) {
	fd, err := unix.MemfdCreate(name, unix.MFD_CLOEXEC)
	if err != nil {
		return nil, fmt.Errorf("qemu: %w", os.NewSyscallError("memfd_create", err))
	}
	f := os.NewFile(uintptr(fd), name)
	if _, err := f.Write(contents); err != nil {
		f.Close()
		return nil, fmt.Errorf("qemu: %w", err)
	}
	return f, nil
}
