package qemu

import (
	"context"
	"math"
	"testing"
)

func TestTSC(t *testing.T) {
	a, b := float64(tscKHz(t.Context())), float64(tscKHz(t.Context()))
	if a < 1e5 || a > 1e8 {
		t.Errorf("%v kHz", a)
	}
	if d := math.Abs(a-b) / a; d > 1e-3 {
		t.Errorf("two measurements differ by %v: %v and %v kHz", d, a, b)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if k := tscKHz(ctx); k != 0 {
		t.Errorf("%v kHz from a context that had ended", k)
	}
}
