package p9

import (
	"context"
	"errors"
	"net"
	"sync"
	"syscall"
	"testing"
)

// noted is a connection that tells when a write begins, once until that is read.
type noted struct {
	net.Conn
	begun chan struct{}
}

func (n *noted) Write(p []byte) (int, error) {
	select {
	case n.begun <- struct{}{}:
	default:
	}
	return n.Conn.Write(p)
}

// scripted is a client whose server is the test, and a file of it.
func scripted(t *testing.T) (*Client, *File, *raw) {
	t.Helper()
	ours, theirs := net.Pipe()
	r := &raw{t, theirs}
	greeted := make(chan struct{})
	go func() {
		defer close(greeted)
		r.receive()
		r.send(NoTag, &Mversion{Kind: TVersion + 1, Msize: 8192, Version: Version})
		tag, _ := r.receive()
		r.send(tag, &Rqid{Kind: TAttach + 1})
	}()
	c, err := NewClient(t.Context(), &noted{ours, make(chan struct{}, 1)}, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	root, err := c.Attach(t.Context(), "", "", 0)
	if err != nil {
		t.Fatal(err)
	}
	<-greeted
	return c, root, r
}

// expect receives a request of the type.
func expect[M Message](r *raw) (Tag, M) {
	r.t.Helper()
	tag, m := r.receive()
	want, ok := m.(M)
	if !ok {
		r.t.Fatalf("%T: %+v, want %T", m, m, want)
	}
	return tag, want
}

// asked starts a request that interrupt gives up, as what interrupts programs does.
func asked(what func(context.Context) error) (interrupt func(), result <-chan error) {
	ctx, cancel := context.WithCancelCause(context.Background())
	done := make(chan error, 1)
	go func() { done <- what(ctx) }()
	return func() { cancel(syscall.EINTR) }, done
}

// TestFrozen: a request ends with its context though the server does not read; what it has begun to send arrives whole, and
// nothing of what it has not.
func TestFrozen(t *testing.T) {
	c, root, r := scripted(t)
	data := make([]byte, 4096)
	begun := c.conn.(*noted).begun
	<-begun // of what came before
	unread, nothing := asked(func(ctx context.Context) error { _, err := root.WriteAt(ctx, data, 0); return err })
	<-begun
	unread()
	if err := <-nothing; !errors.Is(err, syscall.EINTR) {
		t.Errorf("of which nothing was read: %v, want EINTR", err)
	}
	_, next := asked(func(ctx context.Context) error { _, err := root.Statfs(ctx); return err })
	first, _ := expect[*Tfid](r)
	r.send(first, &Rstatfs{})
	if err := <-next; err != nil {
		t.Error(err)
	}
	interrupt, written := asked(func(ctx context.Context) error { _, err := root.WriteAt(ctx, data, 0); return err })
	head := make([]byte, 4)
	if _, err := r.conn.Read(head); err != nil { // a pipe: the rest waits for who reads it
		t.Fatal(err)
	}
	given, waiting := asked(func(ctx context.Context) error { _, err := root.GetAttr(ctx, AttrBasic); return err })
	for _, c := range []struct {
		end    func()
		result <-chan error
	}{{given, waiting}, {interrupt, written}} {
		c.end()
		if err := <-c.result; !errors.Is(err, syscall.EINTR) {
			t.Errorf("%v, want EINTR", err)
		}
	}
	_, later := asked(func(ctx context.Context) error { _, err := root.Statfs(ctx); return err })
	r.conn = &behind{r.conn, head}
	tag, w := expect[*Twrite](r)
	if len(w.Data) != len(data) {
		t.Errorf("%d bytes of %d", len(w.Data), len(data))
	}
	for range 2 { // in whichever order
		switch tagged, m := r.receive(); m := m.(type) {
		case *Tflush:
			if m.Old != tag {
				t.Errorf("%+v, want that of tag %d", m, tag)
			}
			r.send(tagged, &Rok{Kind: TFlush + 1})
		case *Tfid:
			r.send(tagged, &Rstatfs{})
		default:
			t.Errorf("%T: %+v", m, m)
		}
	}
	if err := <-later; err != nil {
		t.Error(err)
	}
}

// behind is a connection of which something was read.
type behind struct {
	net.Conn
	read []byte
}

func (b *behind) Read(p []byte) (int, error) {
	if len(b.read) == 0 {
		return b.Conn.Read(p)
	}
	n := copy(p, b.read)
	b.read = b.read[n:]
	return n, nil
}

// TestLate: of what the server has done although it was given up, nothing stays; no other request comes between.
func TestLate(t *testing.T) {
	c, root, r := scripted(t)
	flushed := func(tag Tag, late Message) {
		t.Helper()
		flush, m := expect[*Tflush](r)
		if m.Old != tag {
			t.Errorf("%+v, want that of tag %d", m, tag)
		}
		if late != nil {
			r.send(tag, late)
		}
		r.send(flush, &Rok{Kind: TFlush + 1})
	}
	ends := func(f FID) {
		t.Helper()
		tag, m := expect[*Tfid](r)
		if m.Kind != TClunk || m.FID != f {
			t.Errorf("%+v, want the end of fid %d", m, f)
		}
		r.send(tag, &Rok{Kind: TClunk + 1})
	}
	giveUp := func(end func(), result <-chan error) {
		t.Helper()
		end()
		if err := <-result; !errors.Is(err, syscall.EINTR) {
			t.Errorf("%v, want EINTR", err)
		}
	}
	walk := func(ctx context.Context) error { _, err := root.Walk(ctx, "name"); return err }

	interrupt, result := asked(walk)
	tag, w := expect[*Twalk](r)
	giveUp(interrupt, result)
	flushed(tag, &Rwalk{QIDs: make([]QID, 1)})
	ends(w.NewFID)

	interrupt, result = asked(func(ctx context.Context) error { _, err := root.Xattr(ctx, "user.x"); return err })
	tag, x := expect[*Txattrwalk](r)
	giveUp(interrupt, result)
	flushed(tag, &Rxattrwalk{Size: 1})
	ends(x.NewFID)

	// What has not been done, or failed, leaves nothing.
	for _, late := range []Message{nil, &Rlerror{Errno: uint32(syscall.ENOENT)}} {
		interrupt, result = asked(walk)
		tag, _ = expect[*Twalk](r)
		giveUp(interrupt, result)
		flushed(tag, late)
	}

	lock := func(kind uint8) func(context.Context) error {
		return func(ctx context.Context) error {
			st, err := root.Lock(ctx, Lock{Type: kind, Length: 10})
			if err == nil && st != LockSuccess {
				err = syscall.EAGAIN
			}
			return err
		}
	}
	interrupt, result = asked(lock(LockWrite))
	tag, _ = expect[*Tlock](r)
	giveUp(interrupt, result)
	_, again := asked(lock(LockRead))
	flushed(tag, &Rlock{Status: LockSuccess})
	for _, kind := range []uint8{LockUnlock, LockRead} {
		tag, l := expect[*Tlock](r)
		if l.Lock.Type != kind || l.Lock.Length != 10 {
			t.Errorf("%+v, want type %d", l.Lock, kind)
		}
		r.send(tag, &Rlock{Status: LockSuccess})
	}
	if err := <-again; err != nil {
		t.Error(err)
	}
	interrupt, result = asked(lock(LockWrite))
	tag, _ = expect[*Tlock](r)
	giveUp(interrupt, result)
	flushed(tag, &Rlock{Status: LockBlocked})
	// With a lock that is held already nothing is undone: it would go as well.
	interrupt, result = asked(lock(LockWrite))
	tag, _ = expect[*Tlock](r)
	giveUp(interrupt, result)
	flushed(tag, &Rlock{Status: LockSuccess})

	// A fid whose end nobody waits for ends nevertheless.
	_, result = asked(func(ctx context.Context) error {
		f, err := root.Walk(ctx)
		if err != nil {
			return err
		}
		ended, cancel := context.WithCancel(ctx)
		cancel()
		f.Close(ended)
		return nil
	})
	tag, w = expect[*Twalk](r)
	r.send(tag, &Rwalk{})
	ends(w.NewFID)
	if err := <-result; err != nil {
		t.Error(err)
	}
	c.Close()
	if len(c.locking) != 0 || len(c.locked) != 1 || len(c.calls) != 0 {
		t.Errorf("%d locks and %d requests are not settled, %d fids have locks, want the root", len(c.locking), len(c.calls), len(c.locked))
	}
	free := map[FID]bool{}
	for _, f := range c.freeFIDs {
		if free[f] {
			t.Errorf("fid %d is free twice", f)
		}
		free[f] = true
	}
	if len(free)+1 != int(c.nextFID) {
		t.Errorf("%d fids of %d are free, want all but the root", len(free), c.nextFID)
	}
}

// TestTags: with all tags in flight and given up, none is lost, nor that of Tversion used.
func TestTags(t *testing.T) {
	c, root, r := scripted(t)
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	const all = 100
	c.nextTag, c.freeTags = NoTag-all, nil // the others are used up
	var asking sync.WaitGroup
	for range all {
		asking.Go(func() {
			if _, err := root.GetAttr(ctx, AttrBasic); !errors.Is(err, context.Canceled) {
				t.Errorf("%v, want that it was given up", err)
			}
		})
	}
	seen := map[Tag]bool{}
	for range all {
		tag, _ := expect[*Tgetattr](r)
		seen[tag] = true
	}
	if len(seen) != all || seen[NoTag] {
		t.Errorf("%d tags, and NoTag: %v", len(seen), seen[NoTag])
	}
	cancel()
	asking.Wait()
	_, result := asked(func(ctx context.Context) error { _, err := root.Statfs(ctx); return err })
	for tag := range seen { // there is no tag for a Tflush before that
		r.send(tag, &Rgetattr{})
		break
	}
	for answered := false; !answered; {
		tag, m := r.receive()
		switch m := m.(type) {
		case *Tflush:
			r.send(m.Old, &Rgetattr{})
			r.send(tag, &Rok{Kind: TFlush + 1})
		case *Tfid:
			r.send(tag, &Rstatfs{})
			answered = true
		default:
			t.Fatalf("%T: %+v", m, m)
		}
	}
	if err := <-result; err != nil {
		t.Error(err)
	}
	c.Close()
}
