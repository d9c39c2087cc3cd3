// Package maintain works on a disk's file system outside of any distro (package
// diskjob): it returns free blocks to the host, grows, shrinks and repairs.
//
// Growing and trimming are the kernel's own work. Shrinking and repairing is
// that of e2fsprogs: the launcher sends the host's programs with their libraries, which run here,
// in a tmpfs with nothing but the disk. A file system made by a hostile guest is
// parsed by neither the host's kernel nor its programs.
package maintain

import (
	"bytes"
	"context"
	"encoding/binary"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/wsl2/wsl2/guest/diskjob"
	"github.com/wsl2/wsl2/guest/distro"
	"github.com/wsl2/wsl2/guest/reaper"
	"github.com/wsl2/wsl2/guest/untar"
	"github.com/wsl2/wsl2/internal/wire"
)

// Argv0 is the name under which /init maintains disks.
const Argv0 = "wsl2-maintain"

// Run is the main function. It returns the exit status.
func Run(args []string) int {
	return diskjob.Run(args, func(m *wire.Maintain) uint32 { return m.ID }, run)
}

func run(j *diskjob.Job, m *wire.Maintain) (string, error) {
	if m.Task.NeedsTools() {
		return withTools(j, m)
	}
	dir, err := diskjob.Mount(m.Slot, 0)
	if err != nil {
		return "", err
	}
	device, err := distro.Device(m.Slot)
	if err != nil {
		return "", err
	}
	var text string
	switch m.Task {
	case wire.TaskTrim:
		text, err = trim(dir)
	case wire.TaskGrow:
		text, err = grow(device, dir)
	default:
		return "", fmt.Errorf("%w: unknown task %d", diskjob.ErrRefused, m.Task)
	}
	if err != nil {
		return text, err
	}
	return text, diskjob.Finish(dir)
}

// fitrim is FITRIM of <linux/fs.h>: _IOWR('X', 121, struct fstrim_range).
const fitrim = 0xc0185879

// trim discards all free blocks.
func trim(dir string) (string, error) {
	f, err := os.Open(dir)
	if err != nil {
		return "", err
	}
	defer f.Close()
	r := struct{ start, length, minLength uint64 }{length: ^uint64(0)}
	_, _, errno := unix.Syscall(unix.SYS_IOCTL, f.Fd(), fitrim, uintptr(unsafe.Pointer(&r)))
	runtime.KeepAlive(f)
	if errno != 0 {
		return "", diskjob.DiskError{Err: fmt.Errorf("discard free blocks: %w", errno)}
	}
	return fmt.Sprintf("%d bytes discarded", r.length), nil
}

// resizeFS is EXT4_IOC_RESIZE_FS of the kernel's fs/ext4/ext4.h: _IOW('f', 16, __u64), in blocks.
const resizeFS = 0x40086610

// grow makes the file system as large as the device.
func grow(device, dir string) (string, error) {
	size, block, err := sizes(device)
	if err != nil {
		return "", err
	}
	f, err := os.Open(dir)
	if err != nil {
		return "", err
	}
	defer f.Close()
	blocks := size / block
	_, _, errno := unix.Syscall(unix.SYS_IOCTL, f.Fd(), resizeFS, uintptr(unsafe.Pointer(&blocks)))
	runtime.KeepAlive(f)
	if errno != 0 {
		return "", diskjob.DiskError{Err: fmt.Errorf("grow the file system to %d blocks of %d bytes: %w", blocks, block, errno)}
	}
	return "", nil
}

// sizes returns a device's size and the block size of its ext4, in bytes.
func sizes(device string) (size, block uint64, err error) {
	f, err := os.Open(device)
	if err != nil {
		return 0, 0, err
	}
	defer f.Close()
	n, err := f.Seek(0, 2)
	if err != nil {
		return 0, 0, err
	}
	var field [4]byte
	// s_log_block_size of struct ext4_super_block, which begins at byte 1024.
	if _, err := f.ReadAt(field[:], 1024+0x18); err != nil {
		return 0, 0, diskjob.DiskError{Err: err}
	}
	shift := binary.LittleEndian.Uint32(field[:])
	if shift > 6 {
		return 0, 0, diskjob.DiskError{Err: fmt.Errorf("%s: block size 2^%d", device, shift+10)}
	}
	return uint64(n), 1024 << shift, nil
}

