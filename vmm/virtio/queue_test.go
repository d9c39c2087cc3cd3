package virtio_test

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"strings"
	"sync"
	"testing"
	"time"
	"unsafe"

	"github.com/wsl2/wsl2/vmm/eventfd"
	"github.com/wsl2/wsl2/vmm/guestmem"
	"github.com/wsl2/wsl2/vmm/virtio"
	"github.com/wsl2/wsl2/vmm/virtio/virtiotest"
)

// echo is a device that copies each chain's readable bytes to its writable ones.
type echo struct {
	size  uint16
	done  chan struct{}
	queue *virtio.Queue
}

func (e *echo) ID() virtio.ID             { return 42 }
func (e *echo) Features() uint64          { return 0 }
func (e *echo) QueueSizes() []uint16      { return []uint16{e.size} }
func (e *echo) ReadConfig(uint32, []byte) {}
func (e *echo) WriteConfig(uint32, []byte) {
}

func (e *echo) Start(s virtio.Session) error {
	e.done, e.queue = make(chan struct{}), s.Queues[0]
	go func() {
		defer close(e.done)
		var c virtio.Chain
		for {
			if err := e.queue.Wait(); err != nil {
				return
			}
			for {
				ok, err := e.queue.Pop(&c)
				if err != nil {
					s.Failed(err)
					return
				}
				if !ok {
					break
				}
				in := bytes.Join(c.Readable, nil)
				n := uint32(0)
				for _, w := range c.Writable {
					k := copy(w, in)
					in, n = in[k:], n+uint32(k)
				}
				e.queue.Push(c.Head, n)
			}
			e.queue.Notify()
		}
	}()
	return nil
}

func (e *echo) Stop() {
	if e.queue == nil {
		return
	}
	e.queue.Close()
	<-e.done
	e.queue = nil
}

const (
	plain    = uint64(virtio.FeatureVersion1)
	event    = plain | virtio.FeatureEventIdx
	indirect = plain | virtio.FeatureIndirectDesc
)

func TestQueueEcho(t *testing.T) {
	for _, features := range []uint64{plain, event, indirect, event | indirect} {
		for _, size := range []uint16{4, 256} {
			t.Run(fmt.Sprintf("features %#x size %d", features, size), func(t *testing.T) {
				g := virtiotest.Start(t, &echo{size: size}, virtiotest.Options{Features: features})
				var wg sync.WaitGroup
				for w := range 4 {
					wg.Add(1)
					go func() {
						defer wg.Done()
						for i := range 200 {
							want := fmt.Appendf(nil, "worker %d request %d", w, i)
							n, got := g.Ring(0).Do(t, [][]byte{want[:5], want[5:]}, 3, 97)
							if n != len(want) || !bytes.Equal(got[:n], want) {
								t.Errorf("got %q (%d), want %q", got, n, want)
							}
						}
					}()
				}
				wg.Wait()
			})
		}
	}
}

// Both 16-bit indices wrap without a lost event.
func TestQueueIndexWrap(t *testing.T) {
	for _, features := range []uint64{plain, event} {
		g := virtiotest.Start(t, &echo{size: 8}, virtiotest.Options{Features: features, Direct: true})
		r := g.Ring(0)
		var reqs []*virtiotest.Request
		for range 8 {
			reqs = append(reqs, r.Prepare(t, nil, 1))
		}
		for range 70_000 / 8 {
			r.SubmitAll(reqs...)
			for _, q := range reqs {
				q.Wait(t)
			}
		}
		t.Logf("features %#x: %d kicks and %d interrupts for 70000 chains", features, r.Kicks(), r.Interrupts())
	}
}

// raw is a queue whose rings the test writes by hand, single-threaded.
type raw struct {
	*virtio.Queue
	mem                 []byte
	desc, avail, used   guestmem.Addr
	kick                *eventfd.EventFD
	interrupts, offered int
}

const rawBase = 0x1000

func (r *raw) at(a guestmem.Addr) []byte { return r.mem[a-rawBase:] }

