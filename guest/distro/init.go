// Package distro runs a distro: a root file system with namespaces of its own.
//
// PID 1 of the VM (package pid1) starts /init again, as Argv0, in new pid, mount,
// uts, ipc and cgroup namespaces. That process mounts the disk in its own
// mount namespace, moves into it, and stays: it is the parent and reaper of every process
// of the distro, and serves the sessions. Because no other namespace has the mount, the disk is unmounted
// when the distro's last process is gone, however it went.
//
// Between the two runs a stream socket (descriptor 3 of the distro's init) with
// the frames of internal/wire: StartDistro once, then StopDistro; Reply and
// DistroIdle come back. Its end means that the VM is going down.
package distro

import (
	"bufio"
	"compress/gzip"
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/signal"
	"path"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/wsl2/wsl2/guest/kmsg"
	"github.com/wsl2/wsl2/guest/mounts"
	"github.com/wsl2/wsl2/guest/port"
	"github.com/wsl2/wsl2/guest/reaper"
	"github.com/wsl2/wsl2/guest/session"
	"github.com/wsl2/wsl2/guest/shares"
	"github.com/wsl2/wsl2/guest/tools"
	"github.com/wsl2/wsl2/guest/untar"
	"github.com/wsl2/wsl2/guest/users"
	"github.com/wsl2/wsl2/internal/nsinit"
	"github.com/wsl2/wsl2/internal/wire"
	"github.com/wsl2/wsl2/internal/wslconf"
)

// Argv0 is the name under which /init is a distro's init; os.Args[1] is the
// port of its sessions (package port), os.Args[2] the distro's name (for ps). What follows, with
// version 1, is where the shares are in the working directory, "" for one that is not.
const Argv0 = "wsl2-distro"

// ChannelFD is the descriptor of the channel to PID 1 of the VM.
const ChannelFD = 3

// Places in the VM's own root.
const (
	// MountPoint is where a new root is mounted before it becomes the root.
	MountPoint = "/distro"
	// initramfs is what the VM booted from, kept by the kernel for retain_initrd.
	initramfs = "/sys/firmware/initrd"
	// systemArchive in it is the system distro's root, a gzipped tar, which the
	// kernel passed over when it unpacked the rest.
	systemArchive = "system.tar.gz"
)

// settle bounds waits for what should take no time: processes to vanish after
// SIGKILL, clients to take their last message.
const settle = 5 * time.Second

type distro struct {
	log *kmsg.Logger
	rp  *reaper.Reaper
	srv *session.Server
	l   net.Listener

	mu      sync.Mutex // guards writes to channel
	channel *os.File

	// Immutable once it serves.
	name     string
	cgroup   string // where its processes are, if it has no pid namespace: in the VM's own root
	dir      bool   // version 1: the root is a directory of the host, and the kernel the host's
	shares   *shares.Mounter
	conf     wslconf.Config
	warnings []string // for the user
	systemd  *systemd // nil: we are PID 1
}

// newDistro makes what both roles begin with (see RunBeside).
func newDistro(args []string) (d *distro, port uint32, err error) {
	// Signals from inside the distro (kill 1) must not end it; with a handler
	// they are delivered, with SIG_IGN every session would inherit that.
	signal.Notify(make(chan os.Signal, 1), unix.SIGHUP, unix.SIGINT, unix.SIGQUIT, unix.SIGTERM,
		unix.SIGUSR1, unix.SIGUSR2, unix.SIGALRM, unix.SIGPIPE, unix.SIGPWR)
	d = &distro{log: kmsg.New("wsl2-distro")}
	if len(args) < 3 {
		return d, 0, fmt.Errorf("expected a port and a name: %q", args)
	}
	n, err := strconv.ParseUint(args[1], 10, 32)
	if err != nil {
		return d, 0, err
	}
	unix.CloseOnExec(ChannelFD)
	if err := unix.SetNonblock(ChannelFD, true); err != nil {
		return d, 0, fmt.Errorf("no channel to the VM's init: %w", err)
	}
	d.channel = os.NewFile(ChannelFD, "channel")
	if n == nsinit.Port {
		d.log = kmsg.ToStderr("wsl2-distro")
		unix.CloseOnExec(nsinit.LockFD)
	}
	return d, uint32(n), nil
}

