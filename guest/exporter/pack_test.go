package exporter

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/wsl2/wsl2/guest/untar"
)

// tree makes a directory with all that a tar can hold and this user may make.
func tree(t *testing.T) string {
	t.Helper()
	root := t.TempDir()
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	must(os.MkdirAll(filepath.Join(root, "etc", "empty"), 0o755))
	must(os.Mkdir(filepath.Join(root, lostAndFound), 0o700))
	must(os.WriteFile(filepath.Join(root, "etc/file"), bytes.Repeat([]byte("content\n"), 300000), 0o640))
	must(os.Chmod(filepath.Join(root, "etc/file"), 0o4751))
	must(os.Link(filepath.Join(root, "etc/file"), filepath.Join(root, "hard")))
	must(os.Symlink("/etc/file", filepath.Join(root, "symlink")))
	must(os.WriteFile(filepath.Join(root, "räksmörgås \n"), nil, 0o600))
	long := filepath.Join(root, strings.Repeat("long-directory-name/", 10))
	must(os.MkdirAll(long, 0o755))
	must(os.WriteFile(filepath.Join(long, "deep"), []byte("deep"), 0o644))
	must(unix.Mkfifo(filepath.Join(root, "fifo"), 0o622))
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM, 0)
	must(err)
	t.Cleanup(func() { unix.Close(fd) })
	must(unix.Bind(fd, &unix.SockaddrUnix{Name: filepath.Join(root, "etc", "s")}))
	if err := unix.Setxattr(filepath.Join(root, "etc/file"), "user.colour", []byte("bl\x00ue"), 0); err != nil && !errors.Is(err, unix.ENOTSUP) {
		t.Fatal(err)
	}
	sparse, err := os.Create(filepath.Join(root, "etc/sparse"))
	must(err)
	_, err = sparse.WriteAt([]byte("behind a hole"), 8<<20)
	must(errors.Join(err, sparse.Close()))
	stamp := time.Unix(1700000000, 123456789)
	must(os.Chtimes(filepath.Join(root, "etc/file"), stamp, stamp))
	must(os.Chtimes(filepath.Join(root, "etc"), stamp, stamp))
	return root
}

// describe lists a tree with all that Pack and untar keep.
func describeTree(t *testing.T, root string) string {
	t.Helper()
	var b strings.Builder
	inodes := map[uint64]string{}
	err := filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		rel, _ := filepath.Rel(root, path)
		info, err := d.Info()
		if err != nil {
			return err
		}
		if rel == lostAndFound || d.Type()&fs.ModeSocket != 0 {
			return nil
		}
		st := info.Sys().(*syscall.Stat_t)
		fmt.Fprintf(&b, "%q %o %d:%d %d", rel, st.Mode, st.Uid, st.Gid, info.ModTime().UnixNano())
		switch {
		case d.Type() == 0:
			text, err := os.ReadFile(path)
			if err != nil {
				return err
			}
			fmt.Fprintf(&b, " %d bytes, holes: %v, first link %q", len(text), st.Blocks*512 < st.Size/2, inodes[st.Ino])
			inodes[st.Ino] = rel
			value := make([]byte, 100)
			if n, err := unix.Getxattr(path, "user.colour", value); err == nil {
				fmt.Fprintf(&b, " %q", value[:n])
			}
		case d.Type()&fs.ModeSymlink != 0:
			target, _ := os.Readlink(path)
			fmt.Fprintf(&b, " -> %s", target)
		}
		b.WriteByte('\n')
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return b.String()
}

// What is packed is what untar unpacks.
func TestPack(t *testing.T) {
	root := tree(t)
	var archive bytes.Buffer
	var left []string
	if err := Pack(root, &archive, func(name, why string) { left = append(left, name) }); err != nil {
		t.Fatal(err)
	}
	if len(left) != 1 || left[0] != "/etc/s" {
		t.Errorf("left out %q", left)
	}
	if again := new(bytes.Buffer); Pack(root, again, func(string, string) {}) != nil || !bytes.Equal(again.Bytes(), archive.Bytes()) {
		t.Error("two archives of one tree differ")
	}
	copied := t.TempDir()
	if err := untar.Unpack(context.Background(), copied, bytes.NewReader(archive.Bytes()), nil); err != nil {
		t.Fatal(err)
	}
	if want, got := describeTree(t, root), describeTree(t, copied); got != want {
		t.Errorf("unpacked:\n%s\nwant:\n%s", got, want)
	}
	r := tar.NewReader(&archive)
	if h, err := r.Next(); err != nil || h.Name != "./" {
		t.Errorf("the first entry is %+v, %v; want the root", h, err)
	}
}

// A reader that goes away ends it.
func TestPackBrokenPipe(t *testing.T) {
	if err := Pack(tree(t), broken{}, func(string, string) {}); !errors.Is(err, syscall.EPIPE) {
		t.Error(err)
	}
	if err := Pack("/no/such/dir", broken{}, nil); !errors.Is(err, fs.ErrNotExist) {
		t.Error(err)
	}
}

type broken struct{}

func (broken) Write(p []byte) (int, error) { return 0, syscall.EPIPE }
