package exporter

import (
	"archive/tar"
	"errors"
	"fmt"
	"io"
	"os"
	"path"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// Pack writes the tree below root to w as a tar archive in PAX format: owners,
// modes, times to the nanosecond, hard links, devices, FIFOs and extended
// attributes (as SCHILY.xattr, which untar, GNU tar, bsdtar and docker read). It stays on one
// file system. leftOut is told of what a tar cannot hold. Nothing may change the tree
// meanwhile.
func Pack(root string, w io.Writer, leftOut func(name, why string)) error {
	fd, err := unix.Open(root, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return &os.PathError{Op: "open", Path: root, Err: err}
	}
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		unix.Close(fd)
		return &os.PathError{Op: "stat", Path: root, Err: err}
	}
	p := &packer{w: tar.NewWriter(w), dev: st.Dev, links: map[uint64]string{}, leftOut: leftOut, buf: make([]byte, copyBuffer)}
	if err := p.dir(fd, "", &st); err != nil {
		return err
	}
	return p.w.Close()
}

const copyBuffer = 1 << 20

type packer struct {
	w       *tar.Writer
	dev     uint64
	links   map[uint64]string // the first name of each inode with several, by number
	leftOut func(name, why string)
	buf     []byte
}

// lostAndFound is the file system's, not the distro's.
const lostAndFound = "lost+found"

// dir writes the directory open as fd, which it closes, and what is in it.
func (p *packer) dir(fd int, name string, st *unix.Stat_t) error {
	d := os.NewFile(uintptr(fd), name)
	defer d.Close()
	h := header(name+"/", st, tar.TypeDir)
	if name == "" {
		h.Name = "./"
	}
	if err := p.attributes(fd, h); err != nil {
		return fmt.Errorf("/%s: %w", name, err)
	}
	if err := p.w.WriteHeader(h); err != nil {
		return fmt.Errorf("/%s: %w", name, err)
	}
	entries, err := d.ReadDir(-1)
	if err != nil {
		return err
	}
	slices.SortFunc(entries, func(a, b os.DirEntry) int { return strings.Compare(a.Name(), b.Name()) })
	for _, e := range entries {
		if name == "" && e.Name() == lostAndFound {
			continue
		}
		if err := p.entry(fd, e.Name(), path.Join(name, e.Name())); err != nil {
			return err
		}
	}
	return nil
}

// header is what all kinds of entries have.
func header(name string, st *unix.Stat_t, kind byte) *tar.Header {
	return &tar.Header{
		Format: tar.FormatPAX, Typeflag: kind, Name: name, Mode: int64(st.Mode & 0o7777),
		Uid: int(st.Uid), Gid: int(st.Gid), ModTime: time.Unix(st.Mtim.Unix()),
	}
}

// entry writes the entry base of the directory dir.
func (p *packer) entry(dir int, base, name string) error {
	var st unix.Stat_t
	if err := unix.Fstatat(dir, base, &st, unix.AT_SYMLINK_NOFOLLOW); err != nil {
		return &os.PathError{Op: "stat", Path: "/" + name, Err: err}
	}
	kind := st.Mode & unix.S_IFMT
	if kind != unix.S_IFDIR && st.Nlink > 1 {
		if first, ok := p.links[st.Ino]; ok {
			h := header(name, &st, tar.TypeLink)
			h.Linkname = first
			return p.write(h)
		}
		p.links[st.Ino] = name
	}
	switch kind {
	case unix.S_IFREG:
		return p.file(dir, base, name, &st)
	case unix.S_IFDIR:
		fd, err := unix.Openat(dir, base, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
		if err != nil {
			return &os.PathError{Op: "open", Path: "/" + name, Err: err}
		}
		if st.Dev != p.dev {
			unix.Close(fd)
			return p.write(header(name+"/", &st, tar.TypeDir)) // a mount point
		}
		return p.dir(fd, name, &st)
	case unix.S_IFLNK:
		target := make([]byte, unix.PathMax)
		n, err := unix.Readlinkat(dir, base, target)
		if err != nil {
			return &os.PathError{Op: "readlink", Path: "/" + name, Err: err}
		}
		h := header(name, &st, tar.TypeSymlink)
		h.Linkname = string(target[:n])
		return p.write(h)
	case unix.S_IFIFO:
		return p.write(header(name, &st, tar.TypeFifo))
	case unix.S_IFCHR, unix.S_IFBLK:
		h := header(name, &st, tar.TypeChar)
		if kind == unix.S_IFBLK {
			h.Typeflag = tar.TypeBlock
		}
		h.Devmajor, h.Devminor = int64(unix.Major(st.Rdev)), int64(unix.Minor(st.Rdev))
		return p.write(h)
	}
	delete(p.links, st.Ino)
	p.leftOut("/"+name, "a socket lives only as long as its program")
	return nil
}

func (p *packer) write(h *tar.Header) error {
	if err := p.w.WriteHeader(h); err != nil {
		return fmt.Errorf("/%s: %w", h.Name, err)
	}
	return nil
}

// file writes a regular file.
func (p *packer) file(dir int, base, name string, st *unix.Stat_t) error {
	fd, err := unix.Openat(dir, base, unix.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
	if err != nil {
		return &os.PathError{Op: "open", Path: "/" + name, Err: err}
	}
	// Plain read(2) on purpose: no descriptor of the runtime's poller for each of a
	// hundred thousand files.
	defer unix.Close(fd)
	h := header(name, st, tar.TypeReg)
	h.Size = st.Size
	if err := p.attributes(fd, h); err != nil {
		return fmt.Errorf("/%s: %w", name, err)
	}
	if err := p.write(h); err != nil {
		return err
	}
	for left := st.Size; left > 0; {
		n, err := unix.Read(fd, p.buf[:min(int64(len(p.buf)), left)])
		switch {
		case err == unix.EINTR:
			continue
		case err != nil:
			return &os.PathError{Op: "read", Path: "/" + name, Err: err}
		case n == 0:
			return &os.PathError{Op: "read", Path: "/" + name, Err: io.ErrUnexpectedEOF}
		}
		if _, err := p.w.Write(p.buf[:n]); err != nil {
			return err
		}
		left -= int64(n)
	}
	return nil
}

const xattrPrefix = "SCHILY.xattr."

// attributes adds the extended attributes of a file or directory to its header.
func (p *packer) attributes(fd int, h *tar.Header) error {
	list, err := sized(func(b []byte) (int, error) { return unix.Flistxattr(fd, b) })
	if errors.Is(err, unix.ENOTSUP) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("list attributes: %w", err)
	}
	for attr := range strings.SplitSeq(strings.TrimSuffix(string(list), "\x00"), "\x00") {
		switch {
		case attr == "":
			continue
		case strings.Contains(attr, "="):
			p.leftOut("/"+h.Name, fmt.Sprintf("attribute %q: its name has a '='", attr))
			continue
		}
		value, err := sized(func(b []byte) (int, error) { return unix.Fgetxattr(fd, attr, b) })
		if err != nil {
			return fmt.Errorf("attribute %s: %w", attr, err)
		}
		if h.PAXRecords == nil {
			h.PAXRecords = map[string]string{}
		}
		h.PAXRecords[xattrPrefix+attr] = string(value)
	}
	return nil
}

// sized calls get with a buffer that is large enough: first with none, for the size.
func sized(get func([]byte) (int, error)) ([]byte, error) {
	n, err := get(nil)
	if err != nil || n == 0 {
		return nil, err
	}
	b := make([]byte, n)
	if n, err = get(b); err != nil {
		return nil, err
	}
	return b[:n], nil
}
