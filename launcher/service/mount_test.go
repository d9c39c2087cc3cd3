package service

import (
	"context"
	"fmt"
	"maps"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/wsl2/wsl2/launcher/api"
)

// TestSharedDisks: what --mount attaches does not keep the VM, comes back with the
// next one and the next service, and goes with --unmount and --shutdown.
func TestSharedDisks(t *testing.T) {
	inBubble(t, func(t *testing.T, s *setup) {
		file := filepath.Join(t.TempDir(), "disks.json")
		s.m.RememberDisks(file)
		mount := func(m *Manager, path, name string) error {
			_, _, err := m.Mount(t.Context(), path, api.Mount{Name: name}, api.VMOptions{})
			return err
		}
		for path, name := range map[string]string{"/a": "one", "/b": "other"} {
			if err := mount(s.m, path, name); err != nil {
				t.Fatal(err)
			}
		}
		if err := mount(s.m, "/a", "two"); err != nil {
			t.Fatal(err)
		}
		want := map[string]string{"/mnt/wsl/one": "/a", "/mnt/wsl/two": "/a", "/mnt/wsl/other": "/b"}
		if got := s.machine(0).mounts(); !maps.Equal(got, want) {
			t.Fatalf("mounted %v, want %v", got, want)
		}
		time.Sleep(time.Hour)
		if s.m.VM() != nil {
			t.Fatal("shared disks keep the VM")
		}

		s.open(t, debian, nil).Release()
		if got := s.machine(1).mounts(); !maps.Equal(got, want) {
			t.Fatalf("in the next VM %v, want %v", got, want)
		}

		// One that is in use stays; the others go.
		s.machine(1).setBusy("/a", true)
		if err := s.m.Unmount(t.Context(), ""); code(err) != api.CodeBusy {
			t.Errorf("unmount of a disk in use: %v", err)
		}
		s.machine(1).setBusy("/a", false)
		if err := s.m.Unmount(t.Context(), "/b"); code(err) != api.CodeNotFound {
			t.Errorf("unmount of a disk that is gone: %v", err)
		}

		// Another service takes it up; after --unmount while no VM runs it does not come back.
		next := newSetup(t)
		next.m.RememberDisks(file)
		if got := fmt.Sprint(next.m.SharedDisks()); !strings.Contains(got, "/a") || strings.Contains(got, "/b") {
			t.Fatalf("remembered: %s", got)
		}
		if err := next.m.Unmount(t.Context(), "/a"); err != nil {
			t.Fatal(err)
		}
		next.open(t, debian, nil).Release()
		if got := next.machine(0).mounts(); len(got) != 0 {
			t.Errorf("mounted after all: %v", got)
		}
		s.m.ForgetDisks()
		if left := s.m.SharedDisks(); len(left) != 0 {
			t.Errorf("remembered after --shutdown: %v", left)
		}
	})
}

// TestSharedDiskFails: a disk that is refused stays attached, for a mount with other
// options; one that has gone is no reason not to start.
func TestSharedDiskFails(t *testing.T) {
	inBubble(t, func(t *testing.T, s *setup) {
		_, _, err := s.m.Mount(t.Context(), "/a", api.Mount{Name: "a", FSType: "unknown"}, api.VMOptions{})
		if err == nil || !strings.Contains(err.Error(), "wsl2 --unmount /a") {
			t.Fatal(err)
		}
		if got := s.machine(0).disks[0]; got != "/a" {
			t.Errorf("attached is %q", got)
		}
		if _, _, err := s.m.Mount(t.Context(), "/a", api.Mount{Name: "a"}, api.VMOptions{}); err != nil {
			t.Fatal(err)
		}
		if len(s.machine(0).disks) != 1 {
			t.Errorf("attached twice: %v", s.machine(0).disks)
		}
		time.Sleep(time.Hour)
		s.prepare = func(m *memMachine) { m.attachErr = fmt.Errorf("no such file") }
		l, session, err := s.m.Open(context.Background(), DistroSpec{Name: SystemDistro}, api.VMOptions{}, func(error) {})
		if err != nil {
			t.Fatal(err)
		}
		l.Release()
		if !slices.ContainsFunc(session.Notices, func(n string) bool { return strings.Contains(n, "not mounted again: /a") }) {
			t.Errorf("notices %q", session.Notices)
		}
		if left := s.m.SharedDisks(); len(left) != 0 {
			t.Errorf("still remembered: %v", left)
		}
	})
}

// code is an error's, "" for none.
func code(err error) api.Code {
	if err == nil {
		return ""
	}
	return api.AsError(err).Code
}
