// Package images makes the disks of distros: sparse files with an ext4 file
// system, to be unpacked to in the guest. Package archive opens what is unpacked.
package images

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"
)

// ErrNoMke2fs says that mke2fs is missing.
var ErrNoMke2fs = errors.New("mke2fs is not installed (apt-get install e2fsprogs, or your system's package of that name)")

// ErrNoSpace says that the file system is full.
var ErrNoSpace = errors.New("not enough space on the disk")

// reserve is what is left free on the host's file system: a sparse disk that
// fills it would give the guest I/O errors.
const reserve = 8 << 20

// FindMke2fs looks for mke2fs.
func FindMke2fs() (string, error) { return FindTool("mke2fs", ErrNoMke2fs) }

// CreateDisk makes a sparse file of size bytes at path, which must not exist,
// and an empty ext4 file system in it. It costs a few MiB on the host until
// something is written. On an error nothing is left.
func CreateDisk(ctx context.Context, path string, size uint64) (err error) {
	mke2fs, err := FindMke2fs()
	if err != nil {
		return err
	}
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			os.Remove(path)
		}
	}()
	err = f.Truncate(int64(size))
	if errors.Is(err, unix.EFBIG) {
		err = fmt.Errorf("%w: this file system takes no file of %d GiB, even sparse; set defaultVhdSize in wslconfig lower", err, size>>30)
	}
	if err = errors.Join(err, f.Close()); err != nil {
		return err
	}
	// No blocks are reserved for root and the inode tables and the journal are
	// not zeroed: the file reads as zeros already. The journal is 64 MiB, as
	// the 1 GiB that such a size would get costs mount time and space.
	cmd := exec.CommandContext(ctx, mke2fs, "-q", "-F", "-t", "ext4", "-O", ext4Features, "-b", "4096", "-I", "256",
		"-J", "size=64", "-m", "0", "-E", "lazy_itable_init=1,lazy_journal_init=1,discard,root_owner=0:0", path)
	// A user's mke2fs.conf could choose features that the guest's kernel lacks.
	cmd.Env = []string{"PATH=/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL=C", "MKE2FS_CONFIG=/dev/null"}
	out, err := cmd.CombinedOutput()
	if err != nil {
		if ctx.Err() != nil {
			return ctx.Err()
		}
		text := strings.TrimSpace(string(out))
		if strings.Contains(text, "No space left") {
			return fmt.Errorf("%w to make the disk %s", ErrNoSpace, path)
		}
		return fmt.Errorf("mke2fs %s: %w: %s", path, err, text)
	}
	return nil
}

// ext4Features are named one by one, so that every host makes the same disk:
// those of e2fsprogs 1.47's ext4 that kernel 6.12 mounts without options.
const ext4Features = "none,has_journal,ext_attr,resize_inode,dir_index,filetype,extent,64bit,flex_bg,sparse_super,large_file,huge_file,dir_nlink,extra_isize,metadata_csum"

// CheckSpace refuses to fill the file system that holds dir (which may not
// exist yet): need bytes and a reserve have to be free.
func CheckSpace(dir string, need uint64) error {
	free, at, err := FreeSpace(dir)
	if err != nil {
		return err
	}
	if free < need+reserve {
		return fmt.Errorf("%w at %s: %d MiB are free, about %d MiB are needed", ErrNoSpace, at, free>>20, (need+reserve)>>20)
	}
	return nil
}

// FreeSpace returns the bytes free to the user on the file system of dir, or
// of its nearest parent that exists (at).
func FreeSpace(dir string) (free uint64, at string, err error) {
	for {
		var st unix.Statfs_t
		err := unix.Statfs(dir, &st)
		if err == nil {
			return st.Bavail * uint64(st.Bsize), dir, nil
		}
		parent := filepath.Dir(dir)
		if !errors.Is(err, fs.ErrNotExist) || parent == dir {
			return 0, dir, &fs.PathError{Op: "statfs", Path: dir, Err: err}
		}
		dir = parent
	}
}
