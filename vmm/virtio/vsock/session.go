package vsock

import (
	"fmt"
	"os"
	"strconv"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"github.com/wsl2/wsl2/vmm/virtio"
)

const (
	// firstHostPort to lastHostPort are the ports that stand for host clients.
	firstHostPort = 1 << 30
	lastHostPort  = 1<<31 - 1

	// maxPacket is the most data in one packet (VIRTIO_VSOCK_MAX_PKT_BUF_SIZE).
	maxPacket = 64 << 10

	// maxBurst is how many rx buffers one read fills at most: 64 KiB of Linux's.
	maxBurst = 18

	// txBatch and rxBatch bound how long one direction keeps the other waiting.
	txBatch = 64 // packets
	rxBatch = 64 // turns, each at most maxBurst packets

	// maxReplies: with so many RSTs waiting for rx buffers no more packets are
	// taken that might need another one. A driver that reads gets on.
	maxReplies = queueSize

	// expireRounds: a loop that is too busy to wait looks at the clock that often.
	expireRounds = 4096

	// txDelay is how long the driver may wait to hear that a packet was taken from
	// it. It only frees the packet's memory then, and every interrupt, that for an
	// answer first of all, makes it look at all queues: one of its own would be one
	// more for most packets. A driver that runs out of descriptors waits, hence
	// half of the queue is told at once.
	txDelay = 10 * time.Millisecond

	// acceptRetry is when to try again after running out of descriptors.
	acceptRetry = time.Second
)

// session is one life of the device, from Start to Stop.
type session struct {
	d        *Device
	guestCID uint64
	vs       virtio.Session
	rx       rxPool
	tx       *virtio.Queue
	poll     *poller

	stopFD int           // eventfd
	done   chan struct{} // closed when run ended
	live   atomic.Int32  // connections in all states; run changes it

	// All below is owned by run.

	stopping bool
	conns    map[key]*conn // requested, established, closing
	sockets  []*conn       // by fd
	lastGen  int
	timers   timers
	deadline time.Time // when to look at the timers, and at stalled; zero: never
	// stalled: accept failed for want of descriptors or memory; try again.
	stalled bool

	// unannounced counts the tx packets that were returned to the driver without a
	// notification; announceBy is when it is due. See txDelay.
	unannounced int
	announceBy  time.Time

	ready   []*conn // with something to send to the guest, in turns
	replies []header

	gathered gathered
	taken    []uint16 // tx chains that are not returned to the driver yet

	// Scratch memory, here so that none escapes per packet.
	txChain virtio.Chain
	txIov   []unix.Iovec
	rxIov   []unix.Iovec
	msg     unix.Msghdr
	line    [512]byte
	lineIov [1]unix.Iovec
}

func newSession(d *Device, vs virtio.Session) (_ *session, err error) {
	s := &session{
		d: d, guestCID: d.cfg.GuestCID, vs: vs,
		rx: rxPool{q: vs.Queues[queueRX]}, tx: vs.Queues[queueTX],
		stopFD: -1,
		done:   make(chan struct{}),
		conns:  map[key]*conn{},
	}
	s.lineIov[0] = iovec(s.line[:])
	defer func() {
		if err != nil {
			s.release()
		}
	}()
	if s.poll, err = newPoller(); err != nil {
		return nil, err
	}
	if s.stopFD, err = unix.Eventfd(0, unix.EFD_CLOEXEC|unix.EFD_NONBLOCK); err != nil {
		return nil, os.NewSyscallError("eventfd", err)
	}
	for _, w := range []struct{ fd, ref int }{
		{s.stopFD, eventStop},
		{s.tx.KickFD(), eventTX},
		{s.rx.q.KickFD(), eventRX},
		{d.listener, eventListener},
	} {
		if err := s.poll.add(w.fd, w.ref, unix.EPOLLIN); err != nil {
			return nil, err
		}
	}
	return s, nil
}

// stop ends run.
func (s *session) stop() {
	var one = [8]byte{1}
	_, _ = unix.Write(s.stopFD, one[:])
	<-s.done
}

