package fusefs

import (
	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"

	"github.com/wsl2/wsl2/internal/p9"
)

// open gives a handle to the kernel. It takes the handle, and node, which the handle is of.
func (fs *FS) open(h p9.Handle, node p9.Node, flags uint32, out *fuse.OpenOut) error {
	fs.mu.Lock()
	if !fs.room() {
		fs.mu.Unlock()
		h.Close()
		node.Close()
		return unix.EMFILE
	}
	fs.lastHandle++
	fs.handles[fs.lastHandle] = &handle{Handle: h, node: node, refs: 1}
	out.Fh = fs.lastHandle
	fs.mu.Unlock()
	// Where appended data goes is known where the file is: the kernel's page cache would have
	// it where it took the end to be.
	switch reads := flags&unix.O_ACCMODE == unix.O_RDONLY; {
	case !reads && flags&unix.O_APPEND != 0:
		out.OpenFlags |= fuse.FOPEN_DIRECT_IO
	case reads && flags&unix.O_DIRECTORY == 0: // most files are closed by who has only read: a request less (lock.go)
		out.OpenFlags |= fuse.FOPEN_NOFLUSH
	}
	return nil
}

// room tells whether the kernel may have one more. Preconditions: mu is held.
func (fs *FS) room() bool {
	return fs.cfg.MaxHandles == 0 || len(fs.handles)+len(fs.locks) < fs.cfg.MaxHandles
}

// put gives a reference of a handle back.
func (fs *FS) put(cancel <-chan struct{}, h *handle) {
	fs.mu.Lock()
	h.refs--
	last := h.refs == 0
	fs.mu.Unlock()
	if last {
		with, end := until(cancel, h.Handle)
		with.Close()
		end()
		h.node.Close()
	}
}

func (fs *FS) withHandle(cancel <-chan struct{}, fh uint64, what func(p9.Handle) error) fuse.Status {
	fs.mu.Lock()
	h := fs.handles[fh]
	if h == nil {
		fs.mu.Unlock()
		return fuse.EBADF
	}
	h.refs++
	fs.mu.Unlock()
	defer fs.put(cancel, h)
	with, end := until(cancel, h.Handle)
	defer end()
	return status(what(with))
}

func (fs *FS) release(fh uint64) {
	fs.mu.Lock()
	h := fs.handles[fh]
	delete(fs.handles, fh)
	fs.mu.Unlock()
	if h != nil {
		fs.put(nil, h)
	}
}

func (fs *FS) Open(cancel <-chan struct{}, in *fuse.OpenIn, out *fuse.OpenOut) fuse.Status {
	return fs.openCurrent(cancel, in, in.Flags, 0, out)
}

func (fs *FS) OpenDir(cancel <-chan struct{}, in *fuse.OpenIn, out *fuse.OpenOut) fuse.Status {
	var cache uint32
	if fs.cfg.Lease != nil {
		cache = fuse.FOPEN_CACHE_DIR
	}
	return fs.openCurrent(cancel, in, in.Flags|unix.O_DIRECTORY, cache, out)
}

func (fs *FS) openCurrent(cancel <-chan struct{}, in *fuse.OpenIn, flags, cache uint32, out *fuse.OpenOut) fuse.Status {
	keep := false
	s := fs.with(cancel, in.NodeId, func(n p9.Node) (err error) { // before O_TRUNC changes it
		keep, err = fs.current(in.NodeId, in.Pid, n)
		return err
	})
	if s != fuse.OK {
		return s
	}
	s = fs.openNode(cancel, in.NodeId, flags, out)
	out.OpenFlags |= cache
	if keep {
		out.OpenFlags |= fuse.FOPEN_KEEP_CACHE
	}
	return s
}

func (fs *FS) openNode(cancel <-chan struct{}, id uint64, flags uint32, out *fuse.OpenOut) fuse.Status {
	n, err := fs.get(id)
	if err != nil {
		return status(err)
	}
	with, end := until(cancel, n)
	h, err := with.Open(flags)
	end()
	if err != nil {
		n.Close()
		return status(err)
	}
	return status(fs.open(h, n, flags, out))
}

func (fs *FS) Create(cancel <-chan struct{}, in *fuse.CreateIn, name string, out *fuse.CreateOut) fuse.Status {
	var node p9.Node
	var h p9.Handle
	var a *p9.Attr
	s := fs.named(cancel, in.NodeId, name, func(n p9.Node) (err error) {
		if w := fs.walker(n); w != nil {
			a = new(p9.Attr)
			node, h, *a, err = w.CreateAttr(name, in.Flags, in.Mode, in.Gid, p9.AttrBasic)
		} else {
			node, h, err = n.Create(name, in.Flags, in.Mode, in.Gid)
		}
		return err
	})
	if s != fuse.OK {
		return s
	}
	if err := fs.open(h, node.Clone(), in.Flags, &out.OpenOut); err != nil {
		node.Close()
		return status(err)
	}
	if s = fs.entry(cancel, node, a, in.NodeId, name, &out.EntryOut); s != fuse.OK {
		fs.release(out.Fh)
	}
	return s
}

