package service

import (
	"testing"

	"github.com/wsl2/wsl2/internal/wire"
	"github.com/wsl2/wsl2/launcher/api"
)

// TestHeldDisk: a distro whose disk another one still uses when it ends does not take
// the VM along. Its disk is nobody else's until it is free.
func TestHeldDisk(t *testing.T) {
	inBubble(t, func(t *testing.T, s *setup) {
		other := DistroSpec{Name: "other", Disk: "/disks/other"}
		s.open(t, other, nil)
		s.open(t, debian, nil)
		vm := s.machine(0)
		vm.setBusy(debian.Disk, true)
		vm.onStop(func(name string) error {
			if name != debian.Name {
				return nil
			}
			delete(vm.running, name)
			return &GuestError{wire.CodeHeld, "in use"}
		})
		if err := s.m.Terminate(t.Context(), debian.Name); err != nil {
			t.Fatal(err)
		}
		if s.state(debian.Name) != api.StateStopped || s.state(other.Name) != api.StateRunning {
			t.Errorf("debian is %q, other is %q", s.state(debian.Name), s.state(other.Name))
		}
		if _, _, err := s.m.Open(t.Context(), debian, api.VMOptions{}, func(error) {}); code(err) != api.CodeBusy {
			t.Errorf("start: %v", err)
		}
		if err := s.m.StopIdle(t.Context(), "Debian"); code(err) != api.CodeBusy {
			t.Errorf("work on its disk: %v", err)
		}

		// Free, it starts, in the same VM.
		vm.setBusy(debian.Disk, false)
		vm.onStop(nil)
		s.open(t, debian, nil).Release()
		if s.boots() != 1 {
			t.Errorf("%d boots", s.boots())
		}

		// What held it ends: it is taken from the VM.
		vm.setBusy(debian.Disk, true)
		vm.onStop(func(name string) error {
			delete(vm.running, name)
			if name == debian.Name {
				return &GuestError{wire.CodeHeld, "in use"}
			}
			vm.setBusy(debian.Disk, false)
			return nil
		})
		for _, d := range []DistroSpec{debian, other} {
			if err := s.m.Terminate(t.Context(), d.Name); err != nil {
				t.Fatal(err)
			}
		}
		vm.mu.Lock()
		defer vm.mu.Unlock()
		if len(vm.disks) != 0 {
			t.Errorf("attached: %v", vm.disks)
		}
	})
}
