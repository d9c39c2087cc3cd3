package service

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/wsl2/wsl2/launcher/api"
	"github.com/wsl2/wsl2/launcher/config"
	"github.com/wsl2/wsl2/launcher/internal/filelock"
	"github.com/wsl2/wsl2/launcher/netproc"
	"github.com/wsl2/wsl2/launcher/vmproc"
)

// guestCID is the VM's vsock context ID, the first that is not reserved. VMs do
// not see each other, so that all may have it.
const guestCID = 3

// diskSlots is how many distros can run at once.
const diskSlots = 16

// fsSlots is how many shares can be virtio-fs at once; others are 9P.
const fsSlots = 4

// Process is a VM's process (*vmproc.Process, but for tests).
type Process interface {
	Attach(ctx context.Context, path string) (slot int, err error)
	Detach(ctx context.Context, slot int) error
	AttachFS(ctx context.Context) (vmproc.FS, error)
	Kill()
	Terminated() <-chan struct{}
	Done() <-chan struct{}
	Exit() error
	Started() vmproc.Started
}

// StartFunc starts a VM's process, which takes over the lock, and returns when
// its vCPUs run. diskError must not block.
type StartFunc func(ctx context.Context, c vmproc.Config, lock *os.File, diskError func(slot int, err error)) (Process, error)

// Booter starts VMs.
type Booter struct {
	Paths  config.Paths
	Start  StartFunc
	Getenv func(string) string
	Log    *slog.Logger
}

// Boot is a BootFunc.
func (b *Booter) Boot(ctx context.Context, r BootRequest) (Machine, error) {
	began := time.Now()
	paths := b.Paths.ForVM(r.Own)
	kernel, own, err := config.FindKernel(r.Settings.Kernel, b.Getenv)
	if err != nil {
		return nil, api.Errorf(api.CodeVM, config.KernelHint, "%v", err)
	}
	initramfs, err := config.FindInitramfs(b.Getenv)
	if err != nil {
		return nil, api.Errorf(api.CodeVM, config.KernelHint, "%v", err)
	}
	lock, err := lockFile(ctx, paths.VMLock())
	if err != nil {
		return nil, fmt.Errorf("an earlier VM has not ended yet: %w", err)
	}
	defer lock.Close()           // the process has it now
	os.Remove(paths.VsockPath()) // left by a VM that was killed
	listener, err := listenControl(paths.VsockPath())
	if err != nil {
		return nil, err
	}
	defer listener.Close()
	c := vmproc.Config{
		Accel: r.Settings.Accel, Kernel: kernel, Initramfs: initramfs, Cmdline: r.Settings.KernelCommandLine,
		MemoryBytes: r.Settings.MemoryBytes, CPUs: r.Settings.Processors,
		DiskSlots: diskSlots, FSSlots: fsSlots, LateSlots: own, GuestCID: guestCID, VsockPath: paths.VsockPath(), ConsoleLog: paths.ConsoleLog(), Verdict: paths.KVMVerdict(),
	}
	if n := r.Settings.Network; !n.Off {
		c.Network = netproc.Config{HostLoopback: n.HostLoopback, Policy: n.Policy, BytesPerSecond: n.Bandwidth, Names: paths.Names()}.Args()
		os.Remove(paths.Names()) // an earlier VM's
	}
	if r.Disk != "" {
		c.Disks = []string{r.Disk}
	}
	swap, warnings := -1, []string(nil)
	if size := r.Settings.SwapBytes; size != 0 {
		path := paths.Swap(r.Settings.SwapFile)
		if err := makeSwap(path, size); err != nil {
			warnings = append(warnings, fmt.Sprintf("the VM has no swap (wsl2.swap in wslconfig): %v", err))
		} else {
			defer os.Remove(path) // the VM has it open
			swap = len(c.Disks)
			c.Disks = append(c.Disks, path)
		}
	}
	p, err := b.Start(ctx, c, lock, func(slot int, err error) {
		b.Log.Error("disk", "slot", slot, "err", err)
		r.DiskError(slot, err)
	})
	if err != nil {
		return nil, bootFailure(err, r.Settings.Kernel)
	}
	ctl, err := acceptControl(ctx, listener, r, p.Done(), func() error { return earlyExit(p.Exit()) })
	if err != nil {
		p.Kill()
		<-p.Done()
		return nil, bootFailure(err, r.Settings.Kernel)
	}
	if swap >= 0 {
		if err := ctl.swapOn(ctx, swap); err != nil {
			warnings = append(warnings, fmt.Sprintf("the VM has no swap (wsl2.swap in wslconfig): %v", err))
		}
	}
	names := ""
	if c.Network != nil {
		ctl.first, names = network(), paths.Names()
	}
	started := p.Started()
	m := &machine{control: ctl, Process: p, path: paths.VsockPath(), names: names, log: b.Log, warnings: warnings, info: api.VM{
		PID: started.PID, Accel: started.Accel, AccelReason: started.AccelReason, Kernel: kernel, KernelRelease: ctl.ready.KernelRelease,
		MemoryBytes: c.MemoryBytes, CPUs: c.CPUs, BootMillis: time.Since(began).Milliseconds(),
		KernelMicros: int64(ctl.ready.BootNanos / 1000),
	}}
	go m.guard()
	return m, nil
}

