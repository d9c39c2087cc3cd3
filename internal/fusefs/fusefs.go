// Package fusefs is a file system of package p9 as one of FUSE: what localfs confines and
// a 9P client reaches has one translation to what the kernel asks for, whether that comes
// from /dev/fuse or from a guest's virtio-fs. The protocol itself is go-fuse's.
//
// # Nodes
//
// The kernel knows a file by a node ID, which it counts references of and gives back with
// FORGET. All names of a file have the same ID, or the kernel would cache it twice. An ID is
// never used again, and a file that the kernel knows is held open, so that its
// QID's path cannot become another's.
//
// # Trust
//
// Who sends the requests may be hostile: IDs and handles are looked up, never believed, and
// stay valid while a request uses them, whatever is forgotten or released meanwhile. Names are
// checked as those of 9P are.
package fusefs

import (
	"cmp"
	"errors"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"

	"github.com/wsl2/wsl2/internal/p9"
	"github.com/wsl2/wsl2/internal/p9/replay"
)

// MaxIO is the largest read and write that the kernel is told of.
const MaxIO = 1 << 20

// Config of a FS.
type Config struct {
	// Timeout is how long the kernel may keep names and attributes without asking again. What is opened is
	// up to date nevertheless.
	Timeout time.Duration
	// AttrTimeout, if longer, is how long it may keep attributes. Where names are asked for each time, they come with them.
	AttrTimeout time.Duration
	// Lease, if set, is the same for one node, where that is longer: its changes are told (Replay).
	Lease func(p9.Node) time.Duration
	// Root, if set, is where the tree is mounted: links with absolute targets point there.
	Root string
	// Owner, if set, maps owners for the kernel.
	Owner *p9.Owner
	// Access, if set, answers access(2), by attributes that are not mapped; without it the kernel does, by owner and mode.
	Access func(a p9.Attr, mask uint32) error
	// LockWait, if set, is how long a lock is waited for before the answer is EINTR: for a kernel that
	// does not tell of signals.
	LockWait time.Duration
	// Replay, if set, is where changes by others are replayed for the kernel (package replay).
	Replay *replay.Stage
	// MaxNodes and MaxHandles bound what the kernel may hold; 0 means no bound.
	MaxNodes, MaxHandles int
	// Full, if set, is called when it holds half of MaxNodes, and at each eighth more: to have it forget some. It does not block.
	Full func()
}

// What a Node or Handle may be able to do beyond what 9P has.
type (
	// renamer is renameat2(2)'s flags.
	renamer interface {
		RenameAt2(oldName string, newDir p9.Node, newName string, flags uint32) error
	}
	// walker has a child's attributes with the child: where each is asked for on another machine.
	walker interface {
		WalkAttr(name string, mask p9.AttrMask) (p9.Node, p9.Attr, error)
		CreateAttr(name string, flags, mode, gid uint32, mask p9.AttrMask) (p9.Node, p9.Handle, p9.Attr, error)
	}
	// privileged has set-id bits that go when somebody changes it, but not by the change itself.
	privileged interface {
		DropPrivileges() error
	}
	// seeker finds data and holes (lseek(2)'s SEEK_DATA and SEEK_HOLE).
	seeker interface {
		SeekData(offset int64, whence int) (int64, error)
	}
	allocator interface {
		Allocate(mode uint32, offset, size int64) error
	}
)

// FS answers a kernel's requests. Close it when no more will come.
type FS struct {
	fuse.RawFileSystem // what is not below is ENOSYS
	cfg                Config

	mu         sync.Mutex
	nodes      map[uint64]*node      // by node ID; guarded by mu
	ids        map[uint64]uint64     // node IDs by QID.Path; guarded by mu
	names      map[entryName]uint64  // the node that was looked up by it last, with Config.Replay; guarded by mu
	handles    map[uint64]*handle    // guarded by mu
	locks      map[lockOwner]*handle // guarded by mu
	prune      chan struct{}         // holds a token while there are more nodes than Prune wants; nil without it
	keep       int                   // nodes that Prune wants at most; guarded by mu
	full       int                   // nodes at which Config.Full is called next; guarded by mu
	lastNode   uint64                // guarded by mu
	lastHandle uint64                // guarded by mu
}

