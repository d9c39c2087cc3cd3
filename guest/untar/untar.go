// Package untar unpacks a tar archive as root: owners, modes with setuid, times
// to the nanosecond, hard links, devices, FIFOs, sparse files, extended
// attributes and capabilities, in the ustar, PAX and GNU formats.
//
// # Containment
//
// The archive may be hostile. Nothing is created outside of the directory given,
// whatever names and links the archive holds: names with a ".." are
// refused, absolute names are taken below the root, and the directory of each
// entry is opened with openat2(2) and RESOLVE_IN_ROOT, which resolves every
// symbolic link, absolute ones too, as if the root were "/". All work on the last
// component is done relative to that descriptor and follows no link.
// Devices are created as they stand: they mean something only in the VM.
package untar

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"path"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// Errors that Unpack's errors wrap, beside the kernel's own.
var (
	// ErrArchive: not a tar, cut off, or with entries that are refused.
	ErrArchive = errors.New("bad archive")
	// ErrNoShell: the root unpacked holds no /etc or no shell.
	ErrNoShell = errors.New("not a Linux root")
)

// maxExpanded bounds the size of one sparse file: reading its holes takes time
// although they take no space. ext4's own limit is 16 TiB.
const maxExpanded = 4 << 40

// What records of an entry say (pax(1)): that its file has holes, which are zeros in the archive, in a comment, which other
// programs pass over; and its extended attributes, behind a prefix that they know.
const (
	CommentKey  = "comment"
	WithHoles   = "sparse"
	XattrPrefix = "SCHILY.xattr."
)

const (
	blockSize  = 512
	copyBuffer = 1 << 20
	holeSize   = 4096 // granularity in which holes of sparse files are kept
)

// Unpack reads a tar archive from r up to its end and unpacks it below root. It
// stops at the first error, or when ctx is done. It sets the process' umask
// while it works, so nothing else may create files then. skipped, if not nil, is told of
// what is left out: extended attributes that the file system does not support and, in a user
// namespace (version 1), devices and the attributes that mean the whole host.
func Unpack(ctx context.Context, root string, r io.Reader, skipped func(name, what string)) error {
	fd, err := unix.Open(root, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("open %s: %w", root, err)
	}
	u := &unpacker{root: fd, parent: -1, skipped: skipped, buf: make([]byte, copyBuffer)}
	defer u.close()
	mask := unix.Umask(0) // modes are exact
	defer unix.Umask(mask)

	in := &trailer{r: r}
	t := tar.NewReader(in)
	entries := 0
	for ; ; entries++ {
		if err := ctx.Err(); err != nil {
			return err
		}
		h, err := t.Next()
		if err == io.EOF {
			if !u.layered || !in.another() {
				break
			}
			t = tar.NewReader(in)
			continue
		}
		if err != nil {
			return in.explain(err, entries)
		}
		if err := u.entry(h, t); err != nil {
			if in.err != nil || errors.Is(err, tar.ErrHeader) || errors.Is(err, io.ErrUnexpectedEOF) {
				return in.explain(err, entries)
			}
			return fmt.Errorf("unpack %q: %w", h.Name, err)
		}
	}
	switch {
	case entries == 0:
		return fmt.Errorf("%w: it holds nothing", ErrArchive)
	case !in.zeros():
		// archive/tar takes the end of the input for the end of the archive.
		return fmt.Errorf("%w: cut off after %d entries (no end mark)", ErrArchive, entries)
	}
	if _, err := io.CopyBuffer(io.Discard, onlyReader{in}, u.buf); err != nil {
		return fmt.Errorf("read the archive's padding: %w", err)
	}
	return u.dirTimes()
}

type onlyReader struct{ io.Reader }

// trailer remembers the last block that was read, and the input's own error.
type trailer struct {
	r    io.Reader
	last [blockSize]byte
	n    int64
	err  error  // other than io.EOF
	next []byte // read by another, to be read again
}

func (t *trailer) Read(p []byte) (int, error) {
	if len(t.next) > 0 {
		n := copy(p, t.next)
		t.next = t.next[n:]
		return n, nil
	}
	n, err := t.r.Read(p)
	if n >= blockSize {
		copy(t.last[:], p[n-blockSize:n])
	} else if n > 0 {
		copy(t.last[:], t.last[n:])
		copy(t.last[blockSize-n:], p[:n])
	}
	t.n += int64(n)
	if err != nil && err != io.EOF {
		t.err = err
	}
	return n, err
}

func (t *trailer) zeros() bool {
	return t.n >= blockSize && bytes.Count(t.last[:], []byte{0}) == blockSize
}

