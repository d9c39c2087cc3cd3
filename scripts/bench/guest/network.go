package main

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"os"
	"slices"
	"strconv"
	"time"

	"golang.org/x/sys/unix"
)

// The world's ports. TCP: sink takes what comes, and answers its end with a byte; source sends
// without end; echo sends back. UDP: datagrams sends back, names is a DNS server.
const (
	portSink = 1000 + iota
	portSource
	portEcho
	portDatagrams
	portNames = 53
)

const (
	// datagramSize fits any network's packets.
	datagramSize = 1400
	// lost is when a datagram's answer is given up, patience when anything else is.
	lost     = 100 * time.Millisecond
	patience = 5 * time.Second
)

// world serves them all on one thread, and says when it does: world ADDRESS. Its stdin is waited for
// first: the network is not there before.
func world(args []string) error {
	if len(args) != 1 {
		return errors.New("usage: world ADDRESS")
	}
	at, err := netip.ParseAddr(args[0])
	if err != nil {
		return err
	}
	if _, err := os.Stdin.Read(make([]byte, 1)); err != nil {
		return fmt.Errorf("wait for the network: %w", err)
	}
	w := &loop{ports: map[int]int{}}
	if w.epoll, err = unix.EpollCreate1(unix.EPOLL_CLOEXEC); err != nil {
		return fmt.Errorf("epoll: %w", err)
	}
	listeners := map[int]int{}
	for _, port := range []int{portSink, portSource, portEcho, portDatagrams, portNames} {
		kind := unix.SOCK_STREAM
		if port == portDatagrams || port == portNames {
			kind = unix.SOCK_DGRAM
		}
		fd, err := unix.Socket(unix.AF_INET, kind|unix.SOCK_CLOEXEC, 0)
		if err == nil {
			err = unix.Bind(fd, &unix.SockaddrInet4{Port: port, Addr: at.As4()})
		}
		if err == nil && kind == unix.SOCK_STREAM {
			err = unix.Listen(fd, 128)
		}
		if err == nil {
			err = w.add(fd, port, unix.EPOLLIN)
		}
		if err != nil {
			return fmt.Errorf("port %d: %w", port, err)
		}
		listeners[fd] = kind
	}
	if _, err := os.Stdout.WriteString("listening\n"); err != nil {
		return err
	}
	b := make([]byte, buffer)
	return w.run(func(fd, port int) (done bool) {
		switch listeners[fd] {
		case unix.SOCK_STREAM:
			events := uint32(unix.EPOLLIN)
			if port == portSource {
				events = unix.EPOLLOUT
			}
			if c, _, err := unix.Accept4(fd, unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC); err == nil && w.add(c, port, events) != nil {
				unix.Close(c)
			}
			return false
		case unix.SOCK_DGRAM:
			if n, from, err := unix.Recvfrom(fd, b, 0); err == nil {
				_ = unix.Sendto(fd, answerTo(port, b[:n]), 0, from) // UDP promises nothing
			}
			return false
		}
		if port == portSource {
			_, err := unix.Write(fd, b)
			return err != nil && err != unix.EAGAIN
		}
		n, err := unix.Read(fd, b)
		switch {
		case err != nil:
			return err != unix.EAGAIN
		case n == 0:
			_, _ = unix.Write(fd, b[:1]) // all has arrived: say so
			return true
		case port == portEcho:
			return writeAll(fd, b[:n]) != nil
		}
		return false
	})
}

// answerTo is what the world says to a datagram: the same, or one address for any name.
func answerTo(port int, question []byte) []byte {
	if port != portNames || len(question) < 12 {
		return question
	}
	answer := slices.Clone(question)
	answer[2] |= 0x80 // a response
	answer[7] = 1     // of one answer
	return append(answer, 0xc0, 12, 0, 1, 0, 1, 0, 0, 0, 60, 0, 4, 192, 0, 2, 1)
}

// loop is an epoll set of sockets, each known by the port that it is about.
type loop struct {
	epoll int
	ports map[int]int
}

func (l *loop) add(fd, port int, events uint32) error {
	l.ports[fd] = port
	return unix.EpollCtl(l.epoll, unix.EPOLL_CTL_ADD, fd, &unix.EpollEvent{Events: events, Fd: int32(fd)})
}

