package main

import (
	"bytes"
	"fmt"
	"io"
	"os"
	"strconv"
	"time"

	"golang.org/x/sys/unix"

	"github.com/wsl2/wsl2/scripts/bench/report"
)

// What goes over a connection for a throughput, and how often a byte goes there
// and back for a round trip.
const (
	vsockBytes  = 32 << 20
	vsockTrips  = 100
	vsockBuffer = 256 << 10
	firstPort   = 9000
)

// vsock measures connections to the guest: ours through the VMM's unix socket,
// the peer's by AF_VSOCK and vhost-vsock.
func vsock(h *host) ([]report.Row, error) {
	r, err := h.ours()
	if err != nil {
		return nil, err
	}
	// First: what a VM loads once to see its ports is not to be in the other figures.
	forwarded, err := measureLink(h.forwarded(r))
	if err != nil {
		return nil, err
	}
	ours, err := measureLink(r)
	if err != nil {
		return nil, err
	}
	session, err := h.sessionRate()
	if err != nil {
		return nil, err
	}
	if err := r.stop(); err != nil {
		return nil, err
	}
	p, err := h.peer()
	if err != nil {
		return nil, err
	}
	defer p.stop()
	peer, err := measureLink(p)
	if err != nil {
		return nil, err
	}
	const vhost = "vhost-vsock"
	row := func(name, unit string, ours, peer float64, atLeast bool) report.Row {
		return report.Row{Row: name, Unit: unit, Ours: ours, Peers: map[string]float64{vhost: peer}, Bar: &report.Bar{Peer: vhost, Factor: 1, AtLeast: atLeast}}
	}
	return []report.Row{
		row("host to guest", "MB/s", ours.toGuest, peer.toGuest, true),
		row("guest to host", "MB/s", ours.toHost, peer.toHost, true),
		row("round trip of 1 byte", "µs", ours.trip, peer.trip, false),
		{Row: "stdin to stdout of a program, by wsl2", Unit: "MB/s", Ours: session},
		{Row: "localhost to a server in the distro", Unit: "MB/s", Ours: forwarded.toGuest, Peers: map[string]float64{"vsock": ours.toGuest}},
		{Row: "a server in the distro to localhost", Unit: "MB/s", Ours: forwarded.toHost, Peers: map[string]float64{"vsock": ours.toHost}},
		{Row: "round trip of 1 byte, by localhost", Unit: "µs", Ours: forwarded.trip, Peers: map[string]float64{"vsock": ours.trip}},
	}, nil
}

type linkFigures struct{ toGuest, toHost, trip float64 }

func measureLink(l *running) (f linkFigures, err error) {
	rate := func(start time.Time) float64 { return vsockBytes / time.Since(start).Seconds() / 1e6 }
	b := make([]byte, vsockBuffer)
	port := uint32(firstPort)
	with := func(mode string, use func(c socket) error) error {
		return once(l, mode, &port, use)
	}
	err = with("sink", func(c socket) error {
		start := time.Now()
		for n := 0; n < vsockBytes; n += len(b) {
			if _, err := c.Write(b); err != nil {
				return err
			}
		}
		if err := c.CloseWrite(); err != nil {
			return err
		}
		_, err := io.ReadFull(c, b[:1]) // the guest has it all
		f.toGuest = rate(start)
		return err
	})
	if err != nil {
		return f, err
	}
	err = with("source", func(c socket) error {
		start := time.Now()
		// It waits for a byte: passt's connections from the host are none to the guest before the host's side has spoken.
		if _, err := c.Write(b[:1]); err != nil {
			return err
		}
		for n := 0; n < vsockBytes; {
			m, err := c.Read(b)
			if err != nil {
				return err
			}
			n += m
		}
		f.toHost = rate(start)
		return nil
	})
	if err != nil {
		return f, err
	}
	err = with("echo", func(c socket) error {
		var trips []float64
		for range vsockTrips {
			start := time.Now()
			if _, err := c.Write(b[:1]); err != nil {
				return err
			}
			if _, err := io.ReadFull(c, b[:1]); err != nil {
				return err
			}
			trips = append(trips, float64(time.Since(start).Nanoseconds())/1e3)
		}
		f.trip = median(trips)
		return nil
	})
	return f, err
}

// once runs one of guest's servers and uses a connection to it.
func once(l *running, mode string, port *uint32, use func(c socket) error) error {
	*port++
	stop, err := l.spawn(guestTool, mode, l.scheme+strconv.Itoa(int(*port)))
	if err != nil {
		return fmt.Errorf("guest %s: %w", mode, err)
	}
	defer stop()
	c, err := l.dial(*port)
	if err != nil {
		return err
	}
	defer c.Close()
	if err := use(c); err != nil {
		return fmt.Errorf("guest %s: %w", mode, err)
	}
	return nil
}

// dialGuest connects to a guest's port through the VMM's socket.
func (h *host) dialGuest(port uint32) (socket, error) {
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return -1, err
	}
	s := socket(fd)
	if err = setTimeouts(fd); err == nil {
		err = unix.Connect(fd, &unix.SockaddrUnix{Name: h.vsockPath()})
	}
	if err == nil {
		_, err = fmt.Fprintf(s, "CONNECT %d\n", port)
	}
	var line []byte
	for b := make([]byte, 1); err == nil && !bytes.HasSuffix(line, []byte("\n")); {
		_, err = s.Read(b)
		line = append(line, b...)
	}
	if err == nil && !bytes.HasPrefix(line, []byte("OK ")) {
		err = fmt.Errorf("%q", line)
	}
	if err != nil {
		s.Close()
		return -1, fmt.Errorf("connect to the guest's port %d: %w", port, err)
	}
	return s, nil
}

// sessionRate is the rate of bytes through stdin and stdout of a program.
func (h *host) sessionRate() (float64, error) {
	c := h.wsl2("-d", distroName, "-e", guestTool, "copy")
	in, err := c.StdinPipe()
	if err != nil {
		return 0, err
	}
	out, err := c.StdoutPipe()
	if err != nil {
		return 0, err
	}
	c.Stderr = os.Stderr
	start := time.Now()
	if err := c.Start(); err != nil {
		return 0, err
	}
	watchdog := time.AfterFunc(hangs, func() { c.Process.Kill() })
	go func() {
		b := make([]byte, vsockBuffer)
		for n := 0; n < vsockBytes; n += len(b) {
			if _, err := in.Write(b); err != nil {
				break
			}
		}
		in.Close()
	}()
	n, err := io.CopyBuffer(struct{ io.Writer }{io.Discard}, struct{ io.Reader }{out}, make([]byte, vsockBuffer))
	took := time.Since(start)
	werr := c.Wait()
	if !watchdog.Stop() {
		return 0, errHang
	}
	if err != nil || werr != nil || n != vsockBytes {
		return 0, fmt.Errorf("wsl2 %s copy: %d of %d bytes came back: %w %w", guestTool, n, vsockBytes, err, werr)
	}
	return vsockBytes / took.Seconds() / 1e6, nil
}
