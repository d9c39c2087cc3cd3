package blk

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/wsl2/wsl2/vmm/virtio"
	"github.com/wsl2/wsl2/vmm/virtio/virtiotest"
	"golang.org/x/sys/unix"
)

func header(typ uint32, sector uint64) []byte {
	h := make([]byte, headerSize)
	binary.LittleEndian.PutUint32(h, typ)
	binary.LittleEndian.PutUint64(h[8:], sector)
	return h
}

func ranges(rs ...[3]uint64) []byte { // sector, sectors, flags
	var b []byte
	for _, r := range rs {
		b = binary.LittleEndian.AppendUint64(b, r[0])
		b = binary.LittleEndian.AppendUint32(b, uint32(r[1]))
		b = binary.LittleEndian.AppendUint32(b, uint32(r[2]))
	}
	return b
}

// image makes a sparse file and opens it.
func image(t testing.TB, size int64) (string, *Disk) {
	t.Helper()
	path := filepath.Join(t.TempDir(), "disk.img")
	f, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(f.Truncate(size), f.Close()); err != nil {
		t.Fatal(err)
	}
	d, err := Open(path, false)
	if err != nil {
		t.Fatal(err)
	}
	return path, d
}

func start(t testing.TB, cfg Config, o virtiotest.Options) (*Device, *virtiotest.Guest) {
	t.Helper()
	d, err := New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := d.Close(); err != nil {
			t.Errorf("close: %v", err)
		}
	})
	return d, virtiotest.Start(t, d, o) // stopped before it is closed
}

// do sends a request whose last writable byte is the status and waits for it.
func do(t testing.TB, g *virtiotest.Guest, readable [][]byte, writable ...int) (status byte, data []byte) {
	t.Helper()
	n, data := g.Ring(0).Do(t, readable, append(writable, 1)...)
	status, data = data[len(data)-1], data[:len(data)-1]
	if status == statusOK && n != len(data)+1 {
		t.Errorf("used length %d, want %d", n, len(data)+1)
	}
	return status, data
}

func wantStatus(t testing.TB, what string, got, want byte) {
	t.Helper()
	if got != want {
		t.Errorf("%s: status %d, want %d", what, got, want)
	}
}

func capacity(d *Device) uint64 {
	var b [8]byte
	d.ReadConfig(configCapacity, b[:])
	return binary.LittleEndian.Uint64(b[:])
}

func TestReadWrite(t *testing.T) {
	for _, direct := range []bool{false, true} {
		t.Run(fmt.Sprint("direct descriptors: ", direct), func(t *testing.T) {
			path, disk := image(t, 4<<20)
			_, g := start(t, Config{Disk: disk}, virtiotest.Options{Direct: direct})
			random := rand.NewChaCha8([32]byte{1})
			model := make([]byte, 4<<20)
			for range 50 {
				sector := rand.IntN(4096)
				var parts [][]byte
				var lens []int
				for left := min(4<<20-sector*SectorSize, SectorSize*(1+rand.IntN(600))); left > 0; {
					n := min(left, 1+rand.IntN(9000))
					b := make([]byte, n)
					_, _ = random.Read(b)
					parts, lens, left = append(parts, b), append(lens, n), left-n
				}
				status, _ := do(t, g, append([][]byte{header(typeOut, uint64(sector))}, parts...))
				wantStatus(t, "write", status, statusOK)
				all := bytes.Join(parts, nil)
				copy(model[sector*SectorSize:], all)

				status, got := do(t, g, [][]byte{header(typeIn, uint64(sector))}, lens...)
				wantStatus(t, "read", status, statusOK)
				if !bytes.Equal(got, all) {
					t.Fatalf("sector %d: read back something else", sector)
				}
			}
			status, _ := do(t, g, [][]byte{header(typeFlush, 0)})
			wantStatus(t, "flush", status, statusOK)
			if file, err := os.ReadFile(path); err != nil || !bytes.Equal(file, model) {
				t.Errorf("the image differs from what was written (%v)", err)
			}
		})
	}
}

// A driver may frame a request in any way (virtio 1.2 §5.2.6, §2.7.4.3).
func TestFraming(t *testing.T) {
	fake, disk := newFake(8)
	_, g := start(t, Config{Disk: disk}, virtiotest.Options{})
	data := bytes.Repeat([]byte("0123456789abcdef"), 32)
	h := append(header(typeOut, 1), data...)
	n, w := g.Ring(0).Do(t, [][]byte{h[:3], h[3:100], h[100:]}, 1)
	if n != 1 || w[0] != statusOK {
		t.Fatalf("write: used length %d, status %d", n, w[0])
	}
	if !bytes.Equal(fake.data[512:1024], data) {
		t.Error("the data is not on the disk")
	}
	n, w = g.Ring(0).Do(t, [][]byte{h[:0:0], header(typeIn, 1)}, 13, 500) // status in the last data buffer
	if n != 513 || w[512] != statusOK || !bytes.Equal(w[:512], data) {
		t.Errorf("read: used length %d, status %d", n, w[512])
	}
}