// run calls ready for sockets that are, until none is left that it is not done with.
func (l *loop) run(ready func(fd, port int) (done bool)) error {
	var events [16]unix.EpollEvent
	for len(l.ports) > 0 {
		n, err := unix.EpollWait(l.epoll, events[:], -1)
		if err != nil && err != unix.EINTR {
			return fmt.Errorf("epoll: %w", err)
		}
		for _, e := range events[:max(n, 0)] {
			if fd := int(e.Fd); ready(fd, l.ports[fd]) {
				delete(l.ports, fd)
				unix.Close(fd)
			}
		}
	}
	return nil
}

// network measures the way to the world and prints what it found, in nanoseconds:
//
//	network up|down ADDRESS STREAMS BYTES   what all bytes took
//	network trips ADDRESS COUNT             the median of a byte there and back
//	network connects ADDRESS COUNT          connections with a byte each way: all, median, 99th percentile of the connects
//	network datagrams ADDRESS COUNT WINDOW  datagrams there and back, so many under way: all, lost ones
//	network names ADDRESS COUNT             questions to a DNS server, each from a socket of its own: all
//	network load ADDRESS                    take bytes without end
func network(args []string) error {
	if len(args) < 2 {
		return errors.New("usage: network MODE ADDRESS [NUMBER...]")
	}
	at, err := netip.ParseAddr(args[1])
	if err != nil {
		return err
	}
	var n [2]int
	for i, a := range args[2:] {
		if n[i], err = strconv.Atoi(a); err != nil {
			return err
		}
	}
	c := client{at: at.As4()}
	switch args[0] {
	case "up":
		return c.stream(portSink, n[0], n[1])
	case "down":
		return c.stream(portSource, n[0], n[1])
	case "trips":
		return c.trips(n[0])
	case "connects":
		return c.connects(n[0])
	case "datagrams":
		return c.datagrams(n[0], n[1])
	case "names":
		return c.names(n[0])
	case "load":
		return c.load()
	}
	return fmt.Errorf("unknown measurement %q", args[0])
}

// client is at the guest's end.
type client struct{ at [4]byte }

func (c client) dial(kind, port int, timeout time.Duration) (int, error) {
	fd, err := unix.Socket(unix.AF_INET, kind|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return -1, fmt.Errorf("socket: %w", err)
	}
	tv := unix.NsecToTimeval(timeout.Nanoseconds())
	err = unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &tv)
	if err == nil {
		err = unix.Connect(fd, &unix.SockaddrInet4{Port: port, Addr: c.at})
	}
	if err != nil {
		unix.Close(fd)
		return -1, fmt.Errorf("connect to port %d of %v: %w", port, c.at, err)
	}
	return fd, nil
}

// stream carries so many bytes, in all.
func (c client) stream(port, streams, bytes int) (err error) {
	l := &loop{ports: map[int]int{}}
	if l.epoll, err = unix.EpollCreate1(unix.EPOLL_CLOEXEC); err != nil {
		return fmt.Errorf("epoll: %w", err)
	}
	left := map[int]int{}
	for range streams {
		fd, err := c.dial(unix.SOCK_STREAM, port, patience)
		if err == nil {
			err = unix.SetNonblock(fd, true)
		}
		if err == nil {
			err = l.add(fd, port, map[int]uint32{portSink: unix.EPOLLOUT, portSource: unix.EPOLLIN}[port])
		}
		if err != nil {
			return err
		}
		left[fd] = bytes / streams
	}
	b := make([]byte, buffer)
	var failed error
	start := time.Now()
	err = l.run(func(fd, port int) (done bool) {
		var n int
		switch {
		case port == portSource:
			if n, err = unix.Read(fd, b); n == 0 && err == nil {
				err = io.ErrUnexpectedEOF
			}
			left[fd] -= n
			done = left[fd] <= 0
		case left[fd] > 0:
			n, err = unix.Write(fd, b[:min(len(b), left[fd])])
			if left[fd] -= max(n, 0); left[fd] == 0 {
				err = errors.Join(unix.Shutdown(fd, unix.SHUT_WR),
					unix.EpollCtl(l.epoll, unix.EPOLL_CTL_MOD, fd, &unix.EpollEvent{Events: unix.EPOLLIN, Fd: int32(fd)}))
			}
		default: // the world has it all
			n, err = unix.Read(fd, b[:1])
			done = n == 1
		}
		if err != nil && err != unix.EAGAIN {
			failed = errors.Join(failed, err)
			return true
		}
		return done
	})
	took := time.Since(start)
	if err := errors.Join(err, failed); err != nil {
		return fmt.Errorf("stream: %w", err)
	}
	return result(took)
}