// release closes what newSession opened; run must have ended.
func (s *session) release() {
	if s.poll != nil {
		s.poll.close()
	}
	if s.stopFD >= 0 {
		unix.Close(s.stopFD)
	}
}

// run serves the session until stop, or until the guest breaks a queue.
// Either way it closes the host's connections.
func (s *session) run() {
	defer close(s.done)
	err := s.loop()
	s.closeAll()
	if err == nil {
		s.rx.release()
		s.announce()
		return
	}
	// From now on connecting is refused; who waits to be accepted learns it too.
	_ = unix.Shutdown(s.d.listener, unix.SHUT_RDWR)
	s.refuseAll()
	s.vs.Failed(err)
}

func (s *session) loop() error {
	for round := 0; ; round++ {
		more, err := s.serveTX()
		if err != nil {
			return err
		}
		moreRX, starved, err := s.serveRX()
		if err != nil {
			return err
		}
		if s.unannounced >= int(s.tx.Size())/2 {
			s.announce()
		}
		s.rx.q.Notify()

		block := !more && !moreRX
		if block && len(s.replies) < maxReplies {
			block = !s.tx.Arm()
		}
		if block && starved {
			block = !s.rx.q.Arm()
		}
		expired := false
		if block {
			if expired, err = s.poll.wait(s.waitUntil()); err != nil {
				return fmt.Errorf("vsock: %w", err)
			}
			s.tx.Disarm()
			s.rx.q.Disarm()
		} else {
			s.poll.poll()
		}
		for i := range s.poll.n {
			if err := s.dispatch(&s.poll.events[i]); err != nil {
				return err
			}
		}
		if s.stopping {
			return nil
		}
		if expired || round%expireRounds == 0 {
			s.expire(time.Now())
		}
	}
}

func (s *session) dispatch(ev *unix.EpollEvent) error {
	switch ref := int(ev.Pad); ref {
	case eventRX, eventTX: // looked at in every round
	case eventStop:
		s.stopping = true
	case eventListener:
		return s.acceptAll()
	default:
		// The event may be older than the socket: its fd was used again since.
		if c := s.sockets[ev.Fd]; c != nil && c.gen == ref {
			s.hostEvent(c, ev.Events)
		}
	}
	return nil
}

// serveTX takes packets from the guest; more if there may be further ones.
func (s *session) serveTX() (more bool, err error) {
	defer s.returnTaken()
	for range txBatch {
		if len(s.replies) >= maxReplies {
			return false, nil
		}
		ok, err := s.tx.Pop(&s.txChain)
		if !ok || err != nil {
			return false, err
		}
		s.taken = append(s.taken, s.txChain.Head)
		h, iov, err := parsePacket(s.txChain.Readable, s.txIov[:0])
		s.txIov = iov[:0]
		if err != errShortPacket {
			s.guestPacket(&h, iov, err == nil)
		}
	}
	return true, nil
}

// returnTaken gives the packets that were taken back to the driver, once their
// data has gone.
func (s *session) returnTaken() {
	s.passOn()
	if len(s.taken) == 0 {
		return
	}
	for _, head := range s.taken {
		s.tx.Push(head, 0)
	}
	if s.unannounced == 0 {
		s.announceBy = time.Now().Add(s.d.txDelay)
	}
	s.unannounced += len(s.taken)
	s.taken = s.taken[:0]
}

// announce tells the driver of the packets that were taken from it.
func (s *session) announce() {
	s.unannounced = 0
	s.tx.Notify()
}

// waitUntil is when something has to be done even if nothing happens.
func (s *session) waitUntil() time.Time {
	if s.unannounced > 0 && (s.deadline.IsZero() || s.announceBy.Before(s.deadline)) {
		return s.announceBy
	}
	return s.deadline
}

