package balloon

import (
	"bytes"
	"encoding/binary"
	"errors"
	"testing"
	"unsafe"

	"github.com/wsl2/wsl2/vmm/guestmem"
	"github.com/wsl2/wsl2/vmm/virtio"
	"github.com/wsl2/wsl2/vmm/virtio/virtiotest"
	"golang.org/x/sys/unix"
)

const memBytes = 32 << 20

// backings are the two kinds of guest memory.
var backings = map[string]func(t *testing.T) []byte{
	"private": func(t *testing.T) []byte {
		return mmap(t, -1, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
	},
	"memfd": func(t *testing.T) []byte {
		fd, err := unix.MemfdCreate("guest", unix.MFD_CLOEXEC)
		if err != nil {
			t.Fatal(err)
		}
		defer unix.Close(fd)
		if err := unix.Ftruncate(fd, memBytes); err != nil {
			t.Fatal(err)
		}
		return mmap(t, fd, unix.MAP_SHARED)
	},
}

func mmap(t *testing.T, fd, flags int) []byte {
	t.Helper()
	b, err := unix.Mmap(fd, 0, memBytes, unix.PROT_READ|unix.PROT_WRITE, flags)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = unix.Munmap(b) })
	return b
}

// resident returns how many bytes of b the host holds in memory; b starts with
// a page. For a memfd these are the file's pages, mapped or not.
func resident(t *testing.T, b []byte) int {
	t.Helper()
	vec := make([]byte, (len(b)+PageSize-1)/PageSize)
	_, _, errno := unix.Syscall(unix.SYS_MINCORE, uintptr(unsafe.Pointer(unsafe.SliceData(b))), uintptr(len(b)), uintptr(unsafe.Pointer(unsafe.SliceData(vec))))
	if errno != 0 {
		t.Fatal("mincore:", errno)
	}
	n := 0
	for _, v := range vec {
		n += int(v&1) * PageSize
	}
	return n
}

func start(t *testing.T, d *Device, b []byte) *virtiotest.Guest {
	return virtiotest.Start(t, d, virtiotest.Options{Backing: b})
}

func TestReportedPagesAreReleased(t *testing.T) {
	for name, backing := range backings {
		for _, queue := range []int{queueReportingLinux, queueReportingSpec} {
			t.Run(name, func(t *testing.T) {
				d := New()
				g := start(t, d, backing(t))
				q := g.Ring(queue).Prepare(t, nil, 4<<20, 100, 2<<20)
				for _, b := range q.Writable {
					for i := range b {
						b[i] = 0xaa
					}
					if n := resident(t, b); n < len(b) {
						t.Fatalf("%d of %d bytes are in memory from the start", n, len(b))
					}
				}
				q.Submit()
				<-q.Done()
				for i, want := range []int{0, PageSize, 0} {
					if got := resident(t, q.Writable[i]); got != want {
						t.Errorf("buffer %d: %d bytes are still in memory, want %d", i, got, want)
					}
				}
				if d.Released() != 6<<20 {
					t.Errorf("Released() = %d, want %d", d.Released(), 6<<20)
				}
				for i, b := range q.Writable {
					want := byte(0)
					if i == 1 { // less than a page
						want = 0xaa
					}
					if b[0] != want || b[len(b)-1] != want {
						t.Errorf("buffer %d reads as %#x", i, b[0])
					}
				}
			})
		}
	}
}

// Only whole pages within a range go; what lies beside it stays.
func TestReleaseKeepsNeighbours(t *testing.T) {
	mem := backings["private"](t)
	g := start(t, New(), mem)
	base, b := g.Alloc(t, 4*PageSize)
	for i := range b {
		b[i] = 0xaa
	}
	r := g.Ring(queueReportingLinux)
	raw := r.Size - 1 // Do takes the first descriptor
	r.SetDesc(raw, virtiotest.Desc{Addr: base + 1, Len: 3*PageSize - 2, Flags: virtiotest.DescWrite})
	r.Offer(raw)
	r.Do(t, nil, 1) // comes back behind it
	if r.UsedIdx() != 2 {
		t.Fatalf("used index %d, want 2", r.UsedIdx())
	}
	for page, want := range []byte{0xaa, 0, 0xaa, 0xaa} {
		p := b[page*PageSize : (page+1)*PageSize]
		if !bytes.Equal(p, bytes.Repeat([]byte{want}, PageSize)) {
			t.Errorf("page %d starts with %#x, want all %#x", page, p[0], want)
		}
	}
}