// explain turns an error of reading into one that says what is wrong.
func (t *trailer) explain(err error, entries int) error {
	switch {
	case t.err != nil:
		return fmt.Errorf("read the archive: %w", t.err)
	case errors.Is(err, io.ErrUnexpectedEOF):
		return fmt.Errorf("%w: cut off after %d bytes, in entry %d", ErrArchive, t.n, entries+1)
	case entries == 0:
		return fmt.Errorf("%w: it is not a tar archive (%v)", ErrArchive, err)
	}
	return fmt.Errorf("%w: entry %d: %v", ErrArchive, entries+1, err)
}

type unpacker struct {
	root       int // O_PATH
	parent     int // O_PATH descriptor of parentName, or -1: entries come directory by directory
	parentName string
	dirs       []dirTime
	skipped    func(name, what string)
	buf        []byte

	layered bool                // see layer.go
	layer   map[string]struct{} // the names that the layer has brought so far
}

// dirTime is set when all is done: each entry in a directory changes its time.
type dirTime struct {
	name  string
	times [2]unix.Timespec
}

func (u *unpacker) close() {
	u.forgetParent()
	unix.Close(u.root)
}

func (u *unpacker) forgetParent() {
	if u.parent >= 0 {
		unix.Close(u.parent)
	}
	u.parent = -1
}

// clean returns the name relative to the root, "." for the root itself.
func clean(name string) (string, error) {
	if name == "" {
		return "", fmt.Errorf("%w: an entry without a name", ErrArchive)
	}
	if strings.IndexByte(name, 0) >= 0 {
		return "", fmt.Errorf("%w: a name with a NUL byte", ErrArchive)
	}
	for part := range strings.SplitSeq(name, "/") {
		if part == ".." {
			return "", fmt.Errorf("%w: refused: the name leaves the archive's root (\"..\")", ErrArchive)
		}
	}
	return strings.TrimPrefix(path.Clean("/"+name), "/"), nil
}

// in resolves dir inside the root.
func (u *unpacker) in(dir string, flags uint64) (int, error) {
	if dir == "" {
		dir = "."
	}
	for {
		fd, err := unix.Openat2(u.root, dir, &unix.OpenHow{Flags: flags | unix.O_CLOEXEC, Resolve: unix.RESOLVE_IN_ROOT | unix.RESOLVE_NO_MAGICLINKS})
		if err != unix.EINTR && err != unix.EAGAIN {
			return fd, err
		}
	}
}

// parentOf returns a descriptor of the directory that name (clean) is in, which
// is made if it is not there; u owns it. base is the last component.
func (u *unpacker) parentOf(name string) (fd int, base string, err error) {
	dir, base := path.Split(name)
	dir = strings.TrimSuffix(dir, "/")
	if u.parent >= 0 && u.parentName == dir {
		return u.parent, base, nil
	}
	u.forgetParent()
	fd, err = u.in(dir, unix.O_PATH|unix.O_DIRECTORY)
	if err == unix.ENOENT {
		fd, err = u.makeParents(dir)
	}
	if err != nil {
		return -1, "", fmt.Errorf("directory %q: %w", "/"+dir, refuse(err))
	}
	u.parent, u.parentName = fd, dir
	return fd, base, nil
}

// errDangling: what should be a directory is a link to nothing inside the root.
var errDangling = fmt.Errorf("%w: it is a link to what is not in the archive", ErrArchive)

// makeParents makes the directories of dir that the archive did not bring.
func (u *unpacker) makeParents(dir string) (int, error) {
	fd := -1
	done := ""
	for part := range strings.SplitSeq(dir, "/") {
		up := done
		done = path.Join(done, part)
		next, err := u.in(done, unix.O_PATH|unix.O_DIRECTORY)
		if err == unix.ENOENT {
			var upFD int
			if upFD, err = u.in(up, unix.O_PATH|unix.O_DIRECTORY); err == nil {
				err = unix.Mkdirat(upFD, part, 0o755)
				unix.Close(upFD)
				if err == unix.EEXIST { // it is there, and yet there is nothing
					err = errDangling
				}
			}
			if err == nil {
				next, err = u.in(done, unix.O_PATH|unix.O_DIRECTORY)
			}
		}
		if fd >= 0 {
			unix.Close(fd)
		}
		if err != nil {
			return -1, err
		}
		fd = next
	}
	return fd, nil
}

