//go:build e2e

package vmm

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"testing"

	"github.com/wsl2/wsl2/vmm/engine"
	"github.com/wsl2/wsl2/vmm/virtio/blk"
	"github.com/wsl2/wsl2/vmm/vmmtest"
)

// testConfig is a machine with the test guest under TCG.
func testConfig(t *testing.T) Config {
	t.Helper()
	return Config{
		Accel: AccelTCG, Kernel: vmmtest.Kernel(t), Initramfs: vmmtest.Initramfs(t),
		MemoryBytes: 256 << 20, CPUs: 2,
		GuestCID: 3, VsockPath: filepath.Join(t.TempDir(), "v"),
	}
}

// startMachine starts c and waits for the guest unless it is told to do
// something at once; when the test ends the machine is gone and left nothing.
func startMachine(t *testing.T, c Config) (*Machine, *vmmtest.Console) {
	t.Helper()
	before := resources(t)
	console := &vmmtest.Console{}
	c.ConsoleLog = console
	if c.Shutdown == nil {
		c.Shutdown = func(context.Context) error {
			conn := vmmtest.Dial(t, c.VsockPath)
			defer conn.Close()
			fmt.Fprintln(conn, "poweroff")
			_, err := io.ReadAll(conn)
			return err
		}
	}
	m, err := New(c)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), vmmtest.Timeout)
	defer cancel()
	if err := m.Start(ctx); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		m.Kill()
		<-m.Done()
		if t.Failed() {
			t.Logf("console:\n%s", console)
		}
		if after := resources(t); after != before {
			t.Errorf("left behind: %s before the machine, now %s\n%s", before, after, stacks())
		}
		if _, err := os.Lstat(c.VsockPath); err == nil {
			t.Errorf("%s is left behind", c.VsockPath)
		}
	})
	if !strings.Contains(c.Cmdline, "vmmtest=") {
		console.Wait(t, "guest: ready")
	}
	return m, console
}

// resources counts what a machine may leave behind.
func resources(t *testing.T) string {
	t.Helper()
	fds, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	maps, err := os.ReadFile("/proc/self/maps")
	if err != nil {
		t.Fatal(err)
	}
	children, err := os.ReadFile(fmt.Sprintf("/proc/self/task/%d/children", os.Getpid()))
	if err != nil {
		t.Fatal(err)
	}
	n := 0
	for _, fd := range fds {
		if l, _ := os.Readlink("/proc/self/fd/" + fd.Name()); l != "anon_inode:[eventpoll]" && l != "anon_inode:[eventfd]" && l != "anon_inode:[pidfd]" {
			n++
		}
	}
	return fmt.Sprintf("%d descriptors, %d guest memories, %d children", n,
		strings.Count(string(maps), "memfd:"), len(strings.Fields(string(children))))
}

func stacks() []byte {
	b := make([]byte, 1<<20)
	return b[:runtime.Stack(b, true)]
}

func TestStop(t *testing.T) {
	m, _ := startMachine(t, testConfig(t))
	if a, reason := m.Accel(); a != AccelTCG || reason != "" {
		t.Errorf("runs on %v because of %q", a, reason)
	}
	ctx, cancel := context.WithTimeout(t.Context(), vmmtest.Timeout)
	defer cancel()
	if err := m.Stop(ctx); err != nil {
		t.Errorf("Stop: %v", err)
	}
	e, err := m.Wait(ctx)
	if err != nil || e.Reason != engine.ReasonPowerOff || e.Err() != nil {
		t.Errorf("Wait: %+v, %v", e, err)
	}
	if err := m.Stop(ctx); err != nil {
		t.Errorf("Stop of a machine that has ended: %v", err)
	}
}

func TestStopOfDeafGuest(t *testing.T) {
	c := testConfig(t)
	c.Cmdline = "vmmtest=hang"
	c.Shutdown = func(context.Context) error { return errors.New("no answer") }
	m, console := startMachine(t, c)
	console.Wait(t, "guest: hang")
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	err := m.Stop(ctx)
	if err == nil || !strings.Contains(err.Error(), "killed") || !strings.Contains(err.Error(), "no answer") {
		t.Errorf("Stop: %v", err)
	}
}

