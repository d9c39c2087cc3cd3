//go:build e2e

package qemu

import (
	"context"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/wsl2/wsl2/vmm/engine"
	"github.com/wsl2/wsl2/vmm/virtio"
	"github.com/wsl2/wsl2/vmm/virtio/blk"
	"github.com/wsl2/wsl2/vmm/virtio/rng"
	"github.com/wsl2/wsl2/vmm/vmmtest"
)

// boot starts the test guest; the machine is killed when the test ends.
func boot(t *testing.T, cmdline string, devices ...virtio.Device) (engine.Engine, *vmmtest.Console) {
	t.Helper()
	console := &vmmtest.Console{}
	open := func(p string) *os.File {
		f, err := os.Open(p)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { f.Close() })
		return f
	}
	m, err := New(engine.Spec{
		Kernel: open(vmmtest.Kernel(t)), Initramfs: open(vmmtest.Initramfs(t)),
		Cmdline:     "panic=-1 reboot=t " + cmdline,
		MemoryBytes: 256 << 20, CPUs: 2, Devices: devices, Console: console,
	}, Config{})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(context.Background(), vmmtest.Timeout)
	defer cancel()
	begin := time.Now()
	if err := m.Start(ctx); err != nil {
		t.Fatal(err)
	}
	t.Logf("Start took %v", time.Since(begin))
	t.Cleanup(func() {
		m.Kill()
		m.Wait()
		if t.Failed() {
			t.Logf("console:\n%s", console)
		}
	})
	return m, console
}

func TestPowerOff(t *testing.T) {
	disk, err := blk.New(blk.Config{Serial: "slot0"})
	if err != nil {
		t.Fatal(err)
	}
	m, console := boot(t, "vmmtest=poweroff", rng.New(), disk)
	if e := m.Wait(); e.Reason != engine.ReasonPowerOff {
		t.Errorf("ended by %v (%s)", e.Reason, e.Detail)
	}
	if !strings.Contains(console.String(), "guest: poweroff") {
		t.Errorf("console:\n%s", console)
	}
}
