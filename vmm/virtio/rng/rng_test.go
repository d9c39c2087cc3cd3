package rng

import (
	"bytes"
	"errors"
	"sync"
	"testing"

	"github.com/wsl2/wsl2/vmm/virtio"
	"github.com/wsl2/wsl2/vmm/virtio/virtiotest"
)

func TestRandomBytes(t *testing.T) {
	g := virtiotest.Start(t, New(), virtiotest.Options{})
	seen := map[string]bool{}
	for range 100 {
		n, data := g.Ring(0).Do(t, nil, 16, 48)
		if n != 64 || seen[string(data[:16])] || bytes.Equal(data[:16], make([]byte, 16)) || bytes.Equal(data[16:32], make([]byte, 16)) {
			t.Fatalf("%d bytes: %x", n, data)
		}
		seen[string(data[:16])] = true
	}
}

func TestRequestsAreBounded(t *testing.T) {
	g := virtiotest.Start(t, New(), virtiotest.Options{})
	n, data := g.Ring(0).Do(t, nil, 1000, maxBytes, 1000)
	if n != maxBytes {
		t.Errorf("%d bytes, want %d", n, maxBytes)
	}
	if end := data[maxBytes-16 : maxBytes]; bytes.Equal(end, make([]byte, 16)) {
		t.Error("the last bytes counted were not written")
	}
	if rest := data[maxBytes:]; !bytes.Equal(rest, make([]byte, len(rest))) {
		t.Error("bytes behind the used length were written")
	}
}

func TestManyAtOnce(t *testing.T) {
	g := virtiotest.Start(t, New(), virtiotest.Options{})
	var wg sync.WaitGroup
	for range 8 {
		wg.Add(1)
		q := g.Ring(0).Prepare(t, nil, 64)
		go func() {
			defer wg.Done()
			for range 200 {
				q.Submit()
				<-q.Done()
				if q.Written() != 64 {
					t.Errorf("%d bytes", q.Written())
				}
			}
		}()
	}
	wg.Wait()
}

func TestRestart(t *testing.T) {
	d := New()
	d.Stop() // harmless before Start
	for range 3 {
		g := virtiotest.Start(t, d, virtiotest.Options{})
		if n, _ := g.Ring(0).Do(t, nil, 8); n != 8 {
			t.Errorf("%d bytes", n)
		}
		g.Stop()
		d.Stop()
	}
	virtiotest.Start(t, d, virtiotest.Options{Disabled: []int{0}}).Stop()
}

func TestNothingToWriteTo(t *testing.T) {
	g := virtiotest.Start(t, New(), virtiotest.Options{})
	g.Ring(0).Send(t, [][]byte{{1, 2, 3}})
	if err := g.WaitFailed(t); !errors.Is(err, virtio.ErrProtocol) {
		t.Error(err)
	}
}
