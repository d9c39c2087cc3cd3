// Package localfs serves a directory of this machine over 9P (package p9).
//
// # Confinement
//
// Nothing outside of the directory can be reached, whatever clients ask for and
// whoever changes the tree meanwhile. No path is ever put together: each node is a
// descriptor (O_PATH), and each step takes one name from one descriptor, with
// openat2(2)'s RESOLVE_BENEATH and RESOLVE_NO_SYMLINKS. A symbolic link is a node
// that can be read, not followed: that is for the client to do, in its own tree.
// A node stays the same file when it is renamed or removed.
//
// A node is opened for reading or writing through /proc/self/fd, which names the
// file of the descriptor, not a path. Only regular files and directories are opened: FIFOs,
// sockets and devices are the client's kernel's business.
package localfs

import (
	"encoding/binary"
	"errors"
	"math/bits"
	"os"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"

	"golang.org/x/sys/unix"

	"github.com/wsl2/wsl2/internal/p9"
)

// Config of a FS.
type Config struct {
	// ReadOnly refuses every change.
	ReadOnly bool
	// Owner, if set, is the one owner that the client and this machine know each
	// other's files by.
	Owner *p9.Owner
	// Untrusted clients make no devices and no setuid or setgid files, and see and set
	// no extended attributes but those of users: nothing of theirs takes effect here.
	Untrusted bool
	// FileMask and DirMask are permissions that the client does not see, of directories and of all else.
	FileMask, DirMask uint32
	// Metadata keeps what the client sets of owners and modes, of files and directories, in an extended attribute of
	// theirs, which only the client is shown: metadata.go.
	Metadata bool
}

// FS serves one directory.
type FS struct {
	cfg   Config
	root  *inode
	dev   uint64 // the root's
	watch *Watch // nil: nobody is told of changes; set before it serves

	lockMu  sync.Mutex
	lockers map[lockerKey]*locker // guarded by lockMu
}

// New opens the directory at path. The caller closes the FS when it no longer serves.
func New(path string, cfg Config) (*FS, error) {
	fd, err := unix.Open(path, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, &os.PathError{Op: "open", Path: path, Err: err}
	}
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		unix.Close(fd)
		return nil, &os.PathError{Op: "stat", Path: path, Err: err}
	}
	fs := &FS{cfg: cfg, dev: st.Dev, lockers: map[lockerKey]*locker{}}
	fs.root = &inode{fs: fs, fd: fd, refs: 1, mode: st.Mode, dev: st.Dev, qid: fs.qid(&st)}
	return fs, nil
}

// Close ends the FS. Nodes that clients still have stay what they are.
func (fs *FS) Close() error {
	fs.root.Close()
	return nil
}

// Attach returns the root, whatever the tree's name and whoever asks: the
// connection is theirs.
func (fs *FS) Attach(string, string, uint32) (p9.Node, error) { return fs.root.Clone(), nil }

// qid derives the identity of a file.
func (fs *FS) qid(st *unix.Stat_t) p9.QID {
	q := p9.QID{Type: qidType(st.Mode), Path: fs.path(st.Dev, st.Ino)}
	// Never 0, with which v9fs would not cache.
	q.Version = uint32(st.Ctim.Nsec) ^ uint32(st.Ctim.Sec)<<10 ^ uint32(st.Size) | 1
	return q
}

// path is the number of a file. Those of other file systems, mounted beneath the root,
// are told apart from the root's by a hash.
func (fs *FS) path(dev, ino uint64) uint64 {
	if dev == fs.dev {
		return ino
	}
	hi, lo := bits.Mul64(ino^dev<<32, 0x9e3779b97f4a7c15)
	return hi ^ lo ^ dev
}

func qidType(mode uint32) uint8 {
	switch mode & unix.S_IFMT {
	case unix.S_IFDIR:
		return p9.QTDir
	case unix.S_IFLNK:
		return p9.QTSymlink
	}
	return p9.QTFile
}

