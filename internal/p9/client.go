package p9

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"sync"
	"syscall"
	"time"
)

// Client is the client's end of a connection. Its methods and those of its Files may
// be called from many goroutines at once: their requests are in flight together.
//
// An error of the server is its syscall.Errno. When ctx ends, a method takes its
// request back and returns ctx's error, also while the server does not even read. Whether the request was carried out
// is then not known; what it would have left behind, a fid or a lock, is undone when the server says.
type Client struct {
	conn  net.Conn
	msize uint32 // immutable

	sending chan struct{} // holds a token while a frame is written: one at a time
	sendBuf []byte        // of who sends

	mu       sync.Mutex
	err      error                 // why the connection is of no use any more; guarded by mu
	calls    map[Tag]*call         // guarded by mu
	nextTag  Tag                   // guarded by mu
	freeTags []Tag                 // guarded by mu
	nextFID  FID                   // guarded by mu
	freeFIDs []FID                 // guarded by mu
	locking  map[FID]chan struct{} // whose last Tlock is not settled, closed when it is; guarded by mu
	locked   map[FID]bool          // by which a lock is held, unless it was released in parts; guarded by mu
	tagFreed chan struct{}         // holds a token when a tag was freed
	done     chan struct{}         // closed when err is set
	deaf     chan struct{}         // closed when nothing is read any more
	running  sync.WaitGroup        // the goroutine that reads, and those for requests that were given up
}

// call is a request in flight.
type call struct {
	reply   Message       // guarded by Client.mu until done
	data    []byte        // where an Rread's data goes; guarded by Client.mu until done
	done    chan struct{} // closed when reply is there
	given   Message       // the request, once it is given up; guarded by Client.mu
	flushed bool          // a Tflush means its tag; guarded by Client.mu
	flushes *call         // of a Tflush: what it takes back, whose tag is free again with its answer
	old     Tag           // that one's tag
}

// givenUp is the error of a request whose answer nobody waits for: the end of its context, which may look like an answer's.
type givenUp struct{ error }

func (g givenUp) Unwrap() error { return g.error }

// answered tells whether an error, or none, is what the server said, or would have.
func answered(err error) bool {
	_, ok := err.(syscall.Errno)
	return ok || err == nil
}

// ErrClosed is the error of what is asked of a Client that was closed.
var ErrClosed = errors.New("p9: client is closed")

// NewClient opens a session on conn with frames of at most msize bytes (0 means
// MaxMsize). The Client owns conn, even if it fails.
func NewClient(ctx context.Context, conn net.Conn, msize uint32) (*Client, error) {
	if msize == 0 {
		msize = MaxMsize
	}
	c := &Client{conn: conn, msize: msize, sending: make(chan struct{}, 1), calls: map[Tag]*call{}, locking: map[FID]chan struct{}{}, locked: map[FID]bool{},
		tagFreed: make(chan struct{}, 1), done: make(chan struct{}), deaf: make(chan struct{})}
	stop := context.AfterFunc(ctx, func() { conn.Close() })
	err := c.version()
	if !stop() {
		err = context.Cause(ctx)
	}
	if err != nil {
		conn.Close()
		return nil, fmt.Errorf("p9: open a session: %w", err)
	}
	c.running.Go(c.read)
	return c, nil
}

// version agrees on the session, before anything else is in flight.
func (c *Client) version() error {
	b, err := Append(nil, NoTag, &Mversion{Kind: TVersion, Msize: c.msize, Version: Version}, c.msize)
	if err != nil {
		return err
	}
	if _, err := c.conn.Write(b); err != nil {
		return err
	}
	frame, err := readFrame(c.conn, MinMsize, func(n int) []byte { return make([]byte, n) })
	if err != nil {
		return err
	}
	_, m, err := Decode(frame)
	if err != nil {
		return err
	}
	switch r := m.(type) {
	case *Rlerror:
		return syscall.Errno(r.Errno)
	case *Mversion:
		if r.Version != Version || r.Msize > c.msize || r.Msize < MinMsize {
			return fmt.Errorf("the server speaks %q with frames of %d bytes, want %q and %d to %d", r.Version, r.Msize, Version, MinMsize, c.msize)
		}
		c.msize = r.Msize
		return nil
	}
	return fmt.Errorf("%w: %T instead of Rversion", ErrMalformed, m)
}

