package distro

import (
	"errors"
	"fmt"
	"io"
	"strconv"
)

// A newc cpio archive (Linux, Documentation/driver-api/early-userspace/buffer-format.rst):
// entries of header, name and content, the last two padded to 4 bytes. The header
// is the magic number and 13 hexadecimal numbers of 8 digits.
const (
	cpioHeader   = 110
	cpioMagic    = "070701"
	cpioFileSize = 6 + 6*8
	cpioNameSize = 6 + 11*8
	cpioTrailer  = "TRAILER!!!"

	// maxCpioName is the longest name looked at (PATH_MAX).
	maxCpioName = 4096
)

// findInitramfs returns the content of the named entry of a cpio archive.
func findInitramfs(archive io.ReaderAt, name string) (io.Reader, error) {
	number := func(field []byte) (int64, error) {
		n, err := strconv.ParseUint(string(field), 16, 32)
		return int64(n), err
	}
	header := make([]byte, cpioHeader)
	for at := int64(0); ; {
		if _, err := archive.ReadAt(header, at); err != nil {
			return nil, fmt.Errorf("entry of the initramfs at %d: %w", at, err)
		}
		size, err1 := number(header[cpioFileSize:][:8])
		length, err2 := number(header[cpioNameSize:][:8])
		if string(header[:len(cpioMagic)]) != cpioMagic || errors.Join(err1, err2) != nil || length < 1 || length > maxCpioName {
			return nil, fmt.Errorf("the initramfs is damaged at %d", at)
		}
		entry := make([]byte, length)
		if _, err := archive.ReadAt(entry, at+cpioHeader); err != nil {
			return nil, fmt.Errorf("entry of the initramfs at %d: %w", at, err)
		}
		content := (at + cpioHeader + length + 3) &^ 3
		switch string(entry[:length-1]) {
		case name:
			return io.NewSectionReader(archive, content, size), nil
		case cpioTrailer:
			return nil, fmt.Errorf("the initramfs holds no %s", name)
		}
		at = (content + size + 3) &^ 3
	}
}
