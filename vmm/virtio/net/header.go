package net

import (
	"encoding/binary"
	"errors"
)

const (
	// HeaderLen is the size of a Header on the link: struct virtio_net_hdr.
	HeaderLen = 10
	// guestHeaderLen is its size in the guest's buffers (VIRTIO_F_VERSION_1): num_buffers
	// follows.
	guestHeaderLen = HeaderLen + 2

	etherLen = 14
	vlanLen  = 4
	// MaxFrame is the largest frame: an IP packet of the largest size with a VLAN tag.
	MaxFrame = etherLen + vlanLen + 65535

	// featuresLen is the size of a record that is no frame.
	featuresLen = 8
)

// Header.Flags and Header.GSO (virtio 1.2 §5.1.6).
const (
	NeedsCsum = 1

	GSONone  = 0
	GSOTCPv4 = 1
	GSOTCPv6 = 4
)

// Header is struct virtio_net_hdr: what is left to do for a frame. The checksum from
// CsumStart on to the end of the frame belongs CsumOffset bytes behind CsumStart, where
// the pseudo header's stands (NeedsCsum); and a TCP segment is several, of GSOSize bytes each.
type Header struct {
	Flags, GSO                             uint8
	HdrLen, GSOSize, CsumStart, CsumOffset uint16
}

// Put writes h to b.
func (h *Header) Put(b *[HeaderLen]byte) {
	b[0], b[1] = h.Flags, h.GSO
	le := binary.LittleEndian
	le.PutUint16(b[2:], h.HdrLen)
	le.PutUint16(b[4:], h.GSOSize)
	le.PutUint16(b[6:], h.CsumStart)
	le.PutUint16(b[8:], h.CsumOffset)
}

// ParseHeader is the inverse of Put.
func ParseHeader(b *[HeaderLen]byte) Header {
	le := binary.LittleEndian
	return Header{
		Flags: b[0], GSO: b[1],
		HdrLen: le.Uint16(b[2:]), GSOSize: le.Uint16(b[4:]), CsumStart: le.Uint16(b[6:]), CsumOffset: le.Uint16(b[8:]),
	}
}

var (
	errLength = errors.New("frame is shorter than Ethernet's header or longer than a packet can be")
	errCsum   = errors.New("checksum lies outside of the frame, or was not negotiated")
	errGSO    = errors.New("segmentation makes no sense, or was not negotiated")
)

// check returns the header that the link gets for a frame of n bytes: nothing in it that
// was not negotiated, or that points out of the frame.
func (h Header) check(n int, features uint64) (Header, error) {
	if n < etherLen || n > MaxFrame {
		return Header{}, errLength
	}
	out := Header{}
	if h.Flags&NeedsCsum != 0 {
		if features&featureCsum == 0 || h.CsumStart < etherLen || int(h.CsumStart)+int(h.CsumOffset)+2 > n {
			return Header{}, errCsum
		}
		out.Flags, out.CsumStart, out.CsumOffset = NeedsCsum, h.CsumStart, h.CsumOffset
	}
	var need uint64
	switch h.GSO {
	case GSONone:
		return out, nil
	case GSOTCPv4:
		need = featureHostTSO4
	case GSOTCPv6:
		need = featureHostTSO6
	}
	if features&need == 0 || out.Flags&NeedsCsum == 0 || h.GSOSize == 0 {
		return Header{}, errGSO
	}
	out.GSO, out.GSOSize = h.GSO, h.GSOSize
	return out, nil
}

// Offloads tells whether a record is the device's word about its driver, and what
// that is: frames for it may have checksums and segmentation left to do.
func Offloads(record []byte) (on, ok bool) {
	if len(record) != featuresLen {
		return false, false
	}
	return binary.LittleEndian.Uint64(record)&offloads == offloads, true
}

func putFeatures(features uint64) []byte {
	return binary.LittleEndian.AppendUint64(nil, features)
}