// Close ends the session, and with it all files. Requests in flight fail with ErrClosed.
func (c *Client) Close() error {
	c.fail(ErrClosed)
	c.running.Wait()
	return nil
}

// Done is closed when the connection has ended; then Err tells why.
func (c *Client) Done() <-chan struct{} { return c.done }

// Err returns why the connection is of no use any more, or nil.
func (c *Client) Err() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.err
}

func (c *Client) fail(err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.err == nil {
		c.err = err
		close(c.done)
		c.conn.Close()
	}
}

// read hands out the answers until the connection ends.
func (c *Client) read() {
	defer close(c.deaf)
	r := bufio.NewReaderSize(c.conn, readAhead)
	buf := make([]byte, MinMsize)
	for {
		frame, err := readFrame(r, c.msize, func(n int) []byte {
			if n > len(buf) {
				buf = make([]byte, c.msize)
			}
			return buf[:n]
		})
		var tag Tag
		var m Message
		if err == nil {
			tag, m, err = Decode(frame)
		}
		if err == nil {
			err = c.deliver(tag, m)
		}
		if err != nil {
			if err == io.EOF {
				err = errors.New("the server closed the connection")
			}
			c.fail(fmt.Errorf("p9: %w", err))
			return
		}
	}
}

// deliver ends the call that m answers.
func (c *Client) deliver(tag Tag, m Message) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	x := c.calls[tag]
	if x == nil || x.reply != nil {
		return fmt.Errorf("%w: %T for tag %d, which is not in flight", ErrMalformed, m, tag)
	}
	if r, ok := m.(*Rread); ok { // the frame is used again
		if x.given != nil {
			r.Data = nil
		} else if x.data != nil {
			if len(r.Data) > len(x.data) {
				return fmt.Errorf("%w: %d bytes, more than the %d asked for", ErrMalformed, len(r.Data), len(x.data))
			}
			r.Data = x.data[:copy(x.data, r.Data)]
		} else {
			r.Data = append([]byte(nil), r.Data...)
		}
	}
	if !x.flushed { // else the Tflush still means it by its tag
		c.freeTag(tag)
	}
	x.reply = m
	close(x.done)
	if x.given != nil {
		c.running.Go(func() { c.settle(x.given, m) })
	}
	if f := x.flushes; f != nil && c.calls[x.old] == f {
		c.freeTag(x.old)
		if f.reply == nil { // nor will there be one
			c.running.Go(func() { c.settle(f.given, nil) })
		}
	}
	return nil
}

// freeTag gives a tag back that the server does not know, or no longer. Preconditions: mu is held.
func (c *Client) freeTag(t Tag) {
	delete(c.calls, t)
	c.freeTags = append(c.freeTags, t)
	c.tellFree()
}

func (c *Client) tagsLeft() bool { return len(c.freeTags) > 0 || c.nextTag != NoTag }

// tellFree tells one of those who wait for a tag. Preconditions: mu is held.
func (c *Client) tellFree() {
	select {
	case c.tagFreed <- struct{}{}:
	default:
	}
}

// errAnswered says that there is nothing to take back any more.
var errAnswered = errors.New("p9: it was answered")

