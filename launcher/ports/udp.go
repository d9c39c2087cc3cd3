package ports

import (
	"context"
	"errors"
	"net"
	"net/netip"
	"sync"
	"time"

	"github.com/wsl2/wsl2/internal/forward"
	"github.com/wsl2/wsl2/launcher/internal/guestconn"
)

const (
	// flowTimeout is how long a peer of which nothing is heard is remembered; RFC 4787 asks
	// of NATs for two minutes at least.
	flowTimeout = 2 * time.Minute
	// maxFlows of one port; further peers' datagrams are dropped.
	maxFlows = 1024
	// flowQueue are the datagrams that wait for the guest; more are dropped, as UDP does.
	flowQueue = 64
	// maxQueued bounds the bytes of all that wait: the largest datagrams of all flows would be gigabytes.
	maxQueued = 16 << 20
)

// udpListener is a UDP port of the host. Each peer is a flow: a connection to the guest, which
// has a socket of its own for it, so that answers find their way.
type udpListener struct {
	f    *Forwarder
	c    *net.UDPConn
	spec Forward
	v6   bool
	rule Rule

	mu    sync.Mutex
	flows map[netip.AddrPort]*flow // guarded by mu
}

type flow struct {
	l     *udpListener
	peer  netip.AddrPort
	queue chan []byte
	ctx   context.Context // ends when it is over
	end   context.CancelFunc
	timer *time.Timer // ends it
}

// serve ends with the socket, and ends the flows with it.
func (u *udpListener) serve() {
	buf := make([]byte, forward.MaxDatagram)
	for {
		n, peer, err := u.c.ReadFromUDPAddrPort(buf)
		if errors.Is(err, net.ErrClosed) {
			break
		}
		if err != nil || !u.f.may(peer.Addr(), u.rule) {
			continue
		}
		u.mu.Lock()
		if f := u.flowLocked(peer); f != nil {
			f.pushLocked(buf[:n])
		}
		u.mu.Unlock()
	}
	u.mu.Lock()
	defer u.mu.Unlock()
	for _, f := range u.flows {
		f.end()
	}
}

// flowLocked returns the peer's, nil if there are too many.
func (u *udpListener) flowLocked(peer netip.AddrPort) *flow {
	if f := u.flows[peer]; f != nil {
		f.timer.Reset(flowTimeout)
		return f
	}
	if len(u.flows) >= maxFlows {
		return nil
	}
	f := &flow{l: u, peer: peer, queue: make(chan []byte, flowQueue)}
	f.ctx, f.end = context.WithCancel(context.Background())
	f.timer = time.AfterFunc(flowTimeout, f.end)
	u.flows[peer] = f
	u.f.wg.Go(f.run)
	return f
}

// pushLocked queues a copy of a datagram for the guest, if there is room.
func (f *flow) pushLocked(d []byte) {
	queued := &f.l.f.queued
	if queued.Add(int64(len(d))) > maxQueued {
		queued.Add(-int64(len(d)))
		return
	}
	select {
	case f.queue <- append([]byte(nil), d...):
	default:
		queued.Add(-int64(len(d)))
	}
}

// forget takes the flow, and what is queued, out of the listener's hands.
func (f *flow) forget() {
	f.timer.Stop()
	f.end()
	f.l.mu.Lock()
	defer f.l.mu.Unlock()
	delete(f.l.flows, f.peer)
	for {
		select {
		case d := <-f.queue:
			f.l.f.queued.Add(-int64(len(d)))
		default:
			return
		}
	}
}

// Close is how the Forwarder ends it.
func (f *flow) Close() error {
	f.end()
	return nil
}

func (f *flow) run() {
	defer f.forget()
	if !f.l.f.enter(f) {
		return
	}
	defer f.l.f.leave(f)
	g, err := f.l.f.connect(f.l.spec, f.l.v6)
	if err != nil {
		return
	}
	// Also of a guest that takes no datagrams: whoever writes to it waits.
	stop := context.AfterFunc(f.ctx, func() { g.Close() })
	defer stop()
	answers := make(chan struct{})
	go func() {
		defer close(answers)
		f.answers(g)
		f.end()
	}()
	f.send(g)
	f.end()
	<-answers
}

// send passes the peer's datagrams to the guest, until either ends.
func (f *flow) send(g *guestconn.Conn) {
	var frame []byte
	for {
		select {
		case d := <-f.queue:
			f.l.f.queued.Add(-int64(len(d)))
			if need := len(d) + forward.Overhead; cap(frame) < need {
				frame = make([]byte, need)
			}
			if forward.WriteDatagram(g.UnixConn, frame[:cap(frame)], d) != nil {
				return
			}
		case <-f.ctx.Done():
			return
		}
	}
}

// answers passes the guest's datagrams to the peer, until the connection ends.
func (f *flow) answers(g *guestconn.Conn) {
	var d []byte
	for {
		var err error
		if d, err = forward.ReadDatagram(g, d[:0]); err != nil {
			return
		}
		f.timer.Reset(flowTimeout)
		f.l.c.WriteToUDPAddrPort(d, f.peer) //nolint:errcheck // UDP promises nothing
	}
}