func newRaw(t testing.TB, size uint16, features uint64, availShift guestmem.Addr) *raw {
	t.Helper()
	r := &raw{
		mem:   make([]byte, 1<<20),
		desc:  rawBase,
		avail: rawBase + 0x1_0000 + availShift,
		used:  rawBase + 0x2_0000,
	}
	m, err := guestmem.New(guestmem.Region{Start: rawBase, Bytes: r.mem})
	if err != nil {
		t.Fatal(err)
	}
	if r.kick, err = eventfd.New(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { r.kick.Close() })
	r.Queue, err = virtio.NewQueue(virtio.QueueConfig{
		Memory: m, Size: size, Desc: r.desc, Driver: r.avail, Device: r.used,
		Features: features, Kick: r.kick, Interrupt: func() { r.interrupts++ },
	})
	if err != nil {
		t.Fatal(err)
	}
	return r
}

func (r *raw) setDesc(table guestmem.Addr, i int, d virtiotest.Desc) {
	b := r.at(table + guestmem.Addr(16*i))
	binary.LittleEndian.PutUint64(b, uint64(d.Addr))
	binary.LittleEndian.PutUint32(b[8:], d.Len)
	binary.LittleEndian.PutUint16(b[12:], d.Flags)
	binary.LittleEndian.PutUint16(b[14:], d.Next)
}

func (r *raw) offer(head uint16) {
	binary.LittleEndian.PutUint16(r.at(r.avail+4+2*guestmem.Addr(r.offered%int(r.Size()))), head)
	r.offered++
	r.setAvail(uint16(r.offered))
}

func (r *raw) setAvail(idx uint16) { binary.LittleEndian.PutUint16(r.at(r.avail+2), idx) }

func TestQueueRefusesBrokenChains(t *testing.T) {
	const (
		next, write, ind = virtiotest.DescNext, virtiotest.DescWrite, virtiotest.DescIndirect
		buf              = rawBase + 0x3_0000
		table            = rawBase + 0x4_0000
	)
	type desc struct { // virtiotest.Desc, for rows without field names
		Addr        guestmem.Addr
		Len         uint32
		Flags, Next uint16
	}
	for _, tc := range []struct {
		name     string
		features uint64
		head     uint16
		descs    []desc
		table    []desc
		want     string
	}{
		{"head out of range", indirect, 8, nil, nil, "descriptor 8 of a table of 8"},
		{"head out of range, largest", indirect, 0xffff, nil, nil, "descriptor 65535"},
		{"next out of range", indirect, 0, []desc{{buf, 1, next, 8}}, nil, "descriptor 8 of a table of 8"},
		{"self loop", indirect, 0, []desc{{buf, 1, next, 0}}, nil, "loop"},
		{"two-loop of empty buffers", indirect, 0, []desc{{buf, 0, next, 1}, {buf, 0, next, 0}}, nil, "loop"},
		{"hole", indirect, 0, []desc{{0, 1, 0, 0}}, nil, "not in guest memory"},
		{"end of memory", indirect, 0, []desc{{rawBase + 1<<20 - 1, 2, 0, 0}}, nil, "not in guest memory"},
		{"address wraps", indirect, 0, []desc{{^guestmem.Addr(0), 2, write, 0}}, nil, "not in guest memory"},
		{"readable behind writable", indirect, 0, []desc{{buf, 1, next | write, 1}, {buf, 1, 0, 0}}, nil, "behind a writable"},
		{"indirect not negotiated", plain, 0, []desc{{table, 16, ind, 0}}, []desc{{buf, 1, 0, 0}}, "not negotiated"},
		{"indirect with next", indirect, 0, []desc{{table, 16, ind | next, 1}, {buf, 1, 0, 0}}, []desc{{buf, 1, 0, 0}}, "goes on behind"},
		{"indirect of odd length", indirect, 0, []desc{{table, 17, ind, 0}}, []desc{{buf, 1, 0, 0}}, "indirect table of 17 bytes"},
		{"indirect empty", indirect, 0, []desc{{table, 0, ind, 0}}, []desc{{buf, 1, 0, 0}}, "indirect table of 0 bytes"},
		{"indirect too long", indirect, 0, []desc{{table, 16 * 1025, ind, 0}}, []desc{{buf, 1, 0, 0}}, "indirect table of 16400 bytes"},
		{"indirect outside", indirect, 0, []desc{{0x10, 16, ind, 0}}, nil, "not in guest memory"},
		{"nested", indirect, 0, []desc{{table, 16, ind, 0}}, []desc{{table, 16, ind, 0}}, "nests"},
		{"indirect loop", indirect, 0, []desc{{table, 32, ind, 0}}, []desc{{buf, 1, next, 1}, {buf, 1, next, 0}}, "loop"},
		{"indirect next outside its table", indirect, 0, []desc{{table, 16, ind, 0}}, []desc{{buf, 1, next, 1}}, "descriptor 1 of a table of 1"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			r := newRaw(t, 8, tc.features, 0)
			for i, d := range tc.descs {
				r.setDesc(r.desc, i, virtiotest.Desc(d))
			}
			for i, d := range tc.table {
				r.setDesc(table, i, virtiotest.Desc(d))
			}
			r.offer(tc.head)
			var c virtio.Chain
			for range 2 { // the error is sticky
				ok, err := r.Pop(&c)
				if ok || !errors.Is(err, virtio.ErrProtocol) || !strings.Contains(err.Error(), tc.want) {
					t.Fatalf("Pop: %v, %v; want an ErrProtocol with %q", ok, err, tc.want)
				}
			}
			if err := r.Wait(); !errors.Is(err, virtio.ErrProtocol) {
				t.Errorf("Wait on a broken queue: %v", err)
			}
		})
	}
}

