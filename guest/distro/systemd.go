package distro

import (
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/wsl2/wsl2/guest/kmsg"
	m "github.com/wsl2/wsl2/guest/mounts"
	"github.com/wsl2/wsl2/guest/users"
	"github.com/wsl2/wsl2/internal/wire"
	"github.com/wsl2/wsl2/internal/wslconf"
)

// A distro whose wsl.conf says boot.systemd has the distro's own systemd as PID 1
// of its namespaces. Its init makes the root as ever, then starts itself
// again as BesideArgv0, with the channel, and becomes systemd. The process beside serves
// the sessions: it is their parent and, as a subreaper, that of their orphans, in a cgroup of its own
// that systemd does not manage. What systemd starts is systemd's.

// BesideArgv0 is the name under which /init serves beside systemd. Its '@' keeps
// systemd's shutdown from killing it or waiting for it (systemd.io/ROOT_STORAGE_DAEMONS).
const BesideArgv0 = "@wsl2-distro"

const (
	// besideFD is the descriptor on which the process beside is told what to serve,
	// and says that it does.
	besideFD = 4
	// sessionsCgroup holds it and the sessions.
	sessionsCgroup = "/sys/fs/cgroup/wsl2"
	// notifySocket is where systemd says that it is up (sd_notify(3)), as to any container manager.
	notifySocket = "/run/wsl2/notify"
	// maxPowerOff bounds the time that systemd gets to stop: the service waits for 30 s
	// in all before it ends the VM.
	maxPowerOff = 20 * time.Second
	// maxSessionWait bounds what a session waits for systemd, whatever boot.initTimeout
	// is: the client takes a guest that is silent for a minute for one that hangs.
	maxSessionWait = 45 * time.Second
	// sigPowerOff makes systemd power off (systemd(1), SIGRTMIN+4; the C library's SIGRTMIN is 34).
	sigPowerOff = syscall.Signal(38)
)

// inits are where distros have systemd, the last one for those that wrap it.
var inits = []string{"/usr/lib/systemd/systemd", "/lib/systemd/systemd", "/sbin/init"}

// findSystemd returns the systemd of the distro, "" if it has none.
func findSystemd() string {
	for _, path := range inits {
		if real, err := filepath.EvalSymlinks(path); err == nil && filepath.Base(real) != "busybox" && unix.Access(path, unix.X_OK) == nil {
			return path
		}
	}
	return ""
}

// forSystemd is what systemd finds in /run: units that fail or hang in a distro of
// wsl2 are masked, as WSL does.
var forSystemd = []m.Item{
	m.Dir{Path: "/run/systemd", Mode: 0o755},
	m.Dir{Path: "/run/systemd/system", Mode: 0o755},
	m.Link{Path: "/run/systemd/system/systemd-networkd-wait-online.service", To: "/dev/null", Why: "the VM's network is none of the distro's"},
	m.Link{Path: "/run/systemd/system/NetworkManager-wait-online.service", To: "/dev/null", Why: "the same"},
	m.Link{Path: "/run/systemd/system/console-getty.service", To: "/dev/null", Why: "there is no console to log in at"},
	m.Dir{Path: "/run/systemd/system/init.mount.d", Mode: 0o755},
	m.File{Path: "/run/systemd/system/init.mount.d/wsl2.conf", Content: notAtShutdown, Why: "it runs from there"},
	m.Dir{Path: "/run/systemd/system/mnt-wsl.mount.d", Mode: 0o755},
	m.File{Path: "/run/systemd/system/mnt-wsl.mount.d/wsl2.conf", Content: notAtShutdown, Why: "what is below it"},
	m.Dir{Path: "/run/systemd/system/mnt-wsl-.mount.d", Mode: 0o755},
	m.File{Path: "/run/systemd/system/mnt-wsl-.mount.d/wsl2.conf", Content: notAtShutdown, Why: "it would be unmounted in all distros"},
	m.File{Path: "/run/systemd/system/wsl2-login@.service", Content: login, Why: "systemd-logind knows of users by PAM"},
}

// login is a user's login, by number, at systemd-logind, if PAM has that. As in WSL it lasts
// as long as the distro runs, and sessions of ours have no part in it. (With Type=exec systemd 252
// would wait for ever: its helper for PAM holds what tells it.)
const login = `[Unit]
Description=Login of user %i in wsl2
[Service]
User=%i
PAMName=login
ExecStart=/bin/sh -c "exec sleep infinity"
Restart=always
`

// notAtShutdown keeps systemd from unmounting what it has not mounted.
const notAtShutdown = "[Unit]\nDefaultDependencies=no\n"

// binfmtFile makes systemd-binfmt, which begins by forgetting all formats, register ours.
const binfmtFile = "/run/binfmt.d/WSLInterop.conf"

// BinfmtMZ is what makes Windows programs the host's to run, for binfmt_misc's
// register file. F: this /init, whatever a distro has there.
const BinfmtMZ = ":WSLInterop:M::MZ::/init:FP"