// refuse marks the errors that only a hostile or broken archive causes.
func refuse(err error) error {
	switch err {
	case unix.ELOOP, unix.ENOTDIR, unix.EEXIST, unix.EXDEV, unix.ENAMETOOLONG, unix.ENOTEMPTY, unix.EISDIR:
		return fmt.Errorf("%w: %w", ErrArchive, err)
	}
	return err
}

// entry unpacks one entry whose content, if any, is in r.
func (u *unpacker) entry(h *tar.Header, r io.Reader) error {
	if h.Typeflag == tar.TypeXGlobalHeader {
		u.mark(h)
		return nil
	}
	name, err := clean(h.Name)
	if err != nil {
		return err
	}
	// The kernel takes the largest number for "leave it as it is".
	if h.Uid < 0 || h.Gid < 0 || h.Uid >= 1<<32-1 || h.Gid >= 1<<32-1 {
		return fmt.Errorf("%w: owner %d:%d", ErrArchive, h.Uid, h.Gid)
	}
	mode := uint32(h.Mode) & 0o7777
	if name == "" {
		if h.Typeflag != tar.TypeDir {
			return fmt.Errorf("%w: the root is not a directory", ErrArchive)
		}
		return u.directoryMeta(u.root, ".", name, h, mode)
	}
	if done, err := u.whiteout(name); done || err != nil {
		return err
	}
	dir, base, err := u.parentOf(name)
	if err != nil {
		return err
	}
	switch h.Typeflag {
	case tar.TypeReg, tar.TypeRegA, tar.TypeCont, tar.TypeGNUSparse: //nolint:staticcheck // old archives have TypeRegA
		return u.file(dir, base, h, mode, r)
	case tar.TypeDir:
		err := unix.Mkdirat(dir, base, mode)
		if err == unix.EEXIST {
			var st unix.Stat_t
			if err = unix.Fstatat(dir, base, &st, unix.AT_SYMLINK_NOFOLLOW); err == nil && st.Mode&unix.S_IFMT != unix.S_IFDIR {
				if err = u.remove(dir, base); err == nil {
					err = unix.Mkdirat(dir, base, mode)
				}
			}
		}
		if err != nil {
			return refuse(err)
		}
		return u.directoryMeta(dir, base, name, h, mode)
	case tar.TypeLink:
		target, err := clean(h.Linkname)
		if err != nil {
			return err
		}
		return u.link(dir, base, target)
	case tar.TypeSymlink:
		if h.Linkname == "" || strings.IndexByte(h.Linkname, 0) >= 0 {
			return fmt.Errorf("%w: a symbolic link to nothing", ErrArchive)
		}
		err = u.replace(dir, base, func() error { return unix.Symlinkat(h.Linkname, dir, base) })
	case tar.TypeFifo:
		err = u.replace(dir, base, func() error { return unix.Mknodat(dir, base, unix.S_IFIFO|mode, 0) })
	case tar.TypeChar, tar.TypeBlock:
		kind := uint32(unix.S_IFCHR)
		if h.Typeflag == tar.TypeBlock {
			kind = unix.S_IFBLK
		}
		if h.Devmajor < 0 || h.Devmajor > 1<<12-1 || h.Devminor < 0 || h.Devminor > 1<<20-1 {
			return fmt.Errorf("%w: device number %d:%d", ErrArchive, h.Devmajor, h.Devminor)
		}
		dev := unix.Mkdev(uint32(h.Devmajor), uint32(h.Devminor))
		err = u.replace(dir, base, func() error { return unix.Mknodat(dir, base, kind|mode, int(dev)) })
		if err == unix.EPERM {
			u.leaveOut(h.Name, "a device")
			return nil
		}
	default:
		return fmt.Errorf("%w: unknown kind of entry %q", ErrArchive, h.Typeflag)
	}
	if err != nil {
		return refuse(err)
	}
	return u.meta(dir, base, h, mode)
}

// replace calls make, and again after removing what is in the way: in an
// archive, the last entry of a name counts.
func (u *unpacker) replace(dir int, base string, make func() error) error {
	err := make()
	if err == unix.EEXIST {
		if err = u.remove(dir, base); err == nil {
			err = make()
		}
	}
	return err
}

// remove unlinks a name. A directory must be empty, but in layers.
func (u *unpacker) remove(dir int, base string) error {
	err := unix.Unlinkat(dir, base, 0)
	if err == unix.EISDIR {
		if u.layered {
			return u.removeAll(dir, base)
		}
		err = unix.Unlinkat(dir, base, unix.AT_REMOVEDIR)
	}
	return err
}