func TestQueueRefusesTooMuchData(t *testing.T) {
	// 1024 times the same 8 MiB: every descriptor is fine, the sum is not.
	mem := make([]byte, 8<<20)
	m, err := guestmem.New(guestmem.Region{Start: 0, Bytes: mem})
	if err != nil {
		t.Fatal(err)
	}
	kick, err := eventfd.New()
	if err != nil {
		t.Fatal(err)
	}
	defer kick.Close()
	for i := range 1024 {
		b := mem[16*i:]
		binary.LittleEndian.PutUint32(b[8:], 8<<20)
		binary.LittleEndian.PutUint16(b[12:], virtiotest.DescNext|virtiotest.DescWrite)
		binary.LittleEndian.PutUint16(b[14:], uint16(i+1))
	}
	binary.LittleEndian.PutUint16(mem[0x8002:], 1)
	q, err := virtio.NewQueue(virtio.QueueConfig{Memory: m, Size: 1024, Desc: 0, Driver: 0x8000, Device: 0xa000, Kick: kick, Interrupt: func() {}})
	if err != nil {
		t.Fatal(err)
	}
	var c virtio.Chain
	if _, err := q.Pop(&c); err == nil || !strings.Contains(err.Error(), "longer than 4 GiB") {
		t.Fatalf("Pop: %v", err)
	}
}

func TestQueueRefusesAvailTooFarAhead(t *testing.T) {
	r := newRaw(t, 8, plain, 0)
	r.setDesc(r.desc, 0, virtiotest.Desc{Addr: rawBase, Len: 1})
	r.setAvail(9)
	var c virtio.Chain
	if _, err := r.Pop(&c); !errors.Is(err, virtio.ErrProtocol) {
		t.Fatalf("9 chains on a queue of 8: %v", err)
	}

	// 8 popped and none returned: a ninth is the driver's error as well.
	r = newRaw(t, 8, plain, 0)
	r.setDesc(r.desc, 0, virtiotest.Desc{Addr: rawBase, Len: 1})
	for range 8 {
		r.offer(0)
	}
	for range 8 {
		if ok, err := r.Pop(&c); !ok || err != nil {
			t.Fatal(ok, err)
		}
	}
	if ok, err := r.Pop(&c); ok || err != nil {
		t.Fatal(ok, err)
	}
	r.offer(0)
	if _, err := r.Pop(&c); !errors.Is(err, virtio.ErrProtocol) {
		t.Fatalf("ninth outstanding chain: %v", err)
	}
}

