package vsock

import (
	"io"
	"net"
	"testing"
)

// The fake driver and the programs at both ends count in these figures too;
// they compare versions of the device, not devices.

func BenchmarkRoundTrip(b *testing.B) {
	_, g := start(b)
	h, c := pair(b, g, g.listen(5000))
	go func() {
		for p := make([]byte, 64); ; {
			n, err := c.Read(p)
			if n == 0 || err != nil {
				return
			}
			c.Write(p[:n])
		}
	}()
	p := make([]byte, 64)
	for b.Loop() {
		if _, err := h.Write(p); err != nil {
			b.Fatal(err)
		}
		if _, err := io.ReadFull(h, p); err != nil {
			b.Fatal(err)
		}
	}
}

// BenchmarkConnect is one short connection: CONNECT with data behind it, an
// answer, and the end of both sides.
func BenchmarkConnect(b *testing.B) {
	d, g := start(b)
	l := g.listen(5000)
	go func() {
		for c := range l {
			p := make([]byte, 64)
			c.Read(p)
			c.Write(p)
			go c.Close()
		}
	}()
	defer func() { g.shutdown(); close(l) }()
	for b.Loop() {
		h, err := net.Dial("unix", d.cfg.Path)
		if err != nil {
			b.Fatal(err)
		}
		h.Write([]byte("CONNECT 5000\nhello"))
		if _, err := io.Copy(io.Discard, h); err != nil {
			b.Fatal(err)
		}
		h.Close()
	}
}

func BenchmarkToGuest(b *testing.B) {
	_, g := start(b)
	h, c := pair(b, g, g.listen(5000))
	benchmarkStream(b, h, c)
}

func BenchmarkToHost(b *testing.B) {
	_, g := start(b)
	h, c := pair(b, g, g.listen(5000))
	benchmarkStream(b, c, h)
}

func benchmarkStream(b *testing.B, w io.Writer, r io.Reader) {
	const chunk = 128 << 10
	b.SetBytes(chunk)
	read := make(chan struct{}, 1<<20)
	go func() {
		for p := make([]byte, chunk); ; {
			if _, err := io.ReadFull(r, p); err != nil {
				return
			}
			read <- struct{}{}
		}
	}()
	p := make([]byte, chunk)
	n := 0
	for b.Loop() {
		if _, err := w.Write(p); err != nil {
			b.Fatal(err)
		}
		n++
	}
	for range n {
		<-read
	}
}
