package distro

import (
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/wsl2/wsl2/guest/users"
)

// This file is what init runs by itself: programs of the distro.

// programDirs is where init finds the distro's programs.
var programDirs = []string{"/usr/sbin/", "/usr/bin/", "/sbin/", "/bin/"}

// programEnv is all of their environment.
var programEnv = []string{"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "HOME=/root", "USER=root", "LOGNAME=root"}

const (
	// mountTimeout bounds `mount -a`: a server that does not answer must not lock
	// users out of their distro.
	mountTimeout = 10 * time.Second
	// maxPrinted is how much of what a program prints is passed on.
	maxPrinted = 512
	maxFsTab   = 1 << 20
)

// errTimeout means that a program was killed because it took too long.
var errTimeout = errors.New("it took too long")

// run runs a program as root to its end and returns the first of what it printed.
// An exit status other than 0 is an error.
func (d *distro) run(timeout time.Duration, argv ...string) (string, error) {
	path := ""
	for _, dir := range programDirs {
		if path = dir + argv[0]; unix.Access(path, unix.X_OK) == nil {
			break
		}
	}
	null, err := unix.Open("/dev/null", unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return "", fmt.Errorf("open /dev/null: %w", err)
	}
	defer unix.Close(null)
	// Not a pipe: what it leaves running may hold that open.
	fd, err := unix.MemfdCreate("output", unix.MFD_CLOEXEC)
	if err != nil {
		return "", fmt.Errorf("memfd_create: %w", err)
	}
	output := os.NewFile(uintptr(fd), "output")
	defer output.Close()
	p, err := d.rp.Start(path, argv, &syscall.ProcAttr{Dir: "/", Env: programEnv,
		Files: []uintptr{uintptr(null), uintptr(fd), uintptr(fd)}, Sys: &syscall.SysProcAttr{Setsid: true}})
	if err != nil {
		return "", fmt.Errorf("run %s: %w", argv[0], err)
	}
	timer := time.AfterFunc(timeout, func() { p.SignalGroup(unix.SIGKILL) })
	status := <-p.Exited
	late := !timer.Stop()
	b, _ := io.ReadAll(io.NewSectionReader(output, 0, maxPrinted))
	text := strings.Join(strings.Fields(string(b)), " ")
	switch {
	case late:
		err = fmt.Errorf("%s: %w (%v)", argv[0], errTimeout, timeout)
	case !status.Exited() || status.ExitStatus() != 0:
		err = fmt.Errorf("%s: status %d", argv[0], int(status))
		if status.Exited() {
			err = fmt.Errorf("%s: exit status %d", argv[0], status.ExitStatus())
		}
	}
	return text, err
}

// mountFsTab mounts what the distro's /etc/fstab says.
func (d *distro) mountFsTab() {
	f, err := os.OpenFile("/etc/fstab", os.O_RDONLY|unix.O_NONBLOCK, 0) // also a FIFO
	if err != nil {
		return // most images of containers have none
	}
	text, _ := io.ReadAll(io.LimitReader(f, maxFsTab))
	f.Close()
	if !mountsAtStart(string(text)) {
		return
	}
	if text, err := d.run(mountTimeout, "mount", "-a"); err != nil {
		d.warnings = append(d.warnings, fmt.Sprintf("not all of /etc/fstab is mounted: %v: %s", err, text))
	}
}

// bootCommand starts boot.command of wsl.conf. Nobody waits for it; what it prints
// is in the VM's kernel log.
func (d *distro) bootCommand() {
	if d.conf.Command == "" {
		return
	}
	null, err := unix.Open("/dev/null", unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err == nil {
		defer unix.Close(null)
		// Our stderr is read by PID 1 of the VM.
		_, err = d.rp.Start(users.DefaultShell, []string{"sh", "-c", d.conf.Command}, &syscall.ProcAttr{Dir: "/", Env: programEnv,
			Files: []uintptr{uintptr(null), 2, 2}, Sys: &syscall.SysProcAttr{Setsid: true}})
	}
	if err != nil {
		d.warnings = append(d.warnings, fmt.Sprintf("boot.command does not start: %v", err))
	}
}
