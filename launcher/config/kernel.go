package config

import (
	"cmp"
	"fmt"
	"os"
	"path/filepath"
	"strings"
)

// KernelHint is the next step for who has no kernel or initramfs.
const KernelHint = "`make build` makes both beside wsl2; --kernel FILE, WSL2_KERNEL and wslconfig name another kernel"

// FindKernel returns the kernel to boot: the one asked for (command line or
// wslconfig), else $WSL2_KERNEL, else the vmlinux that came with wsl2. own tells
// whether it is that one, by whatever path: others lack its patches
// (kernelcfg/patches).
func FindKernel(asked string, getenv func(string) string) (path string, own bool, err error) {
	if asked = cmp.Or(asked, getenv("WSL2_KERNEL")); asked == "" {
		path, err = find("kernel", "vmlinux")
		return path, true, err
	}
	if path, err = readable("kernel", asked); err != nil {
		return "", false, err
	}
	ours, err := find("kernel", "vmlinux")
	return path, err == nil && sameFile(path, ours), nil
}

func sameFile(a, b string) bool {
	sa, errA := os.Stat(a)
	sb, errB := os.Stat(b)
	return errA == nil && errB == nil && os.SameFile(sa, sb)
}

// FindInitramfs returns the initramfs with our /init: $WSL2_INITRAMFS, else the
// one that came with wsl2.
func FindInitramfs(getenv func(string) string) (string, error) {
	if path := getenv("WSL2_INITRAMFS"); path != "" {
		return readable("initramfs", path)
	}
	return find("initramfs", "initramfs.cpio")
}

// FindInit returns the /init that came with wsl2 as a program of the host's, for distros of version 1.
func FindInit() (string, error) { return find("wsl2-init", "wsl2-init") }

// FindSSH returns the wsl2-ssh that came with wsl2.
func FindSSH() (string, error) { return find("wsl2-ssh", "wsl2-ssh") }

// FindVerbs returns the wsl2-verbs that came with wsl2.
func FindVerbs() (string, error) { return find("wsl2-verbs", "wsl2-verbs") }

// FindFetch returns wsl2-fetch, which came with wsl2.
func FindFetch() (string, error) { return find("wsl2-fetch", "wsl2-fetch") }

// FindFiles returns wsl2-files, which came with wsl2.
func FindFiles() (string, error) { return find("wsl2-files", "wsl2-files") }

// FindNet returns wsl2-net, which came with wsl2.
func FindNet() (string, error) { return find("wsl2-net", "wsl2-net") }

// find looks beside the executable, in ../lib/wsl2 as seen from there, and
// in /usr/lib/wsl2.
func find(what, name string) (string, error) {
	var tried []string
	for _, dir := range libDirs() {
		path := filepath.Join(dir, name)
		if _, err := os.Stat(path); err == nil {
			return readable(what, path)
		}
		tried = append(tried, path)
	}
	return "", fmt.Errorf("no %s found (looked for %s)", what, strings.Join(tried, ", "))
}

func libDirs() []string {
	dirs := []string{"/usr/lib/wsl2"}
	if exe, err := os.Executable(); err == nil {
		// A binary that was replaced while it runs is "... (deleted)".
		dir := filepath.Dir(strings.TrimSuffix(exe, " (deleted)"))
		dirs = append([]string{dir, filepath.Join(filepath.Dir(dir), "lib", "wsl2")}, dirs...)
	}
	return dirs
}

func readable(what, path string) (string, error) {
	f, err := os.Open(path)
	if err != nil {
		return "", fmt.Errorf("%s: %w", what, err)
	}
	defer f.Close()
	st, err := f.Stat()
	switch {
	case err != nil:
		return "", fmt.Errorf("%s: %w", what, err)
	case !st.Mode().IsRegular():
		return "", fmt.Errorf("%s %s is not a file", what, path)
	case st.Size() == 0:
		return "", fmt.Errorf("%s %s is empty", what, path)
	}
	return path, nil
}
