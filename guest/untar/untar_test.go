package untar

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

type item struct {
	tar.Header
	content string
}

func archive(t testing.TB, items ...item) []byte {
	t.Helper()
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for _, i := range items {
		h := i.Header
		if h.Typeflag == 0 {
			h.Typeflag = tar.TypeReg
		}
		if h.Mode == 0 {
			h.Mode = 0o755
		}
		h.Size = int64(len(i.content))
		must(t, w.WriteHeader(&h))
		_, err := io.WriteString(w, i.content)
		must(t, err)
	}
	must(t, w.Close())
	return b.Bytes()
}

func file(name, content string) item { return item{tar.Header{Name: name}, content} }
func dir(name string) item           { return item{tar.Header{Name: name, Typeflag: tar.TypeDir}, ""} }
func symlink(name, to string) item {
	return item{tar.Header{Name: name, Typeflag: tar.TypeSymlink, Linkname: to}, ""}
}
func hardlink(name, to string) item {
	return item{tar.Header{Name: name, Typeflag: tar.TypeLink, Linkname: to}, ""}
}

// cage is a root with a directory beside it that nothing may touch.
type cage struct {
	root, outside string
}

func newCage(t testing.TB) cage {
	t.Helper()
	dir := t.TempDir()
	c := cage{dir + "/root", dir + "/outside"}
	must(t, os.Mkdir(c.root, 0o755))
	must(t, os.Mkdir(c.outside, 0o755))
	must(t, os.WriteFile(c.outside+"/secret", []byte("secret"), 0o600))
	return c
}

// intact fails if anything outside of the root changed.
func (c cage) intact(t testing.TB) {
	t.Helper()
	var names []string
	must(t, filepath.Walk(filepath.Dir(c.outside), func(p string, _ os.FileInfo, err error) error {
		if p == c.root {
			return filepath.SkipDir
		}
		names = append(names, strings.TrimPrefix(p, filepath.Dir(c.outside)))
		return err
	}))
	b, err := os.ReadFile(c.outside + "/secret")
	var st syscall.Stat_t
	must(t, syscall.Stat(c.outside+"/secret", &st))
	if got := fmt.Sprint(names); err != nil || string(b) != "secret" || st.Nlink != 1 || st.Mode != syscall.S_IFREG|0o600 || got != "[ /outside /outside/secret]" {
		t.Errorf("outside was touched: %s %q %v %+v", got, b, err, st)
	}
}

func unpack(c cage, b []byte) error {
	return Unpack(context.Background(), c.root, bytes.NewReader(b), nil)
}

