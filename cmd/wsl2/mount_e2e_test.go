//go:build e2e

package main_test

import (
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"testing"

	"github.com/wsl2/wsl2/internal/testsys"
)

// TestMount: WSL's MountTests, with files and, as root, with a block device.
func TestMount(t *testing.T) {
	h := newHost(t)
	h.Import("second", testsys.Busybox(t)...)
	data := diskFile(h, "data.img")

	// The VM is started for it; distros that start later and those that run see it.
	out := h.OK("--mount", data, "--name", "data")
	if !strings.Contains(out, "/mnt/wsl/data") || !strings.Contains(out, "wsl2 --unmount "+data) {
		t.Errorf("--mount: %q", out)
	}
	if got := inside(h, "small", "cat /mnt/wsl/data/name; echo from small >/mnt/wsl/data/note"); got != "data.img" {
		t.Errorf("in a distro that starts later: %q", got)
	}
	if got := inside(h, "second", "cat /mnt/wsl/data/note"); got != "from small" {
		t.Errorf("in another distro: %q", got)
	}
	parts := partitioned(h, "parts.img")
	for i := range 2 { // of a disk that is attached already, too
		h.OK("--mount", parts, "--partition", fmt.Sprint(i+1))
		at := "/mnt/wsl/" + strings.Map(func(c rune) rune {
			if strings.ContainsRune("/.", c) {
				return -1
			}
			return c
		}, parts) + fmt.Sprint("p", i+1)
		for _, distro := range []string{"small", "second"} {
			if got := inside(h, distro, "cat "+at+"/name"); got != fmt.Sprint("parts.img", i+1) {
				t.Errorf("partition %d in %s: %q", i+1, distro, got)
			}
		}
	}
	var st struct {
		Disks []struct {
			Disk   string
			Mounts []struct{ Name, At string }
		}
	}
	testsys.Must(t, json.Unmarshal([]byte(h.OK("--status", "--json")), &st))
	if len(st.Disks) != 2 || st.Disks[0].Disk != data || st.Disks[0].Mounts[0].At != "/mnt/wsl/data" || len(st.Disks[1].Mounts) != 2 {
		t.Errorf("--status: %+v", st)
	}

	// What cannot be.
	h.Refused(h.Run("--mount", data, "--name", "data"), "mounted at /mnt/wsl/data already")
	h.Refused(h.Run("--mount", parts, "--partition", "3", "--name", "third"), "no partition 3", "wsl2 --unmount")
	h.Refused(h.Run("--mount", h.Path("no-such-file")), "no such file")
	h.Refused(h.Run("--mount", h.Dir), "directory")
	h.Refused(h.Run("--mount", disks(h)["small"]), "disk of the distro small")
	for _, name := range []string{"", ".", "..", "a/b", "dev"} {
		h.Refused(h.Run("--mount", data, "--name", name), "--name")
	}
	h.Refused(h.Run("--mount", data, "--bare", "--type", "ext4"), "exclude")
	zeros := h.File("zeros.img", make([]byte, 1<<20))
	h.Refused(h.Run("--mount", zeros, "--name", "zeros"), "attached but failed to mount", "no file system")
	h.Refused(h.Run("--mount", zeros, "--name", "zeros", "--type", "vfat"), "attached but failed to mount")
	h.Refused(h.Run("--mount", zeros, "--name", "zeros", "--type", "nosuchfs"), "attached but failed to mount")
	if out := inside(h, "small", "ls /mnt/wsl"); strings.Contains(out, "zeros") {
		t.Errorf("left: %s", out)
	}

	// A path is what it leads to: relative, and by a link.
	link := h.Path("link")
	testsys.Must(t, os.Symlink(zeros, link))
	h.OK("--unmount", link)
	h.Refused(h.Run("--unmount", zeros), "not attached")

	// Another user's VM, or a program that locks it, has it: no disk is ever open twice.
	other := testsys.New(t)
	other.Refused(other.Run("--mount", data, "--name", "data"), "data.img", "in use")

	// In use: refused, and as it was.
	l := h.Start("-d", "second", "--cd", "/mnt/wsl/data", "-e", "sh", "-c", "echo ready; cat")
	l.Expect("ready\n")
	h.Refused(h.Run("--unmount", data), "/mnt/wsl/data", "busy", "end what uses it")
	l.Stdin.Close()
	h.Want(l.Wait(), 0)

	// A distro that ends takes nothing with it; what one distro mounts there is everybody's.
	inside(h, "second", "mkdir -p /mnt/wsl/own /mnt/wsl/disk && mount -t tmpfs none /mnt/wsl/own && echo shared >/mnt/wsl/own/file && mount --bind /srv /mnt/wsl/disk")
	h.OK("--terminate", "second")
	if got := inside(h, "small", "cat /mnt/wsl/own/file /mnt/wsl/data/note; grep -c wsl/disk /proc/mounts; true"); got != "shared\nfrom small\n0" {
		t.Errorf("after the end of another distro: %q", got)
	}

	h.OK("--unmount", data)
	if out := inside(h, "small", "ls /mnt/wsl"); strings.Contains(out, "data\n") {
		t.Errorf("still there: %s", out)
	}
	fsckFile(t, data)
	h.OK("--unmount")
	h.OK("--unmount") // nothing is: that is no error

	// Read-only by an option; a device, where there are any.
	h.OK("--mount", data, "--name", "ro", "--options", "ro,noatime")
	if got := inside(h, "small", "touch /mnt/wsl/ro/x 2>&1; grep -c 'wsl/ro ext4 ro,noatime' /proc/mounts"); !strings.Contains(got, "Read-only") || !strings.HasSuffix(got, "1") {
		t.Errorf("mounted read-only: %q", got)
	}
	h.OK("--unmount", data)

	// Bare: for whoever wants to make a file system.
	out = h.OK("--mount", zeros, "--bare", "--json")
	var bare struct{ Mounts []struct{ At string } }
	testsys.Must(t, json.Unmarshal([]byte(out), &bare))
	node := bare.Mounts[0].At
	if got := inside(h, "small", "echo written | dd of="+node+" 2>/dev/null; dd if="+node+" bs=8 count=1 2>/dev/null"); got != "written" {
		t.Errorf("%s: %q", node, got)
	}
	h.OK("--unmount", zeros)
	if got := inside(h, "small", "ls /mnt/wsl/dev"); got != "" {
		t.Errorf("left: %s", got)
	}
	if text, err := os.ReadFile(zeros); err != nil || !strings.HasPrefix(string(text), "written\n") {
		t.Errorf("the file holds %q: %v", text[:16], err)
	}

	// It comes back with the VM after an idle stop, and not after --shutdown.
	h.OK("--shutdown")
	h.Config("[general]", "instanceIdleTimeout=1", "[wsl2]", "vmIdleTimeout=3000")
	h.OK("--mount", data, "--name", "data")
	vm := h.Process("vm")
	vm.End(t)
	h.Config()
	if got := inside(h, "small", "cat /mnt/wsl/data/note"); got != "from small" {
		t.Errorf("after an idle stop: %q", got)
	}
	h.OK("--shutdown")
	if got := inside(h, "small", "ls /mnt/wsl"); got != "dev\nresolv.conf" {
		t.Errorf("after --shutdown: %q", got)
	}
	h.OK("--shutdown")
	h.Fsck(false)
	fsckFile(t, data)
}

// TestMountDevice mounts a block device of the host.
func TestMountDevice(t *testing.T) {
	h := newHost(t)
	data := diskFile(h, "data.img")
	losetup := hostTool(t, "losetup")
	out, err := exec.Command(losetup, "--find", "--show", data).Output()
	testsys.Must(t, err)
	device := strings.TrimSpace(string(out))
	t.Cleanup(func() { exec.Command(losetup, "--detach", device).Run() })
	h.OK("--mount", device, "--name", "device")
	if got := inside(h, "small", "cat /mnt/wsl/device/name; echo new >/mnt/wsl/device/file; sync"); got != "data.img" {
		t.Errorf("the device: %q", got)
	}
	h.OK("--unmount")
	fsckFile(t, device)
}
