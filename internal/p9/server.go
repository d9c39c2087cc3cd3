package p9

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"runtime/debug"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
)

// Config of a Server.
type Config struct {
	// Msize is the largest frame to agree on; 0 means MaxMsize.
	Msize uint32
	// MaxFIDs is how many fids a connection may have; 0 means 65536. Each costs the
	// file system up to two descriptors.
	MaxFIDs int
	// MaxRequests is how many requests of a connection are served at once; 0 means 64. While
	// there are as many, no more are read. Each holds up to twice Msize of memory.
	MaxRequests int
	// Logf, if set, is told of mistakes of ours.
	Logf func(format string, args ...any)
}

// Serve serves fs on conn until the peer closes it (then it returns nil), breaks
// the protocol, or ctx ends. It closes conn, and all files that the peer left open.
func Serve(ctx context.Context, conn io.ReadWriteCloser, fs FS, cfg Config) error {
	if cfg.Msize == 0 || cfg.Msize > MaxMsize {
		cfg.Msize = MaxMsize
	}
	if cfg.MaxFIDs == 0 {
		cfg.MaxFIDs = 1 << 16
	}
	if cfg.MaxRequests == 0 {
		cfg.MaxRequests = 64
	}
	if cfg.Logf == nil {
		cfg.Logf = func(string, ...any) {}
	}
	s := &server{cfg: cfg, fs: fs, conn: conn, msize: MinMsize, slots: make(chan struct{}, cfg.MaxRequests),
		requests: map[Tag]*request{}, fids: map[FID]*fid{}, making: map[FID]*request{}}
	stop := context.AfterFunc(ctx, func() { conn.Close() })
	err := s.read()
	conn.Close()
	s.running.Wait()
	s.reset()
	if !stop() {
		return context.Cause(ctx)
	}
	return err
}

// server serves one connection.
//
// Lock order: sendMu, then mu. fid.mu is held while a Node is called; nobody holds
// two of them, so that no request can wait for another in a circle.
type server struct {
	cfg   Config
	fs    FS
	conn  io.ReadWriteCloser
	slots chan struct{} // one token a request
	bufs  sync.Pool     // *[]byte of msize

	msize   uint32 // agreed; changed only while no request runs
	ready   bool   // a version was agreed; of the goroutine that reads
	running sync.WaitGroup

	sendMu sync.Mutex // serialises frames

	mu       sync.Mutex
	requests map[Tag]*request // guarded by mu
	fids     map[FID]*fid     // guarded by mu
	making   map[FID]*request // the first that is to make a fid; guarded by mu
	arrived  uint64           // number of the last request; guarded by mu
	values   atomic.Int32     // fids that are extended attributes
}

// request is one that is in flight.
type request struct {
	tag     Tag
	number  uint64        // in the order of arrival; set by enter
	done    chan struct{} // closed when it has been answered or dropped
	begun   bool          // guarded by server.mu
	dropped bool          // guarded by server.mu
}

// fid is a number's file. References are the table's and those of running requests:
// a request that uses a fid keeps it open if it is clunked meanwhile.
type fid struct {
	refs int // guarded by server.mu

	mu     sync.RWMutex // for writing while what the fid stands for changes
	node   Node
	handle Handle      // nil until it is opened
	value  *xattrValue // not nil: the fid is an extended attribute
}

// xattrValue is an extended attribute that is read or written through a fid.
type xattrValue struct {
	mu    sync.Mutex
	data  []byte
	write bool
	name  string
	size  int // announced
	flags int
}

// read reads requests until the connection ends.
func (s *server) read() error {
	r := bufio.NewReaderSize(s.conn, readAhead)
	for {
		s.slots <- struct{}{}
		buf := s.buffer(MinMsize)
		frame, err := readFrame(r, max(s.msize, MinMsize), func(n int) []byte {
			if n > cap(*buf) {
				s.release(buf)
				buf = s.buffer(n)
			}
			return (*buf)[:n]
		})
		if err != nil {
			s.release(buf)
			<-s.slots
			if errors.Is(err, io.EOF) || errors.Is(err, io.ErrClosedPipe) {
				return nil
			}
			return err
		}
		if err := s.accept(frame, buf); err != nil {
			return err
		}
	}
}