type node struct {
	p9.Node                 // guarded by FS.mu
	lookups uint64          // guarded by FS.mu
	dir     uint64          // where it was looked up last, by name; guarded by FS.mu
	name    string          // guarded by FS.mu
	before  uint64          // the node that had the name before; guarded by FS.mu
	away    bool            // it may be where Node was not walked from, which nobody may watch; guarded by FS.mu
	told    state           // what the kernel may take it for, or nothing for whatever it is; guarded by FS.mu
	keeps   time.Time       // until when the kernel may keep its content; guarded by FS.mu
	refused map[uint32]bool // threads that are to look up anew what they open; guarded by FS.mu
}

// maxRefused bounds how many threads that do not come back are remembered for a node.
const maxRefused = 64

// state tells whether a file has changed.
type state struct {
	size, links  uint64
	mtime, ctime p9.Time
}

func stateOf(a *p9.Attr) state { return state{a.Size, a.Nlink, a.Mtime, a.Ctime} }

type handle struct {
	p9.Handle
	node p9.Node // a reference
	refs int     // a table's, and those of requests; guarded by FS.mu
	of   uint64  // for locks: the handle that the first of them came by; immutable
}

// New returns a FS of the tree at root, which it owns.
func New(root p9.Node, cfg Config) *FS {
	return &FS{RawFileSystem: fuse.NewDefaultRawFileSystem(), cfg: cfg, full: cfg.MaxNodes / 2,
		nodes: map[uint64]*node{fuse.FUSE_ROOT_ID: {Node: root, lookups: 1}}, ids: map[uint64]uint64{root.QID().Path: fuse.FUSE_ROOT_ID},
		names: map[entryName]uint64{}, handles: map[uint64]*handle{}, locks: map[lockOwner]*handle{}, lastNode: fuse.FUSE_ROOT_ID}
}

// Options are those of a mount, or of a protocol server, that serves a FS.
func Options() *fuse.MountOptions {
	return &fuse.MountOptions{MaxWrite: MaxIO, MaxReadAhead: MaxIO, EnableLocks: true,
		// Else each write is preceded by a request for an attribute that may have to go with it (withoutPrivileges).
		ExtraCapabilities: fuse.CAP_HANDLE_KILLPRIV_V2,
		// Nothing would keep what READDIRPLUS brings.
		DisableReadDirPlus: true}
}

// Close ends all that the kernel still had.
func (fs *FS) Close() {
	fs.mu.Lock()
	nodes, handles, locks := fs.nodes, fs.handles, fs.locks
	fs.nodes, fs.ids, fs.handles, fs.locks = map[uint64]*node{}, map[uint64]uint64{}, map[uint64]*handle{}, map[lockOwner]*handle{}
	fs.mu.Unlock()
	for _, h := range locks {
		fs.put(nil, h)
	}
	for _, h := range handles {
		fs.put(nil, h)
	}
	for _, n := range nodes {
		n.Close()
	}
}

func (fs *FS) String() string { return "wsl2" }

// status is what the kernel is told.
func status(err error) fuse.Status {
	var errno syscall.Errno
	switch {
	case err == nil:
		return fuse.OK
	case errors.As(err, &errno) && errno > 0 && errno < 512: // the kernel takes no others, and would wait for ever
		return fuse.Status(errno)
	}
	return fuse.EIO
}

// get returns a reference of a node, which the caller closes.
func (fs *FS) get(id uint64) (p9.Node, error) {
	fs.mu.Lock()
	defer fs.mu.Unlock()
	n := fs.nodes[id]
	if n == nil {
		return nil, unix.ESTALE
	}
	return n.Clone(), nil
}

