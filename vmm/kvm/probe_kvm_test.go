//go:build kvm

package kvm

import (
	"context"
	"testing"
	"time"
)

// A real KVM is usable, and the probe is quick enough to be run at each start.
func TestProbeUsable(t *testing.T) {
	for range 20 {
		start := time.Now()
		if err := Probe(context.Background()); err != nil {
			t.Fatal(err)
		}
		t.Log(time.Since(start))
	}
}
