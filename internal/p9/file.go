package p9

import (
	"context"
	"fmt"
	"syscall"
)

// File is a fid. Whoever gets one closes it.
type File struct {
	c   *Client
	fid FID
	qid QID // changed by Create only, which nothing else may run beside
}

// QID returns what the server said of the file when it was walked to.
func (f *File) QID() QID { return f.qid }

// Walk returns the file that the names lead to; without names, another File for the
// same file, which is not open. Symbolic links are not followed.
func (f *File) Walk(ctx context.Context, names ...string) (*File, error) {
	from := f
	for {
		step := names[:min(len(names), maxWalk)]
		names = names[len(step):]
		next, err := from.walk(ctx, step)
		if from != f {
			from.Close(ctx) //nolint:errcheck // it was not opened
		}
		if err != nil || len(names) == 0 {
			return next, err
		}
		from = next
	}
}

func (f *File) walk(ctx context.Context, names []string) (*File, error) {
	n, err := f.c.newFID()
	if err != nil {
		return nil, err
	}
	r, err := do[*Rwalk](ctx, f.c, &Twalk{FID: f.fid, NewFID: n, Names: names}, nil)
	return f.walked(n, names, r, err)
}

// walked makes a File of the answer to a walk.
func (f *File) walked(n FID, names []string, r *Rwalk, err error) (*File, error) {
	switch {
	case err == nil && len(r.QIDs) < len(names):
		err = syscall.ENOENT
	case err == nil && len(r.QIDs) > len(names):
		err = fmt.Errorf("%w: Rwalk with %d QIDs for %d names", ErrMalformed, len(r.QIDs), len(names))
	}
	q := &Rqid{QID: f.qid}
	if err == nil && len(names) > 0 {
		q.QID = r.QIDs[len(names)-1]
	}
	return f.c.file(n, q, err)
}

// What is asked of a new fid is asked together with the walk that makes it: our server waits for that (server.await). Of
// another's the answer may be EBADF, and it is asked again.

// WalkAttr is Walk of one name, and GetAttr of what that is of.
func (f *File) WalkAttr(ctx context.Context, name string, mask AttrMask) (*File, Attr, error) {
	n, err := f.c.newFID()
	if err != nil {
		return nil, Attr{}, err
	}
	names := []string{name}
	w, err, g, gerr := exchange2[*Rwalk, *Rgetattr](ctx, f.c, &Twalk{FID: f.fid, NewFID: n, Names: names}, &Tgetattr{FID: n, Mask: mask})
	child, err := f.walked(n, names, w, err)
	if err != nil {
		return nil, Attr{}, err
	}
	if gerr == nil {
		return child, g.Attr, nil
	}
	a := Attr{}
	if gerr == syscall.EBADF {
		a, gerr = child.GetAttr(ctx, mask)
	}
	if gerr != nil {
		child.Close(ctx) //nolint:errcheck // it was not opened
		return nil, Attr{}, gerr
	}
	return child, a, nil
}

// Reopen returns another File for the same file, which is open.
func (f *File) Reopen(ctx context.Context, flags int) (*File, error) {
	n, err := f.c.newFID()
	if err != nil {
		return nil, err
	}
	w, err, _, oerr := exchange2[*Rwalk, *Ropen](ctx, f.c, &Twalk{FID: f.fid, NewFID: n}, &Tlopen{FID: n, Flags: uint32(flags)})
	other, err := f.walked(n, nil, w, err)
	if err != nil {
		return nil, err
	}
	if oerr == syscall.EBADF {
		oerr = other.Open(ctx, flags)
	}
	if oerr != nil {
		other.Close(ctx) //nolint:errcheck // it was not opened
		return nil, oerr
	}
	return other, nil
}

// CreateIn makes and opens a file in the directory, which stays what it is.
func (f *File) CreateIn(ctx context.Context, name string, flags int, mode, gid uint32) (*File, error) {
	n, err := f.c.newFID()
	if err != nil {
		return nil, err
	}
	w, err, r, cerr := exchange2[*Rwalk, *Ropen](ctx, f.c, &Twalk{FID: f.fid, NewFID: n},
		&Tlcreate{FID: n, Name: name, Flags: uint32(flags), Mode: mode, GID: gid})
	made, err := f.walked(n, nil, w, err)
	if err != nil {
		return nil, err
	}
	switch {
	case cerr == nil:
		made.qid = r.QID
	case cerr == syscall.EBADF:
		cerr = made.Create(ctx, name, flags, mode, gid)
	}
	if cerr != nil {
		made.Close(ctx) //nolint:errcheck // it was not opened
		return nil, cerr
	}
	return made, nil
}

// end is Tclunk and Tremove, after which the fid is free whatever the answer. It is sent though ctx has ended: nobody
// else would end the fid.
func (f *File) end(ctx context.Context, t Type) error {
	_, err := exchange[*Rok](ctx, f.c, &Tfid{Kind: t, FID: f.fid}, nil)
	if answered(err) {
		f.c.freeFID(f.fid)
	}
	return err
}