// walker is a node that has the attributes of its children; nil if it has not, or they would be older than the lease.
func (fs *FS) walker(n p9.Node) walker {
	if w, ok := n.(walker); ok && fs.cfg.Lease == nil {
		return w
	}
	return nil
}

// entry gives a node, which it takes, to the kernel: as name of dir. Its attributes, if they are not known, are asked for.
func (fs *FS) entry(cancel <-chan struct{}, n p9.Node, a *p9.Attr, dir uint64, name string, out *fuse.EntryOut) fuse.Status {
	timeout := fs.cfg.Timeout // where attributes come with names there are no leases
	if a == nil {
		var now p9.Attr
		var err error
		with, end := until(cancel, n)
		now, timeout, err = fs.getAttr(0, with) // as what it is found to be now
		end()
		if err != nil {
			n.Close()
			return status(err)
		}
		a = &now
	}
	path := n.QID().Path
	fs.mu.Lock()
	id := fs.ids[path]
	known := fs.nodes[id]
	switch {
	case known != nil:
		known.lookups++
		known.tell(stateOf(a))
		if known.away || known.dir != dir { // not each time: those below hold the one that they were walked from
			known.Node, n, known.away = n, known.Node, false
		}
	case fs.cfg.MaxNodes > 0 && len(fs.nodes) >= fs.cfg.MaxNodes:
		fs.mu.Unlock()
		n.Close()
		return fuse.Status(unix.EMFILE)
	default:
		if fs.cfg.Full != nil && len(fs.nodes) >= fs.full {
			fs.full = len(fs.nodes) + fs.cfg.MaxNodes/8
			fs.cfg.Full()
		}
		fs.lastNode++
		id = fs.lastNode
		fs.nodes[id], fs.ids[path] = &node{Node: n, lookups: 1, told: stateOf(a)}, id
	}
	fs.setName(id, dir, name)
	fs.isFull()
	fs.mu.Unlock()
	if known != nil {
		n.Close()
	}
	out.NodeId, out.Generation = id, 1
	out.SetEntryTimeout(timeout)
	out.SetAttrTimeout(fs.timeoutOf(a, timeout))
	fs.attr(a, &out.Attr)
	return fuse.OK
}

// Forget gives references back.
func (fs *FS) Forget(id, lookups uint64) {
	fs.mu.Lock()
	n := fs.nodes[id]
	if n == nil || id == fuse.FUSE_ROOT_ID || lookups < n.lookups {
		if n != nil && id != fuse.FUSE_ROOT_ID {
			n.lookups -= lookups
		}
		fs.mu.Unlock()
		return
	}
	fs.setName(id, 0, "")
	delete(fs.nodes, id)
	delete(fs.ids, n.QID().Path)
	if len(fs.nodes) < fs.cfg.MaxNodes/4 {
		fs.full = fs.cfg.MaxNodes / 2
	}
	fs.mu.Unlock()
	n.Close()
}

func (fs *FS) attr(a *p9.Attr, out *fuse.Attr) {
	if fs.cfg.Owner != nil {
		fs.cfg.Owner.Attr(a)
	}
	*out = fuse.Attr{Ino: a.QID.Path, Size: a.Size, Blocks: a.Blocks, Mode: a.Mode, Nlink: uint32(a.Nlink),
		Owner: fuse.Owner{Uid: a.UID, Gid: a.GID}, Rdev: uint32(a.Rdev), Blksize: uint32(a.Blksize),
		Atime: uint64(a.Atime.Sec), Mtime: uint64(a.Mtime.Sec), Ctime: uint64(a.Ctime.Sec),
		Atimensec: uint32(a.Atime.Nsec), Mtimensec: uint32(a.Mtime.Nsec), Ctimensec: uint32(a.Ctime.Nsec)}
}

// named calls what with the node of a directory, for a name in it.
func (fs *FS) named(cancel <-chan struct{}, dir uint64, name string, what func(p9.Node) error) fuse.Status {
	if err := p9.CheckName(name); err != nil {
		return status(err)
	}
	return fs.with(cancel, dir, what)
}