// start puts a call in flight. It waits for a tag if all are in use.
func (c *Client) start(ctx context.Context, x *call) (Tag, error) {
	for {
		c.mu.Lock()
		switch {
		case c.err != nil:
			defer c.mu.Unlock()
			return 0, c.err
		case x.flushes != nil && x.flushes.reply != nil:
			c.tellFree() // the token may have been for another
			c.mu.Unlock()
			return 0, errAnswered
		case c.tagsLeft():
			defer c.mu.Unlock()
			tag := c.nextTag
			if n := len(c.freeTags); n > 0 {
				tag, c.freeTags = c.freeTags[n-1], c.freeTags[:n-1]
			} else {
				c.nextTag++
			}
			c.calls[tag] = x
			if x.flushes != nil {
				x.flushes.flushed = true
			}
			if c.tagsLeft() {
				c.tellFree()
			}
			return tag, nil
		}
		c.mu.Unlock()
		select {
		case <-c.tagFreed:
		case <-c.done:
		case <-ctx.Done():
			return 0, givenUp{context.Cause(ctx)}
		}
	}
}

// frame is a message with its tag.
type frame struct {
	tag Tag
	m   Message
}

// send sends requests, in one piece. When ctx ends before any of it is sent, nothing is; else what is left of it is sent
// though nobody waits for that: a frame is sent whole, or the connection is of no use.
func (c *Client) send(ctx context.Context, frames ...frame) error {
	select {
	case c.sending <- struct{}{}:
	case <-c.done: // which wait finds
		return nil
	case <-ctx.Done():
		return givenUp{context.Cause(ctx)}
	}
	b := c.sendBuf[:0]
	for _, f := range frames {
		var err error
		if b, err = Append(b, f.tag, f.m, c.msize); err != nil {
			<-c.sending
			return syscall.ENAMETOOLONG // only a name or a target makes a request too large
		}
	}
	c.sendBuf = b[:0]
	ended := make(chan struct{})
	stop := context.AfterFunc(ctx, func() {
		c.conn.SetWriteDeadline(time.Unix(1, 0)) //nolint:errcheck // without it, the connection's end ends the writing
		close(ended)
	})
	n, err := c.conn.Write(b)
	if !stop() {
		<-ended
		c.conn.SetWriteDeadline(time.Time{}) //nolint:errcheck // as above
	}
	if !errors.Is(err, os.ErrDeadlineExceeded) {
		c.sent(err)
		return nil
	}
	if n == 0 {
		<-c.sending
		return givenUp{context.Cause(ctx)}
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.err == nil { // there is who reads: see running
		c.running.Go(func() {
			_, err := c.conn.Write(b[n:])
			c.sent(err)
		})
	}
	return nil
}

// sent ends the sending of a frame.
func (c *Client) sent(err error) {
	<-c.sending
	if err != nil {
		c.fail(fmt.Errorf("p9: %w", err))
	}
}

// do is exchange, unless ctx has ended.
func do[R Message](ctx context.Context, c *Client, m Message, data []byte) (r R, err error) {
	if ctx.Err() != nil {
		c.settle(m, nil)
		return r, givenUp{context.Cause(ctx)}
	}
	return exchange[R](ctx, c, m, data)
}

// exchange sends a request and waits for its answer, of type R.
func exchange[R Message](ctx context.Context, c *Client, m Message, data []byte) (r R, err error) {
	x := &call{data: data, done: make(chan struct{})}
	tag, err := c.start(ctx, x)
	if err == nil {
		err = c.sendStarted(ctx, frame{tag, m})
	} else {
		c.unsentFor(err, m)
	}
	if err != nil {
		return r, err
	}
	return receive[R](ctx, c, frame{tag, m}, x)
}

// exchange2 sends two requests at once, of which the second may fail because the first does.
func exchange2[A, B Message](ctx context.Context, c *Client, m1, m2 Message) (a A, err1 error, b B, err2 error) {
	if ctx.Err() != nil {
		c.settle(m1, nil)
		err1 = givenUp{context.Cause(ctx)}
		return a, err1, b, err1
	}
	x1, x2 := &call{done: make(chan struct{})}, &call{done: make(chan struct{})}
	t1, err1 := c.start(ctx, x1)
	if err1 != nil {
		c.unsentFor(err1, m1)
		return a, err1, b, err1
	}
	t2, err1 := c.start(ctx, x2)
	if err1 != nil {
		c.mu.Lock()
		c.freeTag(t1)
		c.mu.Unlock()
		c.unsentFor(err1, m1)
		return a, err1, b, err1
	}
	if err1 = c.sendStarted(ctx, frame{t1, m1}, frame{t2, m2}); err1 != nil {
		return a, err1, b, err1
	}
	a, err1 = receive[A](ctx, c, frame{t1, m1}, x1)
	b, err2 = receive[B](ctx, c, frame{t2, m2}, x2)
	return a, err1, b, err2
}

// sendStarted sends requests whose tags are theirs, and frees these if it fails.
func (c *Client) sendStarted(ctx context.Context, frames ...frame) error {
	err := c.send(ctx, frames...)
	if err != nil {
		for _, f := range frames {
			c.mu.Lock()
			c.freeTag(f.tag)
			c.mu.Unlock()
			c.unsentFor(err, f.m)
		}
	}
	return err
}

// unsentFor is unsent, if err says that it was given up.
func (c *Client) unsentFor(err error, m Message) {
	if _, ok := err.(givenUp); ok {
		c.unsent(m)
	}
}

// receive waits for the answer of a request, of type R.
func receive[R Message](ctx context.Context, c *Client, f frame, x *call) (r R, err error) {
	reply, err := c.wait(ctx, f.tag, x, f.m)
	if err != nil {
		return r, err
	}
	if e, ok := reply.(*Rlerror); ok {
		return r, syscall.Errno(e.Errno)
	}
	r, ok := reply.(R)
	if !ok || reply.Type() != f.m.Type()+1 {
		err := fmt.Errorf("p9: %w: %T answers %T", ErrMalformed, reply, f.m)
		c.fail(err)
		return r, err
	}
	return r, nil
}

// wait waits for the answer, or for the end of ctx: then it takes the request back.
func (c *Client) wait(ctx context.Context, tag Tag, x *call, m Message) (Message, error) {
	select {
	case <-x.done:
		return x.reply, nil
	case <-c.done:
	case <-ctx.Done():
		return c.takeBack(ctx, tag, x, m)
	}
	<-c.deaf // nobody writes to data any more
	select {
	case <-x.done:
		return x.reply, nil
	default:
	}
	return nil, c.Err()
}

// takeBack gives a request up that the server has not answered. Nothing is written to its data any more; its tag is
// used again when the server has answered the Tflush. What ends a fid is not taken back: only the answer is given up.
func (c *Client) takeBack(ctx context.Context, tag Tag, x *call, m Message) (Message, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	select {
	case <-x.done: // answered at the last moment
		return x.reply, nil
	default:
	}
	x.data, x.given = nil, m
	if !endsFID(m) && c.err == nil {
		c.running.Go(func() { // the server may not even read
			if t, err := c.start(context.Background(), &call{done: make(chan struct{}), flushes: x, old: tag}); err == nil {
				c.send(context.Background(), frame{t, &Tflush{Old: tag}}) //nolint:errcheck // it is small; the connection's end ends all
			}
		})
	}
	return nil, givenUp{context.Cause(ctx)}
}

// unsent sees to a request that was given up before it was sent.
func (c *Client) unsent(m Message) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.err != nil {
		return
	}
	c.running.Go(func() {
		if endsFID(m) { // nobody else would end it
			exchange[*Rok](context.Background(), c, m, nil) //nolint:errcheck // nobody is there to be told
		}
		c.settle(m, nil)
	})
}

