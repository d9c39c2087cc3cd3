//go:build e2e

package main_test

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/wsl2/wsl2/internal/testsys"
	"github.com/wsl2/wsl2/launcher/api"
	"github.com/wsl2/wsl2/launcher/client"
)

// special are files of which a copy has to keep something that is easily lost.
func special() []testsys.Entry {
	return []testsys.Entry{
		{Name: "srv/suid", Content: []byte("x"), Mode: 0o4750, UID: 1000, GID: 50},
		{Name: "srv/nobodys", Content: []byte("y"), UID: 65534, GID: 65534},
		{Name: "srv/hard", Type: '1', Link: "srv/suid"},
		{Name: "srv/soft", Type: '2', Link: "/nowhere", UID: 1000},
		{Name: "srv/fifo", Type: '6', Mode: 0o600},
		{Name: "srv/closed/", Mode: 0o100, UID: 1000},
		{Name: "srv/attributes", Content: []byte("z"), PAX: map[string]string{"SCHILY.xattr.user.note": "hi"}},
		{Name: "srv/null", Type: '3', Major: 1, Minor: 3},
	}
}

// contents describes all that special and the distro's other files are.
func contents(h *testsys.Host, distro string) string {
	h.TB.Helper()
	return inside(h, distro, "find /srv /home /bin/busybox ! -name null | sort | xargs stat -c '%n %F %a %u %g %h %s %Y'; find /srv -type f | sort | xargs md5sum; readlink /srv/soft")
}

// TestVersion1Mounts: what a distro mounts in a share of a host whose mounts are shared, as
// systemd makes them, is mounted in the distro alone.
func TestVersion1Mounts(t *testing.T) {
	h := testsys.New(t)
	h.OK("--import", "small", h.File("small.tar", testsys.Tar(t, testsys.Busybox(t)...)), "--version", "1")
	home := h.Path("home")
	testsys.Must(t, unix.Mount("tmpfs", home, "tmpfs", 0, ""))
	t.Cleanup(func() { unix.Unmount(home, unix.MNT_DETACH) }) //nolint:errcheck // the test is over
	testsys.Must(t, unix.Mount("", home, "", unix.MS_SHARED, ""))
	testsys.Must(t, os.Mkdir(filepath.Join(home, "sub"), 0o755))
	h.OK("-d", "small", "-u", "root", "-e", "sh", "-c", "mount -t tmpfs x /mnt/host/sub && touch /mnt/host/sub/inside")
	if _, err := os.Stat(filepath.Join(home, "sub/inside")); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the host sees the distro's mount: %v", err)
	}
	h.OK("-d", "small", "-u", "root", "-e", "sh", "-c", "touch /mnt/host/set-id && chmod 4755 /mnt/host/set-id")
	if st, err := os.Stat(filepath.Join(home, "set-id")); err != nil || st.Mode()&os.ModeSetuid == 0 {
		t.Errorf("docs/version1.md says that a share can have set-id files: %v, %v", st, err)
	}
	h.OK("--terminate", "small")

	// What the host mounts in the root of a distro is neither copied nor deleted with it.
	kept := h.File("home/sub/kept", nil)
	point := filepath.Join(h.Data(), "distros/small/rootfs/srv")
	testsys.Must(t, unix.Mount(filepath.Dir(kept), point, "", unix.MS_BIND, ""))
	t.Cleanup(func() { unix.Unmount(point, unix.MNT_DETACH) }) //nolint:errcheck // it is done below
	for _, args := range [][]string{{"--unregister", "small"}, {"--set-version", "small", "2"}} {
		h.Refused(h.Run(args...), "umount "+point)
	}
	testsys.Must(t, unix.Unmount(point, 0))
	h.OK("--unregister", "small")
	if _, err := os.Stat(kept); err != nil {
		t.Error(err)
	}
}

