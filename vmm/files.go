package vmm

import (
	"bytes"
	"compress/gzip"
	"encoding/binary"
	"fmt"
	"io"
	"os"
)

// The kernel and the initramfs are looked at before anything is created, so
// that a mistake is an error of a line and not a guest that prints nothing.

// openRegular opens what for reading; FIFOs and directories are refused.
func openRegular(what, path string) (*os.File, int64, error) {
	// Stat first: opening a FIFO would wait for its writer.
	st, err := os.Stat(path)
	if err != nil {
		return nil, 0, fmt.Errorf("%w: %s: %w", ErrConfig, what, err)
	}
	if !st.Mode().IsRegular() {
		return nil, 0, configError("%s %s is not a regular file", what, path)
	}
	f, err := os.Open(path)
	if err != nil {
		return nil, 0, fmt.Errorf("%w: %s: %w", ErrConfig, what, err)
	}
	return f, st.Size(), nil
}

const (
	elfHeader    = 64
	elfMachine   = 18
	machineX86   = 62
	bzImageMagic = 0x202 // "HdrS" (Linux, Documentation/arch/x86/boot.rst)
)

// checkKernel tells whether the file looks like a kernel for this machine; the
// loaders look closer.
func checkKernel(path string) error {
	if path == "" {
		return configError("no kernel: `make kernel` builds one; or give one with --kernel")
	}
	f, _, err := openRegular("kernel", path)
	if err != nil {
		return fmt.Errorf("%w: `make kernel` builds one; or give another with --kernel", err)
	}
	defer f.Close()
	head := make([]byte, bzImageMagic+4)
	n, err := io.ReadFull(f, head)
	if err != nil && err != io.ErrUnexpectedEOF && err != io.EOF {
		return fmt.Errorf("%w: kernel: %w", ErrConfig, err)
	}
	head = head[:n]
	switch {
	case n >= elfHeader && bytes.HasPrefix(head, []byte("\x7fELF")):
		if m := binary.LittleEndian.Uint16(head[elfMachine:]); m != machineX86 {
			return configError("kernel %s is for another processor (ELF machine %d): give an x86-64 vmlinux or bzImage with --kernel", path, m)
		}
		return nil
	case n >= bzImageMagic+4 && string(head[bzImageMagic:]) == "HdrS":
		return nil
	}
	return configError("%s is not a Linux kernel: give an x86-64 vmlinux or bzImage with --kernel", path)
}

// Marks of initramfs archives (Linux, Documentation/driver-api/early-userspace/buffer-format.rst).
var (
	cpioMagic    = []byte("07070") // 070701 and 070702
	gzipMagic    = []byte("\x1f\x8b")
	cpioTrailer  = []byte("TRAILER!!!\x00")
	cpioTailSize = int64(8 << 10) // the trailer and any padding after it
)

// checkInitramfs tells whether an archive is whole: a kernel unpacks as much as
// there is and then misses a file, or /init.
func checkInitramfs(path string) error {
	if path == "" {
		return nil
	}
	f, n, err := openRegular("initramfs", path)
	if err != nil {
		return fmt.Errorf("%w: `make` builds one", err)
	}
	defer f.Close()
	truncated := func(err error) error {
		if err == nil {
			err = fmt.Errorf("its end is missing")
		}
		return configError("initramfs %s is truncated or damaged (%w): build it again with `make`", path, err)
	}
	head := make([]byte, len(cpioMagic))
	if _, err := io.ReadFull(f, head); err != nil {
		return truncated(err)
	}
	switch {
	case bytes.Equal(head, cpioMagic):
		tail := make([]byte, min(n, cpioTailSize))
		if _, err := f.ReadAt(tail, n-int64(len(tail))); err != nil {
			return truncated(err)
		}
		if !bytes.Contains(tail, cpioTrailer) {
			return truncated(nil)
		}
		return nil
	case bytes.HasPrefix(head, gzipMagic):
		if _, err := f.Seek(0, io.SeekStart); err != nil {
			return fmt.Errorf("%w: initramfs: %w", ErrConfig, err)
		}
		z, err := gzip.NewReader(f)
		if err != nil {
			return truncated(err)
		}
		if _, err := io.Copy(io.Discard, z); err != nil {
			return truncated(err)
		}
		return nil
	}
	return configError("initramfs %s is not a cpio archive: build it with `make`", path)
}