// inode is a node: all clones of it share the one descriptor.
type inode struct {
	fs   *FS
	fd   int    // O_PATH; immutable
	mode uint32 // S_IFMT of it never changes
	dev  uint64 // st_dev
	qid  p9.QID // as it was when it was walked to
	refs int32  // atomic

	counted bool // by fs.watch, as one of the clients'; immutable

	mu     sync.Mutex
	parent *inode // a reference; nil for the root; guarded by mu
	name   string // in parent, when last seen; guarded by mu
}

var _ p9.Node = (*inode)(nil)

func (n *inode) QID() p9.QID { return n.qid }

func (n *inode) Clone() p9.Node {
	atomic.AddInt32(&n.refs, 1)
	return n
}

// Close ends a reference, and with the last one those to the directories above.
func (n *inode) Close() {
	for n != nil && atomic.AddInt32(&n.refs, -1) == 0 {
		if n.counted {
			n.fs.watch.forget(n.qid.Path)
		}
		unix.Close(n.fd)
		n = n.parent
	}
}

func (n *inode) Parent() p9.Node {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.parent == nil {
		return n.Clone()
	}
	return n.parent.Clone()
}

// open is openat2(2) of one name.
func (n *inode) open(name string, flags uint64, mode uint32) (int, error) {
	how := unix.OpenHow{Flags: flags | unix.O_NOFOLLOW | unix.O_CLOEXEC, Mode: uint64(mode),
		Resolve: unix.RESOLVE_BENEATH | unix.RESOLVE_NO_SYMLINKS}
	for {
		fd, err := unix.Openat2(n.fd, name, &how)
		// EAGAIN: something was renamed meanwhile, and the kernel could not be sure.
		if err != unix.EINTR && err != unix.EAGAIN {
			return fd, err
		}
	}
}

func (n *inode) Walk(name string) (p9.Node, error) {
	if n.mode&unix.S_IFMT != unix.S_IFDIR {
		return nil, unix.ENOTDIR
	}
	fd, err := n.open(name, unix.O_PATH, 0)
	if err != nil {
		return nil, err
	}
	return n.child(name, fd)
}

// child makes a node of the descriptor, which it owns.
func (n *inode) child(name string, fd int) (*inode, error) {
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		unix.Close(fd)
		return nil, err
	}
	n.Clone()
	made := &inode{fs: n.fs, fd: fd, mode: st.Mode, dev: st.Dev, qid: n.fs.qid(&st), refs: 1, parent: n, name: name}
	if n.fs.watch != nil && st.Mode&unix.S_IFMT == unix.S_IFDIR {
		made.counted = true
		n.fs.watch.add(made)
	}
	return made, nil
}

// magic is the path that names the file of the descriptor.
func (n *inode) magic() string { return "/proc/self/fd/" + strconv.Itoa(n.fd) }

func (n *inode) symlink() bool { return n.mode&unix.S_IFMT == unix.S_IFLNK }

func (n *inode) writable() error {
	if n.fs.cfg.ReadOnly {
		return unix.EROFS
	}
	return nil
}