// TestVersion1Life is a distro of version 1 from its import to its end, of root's and of an ordinary user's.
func TestVersion1Life(t *testing.T) {
	for name, of := range map[string]func(*testsys.Host){"root": func(*testsys.Host) {}, "user": anotherUser} {
		t.Run(name, func(t *testing.T) {
			h := testsys.New(t)
			archive := h.File("small.tar", testsys.Tar(t, append(append(testsys.Busybox(t), special()...),
				testsys.Entry{Name: "srv/trusted", Content: []byte("t"), PAX: map[string]string{"SCHILY.xattr.trusted.note": "left out"}})...))
			of(h)
			h.OK("--import", "small", archive, "--version", "1")
			if out := h.OK("--list", "--verbose"); !strings.Contains(out, "Stopped       1") {
				t.Errorf("--list --verbose: %s", out)
			}
			before := contents(h, "small")
			for _, want := range []string{"/srv/suid regular file 4750 1000 50 2", "/srv/nobodys regular file 644 65534 65534", "/srv/fifo fifo 600", "/srv/closed directory 100 1000 0"} {
				if !strings.Contains(before, want) {
					t.Errorf("no %q in %s", want, before)
				}
			}
			// Its users are none that the host knows, but for the user himself.
			st, err := os.Stat(filepath.Join(h.Data(), "distros/small/rootfs/srv/nobodys"))
			testsys.Must(t, err)
			if owner := st.Sys().(*syscall.Stat_t).Uid; owner < 100000 {
				t.Errorf("the distro's nobody is the host's user %d", owner)
			}
			if _, err := unix.Getxattr(filepath.Join(h.Data(), "distros/small/rootfs/srv/trusted"), "trusted.note", nil); err != unix.ENODATA {
				t.Errorf("an attribute of the host's root was imported: %v", err)
			}

			// Programs are processes of the host, with their own command lines.
			l := h.Start("-d", "small", "-e", "sh", "-c", "echo ready; read x", "known")
			l.Expect("ready\n")
			pid := hostPID(t, initOf(h, "small").PID, "sh\x00-c\x00echo ready; read x\x00known\x00")
			if out := h.OK("ps", "small"); !strings.Contains(out, fmt.Sprint(initOf(h, "small").PID)+"  small         1  wsl2-distro") || !strings.Contains(out, fmt.Sprint(pid)+"  small") {
				t.Errorf("ps: %s", out)
			}
			testsys.Must(t, unix.Kill(pid, unix.SIGTERM))
			if r := l.Wait(); r.Status != 143 {
				t.Errorf("killed on the host: %v", r)
			}

			// What means the host is refused, and names version 2 where that can.
			for script, says := range map[string]string{
				"mknod /tmp/n c 1 3": "not permitted", "echo 1 >/proc/sys/kernel/panic": "ermission denied",
				"ulimit -Hn 4000000": "not permitted", "touch /tmp/image && mount -o loop /tmp/image /srv": "mount",
				"date -s 2000-01-01": "not permitted", "swapon /srv/suid": "not permitted", "insmod /bin/busybox": "not permitted", "rmmod none": "not permitted",
				"ip link add x type dummy": "not permitted", "httpd -f -p 127.0.0.1:1": "ermission denied", "mknod /tmp/b b 7 0": "not permitted",
				"mount -t ext4 /dev/null /srv": "mount", "echo x >/sys/kernel/uevent_helper": "ead-only",
			} {
				if r := h.Run("-d", "small", "-e", "sh", "-c", script); !strings.Contains(r.Stderr, says) {
					t.Errorf("%v, want %q", r, says)
				}
			}
			for _, args := range [][]string{
				{"--manage", "small", "--resize", "1GB"}, {"--manage", "small", "--compact"}, {"--manage", "small", "--repair"},
				{"--export", "small", h.Path("disk.vhdx")}, {"-d", "small", "--debug-shell"}, {"--accel", "tcg", "-d", "small"},
				{"--kernel", "/boot/none", "-d", "small"}, {"--import", "disk", h.File("disk.vhdx", nil), "--vhd", "--version", "1"},
			} {
				h.Refused(h.Run(args...), "--set-version", "2")
			}

			// A user of the distro can have namespaces, with a /proc, as container tools want; what of /proc is the
			// host's he cannot read.
			if out := h.OK("-d", "small", "-u", "alice", "-e", "unshare", "-r", "-p", "-f", "--mount-proc", "sh", "-c", "id -u; echo $$; ls -d /proc/[0-9]*"); out != "0\n1\n/proc/1\n" {
				t.Errorf("a user's own namespaces: %q", out)
			}
			if r := h.Run("-d", "small", "-u", "root", "-e", "head", "-c", "1", "/proc/timer_list"); !strings.Contains(r.Stderr, "ermission denied") {
				t.Error(r)
			}

			// Its set-id programs are nobody else's.
			testsys.Must(t, os.Chmod(h.Path("home"), 0o755))
			h.Refused(h.Run("--import", "open", h.Path("home"), archive, "--version", "1"), "chmod 700")

			// Out and in again, copied and moved.
			h.OK("--export", "small", h.Path("export.tar.gz"))
			h.OK("--import", "again", h.Path("export.tar.gz"), "--version", "1")
			h.OK("--manage", "again", "--clone", "clone")
			h.OK("--manage", "clone", "--rename", "copy")
			h.OK("--manage", "copy", "--move", h.Path("home/moved"))
			for _, name := range []string{"again", "copy"} {
				if after := contents(h, name); after != before {
					t.Errorf("%s is\n%s\nwant\n%s", name, after, before)
				}
			}
			h.OK("--terminate", "copy")
			if s := states(h); s["small"] != "Stopped" || s["again"] != "Running" || s["copy"] != "Stopped" {
				t.Errorf("%v", s)
			}

			// Idle on its own, and nothing left.
			h.OK("--shutdown")
			h.CheckNothingLeft()
			h.Config("[general]", "instanceIdleTimeout=1")
			h.OK("-d", "again", "-e", "true")
			for _, p := range h.Processes() {
				if p.Role() == "distro" {
					p.End(t)
				}
			}
			for _, name := range []string{"small", "again", "copy"} {
				h.OK("--unregister", name)
			}
			if left := h.Files(); len(left) != 1 || left[0] != "registry.json" {
				t.Errorf("left of the distros: %v", left)
			}
			if _, err := os.Lstat(h.Path("home/moved")); !errors.Is(err, os.ErrNotExist) {
				t.Errorf("left of copy: %v", err)
			}
		})
	}
}

