package virtio_test

import (
	"bytes"
	"errors"
	"testing"

	"github.com/wsl2/wsl2/vmm/virtio"
	"github.com/wsl2/wsl2/vmm/virtio/virtiotest"
)

func TestServe(t *testing.T) {
	r := newRaw(t, 8, event, 0)
	r.setDesc(r.desc, 0, virtiotest.Desc{Addr: rawBase, Len: 4, Flags: virtiotest.DescWrite})
	for range 3 {
		r.offer(0)
	}
	boom := errors.New("boom")
	calls := 0
	err := r.Serve(func(c *virtio.Chain) (uint32, error) {
		if calls++; calls == 3 {
			return 0, boom
		}
		return 4, nil
	})
	if err != boom || calls != 3 {
		t.Errorf("%d calls, then %v", calls, err)
	}
	if _, used := r.Indices(); used != 2 {
		t.Errorf("%d chains returned, want 2", used)
	}
	r.Close()
	if err := r.Serve(nil); err != nil {
		t.Errorf("after Close: %v", err)
	}

	r = newRaw(t, 8, event, 0)
	r.offer(8)
	if err := r.Serve(nil); !errors.Is(err, virtio.ErrProtocol) {
		t.Errorf("broken ring: %v", err)
	}
}

func TestPopAfterClose(t *testing.T) {
	r := newRaw(t, 8, event, 0)
	r.offer(0)
	r.Close()
	var c virtio.Chain
	if ok, err := r.Pop(&c); ok || err != nil {
		t.Errorf("a closed queue gave a chain (%v, %v)", ok, err)
	}
}

func TestIOV(t *testing.T) {
	parts := func() [][]byte { return [][]byte{[]byte("ab"), []byte("c"), []byte("defg")} }
	joined := func(b [][]byte) string { return string(bytes.Join(b, nil)) }
	const all = "abcdefg"
	if n := virtio.Len(parts()); n != 7 {
		t.Errorf("Len: %d", n)
	}
	for n := range 9 {
		k := min(n, 7)
		if got := joined(virtio.Drop(parts(), n)); got != all[k:] {
			t.Errorf("Drop(%d): %q", n, got)
		}
		if got := joined(virtio.Cut(parts(), n)); got != all[:k] {
			t.Errorf("Cut(%d): %q", n, got)
		}
		dst := make([]byte, n)
		if m := virtio.Gather(dst, parts()); m != k || string(dst[:k]) != all[:k] {
			t.Errorf("Gather(%d): %d, %q", n, m, dst)
		}
		p, src := parts(), bytes.Repeat([]byte{'-'}, n)
		if m := virtio.Scatter(p, src); m != k || joined(p) != string(src[:k])+all[k:] {
			t.Errorf("Scatter(%d): %d, %q", n, m, joined(p))
		}
	}
}
