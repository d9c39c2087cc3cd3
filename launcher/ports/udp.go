package ports

import (
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
	done  chan struct{} // closed when it is over
	timer *time.Timer   // ends it
	stop  sync.Once
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
		if f := u.flow(peer); f != nil {
			select {
			case f.queue <- append([]byte(nil), buf[:n]...):
			default:
			}
		}
	}
	u.mu.Lock()
	defer u.mu.Unlock()
	for _, f := range u.flows {
		f.end()
	}
}

// flow returns the peer's, nil if there are too many.
func (u *udpListener) flow(peer netip.AddrPort) *flow {
	u.mu.Lock()
	defer u.mu.Unlock()
	if f := u.flows[peer]; f != nil {
		f.timer.Reset(flowTimeout)
		return f
	}
	if len(u.flows) >= maxFlows {
		return nil
	}
	f := &flow{l: u, peer: peer, queue: make(chan []byte, flowQueue), done: make(chan struct{})}
	f.timer = time.AfterFunc(flowTimeout, f.end)
	u.flows[peer] = f
	u.f.wg.Go(f.run)
	return f
}

func (f *flow) end() { f.stop.Do(func() { close(f.done) }) }

// Close is how the Forwarder ends it.
func (f *flow) Close() error {
	f.end()
	return nil
}

func (f *flow) run() {
	defer func() {
		f.timer.Stop()
		f.l.mu.Lock()
		delete(f.l.flows, f.peer)
		f.l.mu.Unlock()
	}()
	if !f.l.f.enter(f) {
		return
	}
	defer f.l.f.leave(f)
	g, err := f.l.f.connect(f.l.spec, f.l.v6)
	if err != nil {
		return
	}
	answers := make(chan struct{})
	go func() {
		defer close(answers)
		f.answers(g)
		f.end()
	}()
	frame := make([]byte, 0)
	for sending := true; sending; {
		select {
		case d := <-f.queue:
			if need := len(d) + forward.Overhead; cap(frame) < need {
				frame = make([]byte, need)
			}
			if forward.WriteDatagram(g.UnixConn, frame[:cap(frame)], d) != nil {
				sending = false
			}
		case <-f.done:
			sending = false
		}
	}
	g.Close()
	<-answers
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