// hostPID finds the child of init with this command line, which runs already.
func hostPID(t *testing.T, init int, cmdline string) int {
	t.Helper()
	tasks, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/children", init))
	testsys.Must(t, err)
	for _, path := range tasks {
		children, _ := os.ReadFile(path)
		for _, pid := range strings.Fields(string(children)) {
			if line, err := os.ReadFile("/proc/" + pid + "/cmdline"); err == nil && string(line) == cmdline {
				n, err := strconv.Atoi(pid)
				testsys.Must(t, err)
				return n
			}
		}
	}
	t.Fatalf("no %q among the children of %d", cmdline, init)
	return 0
}

// TestVersion1NoRange: who has no IDs for a distro is told which line to add.
func TestVersion1NoRange(t *testing.T) {
	h := testsys.New(t)
	archive := h.File("small.tar", testsys.Tar(t, testsys.Busybox(t)...))
	anotherUser(h)
	h.InNamespace(`: >"$DIR/ranges"`)
	h.Refused(h.Run("--import", "small", archive, "--version", "1"), "/etc/subuid", "tester:")
	if left := h.Files(); len(left) != 0 {
		t.Errorf("left: %v", left)
	}
}

// TestVersion1IDs: a distro keeps its IDs, and is not started with others'.
func TestVersion1IDs(t *testing.T) {
	h := testsys.New(t)
	archive := h.File("small.tar", testsys.Tar(t, testsys.Busybox(t)...))
	anotherUser(h)
	h.OK("--import", "small", archive, "--version", "1")
	ranges := func(lines string) {
		t.Helper()
		h.OK("--terminate", "small")
		h.InNamespace(`printf '` + lines + `' >"$DIR/ranges"`)
	}
	ranges("tester:700000:65536\ntester:900000:131072\n")
	h.OK("-d", "small", "-e", "true")
	if status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", initOf(h, "small").PID)); err != nil || !strings.Contains(string(status), "\nUid:\t700000\t") {
		t.Errorf("with a second range: %s, %v", status, err)
	}
	ranges("other:765000:1000\ntester:700000:65536\n")
	h.Want(h.Run("-d", "small", "-e", "true"), 0, "/etc/subuid gives IDs to other")
	if r := h.Run("doctor"); !strings.Contains(r.Stdout, "gives IDs to other") {
		t.Errorf("doctor: %s", r.Stdout)
	}
	ranges("tester:900000:131072\n")
	h.Refused(h.Run("-d", "small", "-e", "true"), "/etc/subuid has changed", "tester:700000:65536")
	ranges("")
	if r := h.Run("doctor"); !strings.Contains(r.Stdout, "Distros of version 1 do not run here") || !strings.Contains(r.Stdout, "tester:100000:65536") {
		t.Errorf("doctor: %s", r.Stdout)
	}
	if r := h.Run("doctor", "--json"); !strings.Contains(r.Stdout, `"next":`) {
		t.Errorf("doctor --json: %s", r.Stdout)
	}
	// Nor can they be deleted until it is his again; then a service does.
	h.Refused(h.Run("--unregister", "small", "--yes"), "tester:700000:65536")
	h.InNamespace(`echo tester:700000:65536 >"$DIR/ranges"`)
	h.OK("--shutdown")
	h.CheckNothingLeft()
	l := h.Start("ports", "--follow") // a service that stays
	testsys.WaitGone(t, filepath.Join(h.Data(), "distros"), ".change-*")
	l.Kill()
	if left := h.Files(); len(left) != 1 || left[0] != "registry.json" {
		t.Errorf("left of the distro: %v", left)
	}
}