// endsFID tells whether a request is one of end's.
func endsFID(m Message) bool { return m.Type() == TClunk || m.Type() == TRemove }

// Close ends the File. For an extended attribute it is what sets it.
func (f *File) Close(ctx context.Context) error { return f.end(ctx, TClunk) }

// Remove removes the file by the name that it was walked by, and ends the File.
func (f *File) Remove(ctx context.Context) error {
	if ctx.Err() != nil {
		f.Close(ctx) //nolint:errcheck // nothing was done
		return context.Cause(ctx)
	}
	return f.end(ctx, TRemove)
}

// ok sends a request that has no answer but that it was carried out.
func (f *File) ok(ctx context.Context, m Message) error {
	_, err := do[*Rok](ctx, f.c, m, nil)
	return err
}

// GetAttr returns the attributes.
func (f *File) GetAttr(ctx context.Context, mask AttrMask) (Attr, error) {
	r, err := do[*Rgetattr](ctx, f.c, &Tgetattr{FID: f.fid, Mask: mask}, nil)
	if err != nil {
		return Attr{}, err
	}
	return r.Attr, nil
}

// SetAttr sets attributes.
func (f *File) SetAttr(ctx context.Context, a SetAttr) error {
	return f.ok(ctx, &Tsetattr{FID: f.fid, Attr: a})
}

// Statfs returns what statfs(2) does.
func (f *File) Statfs(ctx context.Context) (Statfs, error) {
	r, err := do[*Rstatfs](ctx, f.c, &Tfid{Kind: TStatfs, FID: f.fid}, nil)
	if err != nil {
		return Statfs{}, err
	}
	return r.Statfs, nil
}

// Open opens the file with flags of open(2).
func (f *File) Open(ctx context.Context, flags int) error {
	_, err := do[*Ropen](ctx, f.c, &Tlopen{FID: f.fid, Flags: uint32(flags)}, nil)
	return err
}

// Create makes and opens a file in the directory, which the File stands for from then on.
func (f *File) Create(ctx context.Context, name string, flags int, mode, gid uint32) error {
	r, err := do[*Ropen](ctx, f.c, &Tlcreate{FID: f.fid, Name: name, Flags: uint32(flags), Mode: mode, GID: gid}, nil)
	if err == nil {
		f.qid = r.QID
	}
	return err
}

func (f *File) make(ctx context.Context, m Message) (QID, error) {
	r, err := do[*Rqid](ctx, f.c, m, nil)
	if err != nil {
		return QID{}, err
	}
	return r.QID, nil
}

// Mkdir makes a directory in the directory.
func (f *File) Mkdir(ctx context.Context, name string, mode, gid uint32) (QID, error) {
	return f.make(ctx, &Tmkdir{Dir: f.fid, Name: name, Mode: mode, GID: gid})
}

// Mknod makes a node in the directory; mode has S_IFMT.
func (f *File) Mknod(ctx context.Context, name string, mode, major, minor, gid uint32) (QID, error) {
	return f.make(ctx, &Tmknod{Dir: f.fid, Name: name, Mode: mode, Major: major, Minor: minor, GID: gid})
}

// Symlink makes a symbolic link in the directory.
func (f *File) Symlink(ctx context.Context, name, target string, gid uint32) (QID, error) {
	return f.make(ctx, &Tsymlink{Dir: f.fid, Name: name, Target: target, GID: gid})
}

// Readlink returns a symbolic link's target.
func (f *File) Readlink(ctx context.Context) (string, error) {
	r, err := do[*Rreadlink](ctx, f.c, &Tfid{Kind: TReadlink, FID: f.fid}, nil)
	if err != nil {
		return "", err
	}
	return r.Target, nil
}

// Link makes a hard link to target in the directory.
func (f *File) Link(ctx context.Context, name string, target *File) error {
	return f.ok(ctx, &Tlink{Dir: f.fid, FID: target.fid, Name: name})
}

// Rename moves the file from the name that it was walked by.
func (f *File) Rename(ctx context.Context, dir *File, name string) error {
	return f.ok(ctx, &Trename{FID: f.fid, Dir: dir.fid, Name: name})
}

// RenameAt moves the directory's entry oldName.
func (f *File) RenameAt(ctx context.Context, oldName string, newDir *File, newName string) error {
	return f.ok(ctx, &Trenameat{OldDir: f.fid, OldName: oldName, NewDir: newDir.fid, NewName: newName})
}

// UnlinkAt removes the directory's entry: a directory with UnlinkDir, else anything else.
func (f *File) UnlinkAt(ctx context.Context, name string, flags uint32) error {
	return f.ok(ctx, &Tunlinkat{Dir: f.fid, Name: name, Flags: flags})
}

