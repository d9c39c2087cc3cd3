package main

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"encoding/binary"
	"errors"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"

	"github.com/u-root/u-root/pkg/cpio"
	"golang.org/x/sys/unix"
)

// archived writes the tree and reads it back as the kernel would: by name.
func archived(t *testing.T, tr *tree) map[string]cpio.Record {
	t.Helper()
	var b bytes.Buffer
	if err := tr.write(&b); err != nil {
		t.Fatal(err)
	}
	if b.Len()%512 != 0 {
		t.Errorf("archive of %d bytes: not padded to 512", b.Len())
	}
	records, err := cpio.ReadAllRecords(cpio.Newc.Reader(bytes.NewReader(b.Bytes())))
	if err != nil {
		t.Fatal(err)
	}
	m := map[string]cpio.Record{}
	for _, r := range records {
		if dir := filepath.Dir(r.Name); dir != "." {
			if p, ok := m[dir]; !ok || p.Mode&unix.S_IFMT != unix.S_IFDIR {
				t.Errorf("%s stands before its directory", r.Name)
			}
		}
		m[r.Name] = r
	}
	return m
}

func content(t *testing.T, r cpio.Record) string {
	t.Helper()
	b, err := io.ReadAll(io.NewSectionReader(r, 0, int64(r.FileSize)))
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

func TestTreeFollowsLinksOfTheRootFileSystem(t *testing.T) {
	tr := newTree()
	tr.add(cpio.Directory("usr/bin", 0o755))
	tr.add(cpio.Symlink("bin", "usr/bin"))
	tr.add(cpio.Symlink("loop", "loop"))
	tr.add(cpio.StaticFile("/bin/tool", "one", 0o755))
	tr.add(cpio.StaticFile("/usr/bin/tool", "two", 0o755)) // replaces it
	tr.resolve("loop/x")                                   // must end
	m := archived(t, tr)
	if got := content(t, m["usr/bin/tool"]); got != "two" {
		t.Errorf("usr/bin/tool = %q, want two", got)
	}
	if m["bin"].Mode&unix.S_IFMT != unix.S_IFLNK {
		t.Error("the link bin was replaced")
	}
	if _, ok := m["bin/tool"]; ok {
		t.Error("bin/tool was written through a link")
	}
}

func TestTreeCopiesDirectories(t *testing.T) {
	dir := t.TempDir()
	must(t, os.MkdirAll(filepath.Join(dir, "a/b"), 0o755))
	must(t, os.WriteFile(filepath.Join(dir, "a/b/f"), bytes.Repeat([]byte("x"), 100_000), 0o640))
	must(t, os.Symlink("b/f", filepath.Join(dir, "a/l")))
	tr := newTree()
	must(t, tr.addPath(filepath.Join(dir, "a"), "/dst"))
	m := archived(t, tr)
	if f := m["dst/b/f"]; f.FileSize != 100_000 || f.Mode&0o777 != 0o640 {
		t.Errorf("dst/b/f: %d bytes, mode %o", f.FileSize, f.Mode)
	}
	if got := content(t, m["dst/l"]); got != "b/f" {
		t.Errorf("dst/l -> %q", got)
	}
	if err := tr.addPath(filepath.Join(dir, "missing"), "/x"); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("a missing file: %v", err)
	}
}

