package vsock

import (
	"bytes"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"sync"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/wsl2/wsl2/vmm/virtio"
	"github.com/wsl2/wsl2/vmm/virtio/virtiotest"
)

func start(t testing.TB) (*Device, *guest) {
	t.Helper()
	d := newDevice(t, Config{})
	return d, startGuest(t, d, guestOptions{})
}

func TestConfigSpace(t *testing.T) {
	d := newDevice(t, Config{GuestCID: 0x12345678})
	b := []byte{0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff}
	d.ReadConfig(0, b)
	if want := []byte{0x78, 0x56, 0x34, 0x12, 0, 0, 0, 0, 0, 0}; !bytes.Equal(b, want) {
		t.Errorf("config space is % x, want % x", b, want)
	}
	b = []byte{0xff, 0xff}
	d.ReadConfig(2, b)
	if want := []byte{0x34, 0x12}; !bytes.Equal(b, want) {
		t.Errorf("config space at 2 is % x, want % x", b, want)
	}
	d.ReadConfig(1<<31, b)
	if d.ID() != virtio.IDVsock || len(d.QueueSizes()) != 3 || d.Features() != 0 {
		t.Error("wrong identity")
	}
}

func TestNewRefuses(t *testing.T) {
	for _, cfg := range []Config{
		{GuestCID: 2, Path: "/tmp/x"},
		{GuestCID: 0xffffffff, Path: "/tmp/x"},
		{GuestCID: 3},
		{GuestCID: 3, Path: "/" + string(bytes.Repeat([]byte{'a'}, 100))},
		{GuestCID: 3, Path: "/does/not/exist"},
		{GuestCID: 3, Path: "/tmp/x", MaxConns: -1},
	} {
		if d, err := New(cfg); err == nil {
			d.Close()
			t.Errorf("New(%+v) succeeded", cfg)
		}
	}
}

func TestSocketFile(t *testing.T) {
	d := newDevice(t, Config{})
	fi, err := os.Stat(d.cfg.Path)
	if err != nil {
		t.Fatal(err)
	}
	if fi.Mode().Perm() != 0o600 {
		t.Errorf("socket has mode %v", fi.Mode())
	}
	if _, err := net.Dial("unix", d.cfg.Path); !errors.Is(err, unix.ECONNREFUSED) {
		t.Errorf("connecting before the driver is up: %v, want ECONNREFUSED", err)
	}
	// The socket a dead process left is replaced, a live one is not.
	if d2, err := New(d.cfg); err != nil {
		t.Errorf("a stale socket is in the way: %v", err)
	} else {
		startGuest(t, d2, guestOptions{})
		if _, err := New(d.cfg); !errors.Is(err, unix.EADDRINUSE) {
			t.Errorf("New over a live socket: %v", err)
		}
	}
}

// TestRestart resets the guest; the device serves the next one.
func TestRestart(t *testing.T) {
	d := newDevice(t, Config{})
	var ports []uint32
	for range 3 {
		g := startGuest(t, d, guestOptions{})
		l := g.listen(5000)
		h, c := pair(t, g, l)
		ports = append(ports, c.key.hostPort())
		g.shutdown()
		if _, err := h.Read(make([]byte, 1)); err == nil {
			t.Error("the connection outlived its guest")
		}
		if _, err := net.Dial("unix", d.cfg.Path); !errors.Is(err, unix.ECONNREFUSED) {
			t.Errorf("connecting to a stopped guest: %v, want ECONNREFUSED", err)
		}
	}
	if ports[0] == ports[1] || ports[1] == ports[2] {
		t.Errorf("host ports are reused early: %v", ports)
	}
}

func TestEcho(t *testing.T) {
	for name, o := range map[string]guestOptions{
		"default":      {},
		"no event":     {Options: virtiotest.Options{Disabled: []int{queueEvent}}},
		"no event idx": {Options: virtiotest.Options{Features: virtio.RingFeatures &^ virtio.FeatureEventIdx}},
		"direct":       {Options: virtiotest.Options{Direct: true}},
		"one rx":       {rxBufs: 1},
		"small queues": {Options: virtiotest.Options{QueueSize: 4}},
	} {
		t.Run(name, func(t *testing.T) {
			d := newDevice(t, Config{})
			g := startGuest(t, d, o)
			l := g.listen(5000)
			h, c := pair(t, g, l)
			for i := range 200 {
				msg := fmt.Appendf(nil, "message %d", i)
				if _, err := h.Write(msg); err != nil {
					t.Fatal(err)
				}
				got := make([]byte, len(msg))
				if _, err := io.ReadFull(c, got); err != nil || !bytes.Equal(got, msg) {
					t.Fatalf("guest read %q, %v", got, err)
				}
				if _, err := c.Write(got); err != nil {
					t.Fatal(err)
				}
				clear(got)
				if _, err := io.ReadFull(h, got); err != nil || !bytes.Equal(got, msg) {
					t.Fatalf("host read %q, %v", got, err)
				}
			}
		})
	}
}

