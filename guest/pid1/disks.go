package pid1

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/moby/sys/mount"
	"github.com/moby/sys/mountinfo"
	"golang.org/x/sys/unix"

	"github.com/wsl2/wsl2/guest/distro"
	"github.com/wsl2/wsl2/internal/wire"
)

// This file is the disks that no distro runs from, which distros share: `wsl2 --mount`.

// mountDisk mounts a disk for all distros, or makes nodes for it.
func (v *vm) mountDisk(m *wire.MountDisk) *wire.Reply {
	device, err := distro.Device(m.Slot)
	if err != nil {
		return refused("%v", err)
	}
	v.setUp()
	v.sharedMu.Lock()
	defer v.sharedMu.Unlock()
	// Here: what is mounted before releaseAll has sharedMu, it unmounts.
	v.mu.Lock()
	stopping := v.stopping
	v.mu.Unlock()
	if stopping {
		return refused("the VM is shutting down")
	}
	if !v.shared[m.Slot] {
		if r := checkDisk(device); r != nil {
			return r
		}
		// What the kernel knows of the slot may be of the disk before: its partitions are.
		if err := distro.Reprobe(device); err != nil {
			return failed(wire.CodeDisk, err)
		}
		v.shared[m.Slot] = true
	}
	var at string
	if m.Name == "" {
		at, err = makeNodes(device)
	} else {
		at, err = mountShared(device, m)
	}
	if err != nil {
		return failed(wire.CodeDisk, err)
	}
	return &wire.Reply{Text: at}
}

