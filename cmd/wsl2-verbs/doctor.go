package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strings"

	"github.com/wsl2/wsl2/images"
	"github.com/wsl2/wsl2/launcher/config"
	"github.com/wsl2/wsl2/launcher/native"
	"github.com/wsl2/wsl2/launcher/registry"
	"github.com/wsl2/wsl2/vmm/kvm"
	"github.com/wsl2/wsl2/vmm/qemu"
)

// check is one thing that wsl2 needs.
type check struct {
	Name   string `json:"name"`
	OK     bool   `json:"ok"`
	Detail string `json:"detail"`         // what was found, or what is wrong
	Next   string `json:"next,omitempty"` // what to do
}

// accelChecks say what can run a VM here.
type accelChecks struct{ kvm, qemu check }

// checkAccel probes KVM by running a guest of a few instructions, and looks for
// QEMU.
func checkAccel(ctx context.Context) accelChecks {
	a := accelChecks{
		kvm:  check{Name: "KVM", OK: true, Detail: kvm.Device + " runs guests"},
		qemu: check{Name: "QEMU"},
	}
	if err := kvm.Probe(ctx); err != nil {
		a.kvm.OK = false
		a.kvm.Detail, a.kvm.Next = kvmReason(err)
	}
	if path, err := exec.LookPath(qemu.Program); err == nil {
		a.qemu.OK, a.qemu.Detail = true, path
	} else {
		a.qemu.Detail, a.qemu.Next = qemu.Program+" is not installed", "apt-get install qemu-system-x86"
	}
	return a
}

// kvmReason splits the probe's error into what is wrong and what to do.
func kvmReason(err error) (reason, next string) {
	text := strings.TrimPrefix(err.Error(), "kvm: ")
	if !strings.Contains(text, kvm.Device) {
		text = kvm.Device + ": " + text
	}
	reason, next, _ = strings.Cut(text, ": ")
	if reason == kvm.Device {
		reason, next = text, ""
	}
	if next == "" && errors.Is(err, kvm.ErrUnusable) {
		next = "nothing on this host: it is itself a VM whose KVM is incomplete; ask its provider for nested virtualisation"
	}
	return reason, next
}

// doctor prints all checks. Its status is 0 if commands can run here, by
// whatever means.
func doctor(c *command) error {
	accel := checkAccel(c.app.ctx)
	if c.Bool("kvm") {
		if !accel.kvm.OK {
			c.app.status = 1
		}
		if c.Bool("json") {
			return c.json(accel.kvm)
		}
		fmt.Fprintln(c.app.out, accel.kvm.Detail)
		return nil
	}
	// Without KVM QEMU has to be there, with it QEMU is of no need.
	checks := []check{accel.kvm, accel.qemu}
	usable := accel.kvm.OK || accel.qemu.OK
	must := hostChecks()
	for _, m := range must {
		usable = usable && m.OK
	}
	checks = append(checks, must...)
	version1, nativeOK := nativeChecks()
	checks = append(checks, version1...)
	used := "kvm"
	switch {
	case accel.kvm.OK:
	case accel.qemu.OK:
		used = "tcg"
	default:
		used = "none"
	}
	if !usable {
		c.app.status = 1
	}
	if c.Bool("json") {
		return c.json(struct {
			Usable bool   `json:"usable"`
			Accel  string `json:"accel"`
			// Version1: distros of version 1 can run as well.
			Version1 bool    `json:"version1"`
			Checks   []check `json:"checks"`
		}{usable, used, nativeOK, checks})
	}
	w := c.app.out
	for _, k := range checks {
		mark := "ok  "
		if !k.OK {
			mark = "FAIL"
			if k.Name == "KVM" && accel.qemu.OK || k.Name == "QEMU" && accel.kvm.OK || strings.HasPrefix(k.Name, version1Check) {
				mark = "--  "
			}
		}
		fmt.Fprintf(w, "%s  %-14s %s\n", mark, k.Name, k.Detail)
		if k.Next != "" {
			fmt.Fprintf(w, "      %-14s next: %s\n", "", k.Next)
		}
	}
	switch {
	case !usable:
		fmt.Fprintln(w, "\nwsl2 cannot run VMs here until what failed is repaired.")
	case used == "tcg":
		fmt.Fprintf(w, "\n%s.\n", tcgNotice(accel.kvm.Detail))
	default:
		fmt.Fprintln(w, "\nVMs run on KVM.")
	}
	if nativeOK {
		fmt.Fprintln(w, "Distros of version 1 run here.")
	} else {
		fmt.Fprintln(w, "Distros of version 1 do not run here.")
	}
	return nil
}

// version1Check begins the names of the checks for version 1, which nobody needs who has VMs.
const version1Check = "1: "

// nativeChecks are those of version 1, and whether it can run.
func nativeChecks() (list []check, ok bool) {
	init, err := config.FindInit()
	if err != nil {
		return []check{{Name: version1Check + "init", Detail: err.Error(), Next: "`make build` makes it beside wsl2"}}, false
	}
	ok = true
	for _, c := range native.Checks(init) {
		list = append(list, check{Name: version1Check + c.Name, OK: c.Next == "", Detail: c.Detail, Next: c.Next})
		ok = ok && c.Next == ""
	}
	return list, ok
}

// lowSpace is where doctor calls the disk full.
const lowSpace = 1 << 30

// hostChecks are those that every accelerator needs.
func hostChecks() []check {
	paths, err := config.FromEnv(os.Getenv, os.Getuid())
	if err != nil {
		return []check{{Name: "directories", Detail: err.Error()}}
	}
	settings, warnings := config.Load(paths.ConfigFile, config.ThisHost())
	found := func(name, path string, err error, next string) check {
		if err != nil {
			return check{Name: name, Detail: err.Error(), Next: next}
		}
		return check{Name: name, OK: true, Detail: path}
	}
	kernel, _, kerr := config.FindKernel(settings.Kernel, os.Getenv)
	initramfs, ierr := config.FindInitramfs(os.Getenv)
	mke2fs, merr := images.FindMke2fs()
	list := []check{
		found("kernel", kernel, kerr, config.KernelHint),
		found("initramfs", initramfs, ierr, config.KernelHint),
		found("mke2fs", mke2fs, merr, ""),
		{Name: "runtime", OK: true, Detail: paths.Runtime},
	}
	space := check{Name: "disk space"}
	if free, at, err := images.FreeSpace(paths.Data); err != nil {
		space.Detail = err.Error()
	} else {
		space.OK = free >= lowSpace
		space.Detail = fmt.Sprintf("%d GiB free at %s", free>>30, at)
		if !space.OK {
			space.Next = "free some, or set XDG_DATA_HOME to another file system"
		}
	}
	list = append(list, space)
	reg := check{Name: "registry", OK: true, Detail: orNone(paths.Registry())}
	if _, err := registry.Open(paths.Registry()); err != nil {
		reg.OK, reg.Detail = false, err.Error()
	}
	list = append(list, reg)
	conf := check{Name: "wslconfig", OK: true, Detail: orNone(paths.ConfigFile)}
	if len(warnings) > 0 {
		conf.Detail = strings.Join(warnings, "; ") // wrong keys are ignored, hence no failure
	}
	return append(list, conf)
}

// orNone says so of a file that is not there, which is no failure.
func orNone(path string) string {
	if _, err := os.Stat(path); errors.Is(err, os.ErrNotExist) {
		return "none yet (" + path + ")"
	}
	return path
}
