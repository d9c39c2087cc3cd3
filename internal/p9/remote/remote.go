// Package remote is a tree that a 9P server serves as a p9.Node, what it is on its own
// side: so that what is made for trees here, a FUSE mount for one, is made for those as well.
package remote

import (
	"context"
	"sync"
	"sync/atomic"

	"golang.org/x/sys/unix"

	"github.com/wsl2/wsl2/internal/p9"
)

// Root returns a tree's root, which owns the file. ctx is that of all requests for the tree, but for those
// through With; ending the client ends them as well.
func Root(ctx context.Context, root *p9.File) p9.Node {
	return node{ctx, &inode{ctx: ctx, f: root, refs: 1}}
}

// node is a file, with the context of requests for it.
type node struct {
	ctx context.Context
	*inode
}

// inode is a fid that is never opened: others of the same file are.
type inode struct {
	ctx  context.Context // the tree's
	f    *p9.File
	refs int32 // atomic

	mu     sync.Mutex
	parent *inode // a reference; nil for the root; guarded by mu
}

// With returns the same reference with a context for its requests. What it makes has the tree's again.
func (n node) With(ctx context.Context) p9.Node { return node{ctx, n.inode} }

func (n *inode) QID() p9.QID { return n.f.QID() }

func (n *inode) Clone() p9.Node {
	atomic.AddInt32(&n.refs, 1)
	return node{n.ctx, n}
}

