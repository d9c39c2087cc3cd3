package distro

import (
	"bytes"
	"io"
	"strings"
	"testing"

	"github.com/u-root/u-root/pkg/cpio"
)

func archive(t testing.TB, records ...cpio.Record) []byte {
	t.Helper()
	var b bytes.Buffer
	w := cpio.Newc.Writer(&b)
	if err := cpio.WriteRecords(w, records); err != nil {
		t.Fatal(err)
	}
	if err := cpio.WriteTrailer(w); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

func TestFindInitramfs(t *testing.T) {
	content := strings.Repeat("packed", 1001)
	a := archive(t, cpio.Directory("dev", 0o755), cpio.StaticFile("init", "ab", 0o755), cpio.Symlink("link", "init"),
		cpio.StaticRecord([]byte(content), cpio.Info{Name: "system", Mode: cpio.S_IFIFO}), cpio.StaticFile("after", "x", 0o644))
	for name, want := range map[string]string{"system": content, "init": "ab", "after": "x", "dev": ""} {
		r, err := findInitramfs(bytes.NewReader(a), name)
		if err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		if b, err := io.ReadAll(r); err != nil || string(b) != want {
			t.Errorf("%s: %d bytes, %v, want %d", name, len(b), err, len(want))
		}
	}
	if _, err := findInitramfs(bytes.NewReader(a), "none"); err == nil || !strings.Contains(err.Error(), "holds no none") {
		t.Errorf("what is not there: %v", err)
	}
	for _, damaged := range [][]byte{nil, a[:100], a[:112], append([]byte("0"), a...), bytes.Replace(a, []byte("070701"), []byte("070707"), 1)} {
		if _, err := findInitramfs(bytes.NewReader(damaged), "system"); err == nil {
			t.Errorf("%d damaged bytes: no error", len(damaged))
		}
	}
}

// Whatever the bytes are, the search ends and stays inside of them.
func FuzzFindInitramfs(f *testing.F) {
	f.Add(archive(f, cpio.StaticFile("init", "ab", 0o755), cpio.StaticRecord([]byte("c"), cpio.Info{Name: "system", Mode: cpio.S_IFIFO})))
	f.Fuzz(func(t *testing.T, b []byte) {
		r, err := findInitramfs(bytes.NewReader(b), "system")
		if err != nil {
			return
		}
		if got, err := io.ReadAll(r); err == nil && !bytes.Contains(b, got) {
			t.Errorf("%d bytes that are not in the archive", len(got))
		}
	})
}
