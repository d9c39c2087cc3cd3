package usernet

import (
	"container/list"
	"context"
	"errors"
	"sync"

	"gvisor.dev/gvisor/pkg/tcpip/header"
	"gvisor.dev/gvisor/pkg/tcpip/stack"
)

// handshake is a connection on its way.
type handshake struct {
	ctx   context.Context // ends with the network, or when others need the place
	end   context.CancelCauseFunc
	quote []byte // of the guest's packet, for the error that tells of a failure
	place *list.Element
}

// errCrowded ends a handshake that waits for a silent peer longer than others that want its place.
var errCrowded = errors.New("too many connections on their way")

// handshakes are the connections on their way. A guest that tries many silent
// addresses must not keep the others from connecting: if there are too many, the oldest is
// given up. The guest's own retransmission begins it anew, as with a router that is full.
type handshakes struct {
	mu      sync.Mutex
	open    map[stack.TransportEndpointID]*handshake
	waiting list.List // IDs of those that may still be given up, oldest first
}

type packetHandler = func(stack.TransportEndpointID, *stack.PacketBuffer) bool

// remember wraps the forwarder's handler, which says nothing of the packet.
func (s *handshakes) remember(ctx context.Context, handle packetHandler) packetHandler {
	s.open = map[stack.TransportEndpointID]*handshake{}
	return func(id stack.TransportEndpointID, pkt *stack.PacketBuffer) bool {
		h := header.TCP(pkt.TransportHeader().Slice())
		if len(h) < header.TCPMinimumSize || h.Flags()&(header.TCPFlagSyn|header.TCPFlagAck) != header.TCPFlagSyn {
			return handle(id, pkt)
		}
		if !s.begin(ctx, id, pkt) {
			return true // known, or lost: it is sent again
		}
		if !handle(id, pkt) {
			s.done(id)
			return false
		}
		return true
	}
}

// begin makes room for a handshake; false if it is there, or if there is none even so: those that were
// given up, and those for which only the guest is waited for, are as many again.
func (s *handshakes) begin(ctx context.Context, id stack.TransportEndpointID, pkt *stack.PacketBuffer) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.open[id] != nil || len(s.open) >= 2*maxHandshakes {
		return false
	}
	if s.waiting.Len() >= maxHandshakes {
		oldest := s.waiting.Remove(s.waiting.Front()).(stack.TransportEndpointID)
		s.open[oldest].place = nil
		s.open[oldest].end(errCrowded)
	}
	h := &handshake{quote: quote(pkt), place: s.waiting.PushBack(id)}
	h.ctx, h.end = context.WithCancelCause(ctx)
	s.open[id] = h
	return true
}

func (s *handshakes) of(id stack.TransportEndpointID) *handshake {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.open[id]
}

// reached notes that the peer has answered.
func (s *handshakes) reached(id stack.TransportEndpointID) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if h := s.open[id]; h.place != nil {
		s.waiting.Remove(h.place)
		h.place = nil
	}
}

// done forgets one that the forwarder has forgotten: it would take no notice of another one, which
// nobody ended then.
func (s *handshakes) done(id stack.TransportEndpointID) {
	s.reached(id)
	s.mu.Lock()
	defer s.mu.Unlock()
	s.open[id].end(nil)
	delete(s.open, id)
}
