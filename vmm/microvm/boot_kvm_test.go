//go:build kvm

package microvm_test

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/u-root/u-root/pkg/cpio"
	"golang.org/x/sys/unix"

	"github.com/wsl2/wsl2/vmm/engine"
	"github.com/wsl2/wsl2/vmm/microvm"
)

// These tests boot a real kernel. The test binary is also the guest's /init:
// the command line says which guest half to run.

// kernelPath is the guest kernel; the rig carries it there.
func kernelPath() string {
	if p := os.Getenv("WSL2_TEST_KERNEL"); p != "" {
		return p
	}
	return "../../out/vmlinux"
}

func TestMain(m *testing.M) {
	if os.Getpid() == 1 {
		guestInit()
	}
	os.Exit(m.Run())
}

// guests are the guest halves, by the name that follows "guest=" on the command line.
var guests = map[string]func() error{
	"hello": func() error {
		fmt.Println("hello from pid 1")
		return nil
	},
	"cpus": func() error {
		b, err := os.ReadFile("/sys/devices/system/cpu/online")
		fmt.Printf("online: %s", b)
		return err
	},
	"interrupts": func() error {
		b, err := os.ReadFile("/proc/interrupts")
		fmt.Printf("%s", b)
		return err
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
	select {}
}

// initramfs writes an archive with the test binary as /init.
func initramfs(t testing.TB) *os.File {
	t.Helper()
	self, err := os.ReadFile("/proc/self/exe")
	if err != nil {
		t.Fatal(err)
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
	start time.Time
}

func boot(t testing.TB, name string, change func(*engine.Spec)) *guest {
	t.Helper()
	kernel, err := os.Open(kernelPath())
	if err != nil {
		t.Fatal(err)
	}
	defer kernel.Close()
	rd := initramfs(t)
	g := &guest{screen: &screen{}, start: time.Now()}
	spec := engine.Spec{
		Kernel:      kernel,
		Initramfs:   rd,
		Cmdline:     "panic=-1 reboot=t random.trust_cpu=on guest=" + name + " " + os.Getenv("WSL2_TEST_CMDLINE"),
		MemoryBytes: 128 << 20,
		CPUs:        1,
		Console:     io.MultiWriter(g.screen, os.Stderr),
	}
	if change != nil {
		change(&spec)
	}
	g.Engine = microvm.New(spec)
	if err := g.Start(context.Background()); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		g.Kill()
		g.Wait()
	})
	return g
}

func TestBootsToUserSpace(t *testing.T) {
	for _, cpus := range []int{1, 2, 4} {
		t.Run(fmt.Sprintf("%d vCPUs", cpus), func(t *testing.T) {
			g := boot(t, "cpus", func(s *engine.Spec) { s.CPUs = cpus })
			exit := g.Wait()
			if exit.Reason != engine.ReasonPowerOff {
				t.Fatalf("exit %+v, console:\n%s", exit, g.screen)
			}
			t.Logf("%v", time.Since(g.start))
			want := "online: 0\n"
			if cpus > 1 {
				want = fmt.Sprintf("online: 0-%d\n", cpus-1)
			}
			if !strings.Contains(strings.ReplaceAll(g.String(), "\r", ""), want) {
				t.Fatalf("no %q on the console:\n%s", want, g.screen)
			}
		})
	}
}
