package archive

import (
	"archive/tar"
	"bytes"
	"errors"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// An output is not there before Commit, and nothing is there after Abort.
func TestOutput(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "file")
	if err := os.WriteFile(path, []byte("old"), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, commit := range []bool{false, true} {
		o, err := CreateOutput(path)
		if err != nil {
			t.Fatal(err)
		}
		io.WriteString(o, "new")
		if text, _ := os.ReadFile(path); string(text) != "old" {
			t.Errorf("%q before the end", text)
		}
		if commit {
			err = o.Commit()
		} else {
			err = o.Abort()
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	if text, _ := os.ReadFile(path); string(text) != "new" {
		t.Errorf("%q after Commit", text)
	}
	if entries, _ := os.ReadDir(dir); len(entries) != 1 {
		t.Errorf("left: %v", entries)
	}
	if _, err := CreateOutput(dir); err == nil || !strings.Contains(err.Error(), "directory") {
		t.Error(err)
	}
	if _, err := CreateOutput(filepath.Join(dir, "no/such/file")); !errors.Is(err, os.ErrNotExist) {
		t.Error(err)
	}
	o, err := CreateOutput("/dev/null")
	if err != nil {
		t.Fatal(err)
	}
	io.WriteString(o, "x")
	if err := o.Commit(); err != nil {
		t.Error(err)
	}
}

// What Compressor writes, Open reads.
func TestCompressor(t *testing.T) {
	var archive bytes.Buffer
	w := tar.NewWriter(&archive)
	text := bytes.Repeat([]byte("some text\n"), 50000)
	w.WriteHeader(&tar.Header{Name: "file", Mode: 0o644, Size: int64(len(text))})
	w.Write(text)
	w.Close()
	for _, format := range []Format{Tar, TarGzip, TarXZ, TarZstd} {
		path := filepath.Join(t.TempDir(), "a."+string(format))
		if FormatOf(path) != string(format) {
			t.Errorf("%s is taken for %s", path, FormatOf(path))
		}
		f, err := os.Create(path)
		if err != nil {
			t.Fatal(err)
		}
		c, err := Compressor(f, format)
		if err != nil {
			t.Fatal(err)
		}
		c.Write(archive.Bytes())
		if err := errors.Join(c.Close(), f.Close()); err != nil {
			t.Fatal(err)
		}
		a, err := Open(path, nil)
		if err != nil {
			t.Fatal(err)
		}
		got, err := io.ReadAll(a)
		if err != nil || !bytes.Equal(got, archive.Bytes()) || a.Format != format {
			t.Errorf("%s: %d of %d bytes, as %s: %v", format, len(got), archive.Len(), a.Format, err)
		}
		a.Close()
	}
	if _, err := Compressor(io.Discard, "tar.lzma"); err == nil {
		t.Error("an unknown format")
	}
}
