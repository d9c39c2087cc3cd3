package vmm

import (
	"bytes"
	"compress/gzip"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/wsl2/wsl2/vmm/virtio/blk"
	"github.com/wsl2/wsl2/vmm/vmmtest"
)

// write makes a file of the test's own.
func write(t *testing.T, name string, b []byte) string {
	t.Helper()
	p := filepath.Join(t.TempDir(), name)
	if err := os.WriteFile(p, b, 0o600); err != nil {
		t.Fatal(err)
	}
	return p
}

// elfKernel looks like a vmlinux for the given ELF machine.
func elfKernel(machine byte) []byte {
	b := make([]byte, 4096)
	copy(b, "\x7fELF\x02\x01\x01")
	b[elfMachine] = machine
	return b
}

func bzImage() []byte {
	b := make([]byte, 4096)
	copy(b[bzImageMagic:], "HdrS")
	return b
}

func archive(t *testing.T) []byte {
	t.Helper()
	b, err := vmmtest.Archive(bytes.Repeat([]byte("init"), 10000))
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func compressed(t *testing.T, b []byte) []byte {
	t.Helper()
	var z bytes.Buffer
	w := gzip.NewWriter(&z)
	w.Write(b)
	w.Close()
	return z.Bytes()
}

func TestConfig(t *testing.T) {
	cpio := archive(t)
	gz := compressed(t, cpio)
	fifo := filepath.Join(t.TempDir(), "fifo")
	if err := unix.Mkfifo(fifo, 0o600); err != nil {
		t.Fatal(err)
	}
	kernel, initramfs := write(t, "vmlinux", elfKernel(machineX86)), write(t, "initramfs", cpio)
	for _, tc := range []struct {
		name   string
		change func(c *Config)
		want   string // in the error; empty for none
	}{
		{"good", func(c *Config) {}, ""},
		{"bzImage", func(c *Config) { c.Kernel = write(t, "bzImage", bzImage()) }, ""},
		{"compressed initramfs", func(c *Config) { c.Initramfs = write(t, "i.gz", gz) }, ""},
		{"no initramfs", func(c *Config) { c.Initramfs = "" }, ""},
		{"odd memory", func(c *Config) { c.MemoryBytes += 12345 }, ""},
		{"no processors", func(c *Config) { c.CPUs = 0 }, "1 to 64"},
		{"1000 processors", func(c *Config) { c.CPUs = 1000 }, "1 to 64"},
		{"no memory", func(c *Config) { c.MemoryBytes = 0 }, "at least 64 MiB"},
		{"little memory", func(c *Config) { c.MemoryBytes = 32 << 20 }, "at least 64 MiB"},
		{"memory of a data centre", func(c *Config) { c.MemoryBytes = 1 << 50 }, "this host has"},
		{"unknown accelerator", func(c *Config) { c.Accel = 7 }, "auto, kvm or tcg"},
		{"27 slots", func(c *Config) { c.DiskSlots = 27 }, "at most 26"},
		{"line break in the command line", func(c *Config) { c.Cmdline = "a\nb" }, "one line"},
		{"no kernel named", func(c *Config) { c.Kernel = "" }, "--kernel"},
		{"kernel missing", func(c *Config) { c.Kernel = "/none" }, "/none"},
		{"kernel is a directory", func(c *Config) { c.Kernel = t.TempDir() }, "not a regular file"},
		{"kernel is a FIFO", func(c *Config) { c.Kernel = fifo }, "not a regular file"},
		{"kernel is text", func(c *Config) { c.Kernel = write(t, "k", []byte("#!/bin/sh\n")) }, "not a Linux kernel"},
		{"kernel is empty", func(c *Config) { c.Kernel = write(t, "k", nil) }, "not a Linux kernel"},
		{"kernel for arm64", func(c *Config) { c.Kernel = write(t, "k", elfKernel(183)) }, "another processor"},
		{"initramfs missing", func(c *Config) { c.Initramfs = "/none" }, "/none"},
		{"initramfs empty", func(c *Config) { c.Initramfs = write(t, "i", nil) }, "truncated"},
		{"initramfs is text", func(c *Config) { c.Initramfs = write(t, "i", []byte("hello, world")) }, "not a cpio archive"},
		{"initramfs cut off", func(c *Config) { c.Initramfs = write(t, "i", cpio[:len(cpio)/2]) }, "truncated"},
		{"initramfs without its last byte of text", func(c *Config) {
			c.Initramfs = write(t, "i", cpio[:bytes.LastIndex(cpio, cpioTrailer)+3])
		}, "truncated"},
		{"compressed initramfs cut off", func(c *Config) { c.Initramfs = write(t, "i", gz[:len(gz)-9]) }, "truncated"},
		{"compressed initramfs damaged", func(c *Config) {
			b := bytes.Clone(gz)
			b[len(b)-6] ^= 1 // of the checksum
			c.Initramfs = write(t, "i", b)
		}, "damaged"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			c := Config{Kernel: kernel, Initramfs: initramfs, MemoryBytes: 64 << 20, CPUs: 1}
			tc.change(&c)
			m, err := New(c)
			if tc.want == "" {
				if err != nil {
					t.Fatal(err)
				}
				if m.cfg.MemoryBytes%memoryUnit != 0 {
					t.Errorf("memory of %d bytes", m.cfg.MemoryBytes)
				}
				return
			}
			if !errors.Is(err, ErrConfig) || !strings.Contains(err.Error(), tc.want) {
				t.Errorf("New: %v, want %q", err, tc.want)
			}
		})
	}
}

