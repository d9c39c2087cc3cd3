package fs

import (
	"testing"

	"golang.org/x/sys/unix"

	"github.com/wsl2/wsl2/vmm/virtio/virtiotest"
)

// BenchmarkRequest is one request at a time, through the device to a server at the other end of a
// socket: what it costs of the processor, which is more telling than the time on a busy machine.
func BenchmarkRequest(b *testing.B) {
	d := New("tag")
	g := virtiotest.Start(b, d, virtiotest.Options{})
	end := attach(b, d, echo)
	defer end()
	ring, request := g.Ring(requests), [][]byte{message(opLookup, 1, "name")}
	var before, after unix.Rusage
	unix.Getrusage(unix.RUSAGE_SELF, &before) //nolint:errcheck // it cannot fail
	for b.Loop() {
		ring.Do(b, request, answered)
	}
	unix.Getrusage(unix.RUSAGE_SELF, &after) //nolint:errcheck // likewise
	used := after.Utime.Nano() + after.Stime.Nano() - before.Utime.Nano() - before.Stime.Nano()
	b.ReportMetric(float64(used)/float64(b.N), "cpu-ns/op")
	d.Close()
}
