package archive

import (
	"bufio"
	"errors"
)

// xzLimiter passes an .xz file through and refuses it at the first block whose
// LZMA2 dictionary is larger than the limit. The decoder itself allocates
// whatever a block's header asks for, up to 4 GiB.
//
// It follows the structure (The .xz File Format 1.2.1) without decompressing:
// LZMA2 chunks carry their compressed sizes. What it does not understand it
// leaves to the decoder, which refuses it.
type xzLimiter struct {
	in    *bufio.Reader
	limit uint64

	state     func(*xzLimiter) error
	pass      int64 // bytes to hand on before the next state
	checkSize int64 // bytes of the check behind each block
	blockLen  int64 // bytes of the current block so far, for its padding
	err       error
}

func newXZLimiter(in *bufio.Reader, limit uint64) *xzLimiter {
	return &xzLimiter{in: in, limit: limit, state: xzStreamHeader}
}

var errXZ = errors.New("xz: malformed")

func (x *xzLimiter) Read(p []byte) (int, error) {
	if len(p) == 0 {
		return 0, nil
	}
	for x.pass == 0 && x.err == nil {
		x.err = x.state(x)
	}
	if x.err == ErrWindow {
		return 0, x.err
	}
	if x.err != nil || x.pass < 0 {
		// Not understood, or the end: the decoder judges what is left.
		return x.in.Read(p)
	}
	if int64(len(p)) > x.pass {
		p = p[:x.pass]
	}
	n, err := x.in.Read(p)
	x.pass -= int64(n)
	return n, err
}

// xzStreamHeader (§2.1.1): magic, flags whose second byte's low half tells the
// check, CRC32. Stream padding (zeros, §2.2) may come before it.
func xzStreamHeader(x *xzLimiter) error {
	h, err := x.in.Peek(12)
	if err != nil {
		if len(h) >= 4 && h[0] == 0 {
			x.pass = 4
			return nil
		}
		return err
	}
	if h[0] == 0 {
		x.pass = 4
		return nil
	}
	// §2.1.1.2: sizes by check ID.
	x.checkSize = [...]int64{0, 4, 4, 4, 8, 8, 8, 16, 16, 16, 32, 32, 32, 64, 64, 64}[h[7]&15]
	x.pass, x.state = 12, xzBlockHeader
	return nil
}

// xzBlockHeader (§3.1): size, flags, optional sizes, filter flags; a size of 0
// begins the index instead (§4).
func xzBlockHeader(x *xzLimiter) error {
	size, err := x.in.Peek(1)
	if err != nil {
		return err
	}
	if size[0] == 0 {
		x.state = xzIndex
		return nil
	}
	n := (int(size[0]) + 1) * 4
	h, err := x.in.Peek(n)
	if err != nil {
		return err
	}
	b := h[2 : n-4]
	for _, present := range []byte{0x40, 0x80} { // compressed, uncompressed size
		if h[1]&present != 0 {
			if _, b, err = xzVarint(b); err != nil {
				return err
			}
		}
	}
	for range int(h[1]&3) + 1 {
		var id, length uint64
		if id, b, err = xzVarint(b); err != nil {
			return err
		}
		if length, b, err = xzVarint(b); err != nil {
			return err
		}
		if length > uint64(len(b)) {
			return errXZ
		}
		if id == 0x21 && length == 1 { // §5.3.1: LZMA2, dictionary size
			bits := uint64(b[0])
			if bits > 40 || (2|bits&1)<<(bits/2+11) > x.limit {
				return ErrWindow
			}
		}
		b = b[length:]
	}
	x.pass, x.blockLen, x.state = int64(n), 0, xzChunk
	return nil
}

// xzChunk is one LZMA2 chunk: control byte, sizes, data.
func xzChunk(x *xzLimiter) error {
	c, err := x.in.Peek(1)
	if err != nil {
		return err
	}
	switch {
	case c[0] == 0: // end of the block's data; padding to 4 bytes and the check follow
		x.pass = 1 + (4-(x.blockLen+1)%4)%4 + x.checkSize
		x.state = xzBlockHeader
		return nil
	case c[0] <= 2: // uncompressed
		h, err := x.in.Peek(3)
		if err != nil {
			return err
		}
		x.pass = 3 + int64(h[1])<<8 + int64(h[2]) + 1
	case c[0] < 0x80:
		return errXZ
	default:
		h, err := x.in.Peek(5)
		if err != nil {
			return err
		}
		x.pass = 5 + int64(h[3])<<8 + int64(h[4]) + 1
		if c[0] >= 0xc0 {
			x.pass++ // new properties
		}
	}
	x.blockLen += x.pass
	return nil
}

// xzIndex walks the index (§4) and the footer (§2.1.2) up to the next stream.
func xzIndex(x *xzLimiter) error {
	// The footer repeats the index's size, but it comes behind it: count varints.
	length := int64(1)
	records, n, err := x.peekVarint(length)
	if err != nil {
		return err
	}
	length += n
	if records > 1<<40 {
		return errXZ
	}
	left := records * 2
	// The index may be longer than the buffer can peek: hand on what was counted.
	x.pass = length
	total := length
	x.state = func(x *xzLimiter) error {
		for left > 0 {
			_, n, err := x.peekVarint(0)
			if err != nil {
				return err
			}
			left--
			total += n
			x.pass = n
			return nil
		}
		x.pass = (4-total%4)%4 + 4 + 12 // padding, CRC32, footer
		x.state = xzStreamHeader
		return nil
	}
	return nil
}

// peekVarint decodes the varint at offset of the input and its length.
func (x *xzLimiter) peekVarint(offset int64) (v uint64, n int64, err error) {
	b, err := x.in.Peek(int(offset) + 9)
	if len(b) <= int(offset) {
		return 0, 0, err
	}
	v, rest, err := xzVarint(b[offset:])
	return v, int64(len(b)) - offset - int64(len(rest)), err
}

// xzVarint decodes a multibyte integer (§1.2): at most 9 bytes of 7 bits.
func xzVarint(b []byte) (v uint64, rest []byte, err error) {
	for i := 0; i < 9 && i < len(b); i++ {
		v |= uint64(b[i]&0x7f) << (7 * i)
		if b[i]&0x80 == 0 {
			return v, b[i+1:], nil
		}
	}
	return 0, nil, errXZ
}