// guestPacket handles one packet of the guest; without valid its length was
// beyond its buffers.
func (s *session) guestPacket(h *header, iov []unix.Iovec, valid bool) {
	if h.op != opRW || !valid {
		s.passOn()
	}
	if h.srcCID != s.guestCID {
		return // there is nobody to answer to
	}
	if h.dstCID != hostCID || h.typ != typeStream {
		s.refuse(h)
		return
	}
	c := s.conns[makeKey(h.srcPort, h.dstPort)]
	if c != nil && c.state == stateClosing && h.op == opRequest {
		// Linux forgets a socket when we shut it down, even if its program has
		// data left to read: its port may come back before its RST.
		delete(s.conns, c.key)
		s.free(c)
		c = nil
	}
	if c == nil {
		if h.op == opRequest && valid {
			s.guestConnect(h)
		} else {
			s.refuse(h)
		}
		return
	}
	c.observe(h)
	if c.space() > 0 {
		c.asked = false
	}
	switch {
	case h.op == opRST:
		s.guestGone(c)
		return
	case !valid:
		s.reset(c)
		return
	case c.state == stateClosing:
		if h.op == opShutdown && h.flags&shutdownBoth == shutdownBoth {
			s.reset(c)
		}
		return // on its way when the guest was told
	case c.state == stateRequested:
		if h.op == opResponse && c.owe&oweRequest == 0 {
			s.established(c)
		} else {
			s.reset(c)
		}
		return
	}
	switch h.op {
	case opRW:
		s.deliver(c, iov, h.len)
	case opShutdown:
		s.guestShutdown(c, h.flags)
	case opCreditUpdate: // observed above; a smaller buffer may make an update due
		s.tellCredit(c)
	case opCreditRequest:
		c.owe |= oweCreditUpdate
		s.enqueue(c)
	default:
		s.reset(c)
	}
	if c.hasData() {
		s.enqueue(c)
	}
}

// refuse answers a packet that belongs to no connection.
func (s *session) refuse(h *header) {
	if h.op != opRST {
		s.replies = append(s.replies, h.reply())
	}
}

// guestConnect handles a REQUEST: the unix socket Path_PORT must listen.
// Connecting to one never blocks; a full backlog refuses.
func (s *session) guestConnect(h *header) {
	if int(s.live.Load()) >= s.d.cfg.MaxConns {
		s.refuse(h)
		return
	}
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		s.refuse(h)
		return
	}
	path := s.d.cfg.Path + "_" + strconv.FormatUint(uint64(h.dstPort), 10)
	if unix.Connect(fd, &unix.SockaddrUnix{Name: path}) != nil {
		unix.Close(fd)
		s.refuse(h)
		return
	}
	c := s.newConn(fd)
	c.key = makeKey(h.srcPort, h.dstPort)
	c.state = stateEstablished
	c.alloc = bufAlloc(int(s.live.Load()))
	c.observe(h)
	c.owe |= oweResponse
	s.conns[c.key] = c
	s.enqueue(c)
	if s.addSocket(c) != nil {
		s.reset(c)
	}
}

// acceptAll takes the host's new connections.
func (s *session) acceptAll() error {
	for {
		fd, _, err := unix.Accept4(s.d.listener, unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK)
		switch err {
		case nil:
		case unix.EINTR, unix.ECONNABORTED:
			continue
		case unix.EAGAIN:
			s.stalled = false
			return nil
		case unix.EMFILE, unix.ENFILE, unix.ENOMEM, unix.ENOBUFS:
			s.stalled = true
			if retry := time.Now().Add(acceptRetry); s.deadline.IsZero() || retry.Before(s.deadline) {
				s.deadline = retry
			}
			return nil
		default:
			return fmt.Errorf("vsock: accept on %s: %w", s.d.cfg.Path, err)
		}
		if int(s.live.Load()) >= s.d.cfg.MaxConns {
			unix.Close(fd)
			continue
		}
		c := s.newConn(fd)
		c.state = stateConnecting
		c.readable = true
		// Most clients have sent their line by now. Reading before epoll knows
		// the socket saves an event for data that is already read.
		s.readLine(c)
		if c.state != stateClosed && s.addSocket(c) != nil {
			s.reset(c)
		}
	}
}

