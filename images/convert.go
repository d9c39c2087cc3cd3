package images

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
)

// DiskFormat is the format of a disk image, by qemu-img's name for it.
type DiskFormat string

// Formats of disk images.
const (
	Raw  DiskFormat = "raw"
	VHDX DiskFormat = "vhdx" // WSL2's
	VHD  DiskFormat = "vpc"  // WSL2's first
)

// ErrNoQemuImg says that qemu-img is missing.
var ErrNoQemuImg = errors.New("qemu-img is not installed, which converts disk images (apt-get install qemu-utils, or your system's package of that name)")

// ErrNotDisk says that a file is no disk image of a known format.
var ErrNotDisk = errors.New("it is no disk image of a distro (vhdx, vhd or raw ext4)")

// DetectDisk tells the format of the disk image at path by its contents.
// Formats in which an image can name other files, as qcow2, are not taken: an image
// from elsewhere must not read the user's.
func DetectDisk(path string) (DiskFormat, error) {
	f, err := os.Open(path)
	if err != nil {
		return "", err
	}
	defer f.Close()
	st, err := f.Stat()
	if err != nil {
		return "", err
	}
	if !st.Mode().IsRegular() {
		return "", fmt.Errorf("%s is not a regular file", path)
	}
	head := make([]byte, 8)
	if _, err := f.ReadAt(head, 0); err != nil && err != io.EOF {
		return "", err
	}
	// A VHD of fixed size has its mark at the end only.
	const vhdFooter = 512
	tail := make([]byte, 8)
	if st.Size() >= vhdFooter {
		if _, err := f.ReadAt(tail, st.Size()-vhdFooter); err != nil {
			return "", err
		}
	}
	switch {
	case string(head) == "vhdxfile":
		return VHDX, nil
	case string(head) == "conectix", string(tail) == "conectix":
		return VHD, nil
	}
	if _, err := Ext4Size(path); errors.Is(err, ErrNotExt4) {
		return "", fmt.Errorf("%s: %w", path, ErrNotDisk)
	} else if err != nil {
		return "", err
	}
	return Raw, nil
}

// Convert converts the disk image at from to the file to, which is overwritten.
// Raw images stay sparse. ctx's end, and this process's, end it.
func Convert(ctx context.Context, from string, fromFormat DiskFormat, to *os.File, toFormat DiskFormat, progress Progress) error {
	exe, err := FindTool("qemu-img", ErrNoQemuImg)
	if err != nil {
		return err
	}
	st, err := os.Stat(from)
	if err != nil {
		return err
	}
	// The result is handed over open: it may have no name yet. The caller's own lock on the
	// image would keep qemu-img from it.
	source := fmt.Sprintf("driver=%s,file.driver=file,file.locking=off,file.filename=%s", fromFormat, strings.ReplaceAll(from, ",", ",,"))
	cmd := exec.CommandContext(ctx, exe, "convert", "-p", "-O", string(toFormat), "--image-opts", source, "/proc/self/fd/3")
	cmd.ExtraFiles = []*os.File{to}
	cmd.Env = []string{"PATH=/usr/bin:/bin", "LC_ALL=C"}
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.StdoutPipe()
	if err != nil {
		return err
	}
	// Pdeathsig is the end of the thread that started it.
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := cmd.Start(); err != nil {
		return err
	}
	readPercent(out, func(percent float64) {
		if progress != nil {
			progress(int64(percent/100*float64(st.Size())), st.Size())
		}
	})
	if err := cmd.Wait(); err != nil {
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		text := strings.TrimSpace(stderr.String())
		if strings.Contains(text, "No space left") {
			return fmt.Errorf("%w to convert %s", ErrNoSpace, from)
		}
		return fmt.Errorf("qemu-img cannot convert %s: %s (%w)", from, text, err)
	}
	return nil
}

// readPercent reads qemu-img's progress, lines "    (12.34/100%)" that end in a
// carriage return.
func readPercent(r io.Reader, report func(percent float64)) {
	lines := bufio.NewScanner(r)
	lines.Split(func(data []byte, atEOF bool) (int, []byte, error) {
		if i := bytes.IndexByte(data, '\r'); i >= 0 {
			return i + 1, data[:i], nil
		}
		if atEOF && len(data) > 0 {
			return len(data), data, nil
		}
		return 0, nil, nil
	})
	for lines.Scan() {
		_, rest, _ := strings.Cut(lines.Text(), "(")
		number, _, ok := strings.Cut(rest, "/")
		if percent, err := strconv.ParseFloat(number, 64); ok && err == nil {
			report(percent)
		}
	}
	io.Copy(io.Discard, r) // a line too long ends the scanner, not the pipe
}

// ErrNoE2fsprogs says that e2fsck or resize2fs is missing.
var ErrNoE2fsprogs = errors.New("e2fsck and resize2fs are not installed (apt-get install e2fsprogs, or your system's package of that name)")

// FindTool looks for a program, also where ordinary users have no PATH to.
func FindTool(name string, missing error) (string, error) {
	for _, dir := range append([]string{"/sbin", "/usr/sbin", "/usr/local/sbin"}, filepath.SplitList(os.Getenv("PATH"))...) {
		path := filepath.Join(dir, name)
		if filepath.IsAbs(path) && unix.Access(path, unix.X_OK) == nil {
			return path, nil
		}
	}
	return "", missing
}
