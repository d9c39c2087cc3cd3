// Package virtiotest is a virtio driver for tests of devices: it plays guest
// and transport. Start lays out guest memory and rings, starts the device as a
// transport does, and stops it when the test ends. Requests complete by the
// device's interrupts, as in a guest; nothing polls.
//
//	g := virtiotest.Start(t, dev, virtiotest.Options{})
//	req := g.Ring(0).Send(t, [][]byte{header}, 512, 1)
//	n, data := req.Wait(t)
//
// For drivers that misbehave, Ring gives the raw rings: SetDesc, Offer, Kick.
package virtiotest

import (
	"fmt"
	"math/bits"
	"sync"
	"testing"
	"time"
	"unsafe"

	"github.com/wsl2/wsl2/vmm/guestmem"
	"github.com/wsl2/wsl2/vmm/virtio"
)

// Timeout is how long a test waits for an event before it fails.
const Timeout = 30 * time.Second

// base is where guest memory starts: not at 0, so that a forgotten translation shows.
const base guestmem.Addr = 0x10_0000

// Options are how Start sets up a device. The zero value is a usable guest.
type Options struct {
	// Features are those the driver accepts; 0 means all that are offered.
	// FeatureVersion1 is always accepted.
	Features uint64
	// MemoryBytes is the size of guest memory, 16 MiB if 0.
	MemoryBytes int
	// Backing is the guest's memory, instead of MemoryBytes of the Go heap. It is
	// the caller's and must be zero.
	Backing []byte
	// QueueSize bounds every queue's size; 0 takes what the device offers.
	QueueSize uint16
	// Disabled lists the virtqueues that the driver does not enable.
	Disabled []int
	// Direct makes Send chain descriptors even if indirect tables were negotiated.
	Direct bool
}

// Guest is a guest that drives one device.
type Guest struct {
	Memory   *guestmem.Memory
	Features uint64 // negotiated
	// ConfigChanged has one entry per configuration change notification.
	ConfigChanged <-chan struct{}
	// Failed has one entry per call of Session.Failed.
	Failed <-chan error

	dev   virtio.Device
	rings []*Ring
	alloc *allocator
	stop  sync.Once
}

// Start starts dev on fresh guest memory. The device is stopped when the test
// ends, or before by Stop.
func Start(t testing.TB, dev virtio.Device, o Options) *Guest {
	t.Helper()
	if o.MemoryBytes == 0 {
		o.MemoryBytes = 16 << 20
	}
	if o.Backing == nil {
		o.Backing = make([]byte, o.MemoryBytes)
	}
	mem, err := guestmem.New(guestmem.Region{Start: base, Bytes: o.Backing})
	if err != nil {
		t.Fatal(err)
	}
	if dev.Features()&virtio.RingFeatures != 0 {
		t.Fatalf("device offers the ring's feature bits: %#x", dev.Features())
	}
	features := dev.Features() | virtio.RingFeatures
	if o.Features != 0 {
		features &= o.Features
	}
	features |= virtio.FeatureVersion1

	changed := make(chan struct{}, 1024)
	failed := make(chan error, 1024)
	g := &Guest{
		Memory: mem, Features: features, ConfigChanged: changed, Failed: failed,
		dev:   dev,
		alloc: &allocator{mem: mem, next: base, end: base + guestmem.Addr(len(o.Backing))},
	}
	disabled := map[int]bool{}
	for _, i := range o.Disabled {
		disabled[i] = true
	}
	var queues []*virtio.Queue
	for i, size := range dev.QueueSizes() {
		if disabled[i] {
			g.rings = append(g.rings, nil)
			queues = append(queues, nil)
			continue
		}
		if o.QueueSize != 0 {
			size = min(size, o.QueueSize)
		}
		r := newRing(t, g, size, features, o.Direct)
		g.rings = append(g.rings, r)
		queues = append(queues, r.Queue)
	}
	err = dev.Start(virtio.Session{
		Features: features, Memory: mem, Queues: queues,
		ConfigChanged: func() { changed <- struct{}{} },
		Failed:        func(err error) { failed <- err },
	})
	if err != nil {
		t.Fatalf("start device: %v", err)
	}
	t.Cleanup(g.Stop)
	return g
}

// Stop resets the device. Requests not completed by then never complete.
func (g *Guest) Stop() {
	g.stop.Do(func() {
		g.dev.Stop()
		for _, r := range g.rings {
			if r != nil {
				r.close()
			}
		}
	})
}

// Addr returns the guest physical address of b, which lies in guest memory.
func (g *Guest) Addr(t testing.TB, b []byte) guestmem.Addr {
	t.Helper()
	r := g.Memory.Regions()[0]
	off := uintptr(unsafe.Pointer(unsafe.SliceData(b))) - uintptr(unsafe.Pointer(unsafe.SliceData(r.Bytes)))
	if off >= uintptr(len(r.Bytes)) {
		t.Fatal("virtiotest: not in guest memory")
	}
	return r.Start + guestmem.Addr(off)
}

// Ring returns virtqueue i; nil if it is disabled.
func (g *Guest) Ring(i int) *Ring { return g.rings[i] }

// Alloc returns n bytes of guest memory, zeroed, that stay allocated.
func (g *Guest) Alloc(t testing.TB, n int) (guestmem.Addr, []byte) {
	t.Helper()
	b := g.alloc.get(n)
	if b.bytes == nil {
		t.Fatalf("virtiotest: guest memory exhausted by %d bytes; raise Options.MemoryBytes", n)
	}
	return b.addr, b.bytes
}

// WaitConfigChanged waits for one configuration change notification.
func (g *Guest) WaitConfigChanged(t testing.TB) {
	t.Helper()
	select {
	case <-g.ConfigChanged:
	case <-time.After(Timeout):
		t.Fatal("virtiotest: no configuration change notification")
	}
}

// WaitFailed waits until the device calls Session.Failed and returns its error.
func (g *Guest) WaitFailed(t testing.TB) error {
	t.Helper()
	select {
	case err := <-g.Failed:
		return err
	case <-time.After(Timeout):
		t.Fatal("virtiotest: the device did not report a failure")
		return nil
	}
}

// buffer is one allocation in guest memory.
type buffer struct {
	addr  guestmem.Addr
	bytes []byte
}

// allocator hands out guest memory in powers of two, from 16 bytes.
type allocator struct {
	mem       *guestmem.Memory
	mu        sync.Mutex
	next, end guestmem.Addr
	free      [48][]buffer
}

func class(n int) int { return bits.Len(uint(max(n, 16) - 1)) }

func (a *allocator) get(n int) buffer {
	a.mu.Lock()
	defer a.mu.Unlock()
	c := class(n)
	if l := a.free[c]; len(l) > 0 {
		b := l[len(l)-1]
		a.free[c] = l[:len(l)-1]
		b.bytes = b.bytes[:n]
		clear(b.bytes)
		return b
	}
	size := guestmem.Addr(1) << c
	align := min(size, 4096)
	at := (a.next + align - 1) &^ (align - 1)
	if at+size > a.end {
		return buffer{}
	}
	p, err := a.mem.Bytes(at, uint64(size))
	if err != nil {
		panic(fmt.Sprintf("BUG: allocator left guest memory: %v", err))
	}
	a.next = at + size
	return buffer{addr: at, bytes: p[:n]}
}

func (a *allocator) put(b buffer) {
	a.mu.Lock()
	defer a.mu.Unlock()
	c := bits.Len(uint(cap(b.bytes) - 1))
	a.free[c] = append(a.free[c], b)
}
