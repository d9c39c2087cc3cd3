//go:build e2e

package main_test

import (
	"archive/tar"
	"encoding/json"
	"fmt"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/wsl2/wsl2/internal/testsys"
)

// TestSystemDistro needs no image, no network and no configuration.
func TestSystemDistro(t *testing.T) {
	h := testsys.New(t)
	out := h.OK("--system", "--", "uname -a")
	if !strings.HasPrefix(out, "Linux ") || !strings.Contains(out, "x86_64") {
		t.Fatalf("uname -a printed %q", out)
	}
	for _, command := range []string{"ls /", "cat /proc/version", "ps", "mount", "dmesg", "find /etc"} {
		if out := h.OK("--system", "--", command); out == "" {
			t.Errorf("%s printed nothing", command)
		}
	}
	// Nothing else is there: the message says how to get a distro.
	h.Refused(h.Run(), "--import")
	h.Refused(h.Run("-e", "true"), "--import")
	if files := h.Files(); len(h.Disks()) != 0 {
		t.Errorf("a disk was made: %v", files)
	}
}

// TestImport unpacks each kind of archive, with all that a file can be.
func TestImport(t *testing.T) {
	h := testsys.New(t)
	big := testsys.PatternBytes(t, 3<<20+17)
	long := "srv/" + strings.Repeat("long-directory-name/", 10) + "file"
	entries := append(testsys.Busybox(t),
		testsys.Entry{Name: "srv/big", Content: big, UID: 1000, GID: 50, Mode: 0o640},
		testsys.Entry{Name: "srv/hard", Type: tar.TypeLink, Link: "srv/big"},
		testsys.Entry{Name: "srv/absolute", Type: tar.TypeSymlink, Link: "/srv/big"},
		testsys.Entry{Name: "srv/dangling", Type: tar.TypeSymlink, Link: "../no/such/file"},
		testsys.Entry{Name: "srv/fifo", Type: tar.TypeFifo},
		testsys.Entry{Name: "srv/null", Type: tar.TypeChar, Major: 1, Minor: 3, Mode: 0o666},
		testsys.Entry{Name: "srv/setuid", Content: []byte("x"), Mode: 0o4755},
		testsys.Entry{Name: "srv/huge-owner", UID: 3000000, GID: 4000000},
		testsys.Entry{Name: "srv/räksmörgås \n", Content: []byte("odd name")},
		testsys.Entry{Name: "srv/attribute", Content: []byte("x"), PAX: map[string]string{"SCHILY.xattr.user.color": "blue"}},
		testsys.Entry{Name: long, Content: []byte("deep")},
	)
	archive := testsys.Tar(t, entries...)
	want, _ := testsys.SHA256(t, strings.NewReader(string(big)))
	check := strings.Join([]string{
		"sha256sum <srv/big", "stat -c '%a %u %g %h %s' srv/big srv/hard", "readlink srv/absolute; readlink srv/dangling",
		"stat -c '%F %a %t %T' srv/null", "stat -c '%F' srv/fifo", "stat -c '%a' srv/setuid root tmp", "stat -c '%u %g' srv/huge-owner home/alice",
		"cat srv/r*", "echo", "cat srv/long*/*/*/*/*/*/*/*/*/*/file",
	}, "; ")
	expect := strings.Join([]string{
		want + "  -", fmt.Sprintf("640 1000 50 2 %d", len(big)), fmt.Sprintf("640 1000 50 2 %d", len(big)), "/srv/big", "../no/such/file",
		"character special file 666 1 3", "fifo", "4755", "700", "1777", "3000000 4000000", "1000 1000", "odd name", "deep",
	}, "\n")
	for _, ending := range []string{"", ".gz", ".xz", ".zst"} {
		name := "d" + strings.ReplaceAll(ending, ".", "-")
		data := archive
		if ending != "" {
			data = testsys.Compress(t, ending, archive)
		}
		path := h.File("image.tar"+ending, data)
		r := h.Run("--import", name, path)
		h.Want(r, 0)
		if got := strings.TrimSpace(h.OK("-d", name, "--cd", "/", "--", check)); got != expect {
			t.Errorf("%s holds\n%s\nwant\n%s", ending, got, expect)
		}
	}
	// The same name twice, a name that is none, a file that is not there.
	path := h.File("again.tar", archive)
	before := h.Files()
	h.Refused(h.Run("--import", "D-gz", path), "D-gz")
	h.Refused(h.Run("--import", "../d", path), "../d")
	h.Refused(h.Run("--import", "other", h.Path("no-such-file.tar")), "no-such-file.tar")
	if after := h.Files(); strings.Join(after, "\n") != strings.Join(before, "\n") {
		t.Errorf("refused imports left something: %v, before %v", after, before)
	}
	h.OK("--shutdown")
	h.Fsck(false)
}

