package blk

import (
	"errors"
	"fmt"
	"io"
	"math"
	"os"
	"sync/atomic"
	"time"

	"github.com/wsl2/wsl2/vmm/virtio"
	"golang.org/x/sys/unix"
)

// SectorSize is the unit of capacity and addresses, in bytes (virtio 1.2 §5.2.5).
const SectorSize = 512

// ErrInUse is wrapped by Open's error when another process, or another Disk of
// this one, holds the image's lock.
var ErrInUse = errors.New("disk image already in use")

const (
	// iovMax is the most buffers that one preadv(2) takes (IOV_MAX).
	iovMax = 1024
	// cachedWriteBufs is how many buffers a write to the page cache has. On some
	// file systems (tmpfs, Linux 6.12) the kernel looks, for each page that it
	// copies, at all buffers that are left: 256 pages in one call take longer for
	// that than for everything else together.
	cachedWriteBufs = 16
)

// Disk is an open, locked disk image: a raw file, usually sparse, or a block
// device. Its methods are safe for concurrent use, Close after all others.
type Disk struct {
	path     string
	size     int64
	readOnly bool
	file     file

	// slowWrites is set while writes wait for the host's disk (too many dirty
	// pages); RWF_NOWAIT cannot tell: ext4 refuses it for buffered writes.
	slowWrites atomic.Bool

	// Set once the host's file system has refused the operation.
	noNowait, noPunch, noZeroRange atomic.Bool
}

// file is the host's side of a Disk; tests put faults in its place.
type file interface {
	// readv and writev are preadv2(2) and pwritev2(2) of at most iovMax buffers.
	readv(bufs [][]byte, off int64, flags int) (int, error)
	writev(bufs [][]byte, off int64, flags int) (int, error)
	// sync is fdatasync(2).
	sync() error
	// allocate is fallocate(2).
	allocate(mode uint32, off, n int64) error
	close() error
}

// Open opens and locks the raw image at path. A writable image is locked
// exclusively, a read-only one against writers. The lock is an open file
// description lock on the whole file (fcntl(2), F_OFD_SETLK): it excludes other
// processes, QEMU among them, and ends with Close or with the process, however
// it dies.
func Open(path string, readOnly bool) (*Disk, error) {
	mode, lock := unix.O_RDWR, int16(unix.F_WRLCK)
	if readOnly {
		mode, lock = unix.O_RDONLY, unix.F_RDLCK
	}
	// O_NONBLOCK: a FIFO in the image's place must not block us.
	fd, err := unix.Open(path, mode|unix.O_CLOEXEC|unix.O_NONBLOCK|unix.O_NOCTTY, 0)
	if err != nil {
		return nil, &os.PathError{Op: "open disk image", Path: path, Err: err}
	}
	d := &Disk{path: path, readOnly: readOnly, file: hostFile(fd)}
	if err := d.init(fd, lock); err != nil {
		unix.Close(fd)
		return nil, err
	}
	return d, nil
}

func (d *Disk) init(fd int, lock int16) error {
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return &os.PathError{Op: "stat disk image", Path: d.path, Err: err}
	}
	if f := st.Mode & unix.S_IFMT; f != unix.S_IFREG && f != unix.S_IFBLK {
		return fmt.Errorf("disk image %s is neither a regular file nor a block device", d.path)
	}
	l := unix.Flock_t{Type: lock, Whence: io.SeekStart}
	switch err := unix.FcntlFlock(uintptr(fd), unix.F_OFD_SETLK, &l); {
	case errors.Is(err, unix.EAGAIN) || errors.Is(err, unix.EACCES):
		return fmt.Errorf("%w by another process: %s", ErrInUse, d.path)
	case err != nil:
		return &os.PathError{Op: "lock disk image", Path: d.path, Err: err}
	}
	// The size is looked at under the lock. Seek knows a block device's, too.
	size, err := unix.Seek(fd, 0, io.SeekEnd)
	if err != nil {
		return &os.PathError{Op: "size of disk image", Path: d.path, Err: err}
	}
	if size == 0 || size%SectorSize != 0 {
		return fmt.Errorf("disk image %s has %d bytes: not a raw image, which has a multiple of %d", d.path, size, SectorSize)
	}
	d.size = size
	return nil
}

// Path returns the path given to Open.
func (d *Disk) Path() string { return d.path }

// Size returns the size in bytes, a multiple of SectorSize and never 0.
func (d *Disk) Size() int64 { return d.size }

// ReadOnly reports whether writes are refused.
func (d *Disk) ReadOnly() bool { return d.readOnly }

// Close releases the lock and the file; it does not sync. A disk that a Device
// took by Attach is closed by that device.
func (d *Disk) Close() error {
	if err := d.file.close(); err != nil {
		return &os.PathError{Op: "close disk image", Path: d.path, Err: err}
	}
	return nil
}

var (
	// errWouldBlock says that a read is not served from the page cache.
	errWouldBlock = errors.New("would block")
	// errUnsupported is what the host's file system or this device cannot do.
	errUnsupported = errors.New("not supported")
)

