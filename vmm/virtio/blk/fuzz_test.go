package blk

import (
	"bytes"
	"encoding/binary"
	"testing"
)

// FuzzBlk runs sequences of mostly valid requests, with rare flips, against a
// model of the disk. Each request is one chain as the queue hands it over.
func FuzzBlk(f *testing.F) {
	f.Add([]byte{0})
	f.Add(bytes.Repeat([]byte{1, 3, 0, 7, 90, 2, 5, 1, 4}, 30))
	f.Add(bytes.Repeat([]byte{4, 9, 200, 3, 1, 0, 255, 17}, 30))
	f.Add(bytes.Repeat([]byte{0xff, 0xfe}, 50))
	f.Fuzz(func(t *testing.T, ops []byte) {
		const sectors = 256
		op := func() int {
			if len(ops) == 0 {
				return 0
			}
			v := ops[0]
			ops = ops[1:]
			return int(v)
		}
		fake, disk := newFake(sectors)
		fake.shortBy = op() % 2 * 7
		model := make([]byte, len(fake.data))
		d, err := New(Config{Serial: "fuzz", Disk: disk, OnError: func(err error) { t.Fatal(err) }})
		if err != nil {
			t.Fatal(err)
		}
		types := []uint32{typeIn, typeOut, typeOut, typeFlush, typeGetID, typeDiscard, typeWriteZeroes}
		for len(ops) > 0 {
			// Header.
			h := make([]byte, headerSize)
			typ, sector := types[op()%len(types)], uint64(op())
			switch op() { // rare flips
			case 251:
				typ = uint32(op()) << 3
			case 252:
				sector = uint64(op()) << 56
			case 253:
				sector = ^uint64(op())
			case 254:
				h = h[:op()%headerSize]
			}
			if len(h) == headerSize {
				binary.LittleEndian.PutUint32(h, typ)
				binary.LittleEndian.PutUint64(h[8:], sector)
			}
			// Data and status, framed in pieces.
			var out, in []byte
			n := op() % 16 * SectorSize
			if op() == 255 {
				n += op()
			}
			switch typ {
			case typeIn:
				in = make([]byte, n)
			case typeOut:
				out = bytes.Repeat([]byte{byte(op())}, n)
			case typeGetID:
				in = make([]byte, op()%40)
			case typeDiscard, typeWriteZeroes:
				for range op() % 4 {
					flags := uint32(0)
					if typ == typeWriteZeroes {
						flags = uint32(op() & 1)
					}
					if v := op(); v > 250 {
						flags = uint32(v)
					}
					out = binary.LittleEndian.AppendUint64(out, uint64(op()))
					out = binary.LittleEndian.AppendUint32(out, uint32(op()%64))
					out = binary.LittleEndian.AppendUint32(out, flags)
				}
			}
			if len(h) < headerSize {
				out = nil // it would complete the header
			}
			marker := byte(0xfe)
			r := &request{}
			readable, writable := append(h, out...), append(in, marker)
			if op() == 254 {
				writable = writable[:0]
			}
			split := func(b []byte) (parts [][]byte) {
				for len(b) > 0 {
					k := min(len(b), 1+op()*31)
					parts, b = append(parts, b[:k:k]), b[k:]
				}
				return parts
			}
			r.chain.Readable, r.chain.Writable = split(readable), split(writable)

			if err := r.parse(); err != nil {
				if len(readable) >= headerSize && len(writable) > 0 {
					t.Fatalf("a complete request is refused: %v", err)
				}
				continue
			}
			if len(readable) < headerSize || len(writable) == 0 {
				t.Fatal("an incomplete request is accepted")
			}
			if r.needsDisk() {
				r.att, _ = d.acquire()
			}
			status, written, err := d.serve(r, op()&1 != 0 && fake.shortBy == 0)
			if err != nil {
				t.Fatalf("would block on memory: %v", err)
			}
			r.status[0] = status
			if r.att != nil {
				d.release(r.att)
			}
			if writable[len(writable)-1] != status || status > statusUnsupported {
				t.Fatalf("status %d, last byte %d", status, writable[len(writable)-1])
			}
			if int(written) > len(writable) {
				t.Fatalf("used length %d of %d", written, len(writable))
			}

			// The model: what a valid request does, and that others do nothing.
			inRange := sector <= sectors && uint64(n)/SectorSize <= sectors-sector && n%SectorSize == 0
			if (typ == typeIn || typ == typeOut) && inRange != (status == statusOK) {
				t.Fatalf("type %d, sector %d, %d bytes: status %d", typ, sector, n, status)
			}
			if status == statusOK {
				switch off := int(sector) * SectorSize; typ {
				case typeIn:
					if !bytes.Equal(writable[:n], model[off:off+n]) {
						t.Fatal("read differs")
					}
				case typeOut:
					copy(model[off:], out)
				case typeDiscard, typeWriteZeroes:
					for b := out; len(b) > 0; b = b[rangeSize:] {
						from := binary.LittleEndian.Uint64(b) * SectorSize
						clear(model[from : from+uint64(binary.LittleEndian.Uint32(b[8:]))*SectorSize])
					}
				}
			}
			if !bytes.Equal(fake.data, model) {
				t.Fatalf("type %d, status %d: the disk differs from the model", typ, status)
			}
		}
		if err := d.Close(); err != nil {
			t.Fatal(err)
		}
	})
}