func TestParseAccel(t *testing.T) {
	for a := AccelAuto; a <= AccelTCG; a++ {
		if got, err := ParseAccel(a.String()); err != nil || got != a {
			t.Errorf("ParseAccel(%q) = %v, %v", a, got, err)
		}
	}
	if _, err := ParseAccel("hvf"); err == nil {
		t.Error("hvf accepted")
	}
}

// What can be asked of a machine that never ran.
func TestNotRunning(t *testing.T) {
	m, err := New(Config{Kernel: write(t, "k", bzImage()), MemoryBytes: 64 << 20, CPUs: 1, Accel: AccelTCG})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := m.AttachDisk(t.Context(), Disk{Path: "/none"}); !errors.Is(err, ErrNotRunning) {
		t.Errorf("AttachDisk: %v", err)
	}
	if err := m.DetachDisk(t.Context(), 0); !errors.Is(err, ErrNotRunning) {
		t.Errorf("DetachDisk: %v", err)
	}
	if err := m.Stop(t.Context()); !errors.Is(err, ErrNotRunning) {
		t.Errorf("Stop: %v", err)
	}
	m.Kill()
	if err := m.Start(t.Context()); err == nil {
		t.Error("started after Kill")
	}
	if err := m.Start(t.Context()); err == nil {
		t.Error("started twice")
	}
	if e, err := m.Wait(t.Context()); err != nil || e.Err() == nil {
		t.Errorf("Wait: %+v, %v", e, err)
	}
}

func TestEmptied(t *testing.T) {
	ended, cancel := context.WithCancel(t.Context())
	cancel()
	for _, tc := range []struct {
		name string
		ctx  context.Context
		err  error
		want bool
	}{
		{"done", t.Context(), nil, true},
		{"done when ctx ended", ended, nil, true},
		{"no disk", t.Context(), blk.ErrNoDisk, false},
		{"given up", ended, fmt.Errorf("detach: %w", context.Canceled), false},
		{"sync failed", t.Context(), &blk.IOError{Err: unix.EIO}, true},
		{"sync failed when ctx ended", ended, &blk.IOError{Err: unix.EIO}, true},
	} {
		if got := emptied(tc.ctx, tc.err); got != tc.want {
			t.Errorf("%s: %v", tc.name, got)
		}
	}
}

// A machine that cannot start lets go of its disks and its socket.
func TestFailedStartLeavesNothing(t *testing.T) {
	dir := t.TempDir()
	disk := filepath.Join(dir, "disk")
	if err := os.WriteFile(disk, make([]byte, 1<<20), 0o600); err != nil {
		t.Fatal(err)
	}
	c := Config{
		Accel: AccelTCG, Kernel: write(t, "k", bzImage()), MemoryBytes: 64 << 20, CPUs: 1,
		Disks: []Disk{{Path: disk}}, GuestCID: 3, VsockPath: filepath.Join(dir, "v"),
	}
	t.Setenv("PATH", "/none") // no QEMU
	for range 2 {
		m, err := New(c)
		if err != nil {
			t.Fatal(err)
		}
		if err := m.Start(t.Context()); err == nil || !strings.Contains(err.Error(), "apt-get install qemu-system-x86") {
			t.Errorf("Start: %v", err)
		}
		if _, err := os.Lstat(c.VsockPath); err == nil {
			t.Error("the socket is left behind")
		}
	}
}
