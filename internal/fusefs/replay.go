package fusefs

import (
	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"

	"github.com/wsl2/wsl2/internal/p9"
	"github.com/wsl2/wsl2/internal/p9/replay"
)

// replayed is a FS with a stage: what replay.UID asks for is answered, and not done.
type replayed struct {
	*FS
	stage *replay.Stage
}

// Raw is what go-fuse serves.
func (fs *FS) Raw() fuse.RawFileSystem {
	if fs.cfg.Replay != nil {
		return replayed{fs, fs.cfg.Replay}
	}
	return fs
}

// entryName is a name in a directory, which is a node ID.
type entryName struct {
	dir  uint64
	name string
}

// setName notes by which name the kernel knows a node; "" is none. Preconditions: mu is held.
func (fs *FS) setName(id, dir uint64, name string) {
	n := fs.nodes[id]
	old, now := entryName{n.dir, n.name}, entryName{dir, name}
	n.dir, n.name = dir, name
	if fs.cfg.Replay == nil || old == now {
		return
	}
	if fs.names[old] == id {
		delete(fs.names, old)
	}
	if name != "" {
		n.before, fs.names[now] = fs.names[now], id
	}
}

// moved notes a rename, after which the kernel knows the node by the new name without looking it up; with RENAME_EXCHANGE also
// the other by the old one.
func (fs *FS) moved(dir uint64, name string, newDir uint64, newName string, flags uint32) {
	fs.mu.Lock()
	defer fs.mu.Unlock()
	old, now := entryName{dir, name}, entryName{newDir, newName}
	id, other := fs.names[old], fs.names[now]
	if n := fs.nodes[id]; n != nil {
		fs.setName(id, newDir, newName)
		n.away = n.away || newDir != dir
	}
	if n := fs.nodes[other]; n != nil {
		n.away = true
		if flags&unix.RENAME_EXCHANGE != 0 {
			fs.setName(other, dir, name)
		}
	}
}

// goneFrom notes that a name is no longer what the kernel has known by it, wherever that is now.
func (fs *FS) goneFrom(dir uint64, name string) {
	fs.mu.Lock()
	defer fs.mu.Unlock()
	n := fs.nodes[fs.names[entryName{dir, name}]]
	for i := 0; n != nil && i < maxBefore; i++ {
		n.away = n.away || n.dir == dir && n.name == name
		n = fs.nodes[n.before]
	}
}

// away tells whether a node may be where it was not walked from, until it is looked up again.
func (fs *FS) away(id uint64) bool {
	fs.mu.Lock()
	defer fs.mu.Unlock()
	n := fs.nodes[id]
	return n != nil && n.away
}

// maxBefore bounds how many files that had a name before are looked at.
const maxBefore = 8

// gone returns the file that is no more which the kernel knows by a name, or knew until it found another there, with a reference;
// nil if there is none.
func (r replayed) gone(dir uint64, name string) p9.Node {
	var known []p9.Node
	r.mu.Lock()
	id := r.names[entryName{dir, name}]
	for n := r.nodes[id]; n != nil && len(known) < maxBefore; n = r.nodes[n.before] {
		known = append(known, n.Clone())
	}
	r.mu.Unlock()
	var found p9.Node
	for _, n := range known {
		if a, err := n.GetAttr(p9.AttrNlink); found == nil && err == nil && a.Nlink == 0 {
			found = n
			continue
		}
		n.Close()
	}
	return found
}

func (r replayed) Lookup(cancel <-chan struct{}, in *fuse.InHeader, name string, out *fuse.EntryOut) fuse.Status {
	if in.Uid != replay.UID {
		return r.FS.Lookup(cancel, in, name, out)
	}
	gone := r.gone(in.NodeId, name)
	if gone != nil {
		defer gone.Close()
	}
	var child p9.Node
	s := r.named(cancel, in.NodeId, name, func(n p9.Node) (err error) {
		child, err = r.stage.Walk(n, name, gone)
		return err
	})
	if s != fuse.OK {
		return s
	}
	s = r.entry(cancel, child, nil, in.NodeId, name, out)
	out.SetEntryTimeout(0) // it may be there for this change alone
	out.SetAttrTimeout(0)
	return s
}

// GetAttr fails for what the change on the stage has made, which the kernel knows if somebody has looked for it since: it
// has to look it up again.
func (r replayed) GetAttr(cancel <-chan struct{}, in *fuse.GetAttrIn, out *fuse.AttrOut) fuse.Status {
	if in.Uid == replay.UID && r.hidden(in.NodeId) {
		return fuse.Status(unix.ESTALE)
	}
	return r.FS.GetAttr(cancel, in, out)
}

func (r replayed) hidden(id uint64) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	n := r.nodes[id]
	if n == nil || r.nodes[n.dir] == nil {
		return false
	}
	return r.stage.Hides(r.nodes[n.dir].QID().Path, n.name)
}

// done is called in place of a change of an entry of dir.
func (r replayed) done(cancel <-chan struct{}, kind replay.Kind, dir uint64, name string) fuse.Status {
	return r.named(cancel, dir, name, func(n p9.Node) error {
		return r.stage.Done(replay.Change{Kind: kind, Dir: n.QID().Path, Name: name})
	})
}

// removed is called in place of a removal. What is removed here may have been moved to where nothing is told of.
func (r replayed) removed(cancel <-chan struct{}, dir uint64, name string) fuse.Status {
	s := r.done(cancel, replay.Removed, dir, name)
	if s == fuse.OK {
		r.goneFrom(dir, name)
	}
	return s
}