// Run is the main function of a distro's init. It returns the exit status.
func Run(args []string) int {
	d, port, err := newDistro(args)
	if err != nil {
		d.log.Errorf("%v", err)
		return 1
	}
	m, err := wire.Read(d.channel) // unbuffered: who serves beside systemd reads on
	start, ok := m.(*wire.StartDistro)
	if err != nil || !ok {
		d.log.Errorf("expected StartDistro: %v %v", m, err)
		return 1
	}
	d.name = start.Name
	if start.Slot == wire.DirSlot {
		err = d.makeDirRoot(start, args[3:])
	} else {
		err = d.makeRoot(start)
	}
	if err == nil && d.conf.Systemd && !d.dir {
		if exe := findSystemd(); exe == "" {
			d.warnings = append(d.warnings, fmt.Sprintf("the distro has no systemd, which boot.systemd in %s asks for; install it, or drop the line", wslconf.Path))
		} else {
			err = d.handOver(start, args[1], exe)
		}
	}
	if err == nil {
		err = d.open(start, port)
	}
	if err != nil {
		d.send(&wire.Reply{ID: start.ID, Code: codeOf(err), Text: fmt.Sprintf("start distro %s: %v", start.Name, err)})
		return 1
	}
	return d.serve(start.ID, port)
}

// diskError marks errors that are the disk's fault.
type diskError struct{ error }

func (e diskError) Unwrap() error { return e.error }

func codeOf(err error) wire.Code {
	if errors.Is(err, errUnchecked) {
		return wire.CodeUnchecked
	}
	if errors.As(err, new(diskError)) {
		return wire.CodeDisk
	}
	return wire.CodeInternal
}

func (d *distro) send(m wire.Message) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if err := wire.Write(d.channel, m); err != nil {
		d.log.Errorf("%s: %v", d.name, err)
	}
}

// makeRoot makes the root, moves into it and reads its wsl.conf.
func (d *distro) makeRoot(m *wire.StartDistro) error {
	unix.Umask(0o022)
	if m.Slot == wire.RootSlot {
		d.conf = wslconf.Defaults()
		d.conf.Interop, d.conf.MountFsTab = false, false
		return d.join()
	}
	// Not recursively: Shared stays what it is, and nothing else is shared.
	if err := unix.Mount("", "/", "", unix.MS_PRIVATE, ""); err != nil {
		return fmt.Errorf("make the root private: %w", err)
	}
	if m.Slot == wire.SystemSlot {
		if err := mountSystem(); err != nil {
			return err
		}
	} else {
		device, err := Device(m.Slot)
		flags := uintptr(0)
		if m.ReadOnly {
			flags = unix.MS_RDONLY
		}
		if err == nil {
			err = MountDisk(device, MountPoint, flags)
		}
		if err == nil && !m.Checked && !m.ReadOnly {
			err = unchecked(device)
		}
		if err != nil {
			return diskError{err}
		}
	}
	init, initErr := openTree(tools.Init)
	if err := moveShared(); err != nil { // a disk that is read-only, say
		d.log.Errorf("%s: %v", d.name, err)
		// Detached as a peer it would take along what is mounted below it for all.
		if err := unix.Mount("", Shared, "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil && err != unix.EINVAL {
			return fmt.Errorf("make %s private: %w", Shared, err)
		}
	}
	if err := enter(); err != nil {
		return err
	}
	if initErr == nil {
		initErr = installTools(init)
	}
	if initErr != nil { // a disk that is read-only, say
		d.log.Errorf("%s: no tools: %v", d.name, initErr)
	}
	// One thing that cannot be mounted must not lock the user out of the rest.
	if err := mounts.All(root); err != nil {
		d.log.Errorf("%s: %v", d.name, err)
	}
	return d.configure(m)
}

