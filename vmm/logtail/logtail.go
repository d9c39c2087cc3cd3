// Package logtail keeps the end of a guest's console output for error messages.
//
// The guest is hostile and its output ends on someone's terminal: escape
// sequences, control characters and invisible characters never pass.
package logtail

import (
	"io"
	"strings"
	"sync"
	"unicode"
	"unicode/utf8"
)

// Buffer is an io.Writer that keeps the last bytes written to it, cleaned. It is
// safe for concurrent use and Write never fails.
type Buffer struct {
	mu    sync.Mutex
	clean cleaner
	ring  []byte
	next  int  // where the next byte goes
	full  bool // the ring has wrapped
	tee   io.Writer
	out   []byte // scratch
}

// New returns a Buffer that keeps size bytes and passes all that it takes, once
// cleaned, to tee, which may be nil. After an error tee is left alone.
func New(size int, tee io.Writer) *Buffer {
	return &Buffer{ring: make([]byte, max(size, 1)), tee: tee}
}

// Write takes p; a line, a character or an escape sequence may be split among
// several writes. It returns len(p) and no error.
func (b *Buffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.out = b.clean.append(b.out[:0], p)
	if b.tee != nil && len(b.out) > 0 {
		if _, err := b.tee.Write(b.out); err != nil {
			b.tee = nil
		}
	}
	// What a piece longer than the ring would overwrite again is left out.
	out := b.out
	if n := len(b.ring); len(out) >= n {
		copy(b.ring, out[len(out)-n:])
		b.next, b.full = 0, true
		return len(p), nil
	}
	n := copy(b.ring[b.next:], out)
	if b.next += n; b.next == len(b.ring) {
		b.next, b.full = 0, true
	}
	b.next += copy(b.ring[b.next:], out[n:])
	return len(p), nil
}

// Tail returns the last n lines, without a newline at the end, the last one
// complete or not. A line of which the ring has lost the start is left out unless
// it is the only one.
func (b *Buffer) Tail(n int) string {
	b.mu.Lock()
	var s string
	if b.full {
		s = string(b.ring[b.next:]) + string(b.ring[:b.next])
	} else {
		s = string(b.ring[:b.next])
	}
	cut := b.full
	b.mu.Unlock()

	s = strings.TrimRight(s, "\n")
	if cut {
		if _, rest, ok := strings.Cut(s, "\n"); ok {
			s = rest
		}
		for len(s) > 0 && !utf8.RuneStart(s[0]) {
			s = s[1:]
		}
	}
	if n <= 0 {
		return ""
	}
	lines := strings.Split(s, "\n")
	return strings.Join(lines[max(0, len(lines)-n):], "\n")
}

// cleaner drops what must not reach a terminal. Its states follow ECMA-48.
type cleaner struct {
	state   state
	partial []byte // start of a UTF-8 sequence
}

type state uint8

const (
	text state = iota
	escape
	csi       // ESC [ parameters, up to a final byte
	str       // ESC ] P X ^ _ string, up to BEL or ESC \
	strEscape // ESC within a string
)

// append appends the clean form of p to dst.
func (c *cleaner) append(dst, p []byte) []byte {
	for _, b := range p {
		// No sequence goes beyond its line: a guest could hide its log in one.
		if b == '\n' {
			c.state, c.partial = text, c.partial[:0]
			dst = append(dst, '\n')
			continue
		}
		switch c.state {
		case text:
			dst = c.text(dst, b)
		case escape:
			switch {
			case b == '[':
				c.state = csi
			case b == ']' || b == 'P' || b == 'X' || b == '^' || b == '_':
				c.state = str
			case b == 0x1b || b >= 0x20 && b <= 0x2f: // intermediate bytes
			default:
				c.state = text
			}
		case csi:
			if b == 0x1b {
				c.state = escape
			} else if b >= 0x40 {
				c.state = text
			}
		case str:
			if b == 0x07 {
				c.state = text
			} else if b == 0x1b {
				c.state = strEscape
			}
		case strEscape:
			if b == '\\' {
				c.state = text
			} else if b != 0x1b {
				c.state = str
			}
		}
	}
	return dst
}

func (c *cleaner) text(dst []byte, b byte) []byte {
	if b < utf8.RuneSelf {
		c.partial = c.partial[:0]
		switch {
		case b == 0x1b:
			c.state = escape
		case b == '\t' || b >= 0x20 && b != 0x7f:
			dst = append(dst, b)
		}
		return dst
	}
	if utf8.RuneStart(b) {
		c.partial = c.partial[:0]
	}
	c.partial = append(c.partial, b)
	if !utf8.FullRune(c.partial) {
		return dst
	}
	// Not printable: C1 controls, bidirectional overrides, zero-width characters.
	if r, n := utf8.DecodeRune(c.partial); n == len(c.partial) && r != utf8.RuneError && unicode.IsPrint(r) {
		dst = append(dst, c.partial...)
	}
	c.partial = c.partial[:0]
	return dst
}
