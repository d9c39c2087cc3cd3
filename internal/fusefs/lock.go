package fusefs

import (
	"strconv"
	"time"

	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"

	"github.com/wsl2/wsl2/internal/p9"
)

// Locks of flock(2) belong to an open file, so to its handle. Those of fcntl(2) belong to a
// process, through whatever descriptor it takes them, and all go when it closes any: each
// process has a handle of its own for those of a file, which FLUSH, sent with each close(2), ends. Those of
// an open file description (F_OFD_SETLK) look the same, with an owner that never sends a FLUSH: the end of
// its handle ends them. A process has no locks left by then that came by a handle of its own.
//
// The end of a file that was opened for reading is not told by FLUSH: locks for reading that came by one end with
// its handle, when all have closed it that have it, as after fork(2).

// lockOwner is a process that has a file locked.
type lockOwner struct{ node, owner uint64 }

// locker tells flock(2)'s locks from fcntl(2)'s, which 9P does not.
type locker interface {
	LockOnly(l p9.Lock, flock bool) (p9.LockStatus, error)
}

// withLocks calls what with the handle that an owner has for a file's locks. If it has none,
// one is made, or what is not called.
func (fs *FS) withLocks(cancel <-chan struct{}, in *fuse.LkIn, make bool, what func(p9.Handle) error) error {
	key := lockOwner{in.NodeId, in.Owner}
	fs.mu.Lock()
	h := fs.locks[key]
	if h == nil {
		room := fs.room()
		fs.mu.Unlock()
		if !make {
			return nil
		}
		if !room {
			return unix.ENOLCK
		}
		made, err := fs.openLocks(cancel, in.NodeId)
		if err != nil {
			return err
		}
		made.of = in.Fh
		fs.mu.Lock()
		if h = fs.locks[key]; h == nil {
			h, fs.locks[key] = made, made
		} else { // another thread has made one
			defer fs.put(cancel, made)
		}
	}
	h.refs++
	fs.mu.Unlock()
	defer fs.put(cancel, h)
	with, end := until(cancel, h.Handle)
	defer end()
	return what(with)
}

// openLocks opens a file for locks of both kinds, as far as that is allowed.
func (fs *FS) openLocks(cancel <-chan struct{}, id uint64) (*handle, error) {
	n, err := fs.get(id)
	if err != nil {
		return nil, err
	}
	with, end := until(cancel, n)
	defer end()
	for _, flags := range []uint32{unix.O_RDWR, unix.O_RDONLY, unix.O_WRONLY} {
		var h p9.Handle
		if h, err = with.Open(flags); err == nil {
			return &handle{Handle: h, node: n, refs: 1}, nil
		}
	}
	n.Close()
	return nil, err
}

// releaseLocks ends the locks that came by a handle.
func (fs *FS) releaseLocks(fh uint64) {
	var ended []*handle
	fs.mu.Lock()
	for key, h := range fs.locks {
		if h.of == fh {
			delete(fs.locks, key)
			ended = append(ended, h)
		}
	}
	fs.mu.Unlock()
	for _, h := range ended {
		fs.put(nil, h)
	}
}

// Flush is a close(2).
func (fs *FS) Flush(cancel <-chan struct{}, in *fuse.FlushIn) fuse.Status {
	key := lockOwner{in.NodeId, in.LockOwner}
	fs.mu.Lock()
	l := fs.locks[key]
	delete(fs.locks, key)
	fs.mu.Unlock()
	if l != nil {
		fs.put(cancel, l)
	}
	return fuse.OK
}

// lockRange translates a lock: FUSE's ends at its last byte.
func lockRange(in *fuse.LkIn) (p9.Lock, error) {
	l := p9.Lock{Start: in.Lk.Start, ClientID: strconv.FormatUint(in.Owner, 16)} // processes that share their descriptors are one
	if in.Lk.End != 1<<63-1 {
		if in.Lk.End < in.Lk.Start {
			return l, unix.EINVAL
		}
		l.Length = in.Lk.End - in.Lk.Start + 1
	}
	switch in.Lk.Typ {
	case unix.F_RDLCK:
		l.Type = p9.LockRead
	case unix.F_WRLCK:
		l.Type = p9.LockWrite
	case unix.F_UNLCK:
		l.Type = p9.LockUnlock
	default:
		return l, unix.EINVAL
	}
	return l, nil
}

// lock takes or releases a lock, without waiting.
func (fs *FS) lock(cancel <-chan struct{}, in *fuse.LkIn) error {
	l, err := lockRange(in)
	if err != nil {
		return err
	}
	flock := in.LkFlags&fuse.FUSE_LK_FLOCK != 0
	on := func(h p9.Handle) error {
		var st p9.LockStatus
		var err error
		if o, ok := h.(locker); ok {
			st, err = o.LockOnly(l, flock)
		} else {
			st, err = h.Lock(l)
		}
		if err == nil && st != p9.LockSuccess {
			err = unix.EAGAIN
		}
		return err
	}
	if flock {
		l.Start, l.Length = 0, 0
		return syscallError(fs.withHandle(cancel, in.Fh, on))
	}
	return fs.withLocks(cancel, in, l.Type != p9.LockUnlock, on)
}

func (fs *FS) SetLk(cancel <-chan struct{}, in *fuse.LkIn) fuse.Status {
	return status(fs.lock(cancel, in))
}

// How often a lock is asked for that somebody else has: his program may be one of the other
// side, whose end nothing tells.
const (
	firstRetry = time.Millisecond
	lastRetry  = 200 * time.Millisecond
)

func (fs *FS) SetLkw(cancel <-chan struct{}, in *fuse.LkIn) fuse.Status {
	began := time.Now()
	for wait := firstRetry; ; wait = min(2*wait, lastRetry) {
		err := fs.lock(cancel, in)
		if err == unix.EAGAIN && fs.cfg.LockWait > 0 && time.Since(began) > fs.cfg.LockWait {
			return fuse.EINTR
		}
		if err != unix.EAGAIN {
			return status(err)
		}
		timer := time.NewTimer(wait)
		select {
		case <-timer.C:
		case <-cancel:
			timer.Stop()
			return fuse.EINTR
		}
	}
}

func (fs *FS) GetLk(cancel <-chan struct{}, in *fuse.LkIn, out *fuse.LkOut) fuse.Status {
	l, err := lockRange(in)
	if err != nil {
		return status(err)
	}
	asked := false
	find := func(h p9.Handle) error {
		asked = true
		if l, err = h.GetLock(l); err != nil {
			return err
		}
		out.Lk = fuse.FileLock{Typ: unix.F_UNLCK}
		if l.Type == p9.LockUnlock {
			return nil
		}
		out.Lk = fuse.FileLock{Start: l.Start, End: 1<<63 - 1, Typ: unix.F_RDLCK, Pid: l.ProcID}
		if l.Type == p9.LockWrite {
			out.Lk.Typ = unix.F_WRLCK
		}
		if l.Length != 0 {
			out.Lk.End = l.Start + l.Length - 1
		}
		return nil
	}
	// Its own locks are not in an owner's way.
	if err := fs.withLocks(cancel, in, false, find); err != nil || asked {
		return status(err)
	}
	return fs.withHandle(cancel, in.Fh, find)
}
