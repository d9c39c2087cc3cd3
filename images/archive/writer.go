package archive

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/klauspost/compress/zstd"
	"github.com/klauspost/pgzip"
	"github.com/ulikunitz/xz"
	"golang.org/x/sys/unix"

	"github.com/wsl2/wsl2/images"
)

// ExportFormats are what a distro can be exported as: the archive formats that
// can be written, and disk images.
var ExportFormats = []string{string(Tar), string(TarGzip), string(TarXZ), string(TarZstd), string(images.VHDX), string(images.Raw)}

// FormatOf guesses the format that a file of this name is to have; tar unless
// its ending says otherwise.
func FormatOf(name string) string {
	for ending, format := range map[string]string{
		".tar.gz": string(TarGzip), ".tgz": string(TarGzip), ".tar.xz": string(TarXZ), ".txz": string(TarXZ), ".wsl": string(TarGzip),
		".tar.zst": string(TarZstd), ".tzst": string(TarZstd), ".vhdx": string(images.VHDX), ".raw": string(images.Raw), ".img": string(images.Raw), ".ext4": string(images.Raw),
	} {
		if strings.HasSuffix(strings.ToLower(name), ending) {
			return format
		}
	}
	return string(Tar)
}

// Compressor returns what compresses to w in an archive format. Close ends the
// compressed data; w stays open.
func Compressor(w io.Writer, format Format) (io.WriteCloser, error) {
	switch format {
	case Tar:
		return plain{w}, nil
	case TarGzip:
		return pgzip.NewWriter(w), nil // on all processors
	case TarZstd:
		return zstd.NewWriter(w)
	case TarXZ:
		return xz.NewWriter(w)
	}
	return nil, fmt.Errorf("unknown archive format %q", format)
}

type plain struct{ io.Writer }

func (plain) Close() error { return nil }

// Output is a file that comes into being with its last byte: until Commit it
// has no name, so that whatever happens, kill -9 included, leaves nothing (O_TMPFILE, open(2)).
type Output struct {
	*os.File
	path  string
	named string // the temporary name, where the file system knows no nameless files
}

// CreateOutput opens the file that will be at path. What is there now stays until
// Commit. The caller ends with Commit or Abort.
func CreateOutput(path string) (*Output, error) {
	if st, err := os.Stat(path); err == nil && !st.Mode().IsRegular() {
		if st.IsDir() {
			return nil, fmt.Errorf("%s is a directory; give the name of a file", path)
		}
		// A device or FIFO is written as it stands.
		f, err := os.OpenFile(path, os.O_WRONLY, 0)
		return &Output{File: f}, err
	}
	dir := filepath.Dir(path)
	fd, err := unix.Open(dir, unix.O_TMPFILE|unix.O_RDWR|unix.O_CLOEXEC, 0o666)
	switch {
	case err == nil:
		return &Output{File: os.NewFile(uintptr(fd), path), path: path}, nil
	case !errors.Is(err, unix.EOPNOTSUPP) && !errors.Is(err, unix.EISDIR) && !errors.Is(err, unix.EINVAL):
		return nil, &fs.PathError{Op: "create", Path: path, Err: err}
	}
	f, err := os.CreateTemp(dir, "."+filepath.Base(path)+".*")
	if err != nil {
		return nil, err
	}
	return &Output{File: f, path: path, named: f.Name()}, nil
}

// Commit makes the file durable and gives it its name, replacing what is there.
func (o *Output) Commit() error {
	if o.path == "" {
		return o.Close()
	}
	err := o.Sync()
	if err == nil && o.named == "" {
		// A name beside it first: linkat(2) does not replace.
		o.named = filepath.Join(filepath.Dir(o.path), fmt.Sprintf(".%s.%d", filepath.Base(o.path), os.Getpid()))
		err = unix.Linkat(unix.AT_FDCWD, "/proc/self/fd/"+strconv.Itoa(int(o.Fd())), unix.AT_FDCWD, o.named, unix.AT_SYMLINK_FOLLOW)
	}
	if err == nil {
		err = os.Rename(o.named, o.path)
	}
	if err != nil {
		return errors.Join(fmt.Errorf("store %s: %w", o.path, err), o.Abort())
	}
	return o.Close()
}

// Abort gives the file up.
func (o *Output) Abort() error {
	if o.named != "" {
		os.Remove(o.named)
	}
	return o.Close()
}
