//go:build kvm

package main_test

import (
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/wsl2/wsl2/internal/testsys"
)

// newKVMHost is newHost where nothing but KVM will do.
func newKVMHost(t *testing.T) *testsys.Host {
	t.Helper()
	h := newHost(t)
	h.Setenv("PATH", filepath.Dir(mustLookup(h, "mke2fs"))) // no QEMU to fall back on
	processors(h, 2)                                        // the rig has fewer
	return h
}

// processors configures how many the VM has, and with it what the rig demands of
// every guest.
func processors(h *testsys.Host, n int) {
	h.TB.Helper()
	h.Config("[wsl2]", fmt.Sprintf("processors=%d", n), "kernelCommandLine="+os.Getenv("WSL2_RIG_CMDLINE"))
}

// TestKVMSelected: KVM is found usable and chosen by itself, without a word.
func TestKVMSelected(t *testing.T) {
	h := newKVMHost(t)
	h.OK("doctor", "--kvm")
	h.OK("doctor")
	r := h.Run("-d", "small", "-e", "uname", "-s")
	h.Want(r, 0)
	if r.Stdout != "Linux\n" || r.Stderr != "" {
		t.Error(r)
	}
	if out := h.OK("--status"); !strings.Contains(out, "kvm") {
		t.Errorf("--status: %q", out)
	}
	for _, p := range h.Processes() {
		if p.Role() == "qemu" {
			t.Errorf("QEMU runs: %v", p)
		}
	}
	h.OK("--shutdown")
	h.OK("--accel", "kvm", "--system", "-e", "true")
}

// TestKVMProcessors boots with 1, 2 and 4 vCPUs; the guest uses all of them.
func TestKVMProcessors(t *testing.T) {
	h := newKVMHost(t)
	for _, n := range []int{1, 2, 4} {
		processors(h, n)
		// One busy process pinned to each vCPU ends: all of them run code.
		script := `nproc; for c in $(seq 0 $(($(nproc)-1))); do taskset -c $c sh -c "i=0; while [ \$i -lt 500 ]; do i=\$((i+1)); done; echo ran" & done; wait`
		r := h.Run("-d", "small", "-e", "sh", "-c", script)
		h.Want(r, 0)
		if want := fmt.Sprintf("%d\n%s", n, strings.Repeat("ran\n", n)); r.Stdout != want {
			t.Errorf("with %d vCPUs: want %q: %v", n, want, r)
		}
		if out := h.OK("-d", "small", "-e", "sh", "-c", "dmesg | grep -iE 'apic id|firmware bug|mismatch|stuck|lockup' || true"); out != "" {
			t.Errorf("with %d vCPUs the kernel complains: %s", n, out)
		}
		h.OK("--shutdown")
	}
}

// TestKVMBzImage: a compressed kernel boots as well.
func TestKVMBzImage(t *testing.T) {
	h := newKVMHost(t)
	h.OK("--kernel", filepath.Join(filepath.Dir(h.Exe), "bzImage"), "-d", "small", "-e", "true")
}

// TestKVMBootCycles boots, runs and stops, 100 times; nothing is left of any.
func TestKVMBootCycles(t *testing.T) {
	h := newKVMHost(t)
	for i := range count(100) {
		if got := h.OK("-d", "small", "-e", "sh", "-c", fmt.Sprintf("echo %d >>/root/boots; wc -l </root/boots", i)); strings.TrimSpace(got) != fmt.Sprint(i+1) {
			t.Fatalf("boot %d counts %q", i+1, got)
		}
		h.OK("--shutdown")
		h.CheckNothingLeft()
	}
	h.Fsck(false)
}

// TestKVMCommands runs 2,000 commands in one VM. Afterwards its processes hold
// no more descriptors, threads or goroutines than after the first ones, and
// there are no more files.
func TestKVMCommands(t *testing.T) {
	h := newKVMHost(t)
	run := func(n int) {
		t.Helper()
		for i := range n {
			r := h.RunIn(strings.NewReader("in\n"), "-d", "small", "-e", "sh", "-c", fmt.Sprintf("cat; echo %d; echo err >&2; exit %d", i, i%100))
			if want := fmt.Sprintf("in\n%d\n", i); r.Stdout != want || r.Stderr != "err\n" || r.Status != i%100 {
				t.Fatalf("command %d: want %q: %v", i, want, r)
			}
		}
	}
	run(20)
	vm, service := h.Process("vm"), h.Process("service")

	kinds := []string{"descriptors of the VM", "descriptors of the service", "files", "descriptors of the guest's init", "processes in the guest"}
	type counts [5]int // of kinds
	look := func() (c counts) {
		t.Helper()
		out := h.OK("-d", "small", "-e", "sh", "-c", "set -- /proc/1/fd/*; echo $#; set -- /proc/[0-9]*; echo $#") // by no process but the shell
		if _, err := fmt.Sscan(out, &c[3], &c[4]); err != nil {
			t.Fatalf("the guest's counts: %q: %v", out, err)
		}
		c[0], c[1], c[2] = vm.FDs(), service.FDs(), len(h.Files())
		return c
	}
	// The other ends of a session's connections are closed a moment after its client
	// has ended, and nothing tells when: a look may find some of the last session's.
	// What is left behind for good is in the least of ten looks as well.
	least := func() counts {
		t.Helper()
		c := look()
		for range 9 {
			for kind, n := range look() {
				c[kind] = min(c[kind], n)
			}
		}
		return c
	}
	before := least()
	threads := []int{vm.Threads(), service.Threads()}
	commands := count(2000)
	run(commands)
	for kind, n := range least() {
		if n > before[kind] {
			t.Errorf("%d %s, before %d", n, kinds[kind], before[kind])
		}
	}
	for i, p := range []testsys.Process{vm, service} {
		// The Go runtime keeps idle threads; a leak is one for each command.
		if n := p.Threads(); n > threads[i]+8 {
			t.Errorf("%s has %d threads, before %d", p.Role(), n, threads[i])
		}
	}
	// A goroutine is seen from outside only in the trace that SIGQUIT makes of
	// it, so this comes last. The service, which ends soon after the last VM, is
	// stopped until its turn comes.
	testsys.Must(t, service.Signal(unix.SIGSTOP))
	for _, p := range []testsys.Process{vm, service} {
		if n := h.Goroutines(p); n > 60 {
			t.Errorf("%s has %d goroutines, idle, after %d commands", p.Role(), n, commands)
		}
	}
	h.OK("-d", "small", "-e", "true")
}

