package service

import (
	"context"
	"errors"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"

	"github.com/wsl2/wsl2/internal/wire"
	"github.com/wsl2/wsl2/launcher/config"
	"github.com/wsl2/wsl2/launcher/registry"
)

// TestVersion1Refuses: what needs a VM names the version that has one, before anything is started.
func TestVersion1Refuses(t *testing.T) {
	settings, _ := config.Load(writeConfig(t, "[distro.one]\nvm = own\n"), config.Host{})
	m := &nativeMachine{log: slog.New(slog.DiscardHandler), done: make(chan struct{}), req: BootRequest{Settings: settings}}
	ctx := context.Background()
	_, _, own := m.StartDistro(ctx, wire.StartDistro{Name: "One"})
	_, _, network := m.StartDistro(ctx, wire.StartDistro{Name: "two", OwnNetwork: true})
	_, _, shell := m.StartDistro(ctx, wire.StartDistro{Name: "two", Slot: wire.RootSlot})
	_, maintain := m.Maintain(ctx, wire.Maintain{Task: wire.TaskTrim}, nil)
	_, mount := m.MountDisk(ctx, wire.MountDisk{})
	_, _, device := m.ShareDevice(ctx)
	for what, err := range map[string]error{"a VM of its own": own, "a network of its own": network, "the debug shell": shell, "maintenance": maintain, "a shared disk": mount, "a virtio-fs device": device} {
		var refused *GuestError
		if !errors.As(err, &refused) || refused.Code != wire.CodeRefused || !strings.Contains(refused.Text, "--set-version") {
			t.Errorf("%s: %v", what, err)
		}
	}
	if err := m.Shutdown(stopGrace); err != nil {
		t.Error(err)
	}
	<-m.Done()
	m.Kill() // once more is no harm
	if _, err := m.Import(ctx, wire.Import{}, nil); !errors.Is(err, errClosing) {
		t.Errorf("after the end: %v", err)
	}
}

func writeConfig(t *testing.T, text string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "wslconfig")
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

// TestVersion1Unmet: what wslconfig asks for and version 1 cannot is told.
func TestVersion1Unmet(t *testing.T) {
	const network, kernel, masks = "what wslconfig says of the network", "what wslconfig says of the kernel", "umask, fmask and dmask"
	for text, want := range map[string][]string{
		"[shares]\nhost = none\na = /a, umask=077\nb = /b, metadata, fmask=1\nc = /c, ro\n": {masks + " of the share /mnt/a", masks + ", metadata of the share /mnt/b"},
		"[wsl2]\nnetworkingMode=none\n":    {network},
		"[network]\ndeny=192.0.2.0/24\n":   {network},
		"[network]\nallow=192.0.2.0/24\n":  {network},
		"[wsl2]\nkernel=/none":             {kernel},
		"[wsl2]\nkernelCommandLine=quiet":  {kernel},
		"[wsl2]\nmemory=1GB\nprocessors=2": nil, // the VM's, as in WSL
	} {
		settings, warnings := config.Load(writeConfig(t, text), config.Host{MemoryBytes: 8 << 30, CPUs: 2})
		if len(warnings) != 0 {
			t.Fatal(warnings)
		}
		m := &nativeMachine{req: BootRequest{Settings: settings}}
		got := m.unmet("one")
		if !slices.EqualFunc(got, want, func(g, w string) bool { return strings.HasPrefix(g, w) && strings.Contains(g, "--set-version one 2") }) {
			t.Errorf("%q: %q, want %q", text, got, want)
		}
	}
}

// TestVersion1Manager: a distro of version 1 has a Manager to itself, whatever wslconfig says of VMs.
func TestVersion1Manager(t *testing.T) {
	booted := 0
	boot := func(context.Context, BootRequest) (Machine, error) {
		booted++
		return nil, errors.New("no machine")
	}
	s := New(Config{Paths: config.Paths{Data: t.TempDir()}, Log: slog.New(slog.DiscardHandler), Boot: boot, Native: boot})
	one := registry.Distro{Name: "one", ID: "a", Version: 1}
	two := registry.Distro{Name: "two", ID: "b", Version: 2}
	if m := s.managerOf(one); m == s.m || m != s.managerOf(one) || m != s.makerOf(one) {
		t.Error("it shares a Manager, or has several")
	}
	if s.managerOf(two) != s.m || s.makerOf(two) != s.m {
		t.Error("a distro of version 2 is not in the shared VM")
	}
	one.Version = 2 // converted
	if s.managerOf(one) != s.m {
		t.Error("it is still where it was before its conversion")
	}
	if n := len(s.managers()); n != 2 {
		t.Errorf("%d Managers", n)
	}
	if booted != 0 {
		t.Errorf("%d machines were started to find out", booted)
	}
}

func TestExitText(t *testing.T) {
	for status, want := range map[syscall.WaitStatus]string{
		syscall.WaitStatus(syscall.SIGHUP): "rebooted", syscall.WaitStatus(syscall.SIGINT): "powered off",
		syscall.WaitStatus(syscall.SIGKILL): "signal 9", 3 << 8: "exit status 3",
	} {
		if got := exitText(status); !strings.Contains(got, want) {
			t.Errorf("%#x: %q, want %q", uint32(status), got, want)
		}
	}
}
