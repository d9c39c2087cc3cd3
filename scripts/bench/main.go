// Command bench runs the benchmarks inside the rig (package inside) and prints
// what they found. `scripts/bench/run` starts it.
package main

import (
	"errors"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"

	"github.com/u-root/u-root/pkg/cpio"

	"github.com/wsl2/wsl2/scripts/bench/report"
)

var topics = []string{"boot", "monitors", "warm", "memory", "block", "vsock", "distros", "console", "network", "files", "version1"}

// resultDir is where the program inside the rig leaves its figures.
const resultDir = "/bench"

var (
	verbose = flag.Bool("v", false, "show what is under way, and traces")
	from    = flag.String("from", "out", "directory of what make build and scripts/kernel --bzimage make")
	full    = flag.Bool("full", false, "whole sizes where a tenth is the rule: a root of 500 MB, 100 MB on a terminal (takes an hour)")
	only    = flag.String("only", "", "of topic files, measure only the file systems whose names match (REGEXP)")
	limit   = flag.String("timeout", "30m", "how long one topic may take")
)

func main() {
	flag.Usage = func() {
		fmt.Fprintf(os.Stderr, "usage: scripts/bench/run [-v] [-full] [-only REGEXP] [-timeout TIME] [-from DIR] [TOPIC...]\ntopics: %s\n", strings.Join(topics, " "))
	}
	flag.Parse()
	if err := run(flag.Args()); err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(1)
	}
}

