package qemu

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/wsl2/wsl2/vmm/engine"
	"github.com/wsl2/wsl2/vmm/logtail"
	"github.com/wsl2/wsl2/vmm/virtio"
	"github.com/wsl2/wsl2/vmm/virtio/console"
	"github.com/wsl2/wsl2/vmm/virtio/rng"
)

// tinyKernel is a bzImage of no instructions that every check accepts.
func tinyKernel(t *testing.T) *os.File {
	t.Helper()
	b := make([]byte, 8192)
	b[0x1f1] = 1                    // setup sectors
	b[0x1fe], b[0x1ff] = 0x55, 0xaa // boot sector
	copy(b[0x200:], "\xeb\x66HdrS")
	b[0x206], b[0x207] = 0x0f, 0x02 // protocol 2.15
	b[0x236] = 1                    // a 64-bit entry
	b[0x22c+3] = 0x7f               // initramfs below 2 GiB
	b[0x239] = 0x07                 // command line of 2047 bytes
	b[0x238] = 0xff
	b[0x258+2] = 0x10 // preferred address 1 MiB
	p := filepath.Join(t.TempDir(), "bzImage")
	if err := os.WriteFile(p, b, 0o600); err != nil {
		t.Fatal(err)
	}
	f, err := os.Open(p)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	return f
}

// script makes a program that stands for QEMU.
func script(t *testing.T, text string) string {
	t.Helper()
	p := filepath.Join(t.TempDir(), "qemu")
	if err := os.WriteFile(p, []byte("#!/bin/sh\n"+text), 0o755); err != nil {
		t.Fatal(err)
	}
	return p
}

func TestNew(t *testing.T) {
	good := engine.Spec{CPUs: 1, MemoryBytes: 64 << 20, Devices: []virtio.Device{rng.New()}}
	for _, tc := range []struct {
		name   string
		change func(*engine.Spec)
		want   string
	}{
		{"no CPUs", func(s *engine.Spec) { s.CPUs = 0 }, "1 to 64"},
		{"65 CPUs", func(s *engine.Spec) { s.CPUs = 65 }, "1 to 64"},
		{"odd memory", func(s *engine.Spec) { s.MemoryBytes++ }, "2 MiB"},
		{"too many devices", func(s *engine.Spec) {
			for len(s.Devices) <= MaxDevices {
				s.Devices = append(s.Devices, rng.New())
			}
		}, "room for 19"},
		{"device without a front end", func(s *engine.Spec) { s.Devices = []virtio.Device{console.New(nil)} }, "type 3"},
	} {
		s := good
		tc.change(&s)
		if _, err := New(s, Config{Program: "/bin/true"}); err == nil || !strings.Contains(err.Error(), tc.want) {
			t.Errorf("%s: %v, want %q", tc.name, err, tc.want)
		}
	}
	if _, err := New(good, Config{Program: "/none/qemu"}); !errors.Is(err, ErrNotInstalled) || !strings.Contains(err.Error(), "apt-get install qemu-system-x86") {
		t.Errorf("without QEMU: %v", err)
	}
}

// Whatever goes wrong with the program, Start says so and leaves nothing.
func TestStartFails(t *testing.T) {
	for _, tc := range []struct{ name, program, want string }{
		{"its own words", "echo 'qemu-system-x86_64: cannot set up guest memory' >&2; exit 1", "cannot set up guest memory"},
		{"signal", "kill -SEGV $$", "segmentation fault"},
		{"at once", "exit 0", "exit status 0"},
		{"no sandbox", `case "$*" in *-sandbox*) echo "-sandbox: seccomp support is disabled" >&2; exit 1;; esac; echo "went without" >&2; exit 1`, "went without"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			before := descriptors(t)
			s := engine.Spec{Kernel: tinyKernel(t), CPUs: 1, MemoryBytes: 64 << 20, Devices: []virtio.Device{rng.New()}}
			m, err := New(s, Config{Program: script(t, tc.program)})
			if err != nil {
				t.Fatal(err)
			}
			if err := m.Start(t.Context()); err == nil || !strings.Contains(err.Error(), tc.want) {
				t.Errorf("Start: %v, want %q", err, tc.want)
			}
			if after := descriptors(t); after != before+1 { // the kernel
				t.Errorf("%d descriptors, %d before", after, before)
			}
		})
	}
}

// A QEMU that hangs while it starts ends with the context, or by Kill.
func TestStartHangs(t *testing.T) {
	for _, way := range []string{"context", "Kill"} {
		t.Run(way, func(t *testing.T) {
			fifo := filepath.Join(t.TempDir(), "up")
			up := make(chan struct{})
			// The program says that it runs by ending.
			s := engine.Spec{Kernel: tinyKernel(t), CPUs: 1, MemoryBytes: 64 << 20}
			m, err := New(s, Config{Program: script(t, ": > "+fifo+"; exec sleep 1000")})
			if err != nil {
				t.Fatal(err)
			}
			if err := unix.Mkfifo(fifo, 0o600); err != nil {
				t.Fatal(err)
			}
			go func() {
				defer close(up)
				if f, err := os.Open(fifo); err == nil {
					f.Close()
				}
			}()
			ctx, cancel := context.WithCancel(t.Context())
			defer cancel()
			go func() {
				<-up
				if way == "Kill" {
					m.Kill()
				} else {
					cancel()
				}
			}()
			err = m.Start(ctx)
			if way == "Kill" && (err == nil || !strings.Contains(err.Error(), "killed")) || way == "context" && !errors.Is(err, context.Canceled) {
				t.Errorf("Start: %v", err)
			}
		})
	}
}

func descriptors(t *testing.T) int {
	t.Helper()
	fds, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	n := 0
	for _, fd := range fds {
		// The runtime's own, opened at first use.
		if l, _ := os.Readlink("/proc/self/fd/" + fd.Name()); !strings.HasPrefix(l, "anon_inode:") {
			n++
		}
	}
	return n
}

func TestSaid(t *testing.T) {
	p := &process{stderr: logtail.New(maxStderr, nil)}
	for range 1000 {
		fmt.Fprintln(p.stderr, Program+": something")
	}
	fmt.Fprintln(p.stderr, Program+": the \x1b[31mlast word")
	s := p.said()
	if len(s) > maxStderr || !strings.HasSuffix(s, "something; the last word") || strings.Contains(s, Program) {
		t.Errorf("%d bytes: %q", len(s), s)
	}
}