// earlyExit says that the VM ended before its guest was ready.
func earlyExit(exit error) error {
	if exit == nil {
		exit = errors.New("its guest powered off")
	}
	return fmt.Errorf("it ended before its guest was ready: %w", exit)
}

// bootFailure says that the VM did not start. kernel is the one that the user
// chose, "" if none: a wrong one is the likeliest reason of an early crash.
func bootFailure(err error, kernel string) error {
	var told *api.Error
	if errors.As(err, &told) {
		return err
	}
	if kernel != "" && !strings.Contains(err.Error(), kernel) {
		return api.Errorf(api.CodeVM, "is that a Linux kernel (vmlinux or bzImage) with what wsl2 needs?", "the VM did not start with the kernel %s: %v", kernel, err)
	}
	return api.Errorf(api.CodeVM, "", "the VM did not start: %v", err)
}

// controlGrace is how long a VM whose control channel is gone has to end by
// itself: /init powers off when it loses its launcher.
const controlGrace = 5 * time.Second

// machine joins a VM's process and its control channel.
type machine struct {
	*control
	Process
	path string
	// names is MachineInfo.NamesPath.
	names string
	info  api.VM
	log   *slog.Logger
	// warnings are of its start.
	warnings []string
}

// guard ends a VM whose PID 1 no longer speaks with us or whose process is asked to
// end, and the channel of a VM that has ended.
func (m *machine) guard() {
	select {
	case <-m.Process.Done():
	case <-m.Process.Terminated():
		m.log.Info("the VM's process was sent SIGTERM; the guest powers off")
		patience := killAfter
		if m.control.Shutdown(stopGrace) != nil {
			patience = 0
		}
		m.endWithin(patience, nil)
	case <-m.control.lost:
		m.endWithin(controlGrace, m.control.cause)
	}
	m.control.conn.Close()
}

// endWithin waits for the VM's end and kills it if it takes longer; why is for the log.
func (m *machine) endWithin(d time.Duration, why error) {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-m.Process.Done():
	case <-t.C:
		m.log.Warn("the guest is silent; VM is killed", "err", why)
		m.Process.Kill()
		<-m.Process.Done()
	}
}

// ShareDevice implements Machine.
func (m *machine) ShareDevice(ctx context.Context) (tag, socket string, err error) {
	fs, err := m.Process.AttachFS(ctx)
	if err == nil && fs.Device != "" {
		err = m.control.registerDevice(ctx, fs.Device)
	}
	return fs.Tag, fs.Socket, err
}

func (m *machine) Info() MachineInfo {
	return MachineInfo{VM: m.info, VsockPath: m.path, NamesPath: m.names, Warnings: m.warnings}
}

// lockFile opens path and takes its flock, waiting for who holds it until ctx
// ends.
func lockFile(ctx context.Context, path string) (*os.File, error) {
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		return nil, err
	}
	return filelock.Lock(ctx, path, os.O_RDWR)
}