// configure reads the distro's wsl.conf, and applies what systemd is to find.
func (d *distro) configure(m *wire.StartDistro) error {
	if d.conf = wslconf.Defaults(); m.SafeMode {
		// What its wsl.conf says of these files is not known: they stay as they are.
		d.conf.GenerateHosts, d.conf.GenerateResolvConf, d.conf.HostTimezone = false, false, false
		d.warnings = append(d.warnings, fmt.Sprintf("safe mode: %s of %s is not read", wslconf.Path, d.name))
	} else {
		d.conf, d.warnings = wslconf.Read("/")
	}
	if err := unix.Sethostname([]byte(d.hostname(m))); err != nil {
		return fmt.Errorf("set the host name %q: %w", d.hostname(m), err)
	}
	if err := etc("/", d.conf, d.resolvConf(), d.hostname(m), m.Hosts, m.Timezone); err != nil { // a disk that is read-only, say
		d.log.Errorf("%s: %v", d.name, err)
	}
	return nil
}

// hostname is the host's, unless the distro wants another.
func (d *distro) hostname(m *wire.StartDistro) string {
	if d.conf.Hostname != "" {
		return d.conf.Hostname
	}
	return m.Hostname
}

// open listens on port n and runs what the distro wants run at its start.
func (d *distro) open(m *wire.StartDistro, n uint32) error {
	if m.Limits.PIDs != 0 {
		spareThreads(8)
	}
	for _, l := range limits {
		// syscall's, not unix's: it also stops Go from restoring the old limit in children.
		limit := syscall.Rlimit{Cur: l.rlimit.Cur, Max: l.rlimit.Max}
		if d.dir { // root of a user namespace raises no limit of the host's
			var has syscall.Rlimit
			if err := syscall.Getrlimit(l.resource, &has); err == nil {
				limit = syscall.Rlimit{Cur: min(limit.Cur, has.Max), Max: min(limit.Max, has.Max)}
			}
		}
		if err := syscall.Setrlimit(l.resource, &limit); err != nil {
			d.log.Errorf("%s: set resource limit %d: %v", d.name, l.resource, err)
		}
	}
	if !d.dir {
		d.share(m)
	}
	l, err := port.Listen(n)
	if err != nil {
		return err
	}
	d.l = l
	// Telling that it is idle is left to a goroutine: the reaper must not wait for
	// whoever reads the channel.
	quiet := make(chan struct{}, 1)
	perhapsIdle := func() {
		select {
		case quiet <- struct{}{}:
		default: // the goroutine has yet to look
		}
	}
	d.rp = reaper.New(perhapsIdle)
	if m.Limits.MemoryBytes != 0 && !d.dir { // in a small one it may well be the largest process; not even then is it spared on the host
		if err := d.rp.Spare(); err != nil {
			d.log.Errorf("%s: %v", d.name, err)
		}
	}
	config := session.Config{
		Reaper:      d.rp,
		Distro:      m.Name,
		Hostname:    d.hostname(m),
		DefaultUser: d.conf.DefaultUser,
		Logf:        d.log.Printf,
		OnQuiet:     perhapsIdle,
		StandIn:     func(id wire.SessionID) error { d.send(&wire.HostExec{Session: id}); return nil },
		Shares:      d.shares,
	}
	if d.conf.Interop {
		config.Interop = session.InteropDir
	}
	if d.systemd != nil {
		config.Prepare = d.systemd.session
	}
	d.srv = session.NewServer(config)
	if d.conf.Umask != 0o022 { // which it is
		d.shares.Reach("")       // its files are for everybody: they are made when it returns
		unix.Umask(d.conf.Umask) // no earlier: every user asks in the directory of interop
	}
	if d.systemd == nil && d.conf.MountFsTab {
		d.mountFsTab()
	}
	d.bootCommand()
	go func() {
		if err := d.trust("/", m.Certificates); err != nil {
			d.log.Errorf("%s: certificates of the host: %v", d.name, err)
		}
	}()
	go func() {
		for range quiet {
			if d.idle() {
				d.send(&wire.DistroIdle{Name: d.name})
			}
		}
	}()
	go func() {
		if err := d.srv.Serve(l); err != nil {
			d.log.Errorf("%s: %v", d.name, err)
		}
	}()
	return nil
}

