//go:build e2e || kvm

// What the two rings of system tests share. The e2e ring runs the built wsl2 on
// this host as it is; the kvm ring runs it where KVM can run a guest.

package main_test

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/wsl2/wsl2/internal/testsys"
	"github.com/wsl2/wsl2/internal/testsys/serve"
)

// seeds is where imported distros lie for the tests of this run.
var seeds string

func TestMain(m *testing.M) {
	if len(os.Args) > 1 && os.Args[1] == serveArg { // in a distro
		serve.Main(os.Args[2:])
		return
	}
	dir, err := os.MkdirTemp("", "w2.seed.")
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	seeds = dir
	status := m.Run()
	os.RemoveAll(dir)
	os.Exit(status)
}

// count is n in `make soak`, a tenth of it in `make test`.
func count(n int) int {
	if os.Getenv("WSL2_SOAK") != "" {
		return n
	}
	return n / 10
}

var small struct {
	once sync.Once
	seed testsys.Seed
	ok   bool
}

// versionVariable says of which version newHost's distro is; "" is 2.
const versionVariable = "WSL2_TEST_VERSION"

// version1 tells whether newHost's distro is of version 1, as in TestVersion1.
func version1() bool { return os.Getenv(versionVariable) == "1" }

// newHost makes a host with the distro "small", a busybox with the users root,
// alice and broken. It is imported once per run of the tests.
func newHost(t *testing.T) *testsys.Host {
	t.Helper()
	if version1() {
		h := testsys.New(t)
		h.OK("--set-default-version", "1")
		h.Import("small", testsys.Busybox(t)...)
		return h
	}
	small.once.Do(func() {
		h := testsys.New(t)
		h.Config("[wsl2]", "defaultVhdSize=8GB") // e2fsck reads each group of blocks
		h.Import("small", testsys.Busybox(t)...)
		small.seed = h.NewSeed(filepath.Join(seeds, "small"))
		small.ok = true
	})
	if !small.ok {
		t.Fatal("the import of the small distro failed in an earlier test")
	}
	h := testsys.New(t)
	h.Plant(small.seed)
	return h
}

// killed kills one of a host's processes (testsys.Process.Role, or "client") with
// SIGKILL at a moment of its life. What was promised before (a sync that
// returned) holds, the next command works, and the disk is clean.
func killed(h *testsys.Host, victim, moment string) {
	h.TB.Helper()
	disks := len(h.Disks())
	promised := 0 // numbers that the guest has synced
	live := enter(h, moment, &promised)

	var vm []testsys.Process
	for _, p := range h.Processes() {
		if r := p.Role(); r == "vm" || r == "qemu" {
			vm = append(vm, p)
		}
	}
	if victim == "client" {
		live.Kill()
	} else {
		h.Process(victim).Kill(h.TB)
		if live != nil {
			live.Stdin.Close()
			r := live.Wait()
			// A request that no service answered yet is sent to a new one.
			if victim != "service" || moment != "booting" || r.Status != 0 {
				h.Refused(r)
			}
		}
		// Without its service, or without its VMM, a machine ends by itself.
		for _, p := range vm {
			p.End(h.TB)
		}
		h.Fsck(true)
	}

	h.OK("-d", "small", "-e", "sh", "-c", "echo next >/root/next && sync")
	if promised > 0 {
		got := strings.TrimSpace(h.OK("-d", "small", "-e", "cat", fmt.Sprintf("/root/f%d", promised%50)))
		if n, err := strconv.Atoi(got); err != nil || n < promised {
			h.TB.Errorf("file %d holds %q after the crash, synced was %d", promised%50, got, promised)
		}
	}
	if s := states(h); len(s) != 1 || s["small"] != "Running" {
		h.TB.Errorf("distros: %v", s)
	}
	h.OK("--shutdown")
	if n := len(h.Disks()); n != disks {
		h.TB.Errorf("%d disks, before %d: %v", n, disks, h.Files())
	}
	h.Fsck(false)
	if got := h.OK("-d", "small", "-e", "cat", "/root/next"); got != "next\n" {
		h.TB.Errorf("after the shutdown: %q", got)
	}
}

// enter brings a host to a moment and returns the command that is then running,
// nil if none.
func enter(h *testsys.Host, moment string, promised *int) *testsys.Live {
	h.TB.Helper()
	switch moment {
	case "booting":
		var live *testsys.Live
		testsys.WaitCreated(h.TB, h.Runtime(), "vsock", func() {
			live = h.Start("-d", "small", "-e", "true")
		})
		return live
	case "idle":
		h.OK("-d", "small", "-e", "true")
		return nil
	case "writing":
		live := h.Start("-d", "small", "-e", "sh", "-c", "i=0; while :; do i=$((i+1)); echo $i >/root/f$((i%50)); sync; echo synced $i; done")
		*promised = 60
		live.Expect(fmt.Sprintf("synced %d\n", *promised))
		return live
	case "importing", "installing":
		fifo := h.Path("fifo.tar")
		testsys.Must(h.TB, unix.Mkfifo(fifo, 0o600))
		testsys.Must(h.TB, os.Chmod(fifo, 0o666)) // of whoever the host is
		args := []string{"--import", "never", fifo}
		if moment == "installing" {
			args = []string{"--install", "--from-file", fifo, "--name", "never"}
		}
		live := h.Start(args...)
		w, err := os.OpenFile(fifo, os.O_WRONLY, 0)
		testsys.Must(h.TB, err)
		h.TB.Cleanup(func() { w.Close() })
		archive := testsys.Tar(h.TB, append(testsys.Busybox(h.TB), testsys.Entry{Name: "srv/big", Content: testsys.PatternBytes(h.TB, 8<<20)})...)
		// Most of it is more than the buffers on the way hold: it is being unpacked.
		_, err = w.Write(archive[:len(archive)-1<<20])
		testsys.Must(h.TB, err)
		return live
	}
	h.TB.Fatalf("no moment %q", moment)
	return nil
}

