package main

import (
	"bytes"
	"compress/gzip"
	"context"
	"debug/elf"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"

	"github.com/klauspost/compress/zstd"
	"github.com/ulikunitz/xz"
	"golang.org/x/sys/unix"
)

// hostModules are loaded in every rig, with what they depend on.
var hostModules = []string{"kvm-amd", "vhost_vsock", "tun", "virtio_blk", "loop"}

// metaPackages name the current cloud kernel, best first: one of them exists in
// any Debian since 11.
var metaPackages = []string{"linux-image-6.12-cloud-amd64", "linux-image-cloud-amd64"}

// hostOS is a stock Debian kernel, unpacked into the cache.
type hostOS struct {
	dir string // of vmlinux and modules/
}

func (h *hostOS) kernel() string { return filepath.Join(h.dir, "vmlinux") }

// hostKernel finds the kernel in the cache, or fetches it by the host's own apt.
func hostKernel(ctx context.Context, root string, update bool) (*hostOS, error) {
	cache := os.Getenv("XDG_CACHE_HOME")
	if cache == "" {
		home, err := os.UserHomeDir()
		if err != nil {
			return nil, err
		}
		cache = filepath.Join(home, ".cache")
	}
	cache = filepath.Join(cache, "wsl2", "rig")
	if err := os.MkdirAll(cache, 0o755); err != nil {
		return nil, err
	}
	current := filepath.Join(cache, "current")
	if !update {
		if dir, err := filepath.EvalSymlinks(current); err == nil {
			return &hostOS{dir: dir}, nil
		}
	}
	lock, err := os.OpenFile(filepath.Join(cache, "lock"), os.O_CREATE|os.O_RDWR, 0o644)
	if err != nil {
		return nil, err
	}
	defer lock.Close()
	if err := unix.Flock(int(lock.Fd()), unix.LOCK_EX); err != nil {
		return nil, err
	}
	if !update { // another rig may have made it meanwhile
		if dir, err := filepath.EvalSymlinks(current); err == nil {
			return &hostOS{dir: dir}, nil
		}
	}
	pkg, err := kernelPackage(ctx)
	if err != nil {
		return nil, err
	}
	dir := filepath.Join(cache, pkg)
	if _, err := os.Stat(dir); err != nil {
		fmt.Fprintln(os.Stderr, "rig: fetching", pkg)
		if err := fetch(ctx, cache, pkg, dir); err != nil {
			return nil, fmt.Errorf("fetch %s: %w", pkg, err)
		}
	}
	tmp := current + ".new"
	os.Remove(tmp)
	if err := os.Symlink(filepath.Base(dir), tmp); err != nil {
		return nil, err
	}
	if err := os.Rename(tmp, current); err != nil {
		return nil, err
	}
	return &hostOS{dir: dir}, nil
}

// kernelPackage asks apt which package holds the newest cloud kernel.
func kernelPackage(ctx context.Context) (string, error) {
	for try := range 2 {
		for _, meta := range metaPackages {
			out, err := exec.CommandContext(ctx, "apt-cache", "depends", "--important", meta).Output()
			if errors.Is(err, exec.ErrNotFound) {
				return "", errors.New("the rig takes its kernel from Debian's archive by apt-cache and apt-get, which this machine does not have")
			}
			for line := range strings.Lines(string(out)) {
				if name, ok := strings.CutPrefix(strings.TrimSpace(line), "Depends: linux-image-"); ok {
					return "linux-image-" + name, nil
				}
			}
		}
		if try == 0 && os.Geteuid() == 0 {
			exec.CommandContext(ctx, "apt-get", "-qq", "update").Run()
		}
	}
	return "", fmt.Errorf("apt knows none of %s; run apt-get update, and see that a Debian archive is among its sources", strings.Join(metaPackages, ", "))
}

// fetch downloads and unpacks the package into dir: a vmlinux, which QEMU enters
// by PVH without the two seconds that decompression takes under TCG, and the
// modules, uncompressed, so that PID 1 needs no decompressor.
func fetch(ctx context.Context, cache, pkg, dir string) error {
	work, err := os.MkdirTemp(cache, "fetch.")
	if err != nil {
		return err
	}
	defer os.RemoveAll(work)
	get := exec.CommandContext(ctx, "apt-get", "-qq", "-o", "APT::Sandbox::User=root", "download", pkg)
	get.Dir = work
	if out, err := get.CombinedOutput(); err != nil {
		return fmt.Errorf("apt-get download: %w: %s", err, bytes.TrimSpace(out))
	}
	debs, err := filepath.Glob(filepath.Join(work, "*.deb"))
	if err != nil || len(debs) != 1 {
		return fmt.Errorf("apt-get download left %d packages", len(debs))
	}
	tree := filepath.Join(work, "tree")
	if out, err := exec.CommandContext(ctx, "dpkg", "-x", debs[0], tree).CombinedOutput(); err != nil {
		return fmt.Errorf("dpkg -x: %w: %s", err, bytes.TrimSpace(out))
	}
	images, _ := filepath.Glob(filepath.Join(tree, "boot", "vmlinuz-*"))
	if len(images) != 1 {
		return fmt.Errorf("the package holds %d kernel images", len(images))
	}
	image, err := os.ReadFile(images[0])
	if err != nil {
		return err
	}
	vmlinux, err := unpackKernel(image)
	if err != nil {
		return fmt.Errorf("%s: %w", filepath.Base(images[0]), err)
	}
	done := filepath.Join(work, "done")
	if err := os.MkdirAll(filepath.Join(done, "modules"), 0o755); err != nil {
		return err
	}
	if err := os.WriteFile(filepath.Join(done, "vmlinux"), vmlinux, 0o644); err != nil {
		return err
	}
	var modules []string
	for _, pattern := range []string{"lib/modules/*", "usr/lib/modules/*"} {
		found, _ := filepath.Glob(filepath.Join(tree, pattern))
		modules = append(modules, found...)
	}
	for _, m := range modules {
		if err := unpackModules(m, filepath.Join(done, "modules")); err != nil {
			return err
		}
	}
	return os.Rename(done, dir)
}

