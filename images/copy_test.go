package images

import (
	"bytes"
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// sparseDisk makes an ext4 disk with some data behind its file system's metadata.
func sparseDisk(t *testing.T, dir string) string {
	t.Helper()
	path := filepath.Join(dir, "disk.ext4")
	if err := CreateDisk(context.Background(), path, 256<<20); err != nil {
		t.Fatal(err)
	}
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if _, err := f.WriteAt(bytes.Repeat([]byte("data"), 1<<18), 200<<20); err != nil {
		t.Fatal(err)
	}
	return path
}

func sameFile(t *testing.T, a, b string) {
	t.Helper()
	x, err1 := os.ReadFile(a)
	y, err2 := os.ReadFile(b)
	if err := errors.Join(err1, err2); err != nil || !bytes.Equal(x, y) {
		t.Errorf("%s (%d bytes) and %s (%d bytes) differ: %v", a, len(x), b, len(y), err)
	}
}

func TestCopyDisk(t *testing.T) {
	dir := t.TempDir()
	disk := sparseDisk(t, dir)
	var done, total int64
	shared, err := CopyDisk(context.Background(), disk, disk+".copy", func(d, n int64) { done, total = d, n })
	if err != nil {
		t.Fatal(err)
	}
	sameFile(t, disk, disk+".copy")
	was, _ := AllocatedBytes(disk)
	now, err := AllocatedBytes(disk + ".copy")
	if err != nil || now > was+1<<20 {
		t.Errorf("the copy takes %d bytes, the disk %d: %v", now, was, err)
	}
	if !shared && (done == 0 || done != total) {
		t.Errorf("progress ended at %d of %d", done, total)
	}
	// What exists is not written over, what fails leaves nothing.
	if _, err := CopyDisk(context.Background(), disk, disk+".copy", nil); !errors.Is(err, os.ErrExist) {
		t.Error(err)
	}
	ctx, cancel := context.WithCancelCause(context.Background())
	cancel(errors.New("enough"))
	if _, err := CopyDisk(ctx, disk, disk+".second", nil); err == nil && !shared {
		t.Error("copied although cancelled")
	} else if !shared {
		if _, err := os.Stat(disk + ".second"); !errors.Is(err, os.ErrNotExist) {
			t.Error("left:", err)
		}
	}
}

func TestConvert(t *testing.T) {
	dir := t.TempDir()
	disk := sparseDisk(t, dir)
	for _, format := range []DiskFormat{VHDX, VHD} {
		o, err := os.Create(filepath.Join(dir, "out."+string(format)))
		if err != nil {
			t.Fatal(err)
		}
		var last int64
		if err := Convert(context.Background(), disk, Raw, o, format, func(done, total int64) { last = done * 100 / total }); err != nil {
			t.Fatal(err)
		}
		if last != 100 {
			t.Errorf("progress ended at %d %%", last)
		}
		if err := o.Close(); err != nil {
			t.Fatal(err)
		}
		path := filepath.Join(dir, "out."+string(format))
		if got, err := DetectDisk(path); got != format || err != nil {
			t.Errorf("%s is taken for %q, %v", path, got, err)
		}
		back, err := os.Create(filepath.Join(dir, "back"))
		if err != nil {
			t.Fatal(err)
		}
		defer back.Close()
		if err := Convert(context.Background(), path, format, back, Raw, nil); err != nil {
			t.Fatal(err)
		}
		if format == VHDX { // a VHD's size is one of a disk geometry
			sameFile(t, disk, back.Name())
		}
		if _, err := Ext4Size(back.Name()); err != nil {
			t.Error(err)
		}
		if err := Convert(context.Background(), disk, format, back, Raw, nil); err == nil || !strings.Contains(err.Error(), disk) {
			t.Errorf("a raw disk as %s: %v", format, err)
		}
	}
	if left, _ := filepath.Glob(filepath.Join(dir, ".*")); len(left) != 0 {
		t.Errorf("left %q", left)
	}
}

func TestDetectDisk(t *testing.T) {
	dir := t.TempDir()
	disk := sparseDisk(t, dir)
	if got, err := DetectDisk(disk); got != Raw || err != nil {
		t.Error(got, err)
	}
	if size, err := Ext4Size(disk); size != 256<<20 || err != nil {
		t.Error(size, err)
	}
	write := func(name string, text []byte) string {
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, text, 0o600); err != nil {
			t.Fatal(err)
		}
		return path
	}
	for _, path := range []string{write("empty", nil), write("text", bytes.Repeat([]byte("text"), 4096)), write("qcow2", append([]byte("QFI\xfb"), make([]byte, 8192)...))} {
		if got, err := DetectDisk(path); !errors.Is(err, ErrNotDisk) || !strings.Contains(err.Error(), path) {
			t.Errorf("%s: %q, %v", path, got, err)
		}
	}
	if _, err := DetectDisk(dir); err == nil {
		t.Error("a directory is no disk")
	}
	if err := os.Truncate(disk, 32<<20); err != nil {
		t.Fatal(err)
	}
	if _, err := DetectDisk(disk); err == nil || !strings.Contains(err.Error(), "truncated") {
		t.Error(err)
	}
}

// Whatever an image holds, it is told what it is, or refused.
func FuzzDetectDisk(f *testing.F) {
	ext4 := make([]byte, superblockEnd)
	ext4[sbMagic], ext4[sbMagic+1] = 0x53, 0xef
	f.Add(ext4)
	f.Add([]byte("vhdxfile"))
	f.Add(append(make([]byte, 1024), append([]byte("conectix"), make([]byte, 504)...)...))
	dir := f.TempDir()
	f.Fuzz(func(t *testing.T, text []byte) {
		path := filepath.Join(dir, "image")
		if err := os.WriteFile(path, text, 0o600); err != nil {
			t.Fatal(err)
		}
		format, err := DetectDisk(path)
		if (err == nil) != (format != "") {
			t.Errorf("%q, %v", format, err)
		}
		if size, err := Ext4Size(path); err == nil && size > uint64(len(text)) {
			t.Errorf("a file system of %d bytes in %d", size, len(text))
		}
	})
}
