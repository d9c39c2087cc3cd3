//go:build e2e

package blk_test

import (
	"context"
	"crypto/sha256"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"testing"

	"github.com/wsl2/wsl2/vmm"
	"github.com/wsl2/wsl2/vmm/vmmtest"
	"golang.org/x/sys/unix"
)

// TestLinuxDriver lets Linux's driver work on two disks: random direct I/O from 8
// threads, flushes, discards, zeroes, and an ext4 that is filled, emptied and
// trimmed. The host compares images, and the space they take.
func TestLinuxDriver(t *testing.T) {
	const size = 64 << 20
	dir := t.TempDir()
	image := func(name string, bytes int64) string {
		p := filepath.Join(dir, name)
		f, err := os.Create(p)
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		if err := f.Truncate(bytes); err != nil {
			t.Fatal(err)
		}
		return p
	}
	run := func(name string, args ...string) {
		t.Helper()
		c := exec.Command(name, args...)
		if out, err := c.CombinedOutput(); err != nil {
			t.Fatalf("%v: %v\n%s", c, err, out)
		}
	}
	allocated := func(p string) int64 {
		var st unix.Stat_t
		if err := unix.Stat(p, &st); err != nil {
			t.Fatal(err)
		}
		return st.Blocks * 512
	}
	raw, ext4 := image("raw.img", size), image("ext4.img", 256<<20)
	run("mke2fs", "-q", "-F", "-t", "ext4", ext4)
	empty := allocated(ext4)

	exe := filepath.Join(dir, "guest")
	build := exec.Command("go", "build", "-o", exe, "./internal/guest")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("%v: %v\n%s", build, err, out)
	}
	init, err := os.ReadFile(exe)
	if err != nil {
		t.Fatal(err)
	}
	archive, err := vmmtest.Archive(init)
	if err != nil {
		t.Fatal(err)
	}
	initramfs := filepath.Join(dir, "initramfs.cpio")
	if err := os.WriteFile(initramfs, archive, 0o644); err != nil {
		t.Fatal(err)
	}

	console := &vmmtest.Console{}
	m, err := vmm.New(vmm.Config{
		Accel: vmm.AccelTCG, Kernel: vmmtest.Kernel(t), Initramfs: initramfs,
		MemoryBytes: 256 << 20, CPUs: 2, GuestCID: 3, VsockPath: filepath.Join(dir, "v"), ConsoleLog: console,
		Disks: []vmm.Disk{{Path: raw, Serial: "e2e-disk"}, {Path: ext4}},
	})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), vmmtest.Timeout)
	defer cancel()
	if err := m.Start(ctx); err != nil {
		t.Fatal(err)
	}
	end := func() {
		m.Kill()
		<-m.Done()
	}
	defer end()

	console.Wait(t, "blk guest: passed: file system")
	end()
	text := console.String()
	sum := func(what string) string {
		found := regexp.MustCompile("blk guest: " + what + " ([0-9a-f]{64})").FindStringSubmatch(text)
		if found == nil {
			t.Fatalf("the guest printed no hash %q:\n%s", what, text)
		}
		return found[1]
	}
	b, err := os.ReadFile(raw)
	if err != nil {
		t.Fatal(err)
	}
	if got := fmt.Sprintf("%x", sha256.Sum256(b)); got != sum("trimmed") || got == sum("written") {
		t.Errorf("the image's hash is %s; the guest saw %s, and %s before it discarded", got, sum("trimmed"), sum("written"))
	}
	if n := allocated(raw); n > size/2+1<<20 {
		t.Errorf("%d bytes of the image are allocated after half of %d was discarded", n, size)
	}
	if n := allocated(ext4); n > empty+16<<20 {
		t.Errorf("the ext4 image takes %d bytes after its 40 MiB were trimmed; %d when it was new", n, empty)
	}
	run("e2fsck", "-fn", ext4)
	if len(b) != size {
		t.Errorf("the image has %d bytes", len(b))
	}
}