// spareThreads has the runtime make threads while it can, and it keeps them: one that
// it could not make because the distro has used up its processes would end this init.
func spareThreads(n int) {
	var ready, done sync.WaitGroup
	ready.Add(n)
	release := make(chan struct{})
	for range n {
		done.Go(func() {
			runtime.LockOSThread()
			defer runtime.UnlockOSThread()
			ready.Done()
			<-release
		})
	}
	ready.Wait()
	close(release)
	done.Wait()
}

// share makes the host's directories ready to be mounted.
func (d *distro) share(m *wire.StartDistro) {
	d.shares = shares.Start(shares.Config{
		Shares: narrowed(m.Shares, &d.conf),
		Ask:    func(m *wire.MountShare) { d.send(m) },
		Owner: func() (uid, gid uint32, err error) {
			who, _ := users.Default("/", d.conf.DefaultUser, m.User) // each session tells why not
			u, err := users.Lookup("/", who)
			if err != nil {
				return 0, 0, err
			}
			return u.UID, u.GID, nil
		},
		Logf: d.log.Errorf,
	})
}

// narrowed are the host's directories that a distro wants of those it may have, its wsl.conf being what it is.
func narrowed(list []wire.Share, conf *wslconf.Config) (wanted []wire.Share) {
	for _, s := range list {
		how := conf.Shares[strings.ToLower(path.Base(s.Guest))]
		if !conf.Automount || how == wslconf.None {
			continue
		}
		s.ReadOnly = s.ReadOnly || how == wslconf.ReadOnly
		wanted = append(wanted, s)
	}
	return wanted
}

// idle tells whether there is neither process nor session, the same that
// StopDistro.IfIdle asks for. What systemd runs holds a distro only by boot.keepAlive.
func (d *distro) idle() bool { return !d.conf.KeepAlive && d.rp.Empty() && d.srv.Quiet() }

// mountSystem unpacks the system distro into a tmpfs: a root of its own, which
// a user may damage without damaging the VM's.
func mountSystem() error {
	if err := unix.Mount("tmpfs", MountPoint, "tmpfs", 0, "mode=755"); err != nil {
		return fmt.Errorf("mount a tmpfs for the system distro: %w", err)
	}
	return unpackSystem(MountPoint)
}

// unpackSystem unpacks the system distro's root into dir.
func unpackSystem(dir string) error {
	f, err := os.Open(initramfs)
	if err != nil {
		return fmt.Errorf("the kernel did not keep the initramfs, which holds the system distro (is retain_initrd on its command line?): %w", err)
	}
	defer f.Close()
	archive, err := findInitramfs(f, systemArchive)
	if err != nil {
		return fmt.Errorf("find the system distro: %w", err)
	}
	z, err := gzip.NewReader(archive)
	if err != nil {
		return fmt.Errorf("%s: %w", systemArchive, err)
	}
	if err := untar.Unpack(context.Background(), dir, z, nil); err != nil {
		return fmt.Errorf("%s: %w", systemArchive, err)
	}
	return nil
}

// enter makes MountPoint the root. pivot_root(2) refuses when the current root
// is the initramfs ("The rootfs cannot be pivoted"), so it is covered instead, as switch_root(8) does.
func enter() error {
	for _, target := range outer {
		// EINVAL: not mounted, which is as good.
		if err := unix.Unmount(target, unix.MNT_DETACH); err != nil && err != unix.EINVAL && err != unix.ENOENT {
			return fmt.Errorf("detach %s: %w", target, err)
		}
	}
	if err := unix.Chdir(MountPoint); err != nil {
		return fmt.Errorf("enter the new root: %w", err)
	}
	if err := unix.Mount(".", "/", "", unix.MS_MOVE, ""); err != nil {
		return fmt.Errorf("move the new root: %w", err)
	}
	if err := unix.Chroot("."); err != nil {
		return fmt.Errorf("change root: %w", err)
	}
	if err := unix.Chdir("/"); err != nil {
		return fmt.Errorf("enter the new root: %w", err)
	}
	// Container engines bind-mount with propagation and need a shared root.
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_SHARED, ""); err != nil {
		return fmt.Errorf("share the new root: %w", err)
	}
	return nil
}