// file creates a regular file and its content.
func (u *unpacker) file(dir int, base string, h *tar.Header, mode uint32, r io.Reader) error {
	sparse := h.Typeflag == tar.TypeGNUSparse
	for k := range h.PAXRecords {
		sparse = sparse || strings.HasPrefix(k, "GNU.sparse.")
	}
	if sparse && h.Size > maxExpanded {
		return fmt.Errorf("%w: a sparse file of %d bytes; at most %d", ErrArchive, h.Size, int64(maxExpanded))
	}
	sparse = sparse || h.PAXRecords[CommentKey] == WithHoles
	var fd int
	err := u.replace(dir, base, func() (err error) {
		// Owner only, until the owner is right.
		fd, err = unix.Openat(dir, base, unix.O_WRONLY|unix.O_CREAT|unix.O_EXCL|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0o600)
		return err
	})
	if err != nil {
		return refuse(err)
	}
	err = u.content(fd, h.Size, sparse, r)
	if err == nil {
		err = u.fileMeta(fd, h, mode)
	}
	if cerr := unix.Close(fd); err == nil {
		err = cerr
	}
	return err
}

// content copies size bytes. Plain write(2) on purpose: no descriptor of the
// runtime's poller for each of a hundred thousand files.
func (u *unpacker) content(fd int, size int64, sparse bool, r io.Reader) error {
	var at int64
	for at < size {
		n, err := io.ReadFull(r, u.buf[:min(int64(len(u.buf)), size-at)])
		if err != nil {
			return err
		}
		for p := u.buf[:n]; len(p) > 0; {
			chunk := p
			if sparse {
				chunk = p[:min(len(p), holeSize)]
				if len(bytes.TrimLeft(chunk, "\x00")) == 0 {
					at += int64(len(chunk))
					p = p[len(chunk):]
					continue
				}
			}
			w, err := unix.Pwrite(fd, chunk, at)
			if err == unix.EINTR {
				continue
			}
			if err != nil {
				return err
			}
			at += int64(w)
			p = p[w:]
		}
	}
	if sparse {
		return unix.Ftruncate(fd, size)
	}
	return nil
}

// link creates a hard link to an entry that came before.
func (u *unpacker) link(dir int, base, target string) error {
	tdir, tbase := path.Split(target)
	if tbase == "" {
		return fmt.Errorf("%w: a hard link to the root", ErrArchive)
	}
	tfd, err := u.in(strings.TrimSuffix(tdir, "/"), unix.O_PATH|unix.O_DIRECTORY)
	if err != nil {
		return fmt.Errorf("%w: hard link to %q: %w", ErrArchive, "/"+target, err)
	}
	defer unix.Close(tfd)
	err = u.replace(dir, base, func() error { return unix.Linkat(tfd, tbase, dir, base, 0) })
	if err == unix.ENOENT || err == unix.EPERM {
		return fmt.Errorf("%w: hard link to %q: %w", ErrArchive, "/"+target, err)
	}
	return refuse(err)
}

// times returns access and modification time; archives without the former
// have it zero.
func times(h *tar.Header) [2]unix.Timespec {
	ts := func(t time.Time) unix.Timespec { return unix.NsecToTimespec(t.UnixNano()) }
	if y := h.ModTime.Year(); y < 1678 || y > 2261 { // UnixNano's range
		h.ModTime = time.Unix(0, 0)
	}
	if y := h.AccessTime.Year(); y < 1902 || y > 2261 {
		h.AccessTime = h.ModTime
	}
	return [2]unix.Timespec{ts(h.AccessTime), ts(h.ModTime)}
}

// fileMeta sets owner, mode, attributes and times, in the order in which none
// undoes another: chown clears setuid bits and capabilities.
func (u *unpacker) fileMeta(fd int, h *tar.Header, mode uint32) error {
	if err := unix.Fchown(fd, h.Uid, h.Gid); err != nil {
		return ownerError(h, err)
	}
	if err := unix.Fchmod(fd, mode); err != nil {
		return err
	}
	for k, v := range h.PAXRecords {
		if attr, ok := strings.CutPrefix(k, XattrPrefix); ok {
			if err := u.xattr(h.Name, attr, unix.Fsetxattr(fd, attr, []byte(v), 0)); err != nil {
				return err
			}
		}
	}
	ts := times(h)
	return unix.UtimesNanoAt(fd, "", ts[:], unix.AT_EMPTY_PATH)
}

func ownerError(h *tar.Header, err error) error {
	return fmt.Errorf("set owner %d:%d: %w", h.Uid, h.Gid, err)
}