// TestVerbs walks through a distro's life.
func TestVerbs(t *testing.T) {
	h := newHost(t)
	list := func() map[string]string { return states(h) }

	if got := strings.TrimSpace(h.OK("--list", "--quiet")); got != "small" {
		t.Fatalf("--list --quiet: %q", got)
	}
	if out := h.OK("--list"); !strings.Contains(out, "small (Default)") {
		t.Fatalf("--list: %q", out)
	}
	if out := h.OK("--version"); !strings.Contains(out, "wsl2") && !strings.Contains(out, "WSL2") {
		t.Fatalf("--version: %q", out)
	}
	if s := list(); s["small"] != "Stopped" {
		t.Fatalf("before any command: %v", s)
	}
	h.OK("-d", "small", "-e", "true")
	if s := list(); s["small"] != "Running" {
		t.Fatalf("after a command: %v", s)
	}
	out := h.OK("--list", "--verbose")
	if f := strings.Fields(out); len(f) < 7 || strings.Join(f[:7], " ") != "NAME STATE VERSION * small Running 2" {
		t.Fatalf("--list --verbose: %q", out)
	}
	if out := h.OK("--status"); !strings.Contains(out, "small") || !(strings.Contains(out, "kvm") || strings.Contains(strings.ToLower(out), "tcg")) {
		t.Fatalf("--status: %q", out)
	}

	// Terminate stops the distro, keeps its files and lets its programs end.
	l := h.Start("-d", "small", "-e", "sh", "-c", "trap 'echo kept >/root/terminated; exit 4' TERM; echo ready; while :; do sleep 100000 & wait $!; done")
	l.Expect("ready\n")
	h.OK("--terminate", "small")
	h.Want(l.Wait(), 4)
	if s := list(); s["small"] != "Stopped" {
		t.Fatalf("after --terminate: %v", s)
	}
	if got := h.OK("-d", "small", "-e", "cat", "/root/terminated"); got != "kept\n" {
		t.Errorf("what a program wrote on SIGTERM: %q", got)
	}

	h.Refused(h.Run("--terminate", "nosuchdistro"), "nosuchdistro")
	h.Refused(h.Run("--unregister", "nosuchdistro"), "nosuchdistro")

	// Unregister deletes the disk, running or not.
	h.Import("second", testsys.Busybox(t)...)
	h.OK("-d", "second", "-e", "true")
	disks := len(h.Disks())
	h.OK("--unregister", "second")
	if n := len(h.Disks()); n != disks-1 {
		t.Errorf("%d disks after --unregister, before %d", n, disks)
	}
	if s := list(); len(s) != 1 {
		t.Errorf("after --unregister: %v", s)
	}

	vm, service := h.Process("vm"), h.Process("service")
	h.OK("--shutdown")
	vm.End(t)
	service.End(t)
	if s := list(); s["small"] != "Stopped" {
		t.Fatalf("after --shutdown: %v", s)
	}
	h.OK("--shutdown") // nothing runs: that is no error
	h.Fsck(false)
}

// TestDoctor says whether KVM works here, and what is used instead.
func TestDoctor(t *testing.T) {
	h := testsys.New(t)
	r := h.Run("doctor")
	if r.Status != 0 && r.Status != 1 || !strings.Contains(r.Stdout, "/dev/kvm") {
		t.Fatal(r)
	}
	usable := h.Run("doctor", "--kvm")
	j := h.Run("doctor", "--json")
	var report map[string]any
	if err := json.Unmarshal([]byte(j.Stdout), &report); err != nil || len(report) == 0 {
		t.Fatalf("%v: %v", err, j)
	}
	// It is right: what it says KVM can do, a VM shows.
	run := h.Run("--accel", "kvm", "--system", "-e", "true")
	if usable.Status == 0 {
		h.Want(run, 0)
		return
	}
	h.Refused(run, "kvm", "--accel tcg")
	h.OK("--accel", "tcg", "--system", "-e", "true")
}

// TestIdleStop: the last command gone, first the distro stops, then the VM, then
// the service, and all is clean.
func TestIdleStop(t *testing.T) {
	h := newHost(t)
	h.Config("[general]", "instanceIdleTimeout=1", "[wsl2]", "vmIdleTimeout=1")
	l := h.Start("-d", "small", "-e", "sh", "-c", "echo ready; cat")
	l.Expect("ready\n")
	vm, service := h.Process("vm"), h.Process("service")
	h.OK("--system", "-e", "true") // another distro comes and goes: this session holds the VM
	l.Stdin.Close()
	h.Want(l.Wait(), 0)
	vm.End(t)
	service.End(t)
	h.CheckNothingLeft()
	h.Fsck(false)

	// A process in the background holds its distro; a distro without any stops.
	h.Config("[general]", "instanceIdleTimeout=1", "[wsl2]", "vmIdleTimeout=-1")
	h.Import("second", testsys.Busybox(t)...)
	h.OK("-d", "small", "-e", "sh", "-c", "sleep 100000 & echo $!")
	h.OK("-d", "second", "-e", "true")
	deadline := time.Now().Add(testsys.Deadline)
	for states(h)["second"] != "Stopped" {
		if time.Now().After(deadline) {
			t.Fatalf("second does not stop: %v", states(h))
		}
	}
	if s := states(h); s["small"] != "Running" {
		t.Errorf("small stopped although a process runs in it: %v", s)
	}
	h.OK("-d", "small", "-e", "killall", "sleep")
	for states(h)["small"] != "Stopped" {
		if time.Now().After(deadline) {
			t.Fatalf("small does not stop: %v", states(h))
		}
	}
	h.Process("vm") // negative is never
}

