package testsys

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// Process is a process of a host.
type Process struct {
	PID  int
	Argv []string
	fd   int // pidfd: the number may be another process's some day, this is not
}

func (p Process) String() string { return fmt.Sprintf("%d %s", p.PID, strings.Join(p.Argv, " ")) }

// Role is what the process is: "service", "vm", "net", "share", "mount", "qemu", "distro" for the init
// of a distro of version 1, or "" for others.
func (p Process) Role() string {
	switch {
	case len(p.Argv) > 0 && strings.HasPrefix(filepath.Base(p.Argv[0]), "qemu-system"):
		return "qemu"
	case len(p.Argv) > 0 && p.Argv[0] == "wsl2-distro":
		return "distro"
	case len(p.Argv) > 1 && (p.Argv[1] == "service" || p.Argv[1] == "vm" || p.Argv[1] == "net" || p.Argv[1] == "share" || p.Argv[1] == "mount"):
		return p.Argv[1]
	}
	return ""
}

// Processes lists the processes of this host: those whose environment, command
// line or descriptors name its directory. This test process is not one of them.
func (h *Host) Processes() []Process {
	h.TB.Helper()
	entries, err := os.ReadDir("/proc")
	Must(h.TB, err)
	var list []Process
	for _, e := range entries {
		pid, err := strconv.Atoi(e.Name())
		if err != nil || pid == os.Getpid() || !h.owns(pid) {
			continue
		}
		fd, err := unix.PidfdOpen(pid, 0)
		if err != nil {
			continue // ended meanwhile
		}
		h.TB.Cleanup(func() { unix.Close(fd) })
		argv, _ := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", pid))
		p := Process{PID: pid, Argv: strings.Split(strings.TrimRight(string(argv), "\x00"), "\x00"), fd: fd}
		if p.Argv[0] == "sh" || p.Argv[0] == "unshare" { // MountNamespace's holder
			continue
		}
		list = append(list, p)
	}
	return list
}

func (h *Host) owns(pid int) bool {
	dir := fmt.Sprintf("/proc/%d/", pid)
	for _, name := range []string{"environ", "cmdline"} {
		if text, err := os.ReadFile(dir + name); err == nil && bytes.Contains(text, []byte(h.Dir+"/")) {
			return true
		}
	}
	fds, _ := os.ReadDir(dir + "fd")
	for _, fd := range fds {
		if target, err := os.Readlink(dir + "fd/" + fd.Name()); err == nil && strings.HasPrefix(target, h.Dir+"/") {
			return true
		}
	}
	return false
}

// Process is the host's one process of this role; there must be exactly one.
func (h *Host) Process(role string) Process {
	h.TB.Helper()
	var found []Process
	for _, p := range h.Processes() {
		if p.Role() == role {
			found = append(found, p)
		}
	}
	if len(found) != 1 {
		h.TB.Fatalf("%d processes %q, want 1: %v of %v", len(found), role, found, h.Processes())
	}
	return found[0]
}

// Wait waits for the process's end.
func (p Process) Wait(ctx context.Context) error {
	deadline, ok := ctx.Deadline()
	if !ok {
		deadline = time.Now().Add(Deadline)
	}
	for {
		ms := max(time.Until(deadline).Milliseconds(), 0)
		n, err := unix.Poll([]unix.PollFd{{Fd: int32(p.fd), Events: unix.POLLIN}}, int(ms))
		switch {
		case errors.Is(err, unix.EINTR):
		case err != nil:
			return err
		case n == 1:
			return nil
		default:
			return context.DeadlineExceeded
		}
	}
}

// End waits for the process's end and fails the test if it does not come.
func (p Process) End(tb testing.TB) {
	tb.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), Deadline)
	defer cancel()
	if err := p.Wait(ctx); err != nil {
		tb.Fatalf("still runs: %v", p)
	}
}

// Signal sends a signal to this process and to no other that has its number now.
func (p Process) Signal(sig unix.Signal) error {
	return unix.PidfdSendSignal(p.fd, sig, nil, 0)
}

// Kill kills the process and waits until it is gone.
func (p Process) Kill(tb testing.TB) {
	tb.Helper()
	Must(tb, p.Signal(unix.SIGKILL))
	p.End(tb)
}

// FDs and Threads count what a process holds.
func (p Process) FDs() int     { return count(fmt.Sprintf("/proc/%d/fd", p.PID)) }
func (p Process) Threads() int { return count(fmt.Sprintf("/proc/%d/task", p.PID)) }

func count(dir string) int {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return -1
	}
	return len(entries)
}

// WaitCreated runs start, then waits until an entry of dir matches a pattern of its name.
func WaitCreated(tb testing.TB, dir, pattern string, start func()) {
	tb.Helper()
	waitMatches(tb, dir, pattern, true, start)
}

// WaitGone waits until no file of a directory matches a pattern of its names.
func WaitGone(tb testing.TB, dir, pattern string) {
	tb.Helper()
	waitMatches(tb, dir, pattern, false, func() {})
}

// waitMatches runs start, then waits until entries of dir match, or none does.
func waitMatches(tb testing.TB, dir, pattern string, some bool, start func()) {
	tb.Helper()
	fd, err := unix.InotifyInit1(unix.IN_CLOEXEC | unix.IN_NONBLOCK)
	Must(tb, err)
	defer unix.Close(fd)
	_, err = unix.InotifyAddWatch(fd, dir, unix.IN_CREATE|unix.IN_DELETE|unix.IN_MOVED_TO|unix.IN_MOVED_FROM)
	Must(tb, err)
	start()
	buf := make([]byte, 64<<10)
	for deadline := time.Now().Add(Deadline); ; {
		there, err := filepath.Glob(filepath.Join(dir, pattern))
		Must(tb, err)
		if (len(there) != 0) == some {
			return
		}
		ms := time.Until(deadline).Milliseconds()
		if ms <= 0 {
			tb.Fatalf("%s/%s: there are %q", dir, pattern, there)
		}
		if _, err := unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, int(ms)); err != nil && !errors.Is(err, unix.EINTR) {
			tb.Fatal(err)
		}
		unix.Read(fd, buf)
	}
}

// Goroutines ends one of wsl2's own processes with SIGQUIT, if it is stopped from
// there, and counts the goroutines of the trace that this leaves in the service's log.
func (h *Host) Goroutines(p Process) int {
	h.TB.Helper()
	log := filepath.Join(h.State(), "service.log")
	before, err := os.ReadFile(log)
	Must(h.TB, err)
	Must(h.TB, errors.Join(p.Signal(unix.SIGQUIT), p.Signal(unix.SIGCONT)))
	p.End(h.TB)
	after, err := os.ReadFile(log)
	Must(h.TB, err)
	n := bytes.Count(bytes.TrimPrefix(after, before), []byte("\ngoroutine "))
	if n == 0 {
		h.TB.Errorf("no trace of %v in %s", p, log)
	}
	return n
}