// mountShared mounts what the request says on a directory of Shared. Users of
// distros may write there: what they put in the directory's place is not followed.
func mountShared(device string, m *wire.MountDisk) (string, error) {
	if m.Name == "." || m.Name == ".." || strings.ContainsAny(m.Name, "/\x00") || m.Name == filepath.Base(distro.SharedDev) {
		return "", fmt.Errorf("%q cannot be a directory of %s", m.Name, distro.Shared)
	}
	source := device
	if m.Partition != 0 {
		source = fmt.Sprint(device, m.Partition)
		if _, err := os.Stat(source); err != nil {
			return "", fmt.Errorf("the disk has no partition %d", m.Partition)
		}
	}
	dir := filepath.Join(distro.Shared, m.Name)
	made := unix.Mkdir(dir, 0o755) == nil
	fd, err := unix.Open(dir, unix.O_PATH|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err != nil {
		return "", &os.PathError{Op: "open", Path: dir, Err: err}
	}
	defer unix.Close(fd)
	target := fmt.Sprint("/proc/self/fd/", fd)
	var here, above unix.Stat_t
	if err = errors.Join(unix.Fstat(fd, &here), unix.Stat(distro.Shared, &above)); err == nil && here.Dev != above.Dev {
		err = fmt.Errorf("something is mounted at %s already; choose another name", dir)
	}
	if err == nil {
		err = distro.ExplainMount(source, func() error { return mountAny(source, target, m.FSType, m.Options) })
	}
	if err != nil {
		if made {
			unix.Rmdir(dir) //nolint:errcheck // an empty directory is no harm
		}
		return "", err
	}
	return dir, nil
}

// mountAny mounts source as fsType or, without one, as the first type that the
// kernel accepts, which is what it does for its own root.
func mountAny(source, target, fsType, options string) error {
	if fsType != "" {
		return mount.Mount(source, target, fsType, options)
	}
	list, err := os.ReadFile("/proc/filesystems")
	if err != nil {
		return err
	}
	types := []string{"ext4"} // before ext2, which the same driver serves
	for line := range strings.Lines(string(list)) {
		if name, ok := strings.CutPrefix(strings.TrimSuffix(line, "\n"), "\t"); ok && name != "ext4" { // no nodev
			types = append(types, name)
		}
	}
	for _, t := range types {
		// EINVAL: not of this type, or options that it does not have.
		if err := mount.Mount(source, target, t, options); !errors.Is(err, unix.EINVAL) {
			return err
		}
	}
	return fmt.Errorf("%s holds no file system that this kernel can mount with these options (%s)", source, strings.Join(types, ", "))
}

// blockDevices returns the names of a disk and its partitions with their numbers.
func blockDevices(device string) (map[string]uint64, error) {
	disk := filepath.Join("/sys/block", filepath.Base(device))
	files, err := filepath.Glob(filepath.Join(disk, filepath.Base(device)+"*", "dev"))
	if err != nil {
		return nil, err
	}
	numbers := map[string]uint64{}
	for _, f := range append(files, filepath.Join(disk, "dev")) {
		text, err := os.ReadFile(f)
		if err != nil {
			return nil, err
		}
		var major, minor uint32
		if _, err := fmt.Sscanf(string(text), "%d:%d", &major, &minor); err != nil {
			return nil, fmt.Errorf("%s: %q: %w", f, text, err)
		}
		numbers[filepath.Base(filepath.Dir(f))] = unix.Mkdev(major, minor)
	}
	return numbers, nil
}

// makeNodes makes the nodes of a disk and its partitions; it returns the disk's.
func makeNodes(device string) (string, error) {
	numbers, err := blockDevices(device)
	if err != nil {
		return "", err
	}
	dir, err := unix.Open(distro.SharedDev, unix.O_PATH|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err != nil {
		return "", &os.PathError{Op: "open", Path: distro.SharedDev, Err: err}
	}
	defer unix.Close(dir)
	for name, number := range numbers {
		if err := unix.Mknodat(dir, name, unix.S_IFBLK|0o600, int(number)); err != nil && err != unix.EEXIST {
			return "", fmt.Errorf("make %s/%s: %w", distro.SharedDev, name, err)
		}
	}
	return filepath.Join(distro.SharedDev, filepath.Base(device)), nil
}

// releaseDisk undoes every MountDisk of a slot, those that failed included.
func (v *vm) releaseDisk(slot int32) *wire.Reply {
	device, err := distro.Device(slot)
	if err != nil {
		return refused("%v", err)
	}
	v.mu.Lock()
	for _, d := range v.distros {
		if d.slot == slot {
			v.mu.Unlock()
			return refused("distro %s runs from disk slot %d", d.name, slot)
		}
	}
	v.mu.Unlock()
	v.sharedMu.Lock()
	defer v.sharedMu.Unlock()
	numbers, err := blockDevices(device)
	if err == nil {
		err = unshare(device, true)
	}
	if err == nil {
		err = distro.Released(device)
	}
	if err != nil {
		return failed(wire.CodeBusy, err)
	}
	for name := range numbers {
		unix.Unlink(filepath.Join(distro.SharedDev, name)) //nolint:errcheck // most have none
	}
	delete(v.shared, slot)
	return &wire.Reply{}
}

// releaseAll releases all disks before the VM ends.
func (v *vm) releaseAll() {
	v.sharedMu.Lock()
	var slots []int32
	for slot := range v.shared {
		slots = append(slots, slot)
	}
	v.sharedMu.Unlock()
	for _, slot := range slots {
		if r := v.releaseDisk(slot); r.Code != wire.CodeOK {
			v.log.Errorf("disk in slot %d: %s", slot, r.Text)
		}
	}
}

// unshare unmounts whatever is mounted from the disk or its partitions below Shared,
// for everybody, and removes the directories if they are ours: those of disks that
// the host attached.
func unshare(device string, ours bool) error {
	flags := unix.UMOUNT_NOFOLLOW
	if !ours {
		flags |= unix.MNT_DETACH // what a distro bound there from its own disk
	}
	numbers, err := blockDevices(device)
	if err != nil {
		return err
	}
	devices := map[uint64]bool{}
	for _, n := range numbers {
		devices[n] = true
	}
	below, err := mountinfo.GetMounts(mountinfo.PrefixFilter(distro.Shared))
	if err != nil {
		return err
	}
	slices.Reverse(below) // what lies above was mounted later
	for _, m := range below {
		if !devices[unix.Mkdev(uint32(m.Major), uint32(m.Minor))] {
			continue
		}
		if err := unix.Unmount(m.Mountpoint, flags); err != nil {
			return fmt.Errorf("unmount %s: %w", m.Mountpoint, err)
		}
		if ours && filepath.Dir(m.Mountpoint) == distro.Shared {
			unix.Rmdir(m.Mountpoint) //nolint:errcheck // it may hold something of a user's
		}
	}
	return nil
}