// TestTwoDistros are separate in every namespace they have of their own.
func TestTwoDistros(t *testing.T) {
	h := newHost(t)
	h.Import("second", testsys.Busybox(t)...)
	inside := func(distro, script string) string {
		t.Helper()
		return strings.TrimSpace(h.OK("-d", distro, "-e", "sh", "-c", script))
	}
	l := h.Start("-d", "small", "-e", "sh", "-c", "echo secret >/root/secret; sleep 54321 & echo ready; cat")
	l.Expect("ready\n")
	for _, ns := range []string{"pid", "mnt", "uts", "ipc", "cgroup"} {
		of := map[string]string{}
		for _, distro := range []string{"small", "second"} {
			id := inside(distro, "readlink /proc/self/ns/"+ns)
			if !strings.HasPrefix(id, ns+":[") {
				t.Errorf("%s of %s is %q", ns, distro, id)
			}
			if other, ok := of[id]; ok {
				t.Errorf("%s and %s share the %s namespace", other, distro, ns)
			}
			of[id] = distro
			if again := inside(distro, "readlink /proc/self/ns/"+ns); again != id {
				t.Errorf("two sessions of %s have different %s namespaces", distro, ns)
			}
		}
	}
	if out := inside("small", "ps"); !strings.Contains(out, "54321") {
		t.Errorf("a session does not see its distro's processes: %s", out)
	}
	if out := inside("second", "ps; cat /root/secret 2>&1; true"); strings.Contains(out, "54321") || !strings.Contains(out, "No such file") {
		t.Errorf("second sees small's: %s", out)
	}
	inside("second", "killall -9 sleep cat; kill -9 -1; true")
	// kill -1 ended that session's own shell; small's processes are as they were.
	if out := inside("small", "pidof sleep && pidof cat"); out == "" {
		t.Error("second could kill small's processes")
	}
	inside("small", "hostname changed")
	if out := inside("second", "hostname"); out == "changed" {
		t.Error("the host name is shared")
	}
	if out := inside("second", "cat /proc/self/cgroup"); strings.Contains(out, "small") {
		t.Errorf("second's cgroup shows %q", out)
	}
	if disks := inside("second", "cat /proc/mounts"); strings.Contains(disks, "/dev/vda /") && strings.Contains(disks, "/dev/vdb /") {
		t.Errorf("second sees both disks mounted: %s", disks)
	}
	// One that powers itself off takes nothing with it but its own sessions.
	h.Refused(h.Run("-d", "second", "-e", "poweroff", "-f"), "powered off from inside")
	inside("second", "true")
	h.OK("--terminate", "second")
	l.Stdin.Write([]byte("still here\n"))
	l.Expect("still here\n")
	l.Stdin.Close()
	h.Want(l.Wait(), 0)
}

// TestAsUser: nothing needs root. The kernel's default mode of /dev/kvm may
// forbid it; then the emulated CPU serves.
func TestAsUser(t *testing.T) {
	h := testsys.New(t)
	path := h.File("small.tar", testsys.Tar(t, testsys.Busybox(t)...))
	h.As(65534)
	h.Want(h.Run("--import", "small", path), 0)
	out := h.OK("-d", "small", "-e", "sh", "-c", "id -u; ls -ln /etc/passwd; su alice -c id")
	if !strings.HasPrefix(out, "0\n") || !strings.Contains(out, "uid=1000(alice)") {
		t.Fatalf("%q", out)
	}
	if st, err := os.Stat(h.Runtime()); err != nil || st.Mode().Perm() != 0o700 {
		t.Errorf("runtime directory: %v, %v", st.Mode(), err)
	}
	// Its service refuses another user, root's own included only by the kernel's
	// leave: what the directory's mode says is what counts.
	other := exec65533(h)
	if other.Status == 0 {
		t.Errorf("another user reached the service: %v", other)
	}
	h.OK("--shutdown")
	h.Fsck(false)
}

// exec65533 tries, as a third user, to run a command in the host's distro.
func exec65533(h *testsys.Host) testsys.Result {
	h.TB.Helper()
	wrap := h.Wrap
	defer func() { h.Wrap = wrap }()
	h.Wrap = []string{"setpriv", "--reuid", "65533", "--regid", "65533", "--clear-groups", "--"}
	return h.Run("-d", "small", "-e", "true")
}