func TestTreeTakesTar(t *testing.T) {
	name := filepath.Join(t.TempDir(), "root.tar")
	f, err := os.Create(name)
	must(t, err)
	w := tar.NewWriter(f)
	for _, h := range []tar.Header{
		{Name: "./", Typeflag: tar.TypeDir, Mode: 0o755},
		{Name: "./usr/bin/", Typeflag: tar.TypeDir, Mode: 0o755},
		{Name: "./bin", Typeflag: tar.TypeSymlink, Linkname: "usr/bin"},
		{Name: "./usr/bin/a", Typeflag: tar.TypeReg, Mode: 0o4755, Uid: 7, Size: 3},
		{Name: "./usr/bin/b", Typeflag: tar.TypeLink, Linkname: "./bin/a"},
		{Name: "./dev/null", Typeflag: tar.TypeChar, Devmajor: 1, Devminor: 3, Mode: 0o666},
	} {
		must(t, w.WriteHeader(&h))
		if h.Size > 0 {
			_, err := w.Write([]byte("abc"))
			must(t, err)
		}
	}
	must(t, w.Close())
	must(t, f.Close())
	tr := newTree()
	must(t, tr.addTar(name))
	m := archived(t, tr)
	if a := m["usr/bin/a"]; a.Mode != unix.S_IFREG|0o4755 || a.UID != 7 {
		t.Errorf("usr/bin/a: mode %o, uid %d", a.Mode, a.UID)
	}
	if got := content(t, m["usr/bin/b"]); got != "abc" {
		t.Errorf("the hard link holds %q", got)
	}
	if d := m["dev/null"]; d.Rmajor != 1 || d.Rminor != 3 || d.Mode&unix.S_IFMT != unix.S_IFCHR {
		t.Errorf("dev/null: %+v", d.Info)
	}
	must(t, os.WriteFile(name, []byte("\x1f\x8b not a tar"), 0o644))
	if err := newTree().addTar(name); err == nil {
		t.Error("a compressed tar was taken")
	}
}

func TestUnpackKernel(t *testing.T) {
	elf := append([]byte("\x7fELF"), bytes.Repeat([]byte("kernel"), 1000)...)
	var z bytes.Buffer
	g := gzip.NewWriter(&z)
	g.Write(elf)
	g.Close()
	z.Write([]byte{1, 2, 3, 4}) // unpacked size
	image := make([]byte, 0x1000)
	copy(image[0x202:], "HdrS")
	image[0x1f1] = 3 // (3+1)*512
	binary.LittleEndian.PutUint32(image[0x248:], 0x800)
	binary.LittleEndian.PutUint32(image[0x24c:], uint32(z.Len()))
	image = append(image, z.Bytes()...)
	got, err := unpackKernel(image)
	if err != nil || !bytes.Equal(got, elf) {
		t.Errorf("unpackKernel: %d bytes, %v; want %d", len(got), err, len(elf))
	}
	for name, bad := range map[string][]byte{
		"empty":     nil,
		"no header": make([]byte, 0x1000),
		"truncated": image[:0x1010],
	} {
		if _, err := unpackKernel(bad); err == nil {
			t.Errorf("%s: taken for a kernel", name)
		}
	}
}

func TestParse(t *testing.T) {
	c, err := parse([]string{"--repository", "/r", "--icount", "--disk", "512M", "--env", "A=B=C", "--", "cmd", "--flag"})
	must(t, err)
	if c.cpus != 1 || !c.noStdin || c.disk != 512<<20 || !reflect.DeepEqual(c.args, []string{"cmd", "--flag"}) {
		t.Errorf("%+v", c)
	}
	for _, bad := range []string{
		"", "--cpus 65 -- x", "--cpus -1 -- x", "--memory 1 -- x", "--disk 0 -- x", "--disk 5X -- x", "--disk G -- x", "--env novalue -- x", "--env =v -- x", "--nosuch -- x",
	} {
		if _, err := parse(append([]string{"--repository", "/r"}, strings.Fields(bad)...)); err == nil {
			t.Errorf("%q was accepted", bad)
		}
	}
}

func TestLastOfEach(t *testing.T) {
	got := lastOfEach([]string{"A=1", "B=2", "A=3", "C="})
	if want := []string{"B=2", "A=3", "C="}; !reflect.DeepEqual(got, want) {
		t.Errorf("%v, want %v", got, want)
	}
}

func TestTail(t *testing.T) {
	var b tail
	for range 3 * tailSize / 10 {
		b.Write([]byte("123456789\n"))
	}
	b.Write([]byte("one\r\ntwo\n"))
	if len(b.buf) > tailSize {
		t.Errorf("holds %d bytes", len(b.buf))
	}
	if got := b.lines(2); got != "one\ntwo" {
		t.Errorf("lines(2) = %q", got)
	}
}

func TestDestination(t *testing.T) {
	m := machine{gets: map[string]string{"/a": "/host/x", "/d": "/host/d"}}
	for name, want := range map[string]string{"/a": "/host/x", "/d/e/f": "/host/d/e/f", "/dd": "", "/b": ""} {
		got, ok := m.destination(name)
		if got != want || ok != (want != "") {
			t.Errorf("destination(%s) = %q, %v; want %q", name, got, ok, want)
		}
	}
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}
