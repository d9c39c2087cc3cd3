package usernet

import (
	"context"
	"errors"
	"io"
	"net"
	"net/netip"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/header"
	"gvisor.dev/gvisor/pkg/tcpip/stack"
	"gvisor.dev/gvisor/pkg/tcpip/transport/tcp"
	"gvisor.dev/gvisor/pkg/waiter"
)

// connectTimeout bounds a connect to a host that is silent. A Linux guest gives up
// after 130 s, and so does the host's kernel.
const connectTimeout = 140 * time.Second

// connectTCP is called by the stack, on a goroutine of its own, for each connection that
// the guest wants.
func (n *Network) connectTCP(r *tcp.ForwarderRequest) {
	id := r.ID()
	if !n.begin() {
		r.Complete(false)
		n.handshakes.done(id)
		return
	}
	defer n.tasks.Done()
	dst := addrPort(id.LocalAddress, id.LocalPort)
	h := n.handshakes.of(id)
	fail := func(reset bool) {
		r.Complete(reset)
		n.handshakes.done(id)
	}
	tell := func(why reason) {
		n.unreachable(n.gateway(dst.Addr()), h.quote, why)
		fail(false)
	}
	to, v := n.decide(dst)
	switch v {
	case silent:
		tell(noHost)
		return
	case prohibit:
		n.refused("TCP", dst)
		tell(prohibited)
		return
	}
	release := take(n.limits.tcp)
	if release == nil {
		n.log.printf("refused: TCP to %v: the guest has %d connections, as many as it may", dst, cap(n.limits.tcp))
		fail(true)
		return
	}
	defer release()
	if v == local {
		if g := n.accept(r); g != nil {
			n.serveDNSStream(g)
		}
		return
	}
	ctx, cancel := context.WithTimeout(h.ctx, connectTimeout)
	defer cancel()
	host, err := dialTCP(ctx, to)
	if err != nil {
		switch why, ok := reasonOf(err); {
		case errors.Is(err, unix.ECONNREFUSED):
			fail(true)
		case ok:
			tell(why)
		default: // silence, for which the guest has waited itself
			fail(false)
		}
		return
	}
	defer host.Close()
	g := n.accept(r)
	if g == nil {
		_ = host.SetLinger(0) // as it has not been wanted
		return
	}
	n.relayTCP(g, host)
}

// dialTCP connects to an address of the host's network; to loopback of either family,
// which a service may have chosen one of.
func dialTCP(ctx context.Context, to netip.AddrPort) (*net.TCPConn, error) {
	var d net.Dialer
	d.SetMultipathTCP(false)
	c, err := d.DialContext(ctx, "tcp", to.String())
	if err != nil && to.Addr().IsLoopback() && errors.Is(err, unix.ECONNREFUSED) {
		other := netip.IPv6Loopback()
		if to.Addr().Is6() {
			other = netip.AddrFrom4([4]byte{127, 0, 0, 1})
		}
		var err2 error
		if c, err2 = d.DialContext(ctx, "tcp", netip.AddrPortFrom(other, to.Port()).String()); err2 == nil {
			err = nil
		}
	}
	if err != nil {
		return nil, err
	}
	return c.(*net.TCPConn), nil
}

// accept answers the guest's SYN; nil if the guest does not go on.
func (n *Network) accept(r *tcp.ForwarderRequest) *guestConn {
	g := &guestConn{link: n.link}
	id := r.ID()
	n.handshakes.reached(id)
	stop := n.giveUp(id)
	ep, err := r.CreateEndpoint(&g.queue)
	stop()
	r.Complete(err != nil)
	n.handshakes.done(id)
	if err != nil {
		return nil
	}
	ep.SocketOptions().SetKeepAlive(true) // a guest that vanished does not hold the host's connection
	ep.SocketOptions().SetDelayOption(false)
	if size := bufferOf(len(n.limits.tcp)); size > 0 {
		ep.SocketOptions().SetReceiveBufferSize(size, true)
		ep.SocketOptions().SetSendBufferSize(size, true)
	}
	g.ep = ep
	return g
}

// giveUp ends a handshake when the guest has not gone on for long enough, until stop is called. It is aborted, under the
// endpoint's lock: whoever is only woken gives up too, but a segment that comes at that moment finds half of it.
func (n *Network) giveUp(id stack.TransportEndpointID) (stop func()) {
	family := header.IPv4ProtocolNumber
	if id.LocalAddress.Len() == header.IPv6AddressSize {
		family = header.IPv6ProtocolNumber
	}
	var mu sync.Mutex
	var timer *time.Timer // guarded by mu
	stopped := false      // guarded by mu: what comes after is the connection's life
	mu.Lock()
	defer mu.Unlock()
	timer = time.AfterFunc(n.cfg.patience, func() {
		mu.Lock()
		defer mu.Unlock()
		if stopped {
			return
		}
		if ep := n.stack.FindTransportEndpoint(family, tcp.ProtocolNumber, id, nic); ep != nil {
			ep.Abort()
		} else { // where much is asked for at once, its turn has not come
			timer.Reset(n.cfg.patience)
		}
	})
	return func() {
		mu.Lock()
		defer mu.Unlock()
		stopped = true
		timer.Stop()
	}
}

// guestConn is the stack's end of a connection.
type guestConn struct {
	link  *link
	ep    tcpip.Endpoint
	queue waiter.Queue
}

