package service

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"syscall"
)

// swapPage is the page of the guest's kernel.
const swapPage = 4096

// swapMagic ends the first page of a swap area (mkswap(8)).
var swapMagic = []byte("SWAPSPACE2")

// makeSwap makes the sparse file of a swap area. The VM that will have it is locked. A
// file of this name is replaced if it is one already, and refused if it is anything else.
func makeSwap(path string, size uint64) (err error) {
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE|syscall.O_NOFOLLOW|syscall.O_NONBLOCK, 0o600)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	st, err := f.Stat()
	if err != nil {
		return err
	}
	if st.Size() != 0 || !st.Mode().IsRegular() {
		old := make([]byte, swapPage)
		if _, err := f.ReadAt(old, 0); err != nil || !st.Mode().IsRegular() || !bytes.HasSuffix(old, swapMagic) {
			return fmt.Errorf("%s is something else than a swap file", path)
		}
	}
	if err := f.Truncate(0); err != nil {
		return err
	}
	// union swap_header: version, last page; nothing of it is bad.
	header := make([]byte, swapPage)
	binary.LittleEndian.PutUint32(header[1024:], 1)
	binary.LittleEndian.PutUint32(header[1028:], uint32(size/swapPage-1))
	copy(header[swapPage-len(swapMagic):], swapMagic)
	if _, err := f.WriteAt(header, 0); err != nil {
		return err
	}
	return f.Truncate(int64(size / swapPage * swapPage))
}