// read fills bufs from off. With nowait it returns errWouldBlock, bufs
// unchanged but for their contents, where the host would have to wait for its disk.
// It consumes bufs only without nowait.
func (d *Disk) read(bufs [][]byte, off int64, nowait bool) error {
	if nowait {
		if d.noNowait.Load() {
			return d.read(bufs, off, false)
		}
		n, err := d.file.readv(bufs[:min(len(bufs), iovMax)], off, unix.RWF_NOWAIT)
		switch {
		case err == nil && len(bufs) <= iovMax && n == virtio.Len(bufs):
			return nil
		case errors.Is(err, unix.EOPNOTSUPP):
			d.noNowait.Store(true)
			return d.read(bufs, off, false)
		}
		return errWouldBlock // or an error that the blocking read will meet again
	}
	return transfer(bufs, off, iovMax, func(bufs [][]byte, off int64) (int, error) {
		n, err := d.file.readv(bufs, off, 0)
		if n == 0 && err == nil {
			err = io.ErrUnexpectedEOF // the image shrank under us
		}
		return n, err
	})
}

// write writes bufs to off, and consumes them. With through the data is on
// stable storage when it returns.
func (d *Disk) write(bufs [][]byte, off int64, through bool) error {
	flags, most := unix.RWF_DSYNC, iovMax
	if !through {
		flags, most = 0, cachedWriteBufs
		start, n := time.Now(), virtio.Len(bufs)
		defer func() { d.slowWrites.Store(time.Since(start) > slowWrite(n)) }()
	}
	return transfer(bufs, off, most, func(bufs [][]byte, off int64) (int, error) {
		n, err := d.file.writev(bufs, off, flags)
		if n == 0 && err == nil {
			err = io.ErrShortWrite
		}
		return n, err
	})
}

// slowWrite is how long n bytes take to the page cache at the very most, on a
// slow and busy machine: 1 ms and 250 MB/s.
func slowWrite(n int) time.Duration {
	return time.Millisecond + time.Duration(n)*4*time.Nanosecond
}

// transfer repeats op, with at most most buffers, until all of bufs is done.
func transfer(bufs [][]byte, off int64, most int, op func([][]byte, int64) (int, error)) error {
	for len(bufs) > 0 {
		n, err := op(bufs[:min(len(bufs), most)], off)
		if err != nil {
			if errors.Is(err, unix.EINTR) {
				continue
			}
			return err
		}
		off += int64(n)
		bufs = virtio.Drop(bufs, n)
	}
	return nil
}

func (d *Disk) sync() error {
	for {
		if err := d.file.sync(); !errors.Is(err, unix.EINTR) {
			return err
		}
	}
}

// discard gives the range's space back to the host; it reads as zeroes then.
// errUnsupported says that the host cannot.
func (d *Disk) discard(off, n int64) error {
	return d.allocate(&d.noPunch, unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, off, n)
}

// allocate is fallocate(2) that remembers in no what the host cannot do.
func (d *Disk) allocate(no *atomic.Bool, mode uint32, off, n int64) error {
	if no.Load() {
		return errUnsupported
	}
	for {
		err := d.file.allocate(mode, off, n)
		switch {
		case errors.Is(err, unix.EINTR):
			continue
		case errors.Is(err, unix.EOPNOTSUPP), errors.Is(err, unix.ENOSYS), errors.Is(err, unix.ENODEV):
			no.Store(true)
			return errUnsupported
		}
		return err
	}
}

var zeroes [256 << 10]byte // in .bss: costs nothing until used

// writeZeroes makes the range read as zeroes. With unmap it may give the space
// back; without, it keeps the space allocated where the host can.
func (d *Disk) writeZeroes(off, n int64, unmap, through bool) error {
	err := errUnsupported
	if unmap {
		err = d.discard(off, n)
	}
	if errors.Is(err, errUnsupported) {
		err = d.allocate(&d.noZeroRange, unix.FALLOC_FL_ZERO_RANGE|unix.FALLOC_FL_KEEP_SIZE, off, n)
	}
	if !errors.Is(err, errUnsupported) {
		if err == nil && through {
			err = d.sync()
		}
		return err
	}
	for n > 0 {
		k := min(n, int64(len(zeroes)))
		if err := d.write([][]byte{zeroes[:k]}, off, through); err != nil {
			return err
		}
		off, n = off+k, n-k
	}
	return nil
}

// inRange reports whether n bytes at sector lie in the disk; off is their place.
func (d *Disk) inRange(sector uint64, n int64) (off int64, ok bool) {
	if sector > math.MaxInt64/SectorSize {
		return 0, false
	}
	off = int64(sector) * SectorSize
	return off, off <= d.size && n <= d.size-off
}

// hostFile is the file behind a descriptor.
type hostFile int

func (f hostFile) readv(bufs [][]byte, off int64, flags int) (int, error) {
	return unix.Preadv2(int(f), bufs, off, flags)
}

func (f hostFile) writev(bufs [][]byte, off int64, flags int) (int, error) {
	return unix.Pwritev2(int(f), bufs, off, flags)
}

func (f hostFile) sync() error { return unix.Fdatasync(int(f)) }

func (f hostFile) allocate(mode uint32, off, n int64) error {
	return unix.Fallocate(int(f), mode, off, n)
}

func (f hostFile) close() error { return unix.Close(int(f)) }