// meta sets owner, mode and times of links, FIFOs and devices. Extended
// attributes of these are left out: the kernel allows them no user attributes,
// and capabilities mean nothing there.
func (u *unpacker) meta(dir int, base string, h *tar.Header, mode uint32) error {
	if err := unix.Fchownat(dir, base, h.Uid, h.Gid, unix.AT_SYMLINK_NOFOLLOW); err != nil {
		return ownerError(h, err)
	}
	if h.Typeflag != tar.TypeSymlink {
		// We have just made it and nobody else is here: it is no link.
		if err := unix.Fchmodat(dir, base, mode, 0); err != nil {
			return err
		}
	}
	ts := times(h)
	return unix.UtimesNanoAt(dir, base, ts[:], unix.AT_SYMLINK_NOFOLLOW)
}

// directoryMeta sets a directory's owner, mode and attributes; its times later.
func (u *unpacker) directoryMeta(dir int, base, name string, h *tar.Header, mode uint32) error {
	fd, err := unix.Openat(dir, base, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err != nil {
		return refuse(err)
	}
	defer unix.Close(fd)
	if err := unix.Fchown(fd, h.Uid, h.Gid); err != nil {
		return ownerError(h, err)
	}
	if err := unix.Fchmod(fd, mode); err != nil {
		return err
	}
	for k, v := range h.PAXRecords {
		if attr, ok := strings.CutPrefix(k, XattrPrefix); ok {
			if err := u.xattr(h.Name, attr, unix.Fsetxattr(fd, attr, []byte(v), 0)); err != nil {
				return err
			}
		}
	}
	u.dirs = append(u.dirs, dirTime{name, times(h)})
	return nil
}

func (u *unpacker) leaveOut(name, what string) {
	if u.skipped != nil {
		u.skipped(name, what)
	}
}

// xattr judges the result of setting an attribute.
func (u *unpacker) xattr(name, attr string, err error) error {
	if err == unix.EPERM && (strings.HasPrefix(attr, "trusted.") || strings.HasPrefix(attr, "security.")) {
		err = unix.ENOTSUP // for the root of a user namespace
	}
	switch err {
	case nil:
		return nil
	case unix.ENOTSUP: // security.selinux without SELinux, say
		u.leaveOut(name, "attribute "+attr)
		return nil
	case unix.ENOSPC, unix.EDQUOT:
		return fmt.Errorf("set attribute %s: %w", attr, err)
	case unix.EINVAL, unix.ERANGE, unix.E2BIG, unix.EPERM:
		return fmt.Errorf("%w: attribute %q: %w", ErrArchive, attr, err)
	}
	return fmt.Errorf("set attribute %s: %w", attr, err)
}

// dirTimes sets the directories' times, the last entry of a name last.
func (u *unpacker) dirTimes() error {
	for _, d := range u.dirs {
		fd, err := u.in(d.name, unix.O_RDONLY|unix.O_DIRECTORY)
		if err == unix.ENOENT || err == unix.ENOTDIR { // replaced by a later entry
			continue
		}
		if err == nil {
			err = unix.UtimesNanoAt(fd, "", d.times[:], unix.AT_EMPTY_PATH)
			unix.Close(fd)
		}
		if err != nil {
			return fmt.Errorf("set the time of %q: %w", "/"+d.name, err)
		}
	}
	return nil
}

// CheckRoot reports whether the tree below root can be a distro: it has /etc and
// a shell, found as a process inside would find it. The error wraps ErrNoShell.
func CheckRoot(root string) error {
	fd, err := unix.Open(root, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("open %s: %w", root, err)
	}
	u := &unpacker{root: fd, parent: -1}
	defer u.close()
	etc, err := u.in("etc", unix.O_PATH|unix.O_DIRECTORY)
	if err != nil {
		return fmt.Errorf("%w: it has no /etc (%w); is it the archive of a whole root?", ErrNoShell, err)
	}
	unix.Close(etc)
	for _, name := range []string{"bin/sh", "usr/bin/sh", "bin/bash", "usr/bin/bash", "bin/ash"} {
		sh, err := u.in(name, unix.O_PATH)
		if err != nil {
			continue
		}
		var st unix.Stat_t
		err = unix.Fstat(sh, &st)
		unix.Close(sh)
		if err == nil && st.Mode&unix.S_IFMT == unix.S_IFREG && st.Mode&0o111 != 0 {
			return nil
		}
	}
	return fmt.Errorf("%w: it has no shell (/bin/sh, /usr/bin/sh, bash or ash)", ErrNoShell)
}
