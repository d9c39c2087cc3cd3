package p9

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"
)

// slowFS has one file, whose methods wait when they are told to. Node's other
// methods are not there: a call of one is a panic.
type slowFS struct {
	Node
	entered chan struct{} // gets a token when a read has begun
	release chan struct{} // a read ends when it gets a token
	nodes   atomic.Int64  // references
}

func (s *slowFS) Attach(string, string, uint32) (Node, error) { return s.Clone(), nil }
func (s *slowFS) Clone() Node                                 { s.nodes.Add(1); return s }
func (s *slowFS) Close()                                      { s.nodes.Add(-1) }
func (s *slowFS) QID() QID                                    { return QID{Path: 1} }
func (s *slowFS) GetAttr(AttrMask) (Attr, error)              { return Attr{}, nil }
func (s *slowFS) Open(uint32) (Handle, error)                 { return &slowHandle{s: s}, nil }

type slowHandle struct {
	Handle
	s      *slowFS
	closed atomic.Bool
}

func (h *slowHandle) Close() error {
	if h.closed.Swap(true) {
		panic("closed twice")
	}
	return nil
}

func (h *slowHandle) ReadAt(p []byte, offset int64) (int, error) {
	if offset == 0 {
		h.s.entered <- struct{}{}
		<-h.s.release
	}
	if h.closed.Load() {
		panic("closed while it was read")
	}
	return copy(p, "data"), nil
}

// start serves s and returns a client, and an end of the connection for what no client sends.
func start(t *testing.T, cfg Config) (*slowFS, *Client, *File) {
	t.Helper()
	s := &slowFS{entered: make(chan struct{}, 100), release: make(chan struct{}, 100)}
	ours, theirs := net.Pipe()
	served := make(chan error, 1)
	go func() { served <- Serve(context.Background(), theirs, s, cfg) }()
	c, err := NewClient(t.Context(), ours, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		c.Close()
		if err := <-served; err != nil {
			t.Error(err)
		}
		if n := s.nodes.Load(); n != 0 {
			t.Errorf("%d references are left", n)
		}
	})
	root, err := c.Attach(t.Context(), "", "", 0)
	if err != nil {
		t.Fatal(err)
	}
	return s, c, root
}

// TestInFlight: a request that takes long does not keep others from being answered,
// nor their fid from being clunked.
func TestInFlight(t *testing.T) {
	s, _, root := start(t, Config{})
	ctx := t.Context()
	var wg sync.WaitGroup
	for range 20 {
		f, err := root.Walk(ctx)
		if err == nil {
			err = f.Open(ctx, os.O_RDONLY)
		}
		if err != nil {
			t.Fatal(err)
		}
		wg.Go(func() {
			if n, err := f.ReadAt(ctx, make([]byte, 10), 0); n != 4 || err != nil {
				t.Error(n, err)
			}
		})
		<-s.entered
		if n, err := f.ReadAt(ctx, make([]byte, 10), 1); n != 4 || err != nil {
			t.Fatal(n, err)
		}
		if err := f.Close(ctx); err != nil {
			t.Fatal(err)
		}
		if _, err := f.ReadAt(ctx, make([]byte, 10), 1); !errors.Is(err, syscall.EBADF) {
			t.Errorf("read of a clunked fid: %v", err)
		}
	}
	for range 20 {
		s.release <- struct{}{}
	}
	wg.Wait()
}

