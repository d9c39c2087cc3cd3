package archive

import (
	"archive/tar"
	"bufio"
	"bytes"
	"encoding/base64"
	"errors"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/klauspost/compress/gzip"
	"github.com/klauspost/compress/zstd"
	"github.com/ulikunitz/xz"
)

// bz2Tar is a tar with one file "h", as tar and bzip2 wrote it; Go has no
// bzip2 compressor.
const bz2Tar = "QlpoOTFBWSZTWbM/YdoAAHh7kMmAAEJAAHcAAADiRJ4ABAAACCAAVCSkyBo009INPUEUpoAGgNBQ+5xskiHdqimlesE6Z4XIJAwE6kTiU4CiMW2g0cUzWf25ydl61eQ78JIPxdyRThQkLM/YdoA="

// sample is a tar with a file of n random bytes (which do not compress).
func sample(t testing.TB, n int) []byte {
	t.Helper()
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	if err := w.WriteHeader(&tar.Header{Name: "etc/data", Mode: 0o644, Size: int64(n)}); err != nil {
		t.Fatal(err)
	}
	data := make([]byte, n)
	r := rand.NewChaCha8([32]byte{1})
	r.Read(data)
	w.Write(data)
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

func compress(t testing.TB, f Format, data []byte) []byte {
	t.Helper()
	var b bytes.Buffer
	var w io.WriteCloser
	var err error
	switch f {
	case Tar:
		return data
	case TarGzip:
		w = gzip.NewWriter(&b)
	case TarXZ:
		// Small blocks: the limiter has to follow from block to block.
		w, err = xz.WriterConfig{BlockSize: 30 << 10, DictCap: 1 << 20}.NewWriter(&b)
	case TarZstd:
		w, err = zstd.NewWriter(&b)
	}
	if err != nil {
		t.Fatal(err)
	}
	if _, err := w.Write(data); err != nil {
		t.Fatal(err)
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

// file writes data under a name that says nothing of its format.
func file(t testing.TB, data []byte) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "archive")
	if err := os.WriteFile(path, data, 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

func readAll(t testing.TB, path string) ([]byte, *Archive, error) {
	t.Helper()
	a, err := Open(path, nil)
	if err != nil {
		return nil, nil, err
	}
	defer a.Close()
	got, err := io.ReadAll(a)
	return got, a, err
}

var compressors = []Format{Tar, TarGzip, TarXZ, TarZstd}

func TestFormats(t *testing.T) {
	data := sample(t, 150<<10)
	for _, f := range compressors {
		t.Run(string(f), func(t *testing.T) {
			packed := compress(t, f, data)
			got, a, err := readAll(t, file(t, packed))
			if err != nil {
				t.Fatal(err)
			}
			if a.Format != f || !bytes.Equal(got, data) {
				t.Errorf("format %s, %d bytes", a.Format, len(got))
			}
			if a.Size != int64(len(packed)) || a.Consumed() != a.Size {
				t.Errorf("size %d, consumed %d of %d", a.Size, a.Consumed(), len(packed))
			}
		})
	}
	packed, _ := base64.StdEncoding.DecodeString(bz2Tar)
	got, a, err := readAll(t, file(t, packed))
	if err != nil || a.Format != TarBzip2 || !bytes.Contains(got, []byte("hello")) {
		t.Errorf("bzip2: %v", err)
	}
}

// Several streams behind each other are one archive, as the tools have it.
func TestConcatenatedStreams(t *testing.T) {
	data := sample(t, 100<<10)
	for _, f := range []Format{TarGzip, TarXZ, TarZstd} {
		half := len(data) / 2
		packed := append(compress(t, f, data[:half]), compress(t, f, data[half:])...)
		got, _, err := readAll(t, file(t, packed))
		if err != nil || !bytes.Equal(got, data) {
			t.Errorf("%s: %d bytes, %v", f, len(got), err)
		}
	}
}

func TestStdin(t *testing.T) {
	data := sample(t, 1000)
	a, err := Open(Stdin, bytes.NewReader(compress(t, TarGzip, data)))
	if err != nil {
		t.Fatal(err)
	}
	got, err := io.ReadAll(a)
	if err != nil || !bytes.Equal(got, data) || a.Size != 0 {
		t.Errorf("%d bytes, size %d, %v", len(got), a.Size, err)
	}
	if err := a.Close(); err != nil {
		t.Error(err)
	}
}

func TestTruncated(t *testing.T) {
	data := sample(t, 150<<10)
	for _, f := range compressors[1:] {
		packed := compress(t, f, data)
		for _, n := range []int{1000, len(packed) / 2, len(packed) - 5} {
			_, _, err := readAll(t, file(t, packed[:n]))
			if !errors.Is(err, ErrTruncated) || !strings.Contains(err.Error(), "archive") {
				t.Errorf("%s cut at %d of %d: %v", f, n, len(packed), err)
			}
		}
	}
}

func TestDamaged(t *testing.T) {
	data := sample(t, 150<<10)
	for _, f := range compressors[1:] {
		packed := compress(t, f, data)
		packed[len(packed)/2] ^= 0x55
		if _, _, err := readAll(t, file(t, packed)); !errors.Is(err, ErrCorrupt) && !errors.Is(err, ErrTruncated) {
			t.Errorf("%s: %v", f, err)
		}
	}
}

func TestNotTar(t *testing.T) {
	zip := append([]byte("PK\x03\x04"), make([]byte, 2000)...)
	for name, data := range map[string][]byte{
		"empty":          {},
		"short":          []byte("hello"),
		"text":           bytes.Repeat([]byte("hello world\n"), 100),
		"zip":            zip,
		"zeros":          make([]byte, 10240),
		"gzip of text":   compress(t, TarGzip, bytes.Repeat([]byte("hello world\n"), 100)),
		"gzip of little": compress(t, TarGzip, []byte("hi")),
		"zstd of zeros":  compress(t, TarZstd, make([]byte, 10240)),
	} {
		if _, _, err := readAll(t, file(t, data)); !errors.Is(err, ErrNotTar) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestOpenFails(t *testing.T) {
	if _, err := Open(filepath.Join(t.TempDir(), "absent"), nil); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("absent file: %v", err)
	}
	if _, err := Open(t.TempDir(), nil); err == nil || !strings.Contains(err.Error(), "directory") {
		t.Errorf("directory: %v", err)
	}
	// An input that fails is that failure, not a truncated archive.
	boom := errors.New("boom")
	for _, n := range []int{0, 700} {
		in := io.MultiReader(bytes.NewReader(compress(t, TarGzip, sample(t, 4000))[:n]), errReader{boom})
		a, err := Open(Stdin, in)
		if err == nil {
			_, err = io.ReadAll(a)
		}
		if !errors.Is(err, boom) {
			t.Errorf("failing input after %d bytes: %v", n, err)
		}
	}
}

type errReader struct{ err error }

func (r errReader) Read([]byte) (int, error) { return 0, r.err }

func TestWindowLimit(t *testing.T) {
	var b bytes.Buffer
	w, err := xz.WriterConfig{DictCap: 2 * MaxWindow}.NewWriter(&b)
	if err != nil {
		t.Fatal(err)
	}
	w.Write(sample(t, 1000))
	w.Close()
	big := b.Bytes()
	// The second block of a file is checked as the first is.
	second := append(compress(t, TarXZ, sample(t, 100<<10)), big...)
	var z bytes.Buffer
	zw, err := zstd.NewWriter(&z, zstd.WithWindowSize(2*MaxWindow), zstd.WithEncoderConcurrency(1))
	if err != nil {
		t.Fatal(err)
	}
	zw.Write(sample(t, 1<<20))
	zw.Flush() // so that the frame's header cannot name a smaller size
	zw.Write(make([]byte, 1<<20))
	zw.Close()
	for name, data := range map[string][]byte{"xz": big, "xz, second stream": second, "zstd": z.Bytes()} {
		if _, _, err := readAll(t, file(t, data)); !errors.Is(err, ErrWindow) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func FuzzXZLimiter(f *testing.F) {
	f.Add(compress(f, TarXZ, sample(f, 2000)))
	f.Add([]byte{0xfd, '7', 'z', 'X', 'Z', 0, 0, 4})
	f.Fuzz(func(t *testing.T, data []byte) {
		got, err := io.ReadAll(newXZLimiter(bufio.NewReaderSize(bytes.NewReader(data), bufferSize), MaxWindow))
		if err == nil && !bytes.Equal(got, data) {
			t.Fatalf("%d bytes became %d", len(data), len(got))
		}
		if err != nil && err != ErrWindow {
			t.Fatal(err)
		}
	})
}

func FuzzOpen(f *testing.F) {
	for _, c := range compressors {
		f.Add(compress(f, c, sample(f, 2000)))
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		a, err := Open(Stdin, bytes.NewReader(data))
		if err != nil {
			return
		}
		defer a.Close()
		io.CopyN(io.Discard, a, 1<<20)
	})
}
