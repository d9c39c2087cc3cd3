package main

import (
	"context"
	"fmt"
	"io"
	"os"
	"strings"

	"github.com/wsl2/wsl2/launcher/netproc"
	"github.com/wsl2/wsl2/launcher/vmproc"
	"github.com/wsl2/wsl2/vmm"
)

// newMachine makes a VM of package vmm, which knows nothing of the launcher.
func newMachine(c vmproc.Config, console io.Writer, diskError func(slot int, err error)) (vmproc.Machine, error) {
	accel, err := vmm.ParseAccel(c.Accel)
	if err != nil {
		return nil, err
	}
	cfg := vmm.Config{
		Accel: accel, Verdict: c.Verdict, Kernel: c.Kernel, Initramfs: c.Initramfs, Cmdline: c.Cmdline,
		MemoryBytes: c.MemoryBytes, CPUs: c.CPUs, DiskSlots: c.DiskSlots, LateSlots: c.LateSlots,
		GuestCID: c.GuestCID, VsockPath: c.VsockPath, ConsoleLog: console, OnDiskError: diskError,
	}
	if n := c.Network; n != nil {
		cfg.Network = &vmm.Network{
			MAC: netproc.GuestMAC, MTU: netproc.MTU,
			Open:    func() (*os.File, error) { return netproc.Start(n) },
			OnError: func(err error) { fmt.Fprintf(os.Stderr, "wsl2: %v\n", err) },
		}
	}
	for _, path := range c.Disks {
		cfg.Disks = append(cfg.Disks, vmm.Disk{Path: path})
	}
	m, err := vmm.New(cfg)
	if err != nil {
		return nil, err
	}
	return machine{m}, nil
}

// machine is a vmproc.Machine.
type machine struct{ *vmm.Machine }

func (m machine) Wait(ctx context.Context) error {
	exit, err := m.Machine.Wait(ctx)
	if err != nil {
		return err
	}
	return exit.Err()
}

func (m machine) AttachDisk(ctx context.Context, path string) (int, error) {
	return m.Machine.AttachDisk(ctx, vmm.Disk{Path: path})
}

func (m machine) Accel() (name, reason string) {
	accel, reason := m.Machine.Accel()
	return accel.String(), strings.TrimPrefix(reason, "kvm: ")
}
