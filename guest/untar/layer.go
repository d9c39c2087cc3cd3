package untar

import (
	"archive/tar"
	"io"
	"os"
	"path"
	"strings"

	"golang.org/x/sys/unix"
)

// Layers of an image (OCI Image Format Specification, layer.md) come as one
// stream: before each layer's own tar, with its end mark or without, stands a global header
// with the record LayerRecord. From the first of them on, whiteouts are taken for what
// they are, and what a layer brings replaces what lies below, directories with all
// that is in them.

// LayerRecord is the PAX record that begins a layer.
const LayerRecord = "WSL2.layer"

const (
	whiteoutPrefix = ".wh."
	opaqueWhiteout = ".wh..wh..opq"
	auFSPrefix     = ".wh..wh." // what AUFS kept for itself
)

// mark begins a layer if the global header says so.
func (u *unpacker) mark(h *tar.Header) {
	if _, ok := h.PAXRecords[LayerRecord]; ok {
		u.layered, u.layer = true, map[string]struct{}{}
	}
}

// another passes over the padding behind an archive's end and tells whether
// another archive follows.
func (t *trailer) another() bool {
	block := make([]byte, blockSize)
	for {
		if _, err := io.ReadFull(t, block); err != nil {
			return false
		}
		for _, b := range block {
			if b != 0 {
				t.next = block
				return true
			}
		}
	}
}

// whiteout handles the entry if it is a mark of a layer that something below is
// deleted, and tells whether it was. Other entries are noted as the layer's own.
func (u *unpacker) whiteout(name string) (done bool, err error) {
	if !u.layered {
		return false, nil
	}
	dir, base := path.Split(name)
	if !strings.HasPrefix(base, whiteoutPrefix) {
		// With the directories that it implies.
		for n := name; n != "." && n != "/" && n != ""; n = path.Dir(n) {
			u.layer[n] = struct{}{}
		}
		return false, nil
	}
	fd, err := u.in(strings.TrimSuffix(dir, "/"), unix.O_RDONLY|unix.O_DIRECTORY)
	if err == unix.ENOENT || err == unix.ENOTDIR {
		return true, nil // nothing is there to be deleted
	}
	if err != nil {
		return true, refuse(err)
	}
	defer unix.Close(fd)
	switch {
	case base == opaqueWhiteout:
		return true, u.clear(fd, strings.TrimSuffix(dir, "/"))
	case strings.HasPrefix(base, auFSPrefix):
		return true, nil
	}
	target := strings.TrimPrefix(base, whiteoutPrefix)
	if target == "" || target == "." || target == ".." {
		return true, ErrArchive
	}
	if _, ours := u.layer[path.Join(dir, target)]; ours {
		return true, nil
	}
	u.forgetParent() // it may be in what goes
	err = u.removeAll(fd, target)
	if err == unix.ENOENT {
		err = nil
	}
	return true, err
}

// clear removes what lower layers have in the directory open as fd.
func (u *unpacker) clear(fd int, name string) error {
	names, err := namesOf(fd)
	if err != nil {
		return err
	}
	u.forgetParent()
	for _, n := range names {
		full := path.Join(name, n)
		if _, ours := u.layer[full]; !ours {
			if err := u.removeAll(fd, n); err != nil {
				return err
			}
			continue
		}
		// The layer's own directory may hold what is not the layer's.
		sub, err := unix.Openat(fd, n, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
		if err == unix.ENOTDIR || err == unix.ELOOP {
			continue
		}
		if err != nil {
			return err
		}
		err = u.clear(sub, full)
		unix.Close(sub)
		if err != nil {
			return err
		}
	}
	return nil
}

// removeAll removes a name and, if it is a directory, all below it. No link is
// followed.
func (u *unpacker) removeAll(dir int, base string) error {
	err := unix.Unlinkat(dir, base, 0)
	if err != unix.EISDIR {
		return err
	}
	fd, err := unix.Openat(dir, base, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err != nil {
		return err
	}
	names, err := namesOf(fd)
	for _, n := range names {
		if err == nil {
			err = u.removeAll(fd, n)
		}
	}
	unix.Close(fd)
	if err != nil {
		return err
	}
	return unix.Unlinkat(dir, base, unix.AT_REMOVEDIR)
}

// namesOf lists the directory open as fd, which stays open.
func namesOf(fd int) ([]string, error) {
	own, err := unix.Openat(fd, ".", unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	f := os.NewFile(uintptr(own), ".")
	defer f.Close()
	return f.Readdirnames(-1)
}
