//go:build e2e

package qemu

import (
	"context"
	"encoding/binary"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/wsl2/wsl2/vmm/engine"
	"github.com/wsl2/wsl2/vmm/virtio"
	"github.com/wsl2/wsl2/vmm/virtio/blk"
	"github.com/wsl2/wsl2/vmm/virtio/rng"
	"github.com/wsl2/wsl2/vmm/virtio/vsock"
	"github.com/wsl2/wsl2/vmm/vmmtest"
)

// bootGuest starts the test guest; the machine is killed when the test ends.
func bootGuest(t *testing.T, cmdline string, devices ...virtio.Device) (engine.Engine, *vmmtest.Console) {
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

func newDisk(t *testing.T, c blk.Config) *blk.Device {
	t.Helper()
	d, err := blk.New(c)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { d.Close() })
	return d
}

func newVsock(t *testing.T) (*vsock.Device, string) {
	t.Helper()
	p := filepath.Join(t.TempDir(), "v")
	d, err := vsock.New(vsock.Config{GuestCID: 3, Path: p})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { d.Close() })
	return d, p
}

func TestPowerOff(t *testing.T) {
	m, console := bootGuest(t, "quiet vmmtest=poweroff", rng.New(), newDisk(t, blk.Config{Serial: "slot0"}))
	if e := m.Wait(); e.Reason != engine.ReasonPowerOff {
		t.Errorf("ended by %v (%s)", e.Reason, e.Detail)
	}
	if !strings.Contains(console.String(), "guest: poweroff") {
		t.Errorf("console:\n%s", console)
	}
	m.Kill() // harmless
	if e := m.Wait(); e.Reason != engine.ReasonPowerOff {
		t.Errorf("after Kill: %v", e.Reason)
	}
}

func TestReset(t *testing.T) {
	for action, want := range map[string]string{"reboot": "guest: reboot", "panic": "Kernel panic - not syncing"} {
		t.Run(action, func(t *testing.T) {
			m, console := bootGuest(t, "quiet vmmtest="+action)
			if e := m.Wait(); e.Reason != engine.ReasonReset {
				t.Errorf("ended by %v (%s)", e.Reason, e.Detail)
			}
			if !strings.Contains(console.String(), want) {
				t.Errorf("console:\n%s", console)
			}
		})
	}
}

func TestKill(t *testing.T) {
	m, console := bootGuest(t, "quiet vmmtest=hang", newDisk(t, blk.Config{}))
	console.Wait(t, "guest: hang")
	m.Kill()
	if e := m.Wait(); e.Reason != engine.ReasonKilled {
		t.Errorf("ended by %v (%s)", e.Reason, e.Detail)
	}
}

// A panic before there is any driver: no root file system.
func TestEarlyPanic(t *testing.T) {
	m, console := bootGuest(t, "quiet rdinit=/none root=/dev/none vmmtest=poweroff")
	if e := m.Wait(); e.Reason != engine.ReasonReset {
		t.Errorf("ended by %v (%s)", e.Reason, e.Detail)
	}
	if !strings.Contains(console.String(), "Kernel panic") {
		t.Errorf("console:\n%s", console)
	}
}

// TCG translates a page's code once and looks again only when a vCPU has stored
// to the page. A disk that writes to the page must count, too.
func TestDiskReplacesTranslatedCode(t *testing.T) {
	const pages = 16
	image := make([]byte, pages*4096)
	want := make([]uint32, pages)
	for i := range pages {
		want[i] = uint32(1000 + i)
		code := image[i*4096:]
		code[0] = 0xb8 // mov $want, %eax
		binary.LittleEndian.PutUint32(code[1:], want[i])
		code[5] = 0xc3 // ret
	}
	path := filepath.Join(t.TempDir(), "code.img")
	if err := os.WriteFile(path, image, 0o600); err != nil {
		t.Fatal(err)
	}
	disk, err := blk.Open(path, true)
	if err != nil {
		t.Fatal(err)
	}
	v, socket := newVsock(t)
	_, console := bootGuest(t, "quiet", v, newDisk(t, blk.Config{ReadOnly: true, Disk: disk}))
	console.Wait(t, "guest: ready")
	if got := vmmtest.Do(t, socket, "code vda %d", pages); got != fmt.Sprint(want) {
		t.Errorf("the pages returned %s, want %v", got, want)
	}
}
