package blk

import (
	"sync"
	"sync/atomic"

	"golang.org/x/sys/unix"
)

// fakeFile is a file in memory with faults: each hook runs before its operation
// and may block, or fail it.
type fakeFile struct {
	mu   sync.Mutex
	data []byte

	onRead     func(flags int) error
	onWrite    func(flags int) error
	onSync     func() error
	onAllocate func(mode uint32) error

	shortBy       int // bytes left out of each transfer of more than one
	writes, syncs atomic.Int32
	closed        atomic.Bool
}

func newFake(sectors int) (*fakeFile, *Disk) {
	f := &fakeFile{data: make([]byte, sectors*SectorSize)}
	return f, &Disk{path: "fake.img", size: int64(len(f.data)), file: f}
}

func (f *fakeFile) transfer(bufs [][]byte, off int64, op func(at, buf []byte) int) int {
	f.mu.Lock()
	defer f.mu.Unlock()
	n := 0
	for _, b := range bufs {
		if f.shortBy > 0 && len(b) > f.shortBy {
			return n + op(f.data[int(off)+n:], b[:len(b)-f.shortBy])
		}
		n += op(f.data[int(off)+n:], b)
	}
	return n
}

func (f *fakeFile) readv(bufs [][]byte, off int64, flags int) (int, error) {
	if f.onRead != nil {
		if err := f.onRead(flags); err != nil {
			return -1, err
		}
	}
	return f.transfer(bufs, off, func(at, buf []byte) int { return copy(buf, at) }), nil
}

func (f *fakeFile) writev(bufs [][]byte, off int64, flags int) (int, error) {
	if f.onWrite != nil {
		if err := f.onWrite(flags); err != nil {
			return -1, err
		}
	}
	f.writes.Add(1)
	return f.transfer(bufs, off, func(at, buf []byte) int { return copy(at, buf) }), nil
}

func (f *fakeFile) sync() error {
	f.syncs.Add(1)
	if f.onSync != nil {
		return f.onSync()
	}
	return nil
}

func (f *fakeFile) allocate(mode uint32, off, n int64) error {
	if f.onAllocate != nil {
		if err := f.onAllocate(mode); err != nil {
			return err
		}
	}
	if mode&unix.FALLOC_FL_KEEP_SIZE == 0 {
		panic("BUG: the image's size would change")
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	clear(f.data[off : off+n])
	return nil
}

func (f *fakeFile) close() error {
	f.closed.Store(true)
	return nil
}