// accept starts a request, which gives buf and the slot back.
func (s *server) accept(frame []byte, buf *[]byte) error {
	tag, m, err := Decode(frame)
	if version, ok := m.(*Mversion); ok && err == nil && version.Kind == TVersion {
		defer func() { s.release(buf); <-s.slots }()
		return s.version(tag, version)
	}
	r := &request{tag: tag, done: make(chan struct{})}
	if !s.ready {
		err = fmt.Errorf("%w: no Tversion", ErrMalformed)
	}
	if errors.Is(err, ErrMalformed) || tag == NoTag || !s.enter(r, m) {
		s.release(buf)
		<-s.slots
		if err == nil {
			err = fmt.Errorf("%w: tag %d is in use", ErrMalformed, tag)
		}
		return err
	}
	s.running.Add(1)
	go func() {
		defer s.running.Done()
		defer func() { <-s.slots }()
		defer s.release(buf)
		defer s.leave(r, m)
		if !s.begin(r) {
			return
		}
		if err != nil { // an unknown type: an error that v9fs understands
			s.send(tag, &Rlerror{Errno: uint32(syscall.EOPNOTSUPP)})
			return
		}
		s.await(r, m)
		s.serve(r, m)
	}()
	return nil
}

func (s *server) enter(r *request, m Message) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.requests[r.tag] != nil {
		return false
	}
	s.requests[r.tag] = r
	s.arrived++
	r.number = s.arrived
	if w, ok := m.(*Twalk); ok && s.making[w.NewFID] == nil {
		s.making[w.NewFID] = r
	}
	return true
}

// leave ends a request.
func (s *server) leave(r *request, m Message) {
	if w, ok := m.(*Twalk); ok {
		s.mu.Lock()
		if s.making[w.NewFID] == r {
			delete(s.making, w.NewFID)
		}
		s.mu.Unlock()
	}
	close(r.done)
}

// await waits until a walk that came before has made the fid that the request is for: so that a client may ask for both at
// once. A walk waits for none, so nobody waits in a circle.
func (s *server) await(r *request, m Message) {
	var f FID
	switch t := m.(type) {
	case *Tgetattr:
		f = t.FID
	case *Tlopen:
		f = t.FID
	case *Tlcreate:
		f = t.FID
	default:
		return
	}
	s.mu.Lock()
	walk := s.making[f]
	s.mu.Unlock()
	if walk != nil && walk.number < r.number {
		<-walk.done
	}
}

// begin tells whether the request still has to be served.
func (s *server) begin(r *request) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	r.begun = true
	return !r.dropped
}

// version opens a session.
func (s *server) version(tag Tag, m *Mversion) error {
	s.running.Wait()
	s.reset()
	reply := &Mversion{Kind: TVersion + 1, Msize: min(m.Msize, s.cfg.Msize), Version: Version}
	if m.Version != Version && !strings.HasPrefix(m.Version, Version+".") {
		reply.Version = "unknown"
		s.ready = false
		return s.send(tag, reply)
	}
	if m.Msize < MinMsize {
		return s.send(tag, &Rlerror{Errno: uint32(syscall.EMSGSIZE)})
	}
	s.msize, s.ready = reply.Msize, true
	return s.send(tag, reply)
}

// reset clunks everything. Preconditions: no request runs.
func (s *server) reset() {
	s.mu.Lock()
	fids := s.fids
	s.fids, s.requests = map[FID]*fid{}, map[Tag]*request{}
	s.mu.Unlock()
	for _, f := range fids {
		s.close(f) //nolint:errcheck // nobody is there to be told
	}
}

// buffer returns one of at least n bytes; release gives it back.
func (s *server) buffer(n int) *[]byte {
	if n > MinMsize {
		if b, ok := s.bufs.Get().(*[]byte); ok && cap(*b) >= n {
			return b
		}
		n = int(max(s.msize, MinMsize))
	}
	b := make([]byte, n)
	return &b
}

func (s *server) release(b *[]byte) {
	if cap(*b) > MinMsize {
		s.bufs.Put(b)
	}
}

// send sends one answer.
func (s *server) send(tag Tag, m Message) error {
	b, err := Append(make([]byte, 0, 192), tag, m, s.msize)
	if err != nil {
		b, _ = Append(b, tag, &Rlerror{Errno: uint32(syscall.E2BIG)}, s.msize)
	}
	return s.write(tag, b)
}

// write sends the answer b. The tag is free before: when the client has the answer,
// the tag is its again. Who finds it free and sends comes after the answer.
func (s *server) write(tag Tag, b []byte) error {
	s.sendMu.Lock()
	defer s.sendMu.Unlock()
	s.mu.Lock()
	delete(s.requests, tag)
	s.mu.Unlock()
	if _, err := s.conn.Write(b); err != nil {
		s.conn.Close() // ends the reading
		return err
	}
	return nil
}

