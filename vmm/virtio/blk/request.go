package blk

import (
	"encoding/binary"
	"errors"
	"fmt"

	"github.com/wsl2/wsl2/vmm/virtio"
)

// Request types and status bytes (virtio 1.2 §5.2.6).
const (
	typeIn          = 0
	typeOut         = 1
	typeFlush       = 4
	typeGetID       = 8
	typeDiscard     = 11
	typeWriteZeroes = 13

	statusOK          = 0
	statusIOErr       = 1
	statusUnsupported = 2

	headerSize = 16
	idSize     = 20
	rangeSize  = 16

	flagUnmap = 1 // of a write-zeroes range
)

// request is one chain, taken apart. Its backing arrays are reused.
type request struct {
	chain  virtio.Chain
	typ    uint32
	sector uint64
	data   [][]byte // the buffers between header and status
	n      int      // bytes in data
	status []byte   // one byte of guest memory

	att          *attachment // nil: no disk
	writeThrough bool
}

// parse takes the chain apart (virtio 1.2 §5.2.6: header, data, status, framed
// in any way). The error says that there is no place for a status.
func (r *request) parse() error {
	w := r.chain.Writable
	if len(w) == 0 {
		return fmt.Errorf("%w: block request without a status byte", virtio.ErrProtocol)
	}
	last := w[len(w)-1]
	r.status = last[len(last)-1:]
	if w[len(w)-1] = last[:len(last)-1]; len(last) == 1 {
		w = w[:len(w)-1]
	}
	var h [headerSize]byte
	if virtio.Gather(h[:], r.chain.Readable) < headerSize {
		return fmt.Errorf("%w: block request with a header of %d bytes", virtio.ErrProtocol, virtio.Len(r.chain.Readable))
	}
	r.typ = binary.LittleEndian.Uint32(h[0:])
	r.sector = binary.LittleEndian.Uint64(h[8:])
	switch r.typ {
	case typeIn, typeGetID:
		r.data = w
	default:
		r.data = virtio.Drop(r.chain.Readable, headerSize)
	}
	r.n = virtio.Len(r.data)
	return nil
}

// needsDisk reports whether the request is about the disk's contents.
func (r *request) needsDisk() bool { return r.typ != typeGetID }

// waits reports whether the request is expected to wait for the host's disk.
// Reads are not asked here but tried (errWouldBlock). Writes end in the page
// cache, unless the host throttles us.
func (r *request) waits() bool {
	switch r.typ {
	case typeFlush, typeDiscard, typeWriteZeroes:
		return true
	case typeOut:
		return r.writeThrough || r.att != nil && r.att.disk.slowWrites.Load()
	}
	return false
}

// errDriver is a request that breaks the device's rules; it fails with
// statusIOErr and is no failure of the host.
var errDriver = errors.New("bad request")

// serve carries the request out; nowait makes a read return errWouldBlock
// instead of waiting for the host's disk. It returns the status and the number
// of bytes written to the chain, status included.
func (d *Device) serve(r *request, nowait bool) (status byte, written uint32, err error) {
	if r.typ == typeGetID {
		var id [idSize]byte
		copy(id[:], d.cfg.Serial)
		n := virtio.Scatter(r.data, id[:])
		if n < r.n {
			return statusOK, uint32(n), nil // the status lies behind a gap
		}
		return statusOK, uint32(n) + 1, nil
	}
	if r.att == nil {
		return statusIOErr, r.unread(), nil
	}
	op, err := d.access(r, r.att.disk, nowait)
	switch {
	case err == nil && r.typ == typeIn:
		return statusOK, uint32(r.n) + 1, nil
	case err == nil:
		return statusOK, 1, nil
	case errors.Is(err, errWouldBlock):
		return 0, 0, errWouldBlock
	case errors.Is(err, errUnsupported):
		return statusUnsupported, 1, nil
	case !errors.Is(err, errDriver):
		d.report(r.att.disk, op, err)
	}
	return statusIOErr, r.unread(), nil
}

// unread is the used length of a failed request: what was surely written, from
// the first byte on.
func (r *request) unread() uint32 {
	if r.typ == typeIn && r.n > 0 {
		return 0
	}
	return 1
}

// access does the disk's part of a request. op names it for people.
func (d *Device) access(r *request, disk *Disk, nowait bool) (op string, err error) {
	switch r.typ {
	case typeIn:
		off, ok := disk.inRange(r.sector, int64(r.n))
		if !ok || r.n%SectorSize != 0 {
			return "read", errDriver
		}
		return "read", disk.read(r.data, off, nowait)
	case typeOut:
		off, ok := disk.inRange(r.sector, int64(r.n))
		if !ok || r.n%SectorSize != 0 || d.readOnly(disk) {
			return "write", errDriver
		}
		return "write", disk.write(r.data, off, r.writeThrough)
	case typeFlush:
		if disk.readOnly {
			return "flush", nil
		}
		return "flush", disk.sync()
	case typeDiscard:
		return "discard", d.eachRange(r, disk, maxDiscardRanges, maxDiscardSectors, 0, func(off, n int64, _ uint32) error {
			return disk.discard(off, n)
		})
	case typeWriteZeroes:
		return "write zeroes to", d.eachRange(r, disk, maxWriteZeroesRanges, maxWriteZeroesSectors, flagUnmap, func(off, n int64, flags uint32) error {
			return disk.writeZeroes(off, n, flags&flagUnmap != 0, r.writeThrough)
		})
	}
	return "", errUnsupported
}

func (d *Device) readOnly(disk *Disk) bool { return d.cfg.ReadOnly || disk.readOnly }

// eachRange calls f for the ranges of a discard or write-zeroes request
// (struct virtio_blk_discard_write_zeroes), after it has checked all of them.
func (d *Device) eachRange(r *request, disk *Disk, maxRanges int, maxSectors, allowed uint32, f func(off, n int64, flags uint32) error) error {
	if r.n == 0 || r.n%rangeSize != 0 || r.n > maxRanges*rangeSize || d.readOnly(disk) {
		return errDriver
	}
	var raw [maxDiscardRanges * rangeSize]byte // the one copy that is judged
	ranges := raw[:virtio.Gather(raw[:r.n], r.data)]
	for pass := range 2 {
		for b := ranges; len(b) > 0; b = b[rangeSize:] {
			sector := binary.LittleEndian.Uint64(b)
			sectors := binary.LittleEndian.Uint32(b[8:])
			flags := binary.LittleEndian.Uint32(b[12:])
			n := int64(sectors) * SectorSize
			off, ok := disk.inRange(sector, n)
			switch {
			case pass == 1 && n > 0:
				if err := f(off, n, flags); err != nil {
					return err
				}
			case flags&^allowed != 0:
				return errUnsupported // §5.2.6.2
			case !ok || sectors > maxSectors:
				return errDriver
			}
		}
	}
	return nil
}
