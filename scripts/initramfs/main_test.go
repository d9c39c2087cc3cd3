package main

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"errors"
	"io"
	"os"
	"path/filepath"
	"testing"

	"github.com/u-root/u-root/pkg/cpio"
)

// TestReproducible builds /init twice from different directories and packs both.
func TestReproducible(t *testing.T) {
	var images [2][]byte
	for i := range images {
		init, err := buildInit(filepath.Join(t.TempDir(), "init"), "test")
		if err != nil {
			t.Fatal(err)
		}
		system, err := systemArchive([]byte("busybox"))
		if err != nil {
			t.Fatal(err)
		}
		var b bytes.Buffer
		if err := writeCPIO(&b, init, system); err != nil {
			t.Fatal(err)
		}
		images[i] = b.Bytes()
	}
	if !bytes.Equal(images[0], images[1]) {
		t.Error("two builds differ")
	}
	records, err := cpio.ReadAllRecords(cpio.Newc.Reader(bytes.NewReader(images[0])))
	if err != nil {
		t.Fatal(err)
	}
	modes := map[string]uint64{}
	for _, r := range records {
		modes[r.Name] = r.Mode
		if r.MTime != 0 || r.UID != 0 || r.GID != 0 {
			t.Errorf("%s carries time %d, owner %d:%d", r.Name, r.MTime, r.UID, r.GID)
		}
	}
	for name, mode := range map[string]uint64{
		"init": cpio.S_IFREG | 0o755, "system.tar.gz": cpio.S_IFIFO | 0o444, "distro": cpio.S_IFDIR | 0o755,
		"dev/console": cpio.S_IFCHR | 0o600, "dev/null": cpio.S_IFCHR | 0o666,
	} {
		if modes[name] != mode {
			t.Errorf("%s: mode %o, want %o", name, modes[name], mode)
		}
	}
}

// TestSystemArchive: it has what an import asks of a root, and a link for each command.
func TestSystemArchive(t *testing.T) {
	b, err := systemArchive([]byte("busybox"))
	if err != nil {
		t.Fatal(err)
	}
	z, err := gzip.NewReader(bytes.NewReader(b))
	if err != nil {
		t.Fatal(err)
	}
	have := map[string]*tar.Header{}
	for r := tar.NewReader(z); ; {
		h, err := r.Next()
		if err == io.EOF {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		if have[h.Name] != nil {
			t.Errorf("%s is there twice", h.Name)
		}
		have[h.Name] = h
		if h.Uid != 0 || h.Gid != 0 || h.ModTime.Unix() != 0 {
			t.Errorf("%s: owner %d:%d, time %v", h.Name, h.Uid, h.Gid, h.ModTime)
		}
	}
	for _, name := range []string{"etc/passwd", "etc/group", "bin/bb", "bin/sh", "tmp/"} {
		if have[name] == nil {
			t.Errorf("%s is missing", name)
		}
	}
	for _, c := range commands {
		if h := have["bin/"+c]; h == nil || h.Linkname != "bb" {
			t.Errorf("command %s: %+v", c, h)
		}
	}
}

// TestWriteAtomic: a failure leaves the old file and nothing beside it.
func TestWriteAtomic(t *testing.T) {
	path := filepath.Join(t.TempDir(), "f")
	if err := os.WriteFile(path, []byte("old"), 0o644); err != nil {
		t.Fatal(err)
	}
	boom := errors.New("boom")
	err := writeAtomic(path, func(w io.Writer) error {
		io.WriteString(w, "new")
		return boom
	})
	b, _ := os.ReadFile(path)
	names, _ := os.ReadDir(filepath.Dir(path))
	if !errors.Is(err, boom) || string(b) != "old" || len(names) != 1 {
		t.Errorf("%v, %q, %v", err, b, names)
	}
}
