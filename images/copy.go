package images

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"

	"golang.org/x/sys/unix"
)

// Progress is told how far a long piece of work is, in bytes of total (0 if that
// is not known). It is called from the goroutine that does the work.
type Progress func(done, total int64)

// copyStep is how much is copied between two looks at the context.
const copyStep = 64 << 20

// CopyDisk copies the disk image at from to the new file to, which must not
// exist, and makes it durable. Where the file system can, the two share their blocks until
// one of them is written (FICLONE, ioctl_ficlone(2)); elsewhere the data is copied and
// holes stay holes. On an error nothing is left.
func CopyDisk(ctx context.Context, from, to string, progress Progress) (shared bool, err error) {
	in, err := os.Open(from)
	if err != nil {
		return false, err
	}
	defer in.Close()
	out, err := os.OpenFile(to, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return false, err
	}
	defer func() {
		if cerr := out.Close(); err == nil {
			err = cerr
		}
		if err != nil {
			os.Remove(to)
		}
	}()
	if shared, err = CopyTo(ctx, in, out, progress); err != nil {
		return shared, err
	}
	return shared, out.Sync()
}

// CopyTo copies the file in to the empty file out as CopyDisk does, without the
// syncing.
func CopyTo(ctx context.Context, in, out *os.File, progress Progress) (shared bool, err error) {
	if unix.IoctlFileClone(int(out.Fd()), int(in.Fd())) == nil {
		return true, nil
	}
	st, err := in.Stat()
	if err != nil {
		return false, err
	}
	total, err := allocated(in)
	if err != nil {
		return false, err
	}
	if err := checkFree(out, total); err != nil {
		return false, err
	}
	if err := out.Truncate(st.Size()); err != nil {
		return false, err
	}
	var done int64
	for at := int64(0); at < st.Size(); {
		start, err := in.Seek(at, unix.SEEK_DATA)
		if errors.Is(err, unix.ENXIO) { // nothing but a hole is left
			break
		}
		if err != nil {
			return false, err
		}
		end, err := in.Seek(start, unix.SEEK_HOLE)
		if err != nil {
			return false, err
		}
		for at = start; at < end; {
			if err := ctx.Err(); err != nil {
				return false, context.Cause(ctx)
			}
			step := min(end-at, copyStep)
			// os.File's ReadFrom is copy_file_range(2) where that works.
			if _, err := out.Seek(at, io.SeekStart); err != nil {
				return false, err
			}
			if _, err := in.Seek(at, io.SeekStart); err != nil {
				return false, err
			}
			n, err := io.Copy(out, io.LimitReader(in, step))
			if errors.Is(err, unix.ENOSPC) || errors.Is(err, unix.EDQUOT) {
				err = fmt.Errorf("%w to copy the disk to %s", ErrNoSpace, out.Name())
			}
			if err != nil {
				return false, err
			}
			if n == 0 {
				return false, fmt.Errorf("%s: %w", in.Name(), io.ErrUnexpectedEOF)
			}
			at += n
			if done += n; progress != nil {
				progress(done, max(total, done))
			}
		}
	}
	if progress != nil { // what is allocated is somewhat more than the data
		progress(done, done)
	}
	return false, nil
}

// allocated is what a file takes of its file system, in bytes.
func allocated(f *os.File) (int64, error) {
	var st unix.Stat_t
	if err := unix.Fstat(int(f.Fd()), &st); err != nil {
		return 0, &os.PathError{Op: "stat", Path: f.Name(), Err: err}
	}
	return st.Blocks * 512, nil
}

// AllocatedBytes is what the file at path takes of its file system.
func AllocatedBytes(path string) (int64, error) {
	var st unix.Stat_t
	if err := unix.Stat(path, &st); err != nil {
		return 0, &os.PathError{Op: "stat", Path: path, Err: err}
	}
	return st.Blocks * 512, nil
}

func checkFree(out *os.File, need int64) error {
	var st unix.Statfs_t
	if err := unix.Fstatfs(int(out.Fd()), &st); err != nil {
		return &os.PathError{Op: "statfs", Path: out.Name(), Err: err}
	}
	if free := st.Bavail * uint64(st.Bsize); free < uint64(need)+reserve {
		return fmt.Errorf("%w for %s: %d MiB are free, about %d MiB are needed", ErrNoSpace, out.Name(), free>>20, (uint64(need)+reserve)>>20)
	}
	return nil
}

// ErrNotExt4 says that a disk image holds no ext4 file system.
var ErrNotExt4 = errors.New("it holds no ext4 file system (a disk of a distro is one, without a partition table)")

// The superblock begins at byte 1024 (kernel, Documentation/filesystems/ext4/super.rst).
const (
	superblock     = 1024
	sbBlocksLow    = superblock + 0x04
	sbLogBlockSize = superblock + 0x18
	sbMagic        = superblock + 0x38
	sbIncompat     = superblock + 0x60
	sbBlocksHigh   = superblock + 0x150
	superblockEnd  = superblock + 1024

	ext4Magic    = 0xef53
	incompat64   = 0x80
	maxLogBlocks = 6
)

// Ext4Size returns the size in bytes of the ext4 file system in the raw image at
// path. The error wraps ErrNotExt4 if there is none, and says so if the image is shorter.
func Ext4Size(path string) (uint64, error) {
	f, err := os.Open(path)
	if err != nil {
		return 0, err
	}
	defer f.Close()
	st, err := f.Stat()
	if err != nil {
		return 0, err
	}
	if !st.Mode().IsRegular() {
		return 0, fmt.Errorf("%s is not a regular file", path)
	}
	b := make([]byte, superblockEnd)
	if _, err := io.ReadFull(f, b); err != nil {
		if err == io.EOF || err == io.ErrUnexpectedEOF {
			err = ErrNotExt4
		}
		return 0, fmt.Errorf("%s: %w", path, err)
	}
	u32 := func(at int) uint64 { return uint64(binary.LittleEndian.Uint32(b[at:])) }
	if binary.LittleEndian.Uint16(b[sbMagic:]) != ext4Magic || u32(sbLogBlockSize) > maxLogBlocks {
		return 0, fmt.Errorf("%s: %w", path, ErrNotExt4)
	}
	blocks := u32(sbBlocksLow)
	if u32(sbIncompat)&incompat64 != 0 {
		blocks |= u32(sbBlocksHigh) << 32
	}
	block := uint64(1024) << u32(sbLogBlockSize)
	if blocks > uint64(st.Size())/block {
		return 0, fmt.Errorf("%s is truncated: its file system has %d blocks of %d bytes, the file only %d bytes", path, blocks, block, st.Size())
	}
	return blocks * block, nil
}