// TestVersion1Settings: what wslconfig asks for and version 1 cannot is refused where somebody relies on it, else told
// of, once for each start.
func TestVersion1Settings(t *testing.T) {
	h := testsys.New(t)
	h.OK("--import", "small", h.File("small.tar", testsys.Tar(t, testsys.Busybox(t)...)), "--version", "1")
	h.OK("--shutdown")
	h.CheckNothingLeft() // a service that still runs is not in the namespace
	h.MountNamespace("mount -t tmpfs none /sys/fs/cgroup")
	h.Config("[distro.small]", "pids=50")
	h.Refused(h.Run("-d", "small", "-e", "true"), "/sys/fs/cgroup is no cgroup2", "systemd.unified_cgroup_hierarchy", "--set-version", "2")
	h.Config("[distro.small]", "vm=own")
	h.Refused(h.Run("-d", "small", "-e", "true"), "vm=own", "--set-version", "2")
	h.Config("[wsl2]", "networkingMode=none", "kernelCommandLine=quiet")
	h.Want(h.Run("-d", "small", "-e", "true"), 0, "what wslconfig says of the network", "what wslconfig says of the kernel", "--set-version small 2")
	if out := inside(h, "small", "test -e /mnt/wsl || echo none"); out != "none" {
		t.Errorf("/mnt/wsl: %s", out)
	}
	h.OK("--terminate", "small")
	h.Config("[shares]", "host = ~, umask=077, metadata")
	l := h.Start("-d", "small", "-e", "sh", "-c", "echo ready; cat")
	l.Expect("ready\n")
	if r := h.Run("-d", "small", "-e", "true"); r.Status != 0 || r.Stderr != "" {
		t.Errorf("told again: %v", r)
	}
	l.Stdin.Close()
	h.Want(l.Wait(), 0, "umask, fmask and dmask, metadata of the share /mnt/host do not hold in a distro of version 1")
}