func TestEverything(t *testing.T) {
	c := newCage(t)
	when := time.Date(2040, 1, 2, 3, 4, 5, 678901234, time.UTC)
	capability := "\x01\x00\x00\x02\x00\x04\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00"
	long := strings.Repeat("long-name-", 20)
	must(t, unpack(c, archive(t,
		item{tar.Header{Name: "./", Typeflag: tar.TypeDir, Mode: 0o711}, ""},
		item{tar.Header{Name: "d/", Typeflag: tar.TypeDir, Mode: 0o1777, Uid: 12, Gid: 34, ModTime: when, Format: tar.FormatPAX}, ""},
		item{tar.Header{Name: "d/suid", Mode: 0o4755, Uid: 1000, Gid: 70000, ModTime: when, Format: tar.FormatPAX,
			PAXRecords: map[string]string{"SCHILY.xattr.user.note": "hi\x00there", "SCHILY.xattr.security.capability": capability}}, "content"},
		file("/absolute/"+long+"/"+long, "deep"),
		hardlink("hard", "d/suid"),
		hardlink("hard2", "/d/suid"),
		symlink("sym", "/d/suid"),
		symlink("dangling", "../../../../nowhere"),
		symlink("alias", "/d"),
		file("alias/through", "through an absolute link"),
		item{tar.Header{Name: "fifo", Typeflag: tar.TypeFifo, Mode: 0o620}, ""},
		item{tar.Header{Name: "null", Typeflag: tar.TypeChar, Devmajor: 1, Devminor: 3, Mode: 0o666}, ""},
		item{tar.Header{Name: "sda", Typeflag: tar.TypeBlock, Devmajor: 8, Devminor: 300, Mode: 0o660, Uid: 5}, ""},
		file("twice", "first"), file("twice", "second"),
		symlink("replaced", "/outside/secret"), file("replaced", "now a file"),
		dir("emptied"), file("emptied", "was a directory"),
		file("was-file", ""), dir("was-file"),
	)))
	st := func(name string) (s unix.Stat_t) {
		t.Helper()
		must(t, unix.Lstat(filepath.Join(c.root, name), &s))
		return s
	}
	content := func(name, want string) {
		t.Helper()
		if b, err := os.ReadFile(filepath.Join(c.root, name)); string(b) != want || err != nil {
			t.Errorf("%s: %q, %v, want %q", name, b, err, want)
		}
	}
	if s := st("."); s.Mode&0o7777 != 0o711 {
		t.Errorf("root: mode %o", s.Mode)
	}
	if s := st("d"); s.Mode != unix.S_IFDIR|0o1777 || s.Uid != 12 || s.Gid != 34 || s.Mtim.Nano() != when.UnixNano() {
		t.Errorf("directory: %+v", s)
	}
	s := st("d/suid")
	if s.Mode != unix.S_IFREG|0o4755 || s.Uid != 1000 || s.Gid != 70000 || s.Mtim.Nano() != when.UnixNano() || s.Nlink != 3 {
		t.Errorf("file: %+v", s)
	}
	if st("hard").Ino != s.Ino || st("hard2").Ino != s.Ino {
		t.Error("hard links are not")
	}
	for attr, want := range map[string]string{"user.note": "hi\x00there", "security.capability": capability} {
		b := make([]byte, 100)
		n, err := unix.Getxattr(c.root+"/d/suid", attr, b)
		if err == unix.ENOTSUP && strings.HasPrefix(attr, "user.") {
			continue // tmpfs without user attributes
		}
		if err != nil || string(b[:n]) != want {
			t.Errorf("%s: %q, %v", attr, b[:max(n, 0)], err)
		}
	}
	content("absolute/"+long+"/"+long, "deep")
	content("d/through", "through an absolute link")
	content("twice", "second")
	content("replaced", "now a file")
	content("emptied", "was a directory")
	if to, _ := os.Readlink(c.root + "/sym"); to != "/d/suid" {
		t.Errorf("symlink to %q", to)
	}
	if s := st("fifo"); s.Mode != unix.S_IFIFO|0o620 {
		t.Errorf("fifo: %o", s.Mode)
	}
	if s := st("null"); s.Mode != unix.S_IFCHR|0o666 || s.Rdev != unix.Mkdev(1, 3) {
		t.Errorf("null: %+v", s)
	}
	if s := st("sda"); s.Mode != unix.S_IFBLK|0o660 || s.Rdev != unix.Mkdev(8, 300) || s.Uid != 5 {
		t.Errorf("sda: %+v", s)
	}
	if s := st("was-file"); s.Mode&unix.S_IFMT != unix.S_IFDIR {
		t.Errorf("was-file: %o", s.Mode)
	}
	c.intact(t)
}

