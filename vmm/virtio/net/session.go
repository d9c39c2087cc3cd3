package net

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"sync/atomic"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/wsl2/wsl2/vmm/virtio"
)

const (
	// txBatch and rxBatch bound how long one direction keeps the other waiting.
	txBatch = 64
	rxBatch = 64

	// maxIovecs is IOV_MAX.
	maxIovecs = 1024
)

// What an event of the epoll set is about.
const (
	eventStop = iota
	eventKick // of either queue: both are looked at in every round
	eventLink
)

// session is one life of the device, from Start to Stop.
type session struct {
	d        *Device
	vs       virtio.Session
	rx, tx   *virtio.Queue
	epoll    int
	stopFD   int
	stopping atomic.Bool
	done     chan struct{}

	// All below is owned by run.

	// full: the link takes no more; readable: it may have a frame.
	full, readable bool
	told           bool // the link knows the session's features
	txChain        virtio.Chain
	txWaits        bool // txChain was popped and waits for the link

	// held are rx buffers that were popped and not used yet, oldest first; spare are
	// chains to pop into.
	held  []*virtio.Chain
	room  int // bytes of all that are held
	spare []*virtio.Chain

	// Scratch memory, here so that none escapes per frame.
	events [4]unix.EpollEvent
	iov    []unix.Iovec
	msg    unix.Msghdr
	header [HeaderLen]byte
	used   []virtio.Used
}

func newSession(d *Device, vs virtio.Session) (_ *session, err error) {
	s := &session{
		d: d, vs: vs, rx: vs.Queues[queueRX], tx: vs.Queues[queueTX],
		epoll: -1, stopFD: -1, done: make(chan struct{}),
	}
	defer func() {
		if err != nil {
			s.release()
		}
	}()
	if s.epoll, err = unix.EpollCreate1(unix.EPOLL_CLOEXEC); err != nil {
		return nil, fmt.Errorf("net: %w", os.NewSyscallError("epoll_create1", err))
	}
	if s.stopFD, err = unix.Eventfd(0, unix.EFD_CLOEXEC|unix.EFD_NONBLOCK); err != nil {
		return nil, fmt.Errorf("net: %w", os.NewSyscallError("eventfd", err))
	}
	for _, w := range []struct{ fd, event int }{{s.stopFD, eventStop}, {s.tx.KickFD(), eventKick}, {s.rx.KickFD(), eventKick}} {
		if err := s.watch(w.fd, w.event, unix.EPOLLIN); err != nil {
			return nil, err
		}
	}
	if d.link >= 0 {
		return s, s.useLink()
	}
	return s, nil
}

// watch adds a descriptor to the set, edge-triggered.
func (s *session) watch(fd, event int, events uint32) error {
	ev := unix.EpollEvent{Events: events | unix.EPOLLET, Fd: int32(event)}
	if err := unix.EpollCtl(s.epoll, unix.EPOLL_CTL_ADD, fd, &ev); err != nil {
		return fmt.Errorf("net: %w", os.NewSyscallError("epoll_ctl", err))
	}
	return nil
}

func (s *session) stop() {
	s.stopping.Store(true)
	s.tx.Close()
	_, _ = unix.Write(s.stopFD, []byte{1, 0, 0, 0, 0, 0, 0, 0})
	<-s.done
	s.release()
}

func (s *session) release() {
	for _, fd := range []int{s.epoll, s.stopFD} {
		if fd >= 0 {
			unix.Close(fd)
		}
	}
}

// run serves the session until stop, or until the guest breaks a queue.
func (s *session) run() {
	defer close(s.done)
	// A card that nobody uses has no thread (see virtio.Queue.Wait).
	err := s.tx.Wait()
	if err == nil {
		err = s.loop()
	}
	if errors.Is(err, os.ErrClosed) {
		return
	}
	if err == nil {
		s.giveBack()
		return
	}
	s.vs.Failed(err)
}

func (s *session) loop() error {
	for {
		moreTX, err := s.serveTX()
		if err != nil {
			return err
		}
		moreRX, starved, err := s.serveRX()
		if err != nil {
			return err
		}
		s.tx.Notify()
		s.rx.Notify()
		if s.stopping.Load() {
			return nil
		}
		block := !moreTX && !moreRX
		if block && !s.full {
			block = !s.tx.Arm()
		}
		if block && starved {
			block = !s.rx.Arm()
		}
		if !block && s.readable && !s.full {
			continue // there is no event to look for
		}
		if err := s.wait(block); err != nil {
			return err
		}
	}
}