// TestVersion1Soak runs commands in two distros at once, of root's and of an ordinary user's, and then looks for what they left.
func TestVersion1Soak(t *testing.T) {
	for name, of := range map[string]func(*testsys.Host){"root": func(*testsys.Host) {}, "user": anotherUser} {
		t.Run(name, func(t *testing.T) {
			h := testsys.New(t)
			archive := h.File("small.tar", testsys.Tar(t, testsys.Busybox(t)...))
			of(h)
			h.OK("--import", "one", archive, "--version", "1")
			h.OK("--manage", "one", "--clone", "two")
			h.OK("-d", "one", "-e", "true")
			h.OK("-d", "two", "-e", "true")
			service := h.Process("service")
			fds := service.FDs()
			var group sync.WaitGroup
			for _, distro := range []string{"one", "two"} {
				group.Go(func() {
					for i := range count(1000) {
						if r := h.Run("-d", distro, "-e", "echo", distro, strconv.Itoa(i)); r.Status != 0 || r.Stdout != fmt.Sprintf("%s %d\n", distro, i) || r.Stderr != "" {
							t.Errorf("command %d: %v", i, r)
							return
						}
					}
				})
			}
			group.Wait()
			for _, distro := range []string{"one", "two"} {
				// The heading, init, sh and ps: who has seen a command end finds nothing of it.
				if out := inside(h, distro, "ps -o pid,args >/tmp/ps; cat /tmp/ps"); strings.Count(out, "\n") != 3 {
					t.Errorf("processes are left in %s:\n%s", distro, out)
				}
			}
			if now := service.FDs(); now > fds+8 {
				t.Errorf("the service has %d descriptors, had %d", now, fds)
			}
			h.OK("--shutdown")
			h.CheckNothingLeft()
			h.OK("--unregister", "one", "--yes")
			h.OK("--unregister", "two", "--yes")
			if left := h.Files(); len(left) != 1 || left[0] != "registry.json" {
				t.Errorf("left of the distros: %v", left)
			}
		})
	}
}

// TestVersion1Debian: an ordinary user, and root, work in a Debian of version 1 as in any: packages, a build, su, sudo, tmux.
// gcc, with all that it needs, and git are installed in `make soak` only; their download takes too long.
func TestVersion1Debian(t *testing.T) {
	install := "apt-get install -q=2 -y --no-install-recommends bc"
	build := `printf 'a:\n\techo 6*7 | bc >a\n' >Makefile && make -s && cat a`
	if os.Getenv("WSL2_SOAK") != "" {
		install = "apt-get remove -q=2 -y git && apt-get install -q=2 -y --no-install-recommends gcc libc6-dev git"
		build = `printf '#include <stdio.h>\nint main(void) { printf("%%d\\n", 6*7); }\n' >a.c && make -s a && ./a`
	}
	for name, of := range map[string]func(*testsys.Host){"root": func(*testsys.Host) {}, "user": anotherUser} {
		t.Run(name, func(t *testing.T) {
			h := testsys.New(t)
			archive := debianArchive(t)
			of(h)
			h.OK("--import", "debian", archive, "--version", "1")
			inside(h, "debian", "echo 'alice ALL=(ALL) NOPASSWD: ALL' >/etc/sudoers.d/alice; echo root:secret | chpasswd; export DEBIAN_FRONTEND=noninteractive; "+
				"{ apt-get update -q=2 && "+install+"; } >/tmp/apt.log 2>&1 || { cat /tmp/apt.log >&2; exit 1; }")
			as := func(script, want string) {
				t.Helper()
				if got := h.OK("-d", "debian", "-u", "alice", "--cd", "~", "-e", "bash", "-c", script); got != want {
					t.Errorf("%s: %q, want %q", script, got, want)
				}
			}
			as(build, "42\n")
			as(`git init -q x && cd x && cp ../a . && git add . && git -c user.name=a -c user.email=a@b commit -qm one && git log --oneline | wc -l`, "1\n")
			as(`id -un; sudo id -un; echo secret | su -c 'id -un' root 2>/dev/null`, "alice\nroot\nroot\n")
			as(`tmux new-session -d 'id -un >in-tmux; tmux wait-for -S written; read end' && tmux wait-for written; cat in-tmux; tmux kill-server`, "alice\n")
			h.OK("--unregister", "debian", "--yes")
			if left := h.Files(); len(left) != 1 || left[0] != "registry.json" {
				t.Errorf("left of the distro: %v", left)
			}
		})
	}
}

// TestVersion1Killed: whatever is killed, nothing of a distro is left running, and the next command works.
func TestVersion1Killed(t *testing.T) {
	for name, of := range map[string]func(*testsys.Host){"root": func(*testsys.Host) {}, "user": anotherUser} {
		t.Run(name, func(t *testing.T) {
			h := testsys.New(t)
			archive := h.File("small.tar", testsys.Tar(t, testsys.Busybox(t)...))
			of(h)
			h.OK("--set-default-version", "1")
			h.OK("--import", "small", archive)
			killedInTurn(t, h)
		})
	}
}