// An indirect table may follow direct descriptors (virtio 1.2 §2.7.5.3.2), be
// longer than the queue, and empty buffers are left out.
func TestQueueIndirectBehindDirect(t *testing.T) {
	const table, buf = rawBase + 0x4_0000, rawBase + 0x3_0000
	r := newRaw(t, 2, indirect, 0)
	r.setDesc(r.desc, 1, virtiotest.Desc{Addr: buf, Len: 16, Flags: virtiotest.DescNext, Next: 0})
	r.setDesc(r.desc, 0, virtiotest.Desc{Addr: table, Len: 16 * 1024, Flags: virtiotest.DescIndirect | virtiotest.DescWrite})
	for i := range 1024 {
		d := virtiotest.Desc{Addr: buf + guestmem.Addr(i), Len: 1, Flags: virtiotest.DescWrite | virtiotest.DescNext, Next: uint16(i + 1)}
		if i == 7 {
			d.Len = 0
		}
		if i == 1023 {
			d.Flags = virtiotest.DescWrite
		}
		r.setDesc(table, i, d)
	}
	r.offer(1)
	var c virtio.Chain
	if ok, err := r.Pop(&c); !ok || err != nil {
		t.Fatal(ok, err)
	}
	if c.Head != 1 || len(c.Readable) != 1 || len(c.Readable[0]) != 16 || len(c.Writable) != 1023 {
		t.Errorf("head %d, %d readable, %d writable", c.Head, len(c.Readable), len(c.Writable))
	}
}

func TestQueueRefusesBadRings(t *testing.T) {
	m, err := guestmem.New(guestmem.Region{Start: 0x1000, Bytes: make([]byte, 0x10000)})
	if err != nil {
		t.Fatal(err)
	}
	kick, err := eventfd.New()
	if err != nil {
		t.Fatal(err)
	}
	defer kick.Close()
	good := virtio.QueueConfig{Memory: m, Size: 256, Desc: 0x1000, Driver: 0x3000, Device: 0x4000, Features: event, Kick: kick, Interrupt: func() {}}
	if _, err := virtio.NewQueue(good); err != nil {
		t.Fatal(err)
	}
	for name, change := range map[string]func(*virtio.QueueConfig){
		"size 0":                  func(c *virtio.QueueConfig) { c.Size = 0 },
		"size 3":                  func(c *virtio.QueueConfig) { c.Size = 3 },
		"table misaligned":        func(c *virtio.QueueConfig) { c.Desc += 8 },
		"available misaligned":    func(c *virtio.QueueConfig) { c.Driver++ },
		"used misaligned":         func(c *virtio.QueueConfig) { c.Device += 2 },
		"table outside":           func(c *virtio.QueueConfig) { c.Desc = 0x10fe0 },
		"available outside":       func(c *virtio.QueueConfig) { c.Driver = 0x10ffe },
		"used outside":            func(c *virtio.QueueConfig) { c.Device = 0x10ffc },
		"used wraps":              func(c *virtio.QueueConfig) { c.Device = ^guestmem.Addr(3) },
		"used_event just outside": func(c *virtio.QueueConfig) { c.Driver = 0x11000 - 4 - 512 },
		"avail_event outside":     func(c *virtio.QueueConfig) { c.Device = 0x11000 - 4 - 2048 },
	} {
		c := good
		change(&c)
		if _, err := virtio.NewQueue(c); !errors.Is(err, virtio.ErrProtocol) {
			t.Errorf("%s: %v", name, err)
		}
	}
	c := good
	c.Kick = nil
	if _, err := virtio.NewQueue(c); err == nil {
		t.Error("no kick: accepted")
	}
}

// The available ring needs only 2-byte alignment (virtio 1.2 §2.7).
func TestQueueAvailableRingAlignment(t *testing.T) {
	r := newRaw(t, 8, event, 2)
	r.setDesc(r.desc, 3, virtiotest.Desc{Addr: rawBase, Len: 1, Flags: virtiotest.DescWrite})
	r.offer(3)
	var c virtio.Chain
	if ok, err := r.Pop(&c); !ok || err != nil || c.Head != 3 {
		t.Fatal(ok, err, c.Head)
	}
	r.Push(3, 1)
	r.Notify()
	if r.interrupts != 1 {
		t.Errorf("%d interrupts, want 1", r.interrupts)
	}
}

