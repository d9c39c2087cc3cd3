//go:build e2e

package main_test

import (
	"testing"
	"time"

	"github.com/wsl2/wsl2/internal/testsys"
)

// stopped waits until a distro has stopped.
func stopped(h *testsys.Host, distro string) {
	h.TB.Helper()
	deadline := time.Now().Add(testsys.Deadline)
	for states(h)[distro] != "Stopped" {
		if time.Now().After(deadline) {
			h.TB.Fatalf("%s does not stop: %v", distro, states(h))
		}
	}
}

// TestSystemd: boot.systemd runs the distro's systemd, with sessions of systemd for
// users, also in two distros at once, and stops through it.
func TestSystemd(t *testing.T) {
	h := newDebian(t)
	h.Config("[wsl2]", "vmIdleTimeout=-1", "[general]", "instanceIdleTimeout=-1")
	h.OK("--manage", "one", "--clone", "two")

	up(h, "one")
	if got := inside(h, "one", "cat /proc/1/comm; systemd-detect-virt; cat /proc/self/cgroup; cat /var/lib/witness; systemctl is-active dbus systemd-logind"); got != "systemd\nwsl\n0::/wsl2\nstarted\nactive\nactive" {
		t.Errorf("%q", got)
	}
	// Sessions are what they are without systemd: status, signals, streams, orphans.
	h.Want(h.Run("-d", "one", "-e", "sh", "-c", "exit 7"), 7)
	h.Want(h.Run("-d", "one", "-e", "sh", "-c", "kill -9 $$"), 137)
	h.Want(h.Run("-d", "one", "-e", "no-such-program"), 127)
	if got := inside(h, "one", "setsid sh -c 'sleep 100000 & echo $!' | (read pid; ps -o ppid= -p $pid 2>/dev/null || awk '{print $4}' /proc/$pid/stat)"); got == "1" || got == "" {
		t.Errorf("an orphan's parent is %q", got)
	}
	inside(h, "one", "for p in /proc/[0-9]*; do if grep -q ^sleep.100000 $p/cmdline 2>/dev/null; then kill ${p#/proc/}; fi; done")

	// The same user has a session of systemd in both distros at once.
	up(h, "two")
	const user = "systemctl --user is-system-running --wait; echo $XDG_RUNTIME_DIR; busctl --user call org.freedesktop.DBus / org.freedesktop.DBus GetId >/dev/null && systemctl is-active user@1000 && systemd-run --user --wait --quiet true; echo $?; until loginctl show-user alice -p Sessions --value | grep .; do :; done | wc -w"
	for _, d := range []string{"one", "two", "one"} {
		r := h.Run("-d", d, "-u", "alice", "-e", "sh", "-c", user)
		h.Want(r, 0)
		if r.Stdout != "running\n/run/user/1000\nactive\n0\n1\n" || r.Stderr != "" {
			t.Errorf("%s: %v", d, r)
		}
	}

	// The end of the one leaves the other and what is shared, and comes through systemd.
	inside(h, "one", "mkdir /mnt/wsl/own; mount -t tmpfs own /mnt/wsl/own; echo kept >/mnt/wsl/own/file")
	h.OK("--terminate", "one")
	if got := inside(h, "two", "cat /mnt/wsl/own/file; systemctl is-active user@1000"); got != "kept\nactive" {
		t.Errorf("%q", got)
	}
	up(h, "one")
	if got := inside(h, "one", "cat /var/lib/witness"); got != "started\nstopped\nstarted" {
		t.Errorf("%q", got)
	}

	// It ends itself, and with what serves its sessions.
	l := h.Start("-d", "two", "-e", "sh", "-c", "echo ready; exec cat")
	l.Expect("ready\n")
	h.Run("-d", "two", "-e", "systemctl", "poweroff")
	stopped(h, "two")
	if r := l.Wait(); r.Status == 0 {
		t.Errorf("the session of a distro that powered off: %v", r)
	}
	h.Refused(h.Run("-d", "one", "-e", "sh", "-c", "for p in /proc/[0-9]*; do if grep -q ^@wsl2 $p/cmdline 2>/dev/null; then kill -9 ${p#/proc/}; fi; done; sleep 1000"), "one")
	stopped(h, "one")
	h.OK("--shutdown")
	h.Fsck(true)
	h.OK("-d", "one", "-e", "true") // replays its journal
	h.OK("--shutdown")
	h.Fsck(false)
}

// TestSystemdIdle: what systemd runs does not hold a distro, unless its wsl.conf says
// so; and a service that does not stop holds up nobody.
func TestSystemdIdle(t *testing.T) {
	h := newDebian(t)
	h.Config("[wsl2]", "vmIdleTimeout=-1", "defaultVhdSize=2GB", "[general]", "instanceIdleTimeout=1")
	h.Import("small", testsys.Busybox(t)...)
	const hang = "[Service]\nType=oneshot\nRemainAfterExit=yes\nTimeoutStopSec=infinity\nExecStart=/bin/true\nExecStop=/bin/sleep infinity\n"
	for _, c := range []struct{ script, want string }{
		{"cat /var/lib/witness", "started"},
		{"cat /var/lib/witness; echo keepAlive = true >>/etc/wsl.conf; cat >/etc/systemd/system/hang.service <<'END'\n" + hang + "END", "started\nstopped\nstarted"},
	} {
		session := h.Start("-d", "one", "-e", "cat") // holds it
		up(h, "one")
		if got := inside(h, "one", c.script); got != c.want {
			t.Errorf("it was not stopped cleanly: %q, want %q", got, c.want)
		}
		session.Stdin.Close()
		h.Want(session.Wait(), 0)
		stopped(h, "one")
	}

	up(h, "one")
	inside(h, "one", "systemctl start hang")
	h.OK("-d", "small", "-e", "true")
	stopped(h, "small") // it was left later
	if s := states(h); s["one"] != "Running" {
		t.Errorf("keepAlive does not hold it: %v", s)
	}
	h.OK("--terminate", "one")
	if s := states(h); s["one"] != "Stopped" {
		t.Errorf("a service that hangs: %v", s)
	}
	h.OK("--shutdown")
	h.Fsck(true)
}