func (n *inode) GetAttr(p9.AttrMask) (p9.Attr, error) {
	var st unix.Statx_t
	const want = unix.STATX_BASIC_STATS | unix.STATX_BTIME
	if err := unix.Statx(n.fd, "", unix.AT_EMPTY_PATH|unix.AT_SYMLINK_NOFOLLOW|unix.AT_STATX_SYNC_AS_STAT, want, &st); err != nil {
		return p9.Attr{}, err
	}
	s := unix.Stat_t{Ino: st.Ino, Dev: unix.Mkdev(st.Dev_major, st.Dev_minor), Mode: uint32(st.Mode), Size: int64(st.Size),
		Ctim: unix.Timespec{Sec: st.Ctime.Sec, Nsec: int64(st.Ctime.Nsec)}}
	a := p9.Attr{
		Valid: p9.AttrBasic, QID: n.fs.qid(&s), Mode: uint32(st.Mode), Nlink: uint64(st.Nlink),
		Rdev: unix.Mkdev(st.Rdev_major, st.Rdev_minor), Size: st.Size, Blksize: uint64(st.Blksize), Blocks: st.Blocks,
		Atime: toTime(st.Atime), Mtime: toTime(st.Mtime), Ctime: toTime(st.Ctime),
	}
	if st.Mask&unix.STATX_BTIME != 0 {
		a.Valid |= p9.AttrBtime
		a.Btime = toTime(st.Btime)
	}
	a.UID, a.GID = st.Uid, st.Gid
	if o := n.fs.cfg.Owner; o != nil {
		o.Attr(&a)
	}
	if !n.symlink() {
		a.Mode &^= n.mask()
	}
	if n.hasMetadata() {
		n.readMetadata(&a)
	}
	return a, nil
}

func toTime(t unix.StatxTimestamp) p9.Time { return p9.Time{Sec: t.Sec, Nsec: uint64(t.Nsec)} }

// dirPermissions and filePermissions are the mode's bits that a client may set.
func (n *inode) dirPermissions(mode uint32) uint32 {
	if n.fs.cfg.Untrusted {
		return mode & (0o777 | unix.S_ISVTX | unix.S_ISGID)
	}
	return mode & 0o7777
}

func (n *inode) filePermissions(mode uint32) uint32 {
	if n.fs.cfg.Untrusted {
		return mode & (0o777 | unix.S_ISVTX)
	}
	return mode & 0o7777
}

func (n *inode) SetAttr(a p9.SetAttr) error {
	if err := n.writable(); err != nil {
		return err
	}
	if n.hasMetadata() && a.Valid&(p9.SetUID|p9.SetGID|p9.SetMode) != 0 {
		if err := n.writeMetadata(a); err != nil {
			return err
		}
		a.Valid &^= p9.SetUID | p9.SetGID | p9.SetMode
	}
	if a.Valid&(p9.SetUID|p9.SetGID) != 0 {
		if err := n.chown(a); err != nil {
			return err
		}
	}
	if a.Valid&p9.SetSize != 0 {
		switch n.mode & unix.S_IFMT {
		case unix.S_IFREG:
		case unix.S_IFDIR:
			return unix.EISDIR
		default:
			return unix.EINVAL
		}
		if err := unix.Truncate(n.magic(), int64(a.Size)); err != nil {
			return err
		}
	}
	if a.Valid&p9.SetMode != 0 { // after chown(2), which takes setuid bits away
		if n.symlink() {
			return unix.EOPNOTSUPP
		}
		mode := n.filePermissions(a.Mode)
		if n.mode&unix.S_IFMT == unix.S_IFDIR {
			mode = n.dirPermissions(a.Mode)
		}
		if err := unix.Chmod(n.magic(), mode); err != nil {
			return err
		}
	}
	if a.Valid&(p9.SetAtime|p9.SetMtime) != 0 {
		times := [2]unix.Timespec{
			toTimespec(a.Valid, p9.SetAtime, p9.SetAtimeTo, a.Atime), toTimespec(a.Valid, p9.SetMtime, p9.SetMtimeTo, a.Mtime),
		}
		return unix.UtimesNanoAt(n.fd, "", times[:], unix.AT_EMPTY_PATH|unix.AT_SYMLINK_NOFOLLOW)
	}
	return nil
}

func toTimespec(valid, set, to p9.SetMask, t p9.Time) unix.Timespec {
	switch {
	case valid&set == 0:
		return unix.Timespec{Nsec: unix.UTIME_OMIT}
	case valid&to == 0:
		return unix.Timespec{Nsec: unix.UTIME_NOW}
	}
	return unix.Timespec{Sec: t.Sec, Nsec: int64(t.Nsec)}
}