// TestHostile: each archive tries to get out; none may, and what is refused is
// refused with a reason.
func TestHostile(t *testing.T) {
	for name, c := range map[string]struct {
		items   func(outside string) []item
		refused string // "" if it unpacks, harmlessly
	}{
		"dot dot":             {func(string) []item { return []item{file("../outside/x", "x")} }, "leaves the archive"},
		"dot dot inside":      {func(string) []item { return []item{file("a/../../outside/x", "x")} }, "leaves the archive"},
		"dot dot alone":       {func(string) []item { return []item{dir("..")} }, "leaves the archive"},
		"absolute":            {func(o string) []item { return []item{file(o+"/x", "x")} }, ""},
		"through a link":      {func(o string) []item { return []item{symlink("l", o), file("l/x", "x")} }, "a link to what"},
		"through a rel. link": {func(string) []item { return []item{symlink("l", "../outside"), file("l/x", "x")} }, "a link to what"},
		"through two links": {func(string) []item {
			return []item{dir("a"), symlink("a/up", ".."), symlink("l", "a/up/../outside"), file("l/x", "x")}
		}, "a link to what"},
		"link replaced by itself":    {func(o string) []item { return []item{symlink("secret", o+"/secret"), file("secret", "x")} }, ""},
		"chmod through a link":       {func(o string) []item { return []item{symlink("d", o), dir("d/")} }, ""},
		"hard link out":              {func(o string) []item { return []item{hardlink("h", o+"/secret")} }, "no such file"},
		"hard link dot dot":          {func(string) []item { return []item{hardlink("h", "../outside/secret")} }, "leaves the archive"},
		"hard link through a link":   {func(o string) []item { return []item{symlink("l", o), hardlink("h", "l/secret")} }, "no such file"},
		"hard link to a link, write": {func(o string) []item { return []item{symlink("l", o+"/secret"), hardlink("h", "l"), file("h", "x")} }, ""},
		"magic link":                 {func(string) []item { return []item{symlink("l", "/proc/self/root"), file("l/x", "x")} }, "a link to what"},
		"link loop":                  {func(string) []item { return []item{symlink("l", "l"), file("l/x", "x")} }, "symbolic links"},
		"file as directory":          {func(string) []item { return []item{file("f", ""), file("f/x", "x")} }, "not a directory"},
		"name too long":              {func(string) []item { return []item{file(strings.Repeat("n", 300), "x")} }, "too long"},
		"directory not empty":        {func(string) []item { return []item{file("d/x", ""), file("d", "x")} }, "not empty"},
		"root as file":               {func(string) []item { return []item{file(".", "x")} }, "not a directory"},
		"bad owner":                  {func(string) []item { return []item{{tar.Header{Name: "f", Uid: -1 & 0xffffffff}, "x"}} }, "owner"},
	} {
		t.Run(name, func(t *testing.T) {
			cg := newCage(t)
			err := unpack(cg, archive(t, c.items(cg.outside)...))
			cg.intact(t)
			switch {
			case c.refused == "" && err != nil:
				t.Errorf("refused: %v", err)
			case c.refused != "" && (!errors.Is(err, ErrArchive) || !strings.Contains(err.Error(), c.refused)):
				t.Errorf("got %v, want a bad archive: %s", err, c.refused)
			}
		})
	}
}

func TestBroken(t *testing.T) {
	good := archive(t, file("a", strings.Repeat("x", 5000)), file("b", "y"))
	boom := errors.New("boom")
	for name, c := range map[string]struct {
		r    io.Reader
		want error
		text string
	}{
		"nothing":        {strings.NewReader(""), ErrArchive, "nothing"},
		"only zeros":     {bytes.NewReader(make([]byte, 10240)), ErrArchive, "nothing"},
		"text":           {strings.NewReader(strings.Repeat("hello ", 500)), ErrArchive, "not a tar"},
		"gzip":           {bytes.NewReader(append([]byte{0x1f, 0x8b, 8}, make([]byte, 2000)...)), ErrArchive, "not a tar"},
		"short":          {bytes.NewReader(good[:100]), ErrArchive, "cut off"},
		"in the content": {bytes.NewReader(good[:2000]), ErrArchive, "cut off"},
		// The first entry and its padding, and then the end of the input.
		"between entries": {bytes.NewReader(good[:512+5120]), ErrArchive, "no end mark"},
		"read error":      {io.MultiReader(bytes.NewReader(good[:1000]), errReader{boom}), boom, "boom"},
		"bad checksum":    {bytes.NewReader(append(append(bytes.Clone(good[:512+5120]), bytes.Repeat([]byte{'z'}, 512)...), make([]byte, 1024)...)), ErrArchive, "entry 2"},
	} {
		t.Run(name, func(t *testing.T) {
			err := Unpack(context.Background(), newCage(t).root, c.r, nil)
			if !errors.Is(err, c.want) || !strings.Contains(err.Error(), c.text) {
				t.Errorf("got %v, want %v with %q", err, c.want, c.text)
			}
		})
	}
	t.Run("padding is read", func(t *testing.T) {
		r := bytes.NewReader(append(bytes.Clone(good), make([]byte, 20480)...))
		must(t, Unpack(context.Background(), newCage(t).root, r, nil))
		if r.Len() != 0 {
			t.Errorf("%d bytes left unread: the sender would block", r.Len())
		}
	})
	t.Run("cancelled", func(t *testing.T) {
		ctx, cancel := context.WithCancel(context.Background())
		cancel()
		if err := Unpack(ctx, newCage(t).root, bytes.NewReader(good), nil); !errors.Is(err, context.Canceled) {
			t.Error(err)
		}
	})
}

type errReader struct{ err error }

func (r errReader) Read([]byte) (int, error) { return 0, r.err }

