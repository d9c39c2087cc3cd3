//go:build e2e

package main_test

import (
	"context"
	"strings"
	"testing"

	"github.com/wsl2/wsl2/internal/testsys"
)

// TestDebugShell is in no distro, sees all of them, and leaves them alone.
func TestDebugShell(t *testing.T) {
	h := newHost(t)
	h.Config("[general]", "instanceIdleTimeout=1", "[wsl2]", "vmIdleTimeout=-1")
	debug := func(script string) string {
		t.Helper()
		return strings.TrimSpace(h.OK("--debug-shell", "-e", "sh", "-c", script))
	}
	// It needs no distro to run, and starts the VM.
	if got := debug("for n in pid mnt uts ipc cgroup; do test $(readlink /proc/self/ns/$n) = $(readlink /proc/1/ns/$n) && echo same; done; id -u; pwd"); got != strings.Repeat("same\n", 5)+"0\n/root" {
		t.Errorf("namespaces, user and directory: %q", got)
	}
	l := h.Start("-d", "small", "-e", "sh", "-c", "echo ready; cat")
	l.Expect("ready\n")
	ctx, cancel := context.WithTimeout(t.Context(), testsys.Deadline)
	defer cancel()
	terminal := openTerminal(t, h.Cmd(ctx, "-d", "small"))
	terminal.expect("# ")
	out := debug("ps -e; cat /proc/[0-9]*/cmdline /proc/mounts; ls /dev")
	for _, want := range []string{"wsl2-distro", "cat", "devtmpfs /dev", "vda"} {
		if !strings.Contains(out, want) {
			t.Errorf("lacks %q: %s", want, out)
		}
	}

	// What runs there in the background holds it; when it stops, only what is its own ends.
	h.Want(h.Run("--debug-shell", "-e", "sh", "-c", "sleep 123456 </dev/null >/dev/null 2>&1 & while ! pidof sleep; do :; done; kill -9 $$"), 137)
	if out := debug("ps -e"); !strings.Contains(out, "sleep") {
		t.Errorf("the background process has gone: %s", out)
	}
	debug("kill $(pidof sleep)")
	for !strings.Contains(h.OK("--status"), "1 running") {
	}
	l.Stdin.Write([]byte("still here\n"))
	l.Expect("still here\n")
	terminal.send("echo $((6*7))\r")
	terminal.expect("42")
	if out := debug("ps -e"); strings.Contains(out, "sleep") {
		t.Errorf("left: %s", out)
	}

	// A terminal of its own, which ends with the VM.
	shell := openTerminal(t, h.Cmd(ctx, "--debug-shell"))
	shell.expect("$ ")
	shell.send("tty\r")
	shell.expect("/dev/pts/")
	h.OK("--shutdown")
	if status := shell.wait(); status == 0 {
		t.Error("the shell outlived its VM")
	}
	l.Wait()
	terminal.wait()
	h.Refused(h.Run("--debug-shell", "--system"), "exclude")
	h.Fsck(false)
}
