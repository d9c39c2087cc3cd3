package service

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"sync"
	"time"

	"github.com/wsl2/wsl2/internal/wire"
	"github.com/wsl2/wsl2/launcher/netproc"
)

// errControlLost says that the control channel to the guest's PID 1 is gone.
var errControlLost = errors.New("the connection to the guest is lost")

// control is the launcher's end of the control channel (wire, PROTOCOL.md).
type control struct {
	conn  net.Conn
	ready wire.Ready
	req   BootRequest // its events

	// first goes before the first request, in one write with it: PID 1 wakes up once. Set
	// before that request, then guarded by writeMu.
	first   wire.Message
	writeMu sync.Mutex // serialises frames

	mu      sync.Mutex
	nextID  uint32               // guarded by mu
	pending map[uint32]*exchange // guarded by mu
	lost    chan struct{}        // closed by the reader when the channel ends
	cause   error                // why, set before lost is closed
}

// exchange is a request that waits for its Reply.
type exchange struct {
	reply chan *wire.Reply  // capacity 1
	ready func(port uint32) // guarded by control.mu
}

// listenControl listens where the guest's connection to PortControl arrives. A
// socket left over from an earlier VM is replaced: the VM lock is held.
func listenControl(vsockPath string) (*net.UnixListener, error) {
	path := fmt.Sprintf("%s_%d", vsockPath, wire.PortControl)
	os.Remove(path)
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		return nil, err
	}
	if err := os.Chmod(path, 0o600); err != nil {
		l.Close()
		return nil, err
	}
	return l, nil
}

// acceptControl waits for the guest's connection and its Ready. abort ends the
// wait early with aborted's error.
func acceptControl(ctx context.Context, l *net.UnixListener, req BootRequest, abort <-chan struct{}, aborted func() error) (*control, error) {
	conn, r, ready, err := awaitReady(ctx, l, abort)
	if err != nil {
		select {
		case <-abort:
			return nil, aborted()
		default:
		}
		if ctx.Err() != nil {
			err = context.Cause(ctx)
		}
		return nil, err
	}
	conn.SetReadDeadline(time.Time{})
	c := &control{conn: conn, ready: ready, req: req, pending: map[uint32]*exchange{}, lost: make(chan struct{})}
	go c.read(r)
	return c, nil
}

// awaitReady accepts the connection and reads its first message. When it
// returns nothing touches the connection's deadline any more.
func awaitReady(ctx context.Context, l *net.UnixListener, abort <-chan struct{}) (net.Conn, *bufio.Reader, wire.Ready, error) {
	var mu sync.Mutex
	var conn net.Conn // guarded by mu while the goroutine lives
	woken := false    // guarded by mu
	done, exited := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(exited)
		select {
		case <-done:
			return
		case <-ctx.Done():
		case <-abort:
		}
		// A deadline in the past wakes Accept and Read.
		l.SetDeadline(time.Unix(1, 0))
		mu.Lock()
		defer mu.Unlock()
		woken = true
		if conn != nil {
			conn.SetReadDeadline(time.Unix(1, 0))
		}
	}()
	defer func() {
		close(done)
		<-exited
	}()
	c, err := l.Accept()
	if err != nil {
		return nil, nil, wire.Ready{}, err
	}
	mu.Lock()
	conn = c
	if woken {
		c.SetReadDeadline(time.Unix(1, 0))
	}
	mu.Unlock()
	r := bufio.NewReader(c)
	m, err := wire.Read(r)
	if err != nil {
		c.Close()
		return nil, nil, wire.Ready{}, fmt.Errorf("the guest's first message: %w", err)
	}
	ready, ok := m.(*wire.Ready)
	if !ok {
		c.Close()
		return nil, nil, wire.Ready{}, fmt.Errorf("the guest's first message is %v, not Ready; the initramfs does not belong to this wsl2", m.Type())
	}
	return c, r, *ready, nil
}

// read handles what the guest says until the channel ends. It is the only
// caller of the events.
func (c *control) read(r *bufio.Reader) {
	for {
		m, err := wire.Read(r)
		if err == nil {
			err = c.handle(m)
		}
		if err != nil {
			c.mu.Lock()
			c.cause = fmt.Errorf("%w (%w)", errControlLost, err)
			c.mu.Unlock()
			close(c.lost)
			c.conn.Close()
			return
		}
	}
}

func (c *control) handle(m wire.Message) error {
	switch m := m.(type) {
	case *wire.Reply:
		c.mu.Lock()
		x := c.pending[m.ID]
		delete(c.pending, m.ID)
		c.mu.Unlock()
		if x != nil { // else its caller has given up
			x.reply <- m
		}
	case *wire.ImportReady:
		c.mu.Lock()
		var ready func(port uint32)
		if x := c.pending[m.ID]; x != nil {
			ready, x.ready = x.ready, nil // whatever the guest says, once
		}
		c.mu.Unlock()
		if ready != nil {
			ready(m.Port)
		}
	case *wire.DistroExited:
		c.req.DistroExited(m.Name, m.Text)
	case *wire.DistroIdle:
		c.req.DistroIdle(m.Name)
	case *wire.HostExec:
		c.req.HostExec(m.Distro, m.Session)
	case *wire.MountShare:
		c.req.MountShare(m)
	case *wire.PortsOpen:
		c.req.PortsOpen(m.Ports)
	default:
		return fmt.Errorf("unexpected %v", m.Type())
	}
	return nil
}