// wait takes events, and blocks for them if it may.
func (s *session) wait(block bool) error {
	timeout := 0
	if block {
		timeout = -1
	}
	n, err := unix.EpollWait(s.epoll, s.events[:], timeout)
	if err != nil && err != unix.EINTR {
		return fmt.Errorf("net: %w", os.NewSyscallError("epoll_wait", err))
	}
	for i := range max(n, 0) {
		ev := &s.events[i]
		if ev.Fd != eventLink {
			continue
		}
		if ev.Events&(unix.EPOLLOUT|unix.EPOLLERR|unix.EPOLLHUP) != 0 {
			s.full = false
		}
		if ev.Events&^unix.EPOLLOUT != 0 {
			s.readable = true
		}
	}
	if block {
		s.tx.Disarm()
		s.rx.Disarm()
	}
	return nil
}

// open makes the link, unless it failed just now.
func (s *session) open() bool {
	if s.d.link >= 0 {
		return true
	}
	now := time.Now()
	if now.Before(s.d.retry) {
		return false
	}
	s.d.retry = now.Add(s.d.reopen)
	f, err := s.d.cfg.Open()
	if err == nil {
		s.d.link, err = unix.FcntlInt(f.Fd(), unix.F_DUPFD_CLOEXEC, 0)
		f.Close()
	}
	if err == nil {
		err = s.useLink()
	}
	if err != nil {
		s.d.report(err)
		s.dropLink()
		return false
	}
	return true
}

// useLink begins a session on the link that is open.
func (s *session) useLink() error {
	if err := unix.SetNonblock(s.d.link, true); err != nil {
		return os.NewSyscallError("fcntl", err)
	}
	s.readable, s.full = true, false
	if err := s.watch(s.d.link, eventLink, unix.EPOLLIN|unix.EPOLLOUT|unix.EPOLLRDHUP); err != nil {
		return err
	}
	s.told = false
	s.tell() // a peer that is gone, or full, is found out with the next frame
	return nil
}

// tell sends the record that begins a session, unless it has been sent; false if the link is full.
func (s *session) tell() bool {
	if !s.told {
		s.told = unix.Send(s.d.link, putFeatures(s.vs.Features), unix.MSG_NOSIGNAL|unix.MSG_DONTWAIT) != unix.EAGAIN
	}
	return s.told
}

func (s *session) dropLink() {
	if s.d.link >= 0 {
		unix.Close(s.d.link) // which takes it out of the set
		s.d.link = -1
	}
	s.readable, s.full = false, false
}

// lose drops a link that ended by itself.
func (s *session) lose(err error) {
	s.d.report(fmt.Errorf("the network's process has gone: %w", err))
	s.dropLink()
}

// serveTX takes frames from the guest; more if there may be further ones.
func (s *session) serveTX() (more bool, err error) {
	for range txBatch {
		if !s.txWaits {
			ok, err := s.tx.Pop(&s.txChain)
			if !ok || err != nil {
				return false, err
			}
		}
		s.txWaits = !s.send(s.txChain.Readable)
		if s.txWaits {
			return false, nil
		}
		s.tx.Push(s.txChain.Head, 0)
	}
	return true, nil
}

// groupTalk tells whether a frame says to a group of IPv6 (33:33:00:00:00:xx, RFC 2464) that
// the guest is there: routers, and those who count a group's members. Every card does that when it is turned
// on, and nobody is to be started for it.
func groupTalk(bufs [][]byte) bool {
	var b [guestHeaderLen + 5]byte
	virtio.Gather(b[:], bufs)
	return [5]byte(b[guestHeaderLen:]) == [5]byte{0x33, 0x33}
}

// send puts a frame on the link and reports whether it is done with: false if the link is
// full. What the guest got wrong is dropped, as a card does.
func (s *session) send(bufs [][]byte) bool {
	var raw [guestHeaderLen]byte
	n := virtio.Len(bufs)
	if virtio.Gather(raw[:], bufs) < len(raw) {
		return true
	}
	h, err := ParseHeader((*[HeaderLen]byte)(raw[:])).check(n-guestHeaderLen, s.vs.Features)
	if err != nil || s.d.link < 0 && groupTalk(bufs) || !s.open() {
		return true
	}
	if !s.tell() { // a frame must not come before it
		s.full = true
		return false
	}
	h.Put(&s.header)
	s.iov = append(s.iov[:0], iovec(s.header[:]))
	skip := guestHeaderLen
	for _, b := range bufs {
		if skip >= len(b) {
			skip -= len(b)
			continue
		}
		if len(s.iov) == maxIovecs {
			return true
		}
		s.iov = append(s.iov, iovec(b[skip:]))
		skip = 0
	}
	switch _, errno := s.call(unix.SYS_SENDMSG, unix.MSG_NOSIGNAL); errno {
	case 0:
	case unix.EAGAIN:
		s.full = true
		return false
	case unix.EMSGSIZE, unix.ENOBUFS, unix.ENOMEM:
	default:
		s.lose(errno)
	}
	return true
}