// wait calls f until it does not have to wait any more.
func (g *guestConn) wait(ctx context.Context, events waiter.EventMask, f func() tcpip.Error) error {
	err := f()
	if _, again := err.(*tcpip.ErrWouldBlock); !again {
		return endpointError(err)
	}
	entry, ready := waiter.NewChannelEntry(events | waiter.EventErr | waiter.EventHUp)
	g.queue.EventRegister(&entry)
	defer g.queue.EventUnregister(&entry)
	for {
		err := f()
		if _, again := err.(*tcpip.ErrWouldBlock); !again {
			return endpointError(err)
		}
		select {
		case <-ready:
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
}

// errReset: the guest's end was reset, or the stack gave it up.
var errReset = errors.New("connection reset by the guest")

func endpointError(err tcpip.Error) error {
	switch err.(type) {
	case nil:
		return nil
	case *tcpip.ErrClosedForReceive:
		return io.EOF
	}
	return errReset
}

// readSome reads what there is into a buffer of the pool, which the caller puts back;
// while there is nothing, there is no buffer.
func (g *guestConn) readSome(ctx context.Context) (b *[]byte, n int, err error) {
	err = g.wait(ctx, waiter.ReadableEvents, func() tcpip.Error {
		b = chunks.Get().(*[]byte)
		w := tcpip.SliceWriter(*b)
		res, err := g.ep.Read(&w, tcpip.ReadOptions{})
		if err != nil {
			chunks.Put(b)
			b = nil
			return err
		}
		n = res.Count
		g.ep.ModerateRecvBuf(n)
		return nil
	})
	return b, n, err
}

// little is what is sent without a wait for others' frames.
const little = 4 << 10

// write sends all of p. Nobody else sends, nor makes the endpoint's buffer smaller meanwhile: the stack would lose what it has
// read and has no room for.
func (g *guestConn) write(ctx context.Context, p tcpip.Payloader) error {
	for p.Len() > 0 {
		if p.Len() > little || g.link.out.crowded() {
			if err := g.link.room(ctx); err != nil {
				return err
			}
		}
		err := g.wait(ctx, waiter.WritableEvents, func() (err tcpip.Error) {
			_, err = g.ep.Write(p, tcpip.WriteOptions{})
			return err
		})
		if err != nil {
			return err
		}
	}
	return nil
}

// payload is bytes as a tcpip.Payloader.
type payload []byte

func (p *payload) Read(b []byte) (int, error) {
	n := copy(b, *p)
	*p = (*p)[n:]
	return n, nil
}

func (p *payload) Len() int { return len(*p) }

// chunks are buffers for what is being carried.
var chunks = sync.Pool{New: func() any {
	b := make([]byte, 64<<10)
	return &b
}}

// relayTCP carries both directions until both have ended, or one has failed, and then
// tells the other side in the same way: FIN for FIN, RST for RST. A side that has ended is still
// watched: it may be reset while the other one has nothing to say.
func (n *Network) relayTCP(g *guestConn, host *net.TCPConn) {
	ctx, cancel := context.WithCancelCause(n.ctx)
	defer cancel(nil)
	stop := context.AfterFunc(ctx, func() { _ = host.SetDeadline(time.Unix(1, 0)) })
	defer stop()
	defer g.ep.Close()
	over := make(chan struct{})
	var left atomic.Int32
	left.Store(2)
	ended := func() {
		if left.Add(-1) == 0 {
			close(over)
			_ = host.SetReadDeadline(time.Unix(1, 0))
		}
	}
	var up sync.WaitGroup
	up.Go(func() {
		err := fromGuest(ctx, g, host)
		if err == nil {
			ended()
			err = g.watch(ctx, over)
		}
		if err != nil {
			_ = host.SetLinger(0)
			cancel(err)
		}
	})
	err := fromHost(ctx, g, host)
	if err == nil {
		ended()
		err = watchHost(host)
	}
	if err != nil {
		g.ep.Abort()
		cancel(err)
	}
	up.Wait()
	if ctx.Err() != nil {
		g.ep.Abort()
	}
}

// watch waits for a reset of the guest's, until over.
func (g *guestConn) watch(ctx context.Context, over <-chan struct{}) error {
	entry, changed := waiter.NewChannelEntry(waiter.EventErr | waiter.EventHUp)
	g.queue.EventRegister(&entry)
	defer g.queue.EventUnregister(&entry)
	for {
		if g.ep.LastError() != nil {
			return errReset
		}
		select {
		case <-changed:
		case <-over:
			return nil
		case <-ctx.Done():
			return nil // of the other direction
		}
	}
}

// watchHost waits for a reset by the host's peer, until the read deadline.
func watchHost(host *net.TCPConn) error {
	rc, err := host.SyscallConn()
	if err != nil {
		return err
	}
	var failed int
	_ = rc.Read(func(fd uintptr) bool {
		failed, err = unix.GetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_ERROR)
		return err != nil || failed != 0
	})
	if failed != 0 {
		return unix.Errno(failed)
	}
	return err
}

func fromGuest(ctx context.Context, g *guestConn, host *net.TCPConn) error {
	for {
		b, n, err := g.readSome(ctx)
		if err == io.EOF {
			return host.CloseWrite()
		}
		if err != nil {
			return err
		}
		_, err = host.Write((*b)[:n])
		chunks.Put(b)
		if err != nil {
			return err
		}
	}
}

// fromHost gives the guest what the host's socket has, a frame at a time: what is left of a larger piece would be
// a frame of its own.
func fromHost(ctx context.Context, g *guestConn, host *net.TCPConn) error {
	raw, err := host.SyscallConn()
	if err != nil {
		return err
	}
	for {
		n, err := awaitBytes(raw)
		if err != nil {
			return err
		}
		if n == 0 {
			if e := g.ep.Shutdown(tcpip.ShutdownWrite); e != nil {
				return errReset
			}
			return nil
		}
		if err := g.write(ctx, &received{raw: raw, left: n}); err != nil {
			return err
		}
	}
}