func killedInTurn(t *testing.T, h *testsys.Host) {
	for _, victim := range []string{"client", "distro", "service", "stopped"} {
		l := h.Start("-d", "small", "-e", "sh", "-c", "(setsid sleep 100000 &) ; echo ready; cat")
		l.Expect("ready\n")
		init := initOf(h, "small")
		switch victim {
		case "client":
			l.Kill()
			h.OK("-d", "small", "-e", "true")
			h.OK("--terminate", "small")
		case "stopped": // and its init cannot do anything about it
			testsys.Must(t, init.Signal(unix.SIGSTOP))
			h.Process("service").Kill(t)
			h.Refused(l.Wait())
		default:
			h.Process(victim).Kill(t)
			h.Refused(l.Wait())
		}
		init.End(t)
		if out := inside(h, "small", "pidof sleep || echo none"); out != "none" {
			t.Errorf("after the end of the %s a sleep is left: %s", victim, out)
		}
		h.OK("--shutdown")
		h.CheckNothingLeft()
	}
	before := h.Files()
	for _, end := range []func(){
		func() { h.OK("--shutdown", "--force") },
		func() { killInit(t, h, "wsl2-import"); h.OK("--shutdown") },
	} {
		l := enter(h, "importing", nil)
		end()
		h.Refused(l.Wait())
		h.CheckNothingLeft()
		if left := h.Files(); !slices.Equal(left, before) {
			t.Errorf("left of an import: %v, before it: %v", left, before)
		}
		testsys.Must(t, os.Remove(h.Path("fifo.tar")))
	}
	h.OK("--unregister", "small")
	if left := h.Files(); len(left) != 1 || left[0] != "registry.json" {
		t.Errorf("left of the distro: %v", left)
	}
}

// killInit kills /init in this role, which works on the root of a distro. It tells whether there was one.
func killInit(t *testing.T, h *testsys.Host, argv0 string) bool {
	t.Helper()
	for _, p := range h.Processes() {
		if p.Argv[0] == argv0 {
			p.Kill(t)
			return true
		}
	}
	return false
}

// convert asks the service for another version of small. progress is told what a terminal is shown.
func convert(t *testing.T, h *testsys.Host, version int, progress func(api.Progress)) error {
	t.Helper()
	getenv := func(key string) string {
		for _, e := range slices.Backward(h.Env) {
			if value, ok := strings.CutPrefix(e, key+"="); ok {
				return value
			}
		}
		return ""
	}
	cl, err := client.New(testsys.Exe(t), getenv)
	testsys.Must(t, err)
	var built struct{ Version string } // which a test binary does not know
	testsys.Must(t, json.Unmarshal([]byte(h.OK("--version", "--json")), &built))
	cl.Self.Version, cl.Service.Env, cl.Progress = built.Version, h.Env, progress
	return cl.Call(api.Call{Verb: api.VerbSetVersion, Name: "small", Version: version}, nil, true)
}

