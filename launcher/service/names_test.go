package service

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
	"testing/synctest"

	"github.com/wsl2/wsl2/launcher/api"
	"github.com/wsl2/wsl2/launcher/config"
)

// TestDistroNetworks: distros have the network that wslconfig gives them, each that has its own another address,
// and the VM's network knows the names of those that run.
func TestDistroNetworks(t *testing.T) {
	names := filepath.Join(t.TempDir(), "names")
	inBubble(t, func(t *testing.T, s *setup) {
		s.prepare = func(m *memMachine) { m.names = names }
		s.settings.Networks = map[string]string{"one": config.OwnNetwork, "two": config.OwnNetwork, "alone": config.NoNetwork}
		told := func(want string) {
			t.Helper()
			if text, err := os.ReadFile(names); err != nil || string(text) != want {
				t.Errorf("the names are %q, %v; want %q", text, err, want)
			}
		}
		for _, c := range []struct {
			name       string
			own        bool
			own4, own6 string
			proxy      bool
		}{
			{"debian", false, "", "", true},
			{"One", true, "10.77.0.3/24", "fd77:736c:3200::3/64", true},
			{"two", true, "10.77.0.4/24", "fd77:736c:3200::4/64", true},
			{"alone", true, "", "", false},
		} {
			_, session, err := s.m.Open(t.Context(), DistroSpec{Name: c.name}, api.VMOptions{}, func(error) {})
			if err != nil {
				t.Fatal(err)
			}
			if got := s.machine(0).started; got.OwnNetwork != c.own || got.Own4 != c.own4 || got.Own6 != c.own6 || session.Proxy != c.proxy {
				t.Errorf("%s: %+v, proxy %v", c.name, got, session.Proxy)
			}
		}
		told("10.77.0.2\tdebian\n10.77.0.3\tOne\n10.77.0.4\ttwo\n")

		// An address is free again when its distro has ended; or has not started.
		if err := s.m.Terminate(t.Context(), "one"); err != nil {
			t.Fatal(err)
		}
		told("10.77.0.2\tdebian\n10.77.0.4\ttwo\n")
		m := s.machine(0)
		m.startFn = func(string) error { return &GuestError{Text: "no"} }
		if _, _, err := s.m.Open(t.Context(), DistroSpec{Name: "one"}, api.VMOptions{}, func(error) {}); err == nil {
			t.Error("a start that the guest refuses succeeds")
		}
		told("10.77.0.2\tdebian\n10.77.0.4\ttwo\n")
		m.startFn = nil
		s.open(t, DistroSpec{Name: "one"}, nil)
		told("10.77.0.2\tdebian\n10.77.0.3\tone\n10.77.0.4\ttwo\n")
	})
}

// TestNamesOfSuccessor: a distro that is still being stopped when its VM has ended takes no names from the next VM.
func TestNamesOfSuccessor(t *testing.T) {
	names := filepath.Join(t.TempDir(), "names")
	inBubble(t, func(t *testing.T, s *setup) {
		s.prepare = func(m *memMachine) { m.names = names }
		told := func(want string) {
			t.Helper()
			if text, err := os.ReadFile(names); err != nil || string(text) != want {
				t.Errorf("the names are %q, %v; want %q", text, err, want)
			}
		}
		s.open(t, DistroSpec{Name: "one"}, nil)
		told("10.77.0.2\tone\n")
		release, stopped := make(chan struct{}), make(chan error, 1)
		s.machine(0).onStop(func(string) error { <-release; return errControlLost })
		go func() { stopped <- s.m.Terminate(t.Context(), "one") }()
		synctest.Wait()
		s.machine(0).end(nil)
		synctest.Wait()
		s.open(t, DistroSpec{Name: "two"}, nil)
		told("10.77.0.2\ttwo\n")
		close(release)
		if err := <-stopped; err != nil {
			t.Error(err)
		}
		told("10.77.0.2\ttwo\n")
	})
}

// TestDistroNetworksWithoutOne: with networkingMode = none no distro has a network, whatever is said of it.
func TestDistroNetworksWithoutOne(t *testing.T) {
	inBubble(t, func(t *testing.T, s *setup) {
		s.settings.Network.Off = true
		s.settings.Networks = map[string]string{"one": config.OwnNetwork}
		s.open(t, DistroSpec{Name: "one"}, nil)
		if got := s.machine(0).started; !got.OwnNetwork || got.Own4 != "" || got.Own6 != "" {
			t.Errorf("%+v", got)
		}
	})
}

func TestIsDNSName(t *testing.T) {
	for name, want := range map[string]bool{
		"Debian": true, "Ubuntu-24.04": true, "a_b": true, strings.Repeat("x", maxLabel): true,
		"a..b": false, ".x": false, "x.": false, strings.Repeat("x", maxLabel+1): false,
		strings.Repeat("x.", 119) + "x": true, strings.Repeat("x.", 119) + "xx": false,
	} {
		if isDNSName(name) != want {
			t.Errorf("%q: %v", name, !want)
		}
	}
}
