package vsock

import (
	"strconv"
	"time"

	"golang.org/x/sys/unix"
)

// state is where a connection is in its life; see the drawing in doc.go.
type state uint8

const (
	stateConnecting  state = iota // waits for the CONNECT line of the host
	stateRequested                // waits for the guest's answer to REQUEST
	stateEstablished              // carries data
	stateClosing                  // host socket closed, guest told; waits for its RST
	stateLingering                // guest done, out of the table; the host has data to take
	stateClosed
)

// Packets that a connection owes the guest, besides SHUTDOWN.
const (
	oweRequest = 1 << iota
	oweResponse
	oweCreditUpdate
	oweCreditRequest
)

// key is a connection's two ports: guest<<32 | host.
type key uint64

func makeKey(guestPort, hostPort uint32) key { return key(guestPort)<<32 | key(hostPort) }

func (k key) guestPort() uint32 { return uint32(k >> 32) }
func (k key) hostPort() uint32  { return uint32(k) }

// conn is one connection. The session's goroutine owns it.
type conn struct {
	key   key // 0 while connecting
	state state
	credit
	deadline time.Time // while requested or closing

	// The unix socket. fd is -1 once it is closed; gen tells its events from
	// those of the fd's earlier users.
	fd, gen  int
	readable bool // a read may find something; epoll is edge-triggered
	hangup   bool // the host shut down its sending side: read on until the end of file
	dead     bool // the host closed: nothing goes either way any more
	watchOut bool // epoll reports when a write would fit again
	grown    bool // SO_SNDBUF was raised

	// early is what followed the CONNECT line, or a part of the line itself.
	early []byte
	// backlog is guest data that the host has not taken yet.
	backlog backlog

	eof      bool // the host's data is all sent
	noRead   bool // the guest will not receive any more
	noWrite  bool // the host will not receive any more: guest data is dropped
	guestEnd bool // the guest will not send any more

	owe      uint8
	asked    bool   // CREDIT_REQUEST was sent since the guest last had room
	shutdown uint32 // SHUTDOWN flags the guest has to be told
	told     uint32 // SHUTDOWN flags it was told

	// burst is how many rx buffers the next read is offered; it follows the stream.
	burst int

	queued     bool // in session.ready
	prev, next *conn
	inTimers   bool
}

// hasData reports that there is, or may be, data for the guest.
func (c *conn) hasData() bool {
	return c.state == stateEstablished && !c.eof && !c.noRead && (len(c.early) > 0 || c.readable)
}

// bufAlloc is the buffer a new connection announces, and so the most memory
// that a guest can make it hold. With the default limit of 4096 connections
// all buffers together stay below 140 MiB.
func bufAlloc(live int) uint32 {
	switch {
	case live < 128:
		return 256 << 10 // what Linux announces
	case live < 1024:
		return 64 << 10
	}
	return 16 << 10
}

// hostEvent handles what epoll says of c's socket.
func (s *session) hostEvent(c *conn, events uint32) {
	if events&(unix.EPOLLIN|unix.EPOLLRDHUP|unix.EPOLLHUP|unix.EPOLLERR) != 0 {
		c.readable = true
	}
	if events&(unix.EPOLLRDHUP|unix.EPOLLHUP|unix.EPOLLERR) != 0 {
		c.hangup = true
	}
	if events&(unix.EPOLLHUP|unix.EPOLLERR) != 0 {
		c.dead = true
	}
	switch c.state {
	case stateConnecting:
		s.readLine(c)
	case stateEstablished:
		if events&unix.EPOLLOUT != 0 {
			s.flush(c)
		}
		s.hostChanged(c)
	case stateLingering:
		if c.dead {
			s.free(c)
		} else if events&unix.EPOLLOUT != 0 {
			s.flush(c)
		}
	}
}

// hostChanged draws the conclusions from c's flags. c is established.
func (s *session) hostChanged(c *conn) {
	if c.dead {
		s.loseWriter(c)
		if c.noRead {
			c.eof = true
		}
	}
	if c.eof {
		c.shutdown |= shutdownSend
	}
	if c.hasData() || c.shutdown&^c.told != 0 {
		s.enqueue(c)
	}
}

// loseWriter notes that the host takes no more data.
func (s *session) loseWriter(c *conn) {
	if c.noWrite {
		return
	}
	c.noWrite = true
	c.forwarded += uint32(c.backlog.len())
	c.backlog = backlog{}
	c.shutdown |= shutdownReceive
	s.enqueue(c)
}

