package cgroup

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/wsl2/wsl2/internal/wire"
)

// TestLimit: what is asked for has to be set, and what is not asked for is taken away; a kernel without it is no error then.
func TestLimit(t *testing.T) {
	dir := t.TempDir()
	file := func(name, content string) string {
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
		return path
	}
	memory, cpu := file("memory.max", ""), file("cpu.max", "")
	if err := Limit(dir, wire.Limits{MemoryBytes: 5}); err != nil {
		t.Fatal(err)
	}
	for path, want := range map[string]string{memory: "5", cpu: "max 100000"} {
		if got, _ := os.ReadFile(path); string(got) != want {
			t.Errorf("%s: %q, want %q", path, got, want)
		}
	}
	for _, path := range []string{dir, ""} {
		if err := Limit(path, wire.Limits{PIDs: 5}); err == nil || !strings.Contains(err.Error(), "pids.max") {
			t.Errorf("without pids in %q: %v", path, err)
		}
	}
	control := file("cgroup.subtree_control", "cpu memory\n")
	if err := Enable(dir, wire.Limits{MemoryBytes: 5, MilliCPUs: 1}); err != nil {
		t.Error(err)
	}
	if got, _ := os.ReadFile(control); string(got) != "cpu memory\n" {
		t.Errorf("what is enabled was written again: %q", got)
	}
	if err := Enable(dir, wire.Limits{PIDs: 1}); err != nil {
		t.Error(err)
	}
	if got, _ := os.ReadFile(control); !strings.HasPrefix(string(got), "+pids") {
		t.Errorf("%q", got)
	}
}

// TestRemove: what cannot be removed is told of, for who looks again.
func TestRemove(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "distro")
	if err := os.MkdirAll(filepath.Join(path, "a", "b"), 0o755); err != nil {
		t.Fatal(err)
	}
	busy := filepath.Join(path, "a", "busy") // as a process in it makes rmdir(2) fail
	if err := os.WriteFile(busy, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := Remove(t.Context(), path); err == nil {
		t.Error("a cgroup that is not empty is said to be removed")
	}
	if err := os.Remove(busy); err != nil {
		t.Fatal(err)
	}
	// The kernel takes what a distro makes step by step, though no path to it is short enough.
	fd, err := unix.Open(path, openDir, 0)
	for range 25 {
		if err == nil {
			err = unix.Mkdirat(fd, strings.Repeat("x", 200), 0o755)
		}
		if err == nil {
			defer unix.Close(fd)
			fd, err = unix.Openat(fd, strings.Repeat("x", 200), openDir, 0)
		}
	}
	if err != nil {
		t.Fatal(err)
	}
	unix.Close(fd)
	ended, end := context.WithCancel(t.Context())
	end()
	if err := Remove(ended, path); !errors.Is(err, context.Canceled) {
		t.Errorf("after its context's end: %v", err)
	}
	for range 2 {
		if err := Remove(t.Context(), path); err != nil {
			t.Error(err)
		}
	}
	if _, err := os.Lstat(path); !os.IsNotExist(err) {
		t.Errorf("it is there: %v", err)
	}
	if err := Kill(t.Context(), path); err != nil {
		t.Errorf("a cgroup that has gone: %v", err)
	}
}