func TestPanicShowsTheKernelsLastLines(t *testing.T) {
	c := testConfig(t)
	c.Cmdline = "vmmtest=panic"
	m, _ := startMachine(t, c)
	e, err := m.Wait(t.Context())
	if err != nil || e.Reason != engine.ReasonReset {
		t.Errorf("%+v, %v", e, err)
	}
	if !strings.Contains(e.Console, "Kernel panic - not syncing: sysrq triggered crash") {
		t.Errorf("console: %q", e.Console)
	}
	if e.Err() == nil {
		t.Error("a panic is no error")
	}
}

func TestCPUs(t *testing.T) {
	for _, n := range []int{1, 4} {
		t.Run(fmt.Sprint(n), func(t *testing.T) {
			c := testConfig(t)
			c.CPUs = n
			startMachine(t, c)
			if got := vmmtest.Do(t, c.VsockPath, "cpus"); got != fmt.Sprint(n) {
				t.Errorf("the guest has %s CPUs, want %d", got, n)
			}
		})
	}
}

// image makes a sparse disk image of n bytes that begins with text.
func image(t *testing.T, n int64, text string) string {
	t.Helper()
	p := filepath.Join(t.TempDir(), "disk.img")
	if err := os.WriteFile(p, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(p, n); err != nil {
		t.Fatal(err)
	}
	return p
}

func TestDisks(t *testing.T) {
	c := testConfig(t)
	first, second, third := image(t, 8<<20, "first disk"), image(t, 16<<20, "second disk"), image(t, 4<<20, "third disk")
	c.Disks = []Disk{{Path: first, Serial: "boot-disk"}, {Path: second, ReadOnly: true}}
	c.DiskSlots = 4
	m, _ := startMachine(t, c)
	if n := m.DiskSlots(); n != 4 {
		t.Errorf("%d slots, want 4", n)
	}
	do := func(want, format string, a ...any) {
		t.Helper()
		if got := vmmtest.Do(t, c.VsockPath, format, a...); got != want {
			t.Errorf("%s: %q, want %q", fmt.Sprintf(format, a...), got, want)
		}
	}
	hex := func(s string) string { return fmt.Sprintf("%x", s) }
	content := func(path string, off, n int) string {
		t.Helper()
		b, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		return string(b[off : off+n])
	}
	do("boot-disk", "cat /sys/class/block/vda/serial")
	do("0", "cat /sys/class/block/vda/ro")
	do("1", "cat /sys/class/block/vdb/ro")
	do("16384", "cat /sys/class/block/vda/size")
	do("0", "cat /sys/class/block/vdc/size")
	do(hex("first disk"), "read vda 0 10")
	do(hex("second disk"), "read vdb 0 11")
	do("ok", "write vda 4096 %s", hex("from the guest"))
	if got := content(first, 4096, 14); got != "from the guest" {
		t.Errorf("image has %q", got)
	}

	// An image in use, also by ourselves.
	if _, err := m.AttachDisk(t.Context(), Disk{Path: first}); !errors.Is(err, blk.ErrInUse) {
		t.Errorf("attach of an image in use: %v", err)
	}
	if _, err := m.AttachDisk(t.Context(), Disk{Path: "/none"}); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("attach of no image: %v", err)
	}

	for round := range 3 {
		slot, err := m.AttachDisk(t.Context(), Disk{Path: third})
		if err != nil || slot != 2 {
			t.Fatalf("attach: slot %d, %v", slot, err)
		}
		do("ok", "size vdc 8192")
		do(hex("third disk"), "read vdc 0 10")
		word := fmt.Sprintf("round %d", round)
		do("ok", "write vdc 8192 %s", hex(word))
		if err := m.DetachDisk(t.Context(), slot); err != nil {
			t.Fatalf("detach: %v", err)
		}
		if got := content(third, 8192, len(word)); got != word {
			t.Errorf("image has %q, want %q", got, word)
		}
		// The image is free for others.
		d, err := blk.Open(third, false)
		if err != nil {
			t.Fatal(err)
		}
		d.Close()
		do("ok", "size vdc 0")
	}
	if err := m.DetachDisk(t.Context(), 2); !errors.Is(err, blk.ErrNoDisk) {
		t.Errorf("detach of an empty slot: %v", err)
	}
	if err := m.DetachDisk(t.Context(), 9); err == nil {
		t.Error("detach of slot 9 of 4")
	}
	for want := 2; want < 4; want++ {
		if slot, err := m.AttachDisk(t.Context(), Disk{Path: image(t, 1<<20, "")}); err != nil || slot != want {
			t.Errorf("attach: slot %d, %v", slot, err)
		}
	}
	if _, err := m.AttachDisk(t.Context(), Disk{Path: third}); !errors.Is(err, ErrNoSlot) {
		t.Errorf("attach to a full machine: %v", err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), vmmtest.Timeout)
	defer cancel()
	if err := m.Stop(ctx); err != nil {
		t.Error(err)
	}
	if _, err := m.AttachDisk(t.Context(), Disk{Path: third}); !errors.Is(err, ErrNotRunning) {
		t.Errorf("attach to a machine that has ended: %v", err)
	}
}

