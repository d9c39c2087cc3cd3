package p9

import (
	"strings"
	"syscall"
)

// CheckName refuses what is no name of a directory's entry.
func CheckName(name string) error {
	switch {
	case len(name) > MaxName:
		return syscall.ENAMETOOLONG
	case name == "" || name == "." || name == ".." || strings.ContainsAny(name, "/\x00"):
		return syscall.EINVAL
	}
	return nil
}

// handle serves every request but those that server.serve does itself.
func (s *server) handle(m Message) (Message, error) {
	switch t := m.(type) {
	case *Tauth:
		return nil, syscall.ENOENT // none is needed, as diod says it and its clients read it: who may connect has been settled
	case *Tattach:
		if t.AFID != NoFID {
			return nil, syscall.EACCES
		}
		root, err := s.fs.Attach(t.Uname, t.Aname, t.UID)
		if err != nil {
			return nil, err
		}
		qid := root.QID()
		return &Rqid{Kind: TAttach + 1, QID: qid}, s.add(t.FID, root, nil)
	case *Twalk:
		return s.walk(t)
	case *Tfid:
		return s.handleFID(t)
	case *Tlopen:
		return s.open(t)
	case *Tlcreate:
		return s.create(t)
	case *Tsymlink:
		return s.make(t.Dir, t.Name, TSymlink, func(dir Node) (QID, error) {
			if t.Target == "" || strings.IndexByte(t.Target, 0) >= 0 {
				return QID{}, syscall.ENOENT
			}
			return dir.Symlink(t.Name, t.Target, t.GID)
		})
	case *Tmknod:
		return s.make(t.Dir, t.Name, TMknod, func(dir Node) (QID, error) {
			return dir.Mknod(t.Name, t.Mode, t.Major, t.Minor, t.GID)
		})
	case *Tmkdir:
		return s.make(t.Dir, t.Name, TMkdir, func(dir Node) (QID, error) { return dir.Mkdir(t.Name, t.Mode, t.GID) })
	case *Tgetattr:
		var r Rgetattr
		return &r, s.with(t.FID, func(f *fid) (err error) {
			r.Attr, err = f.node.GetAttr(t.Mask)
			return err
		})
	case *Tsetattr:
		return &Rok{Kind: TSetattr + 1}, s.with(t.FID, func(f *fid) error { return f.setAttr(t.Attr) })
	case *Twrite:
		var r Rwrite
		return &r, s.with(t.FID, func(f *fid) error {
			n, err := f.write(t.Data, t.Offset)
			r.Count = uint32(n)
			return err
		})
	case *Tfsync:
		return &Rok{Kind: TFsync + 1}, s.withOpen(t.FID, func(h Handle) error { return h.Fsync(t.Datasync != 0) })
	case *Tlock:
		var r Rlock
		return &r, s.withOpen(t.FID, func(h Handle) (err error) {
			r.Status, err = h.Lock(t.Lock)
			return err
		})
	case *Tgetlock:
		var r Rgetlock
		return &r, s.withOpen(t.FID, func(h Handle) (err error) {
			r.Lock, err = h.GetLock(t.Lock)
			return err
		})
	case *Tlink:
		return s.entry(TLink, t.Dir, t.FID, t.Name, func(dir, f Node) error { return dir.Link(t.Name, f) })
	case *Trename:
		return s.entry(TRename, t.Dir, t.FID, t.Name, func(dir, f Node) error { return f.Rename(dir, t.Name) })
	case *Trenameat:
		if err := CheckName(t.OldName); err != nil {
			return nil, err
		}
		return s.entry(TRenameat, t.NewDir, t.OldDir, t.NewName, func(newDir, oldDir Node) error {
			return oldDir.RenameAt(t.OldName, newDir, t.NewName)
		})
	case *Tunlinkat:
		if err := CheckName(t.Name); err != nil {
			return nil, err
		}
		return &Rok{Kind: TUnlinkat + 1}, s.with(t.Dir, func(f *fid) error { return f.node.UnlinkAt(t.Name, t.Flags) })
	case *Txattrwalk:
		return s.xattrWalk(t)
	case *Txattrcreate:
		return s.xattrCreate(t)
	}
	return nil, syscall.EOPNOTSUPP // an R-message
}

// with calls what with the fid, which does not change meanwhile.
func (s *server) with(n FID, what func(*fid) error) error {
	f, err := s.get(n)
	if err != nil {
		return err
	}
	defer s.put(f)
	f.mu.RLock()
	defer f.mu.RUnlock()
	return what(f)
}

