package p9

import (
	"context"
	"errors"
	"fmt"
	"io"
	"sync"
	"syscall"
)

// Client is the client's end of a connection. Its methods and those of its Files may
// be called from many goroutines at once: their requests are in flight together.
//
// An error of the server is its syscall.Errno. When ctx ends, a method takes its
// request back and returns ctx's error: whether the request was carried out is then not known.
type Client struct {
	conn  io.ReadWriteCloser
	msize uint32 // immutable

	sendMu  sync.Mutex // serialises frames
	sendBuf []byte     // guarded by sendMu

	mu       sync.Mutex
	err      error          // why the connection is of no use any more; guarded by mu
	calls    map[Tag]*call  // guarded by mu
	nextTag  Tag            // guarded by mu
	nextFID  FID            // guarded by mu
	freeFIDs []FID          // guarded by mu
	tagFreed chan struct{}  // holds a token when a tag was freed
	done     chan struct{}  // closed when err is set
	running  sync.WaitGroup // the goroutine that reads, and those that take requests back
}

// call is a request in flight.
type call struct {
	reply   Message       // guarded by Client.mu until done
	data    []byte        // where an Rread's data goes; guarded by Client.mu until done
	done    chan struct{} // closed when reply is there
	flushed bool          // it is taken back; guarded by Client.mu
	flushes *call         // of a Tflush: what it takes back, whose tag is free again with its answer
	old     Tag           // that one's tag
}

// ErrClosed is the error of what is asked of a Client that was closed.
var ErrClosed = errors.New("p9: client is closed")

// NewClient opens a session on conn with frames of at most msize bytes (0 means
// MaxMsize). The Client owns conn, even if it fails.
func NewClient(ctx context.Context, conn io.ReadWriteCloser, msize uint32) (*Client, error) {
	if msize == 0 {
		msize = MaxMsize
	}
	c := &Client{conn: conn, msize: msize, calls: map[Tag]*call{}, tagFreed: make(chan struct{}, 1), done: make(chan struct{})}
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
	buf := make([]byte, MinMsize)
	for {
		frame, err := readFrame(c.conn, c.msize, func(n int) []byte {
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
		if x.flushed {
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
		delete(c.calls, tag)
	}
	if x.flushes != nil && c.calls[x.old] == x.flushes {
		delete(c.calls, x.old)
	}
	x.reply = m
	close(x.done)
	select {
	case c.tagFreed <- struct{}{}:
	default:
	}
	return nil
}

// start puts a call in flight. It waits for a tag if all are in use.
func (c *Client) start(ctx context.Context, x *call) (Tag, error) {
	for {
		c.mu.Lock()
		if c.err != nil {
			defer c.mu.Unlock()
			return 0, c.err
		}
		if len(c.calls) < int(NoTag) {
			for c.nextTag == NoTag || c.calls[c.nextTag] != nil {
				c.nextTag++
			}
			tag := c.nextTag
			c.nextTag++
			c.calls[tag] = x
			c.mu.Unlock()
			return tag, nil
		}
		c.mu.Unlock()
		select {
		case <-c.tagFreed:
		case <-c.done:
		case <-ctx.Done():
			return 0, ctx.Err()
		}
	}
}

func (c *Client) send(tag Tag, m Message) error {
	c.sendMu.Lock()
	defer c.sendMu.Unlock()
	b, err := Append(c.sendBuf[:0], tag, m, c.msize)
	c.sendBuf = b[:0]
	if err != nil { // nothing was sent
		return err
	}
	if _, err := c.conn.Write(b); err != nil {
		c.fail(fmt.Errorf("p9: %w", err))
	}
	return nil
}

// do is exchange, unless ctx has ended.
func do[R Message](ctx context.Context, c *Client, m Message, data []byte) (r R, err error) {
	if ctx.Err() != nil {
		return r, context.Cause(ctx)
	}
	return exchange[R](ctx, c, m, data)
}

// exchange sends a request and waits for its answer, of type R.
func exchange[R Message](ctx context.Context, c *Client, m Message, data []byte) (r R, err error) {
	x := &call{data: data, done: make(chan struct{})}
	tag, err := c.start(ctx, x)
	if err != nil {
		return r, err
	}
	if err := c.send(tag, m); err != nil {
		c.mu.Lock()
		delete(c.calls, tag)
		c.mu.Unlock()
		return r, syscall.ENAMETOOLONG // only a name or a target makes a request too large
	}
	reply, err := c.wait(ctx, tag, x, m)
	if err != nil {
		return r, err
	}
	if e, ok := reply.(*Rlerror); ok {
		return r, syscall.Errno(e.Errno)
	}
	r, ok := reply.(R)
	if !ok || reply.Type() != m.Type()+1 {
		err := fmt.Errorf("p9: %w: %T answers %T", ErrMalformed, reply, m)
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
	c.running.Wait() // nobody writes to data any more
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
	x.data = nil
	if t := m.Type(); t != TClunk && t != TRemove && c.err == nil {
		x.flushed = true
		c.running.Go(func() { // the server may not even read
			if t, err := c.start(context.Background(), &call{done: make(chan struct{}), flushes: x, old: tag}); err == nil {
				c.send(t, &Tflush{Old: tag}) //nolint:errcheck // it is small; the connection's end ends all
			}
		})
	}
	return nil, context.Cause(ctx)
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

// freeFID gives a fid back that the server does not know, or no longer.
func (c *Client) freeFID(f FID) {
	c.mu.Lock()
	defer c.mu.Unlock()
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

// file makes a File of a new fid. A fid whose request was taken back may be known to the
// server or not: it is not used again.
func (c *Client) file(f FID, r *Rqid, err error) (*File, error) {
	var errno syscall.Errno
	if errors.As(err, &errno) {
		c.freeFID(f)
	}
	if err != nil {
		return nil, err
	}
	return &File{c: c, fid: f, qid: r.QID}, nil
}