func TestRefusals(t *testing.T) {
	_, disk := newFake(64)
	_, g := start(t, Config{Disk: disk, Serial: "wsl2-debian"}, virtiotest.Options{})
	sector := make([]byte, SectorSize)
	for _, tc := range []struct {
		name string
		read [][]byte
		data []int
		want byte
	}{
		{"last sector", [][]byte{header(typeIn, 63)}, []int{512}, statusOK},
		{"nothing at the end", [][]byte{header(typeIn, 64)}, nil, statusOK},
		{"nothing behind the end", [][]byte{header(typeIn, 65)}, nil, statusIOErr},
		{"read across the end", [][]byte{header(typeIn, 63)}, []int{1024}, statusIOErr},
		{"read behind the end", [][]byte{header(typeIn, 64)}, []int{512}, statusIOErr},
		{"sector times 512 wraps to 0", [][]byte{header(typeIn, 1<<55)}, []int{512}, statusIOErr},
		{"largest sector", [][]byte{header(typeIn, 1<<64-1)}, []int{512}, statusIOErr},
		{"odd length read", [][]byte{header(typeIn, 0)}, []int{511}, statusIOErr},
		{"odd length write", [][]byte{header(typeOut, 0), sector[:100]}, nil, statusIOErr},
		{"write behind the end", [][]byte{header(typeOut, 64), sector}, nil, statusIOErr},
		{"unknown type", [][]byte{header(99, 0)}, nil, statusUnsupported},
		{"secure erase", [][]byte{header(14, 0), ranges([3]uint64{0, 8, 0})}, nil, statusUnsupported},
		{"discard", [][]byte{header(typeDiscard, 0), ranges([3]uint64{0, 8, 0})}, nil, statusOK},
		{"discard of nothing", [][]byte{header(typeDiscard, 0)}, nil, statusIOErr},
		{"discard with half a range", [][]byte{header(typeDiscard, 0), ranges([3]uint64{0, 8, 0})[:15]}, nil, statusIOErr},
		{"discard with unmap", [][]byte{header(typeDiscard, 0), ranges([3]uint64{0, 8, 1})}, nil, statusUnsupported},
		{"discard across the end", [][]byte{header(typeDiscard, 0), ranges([3]uint64{60, 8, 0})}, nil, statusIOErr},
		{"discard far out", [][]byte{header(typeDiscard, 0), ranges([3]uint64{1<<64 - 1, 1<<32 - 1, 0})}, nil, statusIOErr},
		{"discard of too many", [][]byte{header(typeDiscard, 0), bytes.Repeat(ranges([3]uint64{0, 1, 0}), 65)}, nil, statusIOErr},
		{"discard of many", [][]byte{header(typeDiscard, 0), bytes.Repeat(ranges([3]uint64{0, 1, 0}), 64)}, nil, statusOK},
		{"write zeroes", [][]byte{header(typeWriteZeroes, 0), ranges([3]uint64{0, 8, 1})}, nil, statusOK},
		{"write zeroes to two ranges", [][]byte{header(typeWriteZeroes, 0), ranges([3]uint64{0, 8, 0}, [3]uint64{8, 8, 1})}, nil, statusIOErr},
		{"write zeroes with unknown flag", [][]byte{header(typeWriteZeroes, 0), ranges([3]uint64{0, 8, 2})}, nil, statusUnsupported},
	} {
		status, _ := do(t, g, tc.read, tc.data...)
		wantStatus(t, tc.name, status, tc.want)
	}

	n, w := g.Ring(0).Do(t, [][]byte{header(typeGetID, 0)}, 20, 1)
	if want := "wsl2-debian\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00"; n != 21 || string(w) != want {
		t.Errorf("get ID: %d bytes, %q", n, w)
	}
	if n, w = g.Ring(0).Do(t, [][]byte{header(typeGetID, 0)}, 4, 1); n != 5 || string(w) != "wsl2\x00" {
		t.Errorf("get ID into 4 bytes: %d bytes, %q", n, w)
	}
}

// One bad range spoils the request before anything is changed.
func TestRangesAreCheckedFirst(t *testing.T) {
	fake, disk := newFake(64)
	copy(fake.data, "keep me")
	_, g := start(t, Config{Disk: disk}, virtiotest.Options{})
	status, _ := do(t, g, [][]byte{header(typeDiscard, 0), ranges([3]uint64{0, 8, 0}, [3]uint64{64, 1, 0})})
	wantStatus(t, "discard", status, statusIOErr)
	if string(fake.data[:7]) != "keep me" {
		t.Error("the first range was discarded")
	}
}