// serve tells PID 1 of the VM, whose StartDistro had this ID, that the distro
// runs, and answers it until it says to stop.
func (d *distro) serve(id, port uint32) int {
	d.send(&wire.Reply{ID: id, Port: port, Text: strings.Join(d.warnings, "\n")})
	r := bufio.NewReader(d.channel)
	for {
		m, err := wire.Read(r)
		if err != nil {
			d.log.Errorf("%s: channel to the VM's init: %v; stopping", d.name, err)
			return d.stop(&wire.StopDistro{})
		}
		stop, ok := m.(*wire.StopDistro)
		if !ok {
			d.log.Errorf("%s: unexpected %v", d.name, m.Type())
			continue
		}
		if stop.IfIdle && !(d.idle() && d.srv.CloseIfIdle()) {
			d.send(&wire.Reply{ID: stop.ID, Code: wire.CodeBusy, Text: "the distro has running processes, or boot.keepAlive in its " + wslconf.Path})
			continue
		}
		return d.stop(stop)
	}
}

// stop ends every process and makes the disk clean. The process' end, which
// follows, is the news that it is done; a Reply comes only with an error.
func (d *distro) stop(m *wire.StopDistro) int {
	d.srv.Close()
	d.l.Close()
	d.shares.Close()
	if !d.rp.Empty() {
		for _, sig := range []syscall.Signal{unix.SIGTERM, unix.SIGCONT} {
			d.signalAll(sig)
		}
		d.hangup() // an interactive shell ignores SIGTERM
		if !d.waitEmpty(time.Duration(m.GraceMillis) * time.Millisecond) {
			d.signalAll(unix.SIGKILL)
			if !d.waitEmpty(settle) {
				d.send(&wire.Reply{ID: m.ID, Code: wire.CodeBusy,
					Text: "processes do not end although killed: they wait for I/O that does not come"})
				return 1
			}
		}
	}
	d.srv.Wait(settle)
	if d.cgroup != "" || d.dir {
		return 0 // the root is PID 1's, or the host's
	}
	if d.systemd != nil {
		return d.powerOff()
	}
	if err := cleanRoot(); err != nil {
		d.send(&wire.Reply{ID: m.ID, Code: wire.CodeDisk, Text: err.Error()})
		return 1
	}
	return 0
}

// signalAll sends a signal to every process but us, and those of systemd.
func (d *distro) signalAll(sig syscall.Signal) {
	if d.systemd != nil {
		signalCgroup(sessionsCgroup, sig)
		return
	}
	d.kill(sig)
}

func (d *distro) waitEmpty(timeout time.Duration) bool {
	ctx, cancel := context.WithTimeout(context.Background(), timeout)
	defer cancel()
	return d.rp.WaitEmpty(ctx) == nil
}

// cleanRoot writes everything back and makes the root read-only, while errors
// can still be told. The unmounting itself follows with the namespace's end.
func cleanRoot() error {
	fd, err := unix.Open("/", unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("open the root: %w", err)
	}
	err = unix.Syncfs(fd)
	unix.Close(fd)
	if err != nil {
		return fmt.Errorf("write back the disk: %w", err)
	}
	// EBUSY: something inside is mounted from files of the disk (loop, swap). It
	// goes with the namespace, and the journal covers it.
	if err := unix.Mount("", "/", "", unix.MS_REMOUNT|unix.MS_RDONLY, ""); err != nil && err != unix.EBUSY {
		return fmt.Errorf("make the disk read-only: %w", err)
	}
	return nil
}