func (fs *FS) with(cancel <-chan struct{}, id uint64, what func(p9.Node) error) fuse.Status {
	n, err := fs.get(id)
	if err != nil {
		return status(err)
	}
	defer n.Close()
	with, end := until(cancel, n)
	defer end()
	return status(what(with))
}

func (fs *FS) Lookup(cancel <-chan struct{}, in *fuse.InHeader, name string, out *fuse.EntryOut) fuse.Status {
	s := fs.lookup(cancel, in.NodeId, name, out)
	// That there is none is kept as well, but never for a lease: nothing asks when it is opened.
	if s == fuse.ENOENT && fs.cfg.Timeout > 0 {
		out.SetEntryTimeout(fs.cfg.Timeout)
		return fuse.OK
	}
	return s
}

func (fs *FS) lookup(cancel <-chan struct{}, dir uint64, name string, out *fuse.EntryOut) fuse.Status {
	var child p9.Node
	var a *p9.Attr
	s := fs.named(cancel, dir, name, func(n p9.Node) (err error) {
		if w := fs.walker(n); w != nil {
			a = new(p9.Attr)
			child, *a, err = w.WalkAttr(name, p9.AttrBasic)
		} else {
			child, err = n.Walk(name)
		}
		return err
	})
	if s != fuse.OK {
		return s
	}
	return fs.entry(cancel, child, a, dir, name, out)
}

// attrOf tells the kernel a node's attributes.
func (fs *FS) attrOf(id uint64, n p9.Node, out *fuse.AttrOut) error {
	a, timeout, err := fs.getAttr(id, n)
	if err == nil {
		fs.tell(id, stateOf(&a))
		fs.attr(&a, &out.Attr)
		out.SetTimeout(fs.timeoutOf(&a, timeout))
	}
	return err
}

// getAttr is GetAttr, with how long the kernel may keep the answer. The lease is asked for before and after: what ends one meanwhile,
// which is long for a slow disk, is told before the answer, and the answer may be of before it.
func (fs *FS) getAttr(id uint64, n p9.Node) (p9.Attr, time.Duration, error) {
	before := fs.timeout(id, n)
	a, err := n.GetAttr(p9.AttrBasic)
	return a, min(before, fs.timeout(id, n)), err
}

// timeout is how long the kernel may keep what it is told of a node.
func (fs *FS) timeout(id uint64, n p9.Node) time.Duration {
	if fs.cfg.Lease == nil || fs.away(id) {
		return fs.cfg.Timeout
	}
	return max(fs.cfg.Timeout, fs.cfg.Lease(n))
}

// unwatched tells whether a node may change, and nothing tells: what has several names by one that nobody watches, what has none
// by whoever has it open.
func unwatched(a *p9.Attr) bool { return a.QID.Type == p9.QTFile && a.Nlink != 1 }

// timeoutOf is timeout for attributes.
func (fs *FS) timeoutOf(a *p9.Attr, timeout time.Duration) time.Duration {
	if unwatched(a) {
		timeout = fs.cfg.Timeout
	}
	return max(timeout, fs.cfg.AttrTimeout)
}

// tell notes what the kernel takes a node for.
func (fs *FS) tell(id uint64, told state) {
	fs.mu.Lock()
	defer fs.mu.Unlock()
	if n := fs.nodes[id]; n != nil {
		n.tell(told)
	}
}

// tell is FS.tell, with FS.mu held. What the kernel has read is of what it took the file for before.
func (n *node) tell(told state) {
	if n.told != told {
		n.told, n.keeps = told, time.Time{}
	}
}

// changed notes that the kernel has changed a file, and dropped what it took it for.
func (fs *FS) changed(id uint64) { fs.tell(id, state{}) }