func TestBrokenRequestsFailTheDevice(t *testing.T) {
	for name, send := range map[string]func(t *testing.T, r *virtiotest.Ring){
		"no status":    func(t *testing.T, r *virtiotest.Ring) { r.Send(t, [][]byte{header(typeFlush, 0)}) },
		"short header": func(t *testing.T, r *virtiotest.Ring) { r.Send(t, [][]byte{header(typeFlush, 0)[:15]}, 1) },
		"no header":    func(t *testing.T, r *virtiotest.Ring) { r.Send(t, nil, 512, 1) },
		"bad ring":     func(t *testing.T, r *virtiotest.Ring) { r.Offer(r.Size); r.Kick() },
	} {
		t.Run(name, func(t *testing.T) {
			_, disk := newFake(8)
			_, g := start(t, Config{Disk: disk}, virtiotest.Options{})
			send(t, g.Ring(0))
			if err := g.WaitFailed(t); !errors.Is(err, virtio.ErrProtocol) {
				t.Error(err)
			}
		})
	}
}

func TestReadOnly(t *testing.T) {
	path, disk := image(t, 1<<20)
	if err := disk.Close(); err != nil {
		t.Fatal(err)
	}
	for _, offered := range []bool{true, false} {
		disk, err := Open(path, true)
		if err != nil {
			t.Fatal(err)
		}
		d, g := start(t, Config{Disk: disk, ReadOnly: offered}, virtiotest.Options{})
		if got := g.Features&featureRO != 0; got != offered {
			t.Errorf("VIRTIO_BLK_F_RO: %v", got)
		}
		sector := make([]byte, SectorSize)
		status, _ := do(t, g, [][]byte{header(typeOut, 0), sector})
		wantStatus(t, "write", status, statusIOErr)
		status, _ = do(t, g, [][]byte{header(typeDiscard, 0), ranges([3]uint64{0, 8, 0})})
		wantStatus(t, "discard", status, statusIOErr)
		status, _ = do(t, g, [][]byte{header(typeIn, 0)}, 512)
		wantStatus(t, "read", status, statusOK)
		status, _ = do(t, g, [][]byte{header(typeFlush, 0)})
		wantStatus(t, "flush", status, statusOK)
		g.Stop()
		if err := d.Close(); err != nil {
			t.Error(err)
		}
	}
}

// Discard and write-zeroes with unmap give space back to the host.
func TestHolesArePunched(t *testing.T) {
	const size = 8 << 20
	path, disk := image(t, size)
	_, g := start(t, Config{Disk: disk}, virtiotest.Options{})
	blocks := func() int64 {
		var st unix.Stat_t
		if err := unix.Stat(path, &st); err != nil {
			t.Fatal(err)
		}
		if st.Size != size {
			t.Fatalf("the image's size became %d", st.Size)
		}
		return st.Blocks * 512
	}
	fill := func() {
		t.Helper()
		data := bytes.Repeat([]byte{0xaa}, 1<<20)
		for i := range 8 {
			status, _ := do(t, g, [][]byte{header(typeOut, uint64(i)<<11), data})
			wantStatus(t, "fill", status, statusOK)
		}
		status, _ := do(t, g, [][]byte{header(typeFlush, 0)})
		wantStatus(t, "flush", status, statusOK)
		if b := blocks(); b < size {
			t.Fatalf("%d bytes allocated after all was written", b)
		}
	}
	hole := func(from int64) int64 {
		f, err := os.Open(path)
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		at, err := unix.Seek(int(f.Fd()), from, unix.SEEK_HOLE)
		if err != nil {
			t.Fatal(err)
		}
		return at
	}
	zeroAt := func(off, n int64) {
		t.Helper()
		f, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		for i, b := range f {
			if want := byte(0xaa); int64(i) >= off && int64(i) < off+n {
				if b != 0 {
					t.Fatalf("byte %d is %#x, want 0", i, b)
				}
			} else if b != want {
				t.Fatalf("byte %d is %#x, want %#x", i, b, want)
			}
		}
	}
	for _, tc := range []struct {
		name  string
		typ   uint32
		flags uint64
		frees bool
	}{
		{"discard", typeDiscard, 0, true},
		{"write zeroes with unmap", typeWriteZeroes, flagUnmap, true},
		{"write zeroes", typeWriteZeroes, 0, false},
	} {
		t.Run(tc.name, func(t *testing.T) {
			fill()
			before := blocks()
			// 4 MiB from 2 MiB, in two ranges where one request may have them.
			reqs := [][]byte{ranges([3]uint64{2 << 11, 1 << 11, tc.flags}), ranges([3]uint64{3 << 11, 3 << 11, tc.flags})}
			if tc.typ == typeDiscard {
				reqs = [][]byte{bytes.Join(reqs, nil)}
			}
			for _, r := range reqs {
				status, _ := do(t, g, [][]byte{header(tc.typ, 0), r})
				wantStatus(t, tc.name, status, statusOK)
			}
			zeroAt(2<<20, 4<<20)
			freed := before - blocks()
			if tc.frees && (freed != 4<<20 || hole(0) != 2<<20) {
				t.Errorf("%d bytes given back, first hole at %d; want %d and %d", freed, hole(0), 4<<20, 2<<20)
			}
			if !tc.frees && freed > 0 {
				t.Errorf("%d bytes given back without unmap", freed)
			}
		})
	}
}