// guestPanics lets the guest's kernel panic: every session ends with its last
// words, the disk is consistent, and the next command works.
func guestPanics(h *testsys.Host) {
	h.TB.Helper()
	l := h.Start("-d", "small", "-e", "sh", "-c", "echo kept >/root/kept; sync; echo ready; cat")
	l.Expect("ready\n")
	vm := h.Process("vm")
	h.Refused(h.Run("-d", "small", "-e", "sh", "-c", "echo c >/proc/sysrq-trigger"), "sysrq triggered crash")
	l.Stdin.Close()
	h.Refused(l.Wait(), "panic")
	vm.End(h.TB)
	h.Fsck(true)
	if got := h.OK("-d", "small", "-e", "cat", "/root/kept"); got != "kept\n" {
		h.TB.Errorf("after the panic: %q", got)
	}
	h.OK("--shutdown")
	h.Fsck(false)
}

// states is the state of each distro, from --list --json.
func states(h *testsys.Host) map[string]string {
	h.TB.Helper()
	var list struct {
		Distros []struct{ Name, State string }
	}
	text := h.OK("--list", "--json")
	if err := json.Unmarshal([]byte(text), &list); err != nil {
		if err := json.Unmarshal([]byte(text), &list.Distros); err != nil {
			h.TB.Fatalf("--list --json: %v: %s", err, text)
		}
	}
	m := map[string]string{}
	for _, d := range list.Distros {
		m[d.Name] = d.State
	}
	return m
}

// configured gives the host a distro with this /etc/wsl.conf and whatever else.
func configured(h *testsys.Host, name, conf string, more ...testsys.Entry) {
	h.TB.Helper()
	if version1() {
		h.OK("--set-default-version", "1")
	}
	h.Import(name, append(append(testsys.Busybox(h.TB), testsys.Entry{Name: "etc/wsl.conf", Content: []byte(conf)}), more...)...)
}

// inside runs a shell script in a distro and returns what it prints.
func inside(h *testsys.Host, distro, script string) string {
	h.TB.Helper()
	return strings.TrimSpace(h.OK("-d", distro, "-u", "root", "--cd", "/", "-e", "sh", "-c", script))
}

// initOf returns the process of the host that is a distro's init.
func initOf(h *testsys.Host, distro string) testsys.Process {
	h.TB.Helper()
	for _, p := range h.Processes() {
		if p.Role() == "distro" && p.Argv[2] == distro {
			return p
		}
	}
	h.TB.Fatalf("%s has no init among %v", distro, h.Processes())
	return testsys.Process{}
}

// limits holds a distro to what wslconfig limits. With version 1 it may take away the limits that it sees, but
// what holds are those above its cgroup.
func limits(h *testsys.Host) {
	h.TB.Helper()
	h.Config("[wsl2]", "defaultVhdSize=2GB", "memory=1GB", "[distro.One]", "memory = 64MB", "cpus = 0.5", "pids = 40")
	configured(h, "one", "")
	h.OK("--manage", "one", "--clone", "two")
	if got := inside(h, "one", "cd /sys/fs/cgroup; cat memory.max cpu.max pids.max; echo max >memory.max || echo max >pids.max || echo refused"); !strings.HasPrefix(got, "67108864\n50000 100000\n40") || !version1() && !strings.HasSuffix(got, "\nrefused") {
		h.TB.Errorf("%q", got)
	}
	const memory = "head -c 70m /dev/zero | tail -n 1 | wc -c"
	if got := h.Run("-d", "one", "-e", "sh", "-c", memory); strings.TrimSpace(got.Stdout) != "0" {
		h.TB.Errorf("70 MB in a distro of 64: %v", got)
	}
	const processes = "for i in $(seq 60); do sleep 100000 & done; jobs | wc -l; kill $(jobs -p)"
	if r := h.Run("-d", "one", "-e", "sh", "-c", processes); !strings.Contains(r.Stderr, "can't fork") {
		h.TB.Errorf("60 processes in a distro of 40: %v", r)
	}
	if got := inside(h, "one", "echo alive"); got != "alive" {
		h.TB.Errorf("%q", got)
	}
	if got := inside(h, "two", memory+"; "+processes+"; cat /sys/fs/cgroup/memory.max || echo max"); got != "73400320\n60\nmax" {
		h.TB.Errorf("the other: %q", got)
	}

	// A limit holds from the distro's next start on.
	h.Config("[distro.one]", "pids = 50")
	h.OK("--terminate", "one")
	if got := inside(h, "one", "cat /sys/fs/cgroup/memory.max || echo max; cat /sys/fs/cgroup/pids.max"); got != "max\n50" {
		h.TB.Errorf("%q", got)
	}
}

// testUser is an ordinary user's.
const testUser = 54321

// anotherUser makes the host an ordinary user's, who has a range of IDs.
func anotherUser(h *testsys.Host) {
	h.TB.Helper()
	h.As(testUser)
	h.File("passwd", fmt.Appendf(nil, "root:x:0:0::/root:/bin/sh\ntester:x:%d:%[1]d::/:/bin/sh\n", testUser))
	h.File("ranges", []byte("tester:700000:65536\n"))
	h.MountNamespace(`for f in passwd subuid subgid; do [ -e /etc/$f ] || : >/etc/$f; done
mount --bind "$DIR/passwd" /etc/passwd; mount --bind "$DIR/ranges" /etc/subuid; mount --bind "$DIR/ranges" /etc/subgid`)
}