// serve answers one request.
func (s *server) serve(r *request, m Message) {
	tag := r.tag
	defer func() {
		// A mistake in one request must not end those of others.
		if v := recover(); v != nil {
			s.cfg.Logf("BUG: %T panicked: %v\n%s", m, v, debug.Stack())
			s.send(tag, &Rlerror{Errno: uint32(syscall.EIO)})
		}
	}()
	switch t := m.(type) {
	case *Tread:
		s.serveRead(tag, t)
		return
	case *Tflush:
		s.flush(t.Old, r.number)
		s.send(tag, &Rok{Kind: TFlush + 1})
		return
	}
	reply, err := s.handle(m)
	if err != nil {
		reply = &Rlerror{Errno: uint32(errnoOf(err))}
	}
	s.send(tag, reply)
}

// flush waits until old has been answered, or drops it. What came no earlier than the
// Tflush, itself for one, was not in flight: nobody waits in a circle.
func (s *server) flush(old Tag, before uint64) {
	s.mu.Lock()
	r := s.requests[old]
	if r != nil && r.number >= before {
		r = nil
	}
	if r != nil && !r.begun {
		r.dropped = true
		delete(s.requests, old)
	}
	s.mu.Unlock()
	if r != nil {
		<-r.done
	}
}

// serveRead answers Tread and Treaddir: what is read goes into the frame at once.
func (s *server) serveRead(tag Tag, m *Tread) {
	const head = headerSize + 4
	count := min(m.Count, s.msize-ioHeader)
	buf := s.buffer(head + int(count))
	defer s.release(buf)
	n, err := s.readInto((*buf)[head:head+int(count):head+int(count)], m)
	if err != nil {
		s.send(tag, &Rlerror{Errno: uint32(errnoOf(err))})
		return
	}
	b := appendU32((*buf)[:0], uint32(head+n))
	b = appendU16(append(b, byte(m.Kind+1)), uint16(tag))
	appendU32(b, uint32(n))
	s.write(tag, (*buf)[:head+n]) //nolint:errcheck // the reader sees the connection's end
}

func (s *server) readInto(p []byte, m *Tread) (int, error) {
	f, err := s.get(m.FID)
	if err != nil {
		return 0, err
	}
	defer s.put(f)
	f.mu.RLock()
	defer f.mu.RUnlock()
	switch {
	case m.Kind == TRead && f.value != nil:
		return f.value.read(p, m.Offset)
	case f.handle == nil:
		return 0, syscall.EBADF
	case m.Kind == TReaddir:
		b, err := f.handle.Readdir(p[:0], m.Offset)
		return len(b), err
	case int64(m.Offset) < 0:
		return 0, syscall.EINVAL
	}
	return f.handle.ReadAt(p, int64(m.Offset))
}

// get returns a fid with a reference; put ends it.
func (s *server) get(n FID) (*fid, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	f := s.fids[n]
	if f == nil {
		return nil, syscall.EBADF
	}
	f.refs++
	return f, nil
}

func (s *server) put(f *fid) error {
	s.mu.Lock()
	f.refs--
	last := f.refs == 0
	s.mu.Unlock()
	if last {
		return s.close(f)
	}
	return nil
}

// add makes a fid that stands for node, which it owns even if it fails.
func (s *server) add(n FID, node Node, value *xattrValue) error {
	s.mu.Lock()
	err := error(nil)
	switch {
	case n == NoFID || s.fids[n] != nil:
		err = syscall.EBADF
	case len(s.fids) >= s.cfg.MaxFIDs:
		err = syscall.EMFILE
	default:
		s.fids[n] = &fid{refs: 1, node: node, value: value}
	}
	s.mu.Unlock()
	if err != nil {
		node.Close()
	}
	return err
}

// clunk takes a fid out of the table.
func (s *server) clunk(n FID) (*fid, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	f := s.fids[n]
	if f == nil {
		return nil, syscall.EBADF
	}
	delete(s.fids, n)
	return f, nil
}

// close ends what the fid stands for. Preconditions: nobody has a reference.
func (s *server) close(f *fid) (err error) {
	if f.value != nil {
		s.values.Add(-1)
	}
	if f.handle != nil {
		err = f.handle.Close()
	}
	f.node.Close()
	return err
}
