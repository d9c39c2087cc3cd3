// Package archive opens archives of root file systems as streams of tar.
//
// The tar itself is not parsed here but in the guest, as root of nothing but
// its own VM. What runs on the host is decompression, by memory-safe code with
// bounded memory, and one look at the first header to refuse early what is no
// tar at all.
package archive

import (
	"bufio"
	"bytes"
	"compress/bzip2"
	"errors"
	"fmt"
	"io"
	"os"
	"strconv"
	"sync/atomic"

	"github.com/klauspost/compress/gzip"
	"github.com/klauspost/compress/zstd"
	"github.com/ulikunitz/xz"
)

// Format is how an archive is compressed.
type Format string

// Formats.
const (
	Tar      Format = "tar"
	TarGzip  Format = "tar.gz"
	TarBzip2 Format = "tar.bz2"
	TarXZ    Format = "tar.xz"
	TarZstd  Format = "tar.zst"
)

// Stdin is the path that stands for standard input.
const Stdin = "-"

// MaxWindow is the largest dictionary (xz) or window (zstd) that is accepted:
// what `xz -9` needs at most (64 MiB) and `zstd --long` by default (128 MiB).
const MaxWindow = 128 << 20

const bufferSize = 256 << 10

// Archive is an opened archive; Read returns the uncompressed tar. Its errors
// name the file. It is used by one goroutine, but for Consumed.
type Archive struct {
	Name   string // as given, for messages
	Format Format
	// Size is the size of the file in bytes, 0 if it is not known (a pipe).
	Size int64

	file     io.ReadCloser
	counted  *counter
	tar      io.Reader
	release  func()
	consumed int64 // atomic
}

// ErrNotTar says that the file is none of the formats.
var ErrNotTar = errors.New("it is not a tar archive (tar, tar.gz, tar.bz2, tar.xz or tar.zst)")

// ErrTruncated says that the file ends too early.
var ErrTruncated = errors.New("it is truncated: the file ends in the middle of the archive; fetch or copy it again")

// ErrCorrupt says that the compressed data are damaged.
var ErrCorrupt = errors.New("its compressed data are damaged; fetch or copy it again")

// ErrWindow says that the file needs more memory than MaxWindow to decompress.
var ErrWindow = fmt.Errorf("it needs a dictionary of more than %d MiB to decompress; compress it again with a lower level", MaxWindow>>20)

// Open opens the archive at path; "-" is stdin. The format is told by the
// contents, not by the name. The caller closes it.
func Open(path string, stdin io.Reader) (*Archive, error) {
	a := &Archive{Name: path}
	if path == Stdin {
		a.Name = "standard input"
		a.file = io.NopCloser(stdin)
	} else {
		f, err := os.Open(path)
		if err != nil {
			return nil, err
		}
		st, err := f.Stat()
		if err == nil && st.IsDir() {
			err = fmt.Errorf("%s is a directory; give a tar archive of a distro's root", path)
		}
		if err != nil {
			f.Close()
			return nil, err
		}
		if st.Mode().IsRegular() {
			a.Size = st.Size()
		}
		a.file = f
	}
	if err := a.detect(); err != nil {
		a.Close()
		return nil, err
	}
	return a, nil
}

// OpenReader is Open for what is read from r; name is for messages. The caller
// closes the Archive, and with it r.
func OpenReader(name string, r io.ReadCloser) (*Archive, error) {
	a := &Archive{Name: name, file: r}
	if err := a.detect(); err != nil {
		a.Close()
		return nil, err
	}
	return a, nil
}

// detect finds the format and sets up the decompressor.
func (a *Archive) detect() error {
	a.counted = &counter{r: a.file, n: &a.consumed}
	in := bufio.NewReaderSize(a.counted, bufferSize)
	head, err := in.Peek(tarBlock)
	if err != nil && err != io.EOF {
		return a.wrap(err)
	}
	if len(head) == 0 {
		return fmt.Errorf("%s: %w: it is empty", a.Name, ErrNotTar)
	}
	if len(head) < tarBlock && formatOf(head) == Tar {
		return fmt.Errorf("%s: %w", a.Name, ErrNotTar)
	}
	a.Format = formatOf(head)
	out, release, err := Decompress(in)
	if err != nil {
		return a.wrap(err)
	}
	a.release = release
	if a.Format == Tar {
		return a.checkTar(in)
	}
	return a.checkTar(bufio.NewReaderSize(out, bufferSize))
}

// formatOf tells a format by the first bytes of a file; Tar is all that is not
// compressed.
func formatOf(head []byte) Format {
	switch {
	case bytes.HasPrefix(head, []byte{0x1f, 0x8b}):
		return TarGzip
	case bytes.HasPrefix(head, []byte("BZh")):
		return TarBzip2
	case bytes.HasPrefix(head, []byte{0xfd, '7', 'z', 'X', 'Z', 0}):
		return TarXZ
	case isZstd(head):
		return TarZstd
	}
	return Tar
}

