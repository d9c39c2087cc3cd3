package distro

import (
	"cmp"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/wsl2/wsl2/guest/kmsg"
)

// maxSlot is the last block slot with a one-letter name, /dev/vdz.
const maxSlot = 25

// Device returns the block device of a slot.
func Device(slot int32) (string, error) {
	if slot < 0 || slot > maxSlot {
		return "", fmt.Errorf("disk slot %d: there are slots 0 to %d", slot, maxSlot)
	}
	return fmt.Sprintf("/dev/vd%c", 'a'+rune(slot)), nil
}

// AttachedDisk makes sure that the kernel knows the disk that the host attached to
// device, and its size.
//
// For a slot that never had a disk there may be no device yet: plug makes it. A
// slot whose disk was detached is a device of capacity 0. When the capacity changes to
// or from 0 the kernel sends no uevent (set_capacity_and_notify: "Historically we
// did not send a uevent for changes to/from an empty device"), and the work that
// reads the new capacity runs whenever it is scheduled. So there is nothing to wait for;
// but binding the driver anew reads the capacity synchronously. That is only
// needed if we come before that work.
func AttachedDisk(device string) error {
	if err := plug(device); err != nil {
		return err
	}
	size, err := diskSize(device)
	if err != nil || size > 0 {
		return err
	}
	if err := Reprobe(device); err != nil {
		return err
	}
	if size, err = diskSize(device); err == nil && size == 0 {
		err = fmt.Errorf("%s: no disk is attached to the slot; attach it before it is used", device)
	}
	return err
}

// errNoSlot: there is no block device, and none could be registered.
var errNoSlot = errors.New("the VM has no such disk slot")

// mmioDevices lists the virtio-mmio devices that were named to the kernel. In our
// kernel it also takes further ones (kernelcfg/patches).
const mmioDevices = "/sys/module/virtio_mmio/parameters/device"

// Plug makes sure that a device is there which the command line may not have named: a disk
// of a slot, by its node, or the network card, by its directory in sysfs.
func Plug(path string) error { return plug(path) }

// plug registers the devices of slots that the command line did not name
// (vmm.Config.LateSlots) up to device, in the order in which the kernel gives out
// the letters.
//
// The network card is the first of these devices: whoever comes first, for a disk or for
// the card, makes it.
func plug(device string) error {
	if exists(device) {
		return nil
	}
	unlock, err := lockDisks()
	if err != nil {
		return err
	}
	defer unlock()
	for range 1 + maxSlot + 1 {
		if exists(device) {
			return nil
		}
		known, err := os.ReadFile(mmioDevices)
		if err != nil {
			return fmt.Errorf("find the place of %s on the bus: %w", device, err)
		}
		next, err := nextDevice(string(known))
		if err != nil {
			return fmt.Errorf("find the place of %s on the bus: %s: %w", device, mmioDevices, err)
		}
		if err := os.WriteFile(mmioDevices, []byte(next), 0); err != nil {
			return fmt.Errorf("%s: %w: register %s: %w", device, errNoSlot, next, err)
		}
	}
	return fmt.Errorf("%s: %w", device, errNoSlot)
}

// nextDevice returns the virtio_mmio.device= of the first page behind the first of
// the known ones that no device has: they are lines "SIZE@ADDRESS:IRQ:ID", disks one behind
// the other, and file systems behind the places of all disks. It shares the interrupt of the one before it.
func nextDevice(known string) (string, error) {
	devices, err := parseDevices(known)
	if err != nil {
		return "", err
	}
	last := devices[0]
	for _, d := range devices[1:] {
		if d.address == last.address+last.size {
			last = d
		}
	}
	hex := func(n uint64) string { return "0x" + strconv.FormatUint(n, 16) }
	return hex(last.size) + "@" + hex(last.address+last.size) + ":" + strconv.FormatUint(last.irq, 10), nil
}

// mmioDevice is one on the bus.
type mmioDevice struct {
	size, address, irq uint64
}

// parseDevice reads "SIZE@ADDRESS:IRQ" and what may follow. Not by fmt.Sscanf, which takes its
// time: a cold start goes through here.
func parseDevice(s string) (d mmioDevice, err error) {
	size, rest, _ := strings.Cut(s, "@")
	address, rest, _ := strings.Cut(rest, ":")
	irq, _, _ := strings.Cut(rest, ":")
	var errs [3]error
	d.size, errs[0] = strconv.ParseUint(size, 0, 64)
	d.address, errs[1] = strconv.ParseUint(address, 0, 64)
	d.irq, errs[2] = strconv.ParseUint(irq, 10, 32)
	return d, errors.Join(errs[:]...)
}

// parseDevices reads what mmioDevices says, in the order of addresses.
func parseDevices(known string) (list []mmioDevice, err error) {
	for _, line := range strings.Fields(strings.TrimRight(known, "\x00")) { // which the kernel counts
		d, err := parseDevice(line)
		if err != nil {
			return nil, fmt.Errorf("%q is no device: %w", line, err)
		}
		list = append(list, d)
	}
	if len(list) == 0 {
		return nil, errors.New("it names no device")
	}
	slices.SortFunc(list, func(a, b mmioDevice) int { return cmp.Compare(a.address, b.address) })
	return list, nil
}