func (s *session) newConn(fd int) *conn {
	s.lastGen = (s.lastGen + 1) & (1<<31 - 1)
	s.live.Add(1)
	for len(s.sockets) <= fd {
		s.sockets = append(s.sockets, nil)
	}
	c := &conn{fd: fd, gen: s.lastGen, burst: 1}
	s.sockets[fd] = c
	return c
}

func (s *session) addSocket(c *conn) error {
	return s.poll.add(c.fd, c.gen, unix.EPOLLIN|unix.EPOLLRDHUP)
}

// freePort returns a host port that no connection to guestPort has.
func (s *session) freePort(guestPort uint32) uint32 {
	for {
		p := s.d.nextPort
		if s.d.nextPort++; s.d.nextPort > lastHostPort {
			s.d.nextPort = firstHostPort
		}
		if _, used := s.conns[makeKey(guestPort, p)]; !used {
			return p
		}
	}
}

// enqueue gives c a turn to send to the guest.
func (s *session) enqueue(c *conn) {
	if !c.queued {
		c.queued = true
		s.ready = append(s.ready, c)
	}
}

// serveRX sends what is ready for the guest. starved: it needs rx buffers; more:
// it should be called again.
func (s *session) serveRX() (more, starved bool, err error) {
	sent := 0
	for ; sent < len(s.replies); sent++ {
		if n, err := s.rx.fill(1); n == 0 {
			s.replies = s.replies[:copy(s.replies, s.replies[sent:])]
			return false, err == nil, err
		}
		s.rx.send(&s.replies[sent])
	}
	s.replies = s.replies[:0]

	turn := 0
	for ; turn < len(s.ready) && turn < rxBatch; turn++ {
		c := s.ready[turn]
		c.queued = false
		again, err := s.transmit(c)
		if err != nil {
			return false, false, err
		}
		if again {
			s.enqueue(c) // behind all others
			if n, err := s.rx.fill(1); n == 0 {
				starved = true
				if err != nil {
					return false, false, err
				}
				turn++
				break
			}
		}
	}
	n := copy(s.ready, s.ready[turn:])
	clear(s.ready[n:])
	s.ready = s.ready[:n]
	return n > 0 && !starved, starved, nil
}

// transmit gives c its turn: the packets it owes and one burst of data. again
// if there is more, or no buffer was left.
func (s *session) transmit(c *conn) (again bool, err error) {
	if c.state != stateRequested && c.state != stateEstablished {
		return false, nil
	}
	for _, owed := range [...]struct {
		bit uint8
		op  uint16
	}{{oweRequest, opRequest}, {oweResponse, opResponse}} {
		if c.owe&owed.bit == 0 {
			continue
		}
		if ok, err := s.control(c, owed.op, 0); !ok {
			return true, err
		}
		c.owe &^= owed.bit
	}
	if c.state == stateRequested {
		if !c.inTimers {
			s.startTimer(c)
		}
		return false, nil
	}
	if c.hasData() {
		switch space := c.space(); {
		case space > 0:
			if ok, err := s.sendData(c, space); !ok {
				return true, err
			}
		case !c.asked:
			c.asked = true
			c.owe |= oweCreditRequest
		}
	}
	if c.owe&oweCreditUpdate != 0 {
		if ok, err := s.control(c, opCreditUpdate, 0); !ok {
			return true, err
		}
	}
	if c.owe&oweCreditRequest != 0 {
		if ok, err := s.control(c, opCreditRequest, 0); !ok {
			return true, err
		}
		c.owe &^= oweCreditRequest
	}
	if c.shutdown&^c.told != 0 {
		if ok, err := s.control(c, opShutdown, c.shutdown); !ok {
			return true, err
		}
		c.told = c.shutdown
		if c.told == shutdownBoth {
			s.closing(c)
			return false, nil
		}
	}
	return c.hasData() && c.space() > 0, nil
}

