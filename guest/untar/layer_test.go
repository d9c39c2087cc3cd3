package untar

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

// layers makes a stream of layers, each a list of names: "dir/", "file", "link=target" (hard),
// "sym->target".
func layers(t testing.TB, list ...[]string) []byte {
	t.Helper()
	var b bytes.Buffer
	for i, names := range list {
		mark := tar.NewWriter(&b)
		if err := mark.WriteHeader(&tar.Header{Typeflag: tar.TypeXGlobalHeader, Name: "layer", PAXRecords: map[string]string{LayerRecord: "1"}}); err != nil {
			t.Fatal(err)
		}
		mark.Flush()
		w := tar.NewWriter(&b)
		for _, n := range names {
			h := &tar.Header{Name: n, Typeflag: tar.TypeReg, Mode: 0o755, Uid: os.Getuid(), Gid: os.Getgid()}
			content := ""
			if a, target, ok := strings.Cut(n, "->"); ok {
				h.Name, h.Linkname, h.Typeflag = a, target, tar.TypeSymlink
			} else if a, target, ok := strings.Cut(n, "="); ok {
				h.Name, h.Linkname, h.Typeflag = a, target, tar.TypeLink
			} else if strings.HasSuffix(n, "/") {
				h.Typeflag = tar.TypeDir
			} else if !strings.Contains(n, ".wh.") {
				content = string(rune('0' + i))
			}
			h.Size = int64(len(content))
			if err := w.WriteHeader(h); err != nil {
				t.Fatal(err)
			}
			w.Write([]byte(content))
		}
		if i%2 == 0 { // some tools leave the end mark out
			w.Close()
		} else {
			w.Flush()
		}
	}
	b.Write(make([]byte, 1024))
	return b.Bytes()
}

// unpacked lists the files below a root: path:content.
func unpacked(t testing.TB, archive []byte) ([]string, error) {
	t.Helper()
	root := t.TempDir()
	err := Unpack(context.Background(), root, bytes.NewReader(archive), nil)
	var list []string
	filepath.WalkDir(root, func(p string, d fs.DirEntry, err error) error {
		rel, _ := filepath.Rel(root, p)
		switch {
		case rel == ".":
		case d.IsDir():
			list = append(list, rel+"/")
		case d.Type()&fs.ModeSymlink != 0:
			target, _ := os.Readlink(p)
			list = append(list, rel+"->"+target)
		default:
			text, _ := os.ReadFile(p)
			list = append(list, rel+":"+string(text))
		}
		return nil
	})
	return list, err
}

func TestLayers(t *testing.T) {
	for _, c := range []struct {
		name   string
		layers [][]string
		want   string
	}{
		{"replaced", [][]string{{"a", "b"}, {"b", "c"}}, "a:0 b:1 c:1"},
		{"file deleted", [][]string{{"d/", "d/a", "d/b"}, {"d/.wh.a"}}, "d/ d/b:0"},
		{"directory deleted", [][]string{{"d/", "d/e/", "d/e/a", "b"}, {".wh.d"}}, "b:0"},
		{"deleted and made again", [][]string{{"d/", "d/a"}, {".wh.d"}, {"d/", "d/b"}}, "d/ d/b:2"},
		{"nothing to delete", [][]string{{"a"}, {".wh.b", "no/such/.wh.c"}}, "a:0"},
		{"opaque", [][]string{{"d/", "d/a", "d/e/", "d/e/x"}, {"d/", "d/.wh..wh..opq", "d/b"}}, "d/ d/b:1"},
		{"opaque, the mark last", [][]string{{"d/", "d/a", "d/e/", "d/e/x"}, {"d/b", "d/e/", "d/e/y", "d/.wh..wh..opq"}}, "d/ d/b:1 d/e/ d/e/y:1"},
		{"a layer's own file stays", [][]string{{"a"}, {"a", ".wh.a"}}, "a:1"},
		{"hard link to a lower layer", [][]string{{"a"}, {"b=a"}, {".wh.a"}}, "b:0"},
		{"directory in a file's place", [][]string{{"a"}, {"a/", "a/b"}}, "a/ a/b:1"},
		{"file in a directory's place", [][]string{{"a/", "a/b/", "a/b/c"}, {"a"}}, "a:1"},
		{"through a link below", [][]string{{"usr/", "usr/bin/", "bin->usr/bin"}, {"bin/sh"}}, "bin->usr/bin usr/ usr/bin/ usr/bin/sh:1"},
		{"directory in a link's place", [][]string{{"usr/", "usr/bin/", "bin->usr/bin"}, {"bin/", "bin/sh"}}, "bin/ bin/sh:1 usr/ usr/bin/"},
		{"AUFS's own", [][]string{{"a"}, {".wh..wh.plnk/", ".wh..wh.aufs"}}, "a:0"},
		{"deleted through a link", [][]string{{"usr/", "usr/a", "l->usr"}, {"l/.wh.a"}}, "l->usr usr/"},
		{"empty", [][]string{{"a"}, {}, {"b"}}, "a:0 b:2"},
	} {
		t.Run(c.name, func(t *testing.T) {
			got, err := unpacked(t, layers(t, c.layers...))
			if err != nil || !slices.Equal(got, strings.Fields(c.want)) {
				t.Errorf("%v, %v; want %s", got, err, c.want)
			}
		})
	}
}

// Whiteouts lead nowhere outside, and in a plain archive they are files.
func TestLayersHostile(t *testing.T) {
	outside := t.TempDir()
	precious := filepath.Join(outside, "precious")
	if err := os.WriteFile(precious, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	for _, names := range [][]string{
		{"l->" + outside, "l/.wh.precious"}, {"l->" + outside, "l/.wh..wh..opq"}, {"../.wh.precious"}, {".wh..."}, {".wh..", "x"}, {".wh."},
		{"l->../../../../../../../.." + outside, "l/.wh.precious"},
	} {
		_, err := unpacked(t, layers(t, []string{"a"}, names))
		if _, serr := os.Stat(precious); serr != nil {
			t.Fatalf("%q: %v", names, serr)
		}
		if err != nil && !errors.Is(err, ErrArchive) {
			t.Errorf("%q: %v", names, err)
		}
	}
	plain := layers(t, []string{"a", "b", ".wh.a"})
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for _, n := range []string{"a", ".wh.a"} {
		w.WriteHeader(&tar.Header{Name: n, Typeflag: tar.TypeReg, Mode: 0o644, Uid: os.Getuid(), Gid: os.Getgid()})
	}
	w.Close()
	if got, err := unpacked(t, b.Bytes()); err != nil || strings.Join(got, " ") != ".wh.a: a:" {
		t.Errorf("%q, %v", got, err)
	}
	// Cut off before its end mark, it is an error.
	for n := 0; n < len(bytes.TrimRight(plain, "\x00")); n += 256 {
		if _, err := unpacked(t, plain[:n]); err == nil {
			t.Errorf("%d of %d bytes are taken for all", n, len(plain))
		}
	}
}
