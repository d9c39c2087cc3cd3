// Command monitor is package vmm and nothing else: it boots a kernel, with its
// console on stdout, to be measured beside other monitors.
//
//	monitor KERNEL INITRAMFS MIB CPUS
package main

import (
	"context"
	"fmt"
	"os"
	"strconv"

	"github.com/wsl2/wsl2/vmm"
)

func main() {
	if err := run(os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, "monitor:", err)
		os.Exit(1)
	}
}

func run(args []string) error {
	if len(args) != 4 {
		return fmt.Errorf("usage: monitor KERNEL INITRAMFS MIB CPUS")
	}
	mib, err := strconv.ParseUint(args[2], 10, 32)
	if err != nil {
		return err
	}
	cpus, err := strconv.Atoi(args[3])
	if err != nil {
		return err
	}
	m, err := vmm.New(vmm.Config{
		Accel: vmm.AccelKVM, Kernel: args[0], Initramfs: args[1], MemoryBytes: mib << 20, CPUs: cpus, Cmdline: os.Getenv("WSL2_RIG_CMDLINE"),
		ConsoleLog: os.Stdout, Verdict: "/run/monitor.kvm",
	})
	if err != nil {
		return err
	}
	ctx := context.Background()
	if err := m.Start(ctx); err != nil {
		return err
	}
	exit, err := m.Wait(ctx)
	if err != nil {
		return err
	}
	return exit.Err()
}
