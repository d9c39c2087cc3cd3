package qemu

import (
	"context"
	"time"
)

// rdtsc reads the host's time stamp counter, which TCG hands to the guest as it
// is, moved by a constant.
func rdtsc() uint64

// tscInterval is how long the counter is watched: the rate is good to some
// 10 ppm then, which is what a PC's clock has.
const tscInterval = 10 * time.Millisecond

// tscKHz measures the host's time stamp counter against its clock. It takes
// tscInterval; 0 means that ctx ended.
//
// The guest cannot do it: without KVM's clock, ACPI timer or HPET it times the
// counter against the PIT by reading that in a tight loop, which fails on a busy
// host; then its clock counts ticks, 4 ms each, and loses those that come while
// its vCPU waits for a CPU.
func tscKHz(ctx context.Context) uint64 {
	t0, c0 := tscSample()
	timer := time.NewTimer(tscInterval)
	defer timer.Stop()
	select {
	case <-timer.C:
	case <-ctx.Done():
		return 0
	}
	t1, c1 := tscSample()
	return uint64(float64(c1-c0) / float64(t1.Sub(t0)) * 1e6)
}

// tscSample returns one moment on both clocks: of a few attempts the one that
// was disturbed least.
func tscSample() (at time.Time, count uint64) {
	best := time.Duration(1<<63 - 1)
	for range 8 {
		before := time.Now()
		c := rdtsc()
		if d := time.Since(before); d < best {
			best, at, count = d, before.Add(d/2), c
		}
	}
	return at, count
}