func (n *inode) Close() {
	for n != nil && atomic.AddInt32(&n.refs, -1) == 0 {
		n.f.Close(n.ctx) //nolint:errcheck // it was not opened
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

func (n node) Walk(name string) (p9.Node, error) {
	f, err := n.f.Walk(n.ctx, name)
	if err != nil {
		return nil, err
	}
	return n.child(f), nil
}

// child is the node of a child's file, which it takes.
func (n node) child(f *p9.File) p9.Node {
	n.Clone()
	return node{n.inode.ctx, &inode{ctx: n.inode.ctx, f: f, refs: 1, parent: n.inode}}
}

// WalkAttr is Walk, and GetAttr of the child, in the time of one.
func (n node) WalkAttr(name string, mask p9.AttrMask) (p9.Node, p9.Attr, error) {
	f, a, err := n.f.WalkAttr(n.ctx, name, mask)
	if err != nil {
		return nil, a, err
	}
	return n.child(f), a, nil
}

func (n node) GetAttr(mask p9.AttrMask) (p9.Attr, error) { return n.f.GetAttr(n.ctx, mask) }

func (n node) SetAttr(a p9.SetAttr) error { return n.f.SetAttr(n.ctx, a) }

func (n node) Statfs() (p9.Statfs, error) { return n.f.Statfs(n.ctx) }

func (n node) Open(flags uint32) (p9.Handle, error) {
	f, err := n.f.Reopen(n.ctx, int(flags))
	if err != nil {
		return nil, err
	}
	return newHandle(n.inode.ctx, f), nil
}

func (n node) Create(name string, flags, mode, gid uint32) (p9.Node, p9.Handle, error) {
	made, h, _, err := n.CreateAttr(name, flags, mode, gid, 0)
	return made, h, err
}

// CreateAttr is Create, and GetAttr of what it makes, in the time of two requests.
func (n node) CreateAttr(name string, flags, mode, gid uint32, mask p9.AttrMask) (p9.Node, p9.Handle, p9.Attr, error) {
	f, err := n.f.CreateIn(n.ctx, name, int(flags), mode, gid)
	if err != nil {
		return nil, nil, p9.Attr{}, err
	}
	made, a, err := n.WalkAttr(name, mask)
	if err == nil && made.QID().Path != f.QID().Path { // another has taken the name
		made.Close()
		err = unix.ESTALE
	}
	if err != nil {
		f.Close(n.ctx) //nolint:errcheck // nothing was written
		return nil, nil, a, err
	}
	return made, newHandle(n.inode.ctx, f), a, nil
}

func (n node) Mkdir(name string, mode, gid uint32) (p9.QID, error) {
	return n.f.Mkdir(n.ctx, name, mode, gid)
}

func (n node) Mknod(name string, mode, major, minor, gid uint32) (p9.QID, error) {
	return n.f.Mknod(n.ctx, name, mode, major, minor, gid)
}

func (n node) Symlink(name, target string, gid uint32) (p9.QID, error) {
	return n.f.Symlink(n.ctx, name, target, gid)
}

func (n node) Readlink() (string, error) { return n.f.Readlink(n.ctx) }

func (n node) Link(name string, target p9.Node) error {
	return n.f.Link(n.ctx, name, target.(node).f)
}

func (n node) RenameAt(oldName string, newDir p9.Node, newName string) error {
	return n.f.RenameAt(n.ctx, oldName, newDir.(node).f, newName)
}

func (n node) UnlinkAt(name string, flags uint32) error { return n.f.UnlinkAt(n.ctx, name, flags) }

func (n node) Rename(newDir p9.Node, newName string) error {
	to := newDir.(node)
	if err := n.f.Rename(n.ctx, to.f, newName); err != nil {
		return err
	}
	to.Clone()
	n.mu.Lock()
	old := n.parent
	n.parent = to.inode
	n.mu.Unlock()
	old.Close()
	return nil
}

func (n node) Remove() error {
	f, err := n.f.Walk(n.ctx)
	if err != nil {
		return err
	}
	return f.Remove(n.ctx)
}

func (n node) Xattr(name string) ([]byte, error) { return n.f.Xattr(n.ctx, name) }

func (n node) SetXattr(name string, value []byte, flags int) error {
	return n.f.SetXattr(n.ctx, name, value, flags)
}

// handle is an open file, with the context of requests for it.
type handle struct {
	ctx context.Context
	*opened
}

// opened is a fid that was opened.
type opened struct {
	f *p9.File

	mu      sync.Mutex  // one reads the directory at a time
	pos     uint64      // where entries begins; guarded by mu
	entries []p9.Dirent // guarded by mu
}

func newHandle(ctx context.Context, f *p9.File) p9.Handle { return handle{ctx, &opened{f: f}} }

// With returns the same handle with a context for its requests.
func (h handle) With(ctx context.Context) p9.Handle { return handle{ctx, h.opened} }

func (h handle) ReadAt(p []byte, offset int64) (int, error) { return h.f.ReadAt(h.ctx, p, offset) }

func (h handle) WriteAt(p []byte, offset int64) (int, error) { return h.f.WriteAt(h.ctx, p, offset) }

// Readdir keeps what the server sent and b has no room for: a kernel asks for a page at a time.
func (h handle) Readdir(b []byte, offset uint64) ([]byte, error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if offset == 0 || offset != h.pos || len(h.entries) == 0 {
		entries, err := h.f.Readdir(h.ctx, offset)
		if err != nil {
			return nil, err
		}
		h.entries = entries
	}
	empty := len(b)
	for len(h.entries) > 0 {
		e := h.entries[0]
		if len(b)+p9.DirentSize(e.Name) > cap(b) {
			if len(b) == empty {
				return nil, unix.EINVAL
			}
			break
		}
		b = p9.AppendDirent(b, e.QID, e.Offset, e.Type, e.Name)
		h.pos, h.entries = e.Offset, h.entries[1:]
	}
	return b, nil
}

func (h handle) Truncate(size int64) error {
	return h.f.SetAttr(h.ctx, p9.SetAttr{Valid: p9.SetSize, Size: uint64(size)})
}

func (h handle) Fsync(datasync bool) error { return h.f.Fsync(h.ctx, datasync) }

func (h handle) Lock(l p9.Lock) (p9.LockStatus, error) { return h.f.Lock(h.ctx, l) }

func (h handle) GetLock(l p9.Lock) (p9.Lock, error) { return h.f.GetLock(h.ctx, l) }

func (h handle) Close() error { return h.f.Close(h.ctx) }
