package wire

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"strings"
	"time"
	"unicode"
	"unicode/utf8"
)

// MaxFrame is the largest length field of a frame: type and body. It holds the
// arguments and environment that Linux itself accepts (2 MiB) with room to spare.
// Larger frames are refused by both Append and Read.
const MaxFrame = 4 << 20

// headerSize is the length field (4 bytes) and the type (1 byte).
const headerSize = 5

// readChunk bounds what Read allocates ahead of the bytes that have arrived.
const readChunk = 64 << 10

// Type is a frame's type byte. PROTOCOL.md has the same table.
type Type uint8

// Types. Numbers are never reused.
const (
	TypeHello          Type = 1
	TypeReady          Type = 2
	TypeReply          Type = 3
	TypeStartDistro    Type = 16
	TypeStopDistro     Type = 17
	TypeImport         Type = 18
	TypeShutdown       Type = 19
	TypeExport         Type = 20
	TypeMaintain       Type = 21
	TypeMountDisk      Type = 24
	TypeReleaseDisk    Type = 25
	TypeImportReady    Type = 32
	TypeDistroExited   Type = 33
	TypeDistroIdle     Type = 34
	TypeNetwork        Type = 40
	TypeStart          Type = 48
	TypeStarted        Type = 49
	TypeFailed         Type = 50
	TypeResize         Type = 51
	TypeSignal         Type = 52
	TypeExited         Type = 53
	TypeHostExec       Type = 54
	TypeMountShare     Type = 55
	TypeServing        Type = 56
	TypeRegisterDevice Type = 57
	TypeShareDevice    Type = 58
	TypeSwapOn         Type = 60

	TypeWatchPorts Type = 70
	TypePortsOpen  Type = 71
	TypeDialPort   Type = 72

	TypeRemoveRoot Type = 80

	TypeShareChange Type = 81
	TypeShareRaised Type = 82
)

// newMessage returns an empty message of type t, or nil.
func newMessage(t Type) Message {
	switch t {
	case TypeHello:
		return new(Hello)
	case TypeReady:
		return new(Ready)
	case TypeReply:
		return new(Reply)
	case TypeStartDistro:
		return new(StartDistro)
	case TypeStopDistro:
		return new(StopDistro)
	case TypeImport:
		return new(Import)
	case TypeShutdown:
		return new(Shutdown)
	case TypeExport:
		return new(Export)
	case TypeMaintain:
		return new(Maintain)
	case TypeMountDisk:
		return new(MountDisk)
	case TypeReleaseDisk:
		return new(ReleaseDisk)
	case TypeImportReady:
		return new(ImportReady)
	case TypeDistroExited:
		return new(DistroExited)
	case TypeDistroIdle:
		return new(DistroIdle)
	case TypeNetwork:
		return new(Network)
	case TypeStart:
		return new(Start)
	case TypeStarted:
		return new(Started)
	case TypeFailed:
		return new(Failed)
	case TypeResize:
		return new(Resize)
	case TypeSignal:
		return new(Signal)
	case TypeExited:
		return new(Exited)
	case TypeHostExec:
		return new(HostExec)
	case TypeMountShare:
		return new(MountShare)
	case TypeSwapOn:
		return new(SwapOn)
	case TypeWatchPorts:
		return new(WatchPorts)
	case TypePortsOpen:
		return new(PortsOpen)
	case TypeDialPort:
		return new(DialPort)
	case TypeServing:
		return new(Serving)
	case TypeRegisterDevice:
		return new(RegisterDevice)
	case TypeShareDevice:
		return new(ShareDevice)
	case TypeRemoveRoot:
		return new(RemoveRoot)
	case TypeShareChange:
		return new(ShareChange)
	case TypeShareRaised:
		return new(ShareRaised)
	}
	return nil
}

// Message is one of the message types of this package, always as a pointer:
// Read returns *Start, and Write takes *Start.
type Message interface {
	// Type returns the frame's type byte.
	Type() Type
	appendBody(b []byte) []byte
	readBody(d *decoder)
}

// Errors that Read's errors wrap. io.EOF, unwrapped, means that the peer closed
// between two frames; io.ErrUnexpectedEOF that it closed inside one.
var (
	ErrTooLarge    = errors.New("frame too large")
	ErrUnknownType = errors.New("unknown message type")
	ErrMalformed   = errors.New("malformed message")
)

