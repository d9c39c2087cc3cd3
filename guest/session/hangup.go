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
		o.finish()
	}
	// The leader may be gone while its children live, so the session is looked up.
	for _, pid := range sessionMembers(x.process.PID) {
		syscall.Kill(pid, syscall.SIGHUP)  //nolint:errcheck // it may just have ended
		syscall.Kill(pid, syscall.SIGCONT) //nolint:errcheck // it may just have ended
	}
}

// sessionMembers lists the processes whose session id is sid.
func sessionMembers(sid int) []int {
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
		if stat, err := os.ReadFile("/proc/" + e.Name() + "/stat"); err == nil && statSession(stat) == sid {
			list = append(list, pid)
		}
	}
	return list
}

// statSession returns field 6, session, of /proc/PID/stat (proc_pid_stat(5)), or
// 0. The name in field 2 may hold anything, so fields count from its last ')'.
func statSession(stat []byte) int {
	i := bytes.LastIndexByte(stat, ')')
	if i < 0 {
		return 0
	}
	f := bytes.Fields(stat[i+1:]) // state, ppid, pgrp, session
	if len(f) < 4 {
		return 0
	}
	n, _ := strconv.Atoi(string(f[3]))
	return n
}