// RegisterDevice tells the kernel of a device that the command line did not name, in
// virtio_mmio.device='s terms, unless it knows one of that address.
func RegisterDevice(device string) error {
	unlock, err := lockDisks()
	if err != nil {
		return err
	}
	defer unlock()
	_, rest, _ := strings.Cut(device, "@")
	rest, _, _ = strings.Cut(rest, ":")
	address, err := strconv.ParseUint(rest, 0, 64)
	if err != nil {
		return fmt.Errorf("register %q: %w", device, err)
	}
	known, err := os.ReadFile(mmioDevices)
	if err != nil {
		return fmt.Errorf("register %s: %w", device, err)
	}
	devices, err := parseDevices(string(known))
	if err != nil {
		return fmt.Errorf("register %s: %s: %w", device, mmioDevices, err)
	}
	if slices.ContainsFunc(devices, func(d mmioDevice) bool { return d.address == address }) {
		return nil
	}
	if err := os.WriteFile(mmioDevices, []byte(device), 0); err != nil {
		return fmt.Errorf("register %s: %w", device, err)
	}
	return nil
}

func exists(path string) bool {
	var st unix.Stat_t
	return unix.Lstat(path, &st) == nil
}

// lockDisks keeps all of our processes from making and unmaking block devices at
// the same moment: a device gets the letter of its slot only if no other one is
// missing then.
func lockDisks() (unlock func(), err error) {
	lock, err := unix.Open(MountPoint, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("open %s: %w", MountPoint, err)
	}
	if err := unix.Flock(lock, unix.LOCK_EX); err != nil {
		unix.Close(lock)
		return nil, fmt.Errorf("lock %s: %w", MountPoint, err)
	}
	return func() { unix.Close(lock) }, nil
}

// Reprobe binds the driver of a device anew, which reads its capacity again.
// Nothing may have the device open.
func Reprobe(device string) error {
	unlock, err := lockDisks()
	if err != nil {
		return err
	}
	defer unlock()
	link, err := os.Readlink("/sys/block/" + filepath.Base(device) + "/device")
	if err != nil {
		return fmt.Errorf("find the device of %s: %w", device, err)
	}
	const driver = "/sys/bus/virtio/drivers/virtio_blk/"
	for _, step := range []string{"unbind", "bind"} {
		if err := os.WriteFile(driver+step, []byte(filepath.Base(link)), 0); err != nil {
			return fmt.Errorf("%s %s: %w", step, device, err)
		}
	}
	return nil
}

// diskSize returns a block device's size in bytes.
func diskSize(device string) (uint64, error) {
	fd, err := unix.Open(device, unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		if errors.Is(err, unix.ENOENT) {
			return 0, fmt.Errorf("%s: %w", device, errNoSlot)
		}
		return 0, fmt.Errorf("open %s: %w", device, err)
	}
	defer unix.Close(fd)
	sectors, err := unix.IoctlGetInt(fd, unix.BLKGETSIZE) // unsigned long, in 512-byte sectors
	if err != nil {
		return 0, fmt.Errorf("size of %s: %w", device, err)
	}
	return uint64(sectors) * 512, nil
}

// ErrInUse means that a file system of the device is mounted.
var ErrInUse = errors.New("the disk is in use in the VM")

// Released reports an error, ErrInUse or another, if anything in the VM still uses the device: a
// mounted file system holds it exclusively.
func Released(device string) error {
	fd, err := unix.Open(device, unix.O_RDONLY|unix.O_EXCL|unix.O_CLOEXEC, 0)
	if err == unix.EBUSY {
		return fmt.Errorf("%s: %w", device, ErrInUse)
	}
	if err != nil {
		return fmt.Errorf("open %s: %w", device, err)
	}
	return unix.Close(fd)
}

// errUnchecked: the kernel, or the host's e2fsck, found the file system damaged.
var errUnchecked = errors.New("errors are noted in its file system")

// unchecked returns errUnchecked for a mounted file system with errors, which the
// kernel clears no more than it repairs them.
func unchecked(device string) error {
	text, err := os.ReadFile(filepath.Join("/sys/fs/ext4", filepath.Base(device), "errors_count"))
	if err != nil {
		return err
	}
	if n := strings.TrimSpace(string(text)); n != "0" {
		return fmt.Errorf("%s: %w (%s)", device, errUnchecked, n)
	}
	return nil
}

// diskOptions: discard returns freed blocks to the host's sparse file at once;
// errors=remount-ro keeps a damaged disk from being damaged further.
const diskOptions = "discard,errors=remount-ro"

// MountDisk mounts the ext4 file system of device on target with mount(2)'s flags,
// replaying its journal if need be. The error carries what the kernel had to say.
func MountDisk(device, target string, flags uintptr) error {
	return ExplainMount(device, func() error {
		mount := func() error { return unix.Mount(device, target, "ext4", unix.MS_NOATIME|flags, diskOptions) }
		err := mount()
		if err == unix.EINVAL {
			// The slot may still have the size of the disk that was there before (see AttachedDisk).
			if err = Reprobe(device); err == nil {
				err = mount()
			}
		}
		if err != nil {
			err = fmt.Errorf("mount %s (ext4): %w", device, err)
		}
		return err
	})
}

// ExplainMount adds to mount's error what the kernel had to say about device.
func ExplainMount(device string, mount func() error) error {
	tail, tailErr := kmsg.NewTail()
	if tailErr == nil {
		defer tail.Close()
	}
	err := mount()
	if err == nil {
		return nil
	}
	if tailErr == nil {
		if lines := tail.Lines(4, filepath.Base(device)); len(lines) > 0 {
			err = fmt.Errorf("%w: the kernel says: %s", err, strings.Join(lines, "; "))
		}
	}
	return err
}
