//go:build kvm

package main_test

import (
	"os"
	"strings"
	"testing"

	"github.com/wsl2/wsl2/internal/testsys"
)

// TestKVMShare: a share is a virtio-fs device that the kernel was not told of at boot; disks
// find their places beside it, before and after.
func TestKVMShare(t *testing.T) {
	h := newKVMHost(t)
	home := h.Path("home")
	testsys.Must(t, os.WriteFile(home+"/f", []byte("host\n"), 0o644))
	h.Import("other", testsys.Busybox(t)...)
	h.OK("--shutdown")
	for range 2 {
		for _, name := range []string{"small", "other"} { // the second's disk comes behind the first's share
			script := "cat /mnt/host/f && grep -c ' /mnt/host virtiofs ' /proc/mounts && echo " + name + " >/mnt/host/" + name
			if out := h.OK("-d", name, "-e", "sh", "-c", script); out != "host\n1\n" {
				t.Errorf("%s: %q", name, out)
			}
			if got, err := os.ReadFile(home + "/" + name); err != nil || strings.TrimSpace(string(got)) != name {
				t.Errorf("%s wrote %q, %v", name, got, err)
			}
		}
		h.OK("--terminate", "small") // its device is free again
		h.OK("-d", "small", "-e", "cat", "/mnt/host/f")
		h.OK("--shutdown")
	}
}