// control sends a packet without data; ok is false if there is no buffer for it.
func (s *session) control(c *conn, op uint16, flags uint32) (ok bool, err error) {
	if n, err := s.rx.fill(1); n == 0 {
		return false, err
	}
	h := s.header(c, op)
	h.flags = flags
	s.rx.send(&h)
	return true, nil
}

// sendData moves at most space bytes from the host's socket into rx buffers; ok
// is false if there is none.
func (s *session) sendData(c *conn, space uint32) (ok bool, err error) {
	held, err := s.rx.fill(c.burst)
	if held == 0 {
		return false, err
	}
	iov := s.rxIov[:0]
	var total, used uint32
	buffers := s.rx.buffers()[:min(held, c.burst)]
	for _, b := range buffers {
		var n uint32
		iov, n = b.appendRoom(iov, space-total)
		if total += n; total == space {
			break
		}
	}
	s.rxIov = iov[:0]

	var n uint32
	if len(c.early) > 0 {
		n = copyEarly(c, iov)
	} else {
		m, errno := readv(c.fd, iov)
		switch {
		case errno == unix.EAGAIN:
			c.readable = false
			return true, nil
		case errno != 0 || m == 0:
			// ECONNRESET: the host closed without reading all that the guest sent.
			c.dead = c.dead || errno != 0
			c.eof = true
			c.readable = false
			s.endOfFile(c)
			return true, nil
		}
		n = uint32(m)
		if n < total && !c.hangup {
			c.readable = false // a new edge tells of more
		}
	}
	c.sent += n
	for left := n; left > 0; used++ {
		h := s.header(c, opRW)
		h.len = min(left, buffers[used].room)
		left -= h.len
		s.rx.send(&h)
	}
	// A read that fills all it was offered is probably a stream's.
	if n == total {
		c.burst = min(4*c.burst, maxBurst)
	} else {
		c.burst = int(max(used, 1))
	}
	return true, nil
}

// endOfFile notes what the guest has to be told once the host's data is sent.
func (s *session) endOfFile(c *conn) {
	c.shutdown |= shutdownSend
	if c.dead {
		s.loseWriter(c)
	}
}

// copyEarly is readv from c.early.
func copyEarly(c *conn, iov []unix.Iovec) (n uint32) {
	for _, v := range iov {
		m := copy(iovecBytes(v), c.early)
		n += uint32(m)
		if c.early = c.early[m:]; len(c.early) == 0 {
			c.early = nil
			break
		}
	}
	return n
}

// startTimer gives the guest answerTimeout from now on to answer c.
func (s *session) startTimer(c *conn) {
	s.timers.add(c, time.Now().Add(s.d.answerTimeout))
	if s.deadline.IsZero() {
		s.deadline = c.deadline
	}
}

// expire does what is due by now: it announces packets, resets the connections
// whose guest did not answer in time, and tries again to accept.
func (s *session) expire(now time.Time) {
	if s.unannounced > 0 && !now.Before(s.announceBy) {
		s.announce()
	}
	if s.deadline.IsZero() || now.Before(s.deadline) {
		return
	}
	s.deadline = time.Time{}
	for c := s.timers.first; c != nil && !c.deadline.After(now); c = s.timers.first {
		s.reset(c)
	}
	if c := s.timers.first; c != nil {
		s.deadline = c.deadline
	}
	if s.stalled {
		_ = s.acceptAll() // sets a deadline again if it must
	}
}

// closeAll ends every connection on the host's side.
func (s *session) closeAll() {
	for _, c := range s.sockets {
		if c != nil {
			s.free(c)
		}
	}
	for _, c := range s.conns {
		s.free(c) // closing: without a socket
	}
	clear(s.conns)
	clear(s.ready)
	s.ready = s.ready[:0]
	s.replies = s.replies[:0]
}

// refuseAll closes the host's new connections at once.
func (s *session) refuseAll() {
	for {
		fd, _, err := unix.Accept4(s.d.listener, unix.SOCK_CLOEXEC)
		if err == unix.EINTR || err == unix.ECONNABORTED {
			continue
		}
		if err != nil {
			return
		}
		unix.Close(fd)
	}
}