// TestSetVersion converts a distro there and back; one that is cut off is as it was.
func TestSetVersion(t *testing.T) {
	h := testsys.New(t)
	h.Config("[wsl2]", "defaultVhdSize=2GB")
	h.OK("--set-default-version", "1")
	// cap_net_raw+ep (capabilities(7), "File capability extended attribute versioning").
	capability := "\x01\x00\x00\x02\x00\x20\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00"
	h.Import("small", append(append(testsys.Busybox(t), special()...),
		testsys.Entry{Name: "srv/capable", Content: []byte("c"), Mode: 0o755, PAX: map[string]string{"SCHILY.xattr.security.capability": capability}})...)
	inside(h, "small", "dd if=/dev/zero of=/srv/holes bs=1 count=1 seek=8388608 2>/dev/null")
	before := contents(h, "small")
	attributes := func() string {
		t.Helper()
		var all []string
		for _, a := range []struct{ file, name string }{{"attributes", "user.note"}, {"capable", "security.capability"}} {
			value := make([]byte, 64)
			n, err := unix.Getxattr(filepath.Join(h.Data(), "distros/small/rootfs/srv", a.file), a.name, value)
			testsys.Must(t, err)
			all = append(all, fmt.Sprintf("%s %x", a.name, value[:n]))
		}
		return strings.Join(all, "\n")
	}
	attributesBefore := attributes()
	registered := func() string {
		t.Helper()
		text, err := os.ReadFile(filepath.Join(h.Data(), "registry.json"))
		testsys.Must(t, err)
		return string(text)
	}
	h.Refused(h.Run("--set-version", "small", "1"), "already")
	h.Refused(h.Run("--set-version", "small", "3"), "version 3")
	for _, version := range []string{"2", "1"} {
		// In use it is refused.
		l := h.Start("-d", "small", "-e", "sh", "-c", "echo ready; cat")
		l.Expect("ready\n")
		h.Refused(h.Run("--set-version", "small", version), "running sessions")
		l.Stdin.Close()
		l.Wait()
		// Cut off while it works.
		was := registered()
		cutOff := func() bool {
			service := h.Process("service") // one that is about to start a program would be two
			var c *testsys.Live
			partial := map[string]string{"1": "rootfs.partial", "2": "disk.ext4.partial"}[version]
			testsys.WaitCreated(t, filepath.Join(h.Data(), "distros/small"), partial, func() { c = h.Start("--set-version", "small", version) })
			c.Kill() // or it would ask the next service
			service.Kill(t)
			return registered() == was
		}
		for tries := 10; !cutOff(); tries-- { // it was done before the kill came
			if tries == 0 {
				t.Fatalf("cut off, the registry is %s, was %s", registered(), was)
			}
			h.OK("--set-version", "small", map[string]string{"1": "2", "2": "1"}[version])
		}
		if after := contents(h, "small"); after != before {
			t.Errorf("cut off before version %s it is\n%s\nwant\n%s", version, after, before)
		}
		testsys.WaitGone(t, filepath.Join(h.Data(), "distros"), ".change-*") // what it had made is being deleted
		h.OK("--terminate", "small")
		// So it is when /init is killed, which reads or writes its root.
		number, err := strconv.Atoi(version)
		testsys.Must(t, err)
		back := map[int]int{1: 2, 2: 1}[number]
		killed := func() bool {
			was, found := registered(), false
			err := convert(t, h, number, func(api.Progress) {
				found = found || killInit(t, h, map[int]string{1: "wsl2-import", 2: "wsl2-export"}[number])
			})
			if (err == nil) == (registered() == was) {
				t.Errorf("converting ended with %v, the registry is %s, was %s", err, registered(), was)
			}
			return found && err != nil
		}
		for tries := 10; !killed(); tries-- { // it was done before the kill came
			if tries == 0 {
				t.Fatal("/init is never killed in time")
			}
			testsys.Must(t, convert(t, h, back, nil))
		}
		testsys.WaitGone(t, filepath.Join(h.Data(), "distros"), ".change-*")
		var told []api.Progress
		testsys.Must(t, convert(t, h, number, func(p api.Progress) { told = append(told, p) }))
		if len(told) == 0 || told[0].What != "copying the files" || told[0].Done == 0 || told[0].Total <= told[0].Done {
			t.Errorf("told of converting: %+v", told)
		}
		if out := h.OK("--list", "--verbose"); !strings.Contains(out, "Stopped       "+version) {
			t.Errorf("--list --verbose: %s", out)
		}
		if after := contents(h, "small"); after != before {
			t.Errorf("as version %s it is\n%s\nwant\n%s", version, after, before)
		}
		if version == "1" { // after both conversions
			if after := attributes(); after != attributesBefore {
				t.Errorf("the attributes are\n%s\nwant\n%s", after, attributesBefore)
			}
		}
		if blocks := strings.TrimSpace(inside(h, "small", "stat -c %b /srv/holes")); len(blocks) > 2 {
			t.Errorf("as version %s a file with a hole of 8 MiB has %s blocks", version, blocks)
		}
		entries, err := os.ReadDir(filepath.Join(h.Data(), "distros/small"))
		testsys.Must(t, err)
		for _, e := range entries {
			if name := e.Name(); (version == "1") != strings.HasPrefix(name, "rootfs") {
				t.Errorf("as version %s it has %s", version, name)
			}
		}
	}
	h.OK("--unregister", "small")
}
