package localfs

import (
	"golang.org/x/sys/unix"

	"github.com/wsl2/wsl2/internal/p9"
)

// Locks of 9P are asked for by a fid, and in the name of a client's process. Those of fcntl(2) are that process's, by whatever fid:
// so each process that locks a file has a descriptor of its own for it, whose locks (F_OFD_SETLK) other programs of this
// machine see. It is closed with the last handle that the process has locked the file by. Who of a client's own has a lock its
// kernel settles before it asks. It does not tell flock(2) from a lock of the whole file, which is therefore both here; flock(2)'s
// is the handle's.

// maxLockers is how many processes may have files locked at a time: each costs a descriptor per file.
const maxLockers = 1024

// lockerKey names a process that locks a file.
type lockerKey struct {
	file    uint64 // QID.Path
	client  string
	process uint32
}

// locker is such a process.
type locker struct {
	key  lockerKey
	fd   int
	refs int // handles that it has locked the file by; guarded by FS.lockMu
}

// locker returns the process that a lock is for, which lasts as long as the handle. If there is none yet it is made,
// or is nil.
func (h *handle) locker(l p9.Lock, make bool) (*locker, error) {
	fs := h.n.fs
	key := lockerKey{h.n.qid.Path, l.ClientID, l.ProcID}
	fs.lockMu.Lock()
	defer fs.lockMu.Unlock()
	o := fs.lockers[key]
	if o == nil {
		if !make {
			return nil, nil
		}
		if len(fs.lockers) >= maxLockers {
			return nil, unix.ENOLCK
		}
		fd, err := h.n.openToLock()
		if err != nil {
			return nil, err
		}
		o = &locker{key: key, fd: fd}
		fs.lockers[key] = o
	}
	if !h.lockers[o] {
		if h.lockers == nil {
			h.lockers = map[*locker]bool{}
		}
		h.lockers[o] = true
		o.refs++
	}
	return o, nil
}

// openToLock opens a file for locks of both kinds, as far as that is allowed.
func (n *inode) openToLock() (fd int, err error) {
	for _, how := range []int{unix.O_RDWR, unix.O_RDONLY, unix.O_WRONLY} {
		if how != unix.O_RDONLY && n.writable() != nil {
			continue
		}
		if fd, err = unix.Open(n.magic(), how|unix.O_CLOEXEC|unix.O_NONBLOCK|unix.O_NOCTTY, 0); err == nil {
			return fd, nil
		}
	}
	return -1, err
}

// endLocks ends those that nobody has the file open for any more. Nothing else uses the handle.
func (h *handle) endLocks() {
	if len(h.lockers) == 0 {
		return
	}
	fs := h.n.fs
	fs.lockMu.Lock()
	defer fs.lockMu.Unlock()
	for o := range h.lockers {
		if o.refs--; o.refs == 0 {
			delete(fs.lockers, o.key)
			unix.Close(o.fd)
		}
	}
}

// Lock takes or releases a lock, without waiting.
func (h *handle) Lock(l p9.Lock) (p9.LockStatus, error) {
	whole := l.Start == 0 && l.Length == 0
	if whole {
		if st, err := h.LockOnly(l, true); err != nil || st != p9.LockSuccess {
			return st, err
		}
	}
	st, err := h.lockFor(l, whole)
	if whole && l.Type != p9.LockUnlock && (err != nil || st != p9.LockSuccess) {
		unix.Flock(h.fd, unix.LOCK_UN)
	}
	return st, err
}

// lockFor is Lock for fcntl(2)'s locks.
func (h *handle) lockFor(l p9.Lock, whole bool) (p9.LockStatus, error) {
	o, err := h.locker(l, l.Type != p9.LockUnlock)
	if err != nil {
		return p9.LockError, err
	}
	st := p9.LockSuccess
	if o != nil {
		st, err = lockRange(o.fd, l)
	}
	if !whole {
		return st, err
	}
	if err == unix.EBADF { // the file cannot be opened for it, and the client's kernel has seen to that: it is flock(2)'s
		st, err = p9.LockSuccess, nil
	}
	if err == nil && st == p9.LockSuccess {
		err = h.setWhole(o, l)
	}
	return st, err
}

// setWhole notes who has locked the whole file by the handle. Who unlocks it need not be the same: flock(2)'s is of all that have
// the client's open file.
func (h *handle) setWhole(o *locker, l p9.Lock) error {
	h.n.fs.lockMu.Lock()
	defer h.n.fs.lockMu.Unlock()
	was := h.whole
	h.whole = nil
	if l.Type != p9.LockUnlock {
		h.whole = o
	}
	if was == nil || was == o {
		return nil
	}
	l.Type = p9.LockUnlock
	_, err := lockRange(was.fd, l)
	return err
}

// LockOnly takes a lock of flock(2), or one of fcntl(2), for the handle alone.
func (h *handle) LockOnly(l p9.Lock, flock bool) (p9.LockStatus, error) {
	if !flock {
		return lockRange(h.fd, l)
	}
	if _, err := toFlock(l); err != nil {
		return p9.LockError, err
	}
	how := map[uint8]int{p9.LockRead: unix.LOCK_SH, p9.LockWrite: unix.LOCK_EX, p9.LockUnlock: unix.LOCK_UN}[l.Type]
	return lockStatus(unix.Flock(h.fd, how|unix.LOCK_NB))
}

// lockRange takes or releases a lock of fcntl(2) for an open file.
func lockRange(fd int, l p9.Lock) (p9.LockStatus, error) {
	fl, err := toFlock(l)
	if err != nil {
		return p9.LockError, err
	}
	return lockStatus(unix.FcntlFlock(uintptr(fd), unix.F_OFD_SETLK, &fl))
}

func lockStatus(err error) (p9.LockStatus, error) {
	switch err {
	case nil:
		return p9.LockSuccess, nil
	case unix.EAGAIN, unix.EACCES:
		return p9.LockBlocked, nil
	}
	return p9.LockError, err
}

// GetLock finds a lock that is in the way of l: none of the process's own.
func (h *handle) GetLock(l p9.Lock) (p9.Lock, error) {
	if l.Type == p9.LockUnlock {
		return p9.Lock{}, unix.EINVAL
	}
	fl, err := toFlock(l)
	if err != nil {
		return p9.Lock{}, err
	}
	fd := h.fd
	if o, err := h.locker(l, false); err == nil && o != nil {
		fd = o.fd
	}
	if err := unix.FcntlFlock(uintptr(fd), unix.F_OFD_GETLK, &fl); err != nil {
		return p9.Lock{}, err
	}
	switch fl.Type {
	case unix.F_RDLCK:
		l.Type = p9.LockRead
	case unix.F_WRLCK:
		l.Type = p9.LockWrite
	default:
		l.Type = p9.LockUnlock
		return l, nil
	}
	l.Start, l.Length, l.ProcID = uint64(fl.Start), uint64(fl.Len), uint32(max(fl.Pid, 0))
	return l, nil
}

func toFlock(l p9.Lock) (unix.Flock_t, error) {
	fl := unix.Flock_t{Whence: unix.SEEK_SET, Start: int64(l.Start), Len: int64(l.Length)}
	switch l.Type {
	case p9.LockRead:
		fl.Type = unix.F_RDLCK
	case p9.LockWrite:
		fl.Type = unix.F_WRLCK
	case p9.LockUnlock:
		fl.Type = unix.F_UNLCK
	default:
		return fl, unix.EINVAL
	}
	if fl.Start < 0 || fl.Len < 0 {
		return fl, unix.EINVAL
	}
	return fl, nil
}