// What the host's file system cannot do is written out, or refused.
func TestWriteZeroesWithoutHostSupport(t *testing.T) {
	for _, tc := range []struct {
		name     string
		refuse   uint32 // fallocate modes
		discard  byte
		wantMode uint32
	}{
		{"no punch", unix.FALLOC_FL_PUNCH_HOLE, statusUnsupported, unix.FALLOC_FL_ZERO_RANGE},
		{"nothing", unix.FALLOC_FL_PUNCH_HOLE | unix.FALLOC_FL_ZERO_RANGE, statusUnsupported, 0},
	} {
		t.Run(tc.name, func(t *testing.T) {
			fake, disk := newFake(4096)
			for i := range fake.data {
				fake.data[i] = 0xaa
			}
			var refused atomic.Int32
			fake.onAllocate = func(mode uint32) error {
				if mode&tc.refuse != 0 {
					refused.Add(1)
					return unix.EOPNOTSUPP
				}
				return nil
			}
			reported := make(chan error, 8)
			_, g := start(t, Config{Disk: disk, OnError: func(err error) { reported <- err }}, virtiotest.Options{})
			for range 2 {
				for _, r := range [][3]uint64{{1, 2000, flagUnmap}, {3001, 1, 0}} {
					status, _ := do(t, g, [][]byte{header(typeWriteZeroes, 0), ranges(r)})
					wantStatus(t, "write zeroes", status, statusOK)
				}
				status, _ := do(t, g, [][]byte{header(typeDiscard, 0), ranges([3]uint64{0, 8, 0})})
				wantStatus(t, "discard", status, tc.discard)
			}
			for i, b := range fake.data {
				s := i / SectorSize
				if want := s >= 1 && s < 2001 || s == 3001; (b == 0) != want {
					t.Fatalf("sector %d: %#x", s, b)
				}
			}
			if n := refused.Load(); n > 2 {
				t.Errorf("the host refused %d times; once for each mode must be enough", n)
			}
			if len(reported) > 0 {
				t.Errorf("reported as the host's failure: %v", <-reported)
			}
		})
	}
}

// Requests that wait for the host's disk wait side by side, and one that does not
// overtakes them.
func TestRequestsInFlight(t *testing.T) {
	const waiters = 12
	fake, disk := newFake(64)
	entered, open := make(chan struct{}, waiters), make(chan struct{})
	var cold atomic.Bool
	cold.Store(true)
	fake.onRead = func(flags int) error {
		switch {
		case !cold.Load():
		case flags&unix.RWF_NOWAIT != 0:
			return unix.EAGAIN
		default:
			entered <- struct{}{}
			<-open
		}
		return nil
	}
	fake.onSync = func() error { entered <- struct{}{}; <-open; return nil }
	_, g := start(t, Config{Disk: disk, Workers: waiters}, virtiotest.Options{})
	var reqs []*virtiotest.Request
	for i := range waiters - 1 {
		reqs = append(reqs, g.Ring(0).Send(t, [][]byte{header(typeIn, uint64(i))}, 512, 1))
	}
	reqs = append(reqs, g.Ring(0).Send(t, [][]byte{header(typeFlush, 0)}, 1))
	for i := range waiters {
		select {
		case <-entered:
		case <-time.After(virtiotest.Timeout):
			t.Fatalf("only %d of %d requests are in flight together", i, waiters)
		}
	}
	cold.Store(false)
	for range 3 {
		status, _ := do(t, g, [][]byte{header(typeIn, 7)}, 512)
		wantStatus(t, "warm read", status, statusOK)
		status, _ = do(t, g, [][]byte{header(typeOut, 7), make([]byte, 512)})
		wantStatus(t, "write", status, statusOK)
	}
	close(open)
	for _, q := range reqs {
		_, data := q.Wait(t)
		wantStatus(t, "cold request", data[len(data)-1], statusOK)
	}
}

