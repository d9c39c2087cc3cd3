//go:build e2e

package main_test

import (
	"archive/tar"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"testing"

	"github.com/wsl2/wsl2/internal/testsys"
)

// TestWSLConf: what a distro's /etc/wsl.conf says, holds.
func TestWSLConf(t *testing.T) {
	h := testsys.New(t)
	h.File("hosts", []byte("127.0.0.1 localhost\n192.0.2.9 nas.example nas # of the host\n"))
	h.MountNamespace(`mount --bind "$DIR/hosts" /etc/hosts`)
	h.Config("[wsl2]", "defaultVhdSize=2GB")
	configured(h, "conf", `
[boot]
command = "host-exec touch `+h.Path("called")+`; echo $USER >/run/booted; exec sleep 1000"   # holds the distro
[user]
default = alice
[network]
hostname = box.example
[filesystem]
umask = 027
`,
		testsys.Entry{Name: "etc/fstab", Content: []byte("LABEL=root / ext4 defaults 0 1\ntmpfs /srv/mem tmpfs size=1m 0 0\n")}, testsys.Entry{Name: "srv/mem/"},
		testsys.Entry{Name: "etc/hosts", Content: []byte("192.0.2.1 image\n")}, testsys.Entry{Name: "etc/resolv.conf", Content: []byte("nameserver 192.0.2.1\n")},
		testsys.Entry{Name: "usr/share/zoneinfo/" + zone(t), Content: []byte("TZif2")})
	r := h.Run("-d", "conf", "-e", "sh", "-c", "id -un; umask; hostname; echo $NAME; cat /etc/hostname; readlink /etc/resolv.conf; readlink /etc/localtime; grep -c ' /srv/mem ' /proc/mounts")
	h.Want(r, 0)
	resolvConf := "/mnt/wsl/resolv.conf"
	if version1() {
		resolvConf = "/run/wsl2/resolv.conf"
	}
	if want := "alice\n0027\nbox.example\nbox.example\nbox.example\n" + resolvConf + "\n/usr/share/zoneinfo/" + zone(t) + "\n1\n"; r.Stdout != want {
		t.Errorf("%q\nwant %q", r.Stdout, want)
	}
	if strings.Contains(r.Stderr, "/etc/") {
		t.Errorf("a good wsl.conf warns: %v", r)
	}
	if got := inside(h, "conf", "grep 127.0.1.1 /etc/hosts; tail -n 1 /etc/hosts; until [ -s /run/booted ]; do :; done; cat /run/booted"); got != "127.0.1.1\tbox.example\tbox\n192.0.2.9\tnas.example nas\nroot" {
		t.Errorf("%q", got)
	}
	if _, err := os.Stat(h.Path("called")); err != nil { // asked for before it was up
		t.Errorf("boot.command called a program of the host: %v", err)
	}

	// Who copies files is the same alice as at a shell.
	h.OK("cp", h.File("copied", nil), "conf:/home/alice")
	if got := inside(h, "conf", "stat -c %U /home/alice/copied"); got != "alice" {
		t.Errorf("the copy is %s's", got)
	}

	// Safe mode reads none of it.
	h.OK("--shutdown")
	h.Config("[wsl2]", "safeMode=true")
	r = h.Run("-d", "conf", "-e", "sh", "-c", "id -un; hostname; ls /run/booted")
	h.Want(r, 1, "safe mode: /etc/wsl.conf of conf is not read")
	if name, _ := os.Hostname(); r.Stdout != "root\n"+name+"\n" {
		t.Errorf("%v", r)
	}
}

// zone is this host's timezone; every host of the tests has one.
func zone(t *testing.T) string {
	t.Helper()
	if to, err := os.Readlink("/etc/localtime"); err == nil {
		_, name, _ := strings.Cut(to, "/zoneinfo/")
		return name
	}
	text, err := os.ReadFile("/etc/timezone")
	testsys.Must(t, err)
	return strings.TrimSpace(string(text))
}

