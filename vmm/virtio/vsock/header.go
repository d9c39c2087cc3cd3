package vsock

import (
	"encoding/binary"
	"errors"
	"unsafe"

	"golang.org/x/sys/unix"
)

// hostCID is the host's well-known context ID (VMADDR_CID_HOST).
const hostCID = 2

// headerLen is sizeof(struct virtio_vsock_hdr).
const headerLen = 44

// Packet types (virtio 1.2 §5.10.6).
const typeStream = 1

// Packet operations (virtio 1.2 §5.10.6).
const (
	opRequest       = 1
	opResponse      = 2
	opRST           = 3
	opShutdown      = 4
	opRW            = 5
	opCreditUpdate  = 6
	opCreditRequest = 7
)

// SHUTDOWN flags: the sender will not receive, will not send any more.
const (
	shutdownReceive = 1
	shutdownSend    = 2
	shutdownBoth    = shutdownReceive | shutdownSend
)

// header is struct virtio_vsock_hdr (virtio 1.2 §5.10.6), little-endian, packed.
type header struct {
	srcCID, dstCID   uint64 // [0:8] [8:16]
	srcPort, dstPort uint32 // [16:20] [20:24]
	len              uint32 // [24:28] bytes of data behind the header
	typ, op          uint16 // [28:30] [30:32]
	flags            uint32 // [32:36]
	bufAlloc         uint32 // [36:40]
	fwdCnt           uint32 // [40:44]
}

func parseHeader(b *[headerLen]byte) header {
	le := binary.LittleEndian
	return header{
		srcCID: le.Uint64(b[0:]), dstCID: le.Uint64(b[8:]),
		srcPort: le.Uint32(b[16:]), dstPort: le.Uint32(b[20:]),
		len: le.Uint32(b[24:]),
		typ: le.Uint16(b[28:]), op: le.Uint16(b[30:]),
		flags:    le.Uint32(b[32:]),
		bufAlloc: le.Uint32(b[36:]), fwdCnt: le.Uint32(b[40:]),
	}
}

func (h *header) put(b *[headerLen]byte) {
	le := binary.LittleEndian
	le.PutUint64(b[0:], h.srcCID)
	le.PutUint64(b[8:], h.dstCID)
	le.PutUint32(b[16:], h.srcPort)
	le.PutUint32(b[20:], h.dstPort)
	le.PutUint32(b[24:], h.len)
	le.PutUint16(b[28:], h.typ)
	le.PutUint16(b[30:], h.op)
	le.PutUint32(b[32:], h.flags)
	le.PutUint32(b[36:], h.bufAlloc)
	le.PutUint32(b[40:], h.fwdCnt)
}

// reply returns the header of an RST that answers h.
func (h *header) reply() header {
	return header{
		srcCID: h.dstCID, dstCID: h.srcCID, srcPort: h.dstPort, dstPort: h.srcPort,
		typ: h.typ, op: opRST,
	}
}

var (
	errShortPacket = errors.New("vsock: packet is shorter than its header")
	errLongData    = errors.New("vsock: packet's length is beyond its buffers")
)

// parsePacket copies the header out of a packet's buffers and appends the data
// it announces to iov; the data stays where it is. The header is valid with
// errLongData too. Drivers may cut a packet anywhere (virtio 1.2 §2.7.4).
func parsePacket(bufs [][]byte, iov []unix.Iovec) (header, []unix.Iovec, error) {
	var raw [headerLen]byte
	n := 0
	for len(bufs) > 0 {
		m := copy(raw[n:], bufs[0])
		if n += m; n < headerLen {
			bufs = bufs[1:]
			continue
		}
		h := parseHeader(&raw)
		left := uint64(h.len)
		for b := bufs[0][m:]; left > 0; b = bufs[0] {
			if k := min(left, uint64(len(b))); k > 0 {
				iov = append(iov, iovec(b[:k]))
				left -= k
			}
			if bufs = bufs[1:]; len(bufs) == 0 {
				break
			}
		}
		if left > 0 {
			return h, iov, errLongData
		}
		return h, iov, nil
	}
	return header{}, iov, errShortPacket
}

// iovec describes b, which must not be empty, to the kernel.
func iovec(b []byte) unix.Iovec {
	return unix.Iovec{Base: unsafe.SliceData(b), Len: uint64(len(b))}
}

func iovecBytes(v unix.Iovec) []byte { return unsafe.Slice(v.Base, int(v.Len)) }