// settle undoes what the server has done of a request that was given up, as its answer says; nil says that it has done nothing.
func (c *Client) settle(m, reply Message) {
	_, refused := reply.(*Rlerror)
	switch t := m.(type) {
	case *Tfid:
		if endsFID(t) {
			c.freeFID(t.FID)
		}
	case *Tattach:
		c.endFID(t.FID, reply != nil && !refused)
	case *Twalk:
		r, ok := reply.(*Rwalk)
		c.endFID(t.NewFID, ok && len(r.QIDs) == len(t.Names))
	case *Txattrwalk:
		c.endFID(t.NewFID, reply != nil && !refused)
	case *Tlock:
		// A lock that was held before would go with it: then it stays until the next is asked for, or the file closed.
		if r, ok := reply.(*Rlock); ok && r.Status == LockSuccess && t.Lock.Type != LockUnlock && !c.isLocked(t.FID) {
			undo := *t
			undo.Lock.Type = LockUnlock
			exchange[*Rlock](context.Background(), c, &undo, nil) //nolint:errcheck // of a file that is closed there is none
		}
		c.settleLock(t.FID)
	}
}

// endFID ends a fid that nobody has, which the server knows or does not.
func (c *Client) endFID(f FID, known bool) {
	if !known {
		c.freeFID(f)
		return
	}
	(&File{c: c, fid: f}).Close(context.Background()) //nolint:errcheck // it was not opened
}

