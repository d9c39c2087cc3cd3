// Package waits tells what the threads of a process wait for, from /proc: one that waits
// without a timeout is woken by events alone.
package waits

import (
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// Script prints, in a shell, what Parse reads of the process $pid.
const Script = "for t in /proc/$pid/task/*; do cat $t/syscall $t/status; done"

// Thread is a thread at one moment.
type Thread struct {
	TID     int
	Wakeups int    // so far: voluntary_ctxt_switches of proc_pid_status(5)
	Call    string // the system call that it waits in: proc_pid_syscall(5)
}

// Threads are those of a process.
func Threads(pid int) ([]Thread, error) {
	tasks, err := filepath.Glob("/proc/" + strconv.Itoa(pid) + "/task/*")
	var text strings.Builder
	for _, task := range tasks {
		call, cerr := os.ReadFile(task + "/syscall")
		status, serr := os.ReadFile(task + "/status")
		if serr != nil || cerr != nil {
			err = errors.Join(serr, cerr)
			if errors.Is(err, unix.ESRCH) || errors.Is(err, unix.ENOENT) { // it has ended
				err = nil
			}
			continue
		}
		text.Write(call)
		text.Write(status)
	}
	return Parse(text.String()), err
}

// Undisturbed tells whether no thread ran between two looks. Then after is of one moment: a thread whose
// call was read behind before, and which has not been woken since, has waited in it all the time.
func Undisturbed(before, after []Thread) bool {
	return slices.EqualFunc(before, after, func(a, b Thread) bool { return a.TID == b.TID && a.Wakeups == b.Wakeups })
}

// Parse reads, for each thread, /proc/PID/task/TID/syscall and then status.
func Parse(text string) (all []Thread) {
	var t Thread
	for line := range strings.Lines(text) {
		line = strings.TrimSpace(line)
		name, value, isStatus := strings.Cut(line, ":")
		switch {
		case name == "Pid":
			t.TID, _ = strconv.Atoi(strings.TrimSpace(value))
		case name == "voluntary_ctxt_switches":
			t.Wakeups, _ = strconv.Atoi(strings.TrimSpace(value))
			all = append(all, t)
			t = Thread{}
		case !isStatus:
			t.Call = line
		}
	}
	return all
}

// Monitor tells whether it is the thread in which Go's runtime looks after itself. It is
// woken once a minute in every Go program, by the only timeout on a futex that there is.
func (t Thread) Monitor() bool {
	call := strings.Fields(t.Call)
	return t.Timed() && call[0] == strconv.Itoa(unix.SYS_FUTEX)
}

// Timed tells whether the thread runs, or will when a time has passed.
func (t Thread) Timed() bool {
	const forever = "0xffffffffffffffff" // -1
	call := strings.Fields(t.Call)
	if len(call) < 7 { // "running", or -1: in no system call
		return true
	}
	n, err := strconv.Atoi(call[0])
	if err != nil {
		return true
	}
	args := call[1:]
	switch n {
	case unix.SYS_NANOSLEEP, unix.SYS_CLOCK_NANOSLEEP, unix.SYS_RESTART_SYSCALL:
		return true
	case unix.SYS_FUTEX, unix.SYS_EPOLL_PWAIT2:
		return args[3] != "0x0"
	case unix.SYS_EPOLL_WAIT, unix.SYS_EPOLL_PWAIT:
		return args[3] != forever
	case unix.SYS_POLL:
		return args[2] != forever
	case unix.SYS_PPOLL:
		return args[2] != "0x0"
	case unix.SYS_SELECT, unix.SYS_PSELECT6:
		return args[4] != "0x0"
	}
	return false
}