// current tells, of a file or directory that is opened, whether the kernel may go on with what it has kept of its content. It
// fails with ESTALE if a file is no longer what the kernel takes it for: open(2) then looks all names up
// again, as it does for NFS, but only once. So a thread is refused once, even if the file has changed again.
func (fs *FS) current(id uint64, thread uint32, n p9.Node) (keep bool, err error) {
	kind := n.QID().Type
	if fs.cfg.Timeout == 0 || kind == p9.QTSymlink {
		return false, nil
	}
	a, timeout, err := fs.getAttr(id, n)
	if err != nil {
		return false, err
	}
	fs.mu.Lock()
	defer fs.mu.Unlock()
	known := fs.nodes[id]
	if known == nil {
		return false, nil
	}
	if known.told == stateOf(&a) {
		delete(known.refused, thread)
		return known.keep(timeout-fs.cfg.Timeout, &a), nil
	}
	known.keeps = time.Time{}
	if kind == p9.QTDir || known.told == (state{}) || known.refused[thread] || len(known.refused) == maxRefused {
		delete(known.refused, thread)
		return false, nil
	}
	if known.refused == nil {
		known.refused = map[uint32]bool{}
	}
	known.refused[thread] = true
	return false, unix.ESTALE
}

// keepContent is how long the kernel may keep what it has read of a file. What nothing tells of, as writing to a mapping, is
// seen thereafter.
const keepContent = 10 * time.Second

// keep tells whether the kernel may keep what it has read of a file while it may its attributes, from the first
// opening on that has it drop what it had. Preconditions: FS.mu is held.
func (n *node) keep(lease time.Duration, a *p9.Attr) bool {
	now := time.Now()
	switch {
	case lease <= 0 || unwatched(a):
		n.keeps = time.Time{}
	case now.Before(n.keeps):
		return true
	default:
		if a.QID.Type == p9.QTFile {
			lease = min(lease, keepContent)
		}
		n.keeps = now.Add(lease)
	}
	return false
}

func (fs *FS) GetAttr(cancel <-chan struct{}, in *fuse.GetAttrIn, out *fuse.AttrOut) fuse.Status {
	return fs.with(cancel, in.NodeId, func(n p9.Node) error { return fs.attrOf(in.NodeId, n, out) })
}

func (fs *FS) SetAttr(cancel <-chan struct{}, in *fuse.SetAttrIn, out *fuse.AttrOut) fuse.Status {
	a := p9.SetAttr{Mode: in.Mode, UID: in.Owner.Uid, GID: in.Owner.Gid, Size: in.Size,
		Atime: p9.Time{Sec: int64(in.Atime), Nsec: uint64(in.Atimensec)}, Mtime: p9.Time{Sec: int64(in.Mtime), Nsec: uint64(in.Mtimensec)}}
	for bit, set := range map[uint32]p9.SetMask{fuse.FATTR_MODE: p9.SetMode, fuse.FATTR_UID: p9.SetUID, fuse.FATTR_GID: p9.SetGID,
		fuse.FATTR_SIZE: p9.SetSize, fuse.FATTR_ATIME: p9.SetAtime, fuse.FATTR_MTIME: p9.SetMtime} {
		if in.Valid&bit != 0 {
			a.Valid |= set
		}
	}
	if a.Valid&p9.SetAtime != 0 && in.Valid&fuse.FATTR_ATIME_NOW == 0 {
		a.Valid |= p9.SetAtimeTo
	}
	if a.Valid&p9.SetMtime != 0 && in.Valid&fuse.FATTR_MTIME_NOW == 0 {
		a.Valid |= p9.SetMtimeTo
	}
	if int64(a.Size) < 0 || a.Atime.Nsec >= 1e9 || a.Mtime.Nsec >= 1e9 {
		return fuse.EINVAL
	}
	if a.Valid&(p9.SetUID|p9.SetGID) != 0 && fs.cfg.Owner != nil {
		if err := fs.cfg.Owner.SetAttr(&a); err != nil {
			return status(err)
		}
	}
	return fs.with(cancel, in.NodeId, func(n p9.Node) error {
		if in.Valid&fuse.FATTR_KILL_SUIDGID != 0 {
			if err := withoutPrivileges(n); err != nil {
				return err
			}
		}
		// ftruncate(2) works where the file's mode has been taken away since it was opened.
		if fh, ok := in.GetFh(); ok && a.Valid&p9.SetSize != 0 {
			if s := fs.withHandle(cancel, fh, func(h p9.Handle) error { return h.Truncate(int64(a.Size)) }); s != fuse.OK {
				return syscall.Errno(s)
			}
			a.Valid &^= p9.SetSize
		}
		if a.Valid != 0 {
			if err := n.SetAttr(a); err != nil {
				return err
			}
		}
		return fs.attrOf(in.NodeId, n, out)
	})
}

