// Package spawn starts the launcher's own processes. It is os/exec without what
// costs a start: os.StartProcess first forks a process only to learn whether the
// kernel gives out pidfds, and keeps one for each child.
package spawn

import (
	"fmt"
	"os"
	"runtime"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// Command is a process to start.
type Command struct {
	Path string
	Args []string // from argv[1]; argv[0] is wsl2
	Env  []string // nil: ours
	Dir  string   // "": ours
	// Output is its stdout and stderr; its stdin is /dev/null.
	Output *os.File
	// Files are its descriptors from 3 on.
	Files []*os.File
	Attr  *syscall.SysProcAttr
}

// Process is a child. It is safe for concurrent use.
type Process struct {
	pid int

	mu     sync.Mutex
	reaped bool // the pid may be another's; guarded by mu
}

// Start starts c. The caller has to Wait for the process or to end before it.
func Start(c Command) (*Process, error) {
	null, err := os.OpenFile(os.DevNull, os.O_RDONLY, 0)
	if err != nil {
		return nil, err
	}
	defer null.Close()
	attr := &syscall.ProcAttr{Dir: c.Dir, Env: c.Env, Sys: c.Attr, Files: []uintptr{null.Fd(), c.Output.Fd(), c.Output.Fd()}}
	if c.Env == nil {
		attr.Env = os.Environ()
	}
	for _, f := range c.Files {
		attr.Files = append(attr.Files, f.Fd())
	}
	restore := setTimerSlack()
	defer restore()
	pid, err := syscall.ForkExec(c.Path, append([]string{"wsl2"}, c.Args...), attr)
	if err != nil {
		return nil, &os.PathError{Op: "fork/exec", Path: c.Path, Err: err}
	}
	return &Process{pid: pid}, nil
}

// PID is the process's number.
func (p *Process) PID() int { return p.pid }

// Wait returns when the process has ended, nil if with status 0. It is called
// once.
func (p *Process) Wait() error {
	// First without reaping it: Kill must not meet another process of its number.
	for {
		err := unix.Waitid(unix.P_PID, p.pid, nil, unix.WEXITED|unix.WNOWAIT, nil)
		if err == unix.EINTR {
			continue
		}
		if err != nil {
			return os.NewSyscallError("waitid", err)
		}
		break
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	p.reaped = true
	var status unix.WaitStatus
	if _, err := unix.Wait4(p.pid, &status, 0, nil); err != nil {
		return os.NewSyscallError("wait4", err)
	}
	switch {
	case status.Signaled():
		return fmt.Errorf("signal: %v", status.Signal())
	case status.ExitStatus() != 0:
		return fmt.Errorf("exit status %d", status.ExitStatus())
	}
	return nil
}

// Kill ends the process by SIGKILL, if it still runs.
func (p *Process) Kill() {
	p.mu.Lock()
	defer p.mu.Unlock()
	if !p.reaped {
		_ = unix.Kill(p.pid, unix.SIGKILL)
	}
}

// slack is how late the kernel may wake a thread of a child that sleeps for some time.
// The Go runtime's monitor asks to be woken each 20 µs while anything runs or is in
// a system call, a vCPU for example; by default it is, each 80 µs, and a
// processor in guest mode has to leave it for that. The price is that a Go
// timer may be as late.
const slack = time.Millisecond

// setTimerSlack sets it for this thread, whose child inherits it (prctl(2),
// PR_SET_TIMERSLACK).
func setTimerSlack() (restore func()) {
	runtime.LockOSThread()
	set := func(ns uintptr) { _ = unix.Prctl(unix.PR_SET_TIMERSLACK, ns, 0, 0, 0) }
	set(uintptr(slack.Nanoseconds()))
	return func() {
		set(0) // its default
		runtime.UnlockOSThread()
	}
}