// As many slots as the launcher asks for.
func TestManySlots(t *testing.T) {
	c := testConfig(t)
	c.DiskSlots = 16
	m, _ := startMachine(t, c)
	if n := m.DiskSlots(); n != 16 {
		t.Errorf("%d slots, want 16", n)
	}
	for i := range m.DiskSlots() {
		slot, err := m.AttachDisk(t.Context(), Disk{Path: image(t, int64(i+1)<<20, "")})
		if err != nil || slot != i {
			t.Fatalf("attach %d: slot %d, %v", i, slot, err)
		}
		if got := vmmtest.Do(t, c.VsockPath, "size vd%c %d", 'a'+i, (i+1)<<11); got != "ok" {
			t.Errorf("slot %d: %s", i, got)
		}
	}
}

func TestVsock(t *testing.T) {
	c := testConfig(t)
	startMachine(t, c)
	var wg sync.WaitGroup
	for i := range 16 {
		wg.Go(func() {
			conn := vmmtest.Dial(t, c.VsockPath)
			defer conn.Close()
			fmt.Fprintln(conn, "echo")
			data := make([]byte, 4<<20)
			rng := rand.NewChaCha8([32]byte{byte(i)})
			rng.Read(data)
			go func() {
				conn.Write(data)
				conn.CloseWrite()
			}()
			got, err := io.ReadAll(conn)
			if err != nil || !bytes.Equal(got, data) {
				t.Errorf("connection %d: %d bytes of %d, equal hashes: %v, %v", i, len(got), len(data), sha256.Sum256(got) == sha256.Sum256(data), err)
			}
		})
	}
	wg.Wait()
}

func TestKillWhileTheGuestWrites(t *testing.T) {
	c := testConfig(t)
	c.Disks = []Disk{{Path: image(t, 8<<20, "")}}
	m, _ := startMachine(t, c)
	conn := vmmtest.Dial(t, c.VsockPath)
	defer conn.Close()
	fmt.Fprintln(conn, "echo")
	go io.Copy(conn, bytes.NewReader(make([]byte, 64<<20)))
	if _, err := io.ReadFull(conn, make([]byte, 1<<16)); err != nil {
		t.Fatal(err)
	}
	m.Kill()
	e, err := m.Wait(t.Context())
	if err != nil || e.Reason != engine.ReasonKilled {
		t.Errorf("%+v, %v", e, err)
	}
	// The image is free.
	d, err := blk.Open(c.Disks[0].Path, false)
	if err != nil {
		t.Fatal(err)
	}
	d.Close()
}

// A start that is given up leaves nothing behind, at whatever moment.
func TestStartCancelled(t *testing.T) {
	before := resources(t)
	c := testConfig(t)
	c.Disks = []Disk{{Path: image(t, 8<<20, "")}}
	m, err := New(c)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := m.Start(ctx); !errors.Is(err, context.Canceled) {
		t.Errorf("Start: %v", err)
	}
	if _, err := m.Wait(t.Context()); err != nil {
		t.Errorf("Wait: %v", err)
	}
	if after := resources(t); after != before {
		t.Errorf("left behind: %s before, now %s", before, after)
	}
}