func (n *inode) chown(a p9.SetAttr) error {
	if o := n.fs.cfg.Owner; o != nil {
		if err := o.SetAttr(&a); err != nil {
			return err
		}
	}
	uid, gid := -1, -1
	if a.Valid&p9.SetUID != 0 {
		uid = int(a.UID)
	}
	if a.Valid&p9.SetGID != 0 {
		gid = int(a.GID)
	}
	return unix.Fchownat(n.fd, "", uid, gid, unix.AT_EMPTY_PATH|unix.AT_SYMLINK_NOFOLLOW)
}

func (n *inode) Statfs() (p9.Statfs, error) {
	var st unix.Statfs_t
	if err := unix.Fstatfs(n.fd, &st); err != nil {
		return p9.Statfs{}, err
	}
	return p9.Statfs{Type: uint32(st.Type), Bsize: uint32(st.Bsize), Blocks: st.Blocks, Bfree: st.Bfree, Bavail: st.Bavail,
		Files: st.Files, Ffree: st.Ffree, Fsid: uint64(uint32(st.Fsid.Val[0])) | uint64(uint32(st.Fsid.Val[1]))<<32,
		Namelen: uint32(min(st.Namelen, p9.MaxName))}, nil
}

// openFlags are those of open(2) that make sense here. O_DIRECT is for the client's
// own cache: alignment need not be the same on this side.
const openFlags = unix.O_ACCMODE | unix.O_APPEND | unix.O_TRUNC | unix.O_DSYNC | unix.O_SYNC | unix.O_DIRECTORY

func (n *inode) Open(flags uint32) (p9.Handle, error) {
	if flags&(unix.O_ACCMODE|unix.O_TRUNC) != 0 {
		if err := n.writable(); err != nil {
			return nil, err
		}
	}
	switch n.mode & unix.S_IFMT {
	case unix.S_IFREG, unix.S_IFDIR:
	case unix.S_IFLNK:
		return nil, unix.ELOOP
	default:
		return nil, unix.ENXIO
	}
	for {
		fd, err := unix.Open(n.magic(), int(flags&openFlags)|unix.O_CLOEXEC|unix.O_NONBLOCK|unix.O_NOCTTY, 0)
		if err == unix.EINTR {
			continue
		}
		if err != nil {
			return nil, err
		}
		return &handle{n: n, fd: fd}, nil
	}
}

func (n *inode) Create(name string, flags, mode, gid uint32) (p9.Node, p9.Handle, error) {
	if err := n.writable(); err != nil {
		return nil, nil, err
	}
	flags &= openFlags&^unix.O_DIRECTORY | unix.O_EXCL
	for {
		// Exclusively, so that nothing is opened that is not a file made here.
		how := uint64(flags&^unix.O_TRUNC) | unix.O_CREAT | unix.O_EXCL | unix.O_NONBLOCK
		fd, err := n.open(name, how, n.ownable(n.filePermissions(mode), 0o600))
		if err == nil {
			node, h, err := n.created(name, fd)
			if err == nil {
				node.(*inode).keepMode(n.filePermissions(mode))
			}
			return node, h, err
		}
		if err != unix.EEXIST || flags&unix.O_EXCL != 0 {
			return nil, nil, err
		}
		node, err := n.Walk(name)
		if err == unix.ENOENT { // gone again
			continue
		}
		if err != nil {
			return nil, nil, err
		}
		h, err := node.Open(flags)
		if err != nil {
			node.Close()
			return nil, nil, err
		}
		return node, h, nil
	}
}

// created makes a node of the file that the descriptor has open, whatever the name is of by then.
func (n *inode) created(name string, fd int) (p9.Node, p9.Handle, error) {
	path, err := unix.Open("/proc/self/fd/"+strconv.Itoa(fd), unix.O_PATH|unix.O_CLOEXEC, 0)
	if err != nil {
		unix.Close(fd)
		return nil, nil, err
	}
	node, err := n.child(name, path)
	if err != nil {
		unix.Close(fd)
		return nil, nil, err
	}
	return node, &handle{n: node, fd: fd}, nil
}