// TestWSLConfWarns: mistakes are told to whoever starts the distro, with their
// lines, and nobody is locked out.
func TestWSLConfWarns(t *testing.T) {
	h := testsys.New(t)
	h.Config("[wsl2]", "defaultVhdSize=2GB")
	configured(h, "conf", "[boot]\nsytemd=true\nsystemd=true\ncommand=\"\n[network]\ngenerateHosts=perhaps\nhostname=my box\n[user]\ndefault=nobody-here\n[interop]\nenabled=maybe\n",
		testsys.Entry{Name: "etc/fstab", Content: []byte("nodev /srv/mem nosuchfs defaults 0 0\n")}, testsys.Entry{Name: "srv/mem/"})
	systemd := "the distro has no systemd, which boot.systemd in /etc/wsl.conf asks for"
	if version1() {
		systemd = "boot.systemd in /etc/wsl.conf needs a kernel of its own and is ignored in version 1: wsl2 --set-version conf 2"
	}
	r := h.Run("-d", "conf", "-e", "sh", "-c", "id -un; hostname; echo $WSL_INTEROP; ls /run/wsl2/interop")
	h.Want(r, 1,
		"Unknown key 'boot.sytemd' (did you mean 'boot.systemd'?) in /etc/wsl.conf:2",
		`Expected '"' for key 'command' in /etc/wsl.conf:4`,
		"Invalid boolean value 'perhaps' for key 'generateHosts' in /etc/wsl.conf:6",
		"Invalid host name ('mybox' is used): 'my box' for key 'hostname' in /etc/wsl.conf:7",
		"programs of the host are off",
		systemd,
		"not all of /etc/fstab is mounted: mount: exit status",
		`the default user of /etc/wsl.conf cannot be used: no such user: "nobody-here"`)
	if r.Stdout != "root\nmybox\n\n" {
		t.Errorf("%v", r)
	}
	// Who comes later is told what is theirs only.
	r = h.Run("-d", "conf", "-e", "true")
	h.Want(r, 0, "the default user of")
	if strings.Contains(r.Stderr, "sytemd") {
		t.Errorf("told again: %v", r)
	}
}

// TestShared: two distros share the network and /mnt/wsl (TestTwoDistros: and nothing
// else), and the end of one leaves the other.
func TestShared(t *testing.T) {
	h := testsys.New(t)
	h.Config("[wsl2]", "defaultVhdSize=2GB")
	configured(h, "one", "", testsys.Entry{Name: "srv/file", Content: []byte("of one")})
	h.OK("--manage", "one", "--clone", "two")
	keeper := h.Start("-d", "two", "-e", "sh", "-c", "echo ready; exec cat")
	keeper.Expect("ready\n")
	const net = "readlink /proc/self/ns/net"
	if one, two := inside(h, "one", net), inside(h, "two", net); one != two || !strings.HasPrefix(one, "net:") {
		t.Errorf("networks %q and %q", one, two)
	}

	// What one puts into /mnt/wsl, and what it mounts there, the other sees.
	inside(h, "one", "mkdir /mnt/wsl/files /mnt/wsl/own '/mnt/wsl/its disk'; echo shared >/mnt/wsl/files/a; mount -t tmpfs own /mnt/wsl/own; echo mounted >/mnt/wsl/own/b; mount --bind /srv '/mnt/wsl/its disk'")
	if got := inside(h, "two", "cat /mnt/wsl/files/a /mnt/wsl/own/b '/mnt/wsl/its disk/file'"); got != "shared\nmounted\nof one" {
		t.Errorf("%q", got)
	}
	// All of it survives the end of the one, but for its disk, which is free.
	h.OK("--terminate", "one")
	if got := inside(h, "two", "cat /mnt/wsl/files/a /mnt/wsl/own/b; ls '/mnt/wsl/its disk'"); got != "shared\nmounted" {
		t.Errorf("%q", got)
	}
	h.OK("--manage", "one", "--compact")

	// Mounted elsewhere by the other, its disk stays where it is; neither the other nor
	// the VM suffers from that.
	inside(h, "one", "mount --bind /srv '/mnt/wsl/its disk'")
	inside(h, "two", "mkdir /root/held; mount --bind '/mnt/wsl/its disk' /root/held")
	h.OK("--terminate", "one")
	h.Refused(h.Run("-d", "one", "-e", "true"), "the disk of one is still in use in the VM")
	h.Refused(h.Run("--manage", "one", "--compact"), "still in use")
	if got := inside(h, "two", "cat /root/held/file; umount /root/held; cat /mnt/wsl/files/a"); got != "of oneshared" {
		t.Errorf("%q", got)
	}
	h.OK("--manage", "one", "--compact")
	if s := states(h); s["one"] != "Stopped" || s["two"] != "Running" {
		t.Errorf("%v", s)
	}
	if _, err := keeper.Stdin.Write([]byte("still here\n")); err != nil {
		t.Error(err)
	}
	keeper.Expect("still here\n")
	keeper.Stdin.Close()
	h.Want(keeper.Wait(), 0)
	h.OK("--shutdown")
	h.Fsck(false)
}