// More requests than workers queue up and are all served.
func TestMoreRequestsThanWorkers(t *testing.T) {
	fake, disk := newFake(256)
	var now, most atomic.Int32
	fake.onRead = func(flags int) error {
		if flags&unix.RWF_NOWAIT != 0 {
			return unix.EAGAIN
		}
		n := now.Add(1)
		defer now.Add(-1)
		for m := most.Load(); n > m && !most.CompareAndSwap(m, n); m = most.Load() {
		}
		runtime.Gosched()
		return nil
	}
	_, g := start(t, Config{Disk: disk, Workers: 3}, virtiotest.Options{})
	for range 10 {
		var reqs []*virtiotest.Request
		for i := range 100 {
			reqs = append(reqs, g.Ring(0).Prepare(t, [][]byte{header(typeIn, uint64(i))}, 512, 1))
		}
		g.Ring(0).SubmitAll(reqs...)
		for _, q := range reqs {
			_, data := q.Wait(t)
			wantStatus(t, "read", data[512], statusOK)
			q.Free()
		}
	}
	if most.Load() > 3 {
		t.Errorf("%d at a time with 3 workers", most.Load())
	}
}

// A flush covers every write that was completed before it was offered, and is
// answered only after the sync.
func TestFlush(t *testing.T) {
	fake, disk := newFake(64)
	var atSync atomic.Int32
	fake.onSync = func() error { atSync.Store(fake.writes.Load()); return nil }
	_, g := start(t, Config{Disk: disk}, virtiotest.Options{})
	for i := range int32(20) {
		status, _ := do(t, g, [][]byte{header(typeOut, uint64(i)), make([]byte, 512)})
		wantStatus(t, "write", status, statusOK)
		if n := fake.syncs.Load(); n != i {
			t.Fatalf("%d syncs before flush %d", n, i)
		}
		status, _ = do(t, g, [][]byte{header(typeFlush, 0)})
		wantStatus(t, "flush", status, statusOK)
		if n := atSync.Load(); n != i+1 {
			t.Fatalf("flush %d saw %d writes", i, n)
		}
	}
	boom := errors.New("boom")
	fake.onSync = func() error { return boom }
	status, _ := do(t, g, [][]byte{header(typeFlush, 0)})
	wantStatus(t, "failing flush", status, statusIOErr)
	fake.onSync = nil
}

func TestWriteThrough(t *testing.T) {
	fake, disk := newFake(64)
	var flags atomic.Int32
	fake.onWrite = func(f int) error { flags.Store(int32(f)); return nil }
	write := func(t *testing.T, g *virtiotest.Guest, want int) {
		t.Helper()
		status, _ := do(t, g, [][]byte{header(typeOut, 0), make([]byte, 512)})
		wantStatus(t, "write", status, statusOK)
		if got := int(flags.Load()); got != want {
			t.Errorf("pwritev2 flags %#x, want %#x", got, want)
		}
	}
	d, g := start(t, Config{Disk: disk}, virtiotest.Options{})
	write(t, g, 0)
	d.WriteConfig(configWriteback, []byte{0})
	write(t, g, unix.RWF_DSYNC)
	d.WriteConfig(configWriteback, []byte{1})
	write(t, g, 0)
	d.WriteConfig(configWriteback, []byte{0})
	g.Stop()
	var b [1]byte
	if d.ReadConfig(configWriteback, b[:]); b[0] != 1 {
		t.Error("a reset must leave the cache in writeback mode")
	}
	// A driver that cannot flush needs every write on the disk.
	g = virtiotest.Start(t, d, virtiotest.Options{Features: virtio.FeatureEventIdx})
	write(t, g, unix.RWF_DSYNC)
	before := fake.syncs.Load()
	status, _ := do(t, g, [][]byte{header(typeWriteZeroes, 0), ranges([3]uint64{0, 8, 0})})
	wantStatus(t, "write zeroes", status, statusOK)
	if fake.syncs.Load() == before {
		t.Error("zeroes were not synced")
	}
}

func TestHostErrors(t *testing.T) {
	fake, disk := newFake(64)
	fake.onWrite = func(int) error { return unix.ENOSPC }
	reported := make(chan error, 64)
	_, g := start(t, Config{Disk: disk, OnError: func(err error) { reported <- err }}, virtiotest.Options{})
	for range 10 {
		status, _ := do(t, g, [][]byte{header(typeOut, 0), make([]byte, 512)})
		wantStatus(t, "write", status, statusIOErr)
	}
	if len(reported) != 1 {
		t.Fatalf("%d reports of one kind of error, want 1", len(reported))
	}
	err := <-reported
	var ioErr *IOError
	if !errors.Is(err, unix.ENOSPC) || !errors.As(err, &ioErr) || ioErr.Path != "fake.img" || !strings.Contains(err.Error(), "no space left on the host") {
		t.Errorf("reported %v", err)
	}
	status, _ := do(t, g, [][]byte{header(typeOut, 64), make([]byte, 512)})
	wantStatus(t, "write behind the end", status, statusIOErr)
	if len(reported) != 0 {
		t.Errorf("the driver's mistake was reported as the host's: %v", <-reported)
	}
	fake.onRead = func(int) error { return unix.EIO }
	status, _ = do(t, g, [][]byte{header(typeIn, 0)}, 512)
	wantStatus(t, "read", status, statusIOErr)
	if err := <-reported; !errors.Is(err, unix.EIO) {
		t.Errorf("reported %v", err)
	}
}

