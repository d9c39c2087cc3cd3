package console

import (
	"bytes"
	"errors"
	"sync"
	"testing"

	"github.com/wsl2/wsl2/vmm/virtio"
	"github.com/wsl2/wsl2/vmm/virtio/virtiotest"
)

// recorder is a writer that copies; it can fail.
type recorder struct {
	mu  sync.Mutex
	buf bytes.Buffer
	err error
}

func (r *recorder) Write(p []byte) (int, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.err != nil {
		return 0, r.err
	}
	return r.buf.Write(p)
}

func (r *recorder) String() string {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.buf.String()
}

func TestTransmit(t *testing.T) {
	var w recorder
	g := virtiotest.Start(t, New(&w), virtiotest.Options{})
	// A buffer that waits for input must not be touched.
	input := g.Ring(0).Send(t, nil, 64)
	var want bytes.Buffer
	for i := range 500 {
		a, b := []byte{byte(i)}, bytes.Repeat([]byte{byte(i >> 1)}, i%100+1)
		want.Write(a)
		want.Write(b)
		if n, _ := g.Ring(1).Do(t, [][]byte{a, b}); n != 0 {
			t.Fatalf("used length %d", n)
		}
	}
	if w.String() != want.String() {
		t.Error("the output differs")
	}
	select {
	case <-input.Done():
		t.Error("the receive buffer was returned")
	default:
	}
}

func TestTransmitIsBounded(t *testing.T) {
	var w recorder
	g := virtiotest.Start(t, New(&w), virtiotest.Options{})
	g.Ring(1).Do(t, [][]byte{make([]byte, 60<<10), make([]byte, 60<<10)})
	g.Ring(1).Do(t, [][]byte{[]byte("next")})
	if got := w.String(); len(got) != maxBytes+4 || got[maxBytes:] != "next" {
		t.Errorf("%d bytes passed, want %d", len(got), maxBytes+4)
	}
}

func TestWriterFails(t *testing.T) {
	w := recorder{err: errors.New("boom")}
	g := virtiotest.Start(t, New(&w), virtiotest.Options{})
	for range 3 {
		g.Ring(1).Do(t, [][]byte{[]byte("lost")}) // the guest is not held up
	}
}

func TestBrokenRing(t *testing.T) {
	var w recorder
	g := virtiotest.Start(t, New(&w), virtiotest.Options{})
	g.Ring(1).SetAvailIdx(0x8000)
	g.Ring(1).Kick()
	if err := g.WaitFailed(t); !errors.Is(err, virtio.ErrProtocol) {
		t.Error(err)
	}
}

func TestRestart(t *testing.T) {
	var w recorder
	d := New(&w)
	d.Stop()
	for range 3 {
		g := virtiotest.Start(t, d, virtiotest.Options{})
		g.Ring(1).Do(t, [][]byte{[]byte("x")})
		g.Stop()
		d.Stop()
	}
	if w.String() != "xxx" {
		t.Errorf("%q", w.String())
	}
	virtiotest.Start(t, d, virtiotest.Options{Disabled: []int{0, 1}}).Stop()
}