// TestKVMParallelCommands runs 64 commands at once.
func TestKVMParallelCommands(t *testing.T) {
	h := newKVMHost(t)
	h.OK("-d", "small", "-e", "true")
	parallel(64, func(i int) error {
		data := strings.Repeat(fmt.Sprintf("%d\n", i), 1000)
		r := h.RunIn(strings.NewReader(data), "-d", "small", "-e", "sh", "-c", fmt.Sprintf("cat; exit %d", i))
		if r.Stdout != data || r.Status != i {
			return fmt.Errorf("command %d: %v", i, r)
		}
		return nil
	}, t.Error)
}

// TestKVMColdParallel: many clients that start the service and the VM at once
// get one of each.
func TestKVMColdParallel(t *testing.T) {
	h := newKVMHost(t)
	parallel(8, func(i int) error {
		if r := h.Run("-d", "small", "-e", "echo", fmt.Sprint(i)); r.Status != 0 || r.Stdout != fmt.Sprintf("%d\n", i) {
			return fmt.Errorf("client %d: %v", i, r)
		}
		return nil
	}, t.Error)
	h.Process("service")
	h.Process("vm")
}

func parallel(n int, f func(i int) error, report func(...any)) {
	var wg sync.WaitGroup
	for i := range n {
		wg.Go(func() {
			if err := f(i); err != nil {
				report(err)
			}
		})
	}
	wg.Wait()
}

// TestKVMDisk writes 1 GB to a distro's disk and reads it back: past the guest's
// page cache, and after a restart.
func TestKVMDisk(t *testing.T) {
	h := newKVMHost(t)
	n := int64(count(1 << 30))
	want, _ := testsys.SHA256(t, testsys.Pattern(n))
	r := h.RunIn(testsys.Pattern(n), "-d", "small", "-e", "sh", "-c", "cat >/srv/data && sync && echo 3 >/proc/sys/vm/drop_caches && sha256sum </srv/data")
	h.Want(r, 0)
	if got := strings.Fields(r.Stdout)[0]; got != want {
		t.Errorf("the disk holds %s, written was %s", got, want)
	}
	used := allocated(t, h.Disks()[0])
	if used < n {
		t.Errorf("%d bytes are written, the disk has %d", n, used)
	}
	h.OK("--shutdown")
	h.Fsck(false)
	if got := h.OK("-d", "small", "-e", "sha256sum", "/srv/data"); !strings.HasPrefix(got, want) {
		t.Errorf("after a restart the disk holds %s, written was %s", got, want)
	}
	// What is deleted and trimmed goes back to the host.
	h.OK("-d", "small", "-e", "sh", "-c", "rm /srv/data && sync && fstrim /")
	h.OK("--shutdown")
	if now := allocated(t, h.Disks()[0]); now > used-n/2 {
		t.Errorf("after fstrim the disk has %d bytes, before %d", now, used)
	}
	h.Fsck(false)
}

// allocated is the space that a file takes, in bytes.
func allocated(t *testing.T, path string) int64 {
	t.Helper()
	var st unix.Stat_t
	testsys.Must(t, unix.Stat(path, &st))
	return st.Blocks * 512
}