// beginLock waits until what was asked for before of the locks of a fid is settled: what undoes one that came late
// must not undo the next.
func (c *Client) beginLock(ctx context.Context, f FID) error {
	for {
		c.mu.Lock()
		before := c.locking[f]
		if before == nil {
			c.locking[f] = make(chan struct{})
			c.mu.Unlock()
			return nil
		}
		c.mu.Unlock()
		select {
		case <-before:
		case <-c.done:
			return c.Err()
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
}

// setLocked notes what the server has answered of a lock.
func (c *Client) setLocked(f FID, l Lock) {
	c.mu.Lock()
	defer c.mu.Unlock()
	switch {
	case l.Type != LockUnlock:
		c.locked[f] = true
	case l.Start == 0 && l.Length == 0:
		delete(c.locked, f)
	}
}

func (c *Client) isLocked(f FID) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.locked[f]
}

func (c *Client) settleLock(f FID) {
	c.mu.Lock()
	defer c.mu.Unlock()
	close(c.locking[f])
	delete(c.locking, f)
}

// restingFIDs is how many fids are free before the one that has been for longest is used
// again: diod answers Tclunk before it lets go of the fid, and dies of a new one of that number.
const restingFIDs = 64

func (c *Client) newFID() (FID, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if len(c.freeFIDs) > restingFIDs {
		f := c.freeFIDs[0]
		c.freeFIDs = c.freeFIDs[1:]
		return f, nil
	}
	if c.nextFID == NoFID {
		return 0, syscall.EMFILE
	}
	c.nextFID++
	return c.nextFID - 1, nil
}

// freeFID gives a fid back that the server does not know, or no longer. One whose lock may still be undone stays
// what it was.
func (c *Client) freeFID(f FID) {
	c.mu.Lock()
	defer c.mu.Unlock()
	delete(c.locked, f)
	if c.locking[f] != nil {
		return
	}
	c.freeFIDs = append(c.freeFIDs, f)
}

// Attach returns the root of the tree aname.
func (c *Client) Attach(ctx context.Context, uname, aname string, uid uint32) (*File, error) {
	f, err := c.newFID()
	if err != nil {
		return nil, err
	}
	r, err := do[*Rqid](ctx, c, &Tattach{FID: f, AFID: NoFID, Uname: uname, Aname: aname, UID: uid}, nil)
	return c.file(f, r, err)
}

// file makes a File of a new fid. One whose request was taken back may be known to the server or not: see settle.
func (c *Client) file(f FID, r *Rqid, err error) (*File, error) {
	if err != nil {
		if answered(err) {
			c.freeFID(f)
		}
		return nil, err
	}
	return &File{c: c, fid: f, qid: r.QID}, nil
}
