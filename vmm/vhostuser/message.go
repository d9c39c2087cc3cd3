package vhostuser

import (
	"encoding/binary"
	"errors"
	"fmt"
	"math"

	"golang.org/x/sys/unix"
)

// ErrProtocol is wrapped by every error that says how the front end broke the
// vhost-user protocol.
var ErrProtocol = errors.New("vhost-user: front end error")

// request is a front-end message type (vhost-user "Front-end message types").
type request uint32

const (
	reqGetFeatures         request = 1
	reqSetFeatures         request = 2
	reqSetOwner            request = 3
	reqResetOwner          request = 4
	reqSetMemTable         request = 5
	reqSetVringNum         request = 8
	reqSetVringAddr        request = 9
	reqSetVringBase        request = 10
	reqGetVringBase        request = 11
	reqSetVringKick        request = 12
	reqSetVringCall        request = 13
	reqSetVringErr         request = 14
	reqGetProtocolFeatures request = 15
	reqSetProtocolFeatures request = 16
	reqGetQueueNum         request = 17
	reqSetVringEnable      request = 18
	reqSetBackendReqFD     request = 21
	reqGetConfig           request = 24
	reqSetConfig           request = 25
	reqResetDevice         request = 34
)

// backendConfigChange is VHOST_USER_BACKEND_CONFIG_CHANGE_MSG, the one message
// that this side sends of its own accord.
const backendConfigChange = 2

// featureProtocol is VHOST_USER_F_PROTOCOL_FEATURES, a bit of the virtio
// features that belongs to vhost-user and is never shown to the device.
const featureProtocol = 1 << 30

// Protocol features (vhost-user "Protocol features").
const (
	protocolMQ          = 1 << 0
	protocolReplyAck    = 1 << 3
	protocolBackendReq  = 1 << 5
	protocolConfig      = 1 << 9
	protocolResetDevice = 1 << 13

	protocolFeatures uint64 = protocolMQ | protocolReplyAck | protocolBackendReq | protocolConfig | protocolResetDevice
)

// The header: request, flags, payload size; 32 bits each, little-endian here.
const (
	headerSize = 12

	flagVersionMask = 0x3
	flagVersion     = 0x1
	flagReply       = 1 << 2
	flagNeedReply   = 1 << 3
)

// Limits of the protocol. Nothing of a message is read before its size is
// found to be within them.
const (
	maxRegions    = 8   // VHOST_MEMORY_BASELINE_NREGIONS
	maxConfigSize = 256 // VHOST_USER_MAX_CONFIG_SIZE

	regionSize   = 32
	configHeader = 12
	maxPayload   = max(8+maxRegions*regionSize, configHeader+maxConfigSize)
)

const (
	vringIndexMask = 0xff
	vringNoFD      = 1 << 8 // VHOST_USER_VRING_NOFD_MASK

	configWritable = 0 // SET_CONFIG for the writable fields, the only kind without migration
)

// payloadKind is the shape of a request's payload.
type payloadKind uint8

const (
	payloadNone payloadKind = iota
	payloadU64
	payloadVringState // index, number: 32 bits each
	payloadVringAddr
	payloadVringFD // a u64 whose low byte is the ring and whose bit 8 says "no descriptor"
	payloadMemTable
	payloadConfig
)

// spec says how a request looks on the wire and whether it has a reply of its
// own. A request that is not in the table is refused.
type spec struct {
	name    string
	payload payloadKind
	fds     int // descriptors that must come with it; payloadVringFD and payloadMemTable say themselves
	replies bool
}

var specs = map[request]spec{
	reqGetFeatures:         {name: "GET_FEATURES", replies: true},
	reqSetFeatures:         {name: "SET_FEATURES", payload: payloadU64},
	reqSetOwner:            {name: "SET_OWNER"},
	reqResetOwner:          {name: "RESET_OWNER"},
	reqSetMemTable:         {name: "SET_MEM_TABLE", payload: payloadMemTable},
	reqSetVringNum:         {name: "SET_VRING_NUM", payload: payloadVringState},
	reqSetVringAddr:        {name: "SET_VRING_ADDR", payload: payloadVringAddr},
	reqSetVringBase:        {name: "SET_VRING_BASE", payload: payloadVringState},
	reqGetVringBase:        {name: "GET_VRING_BASE", payload: payloadVringState, replies: true},
	reqSetVringKick:        {name: "SET_VRING_KICK", payload: payloadVringFD},
	reqSetVringCall:        {name: "SET_VRING_CALL", payload: payloadVringFD},
	reqSetVringErr:         {name: "SET_VRING_ERR", payload: payloadVringFD},
	reqGetProtocolFeatures: {name: "GET_PROTOCOL_FEATURES", replies: true},
	reqSetProtocolFeatures: {name: "SET_PROTOCOL_FEATURES", payload: payloadU64},
	reqGetQueueNum:         {name: "GET_QUEUE_NUM", replies: true},
	reqSetVringEnable:      {name: "SET_VRING_ENABLE", payload: payloadVringState},
	reqSetBackendReqFD:     {name: "SET_BACKEND_REQ_FD", fds: 1},
	reqGetConfig:           {name: "GET_CONFIG", payload: payloadConfig, replies: true},
	reqSetConfig:           {name: "SET_CONFIG", payload: payloadConfig},
	reqResetDevice:         {name: "RESET_DEVICE"},
}

