package session

import (
	"bytes"
	"os"
	"strconv"
	"syscall"
)

// hangup ends a session whose client is gone, as a terminal does when its line
// drops: SIGHUP, and SIGCONT for those that are stopped, to every process of the
// session. Those that ignore it (nohup) live on, their output is discarded. The
// connections are closed, so that no relay waits for the client any more.
func (x *session) hangup() {
	x.closeConns()
	for _, o := range x.outputs {
		o.Finish()
	}
	// The leader may be gone while its children live, so the session is looked up.
	hangupProcesses(func(p procStat) bool { return p.session == x.process.PID })
}

// HangupTerminals does the same to every process that has a controlling terminal.
// Shells there ignore SIGTERM; a program without one may take SIGHUP for
// something else, or have no handler for it beside the one for SIGTERM.
func HangupTerminals() { hangupProcesses(func(p procStat) bool { return p.tty != 0 }) }

func hangupProcesses(which func(procStat) bool) {
	for _, pid := range processes(which) {
		syscall.Kill(pid, syscall.SIGHUP)  //nolint:errcheck // it may just have ended
		syscall.Kill(pid, syscall.SIGCONT) //nolint:errcheck // it may just have ended
	}
}

// processes lists those that which selects, but for init.
func processes(which func(procStat) bool) []int {
	entries, err := os.ReadDir("/proc")
	if err != nil {
		return nil
	}
	var list []int
	for _, e := range entries {
		pid, err := strconv.Atoi(e.Name())
		if err != nil || pid == 1 {
			continue
		}
		if stat, err := os.ReadFile("/proc/" + e.Name() + "/stat"); err == nil && which(parseStat(stat)) {
			list = append(list, pid)
		}
	}
	return list
}

// procStat is what is needed of /proc/PID/stat (proc_pid_stat(5)).
type procStat struct {
	session int // field 6
	tty     int // field 7, 0 without a controlling terminal
}

// parseStat returns zeros for what is no such line. The name in field 2 may hold
// anything, so fields count from its last ')'.
func parseStat(stat []byte) (p procStat) {
	i := bytes.LastIndexByte(stat, ')')
	if i < 0 {
		return p
	}
	f := bytes.Fields(stat[i+1:]) // state, ppid, pgrp, session, tty_nr
	if len(f) >= 5 {
		p.session, _ = strconv.Atoi(string(f[3]))
		p.tty, _ = strconv.Atoi(string(f[4]))
	}
	return p
}