// readLine reads the CONNECT line and, if it is whole, asks the guest.
func (s *session) readLine(c *conn) {
	for c.state == stateConnecting && c.readable {
		n, errno := readv(c.fd, s.lineIov[:])
		switch {
		case errno == unix.EAGAIN:
			c.readable = false
			return
		case errno != 0 || n == 0:
			s.free(c)
			return
		}
		if n < len(s.line) && !c.hangup {
			c.readable = false
		}
		c.early = append(c.early, s.line[:n]...)
		port, used, err := parseConnect(c.early)
		if err != nil {
			s.free(c)
			return
		}
		if used > 0 {
			c.early = c.early[used:]
			s.request(c, port)
		}
	}
}

// request sends the guest a REQUEST for c.
func (s *session) request(c *conn, guestPort uint32) {
	port := s.freePort(guestPort)
	c.key = makeKey(guestPort, port)
	c.state = stateRequested
	c.alloc = bufAlloc(int(s.live.Load()))
	c.owe |= oweRequest
	s.conns[c.key] = c
	s.enqueue(c)
}

// established handles the guest's RESPONSE.
func (s *session) established(c *conn) {
	s.timers.remove(c)
	c.state = stateEstablished
	line := append(s.line[:0], "OK "...)
	line = strconv.AppendUint(line, uint64(c.key.hostPort()), 10)
	line = append(line, '\n')
	// An empty socket buffer takes a line whole. If the host is gone already
	// its data still goes to the guest.
	if n, _ := write(c.fd, line); n != len(line) {
		s.loseWriter(c)
	}
	s.hostChanged(c)
}

// gathered is the data of packets that one connection sent in a row: one write
// passes it on, and its reader wakes once.
type gathered struct {
	c   *conn // nil: nothing
	iov []unix.Iovec
	n   uint32
}

// deliver passes n bytes of guest data on to the host, at the latest with the
// next passOn. Until then iov's memory is the device's.
func (s *session) deliver(c *conn, iov []unix.Iovec, n uint32) {
	if c.guestEnd || !c.receive(n) {
		s.passOn()
		s.reset(c)
		return
	}
	g := &s.gathered
	if g.c != c || len(g.iov)+len(iov) > maxIovecs {
		s.passOn()
	}
	switch {
	case n == 0:
	case c.noWrite:
		c.forwarded += n
	case c.backlog.len() > 0:
		s.keep(c, iov, n)
	default:
		g.c = c
		g.iov = append(g.iov, iov...)
		g.n += n
	}
}

// passOn writes what was gathered.
func (s *session) passOn() {
	c, iov, n := s.gathered.c, s.gathered.iov, s.gathered.n
	if c == nil {
		return
	}
	s.gathered = gathered{iov: iov[:0]}
	for len(iov) > 0 {
		w, errno := writev(c.fd, iov, &s.msg)
		if errno == unix.EAGAIN {
			if !s.growBuffer(c) {
				break
			}
			continue
		}
		if errno != 0 {
			c.forwarded += n
			s.loseWriter(c)
			return
		}
		c.forwarded += uint32(w)
		n -= uint32(w)
		iov = skip(iov, w)
	}
	if n > 0 {
		s.keep(c, iov, n)
	}
	s.tellCredit(c)
}

// keep holds n bytes until the host's socket has room.
func (s *session) keep(c *conn, iov []unix.Iovec, n uint32) {
	c.backlog.append(iov, int(n))
	if !c.watchOut {
		c.watchOut = true
		s.watch(c)
	}
}

// growBuffer raises the socket's send buffer, once: then all the guest may send
// usually fits and need not be copied twice. Most connections never need it.
func (s *session) growBuffer(c *conn) bool {
	if c.grown {
		return false
	}
	c.grown = true
	// The kernel doubles the value for its bookkeeping and caps it at wmem_max.
	return unix.SetsockoptInt(c.fd, unix.SOL_SOCKET, unix.SO_SNDBUF, int(c.alloc)) == nil
}

// tellCredit sends a CREDIT_UPDATE if it is time for one.
func (s *session) tellCredit(c *conn) {
	if c.state == stateEstablished && c.updateDue() {
		c.owe |= oweCreditUpdate
		s.enqueue(c)
	}
}

// flush writes c's backlog until the socket is full.
func (s *session) flush(c *conn) {
	for c.backlog.len() > 0 {
		n, errno := write(c.fd, c.backlog.data())
		if errno == unix.EAGAIN {
			s.tellCredit(c)
			return
		}
		if errno != 0 {
			s.loseWriter(c)
			break
		}
		c.backlog.drop(n)
		c.forwarded += uint32(n)
	}
	if c.state == stateLingering {
		s.free(c)
		return
	}
	if c.watchOut {
		c.watchOut = false
		s.watch(c)
	}
	if c.guestEnd {
		_ = unix.Shutdown(c.fd, unix.SHUT_WR)
	}
	s.tellCredit(c)
}

