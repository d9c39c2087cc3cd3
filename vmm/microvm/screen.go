package microvm

import (
	"io"
	"sync"
)

// screen joins what the guest kernel prints before and after its virtio console
// is there, and what the monitor has to say about the guest. Early bytes come one
// at a time and go on line by line. It is safe for concurrent use.
type screen struct {
	mu   sync.Mutex
	w    io.Writer
	line []byte // begun by putByte
}

// maxLine bounds what is held back.
const maxLine = 1024

func newScreen(w io.Writer) *screen {
	if w == nil {
		w = io.Discard
	}
	return &screen{w: w}
}

// Write implements io.Writer. It never fails: a broken log is no reason to end
// the guest.
func (c *screen) Write(p []byte) (int, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.flushLocked()
	_, _ = c.w.Write(p)
	return len(p), nil
}

func (c *screen) putByte(b byte) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.line = append(c.line, b)
	if b == '\n' || len(c.line) >= maxLine {
		c.flushLocked()
	}
}

func (c *screen) flushLocked() {
	if len(c.line) > 0 {
		_, _ = c.w.Write(c.line)
		c.line = c.line[:0]
	}
}

// flush writes a line that was begun.
func (c *screen) flush() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.flushLocked()
	return nil
}
