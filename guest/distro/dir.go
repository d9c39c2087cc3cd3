package distro

import (
	"errors"
	"fmt"
	"os"

	"golang.org/x/sys/unix"

	"github.com/wsl2/wsl2/guest/mounts"
	"github.com/wsl2/wsl2/guest/shares"
	"github.com/wsl2/wsl2/internal/hostpath"
	"github.com/wsl2/wsl2/internal/wire"
	"github.com/wsl2/wsl2/internal/wslconf"
)

// This file is version 1: a distro whose root is a directory of the host, in namespaces of the
// host's own kernel (package native).

const binfmtMisc = "/proc/sys/fs/binfmt_misc"

// What package native has mounted in the working directory, with the shares (Argv0).
const (
	StagedRoot = "root" // the distro's
	StagedInit = "init" // /init, the file
)

// Pivot makes a directory, with what is mounted below it, the root, and lets go of the old one.
func Pivot(dir string) error {
	// As a mount that this namespace has made: one that comes with it is locked to its place.
	tree, err := openTree(dir)
	if err != nil {
		return err
	}
	defer unix.Close(tree)
	if err := unix.MoveMount(tree, "", unix.AT_FDCWD, dir, unix.MOVE_MOUNT_F_EMPTY_PATH); err != nil {
		return fmt.Errorf("mount the new root: %w", err)
	}
	old, err := unix.Open("/", unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("open the host's root: %w", err)
	}
	defer unix.Close(old)
	if err := unix.Fchdir(tree); err != nil {
		return fmt.Errorf("enter the new root: %w", err)
	}
	// Onto itself: the old root then lies over the new one, and no directory for it is needed. Until it is
	// detached no path may be followed: ".." of the root leads to it.
	if err := unix.PivotRoot(".", "."); err != nil {
		return fmt.Errorf("change root: %w", err)
	}
	if err := unix.Fchdir(old); err != nil {
		return fmt.Errorf("enter the host's root: %w", err)
	}
	if err := unix.Unmount(".", unix.MNT_DETACH); err != nil {
		return fmt.Errorf("detach the host's root: %w", err)
	}
	if err := unix.Chdir("/"); err != nil {
		return fmt.Errorf("enter the new root: %w", err)
	}
	return nil
}

// takeHostParts takes hold of what a root has of the host's, in the order in which it is placed.
func takeHostParts() (table []mounts.Item, err error) {
	var errs []error
	// The kernel gives a new proc to whom it shows one already.
	proc, err := hostProc.Take(noSuidDevExec)
	if errs = append(errs, err); err == nil {
		table = append(table, proc)
	}
	take := func(b mounts.Bind) {
		t, ok, err := b.Take()
		if errs = append(errs, err); ok {
			table = append(table, t)
		}
	}
	take(lockedSys)
	table = append(table, dirRoot...)
	for _, b := range hostNodes {
		take(b)
	}
	return append(table, dirLast...), errors.Join(errs...)
}

// makeDirRoot makes the root out of StagedRoot and reads its wsl.conf. places are those of the shares, as Argv0 has them.
func (d *distro) makeDirRoot(m *wire.StartDistro, places []string) error {
	d.dir = true
	unix.Umask(0o022)
	init, initErr := openTree(StagedInit)
	resolvConf, resolvErr := os.ReadFile("/etc/resolv.conf")
	table, takeErr := takeHostParts()
	trees := make([]int, len(places))
	for i, place := range places {
		trees[i] = -1
		if place == "" {
			continue
		}
		var err error
		if trees[i], err = openTree(place); err != nil {
			return err
		}
	}
	if err := Pivot(StagedRoot); err != nil {
		return err
	}
	// One thing that cannot be mounted must not lock the user out of the rest.
	if err := errors.Join(takeErr, mounts.All(table)); err != nil {
		d.log.Errorf("%s: %v", d.name, err)
	}
	// Each user namespace has formats of its own since Linux 6.7; before, the host's hold.
	_ = unix.Mount("binfmt_misc", binfmtMisc, "binfmt_misc", mounts.NoSuidDevExec, "")
	// Container engines bind-mount with propagation and need a shared root. No earlier: what is bound from
	// the host's root would be its peer, and lose with it what is mounted on top.
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_SHARED, ""); err != nil {
		return fmt.Errorf("share the new root: %w", err)
	}
	if initErr == nil {
		initErr = installTools(init)
	}
	if initErr == nil && exists(binfmtMisc+"/register") {
		initErr = mounts.Value{Path: binfmtMisc + "/register", Value: BinfmtMZ}.Make()
	}
	if initErr != nil {
		d.log.Errorf("%s: no tools: %v", d.name, initErr)
	}
	if resolvErr == nil {
		resolvErr = os.WriteFile(hostResolvConf, append([]byte(GeneratedBy("generateResolvConf")), resolvConf...), 0o644)
	}
	if resolvErr != nil && !errors.Is(resolvErr, os.ErrNotExist) {
		d.log.Errorf("%s: the host's name servers: %v", d.name, resolvErr)
	}
	if err := d.configure(m); err != nil {
		return err
	}
	if d.conf.Systemd {
		d.warnings = append(d.warnings, fmt.Sprintf("boot.systemd in %s needs a kernel of its own and is ignored in version 1: wsl2 --set-version %s 2", wslconf.Path, m.Name))
	}
	return d.placeShares(m.Shares, trees)
}

// placeShares mounts the host's directories, which are there from the start: no connection is
// opened and no process started for them, as in a VM.
func (d *distro) placeShares(list []wire.Share, trees []int) error {
	d.shares = shares.Start(shares.Config{})
	if len(trees) != len(list) {
		return fmt.Errorf("%d mounts came for %d shares", len(trees), len(list))
	}
	var table hostpath.Table
	for i, s := range list {
		wanted := narrowed([]wire.Share{s}, &d.conf)
		if len(wanted) == 0 {
			unix.Close(trees[i])
			continue
		}
		s = wanted[0]
		tree := mounts.Tree{FD: trees[i], Target: s.Guest}
		if s.ReadOnly { // for the distro alone, if package native has not done it
			tree.Attributes = unix.MOUNT_ATTR_RDONLY
		}
		if err := tree.Make(); err != nil {
			d.log.Errorf("%s: share %s: %v", d.name, s.Guest, err)
			d.warnings = append(d.warnings, fmt.Sprintf("%s of the host cannot be shared with a distro of version 1 and is missing in it", s.Host))
			continue
		}
		table = append(table, hostpath.Share{Host: s.Host, Guest: s.Guest})
	}
	if len(table) == 0 {
		return nil
	}
	return os.WriteFile(hostpath.SharesFile, []byte(table.String()), 0o644)
}
