//go:build kvm

package microvm_test

import (
	"bytes"
	"debug/elf"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"github.com/u-root/u-root/pkg/cpio"
	"golang.org/x/sys/unix"

	"github.com/wsl2/wsl2/vmm/engine"
	"github.com/wsl2/wsl2/vmm/virtio"
	"github.com/wsl2/wsl2/vmm/virtio/blk"
	"github.com/wsl2/wsl2/vmm/virtio/rng"
)

// These tests boot a real kernel. The test binary is also the guest's /init:
// the command line says which guest half to run.

// openKernel opens the guest kernel, which the rig carries in and names.
func openKernel(t testing.TB) *os.File {
	t.Helper()
	p := os.Getenv("WSL2_KERNEL")
	if p == "" {
		t.Fatal("WSL2_KERNEL names no guest kernel: run this by scripts/rig, after make kernel")
	}
	f, err := os.Open(p)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	return f
}

func TestMain(m *testing.M) {
	if os.Getpid() == 1 {
		guestInit()
	}
	os.Exit(m.Run())
}

// guests are the guest halves, by the name that follows "guest=" on the command line.
var guests = map[string]func() error{
	"cpus": func() error {
		b, err := os.ReadFile("/sys/devices/system/cpu/online")
		fmt.Printf("online: %s", b)
		return err
	},
	"devices": func() error {
		r, err := os.Open("/dev/hwrng")
		if err != nil {
			return err
		}
		random := make([]byte, 64)
		if _, err := io.ReadFull(r, random); err != nil || bytes.Equal(random, make([]byte, 64)) {
			return fmt.Errorf("hwrng: %x, %w", random, err)
		}
		fmt.Println("rng ok")
		d, err := os.OpenFile("/dev/vda", os.O_RDWR|unix.O_DIRECT|unix.O_SYNC, 0)
		if err != nil {
			return err
		}
		page, err := unix.Mmap(-1, 0, 4096, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
		if err != nil {
			return err
		}
		if _, err := d.ReadAt(page, 0); err != nil || !bytes.HasPrefix(page, []byte("host ")) {
			return fmt.Errorf("disk: %q, %w", page[:8], err)
		}
		copy(page, "guest")
		if _, err := d.WriteAt(page, 0); err != nil {
			return err
		}
		fmt.Println("disk ok")
		return d.Close()
	},
	"spin": func() error {
		fmt.Println("spinning")
		for {
		}
	},
	"panic": func() error { os.Exit(3); return nil },
}

func guestInit() {
	for _, d := range []string{"/dev", "/proc", "/sys"} {
		_ = os.MkdirAll(d, 0o755)
	}
	_ = unix.Mount("dev", "/dev", "devtmpfs", 0, "")
	_ = unix.Mount("proc", "/proc", "proc", 0, "")
	_ = unix.Mount("sys", "/sys", "sysfs", 0, "")
	cmdline, _ := os.ReadFile("/proc/cmdline")
	status := byte(engine.StatusPowerOff)
	for _, f := range strings.Fields(string(cmdline)) {
		name, ok := strings.CutPrefix(f, "guest=")
		if !ok {
			continue
		}
		if err := guests[name](); err != nil {
			fmt.Println("guest:", err)
			status = 1
		}
	}
	port, err := os.OpenFile("/dev/port", os.O_RDWR, 0)
	if err != nil {
		fmt.Println("guest:", err)
	}
	_, err = port.WriteAt([]byte{status}, engine.ExitPort)
	fmt.Println("guest:", err)
	for {
		_ = unix.Pause() // select{} alone would be a deadlock to the runtime
	}
}

// initramfs writes an archive with the test binary as /init.
func initramfs(t testing.TB) *os.File {
	t.Helper()
	self, err := os.ReadFile("/proc/self/exe")
	if err != nil {
		t.Fatal(err)
	}
	image, err := elf.NewFile(bytes.NewReader(self))
	if err != nil {
		t.Fatal(err)
	}
	if libs, err := image.ImportedLibraries(); err != nil || len(libs) > 0 {
		t.Fatalf("the test binary is to be /init and needs %v, %v: build it with CGO_ENABLED=0", libs, err)
	}
	f, err := os.Create(filepath.Join(t.TempDir(), "initramfs.cpio"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	w := cpio.Newc.Writer(f)
	records := []cpio.Record{
		cpio.Directory("dev", 0o755),
		cpio.CharDev("dev/console", 0o600, 5, 1),
		cpio.CharDev("dev/null", 0o666, 1, 3),
		cpio.StaticFile("init", string(self), 0o755),
	}
	if err := cpio.WriteRecords(w, records); err != nil {
		t.Fatal(err)
	}
	if err := cpio.WriteTrailer(w); err != nil {
		t.Fatal(err)
	}
	return f
}

// screen collects what a guest prints.
type screen struct {
	mu   sync.Mutex
	b    bytes.Buffer
	want []waiter
}

type waiter struct {
	text string
	seen chan struct{}
}

func (s *screen) Write(p []byte) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.b.Write(p)
	for i := 0; i < len(s.want); i++ {
		if bytes.Contains(s.b.Bytes(), []byte(s.want[i].text)) {
			close(s.want[i].seen)
			s.want = append(s.want[:i], s.want[i+1:]...)
			i--
		}
	}
	return len(p), nil
}

func (s *screen) expect(text string) <-chan struct{} {
	w := waiter{text, make(chan struct{})}
	s.mu.Lock()
	s.want = append(s.want, w)
	s.mu.Unlock()
	_, _ = s.Write(nil)
	return w.seen
}

func (s *screen) String() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.b.String()
}

type guest struct {
	engine.Engine
	*screen
}

func boot(t testing.TB, name string, change func(*engine.Spec)) *guest {
	t.Helper()
	g := &guest{screen: &screen{}}
	spec := engine.Spec{
		Kernel:      openKernel(t),
		Initramfs:   initramfs(t),
		Cmdline:     "quiet panic=-1 reboot=t guest=" + name + " " + os.Getenv("WSL2_RIG_CMDLINE"),
		MemoryBytes: 128 << 20,
		CPUs:        1,
		Console:     g.screen,
	}
	if change != nil {
		change(&spec)
	}
	g.Engine = start(t, spec)
	return g
}

// mustEnd waits for the guest and fails unless it ended as said.
func (g *guest) mustEnd(t testing.TB, want engine.Reason) {
	t.Helper()
	if exit := g.Wait(); exit.Reason != want {
		t.Fatalf("%v, want %v: %s; the guest's console:\n%s", exit.Reason, want, exit.Detail, g.screen)
	}
}

// mustSay fails unless the console shows the text.
func (g *guest) mustSay(t testing.TB, text string) {
	t.Helper()
	if !strings.Contains(strings.ReplaceAll(g.String(), "\r", ""), text) {
		t.Fatalf("no %q on the guest's console:\n%s", text, g.screen)
	}
}

func TestBootsToUserSpace(t *testing.T) {
	for _, cpus := range []int{1, 2, 4} {
		t.Run(fmt.Sprintf("%d vCPUs", cpus), func(t *testing.T) {
			g := boot(t, "cpus", func(s *engine.Spec) { s.CPUs = cpus })
			g.mustEnd(t, engine.ReasonPowerOff)
			want := "online: 0\n"
			if cpus > 1 {
				want = fmt.Sprintf("online: 0-%d\n", cpus-1)
			}
			g.mustSay(t, want)
			for _, bad := range []string{"BIOS bug", "BUG:", "Call Trace", "Firmware Bug", "APIC id mismatch"} {
				if strings.Contains(g.String(), bad) && !strings.Contains(g.String(), "XSAVE consistency") {
					t.Errorf("the kernel complains (%s):\n%s", bad, g.screen)
				}
			}
		})
	}
}

// Devices' data and interrupts, on machines with one and with two vCPUs: rng,
// and a disk that is read, written and flushed.
func TestDevices(t *testing.T) {
	for _, cpus := range []int{1, 2} {
		image := filepath.Join(t.TempDir(), "disk.img")
		if err := os.WriteFile(image, bytes.Repeat([]byte("host "), 1<<20/5), 0o600); err != nil {
			t.Fatal(err)
		}
		if err := os.Truncate(image, 1<<20); err != nil {
			t.Fatal(err)
		}
		disk, err := blk.Open(image, false)
		if err != nil {
			t.Fatal(err)
		}
		b, err := blk.New(blk.Config{Disk: disk, Serial: "test"})
		if err != nil {
			t.Fatal(err)
		}
		g := boot(t, "devices", func(s *engine.Spec) {
			s.CPUs = cpus
			s.Devices = []virtio.Device{rng.New(), b}
		})
		g.mustEnd(t, engine.ReasonPowerOff)
		g.mustSay(t, "rng ok\n")
		g.mustSay(t, "disk ok\n")
		if err := b.Close(); err != nil {
			t.Error(err)
		}
		written, err := os.ReadFile(image)
		if err != nil {
			t.Fatal(err)
		}
		if !bytes.HasPrefix(written, []byte("guest")) {
			t.Errorf("the image begins with %q", written[:16])
		}
	}
}

// A panic ends the machine at once, and its last words are on the console.
func TestPanic(t *testing.T) {
	g := boot(t, "panic", nil)
	g.mustEnd(t, engine.ReasonReset)
	g.mustSay(t, "Kernel panic - not syncing: Attempted to kill init!")
}

func TestKillRunningKernel(t *testing.T) {
	g := boot(t, "spin", func(s *engine.Spec) { s.CPUs = 2 })
	ended := make(chan struct{})
	go func() { g.Wait(); close(ended) }()
	select {
	case <-g.expect("spinning"):
	case <-ended:
		t.Fatalf("the guest does not run; its console:\n%s", g.screen)
	}
	g.Kill()
	g.mustEnd(t, engine.ReasonKilled)
}