// handOver starts the process beside and becomes systemd. It returns only with an error.
func (d *distro) handOver(start *wire.StartDistro, port, systemd string) error {
	if err := m.All(forSystemd); err != nil {
		d.log.Errorf("%s: %v", d.name, err)
	}
	if d.conf.ProtectBinfmt {
		if err := errors.Join(os.MkdirAll(filepath.Dir(binfmtFile), 0o755), os.WriteFile(binfmtFile, []byte(BinfmtMZ+"\n"), 0o644)); err != nil {
			d.log.Errorf("%s: %v", d.name, err)
		}
	}
	if err := d.startBeside(start, port); err != nil {
		return fmt.Errorf("serve beside systemd: %w", err)
	}
	argv := []string{systemd}
	if !d.conf.MountFsTab {
		argv = append(argv, "fstab=no") // in a container its words are the kernel's (kernel-command-line(7))
	}
	err := syscall.Exec(systemd, argv, []string{"PATH=/usr/sbin:/usr/bin:/sbin:/bin", "container=wsl", "NOTIFY_SOCKET=" + notifySocket})
	return fmt.Errorf("run %s: %w", systemd, err)
}

// startBeside returns when the process beside serves.
func (d *distro) startBeside(start *wire.StartDistro, port string) error {
	if err := unix.Mkdir(sessionsCgroup, 0o755); err != nil && err != unix.EEXIST {
		return fmt.Errorf("make %s: %w", sessionsCgroup, err)
	}
	cgroup, err := unix.Open(sessionsCgroup, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("open %s: %w", sessionsCgroup, err)
	}
	defer unix.Close(cgroup)
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("make a channel: %w", err)
	}
	ours := os.NewFile(uintptr(pair[0]), "beside")
	defer ours.Close()
	_, err = syscall.ForkExec(self, []string{BesideArgv0, port, d.name}, &syscall.ProcAttr{
		Dir: "/", Env: []string{"PATH=/usr/sbin:/usr/bin:/sbin:/bin"},
		Files: []uintptr{0, 1, 2, ChannelFD, uintptr(pair[1])},
		Sys:   &syscall.SysProcAttr{Setsid: true, UseCgroupFD: true, CgroupFD: cgroup},
	})
	unix.Close(pair[1])
	if err != nil {
		return fmt.Errorf("start %s: %w", self, err)
	}
	for _, m := range []wire.Message{start, &wire.Reply{Text: strings.Join(d.warnings, "\n")}} {
		if err := wire.Write(ours, m); err != nil {
			return err
		}
	}
	m, err := wire.Read(ours)
	if err != nil {
		return fmt.Errorf("it ended: %w", err)
	}
	if r, ok := m.(*wire.Reply); !ok || r.Code != wire.CodeOK {
		return fmt.Errorf("%+v", m)
	}
	return nil
}

// self is /init, wherever the distro's root has it.
const self = "/proc/self/exe"

// RunBeside is the main function of the process beside systemd. It returns the
// exit status.
func RunBeside(args []string) int {
	d, port, err := newDistro(args)
	if err != nil {
		d.log.Errorf("beside systemd: %v", err)
		return 1
	}
	unix.CloseOnExec(besideFD)
	first := os.NewFile(besideFD, "beside")
	start, err := d.serveBeside(first, port)
	if err != nil {
		wire.Write(first, &wire.Reply{Code: codeOf(err), Text: err.Error()}) //nolint:errcheck // it sees our end
		return 1
	}
	if err := wire.Write(first, &wire.Reply{}); err != nil {
		d.log.Errorf("%s: beside systemd: %v", d.name, err)
		return 1
	}
	first.Close()
	return d.serve(start.ID, port)
}

// serveBeside reads what PID 1 says and opens the distro.
func (d *distro) serveBeside(first *os.File, port uint32) (*wire.StartDistro, error) {
	// The sessions' orphans stay ours: they hold the distro, and end with it.
	if err := unix.Prctl(unix.PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0); err != nil {
		return nil, fmt.Errorf("become a subreaper: %w", err)
	}
	m1, err1 := wire.Read(first)
	m2, err2 := wire.Read(first)
	start, ok1 := m1.(*wire.StartDistro)
	made, ok2 := m2.(*wire.Reply)
	if err := errors.Join(err1, err2); err != nil || !ok1 || !ok2 {
		return nil, fmt.Errorf("expected StartDistro and Reply: %v %v %w", m1, m2, err)
	}
	d.name = start.Name
	if made.Text != "" {
		d.warnings = strings.Split(made.Text, "\n")
	}
	d.conf, _ = wslconf.Read("/") // its warnings are among those
	var err error
	if d.systemd, err = newSystemd(d.log, d.conf.InitTimeout, d.run); err != nil {
		return nil, err
	}
	return start, d.open(start, port)
}