// withTools receives e2fsprogs and runs them.
func withTools(j *diskjob.Job, m *wire.Maintain) (string, error) {
	if err := diskjob.Private(); err != nil {
		return "", err
	}
	device, err := distro.Device(m.Slot)
	if err != nil {
		return "", err
	}
	root := distro.MountPoint
	if err := unix.Mount("tmpfs", root, "tmpfs", unix.MS_NOSUID, "mode=755"); err != nil {
		return "", fmt.Errorf("mount a tmpfs for the tools: %w", err)
	}
	c, err := j.Accept(m.ID, m.Archive)
	if err != nil {
		return "", err
	}
	err = untar.Unpack(context.Background(), root, c, nil)
	c.Close()
	if err != nil {
		return "", fmt.Errorf("unpack the tools: %w", err)
	}
	if err := furnish(root, device); err != nil {
		return "", err
	}
	t := tools{root: root, device: device, reaper: reaper.New(nil)}
	how := []string{"-f", "-y"}
	if m.Task == wire.TaskPreen {
		how = []string{"-p"}
	}
	if err := t.check(how...); err != nil || m.Task != wire.TaskShrink {
		return t.out.String(), err
	}
	t.out.Reset()
	err = t.shrink(m.Bytes)
	return t.out.String(), err
}

// furnish gives the tools' root what they look at: the disk and /proc.
func furnish(root, device string) error {
	var st unix.Stat_t
	if err := unix.Stat(device, &st); err != nil {
		return &os.PathError{Op: "stat", Path: device, Err: err}
	}
	for _, dir := range []string{"dev", "proc", "tmp", "etc"} {
		if err := os.MkdirAll(filepath.Join(root, dir), 0o755); err != nil {
			return err
		}
	}
	if err := unix.Mknod(filepath.Join(root, device), unix.S_IFBLK|0o600, int(st.Rdev)); err != nil {
		return fmt.Errorf("make the tools' %s: %w", device, err)
	}
	if err := unix.Mknod(filepath.Join(root, "dev/null"), unix.S_IFCHR|0o666, int(unix.Mkdev(1, 3))); err != nil {
		return fmt.Errorf("make the tools' /dev/null: %w", err)
	}
	if err := unix.Mount("proc", filepath.Join(root, "proc"), "proc", 0, ""); err != nil {
		return fmt.Errorf("mount the tools' /proc: %w", err)
	}
	return nil
}

type tools struct {
	root, device string
	reaper       *reaper.Reaper
	out          bytes.Buffer
}

// run runs one of the programs and returns its exit status.
func (t *tools) run(argv ...string) (int, error) {
	r, w, err := os.Pipe()
	if err != nil {
		return -1, err
	}
	defer r.Close()
	null, err := os.Open(os.DevNull)
	if err != nil {
		w.Close()
		return -1, err
	}
	defer null.Close()
	proc, err := t.reaper.Start("/"+argv[0], argv, &syscall.ProcAttr{
		Dir: "/", Env: []string{"PATH=/", "LC_ALL=C", "LD_LIBRARY_PATH=/lib", "E2FSPROGS_SKIP_PROGRESS=1"},
		Files: []uintptr{null.Fd(), w.Fd(), w.Fd()},
		Sys:   &syscall.SysProcAttr{Chroot: t.root},
	})
	w.Close()
	if err != nil {
		return -1, fmt.Errorf("%s: %w", argv[0], err)
	}
	if _, err := t.out.ReadFrom(r); err != nil {
		return -1, fmt.Errorf("%s: %w", argv[0], err)
	}
	status := <-proc.Exited
	if !status.Exited() {
		return -1, fmt.Errorf("%s: killed by signal %d (%v)", argv[0], int(status.Signal()), status.Signal())
	}
	return status.ExitStatus(), nil
}

// e2fsck(8)'s exit status is a sum.
const (
	fsckCorrected = 1
	fsckReboot    = 2
)

// check repairs what can be repaired by e2fsck with these options.
func (t *tools) check(options ...string) error {
	status, err := t.run(append(append([]string{"e2fsck"}, options...), t.device)...)
	if err != nil {
		return err
	}
	if status&^(fsckCorrected|fsckReboot) != 0 {
		return diskjob.DiskError{Err: fmt.Errorf("e2fsck could not repair the file system (status %d)", status)}
	}
	return t.sync()
}

// shrink resizes the file system to size bytes.
func (t *tools) shrink(size uint64) error {
	status, err := t.run("resize2fs", t.device, fmt.Sprintf("%dK", size>>10))
	if err != nil {
		return err
	}
	if status != 0 {
		return fmt.Errorf("%w: resize2fs: %s", diskjob.ErrRefused, strings.TrimSpace(t.out.String()))
	}
	return t.sync()
}

func (t *tools) sync() error {
	f, err := os.OpenFile(t.device, os.O_RDWR, 0)
	if err != nil {
		return diskjob.DiskError{Err: err}
	}
	defer f.Close()
	if err := f.Sync(); err != nil {
		return diskjob.DiskError{Err: fmt.Errorf("write back the disk: %w", err)}
	}
	return nil
}