func (r request) String() string {
	if s, ok := specs[r]; ok {
		return s.name
	}
	return fmt.Sprintf("request %d", uint32(r))
}

// header is the fixed part of every message.
type header struct {
	request request
	flags   uint32
	size    uint32 // of the payload, in bytes
}

// parseHeader checks everything that can be judged without the payload.
func parseHeader(b []byte) (header, error) {
	h := header{
		request: request(binary.LittleEndian.Uint32(b)),
		flags:   binary.LittleEndian.Uint32(b[4:]),
		size:    binary.LittleEndian.Uint32(b[8:]),
	}
	if _, ok := specs[h.request]; !ok {
		return h, fmt.Errorf("%w: %v is not one that was negotiated", ErrProtocol, h.request)
	}
	if h.flags&flagVersionMask != flagVersion {
		return h, fmt.Errorf("%w: %v: protocol version %d, only %d is known", ErrProtocol, h.request, h.flags&flagVersionMask, flagVersion)
	}
	if h.flags&flagReply != 0 {
		return h, fmt.Errorf("%w: %v: is marked as a reply", ErrProtocol, h.request)
	}
	if h.size > maxPayload {
		return h, fmt.Errorf("%w: %v: payload of %d bytes, at most %d", ErrProtocol, h.request, h.size, maxPayload)
	}
	return h, nil
}

// vringAddr is where the front end, in its own addresses, has a ring's parts.
type vringAddr struct {
	index uint32
	flags uint32
	desc  uint64
	used  uint64
	avail uint64
	log   uint64
}

// memRegion is one piece of guest RAM: size bytes at guest, which the front end
// itself sees at user, and which are offset bytes into the descriptor.
type memRegion struct {
	guest, size, user, offset uint64
}

// configAccess is a read or write of the configuration space.
type configAccess struct {
	offset uint32
	flags  uint32
	data   []byte // for GET_CONFIG only its length means something
}

// message is one request of the front end, checked for form: which of the
// fields are set follows from the request's payloadKind.
type message struct {
	request   request
	needReply bool

	u64     uint64
	ring    uint32 // payloadVringState, payloadVringFD
	num     uint32 // payloadVringState
	noFD    bool   // payloadVringFD
	addr    vringAddr
	regions []memRegion
	config  configAccess

	// fds came with the message; take hands one over, close drops the rest.
	fds []int
}

