//go:build e2e

package main_test

import (
	"cmp"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/wsl2/wsl2/internal/testsys"
)

// systemdConf lets sessions wait as long as they may: the CPU is an emulated one.
const systemdConf = "[boot]\nsystemd = true\ninitTimeout = 45000\n"

// isUp waits until systemd has finished booting, in root's session: for its job, which
// needs no bus, then for what follows it.
const isUp = "systemctl start default.target; systemctl is-system-running --wait"

// witness is a service that leaves word of its start and of its stop.
const witness = "[Service]\nType=oneshot\nRemainAfterExit=yes\nExecStart=/bin/sh -c 'echo started >>/var/lib/witness'\n" +
	"ExecStop=/bin/sh -c 'sleep 0.1; echo stopped >>/var/lib/witness'\n[Install]\nWantedBy=multi-user.target\n"

var debian struct {
	once sync.Once
	seed testsys.Seed
	ok   bool
}

// newDebian makes a host with the distro "one", a Debian whose wsl.conf is
// systemdConf, with the service witness. It is made once per run of the tests.
func newDebian(t *testing.T) *testsys.Host {
	t.Helper()
	debian.once.Do(func() {
		h := testsys.New(t)
		h.Config("[wsl2]", "defaultVhdSize=4GB")
		h.Want(h.Run("--import", "one", debianArchive(t)), 0)
		inside(h, "one", "cat >/etc/wsl.conf <<'END'\n"+systemdConf+"END\ncat >/etc/systemd/system/witness.service <<'END'\n"+witness+"END\nsystemctl enable witness")
		debian.seed = h.NewSeed(filepath.Join(seeds, "debian"))
		debian.ok = true
	})
	if !debian.ok {
		t.Fatal("Debian could not be made in an earlier test")
	}
	h := testsys.New(t)
	h.Plant(debian.seed)
	return h
}

var archived struct {
	once sync.Once
	path string
}

// debianArchive is the archive of that Debian, as bootstrap makes it, once per run of the tests.
func debianArchive(t *testing.T) string {
	t.Helper()
	archived.once.Do(func() {
		path := filepath.Join(seeds, "debian.tar")
		testsys.Must(t, os.Rename(bootstrap(t, testsys.New(t)), path))
		testsys.Must(t, os.Chmod(seeds, 0o755)) // for the tests of ordinary users
		archived.path = path
	})
	if archived.path == "" {
		t.Fatal("Debian could not be made in an earlier test")
	}
	return archived.path
}

// bootstrap makes a Debian with systemd of this host's apt sources, the programs of
// TestPrograms, TestSharePrograms, TestNetworkPrograms and more packages, and the user alice.
func bootstrap(t *testing.T, h *testsys.Host, more ...string) string {
	t.Helper()
	path := h.Path("debian.tar")
	packages := append([]string{"systemd-sysv", "dbus", "dbus-user-session", "libpam-systemd", "udev", "less", "vim-tiny", "htop", "mc", "rsync", "git", "make", "sqlite3", "sudo", "tmux",
		"bind9-dnsutils", "curl", "iproute2", "iptables", "iputils-ping", "nftables", "openvpn"}, more...)
	out, err := exec.Command("mmdebstrap", "--quiet", "--variant=minbase", "--include="+strings.Join(packages, ","),
		"--customize-hook=chroot \"$1\" useradd -m alice", suite(t), path).CombinedOutput()
	if err != nil {
		t.Fatalf("mmdebstrap: %v: %s", err, out)
	}
	return path
}

// suite is the Debian whose packages this host's apt has.
func suite(t *testing.T) string {
	t.Helper()
	out, err := exec.Command("sh", "-c", `. /etc/os-release; [ "$ID" != debian ] || echo "$VERSION_CODENAME"`).Output()
	testsys.Must(t, err)
	return cmp.Or(strings.TrimSpace(string(out)), "stable")
}

// up starts a distro and waits until its systemd has finished booting. A session waits
// for that only so long: on a busy machine it takes several.
func up(h *testsys.Host, distro string) {
	h.TB.Helper()
	deadline := time.Now().Add(testsys.Deadline)
	for {
		r := h.Run("-d", distro, "-u", "root", "-e", "sh", "-c", isUp)
		if s := strings.TrimSpace(r.Stdout); s == "running" || s == "degraded" {
			return
		}
		if time.Now().After(deadline) {
			h.TB.Fatalf("%s does not come up: %v: PID 1: %s", distro, r, inside(h, distro, "cd /proc/1; cat comm wchan; grep State status; ls /run/systemd"))
		}
	}
}