// made answers what would make a file with the one that there is.
func (r replayed) made(cancel <-chan struct{}, dir uint64, name string, out *fuse.EntryOut) fuse.Status {
	if s := r.done(cancel, replay.Created, dir, name); s != fuse.OK {
		return s
	}
	return r.lookup(cancel, dir, name, out)
}

func (r replayed) Mknod(cancel <-chan struct{}, in *fuse.MknodIn, name string, out *fuse.EntryOut) fuse.Status {
	if in.Uid != replay.UID {
		return r.FS.Mknod(cancel, in, name, out)
	}
	return r.made(cancel, in.NodeId, name, out)
}

func (r replayed) Mkdir(cancel <-chan struct{}, in *fuse.MkdirIn, name string, out *fuse.EntryOut) fuse.Status {
	if in.Uid != replay.UID {
		return r.FS.Mkdir(cancel, in, name, out)
	}
	return r.made(cancel, in.NodeId, name, out)
}

func (r replayed) Symlink(cancel <-chan struct{}, in *fuse.InHeader, target, name string, out *fuse.EntryOut) fuse.Status {
	if in.Uid != replay.UID {
		return r.FS.Symlink(cancel, in, target, name, out)
	}
	return r.made(cancel, in.NodeId, name, out)
}

func (r replayed) Unlink(cancel <-chan struct{}, in *fuse.InHeader, name string) fuse.Status {
	if in.Uid != replay.UID {
		return r.FS.Unlink(cancel, in, name)
	}
	return r.removed(cancel, in.NodeId, name)
}

func (r replayed) Rmdir(cancel <-chan struct{}, in *fuse.InHeader, name string) fuse.Status {
	if in.Uid != replay.UID {
		return r.FS.Rmdir(cancel, in, name)
	}
	return r.removed(cancel, in.NodeId, name)
}

func (r replayed) Rename(cancel <-chan struct{}, in *fuse.RenameIn, oldName, newName string) fuse.Status {
	if in.Uid != replay.UID {
		return r.FS.Rename(cancel, in, oldName, newName)
	}
	s := r.with(cancel, in.NodeId, func(from p9.Node) error {
		return syscallError(r.with(cancel, in.Newdir, func(to p9.Node) error {
			return r.stage.Done(replay.Change{Kind: replay.Renamed, Dir: from.QID().Path, Name: oldName, NewDir: to.QID().Path, NewName: newName})
		}))
	})
	if s == fuse.OK {
		r.moved(in.NodeId, oldName, in.Newdir, newName, 0)
	}
	return s
}

func (r replayed) SetAttr(cancel <-chan struct{}, in *fuse.SetAttrIn, out *fuse.AttrOut) fuse.Status {
	if in.Caller.Uid != replay.UID { // in.Uid is the file's new owner
		return r.FS.SetAttr(cancel, in, out)
	}
	r.changed(in.NodeId) // also if it looks the same
	s := r.with(cancel, in.NodeId, func(n p9.Node) error { return r.attrOf(in.NodeId, n, out) })
	out.SetTimeout(0)
	// Never the file's real time: the kernel takes the answer for its own change, which its pages
	// have, and would not drop those of before the host's.
	out.Mtimensec ^= 1
	return s
}

// What no change is replayed with, nobody asks for as replay.UID but to change the tree.

func (r replayed) Create(cancel <-chan struct{}, in *fuse.CreateIn, name string, out *fuse.CreateOut) fuse.Status {
	if in.Uid != replay.UID {
		return r.FS.Create(cancel, in, name, out)
	}
	return fuse.EROFS
}

func (r replayed) Link(cancel <-chan struct{}, in *fuse.LinkIn, name string, out *fuse.EntryOut) fuse.Status {
	if in.Uid != replay.UID {
		return r.FS.Link(cancel, in, name, out)
	}
	return fuse.EROFS
}

func (r replayed) SetXAttr(cancel <-chan struct{}, in *fuse.SetXAttrIn, name string, value []byte) fuse.Status {
	if in.Uid != replay.UID {
		return r.FS.SetXAttr(cancel, in, name, value)
	}
	return fuse.EROFS
}

func (r replayed) RemoveXAttr(cancel <-chan struct{}, in *fuse.InHeader, name string) fuse.Status {
	if in.Uid != replay.UID {
		return r.FS.RemoveXAttr(cancel, in, name)
	}
	return fuse.EROFS
}

func (r replayed) Write(cancel <-chan struct{}, in *fuse.WriteIn, data []byte) (written uint32, s fuse.Status) {
	if in.Uid != replay.UID {
		return r.FS.Write(cancel, in, data)
	}
	return 0, fuse.EROFS
}

func (r replayed) Fallocate(cancel <-chan struct{}, in *fuse.FallocateIn) fuse.Status {
	if in.Uid != replay.UID {
		return r.FS.Fallocate(cancel, in)
	}
	return fuse.EROFS
}

func (r replayed) Open(cancel <-chan struct{}, in *fuse.OpenIn, out *fuse.OpenOut) fuse.Status {
	if in.Uid == replay.UID { // whatever it is by now: the others have not been told
		return r.openNode(cancel, in.NodeId, replay.ReadOnly(in.Flags), out)
	}
	return r.FS.Open(cancel, in, out)
}