func TestQueueNotify(t *testing.T) {
	var c virtio.Chain
	pushes := func(r *raw, n int) {
		t.Helper()
		for range n {
			r.offer(0)
			if ok, err := r.Pop(&c); !ok || err != nil {
				t.Fatal(ok, err)
			}
			r.Push(c.Head, 0)
		}
		r.Notify()
	}
	t.Run("flags", func(t *testing.T) {
		r := newRaw(t, 8, plain, 0)
		r.setDesc(r.desc, 0, virtiotest.Desc{Addr: rawBase, Len: 1})
		r.Notify()
		if r.interrupts != 0 {
			t.Fatal("interrupt without a push")
		}
		pushes(r, 3)
		if r.interrupts != 1 {
			t.Fatalf("%d interrupts, want 1", r.interrupts)
		}
		r.at(r.avail)[0] = 1 // VIRTQ_AVAIL_F_NO_INTERRUPT
		pushes(r, 3)
		if r.interrupts != 1 {
			t.Fatal("interrupt although suppressed")
		}
	})
	t.Run("event index", func(t *testing.T) {
		r := newRaw(t, 8, event, 0)
		r.setDesc(r.desc, 0, virtiotest.Desc{Addr: rawBase, Len: 1})
		usedEvent := r.at(r.avail + 4 + 16)
		r.at(r.avail)[0] = 1 // ignored with the event index
		for _, step := range []struct {
			event  uint16
			pushes int
			want   int
		}{
			{0, 1, 1}, // used 0→1 passes 0
			{0, 1, 0}, // 1→2
			{4, 2, 0}, // 2→4: not yet beyond 4
			{4, 1, 1}, // 4→5
			{7, 8, 1}, // 5→13
			{20, 7, 0},
			{19, 1, 0},
		} {
			binary.LittleEndian.PutUint16(usedEvent, step.event)
			r.interrupts = 0
			pushes(r, step.pushes)
			if r.interrupts != step.want {
				t.Errorf("used_event %d, %d pushes: %d interrupts, want %d", step.event, step.pushes, r.interrupts, step.want)
			}
		}
	})
}

func TestQueueWait(t *testing.T) {
	waiting := func(r *raw) chan error {
		done := make(chan error)
		go func() { done <- r.Wait() }()
		return done
	}
	result := func(t *testing.T, done chan error) error {
		t.Helper()
		select {
		case err := <-done:
			return err
		case <-time.After(virtiotest.Timeout):
			t.Fatal("Wait does not return")
			return nil
		}
	}
	t.Run("close before", func(t *testing.T) {
		r := newRaw(t, 8, event, 0)
		r.Close()
		if err := r.Wait(); !errors.Is(err, os.ErrClosed) {
			t.Error(err)
		}
	})
	t.Run("close during", func(t *testing.T) {
		r := newRaw(t, 8, event, 0)
		done := waiting(r)
		r.Close()
		if err := result(t, done); !errors.Is(err, os.ErrClosed) {
			t.Error(err)
		}
		if err := r.kick.Signal(); err != nil {
			t.Errorf("the kick eventfd was closed: %v", err)
		}
	})
	t.Run("work is there", func(t *testing.T) {
		r := newRaw(t, 8, event, 0)
		r.offer(0)
		if err := r.Wait(); err != nil {
			t.Error(err)
		}
	})
	t.Run("spurious kicks", func(t *testing.T) {
		for _, features := range []uint64{plain, event} {
			r := newRaw(t, 8, features, 0)
			for range 100 {
				if err := r.kick.Signal(); err != nil {
					t.Fatal(err)
				}
			}
			done := waiting(r)
			r.Close()
			if err := result(t, done); !errors.Is(err, os.ErrClosed) {
				t.Fatal(err)
			}
		}
	})
}

// Notifications are on only while Wait sleeps, by flag or by event index, and
// the bytes behind the used ring are not the device's.
func TestQueueAsksForKicks(t *testing.T) {
	var c virtio.Chain
	r := newRaw(t, 8, event, 0)
	r.setDesc(r.desc, 0, virtiotest.Desc{Addr: rawBase, Len: 1})
	availEvent := r.at(r.used + 4 + 64)
	copy(availEvent[2:], "mine")
	for i := range uint16(20) {
		if r.Arm() {
			t.Fatal("an empty ring reports work")
		}
		if got := binary.LittleEndian.Uint16(availEvent); got != i {
			t.Fatalf("avail_event is %d, want %d", got, i)
		}
		r.offer(0)
		if err := r.Wait(); err != nil {
			t.Fatal(err)
		}
		if ok, err := r.Pop(&c); !ok || err != nil {
			t.Fatal(ok, err)
		}
		r.Push(0, 0)
	}
	if got := string(availEvent[2:6]); got != "mine" {
		t.Errorf("bytes behind the used ring became %q", got)
	}
	if flags := binary.LittleEndian.Uint16(r.at(r.used)); flags != 0 {
		t.Errorf("used.flags is %d; with the event index it must be 0", flags)
	}

	r = newRaw(t, 8, plain, 0)
	flags := func() uint16 { return binary.LittleEndian.Uint16(r.at(r.used)) }
	if r.Arm(); flags() != 0 {
		t.Error("armed, but kicks are not wanted")
	}
	if r.Disarm(); flags() != 1 {
		t.Error("disarmed, but kicks are wanted")
	}
	r.offer(0)
	if ok, err := r.Pop(&c); !ok || err != nil {
		t.Fatal(ok, err)
	}
	r.Push(0, 7)
	if used := r.at(r.used); flags() != 1 || binary.LittleEndian.Uint16(used[2:]) != 1 || binary.LittleEndian.Uint32(used[8:]) != 7 {
		t.Errorf("used ring after a push: % x", used[:12])
	}
}