// withoutPrivileges takes a file's set-id bits away, which the kernel leaves to the file system when somebody changes it who has
// no right to keep them. Mostly the change itself does, where the file is.
func withoutPrivileges(n p9.Node) error {
	if p, ok := n.(privileged); ok {
		return p.DropPrivileges()
	}
	return nil
}

// made looks up what was just made.
func (fs *FS) made(cancel <-chan struct{}, dir uint64, name string, out *fuse.EntryOut, what func(p9.Node) error) fuse.Status {
	if s := fs.named(cancel, dir, name, what); s != fuse.OK {
		return s
	}
	return fs.lookup(cancel, dir, name, out)
}

func (fs *FS) Mknod(cancel <-chan struct{}, in *fuse.MknodIn, name string, out *fuse.EntryOut) fuse.Status {
	return fs.made(cancel, in.NodeId, name, out, func(n p9.Node) error {
		_, err := n.Mknod(name, in.Mode, unix.Major(uint64(in.Rdev)), unix.Minor(uint64(in.Rdev)), in.Gid)
		return err
	})
}

func (fs *FS) Mkdir(cancel <-chan struct{}, in *fuse.MkdirIn, name string, out *fuse.EntryOut) fuse.Status {
	return fs.made(cancel, in.NodeId, name, out, func(n p9.Node) error {
		_, err := n.Mkdir(name, in.Mode, in.Gid)
		return err
	})
}

func (fs *FS) Symlink(cancel <-chan struct{}, in *fuse.InHeader, target, name string, out *fuse.EntryOut) fuse.Status {
	if target == "" {
		return fuse.ENOENT
	}
	if fs.cfg.Root != "" {
		if rest, ok := strings.CutPrefix(target, fs.cfg.Root); ok && (rest == "" || rest[0] == '/') {
			target = cmp.Or(rest, "/")
		}
	}
	return fs.made(cancel, in.NodeId, name, out, func(n p9.Node) error {
		_, err := n.Symlink(name, target, in.Gid)
		return err
	})
}

func (fs *FS) Readlink(cancel <-chan struct{}, in *fuse.InHeader) (target []byte, s fuse.Status) {
	s = fs.with(cancel, in.NodeId, func(n p9.Node) error {
		text, err := n.Readlink()
		if err == nil && strings.HasPrefix(text, "/") {
			text = fs.cfg.Root + text
		}
		if len(text) >= unix.PathMax {
			return unix.ENAMETOOLONG
		}
		target = []byte(text)
		return err
	})
	return target, s
}

func (fs *FS) Link(cancel <-chan struct{}, in *fuse.LinkIn, name string, out *fuse.EntryOut) fuse.Status {
	return fs.made(cancel, in.NodeId, name, out, func(dir p9.Node) error {
		return syscallError(fs.with(cancel, in.Oldnodeid, func(target p9.Node) error { return dir.Link(name, target) }))
	})
}

// syscallError is a status as an error.
func syscallError(s fuse.Status) error {
	if s == fuse.OK {
		return nil
	}
	return syscall.Errno(s)
}