func TestShortTransfers(t *testing.T) {
	fake, disk := newFake(64)
	fake.shortBy = 100
	_, g := start(t, Config{Disk: disk}, virtiotest.Options{})
	data := make([]byte, 8192)
	_, _ = rand.NewChaCha8([32]byte{2}).Read(data)
	status, _ := do(t, g, [][]byte{header(typeOut, 3), data[:1000], data[1000:]})
	wantStatus(t, "write", status, statusOK)
	status, got := do(t, g, [][]byte{header(typeIn, 3)}, 5000, 3192)
	wantStatus(t, "read", status, statusOK)
	if !bytes.Equal(got, data) {
		t.Error("data differs after short transfers")
	}
}

// An image that somebody truncated: the guest gets an error, not old bytes.
func TestImageShrinks(t *testing.T) {
	path, disk := image(t, 1<<20)
	reported := make(chan error, 8)
	_, g := start(t, Config{Disk: disk, OnError: func(err error) { reported <- err }}, virtiotest.Options{})
	if err := os.Truncate(path, 4096); err != nil {
		t.Fatal(err)
	}
	status, _ := do(t, g, [][]byte{header(typeIn, 0)}, 8192)
	wantStatus(t, "read", status, statusIOErr)
	if err := <-reported; err == nil {
		t.Error("not reported")
	}
}

func TestAttachDetach(t *testing.T) {
	path, disk := image(t, 1<<20)
	d, g := start(t, Config{}, virtiotest.Options{})
	if c := capacity(d); c != 0 {
		t.Fatalf("capacity of an empty slot is %d", c)
	}
	status, _ := do(t, g, [][]byte{header(typeIn, 0)}, 512)
	wantStatus(t, "read from an empty slot", status, statusIOErr)
	status, _ = do(t, g, [][]byte{header(typeFlush, 0)})
	wantStatus(t, "flush of an empty slot", status, statusIOErr)

	for range 3 {
		if err := d.Attach(disk); err != nil {
			t.Fatal(err)
		}
		g.WaitConfigChanged(t)
		if c := capacity(d); c != 2048 {
			t.Errorf("capacity %d, want 2048", c)
		}
		if err := d.Attach(disk); !errors.Is(err, ErrOccupied) {
			t.Errorf("second attach: %v", err)
		}
		status, _ = do(t, g, [][]byte{header(typeOut, 0), make([]byte, 512)})
		wantStatus(t, "write", status, statusOK)
		if _, err := Open(path, false); !errors.Is(err, ErrInUse) {
			t.Errorf("open of an attached image: %v", err)
		}
		if err := d.Detach(t.Context()); err != nil {
			t.Fatal(err)
		}
		g.WaitConfigChanged(t)
		if c := capacity(d); c != 0 {
			t.Errorf("capacity %d after detach", c)
		}
		status, _ = do(t, g, [][]byte{header(typeIn, 0)}, 512)
		wantStatus(t, "read after detach", status, statusIOErr)
		if err := d.Detach(t.Context()); !errors.Is(err, ErrNoDisk) {
			t.Errorf("second detach: %v", err)
		}
		var err error
		if disk, err = Open(path, false); err != nil {
			t.Fatalf("the lock outlives the detach: %v", err)
		}
	}
	if err := disk.Close(); err != nil {
		t.Error(err)
	}
	if len(g.ConfigChanged) != 0 {
		t.Errorf("%d notifications too many", len(g.ConfigChanged))
	}
}

func TestDetachWaits(t *testing.T) {
	fake, disk := newFake(64)
	entered, open := make(chan struct{}), make(chan struct{})
	fake.onRead = func(flags int) error {
		if flags&unix.RWF_NOWAIT != 0 {
			return unix.EAGAIN
		}
		entered <- struct{}{}
		<-open
		if fake.closed.Load() {
			return unix.EBADF
		}
		return nil
	}
	d, g := start(t, Config{Disk: disk}, virtiotest.Options{})
	req := g.Ring(0).Send(t, [][]byte{header(typeIn, 0)}, 512, 1)
	<-entered
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := d.Detach(ctx); !errors.Is(err, context.Canceled) {
		t.Fatalf("detach with a request in flight: %v", err)
	}
	if capacity(d) != 0 {
		t.Error("the capacity is still shown")
	}
	status, _ := do(t, g, [][]byte{header(typeIn, 0)}, 512)
	wantStatus(t, "read while detaching", status, statusIOErr)
	if err := d.Attach(disk); !errors.Is(err, ErrOccupied) {
		t.Errorf("attach while detaching: %v", err)
	}
	done := make(chan error)
	go func() { done <- d.Detach(context.Background()) }()
	close(open)
	if err := <-done; err != nil {
		t.Fatal(err)
	}
	_, data := req.Wait(t)
	wantStatus(t, "read in flight", data[512], statusOK)
	if fake.syncs.Load() != 1 || !fake.closed.Load() {
		t.Errorf("%d syncs, closed %v", fake.syncs.Load(), fake.closed.Load())
	}
}