func (s *server) withOpen(n FID, what func(Handle) error) error {
	return s.with(n, func(f *fid) error {
		if f.handle == nil {
			return syscall.EBADF
		}
		return what(f.handle)
	})
}

// nodes returns the nodes of two fids, each with a reference of its own, so that
// no fid is held while another is waited for.
func (s *server) nodes(n ...FID) ([]Node, error) {
	list := make([]Node, 0, len(n))
	for _, fidno := range n {
		if err := s.with(fidno, func(f *fid) error { list = append(list, f.node.Clone()); return nil }); err != nil {
			closeAll(list)
			return nil, err
		}
	}
	return list, nil
}

func closeAll(list []Node) {
	for _, node := range list {
		node.Close()
	}
}

// make serves what makes an entry of a directory.
func (s *server) make(dir FID, name string, t Type, what func(Node) (QID, error)) (Message, error) {
	if err := CheckName(name); err != nil {
		return nil, err
	}
	r := &Rqid{Kind: t + 1}
	return r, s.with(dir, func(f *fid) (err error) {
		r.QID, err = what(f.node)
		return err
	})
}

// entry serves what gives a directory an entry for a file that is there.
func (s *server) entry(t Type, dir, file FID, name string, what func(dir, file Node) error) (Message, error) {
	if err := CheckName(name); err != nil {
		return nil, err
	}
	list, err := s.nodes(dir, file)
	if err != nil {
		return nil, err
	}
	defer closeAll(list)
	return &Rok{Kind: t + 1}, what(list[0], list[1])
}

func (s *server) walk(t *Twalk) (Message, error) {
	for _, name := range t.Names {
		if name == ".." {
			continue
		}
		if err := CheckName(name); err != nil {
			return nil, err
		}
	}
	list, err := s.nodes(t.FID)
	if err != nil {
		return nil, err
	}
	node := list[0]
	r := &Rwalk{QIDs: make([]QID, 0, len(t.Names))}
	for i, name := range t.Names {
		var next Node
		if name == ".." {
			next = node.Parent()
		} else if next, err = node.Walk(name); err != nil {
			node.Close()
			if i == 0 {
				return nil, err
			}
			return r, nil // as far as it went; NewFID is not made
		}
		node.Close()
		node = next
		r.QIDs = append(r.QIDs, node.QID())
	}
	if t.NewFID != t.FID {
		return r, s.add(t.NewFID, node, nil)
	}
	return r, s.change(t.FID, func(f *fid) error {
		if f.handle != nil || f.value != nil {
			node.Close()
			return syscall.EBUSY
		}
		f.node.Close()
		f.node = node
		return nil
	})
}

// change is with, alone with the fid.
func (s *server) change(n FID, what func(*fid) error) error {
	f, err := s.get(n)
	if err != nil {
		return err
	}
	defer s.put(f)
	f.mu.Lock()
	defer f.mu.Unlock()
	return what(f)
}

func (s *server) open(t *Tlopen) (Message, error) {
	r := &Ropen{Kind: TLopen + 1}
	return r, s.change(t.FID, func(f *fid) (err error) {
		if f.handle != nil || f.value != nil {
			return syscall.EBUSY
		}
		f.handle, err = f.node.Open(t.Flags)
		r.QID = f.node.QID()
		return err
	})
}

func (s *server) create(t *Tlcreate) (Message, error) {
	if err := CheckName(t.Name); err != nil {
		return nil, err
	}
	r := &Ropen{Kind: TLcreate + 1}
	return r, s.change(t.FID, func(f *fid) error {
		if f.handle != nil || f.value != nil {
			return syscall.EBUSY
		}
		node, handle, err := f.node.Create(t.Name, t.Flags, t.Mode, t.GID)
		if err != nil {
			return err
		}
		f.node.Close()
		f.node, f.handle = node, handle
		r.QID = node.QID()
		return nil
	})
}

// handleFID serves the requests that have nothing but a fid.
func (s *server) handleFID(t *Tfid) (Message, error) {
	switch t.Kind {
	case TReadlink:
		var r Rreadlink
		return &r, s.with(t.FID, func(f *fid) (err error) {
			r.Target, err = f.node.Readlink()
			return err
		})
	case TStatfs:
		var r Rstatfs
		return &r, s.with(t.FID, func(f *fid) (err error) {
			r.Statfs, err = f.node.Statfs()
			return err
		})
	}
	// Tclunk and Tremove end the fid whatever they answer.
	f, err := s.clunk(t.FID)
	if err != nil {
		return nil, err
	}
	if t.Kind == TRemove {
		f.mu.RLock()
		err = f.node.Remove()
		f.mu.RUnlock()
	} else {
		f.mu.RLock()
		err = f.setXattr()
		f.mu.RUnlock()
	}
	if cerr := s.put(f); err == nil {
		err = cerr
	}
	return &Rok{Kind: t.Kind + 1}, err
}