func (fs *FS) Release(_ <-chan struct{}, in *fuse.ReleaseIn) {
	fs.release(in.Fh)
	fs.releaseLocks(in.Fh)
}

func (fs *FS) ReleaseDir(in *fuse.ReleaseIn) { fs.release(in.Fh) }

func (fs *FS) Read(cancel <-chan struct{}, in *fuse.ReadIn, b []byte) (fuse.ReadResult, fuse.Status) {
	if int64(in.Offset) < 0 {
		return nil, fuse.EINVAL
	}
	n := 0
	s := fs.withHandle(cancel, in.Fh, func(h p9.Handle) (err error) {
		// A short answer is the end of the file: a server's largest frame may be less.
		for n < len(b) {
			c, err := h.ReadAt(b[n:], int64(in.Offset)+int64(n))
			if err != nil && n == 0 {
				return err
			}
			if err != nil || c == 0 {
				return nil
			}
			n += c
		}
		return nil
	})
	if s != fuse.OK {
		return nil, s
	}
	return fuse.ReadResultData(b[:n]), fuse.OK
}

func (fs *FS) Write(cancel <-chan struct{}, in *fuse.WriteIn, data []byte) (written uint32, s fuse.Status) {
	if int64(in.Offset) < 0 || int64(in.Offset)+int64(len(data)) < 0 {
		return 0, fuse.EINVAL
	}
	if in.WriteFlags&fuse.WRITE_KILL_SUIDGID != 0 {
		if s := fs.with(cancel, in.NodeId, withoutPrivileges); s != fuse.OK {
			return 0, s
		}
	}
	s = fs.withHandle(cancel, in.Fh, func(h p9.Handle) error {
		for int(written) < len(data) {
			c, err := h.WriteAt(data[written:], int64(in.Offset)+int64(written))
			if err != nil && written == 0 {
				return err
			}
			if err != nil || c == 0 {
				return nil
			}
			written += uint32(c)
		}
		return nil
	})
	fs.changed(in.NodeId)
	return written, s
}

func (fs *FS) Lseek(cancel <-chan struct{}, in *fuse.LseekIn, out *fuse.LseekOut) fuse.Status {
	if int64(in.Offset) < 0 || in.Whence != unix.SEEK_DATA && in.Whence != unix.SEEK_HOLE {
		return fuse.EINVAL
	}
	return fs.withHandle(cancel, in.Fh, func(h p9.Handle) error {
		s, ok := h.(seeker)
		if !ok {
			return unix.ENOSYS
		}
		at, err := s.SeekData(int64(in.Offset), int(in.Whence))
		out.Offset = uint64(at)
		return err
	})
}

func (fs *FS) Fallocate(cancel <-chan struct{}, in *fuse.FallocateIn) fuse.Status {
	defer fs.changed(in.NodeId)
	if in.Uid != 0 { // of these the kernel does not say who may keep them
		if s := fs.with(cancel, in.NodeId, withoutPrivileges); s != fuse.OK {
			return s
		}
	}
	return fs.withHandle(cancel, in.Fh, func(h p9.Handle) error {
		a, ok := h.(allocator)
		if !ok {
			return unix.EOPNOTSUPP
		}
		return a.Allocate(in.Mode, int64(in.Offset), int64(in.Length))
	})
}

func (fs *FS) Fsync(cancel <-chan struct{}, in *fuse.FsyncIn) fuse.Status {
	const datasync = 1 // FUSE_FSYNC_FDATASYNC
	return fs.withHandle(cancel, in.Fh, func(h p9.Handle) error { return h.Fsync(in.FsyncFlags&datasync != 0) })
}

func (fs *FS) FsyncDir(cancel <-chan struct{}, in *fuse.FsyncIn) fuse.Status {
	return fs.Fsync(cancel, in)
}

func (fs *FS) ReadDir(cancel <-chan struct{}, in *fuse.ReadIn, out *fuse.DirEntryList) fuse.Status {
	return fs.withHandle(cancel, in.Fh, func(h p9.Handle) error {
		// Entries of 9P, which are not padded, take at least three quarters of FUSE's.
		b, err := h.Readdir(make([]byte, 0, min(int(in.Size), 64<<10)/4*3), in.Offset)
		if err != nil {
			return err
		}
		entries, err := p9.DecodeDirents(b)
		if err != nil {
			return err
		}
		for _, e := range entries {
			if !out.AddDirEntry(fuse.DirEntry{Name: e.Name, Mode: uint32(e.Type) << 12, Ino: e.QID.Path, Off: e.Offset}) {
				return nil
			}
		}
		return nil
	})
}