// exchange sends what is in b and reads as much.
func exchange(fd int, b []byte) error {
	if err := writeAll(fd, b); err != nil {
		return err
	}
	n, err := unix.Read(fd, b)
	if err == nil && n == 0 {
		err = io.ErrUnexpectedEOF
	}
	return err
}

func (c client) trips(count int) error {
	fd, err := c.dial(unix.SOCK_STREAM, portEcho, patience)
	if err != nil {
		return err
	}
	var all []time.Duration
	for range count {
		start := time.Now()
		if err := exchange(fd, []byte{1}); err != nil {
			return fmt.Errorf("trip: %w", err)
		}
		all = append(all, time.Since(start))
	}
	return result(percentile(all, 50))
}

func (c client) connects(count int) error {
	var all []time.Duration
	begin := time.Now()
	for range count {
		start := time.Now()
		fd, err := c.dial(unix.SOCK_STREAM, portEcho, patience)
		if err != nil {
			return err
		}
		all = append(all, time.Since(start))
		err = exchange(fd, []byte{1})
		unix.Close(fd)
		if err != nil {
			return fmt.Errorf("exchange: %w", err)
		}
	}
	return result(time.Since(begin), percentile(all, 50), percentile(all, 99))
}

func (c client) datagrams(count, window int) error {
	fd, err := c.dial(unix.SOCK_DGRAM, portDatagrams, lost)
	if err != nil {
		return err
	}
	b := make([]byte, datagramSize)
	sent, got := 0, 0
	start := time.Now()
	for under := 0; sent < count || under > 0; {
		for ; under < window && sent < count; sent++ {
			if err := writeAll(fd, b); err != nil {
				return fmt.Errorf("datagram: %w", err)
			}
			under++
		}
		switch _, err := unix.Read(fd, b); err {
		case nil:
			under--
			got++
		case unix.EAGAIN: // all under way are lost
			under = 0
		default:
			return fmt.Errorf("datagram: %w", err)
		}
	}
	if got == 0 {
		return errors.New("no datagram came back")
	}
	// A lost one costs what it takes to find out.
	return result(time.Since(start), time.Duration(sent-got))
}

func (c client) names(count int) error {
	start := time.Now()
	for i := range count {
		question := binary.BigEndian.AppendUint16(nil, uint16(i))
		question = append(question, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0)
		label := fmt.Sprintf("n%d", i)
		question = append(append(question, byte(len(label))), label...)
		question = append(question, "\x05bench\x00\x00\x01\x00\x01"...)
		fd, err := c.dial(unix.SOCK_DGRAM, portNames, patience)
		if err != nil {
			return err
		}
		answer := make([]byte, 512)
		var n int
		if err = writeAll(fd, question); err == nil {
			n, err = unix.Read(fd, answer)
		}
		unix.Close(fd)
		if err != nil {
			return fmt.Errorf("question %d: %w", i, err)
		}
		if n < 12 || answer[3]&0xf != 0 || answer[7] == 0 {
			return fmt.Errorf("question %d: no answer in %x", i, answer[:n])
		}
	}
	return result(time.Since(start))
}

func (c client) load() error {
	fd, err := c.dial(unix.SOCK_STREAM, portSource, patience)
	if err != nil {
		return err
	}
	b := make([]byte, buffer)
	for said := false; ; said = true {
		if n, err := unix.Read(fd, b); n <= 0 || err != nil {
			return fmt.Errorf("load: %d bytes: %w", n, err)
		}
		if !said {
			if _, err := os.Stdout.WriteString("under way\n"); err != nil {
				return err
			}
		}
	}
}

func percentile(all []time.Duration, p int) time.Duration {
	slices.Sort(all)
	return all[(len(all)-1)*p/100]
}

func result(all ...time.Duration) error {
	var line []byte
	for _, d := range all {
		line = fmt.Appendf(line, "%d ", d.Nanoseconds())
	}
	_, err := os.Stdout.Write(append(line, '\n'))
	return err
}
