package fs

import "sync"

// smallBuffer is enough for all requests and answers but those with data.
const smallBuffer = 8 << 10

// pool keeps buffers: the data of requests is most of what a server would allocate, and the
// garbage collector would run every few megabytes of it.
type pool struct {
	small, large sync.Pool // *[]byte
}

// get returns a buffer of n bytes, at most MaxMessage and a frame's header; put gives it back.
func (p *pool) get(n int) *[]byte {
	from, size := &p.large, frameHeader+MaxMessage
	if n <= smallBuffer {
		from, size = &p.small, smallBuffer
	}
	b, ok := from.Get().(*[]byte)
	if !ok {
		b = new(make([]byte, size))
	}
	*b = (*b)[:n]
	return b
}

func (p *pool) put(b *[]byte) {
	if cap(*b) > smallBuffer {
		p.large.Put(b)
	} else {
		p.small.Put(b)
	}
}