// TestSparse unpacks what GNU tar makes of a sparse file: its holes stay holes.
func TestSparse(t *testing.T) {
	const size, at = 64 << 20, 1 << 20
	for _, format := range []string{"pax", "gnu"} {
		dir := t.TempDir()
		piece := bytes.Repeat([]byte("s"), 4096)
		f, err := os.Create(dir + "/sparse")
		must(t, err)
		must(t, f.Truncate(size))
		_, err = f.WriteAt(piece, at)
		must(t, err)
		must(t, f.Close())
		b, err := exec.Command("tar", "-C", dir, "-c", "-S", "--format="+format, "sparse").Output()
		must(t, err)
		if len(b) > 100<<10 {
			t.Fatalf("%s: the archive is not sparse: %d bytes", format, len(b))
		}
		c := newCage(t)
		must(t, unpack(c, b))
		var st unix.Stat_t
		must(t, unix.Stat(c.root+"/sparse", &st))
		if st.Size != size || st.Blocks*512 > 1<<20 {
			t.Errorf("%s: %d bytes in %d blocks", format, st.Size, st.Blocks)
		}
		got, err := os.ReadFile(c.root + "/sparse")
		if err != nil || !bytes.Equal(got[at:at+4096], piece) || bytes.Count(got, []byte{0}) != size-4096 {
			t.Errorf("%s: content differs: %v", format, err)
		}
	}
}

func TestCheckRoot(t *testing.T) {
	for name, c := range map[string]struct {
		items []item
		ok    bool
	}{
		"plain":            {[]item{dir("etc"), file("bin/sh", "x")}, true},
		"merged usr":       {[]item{dir("etc"), symlink("bin", "usr/bin"), symlink("usr/bin/sh", "dash"), file("usr/bin/dash", "x")}, true},
		"absolute link":    {[]item{dir("etc"), symlink("bin/sh", "/usr/bin/busybox"), file("usr/bin/busybox", "x")}, true},
		"no etc":           {[]item{file("bin/sh", "x")}, false},
		"no shell":         {[]item{dir("etc"), dir("bin")}, false},
		"shell is missing": {[]item{dir("etc"), symlink("bin/sh", "dash")}, false},
		// The host has /bin/sh; the root does not.
		"shell outside":  {[]item{dir("etc"), symlink("bin", "/bin/../../../../../bin")}, false},
		"not executable": {[]item{dir("etc"), {tar.Header{Name: "bin/sh", Mode: 0o644}, "x"}}, false},
	} {
		t.Run(name, func(t *testing.T) {
			cg := newCage(t)
			if name == "merged usr" {
				c.items = append([]item{dir("usr/bin")}, c.items...)
			}
			must(t, unpack(cg, archive(t, c.items...)))
			err := CheckRoot(cg.root)
			if c.ok && err != nil || !c.ok && !errors.Is(err, ErrNoShell) {
				t.Errorf("got %v", err)
			}
		})
	}
}

// FuzzUnpack: whatever the archive is, nothing outside the root changes, and
// nothing but an error comes back.
func FuzzUnpack(f *testing.F) {
	f.Add(archive(f, dir("d"), file("d/f", "x"), symlink("l", "/d"), hardlink("h", "d/f"), file("l/g", "y")))
	f.Add(archive(f, symlink("l", "../outside"), file("l/secret", "x")))
	f.Add(archive(f, item{tar.Header{Name: "p", Typeflag: tar.TypeFifo}, ""}, file("../outside/x", "")))
	f.Add(layers(f, []string{"d/", "d/f", "l->../outside"}, []string{"l/.wh.secret", "d/.wh..wh..opq", "h=d/f", ".wh.d"}))
	c := newCage(f)
	f.Fuzz(func(t *testing.T, b []byte) {
		if len(b) > 64<<10 {
			return
		}
		must(t, os.RemoveAll(c.root))
		must(t, os.Mkdir(c.root, 0o755))
		unpack(c, b) //nolint:errcheck // the property is below
		c.intact(t)
	})
}

// FuzzClean: a name that is accepted stays below the root.
func FuzzClean(f *testing.F) {
	for _, s := range []string{"", "/", "a/b", "../a", "a/../b", "./x/.", "//a//b", "...", "a\x00b"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		got, err := clean(s)
		if err != nil {
			return
		}
		if filepath.IsAbs(got) || got != "" && !filepath.IsLocal(got) || strings.Contains("/"+got+"/", "/../") {
			t.Errorf("%q became %q", s, got)
		}
	})
}