func pfns(first guestmem.Addr, offsets ...int) []byte {
	var b []byte
	for _, o := range offsets {
		b = binary.LittleEndian.AppendUint32(b, uint32(int(first/PageSize)+o))
	}
	return b
}

func TestInflate(t *testing.T) {
	for name, backing := range backings {
		t.Run(name, func(t *testing.T) {
			d := New()
			g := start(t, d, backing(t))
			base, b := g.Alloc(t, 16*PageSize)
			for i := range b {
				b[i] = 0xaa
			}
			list := pfns(base, 3, 4, 5, 9, 8, 7, 0, 15)
			q := g.Ring(queueInflate).Prepare(t, [][]byte{list[:6], list[6:]})
			q.Submit()
			q.Wait(t)
			if got := resident(t, b); got != 8*PageSize {
				t.Errorf("%d bytes are still in memory, want %d", got, 8*PageSize)
			}
			for page, want := range []byte{0, 0xaa, 0xaa, 0, 0, 0, 0xaa, 0, 0, 0, 0xaa, 0xaa, 0xaa, 0xaa, 0xaa, 0} {
				if got := b[page*PageSize]; got != want {
					t.Errorf("page %d reads as %#x, want %#x", page, got, want)
				}
			}
			g.Ring(queueDeflate).Do(t, [][]byte{list})
			b[3*PageSize] = 1 // the guest uses it again
		})
	}
}

func TestInflateRefuses(t *testing.T) {
	for name, list := range map[string][]byte{
		"page 0":          pfns(0, 0),
		"largest page":    {0xff, 0xff, 0xff, 0xff},
		"run out of RAM":  pfns(0x10_0000+memBytes, -1, 0),
		"half a number":   {0, 1, 2},
		"backwards below": pfns(0x10_0000, 0, -1),
	} {
		t.Run(name, func(t *testing.T) {
			mem := backings["private"](t)
			g := start(t, New(), mem)
			g.Ring(queueInflate).Send(t, [][]byte{list})
			if err := g.WaitFailed(t); !errors.Is(err, virtio.ErrProtocol) {
				t.Error(err)
			}
		})
	}
}

func TestTarget(t *testing.T) {
	d := New()
	d.SetTarget(1 << 20)
	g := start(t, d, make([]byte, memBytes))
	read := func(off uint32) uint32 {
		var b [4]byte
		d.ReadConfig(off, b[:])
		return binary.LittleEndian.Uint32(b[:])
	}
	if read(configNumPages) != 256 {
		t.Errorf("num_pages %d", read(configNumPages))
	}
	d.SetTarget(64<<20 + 1)
	g.WaitConfigChanged(t)
	if read(configNumPages) != 16384 {
		t.Errorf("num_pages %d", read(configNumPages))
	}
	d.WriteConfig(configActual, binary.LittleEndian.AppendUint32(nil, 100))
	d.WriteConfig(configNumPages, binary.LittleEndian.AppendUint32(nil, 7))
	if d.Actual() != 100*PageSize || read(configActual) != 100 || read(configNumPages) != 16384 {
		t.Errorf("actual %d, num_pages %d", d.Actual(), read(configNumPages))
	}
	g.Stop()
	if d.Actual() != 0 {
		t.Error("a reset guest has pages in the balloon")
	}
	d.Stop()
	d.SetTarget(0)
}

// FuzzInflate: any page numbers, in any order, release only guest memory.
func FuzzInflate(f *testing.F) {
	f.Add(pfns(0x10_0000, 0, 1, 2, 9, 8, 7, 3))
	f.Add([]byte{0xff, 0xff, 0xff, 0xff, 0, 0, 0, 0})
	mem, err := unix.Mmap(-1, 0, 1<<20, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
	if err != nil {
		f.Fatal(err)
	}
	m, err := guestmem.New(guestmem.Region{Start: 0x10_0000, Bytes: mem})
	if err != nil {
		f.Fatal(err)
	}
	f.Fuzz(func(t *testing.T, list []byte) {
		d := New()
		want := uint64(0)
		valid := len(list)%4 == 0
		for b := list; len(b) >= 4; b = b[4:] {
			pfn := binary.LittleEndian.Uint32(b)
			valid = valid && pfn >= 0x100 && pfn < 0x200
			want += PageSize
		}
		err := d.inflate(m, &virtio.Chain{Readable: [][]byte{list}})
		if valid != (err == nil) || err != nil && !errors.Is(err, virtio.ErrProtocol) {
			t.Fatalf("valid: %v, error: %v", valid, err)
		}
		if valid && d.Released() != want {
			t.Fatalf("released %d, want %d", d.Released(), want)
		}
	})
}