// made returns the QID of what was just made. Someone else may have put another
// in its place, which is then what the name stands for.
func (n *inode) made(name string, err error) (p9.QID, error) {
	if err != nil {
		return p9.QID{}, err
	}
	node, err := n.Walk(name)
	if err != nil {
		return p9.QID{}, err
	}
	defer node.Close()
	return node.QID(), nil
}

func (n *inode) Mkdir(name string, mode, gid uint32) (p9.QID, error) {
	if err := n.writable(); err != nil {
		return p9.QID{}, err
	}
	q, err := n.made(name, unix.Mkdirat(n.fd, name, n.ownable(n.dirPermissions(mode), 0o700)))
	if err == nil && n.fs.cfg.Metadata {
		if made, err := n.Walk(name); err == nil {
			made.(*inode).keepMode(n.dirPermissions(mode))
			made.Close()
		}
	}
	return q, err
}

func (n *inode) Mknod(name string, mode, major, minor, gid uint32) (p9.QID, error) {
	if err := n.writable(); err != nil {
		return p9.QID{}, err
	}
	kind := mode & unix.S_IFMT
	switch kind {
	case unix.S_IFREG, unix.S_IFIFO, unix.S_IFSOCK:
	case unix.S_IFCHR, unix.S_IFBLK:
		if n.fs.cfg.Untrusted {
			return p9.QID{}, unix.EPERM
		}
	default:
		return p9.QID{}, unix.EINVAL
	}
	mode = kind | n.filePermissions(mode)
	return n.made(name, unix.Mknodat(n.fd, name, mode, int(unix.Mkdev(major, minor))))
}

func (n *inode) Symlink(name, target string, gid uint32) (p9.QID, error) {
	if err := n.writable(); err != nil {
		return p9.QID{}, err
	}
	return n.made(name, unix.Symlinkat(target, n.fd, name))
}

func (n *inode) Readlink() (string, error) {
	if !n.symlink() {
		return "", unix.EINVAL
	}
	b := make([]byte, unix.PathMax)
	c, err := unix.Readlinkat(n.fd, "", b)
	if err != nil {
		return "", err
	}
	return string(b[:c]), nil
}

func (n *inode) Link(name string, target p9.Node) error {
	if err := n.writable(); err != nil {
		return err
	}
	of, err := own(target)
	if err != nil {
		return err
	}
	// By way of /proc: AT_EMPTY_PATH would need a capability.
	return unix.Linkat(unix.AT_FDCWD, of.magic(), n.fd, name, unix.AT_SYMLINK_FOLLOW)
}

func (n *inode) RenameAt(oldName string, newDir p9.Node, newName string) error {
	if err := n.writable(); err != nil {
		return err
	}
	to, err := own(newDir)
	if err != nil {
		return err
	}
	return unix.Renameat(n.fd, oldName, to.fd, newName)
}

// RenameAt2 is RenameAt with flags of renameat2(2), but for what makes a device.
func (n *inode) RenameAt2(oldName string, newDir p9.Node, newName string, flags uint32) error {
	if err := n.writable(); err != nil {
		return err
	}
	if flags&^(unix.RENAME_NOREPLACE|unix.RENAME_EXCHANGE) != 0 {
		return unix.EINVAL
	}
	to, err := own(newDir)
	if err != nil {
		return err
	}
	return unix.Renameat2(n.fd, oldName, to.fd, newName, uint(flags))
}

// own is a node of the client's as one of ours: it may have others (package replay).
func own(n p9.Node) (*inode, error) {
	i, ok := n.(*inode)
	if !ok {
		return nil, unix.EXDEV
	}
	return i, nil
}

func (n *inode) UnlinkAt(name string, flags uint32) error {
	if err := n.writable(); err != nil {
		return err
	}
	if flags&^p9.UnlinkDir != 0 {
		return unix.EINVAL
	}
	return unix.Unlinkat(n.fd, name, int(flags))
}