// VersionError says that the peer speaks another version of the protocol. Read
// returns it for a Hello (read by the guest) or a Ready (read by the launcher)
// with a version other than Version.
type VersionError struct {
	Ours, Theirs uint32
	// GuestReads is true where the guest found the launcher's version wrong.
	GuestReads bool
}

func (e *VersionError) Error() string {
	launcher, guest := e.Ours, e.Theirs
	if e.GuestReads {
		launcher, guest = guest, launcher
	}
	text := fmt.Sprintf("the launcher speaks wire version %d and the VM's /init version %d", launcher, guest)
	if launcher < guest {
		return text + ": the launcher is older; run the wsl2 that started this VM, or update wsl2, then `wsl2 --shutdown`"
	}
	return text + ": the VM is older; run `wsl2 --shutdown` so that it starts anew, and if that does not help install wsl2 again with its initramfs"
}

// Append appends m's frame to b. It fails, leaving b's contents as they were,
// only if the frame would be larger than MaxFrame.
func Append(b []byte, m Message) ([]byte, error) {
	start := len(b)
	b = append(b, 0, 0, 0, 0, byte(m.Type()))
	b = m.appendBody(b)
	n := len(b) - start - 4
	if n > MaxFrame {
		return b[:start], fmt.Errorf("wire: send %v: %w: %d bytes, at most %d", m.Type(), ErrTooLarge, n, MaxFrame)
	}
	binary.LittleEndian.PutUint32(b[start:], uint32(n))
	return b, nil
}

// Write sends m as one frame with one call of w.Write. Callers that share w
// serialise their calls.
func Write(w io.Writer, m Message) error {
	b, err := Append(make([]byte, 0, 128), m)
	if err != nil {
		return err
	}
	if _, err := w.Write(b); err != nil {
		return fmt.Errorf("wire: send %v: %w", m.Type(), err)
	}
	return nil
}

// Conn is what is written to that may not take for ever.
type Conn interface {
	io.Writer
	SetWriteDeadline(time.Time) error
}

// Within returns what writes to c, whose peer gets limit to take each write. No deadline
// stays: when it passed, it would wake a process that has nothing to do.
func Within(c Conn, limit time.Duration) io.Writer { return within{c, limit} }

type within struct {
	Conn
	limit time.Duration
}

func (w within) Write(p []byte) (int, error) {
	w.SetWriteDeadline(time.Now().Add(w.limit)) //nolint:errcheck // Write tells
	defer w.SetWriteDeadline(time.Time{})       //nolint:errcheck // the next Write tells
	return w.Conn.Write(p)
}

// Read reads exactly one frame from r, never a byte past it: on data
// connections raw bytes follow the Hello. After any error other than a
// *VersionError the connection is of no more use.
func Read(r io.Reader) (Message, error) {
	var head [headerSize]byte
	if _, err := io.ReadFull(r, head[:]); err != nil {
		if err == io.EOF {
			return nil, io.EOF
		}
		return nil, fmt.Errorf("wire: read frame header: %w", err)
	}
	t := Type(head[4])
	n := binary.LittleEndian.Uint32(head[:4])
	switch {
	case n == 0:
		return nil, fmt.Errorf("wire: %w: frame of length 0", ErrMalformed)
	case n > MaxFrame:
		return nil, fmt.Errorf("wire: read %v: %w: %d bytes, at most %d", t, ErrTooLarge, n, MaxFrame)
	}
	m := newMessage(t)
	if m == nil {
		return nil, fmt.Errorf("wire: %w %d (%d bytes)", ErrUnknownType, byte(t), n-1)
	}
	body, err := readBody(r, int(n-1))
	if err != nil {
		if err == io.EOF {
			err = io.ErrUnexpectedEOF
		}
		return nil, fmt.Errorf("wire: read %v: %w", t, err)
	}
	d := decoder{b: body}
	m.readBody(&d)
	if d.version != nil {
		return nil, d.version
	}
	if d.err == "" && len(d.b) > 0 {
		d.fail("trailing bytes")
	}
	if d.err != "" {
		return nil, fmt.Errorf("wire: %w: %v: %s", ErrMalformed, t, d.err)
	}
	return m, nil
}

