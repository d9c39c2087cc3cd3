package p9

import (
	"errors"
	"net"
	"syscall"
	"testing"
)

// slowWalk is a slowFS whose walks wait, and fail by the name "none".
type slowWalk struct{ *slowFS }

func (s slowWalk) Attach(string, string, uint32) (Node, error) { return s.Clone(), nil }
func (s slowWalk) Clone() Node                                 { s.slowFS.Clone(); return s }

func (s slowWalk) Walk(name string) (Node, error) {
	s.entered <- struct{}{}
	<-s.release
	if name == "none" {
		return nil, syscall.ENOENT
	}
	return s.Clone(), nil
}

// TestPipelined: what is asked for of a fid that a walk is still to make waits for the walk, and for none that comes later.
func TestPipelined(t *testing.T) {
	s := &slowFS{entered: make(chan struct{}, 100), release: make(chan struct{}, 100)}
	r, served := rawSession(t, slowWalk{s}, Config{})
	r.send(1, &Tattach{FID: 1, AFID: NoFID})
	r.receive()
	for name, f := range map[string]FID{"some": 2, "none": 3} {
		walks := name == "some"
		r.send(1, &Twalk{FID: 1, NewFID: f, Names: []string{name}})
		r.send(2, &Tgetattr{FID: f})
		r.send(3, &Tlopen{FID: f})
		<-s.entered
		// Another's is answered meanwhile, and nothing else.
		r.send(4, &Tgetattr{FID: 1})
		if tag, m := r.receive(); tag != 4 {
			t.Errorf("%s: tag %d, %+v", name, tag, m)
		}
		s.release <- struct{}{}
		for range 3 {
			tag, m := r.receive()
			e, failed := m.(*Rlerror)
			if failed == walks || failed && tag != 1 && e.Errno != uint32(syscall.EBADF) {
				t.Errorf("%s: tag %d, %+v", name, tag, m)
			}
		}
	}
	// In a circle each finds what is there.
	r.send(1, &Twalk{FID: 7, NewFID: 8})
	r.send(2, &Twalk{FID: 8, NewFID: 7})
	r.send(3, &Tgetattr{FID: 9})
	r.send(4, &Twalk{FID: 1, NewFID: 9})
	for range 4 {
		if tag, m := r.receive(); (tag == 4) != (m.Type() == TWalk+1) {
			t.Errorf("tag %d, %+v", tag, m)
		}
	}
	r.conn.Close()
	<-served
}

// TestWalkAttr: a server that does not wait is asked again.
func TestWalkAttr(t *testing.T) {
	ours, theirs := net.Pipe()
	p := &raw{t, theirs}
	go func() {
		tag, _ := p.receive()
		p.send(tag, &Mversion{Kind: TVersion + 1, Msize: 8192, Version: Version})
	}()
	c, err := NewClient(t.Context(), ours, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	f := &File{c: c, fid: 1}
	type result struct {
		f   *File
		err error
	}
	got := make(chan result, 1)
	walk := func() { f, a, err := f.WalkAttr(t.Context(), "a", AttrBasic); _ = a; got <- result{f, err} }
	reopen := func() { f, err := f.Reopen(t.Context(), 0); got <- result{f, err} }
	create := func() { f, err := f.CreateIn(t.Context(), "a", 0, 0, 0); got <- result{f, err} }
	for name, one := range map[string]struct {
		ask    func()
		again  Type
		answer Message
	}{"WalkAttr": {walk, TGetattr, &Rgetattr{}}, "Reopen": {reopen, TLopen, &Ropen{Kind: TLopen + 1}},
		"CreateIn": {create, TLcreate, &Ropen{Kind: TLcreate + 1}}} {
		go one.ask()
		tag, m := p.receive()
		w, ok := m.(*Twalk)
		if !ok {
			t.Fatalf("%s: %+v", name, m)
		}
		second, _ := p.receive()
		p.send(second, &Rlerror{Errno: uint32(syscall.EBADF)})
		p.send(tag, &Rwalk{QIDs: make([]QID, len(w.Names))})
		tag, m = p.receive()
		if m.Type() != one.again {
			t.Errorf("%s: then %+v", name, m)
		}
		p.send(tag, one.answer)
		if r := <-got; r.err != nil || r.f.fid != w.NewFID {
			t.Errorf("%s: %+v", name, r)
		}
		// What the walk does not find is an error, whatever the other says.
		go one.ask()
		tag, _ = p.receive()
		second, _ = p.receive()
		p.send(tag, &Rlerror{Errno: uint32(syscall.ENOENT)})
		p.send(second, &Rlerror{Errno: uint32(syscall.EBADF)})
		if r := <-got; !errors.Is(r.err, syscall.ENOENT) {
			t.Errorf("%s of nothing: %+v", name, r)
		}
	}
}