func run(chosen []string) error {
	if len(chosen) == 0 {
		chosen = topics
	}
	for _, t := range chosen {
		if !slices.Contains(topics, t) {
			return fmt.Errorf("unknown topic %q (%s)", t, strings.Join(topics, ", "))
		}
	}
	for _, f := range []string{"wsl2", "wsl2-verbs", "wsl2-net", "wsl2-files", "vmlinux", "bzImage", "initramfs.cpio"} {
		if _, err := os.Stat(filepath.Join(*from, f)); err != nil {
			return fmt.Errorf("%w; run make build", err)
		}
	}
	tmp, err := os.MkdirTemp("", "wsl2-bench-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(tmp)
	for name, pkg := range map[string]string{"inside": "./scripts/bench/inside", "guest": "./scripts/bench/guest", "monitor": "./scripts/bench/monitor", "gokvm": "github.com/bobuhiro11/gokvm"} {
		build := exec.Command("go", "build", "-trimpath", "-ldflags=-s -w", "-o", filepath.Join(tmp, name), pkg)
		build.Env = append(os.Environ(), "CGO_ENABLED=0")
		build.Stderr = os.Stderr
		if err := build.Run(); err != nil {
			return fmt.Errorf("build %s: %w", pkg, err)
		}
	}
	if err := bareInitramfs(filepath.Join(tmp, "bare.cpio"), filepath.Join(tmp, "guest")); err != nil {
		return err
	}
	// One rig for each topic: a topic leaves nothing for the next.
	var failed []error
	for _, t := range chosen {
		rows, err := measure(tmp, t)
		if err != nil {
			failed = append(failed, fmt.Errorf("topic %s: %w", t, err))
			continue
		}
		report.Print(os.Stdout, t, rows)
		if err := report.Write("out/bench", t, rows); err != nil {
			failed = append(failed, err)
		}
	}
	return errors.Join(failed...)
}

// measure runs one topic inside the rig.
func measure(tmp, topic string) ([]report.Row, error) {
	memory := "3072"
	if *full { // files are in memory there
		memory = "8192"
	}
	args := []string{
		"--icount", "--no-stdin", "--memory", memory, "--timeout", *limit,
		"--file", abs(filepath.Join(*from, "wsl2")) + ":/rig/wsl2", "--file", abs(filepath.Join(*from, "wsl2-verbs")) + ":/rig/wsl2-verbs", "--file", abs(filepath.Join(*from, "wsl2-net")) + ":/rig/wsl2-net", "--file", abs(filepath.Join(*from, "vmlinux")) + ":/rig/vmlinux", "--file", abs(filepath.Join(*from, "initramfs.cpio")) + ":/rig/initramfs.cpio",
		"--file", filepath.Join(tmp, "guest") + ":/rig/guest",
		"--file", filepath.Join(tmp, "monitor") + ":/rig/monitor", "--file", filepath.Join(tmp, "gokvm") + ":/rig/gokvm",
		"--file", abs(filepath.Join(*from, "bzImage")) + ":/rig/bzImage", "--file", filepath.Join(tmp, "bare.cpio") + ":/rig/bare.cpio",
		"--bin", "qemu-system-x86_64", "--bin", "mke2fs", "--bin", "busybox", "--bin", "mkfs.xfs", "--module", "xfs",
		"--env", "GODEBUG=", "--env", "GOTRACEBACK=",
		"--get", resultDir + ":" + tmp,
	}
	if topic == "console" {
		for _, p := range []string{"ssh", "ssh-keygen", "dropbear", "dropbearkey"} {
			args = append(args, "--bin", p)
		}
	}
	if topic == "network" {
		args = append(args, "--module", "veth")
		for _, p := range []string{"ip", "passt", "passt.avx2", "slirp4netns"} {
			args = append(args, "--bin", p)
		}
	}
	if topic == "version1" {
		args = append(args, "--file", abs(filepath.Join(*from, "wsl2-init"))+":/rig/wsl2-init", "--bin", "/bin/sh", "--bin", "/usr/bin/true:/rig/bin/dynamic")
		for _, p := range []string{"bash", "git", "unshare", "newuidmap", "newgidmap", "mount", "pivot_root", "mkdir", "rm"} {
			args = append(args, "--bin", p)
		}
	}
	if topic == "files" {
		args = append(args, "--file", abs(filepath.Join(*from, "wsl2-files"))+":/rig/wsl2-files")
		for _, p := range []string{"git", "diod", "sshfs", "ssh", "ssh-keygen", "dropbear", "dropbearkey", "/usr/lib/qemu/virtiofsd", "/usr/lib/openssh/sftp-server"} {
			args = append(args, "--bin", p)
		}
	}
	firmware, err := qemuFirmware()
	if err != nil {
		return nil, err
	}
	for _, f := range firmware {
		args = append(args, "--file", f)
	}
	args = append(args, "--", filepath.Join(tmp, "inside"))
	if *verbose {
		args = append(args, "-v")
	}
	if *full {
		args = append(args, "-full")
	}
	if *only != "" {
		args = append(args, "-only", *only)
	}
	args = append(args, resultDir, topic)
	rig := exec.Command("scripts/rig", args...)
	rig.Stdout, rig.Stderr = os.Stderr, os.Stderr
	if err := rig.Run(); err != nil {
		return nil, fmt.Errorf("scripts/rig: %w", err)
	}
	return report.Read(tmp, topic)
}

// bareInitramfs writes an initramfs of one program.
func bareInitramfs(path, program string) (err error) {
	text, err := os.ReadFile(program)
	if err != nil {
		return err
	}
	f, err := os.Create(path)
	if err != nil {
		return err
	}
	w := cpio.Newc.Writer(f)
	err = cpio.WriteRecords(w, []cpio.Record{
		cpio.Directory("dev", 0o755), cpio.CharDev("dev/console", 0o600, 5, 1), cpio.CharDev("dev/kmsg", 0o600, 1, 11), cpio.CharDev("dev/null", 0o666, 1, 3),
		cpio.StaticFile("init", string(text), 0o755),
	})
	return errors.Join(err, cpio.WriteTrailer(w), f.Close())
}

// qemuFirmware lists the files that QEMU's microvm loads: the firmware that
// enters a PVH kernel, wherever this QEMU looks for it.
func qemuFirmware() ([]string, error) {
	var files []string
	for _, dir := range []string{"/usr/share/qemu", "/usr/share/seabios", "/usr/lib/ipxe/qemu"} {
		for _, name := range []string{"bios-microvm.bin", "qboot.rom", "pvh.bin", "linuxboot_dma.bin"} {
			if p := filepath.Join(dir, name); exists(p) {
				files = append(files, p)
			}
		}
	}
	if len(files) == 0 {
		return nil, errors.New("QEMU's firmware for microvm is missing; install qemu-system-x86")
	}
	return files, nil
}

func exists(path string) bool { _, err := os.Stat(path); return err == nil }

func abs(path string) string {
	p, err := filepath.Abs(path)
	if err != nil {
		panic(err) // no working directory
	}
	return p
}