// readBody reads n bytes, growing the buffer as they arrive, so that a header
// alone never costs MaxFrame of memory.
func readBody(r io.Reader, n int) ([]byte, error) {
	b := make([]byte, min(n, readChunk))
	if _, err := io.ReadFull(r, b); err != nil {
		return nil, err
	}
	for len(b) < n {
		have := len(b)
		next := make([]byte, min(n, 2*have))
		copy(next, b)
		b = next
		if _, err := io.ReadFull(r, b[have:]); err != nil {
			return nil, err
		}
	}
	return b, nil
}

// decoder reads a body field by field. Its first failure sticks: later reads
// return zero values, so that decoding is straight-line with one check at the end.
type decoder struct {
	b       []byte
	err     string
	version *VersionError // the body is of another version and was not decoded further
}

func (d *decoder) fail(text string) {
	if d.err == "" {
		d.err = text
	}
	d.b = nil
}

// take returns the next n bytes, which alias the body, or nil.
func (d *decoder) take(n int) []byte {
	if n > len(d.b) {
		d.fail("truncated")
		return nil
	}
	p := d.b[:n]
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

func (d *decoder) bool() bool {
	v := d.u8()
	if v > 1 {
		d.fail("a boolean that is neither 0 nor 1")
	}
	return v == 1
}

// length reads a count of items of at least size bytes each and checks it
// against what is left, before anything is allocated for it.
func (d *decoder) length(size int) int {
	n := d.u32()
	if uint64(n)*uint64(size) > uint64(len(d.b)) {
		d.fail("truncated")
		return 0
	}
	return int(n)
}

func (d *decoder) string() string { return string(d.take(d.length(1))) }

// maxText is where a text for people is cut.
const (
	maxText  = 4 << 10
	ellipsis = "..."
)

// text reads a string for people. It may end on a terminal, and the guest is
// hostile: control characters but newline and tab, and what is no UTF-8, come as '?'.
func (d *decoder) text() string {
	b := d.take(d.length(1))
	cut := len(b) > maxText
	if cut {
		b = b[:maxText-len(ellipsis)]
	}
	s := strings.Map(func(r rune) rune {
		if r == utf8.RuneError || unicode.IsControl(r) && r != '\n' && r != '\t' {
			return '?'
		}
		return r
	}, string(b))
	if cut {
		s += ellipsis
	}
	return s
}

func (d *decoder) strings() []string {
	n := d.length(4)
	if n == 0 {
		return nil
	}
	list := make([]string, n)
	for i := range list {
		list[i] = d.string()
	}
	return list
}

func (d *decoder) session() (id SessionID) {
	copy(id[:], d.take(len(id)))
	return id
}

// atMost fails on an enumeration's value that this version does not define.
func (d *decoder) atMost(v, limit uint8, what string) uint8 {
	if v > limit {
		d.fail(fmt.Sprintf("unknown %s %d", what, v))
	}
	return v
}

// checkVersion reads the version that opens a Hello or Ready. The rest of the
// body may look different in another version and is then left alone.
func (d *decoder) checkVersion(guestReads bool) uint32 {
	v := d.u32()
	if d.err == "" && v != Version {
		d.version = &VersionError{Ours: Version, Theirs: v, GuestReads: guestReads}
		d.b = nil
	}
	return v
}

func appendBool(b []byte, v bool) []byte {
	if v {
		return append(b, 1)
	}
	return append(b, 0)
}

func appendU16(b []byte, v uint16) []byte { return binary.LittleEndian.AppendUint16(b, v) }
func appendU32(b []byte, v uint32) []byte { return binary.LittleEndian.AppendUint32(b, v) }
func appendU64(b []byte, v uint64) []byte { return binary.LittleEndian.AppendUint64(b, v) }

func appendString(b []byte, s string) []byte {
	return append(appendU32(b, uint32(len(s))), s...)
}

func appendStrings(b []byte, list []string) []byte {
	b = appendU32(b, uint32(len(list)))
	for _, s := range list {
		b = appendString(b, s)
	}
	return b
}