// TestLimits: a distro gets no more than wslconfig gives it, cannot give itself more,
// and what it lacks the other has.
func TestLimits(t *testing.T) {
	h := testsys.New(t)
	limits(h)

	// Of many processes that are each smaller than the distro's init, one is ended.
	h.Config("[distro.one]", "memory = 32MB")
	h.OK("--terminate", "one")
	const many = "touch /run/since; cat /proc/1/oom_score_adj /proc/self/oom_score_adj; for i in $(seq 6); do (head -c 5m /dev/zero; exec sleep 100000) | tail -n 1 >/dev/null & done; " +
		"while :; do while read -r what n; do [ $what != oom_kill ] || [ $n = 0 ] || break 2; done </sys/fs/cgroup/memory.events; done; killall tail sleep"
	if r := h.Run("-d", "one", "-e", "sh", "-c", many); !strings.HasPrefix(r.Stdout, "-1000\n0\n") {
		t.Errorf("many processes in a distro of 32 MB: %v", r)
	}
	if got := inside(h, "one", "ls /run/since; grep -c 'oom_kill 0' /sys/fs/cgroup/memory.events || :"); got != "/run/since\n0" {
		t.Errorf("the distro was ended: %q", got)
	}
}

// TestSwap: with swap a VM holds more than it has memory, and nothing of it is left.
func TestSwap(t *testing.T) {
	h := testsys.New(t)
	h.Config("[wsl2]", "defaultVhdSize=2GB", "memory=128MB", "swap=512MB", "swapFile="+h.Path("mine"))
	mine := h.File("mine", []byte("not a swap file"))
	configured(h, "one", "")
	h.OK("--shutdown")
	r := h.Run("-d", "one", "-e", "sh", "-c", "cat /proc/swaps | wc -l")
	h.Want(r, 0, "the VM has no swap (wsl2.swap in wslconfig): "+mine+" is something else")
	if text, err := os.ReadFile(mine); r.Stdout != "1\n" || string(text) != "not a swap file" {
		t.Errorf("%v, %q, %v", r, text, err)
	}
	h.OK("--shutdown")
	testsys.Must(t, os.Remove(mine))
	const n = 90 << 20
	want, _ := testsys.SHA256(t, testsys.Pattern(n))
	r = h.RunIn(testsys.Pattern(n), "-d", "one", "-e", "sh", "-c", "mount -t tmpfs -o size=100m mem /srv; cat >/srv/a; sha256sum </srv/a; cat /proc/meminfo")
	h.Want(r, 0)
	var total, free int
	for line := range strings.Lines(r.Stdout) {
		fmt.Sscanf(line, "SwapTotal: %d", &total)
		fmt.Sscanf(line, "SwapFree: %d", &free)
	}
	if !strings.HasPrefix(r.Stdout, want) || total != 512<<10-4 || free > total-10<<10 {
		t.Errorf("%d kB of %d kB are free: %v", free, total, r)
	}
	if _, err := os.Stat(mine); !os.IsNotExist(err) {
		t.Errorf("the file has its name still: %v", err)
	}
}

// TestMusl: a distro like Alpine, with musl as its C library and busybox for all the
// rest, its init as well.
func TestMusl(t *testing.T) {
	h := testsys.New(t)
	h.Config("[wsl2]", "defaultVhdSize=2GB")
	source := h.File("who.c", []byte(`#include <grp.h>
#include <pwd.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>
#include <unistd.h>
int main(void) {
	struct passwd *p = getpwuid(getuid());
	struct group *g = getgrgid(50);
	time_t t = 0;
	printf("%s %s %s %s\n", p ? p->pw_name : "?", p ? p->pw_shell : "?", g ? g->gr_mem[0] : "?", getenv("LANG"));
	return localtime(&t)->tm_year == 70 || localtime(&t)->tm_year == 69 ? 3 : 4;
}
`))
	if out, err := exec.Command("musl-gcc", "-o", h.Path("who"), source).CombinedOutput(); err != nil {
		t.Fatalf("musl-gcc: %v: %s", err, out)
	}
	read := func(path string) []byte {
		t.Helper()
		b, err := os.ReadFile(path)
		testsys.Must(t, err)
		return b
	}
	configured(h, "alpine", "[boot]\nsystemd = true\n[user]\ndefault = alice\n",
		testsys.Entry{Name: "lib/"}, testsys.Entry{Name: "lib/ld-musl-x86_64.so.1", Content: read("/lib/ld-musl-x86_64.so.1"), Mode: 0o755},
		testsys.Entry{Name: "sbin/"}, testsys.Entry{Name: "sbin/init", Type: tar.TypeSymlink, Link: "/bin/busybox"},
		testsys.Entry{Name: "bin/who-am-i", Content: read(h.Path("who")), Mode: 0o755})
	systemd := "the distro has no systemd, which boot.systemd in /etc/wsl.conf asks for"
	if version1() {
		systemd = "boot.systemd in /etc/wsl.conf needs a kernel of its own"
	}
	r := h.Run("-d", "alpine", "who-am-i")
	h.Want(r, 3, systemd)
	if r.Stdout != "alice /bin/sh alice C.UTF-8\n" {
		t.Errorf("%v", r)
	}
	if r := h.Run("-d", "alpine", "-u", "root", "-e", "who-am-i"); r.Status != 3 || !strings.HasPrefix(r.Stdout, "root /bin/sh ") {
		t.Errorf("%v", r)
	}
}