// watch tells epoll what c waits for.
func (s *session) watch(c *conn) {
	events := uint32(unix.EPOLLIN | unix.EPOLLRDHUP)
	if c.watchOut {
		events |= unix.EPOLLOUT
	}
	if err := s.poll.modify(c.fd, c.gen, events); err != nil {
		s.reset(c) // cannot happen but for want of kernel memory
	}
}

// guestShutdown handles a SHUTDOWN packet of an established connection.
func (s *session) guestShutdown(c *conn, flags uint32) {
	if flags&shutdownSend != 0 && !c.guestEnd {
		c.guestEnd = true
		// Not if all is over: the host would see a half-close for a moment, and not that
		// the guest has gone.
		if c.backlog.len() == 0 && flags&shutdownReceive == 0 && !c.noRead {
			_ = unix.Shutdown(c.fd, unix.SHUT_WR)
		}
	}
	if flags&shutdownReceive != 0 && !c.noRead {
		c.noRead = true
		c.early = nil
		_ = unix.Shutdown(c.fd, unix.SHUT_RD)
	}
	if c.guestEnd && c.noRead {
		s.sendRST(c)
		s.discardInput(c)
		s.guestGone(c)
	}
}

// discardInput reads what the host sent in vain: closing a unix socket with
// unread data makes the other side's end of file an ECONNRESET.
func (s *session) discardInput(c *conn) {
	for {
		if n, errno := readv(c.fd, s.lineIov[:]); n == 0 || errno != 0 {
			return
		}
	}
}

// guestGone ends the guest's part of c. What the guest sent is still delivered.
func (s *session) guestGone(c *conn) {
	delete(s.conns, c.key)
	if c.fd < 0 || c.noWrite || c.backlog.len() == 0 {
		s.free(c)
		return
	}
	_ = unix.Shutdown(c.fd, unix.SHUT_RD)
	c.state = stateLingering
}

// closing ends the host's part of c after the guest was told of both ends.
func (s *session) closing(c *conn) {
	s.closeSocket(c)
	c.state = stateClosing
	s.startTimer(c)
}

// sendRST queues an RST for c.
func (s *session) sendRST(c *conn) {
	h := s.header(c, opRST)
	s.replies = append(s.replies, h)
}

// reset ends c on both sides at once.
func (s *session) reset(c *conn) {
	switch c.state {
	case stateClosed:
		return
	case stateRequested, stateEstablished, stateClosing:
		if c.owe&oweRequest == 0 { // else the guest knows nothing of it
			s.sendRST(c)
		}
		delete(s.conns, c.key)
	}
	s.free(c)
}

// closeSocket closes the unix socket; epoll forgets it by that.
func (s *session) closeSocket(c *conn) {
	if c.fd < 0 {
		return
	}
	s.sockets[c.fd] = nil
	unix.Close(c.fd)
	c.fd = -1
	c.early = nil
	c.backlog = backlog{}
}

// free forgets c, which must be out of the table.
func (s *session) free(c *conn) {
	if c.state == stateClosed {
		return
	}
	s.closeSocket(c)
	s.timers.remove(c)
	c.state = stateClosed
	s.live.Add(-1)
}

// header returns the header of a packet of c for the guest, without data.
func (s *session) header(c *conn, op uint16) header {
	h := header{
		srcCID: hostCID, dstCID: s.guestCID, srcPort: c.key.hostPort(), dstPort: c.key.guestPort(),
		typ: typeStream, op: op,
	}
	c.stamp(&h)
	c.owe &^= oweCreditUpdate
	return h
}

// timers is the list of connections that wait for the guest's answer, in the
// order of their deadlines.
type timers struct {
	first, last *conn
}

// answerTimeout is how long the guest may take to answer a REQUEST or a
// SHUTDOWN; Linux allows its peers 8 s too (VSOCK_CLOSE_TIMEOUT).
const answerTimeout = 8 * time.Second

func (t *timers) add(c *conn, deadline time.Time) {
	t.remove(c)
	c.deadline = deadline
	c.inTimers = true
	c.prev, c.next = t.last, nil
	if t.last == nil {
		t.first = c
	} else {
		t.last.next = c
	}
	t.last = c
}

func (t *timers) remove(c *conn) {
	if !c.inTimers {
		return
	}
	c.inTimers = false
	if c.prev == nil {
		t.first = c.next
	} else {
		c.prev.next = c.next
	}
	if c.next == nil {
		t.last = c.prev
	} else {
		c.next.prev = c.prev
	}
	c.prev, c.next = nil, nil
}