// Decompress returns what is in r, which may be compressed in any of the formats,
// and what frees the decompressor.
func Decompress(r *bufio.Reader) (out io.Reader, release func(), err error) {
	head, err := r.Peek(tarBlock)
	if err != nil && err != io.EOF {
		return nil, nil, err
	}
	release = func() {}
	switch formatOf(head) {
	case TarGzip:
		out, err = gzip.NewReader(r)
	case TarBzip2:
		out, err = bzip2.NewReader(r), nil
	case TarXZ:
		out, err = xz.NewReader(newXZLimiter(r, MaxWindow))
	case TarZstd:
		// One goroutine decodes ahead; more only help with many cores and cost memory.
		var z *zstd.Decoder
		if z, err = zstd.NewReader(r, zstd.WithDecoderMaxWindow(MaxWindow), zstd.WithDecoderConcurrency(2)); err == nil {
			out, release = z, z.Close
		}
	default:
		out, err = r, nil
	}
	if err != nil {
		return nil, nil, err
	}
	return out, release, nil
}

// isZstd knows a zstd frame and a skippable frame (RFC 8878 §3.1).
func isZstd(head []byte) bool {
	return bytes.HasPrefix(head, []byte{0x28, 0xb5, 0x2f, 0xfd}) ||
		len(head) >= 4 && head[0]&0xf0 == 0x50 && bytes.Equal(head[1:4], []byte{0x2a, 0x4d, 0x18})
}

const tarBlock = 512

// checkTar looks at the first header of tar and keeps tar as the source.
func (a *Archive) checkTar(tar *bufio.Reader) error {
	a.tar = tar
	head, err := tar.Peek(tarBlock)
	switch {
	case err != nil && err != io.EOF:
		return a.wrap(err)
	case len(head) < tarBlock && a.Format == Tar:
		return fmt.Errorf("%s: %w", a.Name, ErrNotTar)
	case len(head) < tarBlock:
		return fmt.Errorf("%s: %w: it holds %d bytes", a.Name, ErrNotTar, len(head))
	case !isTarHeader(head):
		if a.Format == Tar {
			return fmt.Errorf("%s: %w", a.Name, ErrNotTar)
		}
		return fmt.Errorf("%s: %w: it is compressed, but what it holds is no tar", a.Name, ErrNotTar)
	}
	return nil
}

// isTarHeader checks a header's checksum: the sum of all bytes with the
// checksum field itself taken as blanks (POSIX ustar; some old tars sum signed
// bytes). An archive that begins with its end mark (zeros) holds nothing.
func isTarHeader(b []byte) bool {
	field := bytes.Trim(b[148:156], " \x00")
	want, err := strconv.ParseInt(string(field), 8, 64)
	if err != nil {
		return false
	}
	var unsigned, signed int64
	for i, c := range b[:tarBlock] {
		if i >= 148 && i < 156 {
			c = ' '
		}
		unsigned += int64(c)
		signed += int64(int8(c))
	}
	return want == unsigned || want == signed
}

// Read reads the uncompressed tar.
func (a *Archive) Read(p []byte) (int, error) {
	n, err := a.tar.Read(p)
	if err != nil && err != io.EOF {
		err = a.wrap(err)
	}
	return n, err
}

// wrap says which of our errors a decompressor's error is.
func (a *Archive) wrap(err error) error {
	var disk *os.PathError
	switch {
	case errors.As(err, &disk), errors.Is(err, ErrWindow):
	case errors.Is(err, io.ErrUnexpectedEOF), errors.Is(err, io.EOF):
		err = ErrTruncated
	case errors.Is(err, zstd.ErrWindowSizeExceeded), errors.Is(err, zstd.ErrDecoderSizeExceeded):
		err = ErrWindow
	case a.counted.failed != nil:
		// The file could not be read, whatever the decompressor made of it.
	default:
		err = fmt.Errorf("%w (%w)", ErrCorrupt, err)
	}
	return fmt.Errorf("%s: %w", a.Name, err)
}

// Label names the file in messages.
func (a *Archive) Label() string { return a.Name }

// FileSize is Size, for the interfaces that archives meet.
func (a *Archive) FileSize() int64 { return a.Size }

// Consumed is how many bytes of the file have been read, for a progress bar
// against Size. It may be called by any goroutine.
func (a *Archive) Consumed() int64 { return atomic.LoadInt64(&a.consumed) }

// Close releases the file and the decompressor.
func (a *Archive) Close() error {
	if a.release != nil {
		a.release()
	}
	return a.file.Close()
}

// counter counts what is read.
type counter struct {
	r      io.Reader
	n      *int64
	failed error // the reader's own error, EOF apart
}

func (c *counter) Read(p []byte) (int, error) {
	n, err := c.r.Read(p)
	atomic.AddInt64(c.n, int64(n))
	if err != nil && err != io.EOF {
		c.failed = err
	}
	return n, err
}
