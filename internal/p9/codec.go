package p9

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
)

// Errors that a broken peer causes; the connection is of no use afterwards.
var (
	ErrTooLarge    = errors.New("p9: frame larger than agreed")
	ErrMalformed   = errors.New("p9: malformed message")
	ErrUnknownType = errors.New("p9: unknown message type")
)

// Message is one of the message types of this package, always as a pointer.
type Message interface {
	// Type returns the frame's type byte.
	Type() Type
	appendBody(b []byte) []byte
	readBody(d *decoder)
}

// Append appends m's frame to b. Strings are at most 65535 bytes long; a longer one,
// or a frame of more than msize bytes, is refused and b left as it was.
func Append(b []byte, tag Tag, m Message, msize uint32) ([]byte, error) {
	start := len(b)
	b = append(b, 0, 0, 0, 0, byte(m.Type()))
	b = m.appendBody(appendU16(b, uint16(tag)))
	n := len(b) - start
	if n > int(msize) {
		return b[:start], fmt.Errorf("%w: %T of %d bytes, at most %d", ErrTooLarge, m, n, msize)
	}
	binary.LittleEndian.PutUint32(b[start:], uint32(n))
	return b, nil
}

// Decode decodes a whole frame. The message's data (Twrite, Rread, Rreaddir) aliases it.
func Decode(frame []byte) (Tag, Message, error) {
	if len(frame) < headerSize || binary.LittleEndian.Uint32(frame) != uint32(len(frame)) {
		return NoTag, nil, fmt.Errorf("%w: a frame of %d bytes", ErrMalformed, len(frame))
	}
	t, tag := Type(frame[4]), Tag(binary.LittleEndian.Uint16(frame[5:]))
	m := newMessage(t)
	if m == nil {
		return tag, nil, fmt.Errorf("%w %d", ErrUnknownType, t)
	}
	d := decoder{b: frame[headerSize:]}
	m.readBody(&d)
	if d.err || len(d.b) > 0 {
		return tag, nil, fmt.Errorf("%w: %T", ErrMalformed, m)
	}
	return tag, m, nil
}

// readAhead is how much of a connection is read at a time: a frame's size with what follows, and more frames if they are
// there. What is larger is read where it belongs.
const readAhead = 4 << 10

// readFrame reads a frame of at most msize bytes into memory that alloc returns.
// io.EOF, unwrapped, is the peer's orderly end.
func readFrame(r io.Reader, msize uint32, alloc func(n int) []byte) ([]byte, error) {
	var size [4]byte
	if _, err := io.ReadFull(r, size[:]); err != nil {
		return nil, err
	}
	n := binary.LittleEndian.Uint32(size[:])
	switch {
	case n < headerSize:
		return nil, fmt.Errorf("%w: a frame of %d bytes", ErrMalformed, n)
	case n > msize:
		return nil, fmt.Errorf("%w: %d bytes, at most %d", ErrTooLarge, n, msize)
	}
	b := alloc(int(n))
	copy(b, size[:])
	if _, err := io.ReadFull(r, b[4:]); err != nil {
		if err == io.EOF {
			err = io.ErrUnexpectedEOF
		}
		return b, err
	}
	return b, nil
}

// decoder reads a body field by field. Its first failure sticks: later reads
// return zero values, so that decoding is straight-line with one check at the end.
type decoder struct {
	b   []byte
	err bool
}

// take returns the next n bytes, which alias the frame, or nil.
func (d *decoder) take(n int) []byte {
	if n > len(d.b) {
		d.b, d.err = nil, true
		return nil
	}
	p := d.b[:n:n]
	d.b = d.b[n:]
	return p
}

func (d *decoder) u8() uint8 {
	if p := d.take(1); p != nil {
		return p[0]
	}
	return 0
}

func (d *decoder) u16() uint16 {
	if p := d.take(2); p != nil {
		return binary.LittleEndian.Uint16(p)
	}
	return 0
}

func (d *decoder) u32() uint32 {
	if p := d.take(4); p != nil {
		return binary.LittleEndian.Uint32(p)
	}
	return 0
}

func (d *decoder) u64() uint64 {
	if p := d.take(8); p != nil {
		return binary.LittleEndian.Uint64(p)
	}
	return 0
}

func (d *decoder) fid() FID       { return FID(d.u32()) }
func (d *decoder) string() string { return string(d.take(int(d.u16()))) }

// data reads count[4] and as many bytes.
func (d *decoder) data() []byte {
	n := d.u32()
	if uint64(n) > uint64(len(d.b)) {
		d.b, d.err = nil, true
		return nil
	}
	return d.take(int(n))
}

func (d *decoder) qid() QID   { return QID{Type: d.u8(), Version: d.u32(), Path: d.u64()} }
func (d *decoder) time() Time { return Time{Sec: int64(d.u64()), Nsec: d.u64()} }

func appendU16(b []byte, v uint16) []byte { return binary.LittleEndian.AppendUint16(b, v) }
func appendU32(b []byte, v uint32) []byte { return binary.LittleEndian.AppendUint32(b, v) }
func appendU64(b []byte, v uint64) []byte { return binary.LittleEndian.AppendUint64(b, v) }
func appendFID(b []byte, f FID) []byte    { return appendU32(b, uint32(f)) }

func appendString(b []byte, s string) []byte {
	if len(s) > 0xffff { // the protocol cannot carry it: the frame becomes larger than any msize
		return append(b, make([]byte, MaxMsize)...)
	}
	return append(appendU16(b, uint16(len(s))), s...)
}

func appendData(b, data []byte) []byte { return append(appendU32(b, uint32(len(data))), data...) }

func appendQID(b []byte, q QID) []byte {
	return appendU64(appendU32(append(b, q.Type), q.Version), q.Path)
}

func appendTime(b []byte, t Time) []byte { return appendU64(appendU64(b, uint64(t.Sec)), t.Nsec) }

// AppendDirent appends an entry of Rreaddir's data. offset is where the next entry begins.
func AppendDirent(b []byte, qid QID, offset uint64, dtype uint8, name string) []byte {
	return appendString(append(appendU64(appendQID(b, qid), offset), dtype), name)
}

// DirentSize is the size of an entry with this name.
func DirentSize(name string) int { return qidSize + 8 + 1 + 2 + len(name) }

// Dirent is an entry of a directory.
type Dirent struct {
	QID    QID
	Offset uint64 // where the next entry begins
	Type   uint8  // DT_* of readdir(3)
	Name   string
}

// DecodeDirents decodes Rreaddir's data.
func DecodeDirents(b []byte) ([]Dirent, error) {
	list := make([]Dirent, 0, len(b)/32)
	d := decoder{b: b}
	for len(d.b) > 0 {
		list = append(list, Dirent{QID: d.qid(), Offset: d.u64(), Type: d.u8(), Name: d.string()})
	}
	if d.err {
		return nil, fmt.Errorf("%w: a directory's entries", ErrMalformed)
	}
	return list, nil
}