func (f *fid) setAttr(a SetAttr) error {
	if a.Valid&SetSize != 0 && int64(a.Size) < 0 {
		return syscall.EINVAL
	}
	if a.Atime.Nsec >= 1e9 || a.Mtime.Nsec >= 1e9 {
		return syscall.EINVAL
	}
	// ftruncate(2) works where the file's mode has been taken away since it was opened.
	if a.Valid&SetSize != 0 && f.handle != nil {
		err := f.handle.Truncate(int64(a.Size))
		if err == nil {
			a.Valid &^= SetSize
		} else if errnoOf(err) != syscall.EBADF && errnoOf(err) != syscall.EINVAL {
			return err
		}
	}
	return f.node.SetAttr(a)
}

func (f *fid) write(p []byte, offset uint64) (int, error) {
	switch {
	case f.value != nil:
		return f.value.writeAt(p, offset)
	case f.handle == nil:
		return 0, syscall.EBADF
	case int64(offset) < 0:
		return 0, syscall.EFBIG
	}
	return f.handle.WriteAt(p, int64(offset))
}

// maxValues is how many fids of a connection are extended attributes at a time: each
// keeps up to maxXattr of memory.
const maxValues = 256

// newValue counts one more; s.values goes down with the fid.
func (s *server) newValue() error {
	if s.values.Add(1) > maxValues {
		s.values.Add(-1)
		return syscall.ENOMEM
	}
	return nil
}

func (s *server) xattrWalk(t *Txattrwalk) (Message, error) {
	if strings.IndexByte(t.Name, 0) >= 0 {
		return nil, syscall.EINVAL
	}
	list, err := s.nodes(t.FID)
	if err != nil {
		return nil, err
	}
	data, err := list[0].Xattr(t.Name)
	if err != nil {
		closeAll(list)
		return nil, err
	}
	if err := s.newValue(); err != nil {
		closeAll(list)
		return nil, err
	}
	if err := s.add(t.NewFID, list[0], &xattrValue{data: data}); err != nil {
		s.values.Add(-1)
		return nil, err
	}
	return &Rxattrwalk{Size: uint64(len(data))}, nil
}

func (s *server) xattrCreate(t *Txattrcreate) (Message, error) {
	if t.Name == "" || len(t.Name) > MaxName || strings.IndexByte(t.Name, 0) >= 0 {
		return nil, syscall.EINVAL
	}
	if t.Size > maxXattr {
		return nil, syscall.E2BIG
	}
	return &Rok{Kind: TXattrcreate + 1}, s.change(t.FID, func(f *fid) error {
		if f.handle != nil || f.value != nil {
			return syscall.EBUSY
		}
		if err := s.newValue(); err != nil {
			return err
		}
		f.value = &xattrValue{write: true, name: t.Name, size: int(t.Size), flags: int(t.Flags)}
		return nil
	})
}

func (v *xattrValue) read(p []byte, offset uint64) (int, error) {
	v.mu.Lock()
	defer v.mu.Unlock()
	if v.write {
		return 0, syscall.EBADF
	}
	if offset >= uint64(len(v.data)) {
		return 0, nil
	}
	return copy(p, v.data[offset:]), nil
}

// writeAt appends: v9fs writes a value from its beginning to its end.
func (v *xattrValue) writeAt(p []byte, offset uint64) (int, error) {
	v.mu.Lock()
	defer v.mu.Unlock()
	switch {
	case !v.write:
		return 0, syscall.EBADF
	case offset != uint64(len(v.data)) || len(v.data)+len(p) > v.size:
		return 0, syscall.EINVAL
	}
	v.data = append(v.data, p...)
	return len(p), nil
}

// setXattr sets the attribute that a fid was written to be.
func (f *fid) setXattr() error {
	const replace = 2 // XATTR_REPLACE of setxattr(2)
	if f.value == nil || !f.value.write {
		return nil
	}
	v := f.value
	v.mu.Lock()
	defer v.mu.Unlock()
	switch {
	case len(v.data) != v.size:
		return syscall.EINVAL
	case v.size == 0 && v.flags == replace: // removexattr(2), in the protocol
		return f.node.SetXattr(v.name, nil, 0)
	}
	return f.node.SetXattr(v.name, append([]byte{}, v.data...), v.flags)
}