func TestDetachReportsFailedSync(t *testing.T) {
	fake, disk := newFake(64)
	fake.onSync = func() error { return unix.EIO }
	d, err := New(Config{Disk: disk})
	if err != nil {
		t.Fatal(err)
	}
	if err := d.Detach(t.Context()); !errors.Is(err, unix.EIO) {
		t.Errorf("detach: %v", err)
	}
	if !fake.closed.Load() {
		t.Error("the image is still open")
	}
}

// load keeps n requests of all kinds going until stop is closed. Every answer is
// statusOK or statusIOErr; answered tells of some of them to whoever listens.
func load(t *testing.T, g *virtiotest.Guest, n int, stop chan struct{}) (answered chan struct{}, wg *sync.WaitGroup) {
	answered, wg = make(chan struct{}), new(sync.WaitGroup)
	for w := range n {
		wg.Add(1)
		reqs := []*virtiotest.Request{
			g.Ring(0).Prepare(t, [][]byte{header(typeOut, uint64(w)*8), make([]byte, 4096)}, 1),
			g.Ring(0).Prepare(t, [][]byte{header(typeIn, uint64(w)*8)}, 4096, 1),
			g.Ring(0).Prepare(t, [][]byte{header(typeIn, 0)}, 100<<10, 1),
			g.Ring(0).Prepare(t, [][]byte{header(typeFlush, 0)}, 1),
			g.Ring(0).Prepare(t, [][]byte{header(typeDiscard, 0), ranges([3]uint64{512, 8, 0})}, 1),
		}
		go func() {
			defer wg.Done()
			for {
				for _, q := range reqs {
					select {
					case <-stop:
						return
					default:
					}
					q.Submit()
					select {
					case <-q.Done():
						last := q.Writable[len(q.Writable)-1]
						if s := last[len(last)-1]; s > statusIOErr {
							t.Errorf("status %d", s)
						}
						select {
						case answered <- struct{}{}:
						default:
						}
					case <-stop:
						return
					case <-time.After(virtiotest.Timeout):
						t.Error("a request got no answer")
						return
					}
				}
			}
		}()
	}
	return answered, wg
}

func TestDetachUnderLoad(t *testing.T) {
	path, disk := image(t, 1<<20)
	d, g := start(t, Config{}, virtiotest.Options{})
	stop := make(chan struct{})
	answered, wg := load(t, g, 8, stop)
	for range 20 {
		if err := d.Attach(disk); err != nil {
			t.Fatal(err)
		}
		for range 50 {
			<-answered
		}
		ctx, cancel := context.WithTimeout(t.Context(), virtiotest.Timeout)
		if err := d.Detach(ctx); err != nil {
			t.Fatal(err)
		}
		cancel()
		var err error
		if disk, err = Open(path, false); err != nil {
			t.Fatal(err)
		}
	}
	close(stop)
	wg.Wait()
	if err := disk.Close(); err != nil {
		t.Error(err)
	}
}

func TestStopUnderLoad(t *testing.T) {
	_, disk := image(t, 1<<20)
	d, err := New(Config{Disk: disk})
	if err != nil {
		t.Fatal(err)
	}
	for range 10 {
		g := virtiotest.Start(t, d, virtiotest.Options{})
		stop := make(chan struct{})
		answered, wg := load(t, g, 8, stop)
		for range 50 {
			<-answered
		}
		d.Stop() // while the guest goes on
		used := g.Ring(0).UsedIdx()
		noGoroutines(t)
		if now := g.Ring(0).UsedIdx(); now != used {
			t.Errorf("the used ring moved from %d to %d after Stop", used, now)
		}
		close(stop)
		wg.Wait()
		g.Stop()
	}
	if err := d.Close(); err != nil {
		t.Error(err)
	}
	if err := d.Close(); err != nil {
		t.Errorf("second close: %v", err)
	}
}