// parse decodes a payload of h.size bytes that came with fds descriptors.
func parse(h header, p []byte, fds int) (*message, error) {
	s := specs[h.request]
	m := &message{request: h.request, needReply: h.flags&flagNeedReply != 0}
	fail := func(format string, a ...any) (*message, error) {
		return nil, fmt.Errorf("%w: %v: %s", ErrProtocol, h.request, fmt.Sprintf(format, a...))
	}
	size := func(n int) bool { return len(p) == n }
	wantFDs := s.fds
	switch s.payload {
	case payloadNone:
		// A payload that means nothing (QEMU sends some) is harmless here.
	case payloadU64:
		if !size(8) {
			return fail("payload of %d bytes, not 8", len(p))
		}
		m.u64 = binary.LittleEndian.Uint64(p)
	case payloadVringState:
		if !size(8) {
			return fail("payload of %d bytes, not 8", len(p))
		}
		m.ring, m.num = binary.LittleEndian.Uint32(p), binary.LittleEndian.Uint32(p[4:])
	case payloadVringFD:
		if !size(8) {
			return fail("payload of %d bytes, not 8", len(p))
		}
		v := binary.LittleEndian.Uint64(p)
		if v&^(vringIndexMask|vringNoFD) != 0 {
			return fail("unknown bits in %#x", v)
		}
		m.ring, m.noFD = uint32(v&vringIndexMask), v&vringNoFD != 0
		if !m.noFD {
			wantFDs = 1
		}
	case payloadVringAddr:
		if !size(40) {
			return fail("payload of %d bytes, not 40", len(p))
		}
		m.addr = vringAddr{
			index: binary.LittleEndian.Uint32(p),
			flags: binary.LittleEndian.Uint32(p[4:]),
			desc:  binary.LittleEndian.Uint64(p[8:]),
			used:  binary.LittleEndian.Uint64(p[16:]),
			avail: binary.LittleEndian.Uint64(p[24:]),
			log:   binary.LittleEndian.Uint64(p[32:]),
		}
	case payloadMemTable:
		if len(p) < 8 {
			return fail("payload of %d bytes", len(p))
		}
		n := binary.LittleEndian.Uint32(p)
		if n == 0 || n > maxRegions {
			return fail("%d regions, not 1 to %d", n, maxRegions)
		}
		if !size(8 + int(n)*regionSize) {
			return fail("payload of %d bytes for %d regions", len(p), n)
		}
		for b := p[8:]; len(b) > 0; b = b[regionSize:] {
			m.regions = append(m.regions, memRegion{
				guest:  binary.LittleEndian.Uint64(b),
				size:   binary.LittleEndian.Uint64(b[8:]),
				user:   binary.LittleEndian.Uint64(b[16:]),
				offset: binary.LittleEndian.Uint64(b[24:]),
			})
		}
		if err := checkRegions(m.regions); err != nil {
			return fail("%v", err)
		}
		wantFDs = int(n)
	case payloadConfig:
		if len(p) < configHeader {
			return fail("payload of %d bytes", len(p))
		}
		off, n := binary.LittleEndian.Uint32(p), binary.LittleEndian.Uint32(p[4:])
		if n == 0 || n > maxConfigSize || off > maxConfigSize-n {
			return fail("%d bytes at %d are not within the %d of the configuration space", n, off, maxConfigSize)
		}
		if !size(configHeader + int(n)) {
			return fail("payload of %d bytes for %d of configuration", len(p), n)
		}
		m.config = configAccess{offset: off, flags: binary.LittleEndian.Uint32(p[8:]), data: p[configHeader:]}
	}
	if fds != wantFDs {
		return fail("%d file descriptors, not %d", fds, wantFDs)
	}
	return m, nil
}

// checkRegions refuses pieces that are empty or wrap around. That they are
// disjoint and within their files is found out where they are mapped.
func checkRegions(rs []memRegion) error {
	for _, r := range rs {
		switch {
		case r.size == 0:
			return fmt.Errorf("region at %#x is empty", r.guest)
		case r.guest > math.MaxUint64-r.size, r.user > math.MaxUint64-r.size:
			return fmt.Errorf("region of %#x bytes at %#x (user address %#x) wraps around", r.size, r.guest, r.user)
		case r.offset > math.MaxInt64-r.size, r.size > math.MaxInt64:
			return fmt.Errorf("region of %#x bytes at file offset %#x is too large", r.size, r.offset)
		}
	}
	return nil
}

// take hands over the message's only descriptor.
func (m *message) take() int {
	fd := m.fds[0]
	m.fds = m.fds[1:]
	return fd
}

// close drops the descriptors that nobody took.
func (m *message) close() {
	closeFDs(m.fds)
	m.fds = nil
}

func closeFDs(fds []int) {
	for _, fd := range fds {
		unix.Close(fd)
	}
}

// reply builds the answer to m with the given payload.
func (m *message) reply(payload ...[]byte) []byte {
	b := make([]byte, headerSize, headerSize+configHeader+maxConfigSize)
	for _, p := range payload {
		b = append(b, p...)
	}
	binary.LittleEndian.PutUint32(b, uint32(m.request))
	binary.LittleEndian.PutUint32(b[4:], flagVersion|flagReply)
	binary.LittleEndian.PutUint32(b[8:], uint32(len(b)-headerSize))
	return b
}

func (m *message) replyU64(v uint64) []byte {
	return m.reply(binary.LittleEndian.AppendUint64(nil, v))
}

func (m *message) replyVring(num uint32) []byte {
	b := binary.LittleEndian.AppendUint32(nil, m.ring)
	return m.reply(binary.LittleEndian.AppendUint32(b, num))
}

func (m *message) replyConfig(data []byte) []byte {
	b := binary.LittleEndian.AppendUint32(nil, m.config.offset)
	b = binary.LittleEndian.AppendUint32(b, uint32(len(data)))
	b = binary.LittleEndian.AppendUint32(b, m.config.flags)
	return m.reply(b, data)
}
