//go:build e2e

package main_test

import (
	"os"
	"path/filepath"
	"strings"
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
			// As in a user's home: the distro's root is the master of what belongs to him.
			bin := h.Path("bin")
			testsys.Must(t, os.Mkdir(bin, 0o755))
			init := filepath.Join(bin, "wsl2-init")
			for _, name := range []string{"wsl2", "wsl2-verbs", "wsl2-init"} {
				program, err := os.ReadFile(filepath.Join(filepath.Dir(h.Exe), name))
				testsys.Must(t, err)
				testsys.Must(t, os.WriteFile(filepath.Join(bin, name), program, 0o755))
			}
			h.Exe = filepath.Join(bin, "wsl2")
			of(h)
			h.OK("--import", "small", archive, "--version", "1")
			h.Config("[shares]", "data = "+data+", ro", "home = "+h.Path("home"))
			h.OK("-d", "small", "-e", "cat", "/mnt/data/kept")
			inside(h, "small", "set -e; mkdir /srv/data /srv/sys; mount --bind /mnt/data /srv/data; mount --rbind /sys /srv/sys")
			const refused, readOnly, locked = "ermission denied", "Read-only file system", "Invalid argument"
			for _, c := range []struct{ script, says string }{
				{"echo x >/mnt/data/kept", readOnly},
				{"mount -o remount,bind,rw /mnt/data", refused},
				{"mount -o remount,bind,rw /srv/data", refused},
				{"mount -o remount,bind,suid /mnt/home", refused},
				{"mount -o remount,bind,rw /sys", refused},
				{"umount /sys/fs/cgroup", locked},
				{"umount -l /sys/fs/cgroup", locked},
				{"mount --bind /sys /srv/data", locked},
				{"umount /srv/sys/fs/cgroup", locked},
				{"unshare -m umount /sys/fs/cgroup", locked},
				{"mount -o remount,bind,rw /init", refused},
				{"touch /srv/exe; mount --bind /proc/1/exe /srv/exe", locked},
				{"chmod 700 /init", readOnly},
				{"chmod 700 /proc/1/exe", readOnly},
				{"mknod /tmp/null c 1 3", "not permitted"},
			} {
				if r := h.Run("-d", "small", "-u", "root", "-e", "sh", "-c", c.script); r.Status == 0 || !strings.Contains(r.Stderr, c.says) {
					t.Errorf("the distro's root does `%s`: %v, want %q", c.script, r, c.says)
				}
			}
			if st, err := os.Stat(init); err != nil || st.Mode() != 0o755 {
				t.Errorf("/init on the host: %v, %v", st, err)
			}
			if text, err := os.ReadFile(kept); err != nil || string(text) != "kept" {
				t.Errorf("a read-only share was written: %q, %v", text, err)
			}
			// Its own cgroups are all that it sees, and the share is gone if it likes.
			inside(h, "small", "set -e; grep -q ' /sys/fs/cgroup .* cgroup2 ' /proc/self/mountinfo; grep -q '^0::/$' /proc/self/cgroup; test -e /sys/fs/cgroup/cgroup.procs; umount /mnt/data")
			inside(h, "small", `set -e
				umount -l /srv/sys /srv/data; mount -t tmpfs x /srv; mkdir /srv/a /srv/b /srv/c /srv/upper /srv/work
				mount --bind /etc /srv/a; mount --rbind /sys /srv/b; mount -t cgroup2 x /srv/c
				mount -t overlay -o lowerdir=/etc,upperdir=/srv/upper,workdir=/srv/work x /srv/a
				mount -o remount,bind,ro /srv; umount -l /srv
				hostname other; unshare -pf --mount-proc ls /proc/1 >/dev/null`)
			if list, err := filepath.Glob(data + "/*"); err != nil || len(list) != 1 {
				t.Errorf("the share has %v, %v", list, err)
			}
			// The lock of its root is the user's file, hence its root's to spoil.
			h.Run("-d", "small", "-u", "root", "-e", "sh", "-c", "printf XX 1<>/proc/1/fd/6; chmod 0 /proc/1/fd/6; chown 5 /proc/1/fd/6")
			h.OK("--terminate", "small")
			h.OK("-d", "small", "-e", "true")
			h.OK("--unregister", "small", "--yes")
			if left := h.Files(); len(left) != 1 || left[0] != "registry.json" {
				t.Errorf("left of the distro: %v", left)
			}
		})
	}
}