// request sends the message that build makes for a fresh ID and waits for its Reply.
func (c *control) request(ctx context.Context, ready func(port uint32), build func(id uint32) wire.Message) (*wire.Reply, error) {
	x := &exchange{reply: make(chan *wire.Reply, 1), ready: ready}
	c.mu.Lock()
	c.nextID++
	id := c.nextID
	c.pending[id] = x
	c.mu.Unlock()
	defer func() {
		c.mu.Lock()
		delete(c.pending, id)
		c.mu.Unlock()
	}()
	if err := c.send(build(id)); err != nil {
		return nil, err
	}
	select {
	case r := <-x.reply:
		if r.Code != wire.CodeOK {
			return nil, &GuestError{Code: r.Code, Text: r.Text}
		}
		return r, nil
	case <-c.lost:
		select {
		case r := <-x.reply: // it came just before the end
			if r.Code != wire.CodeOK {
				return nil, &GuestError{Code: r.Code, Text: r.Text}
			}
			return r, nil
		default:
		}
		return nil, c.cause
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	}
}

// sendTimeout is what PID 1 gets to take a message. One that does not read is as
// good as gone, and must not hold up who would end its VM.
const sendTimeout = 10 * time.Second

func (c *control) send(m wire.Message) error {
	c.writeMu.Lock()
	defer c.writeMu.Unlock()
	b := make([]byte, 0, 256)
	var err error
	if c.first != nil {
		b, err = wire.Append(b, c.first)
	}
	if err == nil {
		b, err = wire.Append(b, m)
	}
	if err != nil {
		return err // nothing has gone
	}
	c.first = nil
	if _, err = wire.Within(c.conn, sendTimeout).Write(b); err != nil {
		c.conn.Close() // part of a frame may have gone: read ends, and the guard looks after the VM
		return fmt.Errorf("%w (%w)", errControlLost, err)
	}
	return nil
}

func (c *control) StartDistro(ctx context.Context, r wire.StartDistro) (uint32, string, error) {
	reply, err := c.request(ctx, nil, func(id uint32) wire.Message { r.ID = id; return &r })
	if err != nil {
		return 0, "", err
	}
	return reply.Port, reply.Text, nil
}

func (c *control) StopDistro(ctx context.Context, r wire.StopDistro) error {
	_, err := c.request(ctx, nil, func(id uint32) wire.Message { r.ID = id; return &r })
	return err
}

func (c *control) Import(ctx context.Context, r wire.Import, ready func(port uint32)) (string, error) {
	return textOf(c.request(ctx, ready, func(id uint32) wire.Message { r.ID = id; return &r }))
}

func (c *control) Export(ctx context.Context, r wire.Export, ready func(port uint32)) error {
	_, err := c.request(ctx, ready, func(id uint32) wire.Message { r.ID = id; return &r })
	return err
}

func (c *control) Maintain(ctx context.Context, r wire.Maintain, ready func(port uint32)) (string, error) {
	return textOf(c.request(ctx, ready, func(id uint32) wire.Message { r.ID = id; return &r }))
}

func (c *control) MountDisk(ctx context.Context, r wire.MountDisk) (string, error) {
	return textOf(c.request(ctx, nil, func(id uint32) wire.Message { r.ID = id; return &r }))
}

func (c *control) ReleaseDisk(ctx context.Context, slot int) error {
	_, err := c.request(ctx, nil, func(id uint32) wire.Message { return &wire.ReleaseDisk{ID: id, Slot: int32(slot)} })
	return err
}

func (c *control) swapOn(ctx context.Context, slot int) error {
	_, err := c.request(ctx, nil, func(id uint32) wire.Message { return &wire.SwapOn{ID: id, Slot: int32(slot)} })
	return err
}

// registerDevice has the guest's kernel find a device that it was not told of at boot.
func (c *control) registerDevice(ctx context.Context, device string) error {
	_, err := c.request(ctx, nil, func(id uint32) wire.Message { return &wire.RegisterDevice{ID: id, Device: device} })
	return err
}

func textOf(r *wire.Reply, err error) (string, error) {
	if err != nil {
		return "", err
	}
	return r.Text, nil
}

// WatchPorts is answered by PortsOpen, from then on.
func (c *control) WatchPorts() error { return c.send(&wire.WatchPorts{}) }

// Shutdown has no Reply but the VM's end.
func (c *control) Shutdown(grace time.Duration) error {
	return c.send(&wire.Shutdown{GraceMillis: uint32(grace.Milliseconds())})
}

// network tells the guest the addresses of its card.
func network() *wire.Network {
	return &wire.Network{
		Guest4: netproc.Guest4 + netproc.Bits4, Gateway4: netproc.Gateway4,
		Guest6: netproc.Guest6 + netproc.Bits6, Gateway6: netproc.Gateway6,
	}
}