// here returns the node's directory, with a reference, and its name there, if that is still its name.
func (n *inode) here() (*inode, string, error) {
	n.mu.Lock()
	parent, name := n.parent, n.name
	if parent == nil {
		n.mu.Unlock()
		return nil, "", unix.EBUSY // the root
	}
	parent.Clone()
	n.mu.Unlock()
	now, err := parent.Walk(name)
	if err == nil {
		var a, b unix.Stat_t
		err = errors.Join(unix.Fstat(n.fd, &a), unix.Fstat(now.(*inode).fd, &b))
		if err == nil && (a.Ino != b.Ino || a.Dev != b.Dev) {
			err = unix.ESTALE
		}
		now.Close()
	} else if err == unix.ENOENT {
		err = unix.ESTALE
	}
	if err != nil {
		parent.Close()
		return nil, "", err
	}
	return parent, name, nil
}

func (n *inode) Rename(newDir p9.Node, newName string) error {
	parent, name, err := n.here()
	if err != nil {
		return err
	}
	defer parent.Close()
	if err := parent.RenameAt(name, newDir, newName); err != nil {
		return err
	}
	newDir.Clone()
	n.mu.Lock()
	old := n.parent
	n.parent, n.name = newDir.(*inode), newName
	n.mu.Unlock()
	old.Close()
	return nil
}

func (n *inode) Remove() error {
	parent, name, err := n.here()
	if err != nil {
		return err
	}
	defer parent.Close()
	flags := uint32(0)
	if n.mode&unix.S_IFMT == unix.S_IFDIR {
		flags = p9.UnlinkDir
	}
	return parent.UnlinkAt(name, flags)
}

// xattrAllowed tells whether the client may see and set an attribute.
func (n *inode) xattrAllowed(name string) bool {
	if strings.HasPrefix(name, metadataPrefix) && n.fs.cfg.Metadata {
		return false
	}
	return !n.fs.cfg.Untrusted || strings.HasPrefix(name, "user.")
}

func (n *inode) Xattr(name string) ([]byte, error) {
	if n.symlink() { // the kernel has no call for those of a descriptor's link
		if name == "" {
			return nil, nil
		}
		return nil, unix.EOPNOTSUPP
	}
	if name != "" && !n.xattrAllowed(name) {
		return nil, unix.EOPNOTSUPP
	}
	b := make([]byte, 256)
	for {
		var c int
		var err error
		if name == "" {
			c, err = unix.Listxattr(n.magic(), b)
		} else {
			c, err = unix.Getxattr(n.magic(), name, b)
		}
		if err == unix.ERANGE && len(b) < 64<<10 {
			b = make([]byte, 64<<10)
			continue
		}
		if err != nil {
			return nil, err
		}
		b = b[:c]
		break
	}
	if name != "" || !n.fs.cfg.Untrusted && !n.fs.cfg.Metadata {
		return b, nil
	}
	var list []byte
	for one := range strings.SplitAfterSeq(string(b), "\x00") {
		if n.xattrAllowed(one) {
			list = append(list, one...)
		}
	}
	return list, nil
}

func (n *inode) SetXattr(name string, value []byte, flags int) error {
	if err := n.writable(); err != nil {
		return err
	}
	switch {
	case n.symlink(), !n.xattrAllowed(name):
		return unix.EOPNOTSUPP
	case value == nil:
		return unix.Removexattr(n.magic(), name)
	}
	return unix.Setxattr(n.magic(), name, value, flags)
}

// handle is an open file or directory.
type handle struct {
	n  *inode // the fid's, which outlives the handle
	fd int

	lockers map[*locker]bool // who has locked the file by it; guarded by FS.lockMu
	whole   *locker          // who has all of it, one of those; guarded by FS.lockMu

	mu      sync.Mutex // for directories: one reads at a time
	pos     uint64     // where entries begins; guarded by mu
	buf     []byte     // of getdents64(2); guarded by mu
	entries []byte     // what has not been returned yet, in buf; guarded by mu
}