// TestKVMDistros: distros that start at the same moment, in slots that never had
// a disk, and one that starts in the slot of another: each has its own disk.
func TestKVMDistros(t *testing.T) {
	h := newKVMHost(t)
	names := []string{"small"}
	for _, name := range []string{"one", "two"} {
		h.Import(name, testsys.Busybox(t)...)
		names = append(names, name)
	}
	// On the disk, not in a cache: each is written, unmounted and read again.
	write := func(name string) error {
		if r := h.Run("-d", name, "-e", "sh", "-c", "echo "+name+" >/srv/name && sync"); r.Status != 0 {
			return fmt.Errorf("%s: %v", name, r)
		}
		return nil
	}
	check := func(name string) error {
		if r := h.Run("-d", name, "-e", "cat", "/srv/name"); r.Status != 0 || r.Stdout != name+"\n" {
			return fmt.Errorf("%s: %v", name, r)
		}
		return nil
	}
	h.OK("--shutdown")
	h.OK("-d", "small", "-e", "true")
	parallel(len(names), func(i int) error { return write(names[i]) }, t.Error)
	for _, name := range names[1:] {
		h.OK("--terminate", name)
	}
	// The slots are free again: in another order.
	for _, name := range []string{"two", "one"} {
		if err := check(name); err != nil {
			t.Error(err)
		}
	}
	h.OK("--shutdown")
	parallel(len(names), func(i int) error { return check(names[i]) }, t.Error)
	h.OK("--shutdown")
	h.Fsck(false)
}

// TestKVMMount: disks come into slots that never had one, beside distros, and go.
func TestKVMMount(t *testing.T) {
	h := newKVMHost(t)
	data, parts := diskFile(h, "data.img"), partitioned(h, "parts.img")
	run := func(script string) string {
		t.Helper()
		return strings.TrimSpace(h.OK("-d", "small", "-e", "sh", "-c", script))
	}
	for range 2 {
		h.OK("--mount", data, "--name", "data")
		h.OK("--mount", parts, "--partition", "2", "--name", "second")
		if got := run("cat /mnt/wsl/data/name /mnt/wsl/second/name; echo kept >>/mnt/wsl/data/notes; cat /mnt/wsl/data/notes | wc -l"); !strings.HasPrefix(got, "data.img\nparts.img2\n") {
			t.Errorf("mounted: %q", got)
		}
		h.OK("--unmount")
	}
	// Now the slots are as free for distros as any.
	h.Import("one", testsys.Busybox(t)...)
	h.OK("-d", "one", "-e", "true")
	h.OK("--mount", data, "--name", "again")
	if got := run("wc -l </mnt/wsl/again/notes"); got != "2" {
		t.Errorf("lines after two mounts: %q", got)
	}
	h.OK("--shutdown")
	fsckFile(t, data)
	h.Fsck(false)
}

// TestKVMVsock moves 1 GB both ways at once, and holds 500 connections open at
// the same time: four for each session.
func TestKVMVsock(t *testing.T) {
	h := newKVMHost(t)
	h.OK("-d", "small", "-e", "true")

	n := int64(count(1 << 30))
	want, _ := testsys.SHA256(t, testsys.Pattern(n))
	l := h.Start("-d", "small", "-e", "cat")
	copied := make(chan error, 1)
	go func() {
		_, err := io.Copy(l.Stdin, testsys.Pattern(n))
		copied <- err
		l.Stdin.Close()
	}()
	got, size := testsys.SHA256(t, l.Stdout)
	testsys.Must(t, <-copied)
	h.Want(l.Wait(), 0)
	if got != want {
		t.Errorf("%d bytes came back, %d were sent, hashes %s and %s", size, n, got, want)
	}

	vm := h.Process("vm")
	fds := vm.FDs()
	const connectionsEach = 4 // control, stdin, stdout, stderr
	sessions := make([]*testsys.Live, count(500)/connectionsEach+1)
	for i := range sessions {
		sessions[i] = h.Start("-d", "small", "-e", "sh", "-c", "echo ready; cat")
	}
	for _, l := range sessions {
		l.Expect("ready\n")
	}
	// Those of the session before may have been among the first.
	if now := vm.FDs(); now < fds+(len(sessions)-1)*connectionsEach {
		t.Errorf("%d sessions, but the VMM's descriptors went from %d to %d", len(sessions), fds, now)
	}
	for i, l := range sessions {
		fmt.Fprintf(l.Stdin, "session %d\n", i)
	}
	for i, l := range sessions {
		l.Expect(fmt.Sprintf("session %d\n", i))
		l.Stdin.Close()
	}
	for _, l := range sessions {
		h.Want(l.Wait(), 0)
	}
}

// TestKVMPanic: a guest kernel that panics ends every session with its last words.
func TestKVMPanic(t *testing.T) { guestPanics(newKVMHost(t)) }

// TestKVMKilled: SIGKILL in the middle of writing. The other moments are the e2e
// ring's.
func TestKVMKilled(t *testing.T) {
	for _, victim := range []string{"vm", "service", "client"} {
		t.Run(victim, func(t *testing.T) { killed(newKVMHost(t), victim, "writing") })
	}
}

func mustLookup(h *testsys.Host, program string) string {
	for _, dir := range append(filepath.SplitList(os.Getenv("PATH")), "/usr/sbin", "/sbin") {
		path := filepath.Join(dir, program)
		if st, err := os.Stat(path); err == nil && !st.IsDir() {
			return path
		}
	}
	h.TB.Fatalf("%s is not in PATH", program)
	return ""
}

// TestKVMNetwork: the card is plugged in while the guest runs, and a distro has network
// from its first command on.
func TestKVMNetwork(t *testing.T) { network(newKVMHost(t)) }
