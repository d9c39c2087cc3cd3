package distro

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/wsl2/wsl2/guest/mounts"
	"github.com/wsl2/wsl2/guest/session"
)

// This file is `wsl2 --debug-shell`: sessions that are in no distro but in the VM's own
// root and namespaces, and see what PID 1 sees.

// vmRoot is what sessions need beside what the VM has.
var vmRoot = []mounts.Item{
	mounts.Mount{FSType: "devpts", Target: "/dev/pts", Flags: unix.MS_NOSUID | unix.MS_NOEXEC, Data: "ptmxmode=0666,mode=620,gid=5", Why: "terminals"},
}

// join prepares this process, which has no namespaces of its own. Commands and
// users are the system distro's; they stay until the VM ends.
func (d *distro) join() error {
	text, err := os.ReadFile("/proc/self/cgroup")
	if err != nil {
		return err
	}
	path, ok := bytes.CutPrefix(bytes.TrimSpace(text), []byte("0::/distro-"))
	if !ok {
		return fmt.Errorf("in cgroup %q, not in one of its own", text)
	}
	d.cgroup = filepath.Join("/sys/fs/cgroup", "distro-"+string(path))
	// Orphans are its own to reap, not PID 1's.
	if err := unix.Prctl(unix.PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0); err != nil {
		return fmt.Errorf("become a subreaper: %w", err)
	}
	if exists("/etc/passwd") { // since the last time
		return nil
	}
	if err := mounts.All(vmRoot); err != nil {
		d.log.Errorf("%s: %v", d.name, err)
	}
	return unpackSystem("/")
}

// kill sends a signal to all of the distro's processes but this one.
func (d *distro) kill(sig syscall.Signal) {
	if d.cgroup == "" {
		syscall.Kill(-1, sig) //nolint:errcheck // ESRCH: they are all gone
		return
	}
	signalCgroup(d.cgroup, sig)
}

// hangup tells its programs that their terminals are gone.
func (d *distro) hangup() {
	if d.cgroup == "" {
		session.HangupTerminals()
		return
	}
	d.kill(unix.SIGHUP)
	d.kill(unix.SIGCONT)
}
