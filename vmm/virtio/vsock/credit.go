package vsock

// credit is the flow control of one connection in both directions (virtio 1.2
// §5.10.6.3). The counters are free-running and wrap.
type credit struct {
	// What the guest sends us.
	alloc     uint32 // our buf_alloc, constant
	received  uint32 // bytes the guest sent
	forwarded uint32 // of these, bytes that left our buffer: our fwd_cnt
	told      uint32 // forwarded, as the guest was last told

	// What we send the guest, as its last packet said.
	peerAlloc     uint32
	peerForwarded uint32
	sent          uint32
}

// observe takes note of the guest's buffer as its packet describes it.
func (c *credit) observe(h *header) {
	c.peerAlloc = h.bufAlloc
	c.peerForwarded = h.fwdCnt
}

// space returns how many bytes the guest has room for. A guest that shrinks its
// buffer or counts nonsense has none.
func (c *credit) space() uint32 {
	used := c.sent - c.peerForwarded
	if used >= c.peerAlloc {
		return 0
	}
	return c.peerAlloc - used
}

// receive counts n bytes from the guest; false if it had no credit for them.
func (c *credit) receive(n uint32) bool {
	if uint64(c.received-c.forwarded)+uint64(n) > uint64(c.alloc) {
		return false
	}
	c.received += n
	return true
}

// updateDue reports that the guest should be told of the bytes forwarded even
// if no other packet goes its way. At three quarters of the buffer the guest has
// hardly stopped yet; a guest that did stop always gets there, since then
// everything in the buffer counts. Linux uses no more of our buffer than its own
// buffer's size, which is the program's to choose.
func (c *credit) updateDue() bool {
	fresh := c.forwarded - c.told
	return fresh > 0 && fresh >= min(c.alloc, c.peerAlloc)/4*3
}

// stamp writes our side into a packet to the guest.
func (c *credit) stamp(h *header) {
	h.bufAlloc = c.alloc
	h.fwdCnt = c.forwarded
	c.told = c.forwarded
}
