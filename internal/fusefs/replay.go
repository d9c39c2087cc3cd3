package fusefs

import (
	"github.com/hanwen/go-fuse/v2/fuse"

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

func (r replayed) Lookup(cancel <-chan struct{}, in *fuse.InHeader, name string, out *fuse.EntryOut) fuse.Status {
	if in.Uid != replay.UID {
		return r.FS.Lookup(cancel, in, name, out)
	}
	var child p9.Node
	s := r.named(in.NodeId, name, func(n p9.Node) (err error) {
		child, err = r.stage.Walk(n, name)
		return err
	})
	if s != fuse.OK {
		return s
	}
	return r.entry(child, in.NodeId, name, out)
}

// made answers what would make a file with the one that there is.
func (r replayed) made(dir uint64, name string, out *fuse.EntryOut) fuse.Status {
	r.stage.Done()
	return r.lookup(dir, name, out)
}

func (r replayed) Mknod(cancel <-chan struct{}, in *fuse.MknodIn, name string, out *fuse.EntryOut) fuse.Status {
	if in.Uid != replay.UID {
		return r.FS.Mknod(cancel, in, name, out)
	}
	return r.made(in.NodeId, name, out)
}

func (r replayed) Mkdir(cancel <-chan struct{}, in *fuse.MkdirIn, name string, out *fuse.EntryOut) fuse.Status {
	if in.Uid != replay.UID {
		return r.FS.Mkdir(cancel, in, name, out)
	}
	return r.made(in.NodeId, name, out)
}

func (r replayed) Symlink(cancel <-chan struct{}, in *fuse.InHeader, target, name string, out *fuse.EntryOut) fuse.Status {
	if in.Uid != replay.UID {
		return r.FS.Symlink(cancel, in, target, name, out)
	}
	return r.made(in.NodeId, name, out)
}

func (r replayed) Unlink(cancel <-chan struct{}, in *fuse.InHeader, name string) fuse.Status {
	if in.Uid != replay.UID {
		return r.FS.Unlink(cancel, in, name)
	}
	r.stage.Done()
	return fuse.OK
}

func (r replayed) Rmdir(cancel <-chan struct{}, in *fuse.InHeader, name string) fuse.Status {
	if in.Uid != replay.UID {
		return r.FS.Rmdir(cancel, in, name)
	}
	r.stage.Done()
	return fuse.OK
}

func (r replayed) Rename(cancel <-chan struct{}, in *fuse.RenameIn, oldName, newName string) fuse.Status {
	if in.Uid != replay.UID {
		return r.FS.Rename(cancel, in, oldName, newName)
	}
	r.stage.Done()
	return fuse.OK
}

func (r replayed) SetAttr(cancel <-chan struct{}, in *fuse.SetAttrIn, out *fuse.AttrOut) fuse.Status {
	if in.Caller.Uid != replay.UID { // in.Uid is the file's new owner
		return r.FS.SetAttr(cancel, in, out)
	}
	s := r.with(in.NodeId, func(n p9.Node) error { return r.attrOf(n, out) })
	// Never the file's real time: the kernel takes the answer for its own change, which its pages
	// have, and would not drop those of before the host's.
	out.Mtimensec ^= 1
	return s
}

func (r replayed) Open(cancel <-chan struct{}, in *fuse.OpenIn, out *fuse.OpenOut) fuse.Status {
	if in.Uid == replay.UID {
		in.Flags = replay.ReadOnly(in.Flags)
	}
	return r.FS.Open(cancel, in, out)
}