// TestFlush: a request that the server does not answer is given up, its data is nobody's any more, and its tag is used again when the
// server has answered what takes it back.
func TestFlush(t *testing.T) {
	s, c, root := start(t, Config{})
	if err := root.Open(t.Context(), os.O_RDONLY); err != nil {
		t.Fatal(err)
	}
	ended, cancel := context.WithCancel(t.Context())
	cancel()
	buf := make([]byte, 10)
	for range 10 {
		ctx, cancel := context.WithCancel(t.Context())
		result := make(chan error, 1)
		go func() {
			_, err := root.ReadAt(ctx, buf, 0)
			result <- err
		}()
		<-s.entered
		cancel()
		if err := <-result; !errors.Is(err, context.Canceled) {
			t.Error(err)
		}
	}
	for range 10 {
		s.release <- struct{}{}
	}
	for inFlight := 1; inFlight > 0; {
		if n, err := root.ReadAt(t.Context(), make([]byte, 10), 1); n != 4 || err != nil {
			t.Fatal(n, err)
		}
		c.mu.Lock()
		inFlight = len(c.calls)
		c.mu.Unlock()
	}
	if !bytes.Equal(buf, make([]byte, 10)) {
		t.Errorf("%q was read after the end", buf)
	}
	// Nothing is begun for who has gone, but fids are ended.
	if _, err := root.ReadAt(ended, buf, 1); !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
	f, err := root.Walk(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if err := f.Remove(ended); !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
	for err == nil {
		_, err = f.GetAttr(t.Context(), AttrBasic)
	}
	if !errors.Is(err, syscall.EBADF) {
		t.Errorf("a fid that was to be removed: %v", err)
	}
}

// raw exchanges frames with a server that has been told the version.
type raw struct {
	t    *testing.T
	conn net.Conn
}

func rawSession(t *testing.T, fs FS, cfg Config) (*raw, <-chan error) {
	ours, theirs := net.Pipe()
	served := make(chan error, 1)
	go func() { served <- Serve(context.Background(), theirs, fs, cfg) }()
	t.Cleanup(func() { ours.Close() })
	r := &raw{t, ours}
	r.send(NoTag, &Mversion{Kind: TVersion, Msize: 8192, Version: Version})
	if _, m := r.receive(); m.(*Mversion).Msize != 8192 {
		t.Fatalf("%+v", m)
	}
	return r, served
}

func (r *raw) send(tag Tag, m Message) {
	r.t.Helper()
	b, err := Append(nil, tag, m, MaxMsize)
	if err == nil {
		r.conn.SetDeadline(time.Now().Add(time.Minute))
		_, err = r.conn.Write(b)
	}
	if err != nil {
		r.t.Fatal(err)
	}
}

func (r *raw) receive() (Tag, Message) {
	r.t.Helper()
	frame, err := readFrame(r.conn, MaxMsize, func(n int) []byte { return make([]byte, n) })
	if err != nil {
		r.t.Fatal(err)
	}
	tag, m, err := Decode(frame)
	if err != nil {
		r.t.Fatal(err)
	}
	return tag, m
}

// reading is a session in which the file system is at a Tread of tag 1.
func reading(t *testing.T, s *slowFS) (*raw, <-chan error) {
	r, served := rawSession(t, s, Config{})
	r.send(1, &Tattach{AFID: NoFID})
	r.receive()
	r.send(1, &Tlopen{})
	r.receive()
	r.send(1, &Tread{Kind: TRead, Count: 4})
	<-s.entered
	return r, served
}

// TestFlushOrder: Rflush comes after the answer of what it takes back, and at once
// for a tag that is not in flight; the tag is free then.
func TestFlushOrder(t *testing.T) {
	s := &slowFS{entered: make(chan struct{}, 1), release: make(chan struct{}, 1)}
	r, _ := reading(t, s)
	r.send(2, &Tflush{Old: 1})
	r.send(3, &Tflush{Old: 99})
	if tag, m := r.receive(); tag != 3 || m.Type() != TFlush+1 {
		t.Errorf("%d, %T", tag, m)
	}
	s.release <- struct{}{}
	for _, want := range []Tag{1, 2} {
		if tag, m := r.receive(); tag != want {
			t.Errorf("%d, %T, want tag %d", tag, m, want)
		}
	}
	r.send(1, &Tread{Kind: TRead, Offset: 1, Count: 4})
	if tag, m := r.receive(); tag != 1 || string(m.(*Rread).Data) != "data" {
		t.Errorf("%d, %+v", tag, m)
	}
}

// TestFlushCircle: requests that wait for themselves or each other are answered.
func TestFlushCircle(t *testing.T) {
	r, served := rawSession(t, &slowFS{}, Config{})
	for range 100 {
		r.send(5, &Tflush{Old: 5})
		r.receive()
		r.send(6, &Tflush{Old: 7})
		r.send(7, &Tflush{Old: 6})
		for tag := Tag(0); tag != 7; { // 6 may have been dropped
			tag, _ = r.receive()
		}
	}
	r.conn.Close()
	<-served
}

// TestProtocolErrors: what breaks the protocol ends the connection; what is merely
// wrong is answered.
func TestProtocolErrors(t *testing.T) {
	for name, frame := range map[string]string{
		"no frame":          "\x03\x00\x00\x00",
		"larger than msize": "\x01\x20\x00\x00\x74\x01\x00",
		"malformed":         "\x08\x00\x00\x00\x78\x01\x00\x00",
		"cut off":           "\x0b\x00\x00\x00\x78\x01",
		"tag of Tversion":   "\x0b\x00\x00\x00\x78\xff\xff\x00\x00\x00\x00",
	} {
		r, served := rawSession(t, &slowFS{}, Config{})
		io.WriteString(r.conn, frame) // the server need not read all of it
		if name == "cut off" {
			r.conn.Close()
		}
		if err := <-served; err == nil {
			t.Errorf("%s: no error", name)
		}
	}
	r, _ := rawSession(t, &slowFS{}, Config{})
	for _, c := range []struct {
		m    Message
		want syscall.Errno
	}{
		{&Tauth{}, syscall.ENOENT},
		{&Rok{Kind: TClunk + 1}, syscall.EOPNOTSUPP},
		{&Tattach{AFID: 3}, syscall.EACCES},
		{&Tattach{FID: NoFID, AFID: NoFID}, syscall.EBADF},
		{&Tfid{Kind: TClunk, FID: 5}, syscall.EBADF},
	} {
		r.send(1, c.m)
		if _, m := r.receive(); m.Type() != RLerror || m.(*Rlerror).Errno != uint32(c.want) {
			t.Errorf("%T: %+v, want %v", c.m, m, c.want)
		}
	}
	if _, err := io.WriteString(r.conn, "\x07\x00\x00\x00\xc8\x01\x00"); err != nil { // type 200
		t.Fatal(err)
	}
	if _, m := r.receive(); m.(*Rlerror).Errno != uint32(syscall.EOPNOTSUPP) {
		t.Errorf("%+v", m)
	}
	// Another version is refused, and ends what there was.
	r.send(1, &Tattach{AFID: NoFID})
	r.receive()
	r.send(NoTag, &Mversion{Kind: TVersion, Msize: 8192, Version: "9P2000.u"})
	if _, m := r.receive(); m.(*Mversion).Version != "unknown" {
		t.Errorf("%+v", m)
	}
	r.send(NoTag, &Mversion{Kind: TVersion, Msize: 100, Version: Version})
	if _, m := r.receive(); m.(*Rlerror).Errno != uint32(syscall.EMSGSIZE) {
		t.Errorf("%+v", m)
	}
	r.send(NoTag, &Mversion{Kind: TVersion, Msize: 1 << 30, Version: Version})
	if _, m := r.receive(); m.(*Mversion).Msize != MaxMsize {
		t.Errorf("%+v", m)
	}
	r.send(1, &Tfid{Kind: TClunk})
	if _, m := r.receive(); m.Type() != RLerror {
		t.Errorf("a fid of the session before: %+v", m)
	}
}

// TestSameTag: a tag that is in flight cannot be used for another request.
func TestSameTag(t *testing.T) {
	s := &slowFS{entered: make(chan struct{}, 1), release: make(chan struct{}, 1)}
	r, served := reading(t, s)
	r.send(1, &Tread{Kind: TRead, Offset: 1, Count: 4})
	if _, err := r.conn.Read(make([]byte, 1)); err != io.EOF { // not before: the tag is free with the answer
		t.Error(err)
	}
	s.release <- struct{}{}
	if err := <-served; !errors.Is(err, ErrMalformed) {
		t.Error(err)
	}
}

// TestPanic: a mistake in one request is told as EIO and logged; the next is served.
func TestPanic(t *testing.T) {
	var log strings.Builder
	_, _, root := start(t, Config{Logf: func(format string, args ...any) { fmt.Fprintf(&log, format, args...) }})
	if _, err := root.Statfs(t.Context()); !errors.Is(err, syscall.EIO) {
		t.Error(err)
	}
	if _, err := root.Walk(t.Context()); err != nil {
		t.Error(err)
	}
	if !strings.Contains(log.String(), "BUG") {
		t.Errorf("logged %q", log.String())
	}
}

// TestManyRequests: with more requests than are served at once all are answered.
func TestManyRequests(t *testing.T) {
	s, _, root := start(t, Config{MaxRequests: 4})
	if err := root.Open(t.Context(), os.O_RDONLY); err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	for range 20 {
		wg.Go(func() {
			if n, err := root.ReadAt(t.Context(), make([]byte, 4), 0); n != 4 || err != nil {
				t.Error(n, err)
			}
		})
	}
	for range 4 {
		<-s.entered
	}
	select {
	case <-s.entered:
		t.Error("a fifth request is served")
	default:
	}
	for range 20 {
		s.release <- struct{}{}
	}
	wg.Wait()
}

// TestClose: a client that is closed, or whose server goes away, fails what is in flight.
func TestClose(t *testing.T) {
	for _, closed := range []bool{true, false} {
		ours, theirs := net.Pipe()
		go func() {
			r := &raw{t, theirs}
			r.receive()
			r.send(NoTag, &Mversion{Kind: TVersion + 1, Msize: 8192, Version: Version})
			readFrame(theirs, MaxMsize, func(n int) []byte { return make([]byte, n) })
			if !closed {
				theirs.Close()
			}
		}()
		c, err := NewClient(t.Context(), ours, 0)
		if err != nil {
			t.Fatal(err)
		}
		result := make(chan error, 1)
		go func() {
			_, err := c.Attach(t.Context(), "", "", 0)
			result <- err
		}()
		if closed {
			c.Close()
		}
		if err := <-result; err == nil || closed && !errors.Is(err, ErrClosed) {
			t.Errorf("closed by us %v: %v", closed, err)
		}
		<-c.Done()
		if _, err := c.Attach(t.Context(), "", "", 0); err == nil {
			t.Error("no error afterwards")
		}
		c.Close()
	}
}

// FuzzClient: whatever a hostile server answers, calls end with a result or an error.
func FuzzClient(f *testing.F) {
	var answers []byte
	for tag, m := range []Message{
		&Rqid{Kind: TAttach + 1}, &Rwalk{QIDs: []QID{{}, {}}}, &Ropen{Kind: TLopen + 1}, &Rread{Kind: TRead + 1, Data: []byte("data")},
		&Rread{Kind: TReaddir + 1, Data: AppendDirent(nil, QID{}, 1, 4, "n")}, &Rxattrwalk{Size: 4},
	} {
		answers, _ = Append(answers, Tag(tag), m, MaxMsize)
	}
	f.Add(answers)
	f.Fuzz(func(t *testing.T, answers []byte) {
		ours, theirs := net.Pipe()
		go func() {
			defer theirs.Close()
			r := &raw{t, theirs}
			b, _ := Append(nil, NoTag, &Mversion{Kind: TVersion + 1, Msize: 8192, Version: Version}, MaxMsize)
			if _, err := readFrame(theirs, MaxMsize, func(n int) []byte { return make([]byte, n) }); err != nil {
				return
			}
			theirs.Write(b)
			// An answer for each request, so that tags fit; the rest at the end.
			for len(answers) > 0 {
				if _, err := readFrame(r.conn, MaxMsize, func(n int) []byte { return make([]byte, n) }); err != nil {
					return
				}
				n := len(answers)
				if len(answers) >= 4 {
					n = min(n, max(4, int(answers[0])|int(answers[1])<<8))
				}
				if _, err := theirs.Write(answers[:n]); err != nil {
					return
				}
				answers = answers[n:]
			}
		}()
		c, err := NewClient(t.Context(), ours, 0)
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		root, err := c.Attach(t.Context(), "", "", 0)
		if err != nil {
			return
		}
		file, err := root.Walk(t.Context(), "a", "b")
		if err != nil {
			return
		}
		file.Open(t.Context(), os.O_RDONLY)
		buf := make([]byte, 100)
		if n, err := file.ReadAt(t.Context(), buf[:50], 0); err == nil && (n > 50 || !bytes.Equal(buf[50:], make([]byte, 50))) {
			t.Errorf("%d bytes read", n)
		}
		file.Readdir(t.Context(), 0)
		if v, err := file.Xattr(t.Context(), "user.a"); len(v) > maxXattr {
			t.Error(len(v), err)
		}
	})
}