// TestGuestDial connects from the guest, to a listener and to none.
func TestGuestDial(t *testing.T) {
	d, g := start(t)
	if _, err := g.dial(7); err == nil {
		t.Fatal("connected although nobody listens")
	}
	l := hostListen(t, d, "7")
	c, err := g.dial(7)
	if err != nil {
		t.Fatal(err)
	}
	h, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	defer h.Close()
	if _, err := c.Write([]byte("to host")); err != nil {
		t.Fatal(err)
	}
	c.CloseWrite()
	if b, err := io.ReadAll(h); err != nil || string(b) != "to host" {
		t.Fatalf("host read %q, %v", b, err)
	}
	if _, err := h.Write([]byte("to guest")); err != nil {
		t.Fatal(err)
	}
	h.Close()
	if b, err := io.ReadAll(c); err != nil || string(b) != "to guest" {
		t.Fatalf("guest read %q, %v", b, err)
	}
	if err := c.Close(); err != nil {
		t.Fatal(err)
	}
}

// TestEarlyData sends data, more than one rx buffer, right behind the line.
func TestEarlyData(t *testing.T) {
	d, g := start(t)
	l := g.listen(5000)
	for _, n := range []int{0, 1, 300, 490, 500, 512, 10000} {
		data := randomBytes(n)
		h, err := net.Dial("unix", d.cfg.Path)
		if err != nil {
			t.Fatal(err)
		}
		defer h.Close()
		if _, err := h.Write(append([]byte("CONNECT 5000\n"), data...)); err != nil {
			t.Fatal(err)
		}
		if err := h.(*net.UnixConn).CloseWrite(); err != nil {
			t.Fatal(err)
		}
		c := g.accept(l)
		if got, err := io.ReadAll(c); err != nil || !bytes.Equal(got, data) {
			t.Fatalf("guest read %d bytes of %d, %v", len(got), n, err)
		}
		// The host closed one direction only.
		if _, err := c.Write([]byte("answer")); err != nil {
			t.Fatal(err)
		}
		if err := c.Close(); err != nil {
			t.Fatal(err)
		}
		want := fmt.Sprintf("OK %d\nanswer", c.key.hostPort())
		if got, err := io.ReadAll(h); err != nil || string(got) != want {
			t.Fatalf("host read %q, %v, want %q", got, err, want)
		}
	}
}

// TestVanish: a client that leaves before the answer still gets its data through.
func TestVanish(t *testing.T) {
	d, g := start(t)
	l := g.listen(5000)
	for range 100 {
		h, err := net.Dial("unix", d.cfg.Path)
		if err != nil {
			t.Fatal(err)
		}
		h.Write([]byte("CONNECT 5000\nlast words"))
		h.Close()
		c := g.accept(l)
		if got, err := io.ReadAll(c); err != nil || string(got) != "last words" {
			t.Fatalf("guest read %q, %v", got, err)
		}
		c.Close()
	}
	waitIdle(t, d, g)
}

func TestMalformedConnect(t *testing.T) {
	d, g := start(t)
	g.listen(5000)
	for _, line := range []string{
		"\n", "CONNECT\n", "CONNECT \n", "CONNECT x\n", "connect 5000\n", "CONNECT 5000 \n",
		"CONNECT -1\n", "CONNECT 4294967295\n", "CONNECT 99999999999999\n", "GET / HTTP/1.1\r\n",
		"CONNECT 00000000000000000000000000000000000000000000000000000005000\n",
		string(make([]byte, 100000)),
	} {
		h, err := net.Dial("unix", d.cfg.Path)
		if err != nil {
			t.Fatal(err)
		}
		h.Write([]byte(line)) // may meet the end of the connection already
		if b, err := io.ReadAll(h); len(b) > 0 {
			t.Errorf("line %.40q was answered %q, %v", line, b, err)
		}
		h.Close()
	}
	// A line that comes in pieces is none the worse.
	h, err := net.Dial("unix", d.cfg.Path)
	if err != nil {
		t.Fatal(err)
	}
	defer h.Close()
	for _, p := range []string{"C", "ONNECT 50", "00", "\r", "\n"} {
		if _, err := h.Write([]byte(p)); err != nil {
			t.Fatal(err)
		}
	}
	b := make([]byte, 3)
	if _, err := io.ReadFull(h, b); err != nil || string(b) != "OK " {
		t.Errorf("line in pieces was answered %q, %v", b, err)
	}
	// One without an end holds nothing up.
	if _, err := d.Dial(t.Context(), 4999); !errors.Is(err, ErrRefused) {
		t.Errorf("Dial of a closed port: %v, want ErrRefused", err)
	}
}