func TestQueueDoesNotAllocate(t *testing.T) {
	r := newRaw(t, 8, event|indirect, 0)
	for i := range 3 {
		r.setDesc(r.desc, i, virtiotest.Desc{Addr: rawBase, Len: 1, Flags: virtiotest.DescNext, Next: uint16(i + 1)})
	}
	r.setDesc(r.desc, 3, virtiotest.Desc{Addr: rawBase, Len: 1, Flags: virtiotest.DescWrite})
	var c virtio.Chain
	if n := testing.AllocsPerRun(1000, func() {
		r.offer(0)
		if err := r.Wait(); err != nil {
			t.Fatal(err)
		}
		if ok, err := r.Pop(&c); !ok || err != nil {
			t.Fatal(ok, err)
		}
		r.Push(c.Head, 1)
		r.Notify()
	}); n != 0 {
		t.Errorf("%.1f allocations per chain", n)
	}
}

// FuzzQueue reads ops that build mostly valid chains with rare flips, and
// checks what every device relies on: buffers lie in guest memory, their sum
// is below 4 GiB, nothing panics or goes on for ever.
func FuzzQueue(f *testing.F) {
	f.Add([]byte{0, 1, 2, 3, 4, 5, 6, 7, 8, 9})
	f.Add(bytes.Repeat([]byte{0x13, 0x55, 0x80, 0x07}, 40))
	f.Add(bytes.Repeat([]byte{0xff}, 64))
	f.Fuzz(func(t *testing.T, ops []byte) {
		const table, buf = rawBase + 0x4_0000, rawBase + 0x5_0000
		op := func() int {
			if len(ops) == 0 {
				return 0
			}
			v := ops[0]
			ops = ops[1:]
			return int(v)
		}
		features := plain
		if op()&1 != 0 {
			features |= virtio.FeatureEventIdx
		}
		if op()&7 != 0 {
			features |= virtio.FeatureIndirectDesc
		}
		r := newRaw(t, 16, features, guestmem.Addr(op()&1)*2)
		chain := func(at guestmem.Addr, first, n int) {
			writableFrom := op() % (n + 1)
			for i := range n {
				d := virtiotest.Desc{Addr: buf + guestmem.Addr(op())<<6, Len: uint32(op()), Flags: virtiotest.DescNext, Next: uint16(first + i + 1)}
				if i >= writableFrom {
					d.Flags |= virtiotest.DescWrite
				}
				if i == n-1 {
					d.Flags &^= virtiotest.DescNext
				}
				switch v := op(); v { // rare flips
				case 250:
					d.Next = uint16(op())
				case 251:
					d.Flags ^= uint16(op())
				case 252:
					d.Addr = guestmem.Addr(op()) << 56
				case 253:
					d.Len = uint32(op()) << 24
				case 254:
					d.Next = uint16(first)
					d.Flags |= virtiotest.DescNext
				case 255:
					d.Addr = rawBase + 1<<20 - guestmem.Addr(op())
				}
				r.setDesc(at, first+i, d)
			}
		}
		var c virtio.Chain
		var heads []uint16
		for len(ops) > 0 {
			first := op() % 12
			if op()&1 != 0 {
				chain(r.desc, first, 1+op()%4)
			} else {
				n := 1 + op()%32
				chain(table, 0, n)
				r.setDesc(r.desc, first, virtiotest.Desc{Addr: table, Len: uint32(16 * n), Flags: virtiotest.DescIndirect})
			}
			r.offer(uint16(first))
			if op() == 255 {
				r.setAvail(uint16(op() << 8))
			}
			ok, err := r.Pop(&c)
			if err != nil {
				if !errors.Is(err, virtio.ErrProtocol) {
					t.Fatalf("not a driver error: %v", err)
				}
				return
			}
			if !ok {
				continue
			}
			var sum uint64
			for _, b := range append(append([][]byte{}, c.Readable...), c.Writable...) {
				if len(b) == 0 || cap(b) != len(b) || !within(r.mem, b) {
					t.Fatal("a buffer outside guest memory")
				}
				sum += uint64(len(b))
			}
			if sum >= 1<<32 {
				t.Fatal("4 GiB or more")
			}
			// A guest scribbles over its buffers, the tables included.
			for _, b := range c.Writable {
				b[0] ^= byte(op())
			}
			if heads = append(heads, c.Head); op()&3 != 0 {
				for _, h := range heads {
					r.Push(h, uint32(sum))
				}
				heads = heads[:0]
				r.Notify()
			}
		}
	})
}

