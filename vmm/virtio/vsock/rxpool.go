package vsock

import (
	"fmt"

	"golang.org/x/sys/unix"

	"github.com/wsl2/wsl2/vmm/virtio"
)

// rxPool holds rx buffers that were taken from the queue and not used yet. To
// read a stream with one system call into several buffers they must be known
// before it is known how much there is to read.
type rxPool struct {
	q    *virtio.Queue
	held []*rxBuf // oldest first, from head on
	head int
	free []*rxBuf
}

// buffers returns those held, oldest first.
func (p *rxPool) buffers() []*rxBuf { return p.held[p.head:] }

// rxBuf is one buffer for a packet to the guest.
type rxBuf struct {
	chain virtio.Chain
	room  uint32 // bytes of data behind the header
}

// fill takes buffers from the queue until n are held; it reports how many are.
// The error is the queue's.
func (p *rxPool) fill(n int) (int, error) {
	if p.head > 0 && len(p.held)-p.head < n {
		p.held = p.held[:copy(p.held, p.held[p.head:])]
		p.head = 0
	}
	for len(p.held)-p.head < n {
		var b *rxBuf
		if last := len(p.free) - 1; last >= 0 {
			b, p.free = p.free[last], p.free[:last]
		} else {
			b = new(rxBuf)
		}
		ok, err := p.q.Pop(&b.chain)
		if !ok || err != nil {
			p.free = append(p.free, b)
			return len(p.held) - p.head, err
		}
		var size uint64
		for _, w := range b.chain.Writable {
			size += uint64(len(w))
		}
		if size <= headerLen {
			return 0, fmt.Errorf("vsock: rx buffer of %d bytes has no room for a packet", size)
		}
		b.room = uint32(min(size-headerLen, maxPacket))
		p.held = append(p.held, b)
	}
	return len(p.held) - p.head, nil
}

// appendRoom appends b's place for data to iov, at most limit bytes of it and as
// much as one system call can take.
func (b *rxBuf) appendRoom(iov []unix.Iovec, limit uint32) (_ []unix.Iovec, n uint32) {
	skip := headerLen
	for _, w := range b.chain.Writable {
		if skip >= len(w) {
			skip -= len(w)
			continue
		}
		if len(iov) == maxIovecs {
			break
		}
		w, skip = w[skip:], 0
		if k := min(uint32(len(w)), b.room-n, limit-n); k > 0 {
			iov = append(iov, iovec(w[:k]))
			n += k
		}
	}
	return iov, n
}

// send writes the header into the oldest buffer, in which h.len bytes of data
// are in place already, and hands it to the driver. One must be held.
func (p *rxPool) send(h *header) {
	b := p.held[p.head]
	if w := b.chain.Writable[0]; len(w) >= headerLen {
		h.put((*[headerLen]byte)(w))
	} else {
		var raw [headerLen]byte
		h.put(&raw)
		n := 0
		for _, w := range b.chain.Writable {
			n += copy(w, raw[n:])
		}
	}
	p.q.Push(b.chain.Head, headerLen+h.len)
	p.take()
}

// take removes the oldest buffer from those held.
func (p *rxPool) take() {
	p.free = append(p.free, p.held[p.head])
	p.head++
}

// release gives every held buffer back empty; drivers drop such and offer them
// anew. A driver that only paused the device would miss them otherwise.
func (p *rxPool) release() {
	for _, b := range p.buffers() {
		p.q.Push(b.chain.Head, 0)
		p.take()
	}
}
