// Command inside measures one topic, inside the rig: wsl2 as a user runs it, and
// beside it QEMU's microvm on the same KVM with the same kernel, initramfs and
// disk, driven by the same messages.
//
//	inside [-v] [-full] [-only REGEXP] DIR TOPIC      writes DIR/TOPIC.json
package main

import (
	"flag"
	"fmt"
	"os"

	"github.com/wsl2/wsl2/scripts/bench/report"
)

// What the rig was given (scripts/bench/main.go).
const (
	wsl2Path      = "/rig/wsl2"
	guestPath     = "/rig/guest"
	busyboxPath   = "/rig/bin/busybox"
	qemuPath      = "/rig/bin/qemu-system-x86_64"
	kernelPath    = "/rig/vmlinux"
	initramfsPath = "/rig/initramfs.cpio"

	// Of topic monitors.
	monitorPath = "/rig/monitor"
	gokvmPath   = "/rig/gokvm"
	bzImagePath = "/rig/bzImage"
	barePath    = "/rig/bare.cpio" // guestPath as /init
)

// The VM that is measured, ours and the peers'.
const (
	memoryMiB = 256
	vCPUs     = 1
)

const peerQEMU = "qemu-microvm"

var (
	verbose = flag.Bool("v", false, "show what is under way, and traces")
	full    = flag.Bool("full", false, "measure with files of the whole size, not a tenth")
	only    = flag.String("only", "", "of topic files, the file systems whose names match")
)

// scaled is n with -full.
func scaled(n int) int {
	if *full {
		return n
	}
	return n / 10
}

func logf(format string, a ...any) {
	if *verbose {
		fmt.Fprintf(os.Stderr, format+"\n", a...)
	}
}

func main() {
	flag.Parse()
	topics := map[string]func(*host) ([]report.Row, error){
		"boot": boot, "warm": warm, "memory": memory, "block": block, "vsock": vsock, "monitors": monitors, "distros": distros,
		"console": console, "network": network, "files": files, "version1": version1,
	}
	topic := topics[flag.Arg(1)]
	if topic == nil {
		fmt.Fprintln(os.Stderr, "usage: inside [-v] [-full] [-only REGEXP] DIR TOPIC")
		os.Exit(2)
	}
	err := func() error {
		h, err := newHost(flag.Arg(1))
		if err != nil {
			return err
		}
		rows, err := topic(h)
		if err != nil {
			return fmt.Errorf("%w\n%s", err, h.logs())
		}
		return report.Write(flag.Arg(0), flag.Arg(1), rows)
	}()
	if err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(1)
	}
}