// MaxIO is how much one ReadAt or WriteAt moves at most.
func (f *File) MaxIO() int { return int(f.c.msize - ioHeader) }

// ReadAt reads up to MaxIO bytes. Fewer than p holds are the end of the file, 0
// at the latest: there is no io.EOF.
func (f *File) ReadAt(ctx context.Context, p []byte, offset int64) (int, error) {
	p = p[:min(len(p), f.MaxIO())]
	r, err := do[*Rread](ctx, f.c, &Tread{Kind: TRead, FID: f.fid, Offset: uint64(offset), Count: uint32(len(p))}, p)
	if err != nil {
		return 0, err
	}
	return len(r.Data), nil
}

// WriteAt writes up to MaxIO bytes of p, and returns how many.
func (f *File) WriteAt(ctx context.Context, p []byte, offset int64) (int, error) {
	p = p[:min(len(p), f.MaxIO())]
	r, err := do[*Rwrite](ctx, f.c, &Twrite{FID: f.fid, Offset: uint64(offset), Data: p}, nil)
	if err != nil {
		return 0, err
	}
	if int(r.Count) > len(p) {
		return 0, fmt.Errorf("%w: Rwrite of %d bytes for %d", ErrMalformed, r.Count, len(p))
	}
	return int(r.Count), nil
}

// Readdir returns entries of the open directory from offset on, which is 0 or an
// entry's; none is the end. "." and ".." are among them.
func (f *File) Readdir(ctx context.Context, offset uint64) ([]Dirent, error) {
	r, err := do[*Rread](ctx, f.c, &Tread{Kind: TReaddir, FID: f.fid, Offset: offset, Count: uint32(min(f.MaxIO(), 64<<10))}, nil)
	if err != nil {
		return nil, err
	}
	return DecodeDirents(r.Data)
}

// Fsync writes the file back to its disk; with datasync without what reading does not need.
func (f *File) Fsync(ctx context.Context, datasync bool) error {
	m := &Tfsync{FID: f.fid}
	if datasync {
		m.Datasync = 1
	}
	return f.ok(ctx, m)
}

// Lock takes or releases a lock; it does not wait.
func (f *File) Lock(ctx context.Context, l Lock) (LockStatus, error) {
	if ctx.Err() != nil {
		return LockError, givenUp{context.Cause(ctx)}
	}
	if err := f.c.beginLock(ctx, f.fid); err != nil {
		return LockError, err
	}
	r, err := exchange[*Rlock](ctx, f.c, &Tlock{FID: f.fid, Lock: l}, nil)
	if answered(err) { // else it is given up, and settled later
		if err == nil && r.Status == LockSuccess {
			f.c.setLocked(f.fid, l)
		}
		f.c.settleLock(f.fid)
	}
	if err != nil {
		return LockError, err
	}
	return r.Status, nil
}

// GetLock returns a lock that is in the way of l, or one of type LockUnlock.
func (f *File) GetLock(ctx context.Context, l Lock) (Lock, error) {
	r, err := do[*Rgetlock](ctx, f.c, &Tgetlock{FID: f.fid, Lock: l}, nil)
	if err != nil {
		return Lock{}, err
	}
	return r.Lock, nil
}

// Xattr returns the value of an extended attribute, or, for "", the list of
// names, each ended by NUL.
func (f *File) Xattr(ctx context.Context, name string) ([]byte, error) {
	n, err := f.c.newFID()
	if err != nil {
		return nil, err
	}
	r, err := do[*Rxattrwalk](ctx, f.c, &Txattrwalk{FID: f.fid, NewFID: n, Name: name}, nil)
	x, err := f.c.file(n, &Rqid{}, err)
	if err != nil {
		return nil, err
	}
	defer x.Close(ctx)
	if r.Size > maxXattr {
		return nil, syscall.E2BIG
	}
	value := make([]byte, r.Size)
	for done := 0; done < len(value); {
		c, err := x.ReadAt(ctx, value[done:], int64(done))
		if err != nil {
			return nil, err
		}
		if c == 0 {
			return value[:done], nil
		}
		done += c
	}
	return value, nil
}

// SetXattr sets an extended attribute with flags of setxattr(2), or removes it if value is nil.
func (f *File) SetXattr(ctx context.Context, name string, value []byte, flags int) error {
	const replace = 2 // XATTR_REPLACE; with size 0 it removes
	if value == nil {
		flags = replace
	}
	x, err := f.Walk(ctx)
	if err != nil {
		return err
	}
	err = x.ok(ctx, &Txattrcreate{FID: x.fid, Name: name, Size: uint64(len(value)), Flags: uint32(flags)})
	for done := 0; err == nil && done < len(value); {
		var c int
		c, err = x.WriteAt(ctx, value[done:], int64(done))
		done += c
	}
	// The clunk is what sets it.
	cerr := x.Close(ctx)
	if err == nil {
		err = cerr
	}
	return err
}