// A device that stops, because the machine is killed, does not work off what
// waits for a worker, and lets go of the disk.
func TestStopDropsWhatWaits(t *testing.T) {
	fake, disk := newFake(64)
	entered, open := make(chan struct{}), make(chan struct{})
	fake.onSync = func() error {
		if fake.syncs.Load() == 1 {
			close(entered)
			<-open
		}
		return nil
	}
	d, g := start(t, Config{Disk: disk, Workers: 1}, virtiotest.Options{})
	for range 10 {
		g.Ring(0).Send(t, [][]byte{header(typeFlush, 0)}, 1)
	}
	<-entered
	do(t, g, [][]byte{header(typeIn, 0)}, 512) // served behind the flushes: they wait for the worker
	run, stopped := d.run, make(chan struct{})
	go func() { d.Stop(); close(stopped) }()
	<-run.stopping
	close(open)
	<-stopped
	if n := fake.syncs.Load(); n != 1 {
		t.Errorf("%d flushes were carried out", n)
	}
	if used := g.Ring(0).UsedIdx(); used != 2 {
		t.Errorf("%d requests were completed, not the flush in flight and the read", used)
	}
	if err := d.Detach(t.Context()); err != nil {
		t.Error(err)
	}
}

// noGoroutines fails the test if a goroutine of a session lives on.
func noGoroutines(t *testing.T) {
	t.Helper()
	buf := make([]byte, 1<<20)
	for deadline := time.Now().Add(virtiotest.Timeout); ; runtime.Gosched() {
		stacks := string(buf[:runtime.Stack(buf, true)])
		if !strings.Contains(stacks, "blk.(*session)") {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("goroutines of a stopped device:\n%s", stacks)
		}
	}
}

func TestConfigSpace(t *testing.T) {
	_, disk := newFake(12345)
	d, err := New(Config{Disk: disk})
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	all := make([]byte, 80)
	for i := range all {
		all[i] = 0xee
	}
	d.ReadConfig(0, all)
	le := binary.LittleEndian
	for _, f := range []struct {
		name      string
		got, want uint64
	}{
		{"capacity", le.Uint64(all), 12345},
		{"seg_max", uint64(le.Uint32(all[12:])), 254},
		{"blk_size", uint64(le.Uint32(all[20:])), 512},
		{"physical_block_exp", uint64(all[24]), 3},
		{"writeback", uint64(all[32]), 1},
		{"num_queues", uint64(le.Uint16(all[34:])), 1},
		{"max_discard_seg", uint64(le.Uint32(all[40:])), maxDiscardRanges},
		{"max_write_zeroes_seg", uint64(le.Uint32(all[52:])), 1},
		{"write_zeroes_may_unmap", uint64(all[56]), 1},
	} {
		if f.got != f.want {
			t.Errorf("%s is %d, want %d", f.name, f.got, f.want)
		}
	}
	if !bytes.Equal(all[60:], make([]byte, 20)) {
		t.Error("bytes behind the end are not 0")
	}
	for off := range uint32(70) { // any access of the driver's gives the same bytes
		var b [4]byte
		d.ReadConfig(off, b[:])
		if !bytes.Equal(b[:], all[off:off+4]) {
			t.Errorf("4 bytes at %d differ", off)
		}
	}
	d.ReadConfig(1<<32-1, all[:8])
	if !bytes.Equal(all[:8], make([]byte, 8)) {
		t.Error("bytes at the largest offset are not 0")
	}
	d.WriteConfig(0, []byte{1, 2, 3, 4})
	if c := capacity(d); c != 12345 {
		t.Errorf("the driver changed the capacity to %d", c)
	}
}

// Writes that the host throttles wait on workers, so that reads pass them.
func TestThrottledWrites(t *testing.T) {
	fake, disk := newFake(64)
	entered, open := make(chan struct{}, 2), make(chan struct{})
	fake.onWrite = func(int) error { entered <- struct{}{}; <-open; return nil }
	_, g := start(t, Config{Disk: disk}, virtiotest.Options{})
	disk.slowWrites.Store(true) // as one leaves it that took long
	var writes []*virtiotest.Request
	for range 2 {
		writes = append(writes, g.Ring(0).Send(t, [][]byte{header(typeOut, 0), make([]byte, 512)}, 1))
		<-entered
	}
	status, _ := do(t, g, [][]byte{header(typeIn, 0)}, 512)
	wantStatus(t, "read behind a throttled write", status, statusOK)
	close(open)
	for _, q := range writes {
		q.Wait(t)
	}
}

// What sets and clears the mark of TestThrottledWrites is the time a write takes.
func TestSlowWritesAreNoticed(t *testing.T) {
	fake, disk := newFake(64)
	fake.onWrite = func(int) error {
		start := time.Now()
		for time.Since(start) <= slowWrite(512) { // as long as it takes to be slow
			runtime.Gosched()
		}
		return nil
	}
	if err := disk.write([][]byte{make([]byte, 512)}, 0, false); err != nil || !disk.slowWrites.Load() {
		t.Errorf("a slow write was not noticed (%v)", err)
	}
}