// within reports whether b is a part of mem.
func within(mem, b []byte) bool {
	off := uintptr(unsafe.Pointer(unsafe.SliceData(b))) - uintptr(unsafe.Pointer(unsafe.SliceData(mem)))
	return off < uintptr(len(mem)) && off+uintptr(len(b)) <= uintptr(len(mem))
}

func BenchmarkQueue(b *testing.B) {
	for _, n := range []int{1, 3, 32} {
		b.Run(fmt.Sprintf("chain of %d", n), func(b *testing.B) {
			const table, buf = rawBase + 0x4_0000, rawBase + 0x5_0000
			r := newRaw(b, 256, event|indirect, 0)
			for i := range n {
				d := virtiotest.Desc{Addr: buf, Len: 4096, Flags: virtiotest.DescNext, Next: uint16(i + 1)}
				if i == n-1 {
					d.Flags = virtiotest.DescWrite
				}
				r.setDesc(table, i, d)
			}
			r.setDesc(r.desc, 0, virtiotest.Desc{Addr: table, Len: uint32(16 * n), Flags: virtiotest.DescIndirect})
			var c virtio.Chain
			b.ReportAllocs()
			for b.Loop() {
				r.offer(0)
				if ok, err := r.Pop(&c); !ok || err != nil {
					b.Fatal(ok, err)
				}
				r.Push(c.Head, 4096)
				r.Notify()
			}
		})
	}
}

// One request at a time: kick, device goroutine, interrupt, driver goroutine.
func BenchmarkQueueRoundTrip(b *testing.B) {
	g := virtiotest.Start(b, &echo{size: 256}, virtiotest.Options{})
	req := g.Ring(0).Prepare(b, nil, 1)
	b.ReportAllocs()
	for b.Loop() {
		req.Submit()
		<-req.Done()
	}
}

// TestQueuePushAll: the driver sees several chains at once, and one interrupt is for all of
// them.
func TestQueuePushAll(t *testing.T) {
	r := newRaw(t, 8, plain, 0)
	for i := range 3 {
		r.setDesc(r.desc, i, virtiotest.Desc{Addr: rawBase, Len: 16, Flags: virtiotest.DescWrite})
		r.offer(uint16(i))
	}
	var c virtio.Chain
	for range 3 {
		if ok, err := r.Pop(&c); !ok || err != nil {
			t.Fatal(ok, err)
		}
	}
	r.PushAll([]virtio.Used{{Head: 2, Len: 5}, {Head: 0, Len: 6}, {Head: 1}})
	if _, used := r.Indices(); used != 3 {
		t.Errorf("used index %d", used)
	}
	for i, want := range []virtio.Used{{Head: 2, Len: 5}, {Head: 0, Len: 6}, {Head: 1}} {
		e := r.at(r.used + 4 + 8*guestmem.Addr(i))
		if head, n := binary.LittleEndian.Uint32(e), binary.LittleEndian.Uint32(e[4:]); head != uint32(want.Head) || n != want.Len {
			t.Errorf("element %d: chain %d, %d bytes; want %+v", i, head, n, want)
		}
	}
	if idx := binary.LittleEndian.Uint16(r.at(r.used + 2)); idx != 3 {
		t.Errorf("the driver sees %d", idx)
	}
	if r.Notify(); r.interrupts != 1 {
		t.Errorf("%d interrupts", r.interrupts)
	}
}
