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

	"github.com/wsl2/wsl2/guest/untar"
)

// Pack writes the tree below root to w as a tar archive in PAX format: owners,
// modes, times to the nanosecond, hard links, devices, FIFOs and extended
// attributes (as SCHILY.xattr, which untar, GNU tar, bsdtar and docker read). Holes are zeros, which
// untar makes holes again. It stays on one
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
	p := &packer{out: output{w: w, b: make([]byte, 0, sendBuffer)}, dev: st.Dev, links: map[uint64]string{}, leftOut: leftOut}
	if err := p.dir(fd, "", &st); err != nil {
		return err
	}
	if err := tar.NewWriter(&p.out).Close(); err != nil {
		return err
	}
	return p.out.flush()
}

type packer struct {
	out     output
	dev     uint64
	links   map[uint64]string // the first name of each inode with several, by number
	leftOut func(name, why string)
}

const (
	// sendBuffer is written at once.
	sendBuffer = 1 << 20
	// readAtLeast is what a file is read in, if it has as much.
	readAtLeast = 64 << 10
)

// output is what of the archive is to be written. Files are read into it where they
// belong: a tar.Writer would have each byte copied once more.
type output struct {
	w io.Writer
	b []byte // its capacity stays
}

func (o *output) Write(p []byte) (int, error) {
	if len(p) > cap(o.b)-len(o.b) {
		if err := o.flush(); err != nil {
			return 0, err
		}
		if len(p) > cap(o.b) {
			return o.w.Write(p)
		}
	}
	o.b = append(o.b, p...)
	return len(p), nil
}

// file appends size bytes of the open file, padded to tar's blocks.
func (o *output) file(fd int, size int64) error {
	for left := size; left > 0; {
		if int64(cap(o.b)-len(o.b)) < min(left, readAtLeast) {
			if err := o.flush(); err != nil {
				return err
			}
		}
		end := len(o.b) + int(min(left, int64(cap(o.b)-len(o.b))))
		n, err := unix.Read(fd, o.b[len(o.b):end])
		switch {
		case err == unix.EINTR:
			continue
		case err != nil:
			return err
		case n == 0:
			return errors.New("the file became shorter while it was exported: export again when nothing writes to it")
		}
		o.b = o.b[:len(o.b)+n]
		left -= int64(n)
	}
	const block = 512
	_, err := o.Write(make([]byte, -size&(block-1)))
	return err
}

func (o *output) flush() error {
	if len(o.b) == 0 {
		return nil
	}
	_, err := o.w.Write(o.b)
	o.b = o.b[:0]
	return err
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
	if err := p.write(h); err != nil {
		return err
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

// write writes a header. Its Writer never learns of a file's content.
func (p *packer) write(h *tar.Header) error {
	if err := tar.NewWriter(&p.out).WriteHeader(h); err != nil {
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
	if st.Blocks*512 < st.Size {
		h.PAXRecords = map[string]string{untar.CommentKey: untar.WithHoles}
	}
	if err := p.attributes(fd, h); err != nil {
		return fmt.Errorf("/%s: %w", name, err)
	}
	if err := p.write(h); err != nil {
		return err
	}
	if err := p.out.file(fd, st.Size); err != nil {
		return fmt.Errorf("/%s: %w", name, err)
	}
	return nil
}

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
		h.PAXRecords[untar.XattrPrefix+attr] = string(value)
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
