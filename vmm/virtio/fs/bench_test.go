package fs

import (
	"net"
	"os"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/wsl2/wsl2/vmm/virtio/virtiotest"
)

// BenchmarkRequest is one request at a time, through the device to a server at the other end of a
// socket: what it costs of the processor, which is more telling than the time on a busy machine.
func BenchmarkRequest(b *testing.B) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		b.Fatal(err)
	}
	var conns [2]net.Conn
	for i, fd := range fds {
		f := os.NewFile(uintptr(fd), "socket")
		if conns[i], err = net.FileConn(f); err != nil {
			b.Fatal(err)
		}
		f.Close()
	}
	d := New("tag")
	g := virtiotest.Start(b, d, virtiotest.Options{})
	if err := d.Attach(conns[0]); err != nil {
		b.Fatal(err)
	}
	served := make(chan struct{})
	go func() {
		defer close(served)
		if Accept(conns[1]) == nil {
			Serve(conns[1], echo) //nolint:errcheck // it ends with the device
		}
	}()
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
	<-served
}
