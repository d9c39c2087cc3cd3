package localfs

import (
	"os"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/wsl2/wsl2/internal/p9"
)

// TestLocks: what a client locks, programs here see, and the other way round.
func TestLocks(t *testing.T) {
	ctx := t.Context()
	root, dir := share(t, Config{})
	f := create(t, root, "f", "0123456789")
	other := must(root.Walk(ctx, "f"))(t)
	check(t, other.Open(ctx, os.O_RDWR))
	here := must(os.OpenFile(dir+"/f", os.O_RDWR, 0))(t)
	defer here.Close()
	status := func(f *p9.File, l p9.Lock) p9.LockStatus { t.Helper(); return must(f.Lock(ctx, l))(t) }

	if st := status(f, p9.Lock{Type: p9.LockWrite, Start: 2, Length: 3}); st != p9.LockSuccess {
		t.Fatal(st)
	}
	if st := status(other, p9.Lock{Type: p9.LockRead, Start: 4, Length: 1, ProcID: 1}); st != p9.LockBlocked {
		t.Errorf("another process: %v", st)
	}
	if st := status(other, p9.Lock{Type: p9.LockRead, Start: 5, ProcID: 1}); st != p9.LockSuccess {
		t.Errorf("beside it: %v", st)
	}
	fl := unix.Flock_t{Type: unix.F_WRLCK, Start: 2, Len: 1}
	want(t, "a lock here", unix.FcntlFlock(here.Fd(), unix.F_SETLK, &fl), unix.EAGAIN)
	if l := must(other.GetLock(ctx, p9.Lock{Type: p9.LockWrite, Start: 0, Length: 4, ProcID: 1}))(t); l.Type != p9.LockWrite || l.Start != 2 || l.Length != 3 {
		t.Errorf("in the way is %+v", l)
	}
	if l := must(other.GetLock(ctx, p9.Lock{Type: p9.LockRead, Start: 0, Length: 2, ProcID: 1}))(t); l.Type != p9.LockUnlock {
		t.Errorf("in the way is %+v", l)
	}
	for process, file := range []*p9.File{f, other} {
		status(file, p9.Lock{Type: p9.LockUnlock, ProcID: uint32(process)})
	}
	// A lock of the whole file may be flock(2)'s.
	check(t, unix.Flock(int(here.Fd()), unix.LOCK_EX))
	if st := status(f, p9.Lock{Type: p9.LockWrite}); st != p9.LockBlocked {
		t.Errorf("beside a flock here: %v", st)
	}
	check(t, unix.Flock(int(here.Fd()), unix.LOCK_UN))
	if st := status(f, p9.Lock{Type: p9.LockWrite}); st != p9.LockSuccess {
		t.Errorf("%v", st)
	}
	want(t, "flock here", unix.Flock(int(here.Fd()), unix.LOCK_SH|unix.LOCK_NB), unix.EWOULDBLOCK)
	check(t, f.Close(ctx))
	check(t, unix.Flock(int(here.Fd()), unix.LOCK_SH|unix.LOCK_NB))
}

// TestLockers: fcntl(2)'s locks are a process's by whatever fid, to the end of the last that it has locked the file by; a lock of
// the whole file is also the fid's, whoever took it.
func TestLockers(t *testing.T) {
	ctx := t.Context()
	root, dir := share(t, Config{})
	a := create(t, root, "f", "0123456789")
	open := func() *p9.File {
		t.Helper()
		f := must(root.Walk(ctx, "f"))(t)
		check(t, f.Open(ctx, os.O_RDWR))
		return f
	}
	b := open()
	here := must(os.OpenFile(dir+"/f", os.O_RDWR, 0))(t)
	defer here.Close()
	do := func(what string, f *p9.File, process uint32, kind uint8, start, length uint64, want p9.LockStatus) {
		t.Helper()
		if st := must(f.Lock(ctx, p9.Lock{Type: kind, Start: start, Length: length, ProcID: process, ClientID: "client"}))(t); st != want {
			t.Errorf("%s: %v, want %v", what, st, want)
		}
	}
	free := func(what string, want error) {
		t.Helper()
		fl := unix.Flock_t{Type: unix.F_WRLCK, Len: 100}
		err := unix.FcntlFlock(here.Fd(), unix.F_OFD_SETLK, &fl)
		if err == nil {
			err = unix.Flock(int(here.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		}
		if err != want {
			t.Errorf("%s: locked here: %v, want %v", what, err, want)
		}
		fl.Type = unix.F_UNLCK
		check(t, unix.FcntlFlock(here.Fd(), unix.F_OFD_SETLK, &fl))
		check(t, unix.Flock(int(here.Fd()), unix.LOCK_UN))
	}
	do("a", a, 1, p9.LockWrite, 0, 5, p9.LockSuccess)
	do("by another fid", b, 1, p9.LockWrite, 3, 5, p9.LockSuccess)
	do("another process", b, 2, p9.LockRead, 4, 1, p9.LockBlocked)
	if l := must(b.GetLock(ctx, p9.Lock{Type: p9.LockWrite, Length: 10, ProcID: 1, ClientID: "client"}))(t); l.Type != p9.LockUnlock {
		t.Errorf("its own lock is in its way: %+v", l)
	}
	do("another process ends", a, 3, p9.LockUnlock, 0, 0, p9.LockSuccess) // as each that has inherited the open file does
	free("after a child's end", unix.EAGAIN)
	do("as by close(2)", b, 1, p9.LockUnlock, 0, 0, p9.LockSuccess)
	free("after a close", nil)

	do("a", a, 1, p9.LockWrite, 0, 5, p9.LockSuccess)
	do("b", b, 1, p9.LockWrite, 5, 5, p9.LockSuccess)
	check(t, a.Close(ctx))
	free("with one fid left", unix.EAGAIN)
	check(t, b.Close(ctx))
	free("with none", nil)

	// flock(1) takes a lock for the shell that it has the file of.
	a = open()
	do("the whole", a, 1, p9.LockWrite, 0, 0, p9.LockSuccess)
	free("the whole", unix.EAGAIN)
	do("by somebody else", a, 2, p9.LockUnlock, 0, 0, p9.LockSuccess)
	free("unlocked by another", nil)
	do("the whole", a, 1, p9.LockWrite, 0, 0, p9.LockSuccess)
	check(t, a.Close(ctx))
	free("ended", nil)

	// Each costs a descriptor.
	a = open()
	for process := range uint32(maxLockers) {
		do("many", a, process, p9.LockRead, 1, 1, p9.LockSuccess)
	}
	_, err := a.Lock(ctx, p9.Lock{Type: p9.LockRead, Start: 1, Length: 1, ProcID: maxLockers, ClientID: "client"})
	want(t, "one too many", err, unix.ENOLCK)
	check(t, a.Close(ctx))
	a = open()
	do("after their end", a, maxLockers, p9.LockRead, 1, 1, p9.LockSuccess)
}