var _ p9.Handle = (*handle)(nil)

func (h *handle) Close() error {
	h.endLocks()
	return unix.Close(h.fd)
}

func (h *handle) ReadAt(p []byte, offset int64) (int, error) {
	done := 0
	for done < len(p) {
		c, err := unix.Pread(h.fd, p[done:], offset+int64(done))
		switch {
		case err == unix.EINTR:
			continue
		case err != nil && done == 0:
			return 0, err
		case err != nil || c == 0:
			return done, nil
		}
		done += c
	}
	return done, nil
}

func (h *handle) WriteAt(p []byte, offset int64) (int, error) {
	for {
		c, err := unix.Pwrite(h.fd, p, offset)
		if err != unix.EINTR {
			return max(c, 0), err
		}
	}
}

func (h *handle) Truncate(size int64) error {
	if err := h.n.writable(); err != nil {
		return err
	}
	return unix.Ftruncate(h.fd, size)
}

// SeekData finds data and holes: lseek(2) with SEEK_DATA or SEEK_HOLE. Nothing else uses the file's position.
func (h *handle) SeekData(offset int64, whence int) (int64, error) {
	if h.n.mode&unix.S_IFMT != unix.S_IFREG {
		return 0, unix.EINVAL
	}
	return unix.Seek(h.fd, offset, whence)
}

// Allocate is fallocate(2).
func (h *handle) Allocate(mode uint32, offset, size int64) error {
	for {
		if err := unix.Fallocate(h.fd, mode, offset, size); err != unix.EINTR {
			return err
		}
	}
}

func (h *handle) Fsync(datasync bool) error {
	if datasync {
		return unix.Fdatasync(h.fd)
	}
	return unix.Fsync(h.fd)
}

// Offsets of struct linux_dirent64 (getdents64(2)).
const (
	direntOff    = 8
	direntReclen = 16
	direntType   = 18
	direntName   = 19
)

func (h *handle) Readdir(b []byte, offset uint64) ([]byte, error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.buf == nil {
		if h.n.mode&unix.S_IFMT != unix.S_IFDIR {
			return nil, unix.ENOTDIR
		}
		h.buf = make([]byte, 32<<10)
	}
	// The offsets are the file system's own: stable while the directory changes. Those
	// that v9fs asks for at the beginning of a directory are 0.
	if offset != h.pos || offset == 0 {
		if _, err := unix.Seek(h.fd, int64(offset), unix.SEEK_SET); err != nil {
			return nil, err
		}
		h.pos, h.entries = offset, nil
	}
	empty := len(b)
	for {
		if len(h.entries) == 0 {
			c, err := unix.Getdents(h.fd, h.buf)
			if err == unix.EINTR {
				continue
			}
			if err != nil && len(b) == empty {
				return nil, err
			}
			if err != nil || c == 0 {
				return b, nil
			}
			h.entries = h.buf[:c]
		}
		e := h.entries
		length := int(binary.NativeEndian.Uint16(e[direntReclen:]))
		name, _, _ := strings.Cut(string(e[direntName:length]), "\x00")
		next := binary.NativeEndian.Uint64(e[direntOff:])
		if len(b)+p9.DirentSize(name) > cap(b) {
			if len(b) == empty {
				return nil, unix.EINVAL
			}
			return b, nil
		}
		// Types of readdir(3) are those of the mode, shifted.
		q := p9.QID{Type: qidType(uint32(e[direntType]) << 12), Path: h.n.fs.path(h.n.dev, binary.NativeEndian.Uint64(e))}
		if name == ".." { // what is above the root is nobody's business
			q.Path = h.n.qid.Path
		}
		b = p9.AppendDirent(b, q, next, e[direntType], name)
		h.pos, h.entries = next, e[length:]
	}
}
