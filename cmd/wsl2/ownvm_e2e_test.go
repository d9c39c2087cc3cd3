//go:build e2e

package main_test

import (
	"strings"
	"testing"
)

// TestOwnVM: a distro with `vm = own` has a kernel to itself, and its end is nobody else's.
func TestOwnVM(t *testing.T) {
	h := newHost(t)
	h.OK("--manage", "small", "--clone", "own")
	h.Config("[distro.own]", "vm=own")
	kernel := func(distro string) string {
		t.Helper()
		return inside(h, distro, "cat /proc/sys/kernel/random/boot_id")
	}
	shared, own := kernel("small"), kernel("own")
	if shared == own || kernel("own") != own || kernel("small") != shared {
		t.Errorf("the kernels are %s and %s", shared, own)
	}
	inside(h, "small", "echo x >/mnt/wsl/small")
	if out := inside(h, "own", "ls /mnt/wsl"); strings.Contains(out, "small") {
		t.Errorf("they share /mnt/wsl: %s", out)
	}
	if out := h.OK("-d", "own", "--debug-shell", "-e", "cat", "/proc/sys/kernel/random/boot_id"); strings.TrimSpace(out) != own {
		t.Errorf("the debug shell of own's VM is in kernel %s, not %s", out, own)
	}
	if out := h.OK("--status"); !strings.Contains(out, "VM of its own:   own") || !strings.Contains(out, "2 running") {
		t.Errorf("--status: %s", out)
	}

	// Killed like any VM: the other goes on.
	l := h.Start("-d", "small", "-e", "sh", "-c", "echo ready; cat")
	l.Expect("ready\n")
	h.Refused(h.Run("-d", "own", "-e", "sh", "-c", "echo c >/proc/sysrq-trigger; sleep 100000"), "VM ended")
	l.Stdin.Write([]byte("still here\n"))
	l.Expect("still here\n")
	if again := kernel("own"); again == own {
		t.Error("the kernel has outlived its panic")
	}
	h.OK("--terminate", "own")
	if s := states(h); s["own"] != "Stopped" || s["small"] != "Running" {
		t.Errorf("after --terminate: %v", s)
	}

	// Idle on its own.
	h.OK("--manage", "own", "--compact")
	h.OK("--shutdown")
	l.Wait()
	h.Config("[distro.own]", "vm=own", "[general]", "instanceIdleTimeout=1", "[wsl2]", "vmIdleTimeout=3000")
	h.OK("-d", "own", "-e", "true")
	vm, service := h.Process("vm"), h.Process("service")
	vm.End(t)
	service.End(t)
	h.CheckNothingLeft()
	h.OK("--unregister", "own")
	h.OK("--shutdown")
	h.Fsck(false)
}
