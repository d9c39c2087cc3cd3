package fs

import "sync"

// sizes are those of the buffers that a server has for requests and answers: without data, with what Linux reads
// ahead at a time (128 KiB), and the largest. The device counts them, not what they hold.
var sizes = [...]int{8 << 10, 192 << 10, frameHeader + MaxMessage}

// class is that of a buffer for n bytes, at most MaxMessage and a frame's header.
func class(n int) int {
	i := 0
	for sizes[i] < n {
		i++
	}
	return i
}

// pool keeps buffers: the data of requests is most of what a server would allocate, and the
// garbage collector would run every few megabytes of it.
type pool [len(sizes)]sync.Pool // *[]byte

// get returns a buffer of n bytes; put gives it back.
func (p *pool) get(n int) *[]byte {
	c := class(n)
	b, ok := p[c].Get().(*[]byte)
	if !ok {
		b = new(make([]byte, sizes[c]))
	}
	*b = (*b)[:n]
	return b
}

func (p *pool) put(b *[]byte) { p[class(cap(*b))].Put(b) }