// unpackKernel takes the ELF kernel out of a bzImage (Documentation/arch/x86/boot.rst).
func unpackKernel(b []byte) ([]byte, error) {
	if len(b) < 0x250 || string(b[0x202:0x206]) != "HdrS" {
		return nil, errors.New("not a bzImage")
	}
	setup := (int64(b[0x1f1]) + 1) * 512
	off := setup + int64(binary.LittleEndian.Uint32(b[0x248:]))
	n := int64(binary.LittleEndian.Uint32(b[0x24c:]))
	if off+n > int64(len(b)) || n < 8 {
		return nil, errors.New("payload lies outside the image")
	}
	p := b[off : off+n-4] // the last four bytes are the unpacked size
	return unpack(p)
}

// unpack decompresses what Debian uses for kernels and modules.
func unpack(p []byte) ([]byte, error) {
	switch {
	case bytes.HasPrefix(p, []byte("\x28\xb5\x2f\xfd")):
		d, err := zstd.NewReader(bytes.NewReader(p))
		if err != nil {
			return nil, err
		}
		defer d.Close()
		return io.ReadAll(d)
	case bytes.HasPrefix(p, []byte("\xfd7zXZ\x00")):
		d, err := xz.NewReader(bytes.NewReader(p))
		if err != nil {
			return nil, err
		}
		return io.ReadAll(d)
	case bytes.HasPrefix(p, []byte("\x1f\x8b")):
		d, err := gzip.NewReader(bytes.NewReader(p))
		if err != nil {
			return nil, err
		}
		return io.ReadAll(d)
	case bytes.HasPrefix(p, []byte("\x7fELF")):
		return p, nil
	}
	return nil, fmt.Errorf("unknown compression (starts with % x)", p[:min(4, len(p))])
}

// unpackModules copies every module of a tree, uncompressed, as NAME.ko with - for _.
func unpackModules(from, to string) error {
	return filepath.WalkDir(from, func(p string, d os.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		name, _, ok := strings.Cut(filepath.Base(p), ".ko")
		if !ok || !wantModule(p) {
			return nil
		}
		raw, err := os.ReadFile(p)
		if err != nil {
			return err
		}
		if raw, err = unpack(raw); err != nil {
			return fmt.Errorf("%s: %w", p, err)
		}
		return os.WriteFile(filepath.Join(to, moduleName(name)+".ko"), raw, 0o644)
	})
}

// wantModule leaves out what no program in the rig can meet: drivers of
// hardware that QEMU does not have. The rest is small and --module names it.
func wantModule(p string) bool {
	_, p, _ = strings.Cut(p, "/kernel/")
	for _, dir := range []string{"arch/x86/kvm/", "virt/", "drivers/vhost/", "drivers/block/", "drivers/net/", "drivers/virtio/", "drivers/char/",
		"drivers/md/", "drivers/vfio/", "net/", "fs/", "lib/", "crypto/", "arch/x86/crypto/"} {
		if strings.HasPrefix(p, dir) && !strings.HasPrefix(p, "drivers/net/ethernet/") && !strings.HasPrefix(p, "drivers/net/wireless/") {
			return true
		}
	}
	return false
}

func moduleName(s string) string { return strings.ReplaceAll(s, "_", "-") }

// modules returns the files of the named modules and of all that they depend
// on, in the order of loading. What the kernel has built in is left out.
func (h *hostOS) modules(names []string) ([]string, error) {
	var order []string
	seen := map[string]bool{}
	var visit func(name string) error
	visit = func(name string) error {
		name = moduleName(name)
		if seen[name] {
			return nil
		}
		seen[name] = true
		p := filepath.Join(h.dir, "modules", name+".ko")
		deps, err := moduleDepends(p)
		if errors.Is(err, os.ErrNotExist) {
			return fmt.Errorf("the rig's kernel has no module %s (it may be built in)", name)
		}
		if err != nil {
			return fmt.Errorf("module %s: %w", name, err)
		}
		for _, d := range deps {
			if err := visit(d); err != nil {
				return err
			}
		}
		order = append(order, p)
		return nil
	}
	for _, n := range names {
		if err := visit(n); err != nil {
			return nil, err
		}
	}
	return order, nil
}

// moduleDepends reads the line "depends=a,b" of a module's .modinfo: packages
// carry no modules.dep, which depmod writes at installation.
func moduleDepends(p string) ([]string, error) {
	f, err := elf.Open(p)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	s := f.Section(".modinfo")
	if s == nil {
		return nil, errors.New("no .modinfo section")
	}
	raw, err := s.Data()
	if err != nil {
		return nil, err
	}
	for _, kv := range strings.Split(string(raw), "\x00") {
		if v, ok := strings.CutPrefix(kv, "depends="); ok && v != "" {
			return strings.Split(v, ","), nil
		}
	}
	return nil, nil
}