func (fs *FS) Unlink(cancel <-chan struct{}, in *fuse.InHeader, name string) fuse.Status {
	s := fs.named(cancel, in.NodeId, name, func(n p9.Node) error { return n.UnlinkAt(name, 0) })
	if s == fuse.OK { // it may have other names
		fs.goneFrom(in.NodeId, name)
	}
	return s
}

func (fs *FS) Rmdir(cancel <-chan struct{}, in *fuse.InHeader, name string) fuse.Status {
	return fs.named(cancel, in.NodeId, name, func(n p9.Node) error { return n.UnlinkAt(name, p9.UnlinkDir) })
}

func (fs *FS) Rename(cancel <-chan struct{}, in *fuse.RenameIn, oldName, newName string) fuse.Status {
	if err := p9.CheckName(newName); err != nil {
		return status(err)
	}
	s := fs.named(cancel, in.NodeId, oldName, func(from p9.Node) error {
		return syscallError(fs.with(cancel, in.Newdir, func(to p9.Node) error {
			if in.Flags == 0 {
				return from.RenameAt(oldName, to, newName)
			}
			if r, ok := from.(renamer); ok {
				return r.RenameAt2(oldName, to, newName, in.Flags)
			}
			return unix.EINVAL
		}))
	})
	if s == fuse.OK {
		fs.moved(in.NodeId, oldName, in.Newdir, newName, in.Flags)
	}
	return s
}

func (fs *FS) Access(cancel <-chan struct{}, in *fuse.AccessIn) fuse.Status {
	if fs.cfg.Access == nil {
		return fuse.ENOSYS
	}
	return fs.with(cancel, in.NodeId, func(n p9.Node) error {
		a, err := n.GetAttr(p9.AttrBasic)
		if err == nil {
			err = fs.cfg.Access(a, in.Mask)
		}
		return err
	})
}

func (fs *FS) GetXAttr(cancel <-chan struct{}, in *fuse.InHeader, name string, b []byte) (uint32, fuse.Status) {
	if name == "" { // which asks for the list
		return 0, fuse.Status(unix.ERANGE)
	}
	return fs.xattr(cancel, in.NodeId, name, b)
}

func (fs *FS) ListXAttr(cancel <-chan struct{}, in *fuse.InHeader, b []byte) (uint32, fuse.Status) {
	return fs.xattr(cancel, in.NodeId, "", b)
}

func (fs *FS) xattr(cancel <-chan struct{}, id uint64, name string, b []byte) (size uint32, s fuse.Status) {
	s = fs.with(cancel, id, func(n p9.Node) error {
		value, err := n.Xattr(name)
		if err != nil {
			return err
		}
		if size = uint32(len(value)); len(value) > len(b) {
			return unix.ERANGE
		}
		copy(b, value)
		return nil
	})
	return size, s
}

func (fs *FS) SetXAttr(cancel <-chan struct{}, in *fuse.SetXAttrIn, name string, value []byte) fuse.Status {
	if int(in.Size) > len(value) {
		return fuse.EINVAL
	}
	return fs.with(cancel, in.NodeId, func(n p9.Node) error {
		return n.SetXattr(name, append([]byte{}, value[:in.Size]...), int(in.Flags))
	})
}

func (fs *FS) RemoveXAttr(cancel <-chan struct{}, in *fuse.InHeader, name string) fuse.Status {
	return fs.with(cancel, in.NodeId, func(n p9.Node) error { return n.SetXattr(name, nil, 0) })
}

func (fs *FS) StatFs(cancel <-chan struct{}, in *fuse.InHeader, out *fuse.StatfsOut) fuse.Status {
	return fs.with(cancel, in.NodeId, func(n p9.Node) error {
		st, err := n.Statfs()
		*out = fuse.StatfsOut{Blocks: st.Blocks, Bfree: st.Bfree, Bavail: st.Bavail, Files: st.Files, Ffree: st.Ffree,
			Bsize: st.Bsize, Frsize: st.Bsize, NameLen: st.Namelen}
		return err
	})
}