// serveRX hands frames to the guest. starved: it needs rx buffers; more: it should be
// called again.
func (s *session) serveRX() (more, starved bool, err error) {
	for range rxBatch {
		if !s.readable {
			return false, false, nil
		}
		if err := s.fill(); err != nil {
			return false, false, err
		}
		switch size := s.next(); {
		case size < 0:
			continue // no frame, or no link
		case len(s.held) == 0 || size > s.room && s.mergeable():
			return false, true, nil
		}
		s.receive()
	}
	return s.readable, false, nil
}

func (s *session) mergeable() bool { return s.vs.Features&featureMrgRxbuf != 0 }

// fill takes rx buffers from the queue until any frame has room in them.
func (s *session) fill() error {
	for (s.room < guestHeaderLen+MaxFrame || len(s.held) == 0) && (s.mergeable() || len(s.held) == 0) {
		c := new(virtio.Chain)
		if last := len(s.spare) - 1; last >= 0 {
			c, s.spare = s.spare[last], s.spare[:last]
		}
		ok, err := s.rx.Pop(c)
		if !ok || err != nil {
			s.spare = append(s.spare, c)
			return err
		}
		n := virtio.Len(c.Writable)
		if n <= guestHeaderLen {
			return fmt.Errorf("%w: net: rx buffer of %d bytes has no room for a frame", virtio.ErrProtocol, n)
		}
		s.held = append(s.held, c)
		s.room += n
	}
	return nil
}

// next returns the size that the link's next frame has in the guest; negative if there
// is none. It is asked for only where that decides whether there is room.
func (s *session) next() int {
	if s.room >= guestHeaderLen+MaxFrame {
		return 0
	}
	s.iov = append(s.iov[:0], iovec(s.header[:]))
	n, errno := s.call(unix.SYS_RECVMSG, unix.MSG_PEEK|unix.MSG_TRUNC)
	if errno != 0 || n == 0 {
		s.readError(errno)
		return -1
	}
	return n - HeaderLen + guestHeaderLen
}

func (s *session) readError(errno unix.Errno) {
	s.readable = false
	switch errno {
	case unix.EAGAIN:
	case 0:
		s.lose(io.ErrUnexpectedEOF)
	default:
		s.lose(errno)
	}
}

// receive reads one frame into the buffers held.
func (s *session) receive() {
	s.iov = append(s.iov[:0], iovec(s.header[:]))
	skip := guestHeaderLen
	for _, c := range s.held {
		for _, b := range c.Writable {
			if skip >= len(b) {
				skip -= len(b)
			} else if len(s.iov) < maxIovecs {
				s.iov = append(s.iov, iovec(b[skip:]))
				skip = 0
			}
		}
	}
	n, errno := s.call(unix.SYS_RECVMSG, 0)
	if errno != 0 || n == 0 {
		s.readError(errno)
		return
	}
	if n < HeaderLen+etherLen || s.msg.Flags&unix.MSG_TRUNC != 0 {
		return // what has no room is dropped, as on a wire
	}
	left := n - HeaderLen + guestHeaderLen
	first := s.held[0]
	s.used = s.used[:0]
	for i := 0; left > 0; i++ {
		c := s.held[i]
		size := virtio.Len(c.Writable)
		k := min(size, left)
		s.used = append(s.used, virtio.Used{Head: c.Head, Len: uint32(k)})
		left -= k
		s.room -= size
	}
	var raw [guestHeaderLen]byte
	copy(raw[:], s.header[:])
	binary.LittleEndian.PutUint16(raw[HeaderLen:], uint16(len(s.used)))
	virtio.Scatter(first.Writable, raw[:])
	s.rx.PushAll(s.used)
	s.spare = append(s.spare, s.held[:len(s.used)]...)
	s.held = s.held[:copy(s.held, s.held[len(s.used):])]
}

// giveBack returns what was popped and not used: drivers drop such buffers and offer
// them anew, and a driver that only paused the device would miss them otherwise.
func (s *session) giveBack() {
	for _, c := range s.held {
		s.rx.Push(c.Head, 0)
	}
	if s.txWaits {
		s.tx.Push(s.txChain.Head, 0)
	}
}

// call is sendmsg or recvmsg of s.iov on the link.
func (s *session) call(trap uintptr, flags int) (int, unix.Errno) {
	s.msg = unix.Msghdr{Iov: &s.iov[0], Iovlen: uint64(len(s.iov))}
	for {
		// RawSyscall: the link does not block, so the scheduler need not hear of it.
		n, _, errno := unix.RawSyscall(trap, uintptr(s.d.link), uintptr(unsafe.Pointer(&s.msg)), uintptr(flags|unix.MSG_DONTWAIT))
		if errno != unix.EINTR {
			return int(n), errno
		}
	}
}

// iovec describes b, which must not be empty, to the kernel.
func iovec(b []byte) unix.Iovec {
	return unix.Iovec{Base: unsafe.SliceData(b), Len: uint64(len(b))}
}