func randomBytes(n int) []byte {
	b := make([]byte, n)
	r := rand.NewChaCha8([32]byte{byte(n)})
	r.Read(b)
	return b
}

// stream writes size random bytes to w and returns their hash.
func stream(w io.Writer, size int, seed byte) ([32]byte, error) {
	r := rand.NewChaCha8([32]byte{seed})
	h := sha256.New()
	b := make([]byte, 100_000)
	for size > 0 {
		p := b[:min(len(b), size)]
		r.Read(p)
		h.Write(p)
		if _, err := w.Write(p); err != nil {
			return [32]byte{}, err
		}
		size -= len(p)
	}
	return [32]byte(h.Sum(nil)), nil
}

// drain reads size bytes from r and returns their hash.
func drain(r io.Reader, size int) ([32]byte, error) {
	h := sha256.New()
	if _, err := io.CopyN(h, r, int64(size)); err != nil {
		return [32]byte{}, err
	}
	return [32]byte(h.Sum(nil)), nil
}

// exchange streams size bytes both ways at once and compares the hashes.
func exchange(h io.ReadWriter, c io.ReadWriter, size int) error {
	type sum struct {
		what string
		hash [32]byte
		err  error
	}
	sums := make(chan sum, 4)
	go func() { s, err := stream(h, size, 1); sums <- sum{"toGuest", s, err} }()
	go func() { s, err := drain(c, size); sums <- sum{"toGuest", s, err} }()
	go func() { s, err := stream(c, size, 2); sums <- sum{"toHost", s, err} }()
	go func() { s, err := drain(h, size); sums <- sum{"toHost", s, err} }()
	seen := map[string][32]byte{}
	var errs []error
	for range 4 {
		s := <-sums
		if s.err != nil {
			errs = append(errs, fmt.Errorf("%s: %w", s.what, s.err))
			continue
		}
		if first, ok := seen[s.what]; ok && first != s.hash {
			errs = append(errs, fmt.Errorf("%s: hashes differ", s.what))
		}
		seen[s.what] = s.hash
	}
	return errors.Join(errs...)
}

func TestStream(t *testing.T) {
	const size = 64 << 20
	_, g := start(t)
	h, c := pair(t, g, g.listen(5000))
	if err := exchange(h, c, size); err != nil {
		t.Fatal(err)
	}
}

// TestManyConns runs 500 connections at once, each with data both ways.
func TestManyConns(t *testing.T) {
	const conns, size = 500, 100_000
	d, g := start(t)
	l := g.listen(5000)
	hosts := map[uint32]net.Conn{}
	var mu sync.Mutex
	var wg sync.WaitGroup
	for range conns {
		wg.Go(func() {
			h, err := net.Dial("unix", d.cfg.Path)
			if err != nil {
				t.Error(err)
				return
			}
			if err := handshake(h, 5000); err != nil {
				t.Error(err)
			}
			mu.Lock()
			hosts[uint32(len(hosts))] = h
			mu.Unlock()
		})
	}
	guests := make([]*guestConn, conns)
	for i := range guests {
		guests[i] = g.accept(l)
	}
	wg.Wait()
	if t.Failed() {
		return
	}
	// The guest's ends echo; which is whose does not matter.
	for _, c := range guests {
		wg.Go(func() {
			io.Copy(struct{ io.Writer }{c}, struct{ io.Reader }{c})
			c.Close()
		})
	}
	for _, h := range hosts {
		wg.Go(func() {
			defer h.Close()
			var inner sync.WaitGroup
			inner.Go(func() {
				if _, err := stream(h, size, 3); err != nil {
					t.Error(err)
				}
				h.(*net.UnixConn).CloseWrite()
			})
			got, err := drain(h, size)
			inner.Wait()
			want, _ := stream(io.Discard, size, 3)
			if err != nil || got != want {
				t.Errorf("echo differs or failed: %v", err)
			}
			if n, err := h.Read(make([]byte, 1)); n != 0 || err != io.EOF {
				t.Errorf("after the echo: %d, %v, want end of file", n, err)
			}
		})
	}
	wg.Wait()
	waitIdle(t, d, g)
}

// waitIdle waits until the device has no connection left.
func waitIdle(t testing.TB, d *Device, g *guest) {
	t.Helper()
	// What host and guest closed, the session learns before a later connection.
	for {
		l := g.listen(4242)
		h := hostDial(t, d, 4242)
		c := g.accept(l)
		h.Close()
		io.ReadAll(c)
		c.Close()
		if d.conns() <= 1 {
			return
		}
	}
}

// conns returns the number of connections in all states, those being closed
// included.
func (d *Device) conns() int {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.session == nil {
		return 0
	}
	return int(d.session.live.Load())
}
