//go:build e2e

package main_test

import (
	"os"
	"path/filepath"
	"testing"

	"github.com/wsl2/wsl2/internal/testsys"
)

// TestVersion1Locked: what the host keeps from a distro of version 1 its root cannot take back, and what else it mounts
// is its own.
func TestVersion1Locked(t *testing.T) {
	for name, of := range map[string]func(*testsys.Host){"root": func(*testsys.Host) {}, "user": anotherUser} {
		t.Run(name, func(t *testing.T) {
			h := testsys.New(t)
			archive := h.File("small.tar", testsys.Tar(t, testsys.Busybox(t)...))
			data := h.Path("home/data")
			testsys.Must(t, os.Mkdir(data, 0o777))
			testsys.Must(t, os.Chmod(data, 0o777))
			kept := h.File("home/data/kept", []byte("kept"))
			testsys.Must(t, os.Chmod(kept, 0o666))
			of(h)
			h.OK("--import", "small", archive, "--version", "1")
			h.Config("[shares]", "data = "+data+", ro", "home = "+h.Path("home"))
			h.OK("-d", "small", "-e", "cat", "/mnt/data/kept")
			for _, script := range []string{
				"echo x >/mnt/data/kept",
				"mount -o remount,bind,rw /mnt/data",
				"mkdir -p /srv/data && mount --bind /mnt/data /srv/data && mount -o remount,bind,rw /srv/data",
				"mount -o remount,bind,suid /mnt/home",
				"mount -o remount,bind,rw /sys",
				"umount /sys/fs/cgroup",
				"umount -l /sys/fs/cgroup",
				"mkdir -p /srv/sys && mount --bind /sys /srv/sys && umount /srv/sys/fs/cgroup",
				"mount --rbind /sys /srv/sys && umount /srv/sys/fs/cgroup",
				"unshare -m umount /sys/fs/cgroup",
				"mknod /tmp/null c 1 3",
			} {
				if r := h.Run("-d", "small", "-u", "root", "-e", "sh", "-c", script); r.Status == 0 {
					t.Errorf("the distro's root may: %s", script)
				}
			}
			if text, err := os.ReadFile(kept); err != nil || string(text) != "kept" {
				t.Errorf("a read-only share was written: %q, %v", text, err)
			}
			// Its own cgroups are all that it sees, and the share is gone if it likes.
			inside(h, "small", "set -e; grep -q ' /sys/fs/cgroup .* cgroup2 ' /proc/self/mountinfo; grep -q '^0::/$' /proc/self/cgroup; test -e /sys/fs/cgroup/cgroup.procs; umount /mnt/data")
			inside(h, "small", `set -e
				mount -t tmpfs x /srv; mkdir /srv/a /srv/b /srv/c /srv/upper /srv/work
				mount --bind /etc /srv/a; mount --rbind /sys /srv/b; mount -t cgroup2 x /srv/c
				mount -t overlay -o lowerdir=/etc,upperdir=/srv/upper,workdir=/srv/work x /srv/a
				mount -o remount,bind,ro /srv; umount -l /srv
				hostname other; unshare -pf --mount-proc ls /proc/1 >/dev/null`)
			if list, err := filepath.Glob(data + "/*"); err != nil || len(list) != 1 {
				t.Errorf("the share has %v, %v", list, err)
			}
		})
	}
}