// systemd is what the process beside knows of PID 1. It is safe for concurrent use.
type systemd struct {
	timeout time.Duration
	run     runner
	up      chan struct{} // closed when it has finished booting, running or degraded
	late    time.Time     // when nobody waits for that any more

	mu     sync.Mutex
	failed map[uint32]bool // users whose session did not come up; guarded by mu
}

// runner runs a program to its end and returns what it printed (distro.run).
type runner func(timeout time.Duration, argv ...string) (string, error)

// newSystemd listens for what systemd says. What it returns lives as long as the process.
func newSystemd(log *kmsg.Logger, timeout time.Duration, run runner) (*systemd, error) {
	l, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: notifySocket, Net: "unixgram"})
	if err != nil {
		return nil, fmt.Errorf("listen for systemd: %w", err)
	}
	s := &systemd{timeout: timeout, run: run, up: make(chan struct{}), late: time.Now().Add(timeout), failed: map[uint32]bool{}}
	go func() {
		if err := s.listen(l); err != nil {
			log.Errorf("no word from systemd any more: %v", err)
		}
	}()
	return s, nil
}

// listen reads all that is sent, for ever: a full queue would hold systemd up.
func (s *systemd) listen(l *net.UnixConn) error {
	message := make([]byte, 4096)
	up := false
	for {
		n, err := l.Read(message)
		if err != nil {
			return err
		}
		if !up && saysReady(string(message[:n])) {
			up = true
			close(s.up)
		}
	}
}

// saysReady tells whether a message of sd_notify(3) is the one that it is up.
func saysReady(message string) bool {
	for line := range strings.Lines(message) {
		if strings.TrimSpace(line) == "READY=1" {
			return true
		}
	}
	return false
}

// session waits until systemd is up and makes sure that the user's own systemd
// runs. env is what leads programs there. The session starts in any case; notice says what it lacks.
func (s *systemd) session(u *users.User) (env []string, notice string) {
	deadline := time.Now().Add(maxSessionWait)
	select {
	case <-s.up:
	default:
		timer := time.NewTimer(min(time.Until(s.late), maxSessionWait))
		defer timer.Stop()
		select {
		case <-s.up:
		case <-timer.C:
			return nil, fmt.Sprintf("systemd is not up after %v (boot.initTimeout in %s, at most %v); this session does without it", min(s.timeout, maxSessionWait), wslconf.Path, maxSessionWait)
		}
	}
	uid := strconv.FormatUint(uint64(u.UID), 10)
	dir := "/run/user/" + uid
	if !exists(dir + "/systemd/private") {
		s.mu.Lock()
		failed := s.failed[u.UID]
		s.mu.Unlock()
		if failed {
			return nil, ""
		}
		if text, err := s.run(min(s.timeout, time.Until(deadline)), "systemctl", "start", "wsl2-login@"+uid+".service", "user@"+uid+".service"); err != nil {
			s.mu.Lock()
			s.failed[u.UID] = true
			s.mu.Unlock()
			return nil, fmt.Sprintf("Failed to start the systemd user session for '%s': %v %s; see journalctl for more details", u.Name, err, text)
		}
	}
	env = []string{"XDG_RUNTIME_DIR=" + dir}
	if exists(dir + "/bus") {
		env = append(env, "DBUS_SESSION_BUS_ADDRESS=unix:path="+dir+"/bus")
	}
	return env, ""
}

// powerOff has systemd stop its services and end the distro, and with it us. If it
// takes too long, the kernel does.
func (d *distro) powerOff() int {
	if err := syscall.Kill(1, sigPowerOff); err != nil {
		d.log.Errorf("%s: tell systemd to power off: %v", d.name, err)
	} else {
		<-time.After(min(d.conf.InitTimeout, maxPowerOff))
		d.log.Errorf("%s: systemd does not power off within %v (boot.initTimeout, at most %v); ending it", d.name, min(d.conf.InitTimeout, maxPowerOff), maxPowerOff)
	}
	if err := cleanRoot(); err != nil {
		d.log.Errorf("%s: %v", d.name, err)
	}
	err := unix.Reboot(unix.LINUX_REBOOT_CMD_POWER_OFF) // of the pid namespace
	d.log.Errorf("%s: power off: %v", d.name, err)
	return 1
}

// signalCgroup sends a signal to every process of a cgroup, and of those below it, but us.
func signalCgroup(cgroup string, sig syscall.Signal) {
	filepath.WalkDir(cgroup, func(path string, e fs.DirEntry, err error) error { //nolint:errcheck // it may vanish
		if err != nil || !e.IsDir() {
			return nil
		}
		text, _ := os.ReadFile(filepath.Join(path, "cgroup.procs"))
		for pid := range strings.FieldsSeq(string(text)) {
			if n, err := strconv.Atoi(pid); err == nil && n > 1 && n != os.Getpid() {
				syscall.Kill(n, sig) //nolint:errcheck // it may just have ended
			}
		}
		return nil
	})
}
