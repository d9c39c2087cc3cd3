package main

import (
	"archive/tar"
	"bufio"
	"bytes"
	"debug/elf"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"strings"

	"github.com/u-root/u-root/pkg/cpio"
	"golang.org/x/sys/unix"
)

// tree is the content of an initramfs, by path without leading slash.
type tree struct {
	records []cpio.Record
	index   map[string]int
}

func newTree() *tree { return &tree{index: map[string]int{}} }

// resolve follows symlinks of the tree in all but the last element of a path: a
// file put into /bin of a merged-/usr system must land in /usr/bin.
func (t *tree) resolve(name string) string {
	name = strings.TrimPrefix(path.Clean("/"+name), "/")
	for range 40 {
		moved := false
		for i := 0; i < len(name); i++ {
			if name[i] != '/' {
				continue
			}
			n, ok := t.index[name[:i]]
			if !ok || t.records[n].Mode&unix.S_IFMT != unix.S_IFLNK {
				continue
			}
			target, err := io.ReadAll(io.NewSectionReader(t.records[n], 0, int64(t.records[n].FileSize)))
			if err != nil {
				return name
			}
			to := string(target)
			if !path.IsAbs(to) {
				to = path.Join("/", path.Dir(name[:i]), to)
			}
			name = strings.TrimPrefix(path.Join(to, name[i:]), "/")
			moved = true
			break
		}
		if !moved {
			break
		}
	}
	return name
}

// add puts a record in, after the directories that lead to it; a record of the
// same path is replaced, but a directory that is there already stays.
func (t *tree) add(r cpio.Record) {
	r.Name = t.resolve(r.Name)
	if r.Name == "" || r.Name == "." {
		return
	}
	if dir := path.Dir(r.Name); dir != "." {
		if _, ok := t.index[dir]; !ok {
			t.add(cpio.Directory(dir, 0o755))
		}
	}
	if n, ok := t.index[r.Name]; ok {
		if r.Mode&unix.S_IFMT != unix.S_IFDIR {
			t.records[n] = r
		}
		return
	}
	t.index[r.Name] = len(t.records)
	t.records = append(t.records, r)
}

// addPath copies a file or a directory of this machine in.
func (t *tree) addPath(src, dst string) error {
	fi, err := os.Stat(src)
	if err != nil {
		return err
	}
	if !fi.IsDir() {
		return t.addFile(src, dst, fi)
	}
	return filepath.WalkDir(src, func(p string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		rel, err := filepath.Rel(src, p)
		if err != nil {
			return err
		}
		to := path.Join(dst, rel)
		fi, err := d.Info()
		if err != nil {
			return err
		}
		switch {
		case d.IsDir():
			t.add(cpio.Directory(to, uint64(fi.Mode().Perm())))
		case d.Type()&fs.ModeSymlink != 0:
			target, err := os.Readlink(p)
			if err != nil {
				return err
			}
			t.add(cpio.Symlink(to, target))
		case fi.Mode().IsRegular():
			return t.addFile(p, to, fi)
		}
		return nil // sockets, pipes and devices of a tree are not copied
	})
}

// file is a record's content: opened at the first read, closed by the writer
// after the last, so that a large tree does not hold a descriptor each.
type file struct {
	name string
	f    *os.File
}

func (f *file) ReadAt(p []byte, off int64) (int, error) {
	if f.f == nil {
		o, err := os.Open(f.name)
		if err != nil {
			return 0, err
		}
		f.f = o
	}
	return f.f.ReadAt(p, off)
}

func (f *file) Close() error {
	if f.f == nil {
		return nil
	}
	err := f.f.Close()
	f.f = nil
	return err
}

func (t *tree) addFile(src, dst string, fi fs.FileInfo) error {
	if fi.Size() >= 4<<30 {
		return fmt.Errorf("%s has %d bytes: too large for an initramfs; give the rig a --disk and fill it there", src, fi.Size())
	}
	t.add(cpio.Record{
		ReaderAt: &file{name: src},
		Info:     cpio.Info{Name: dst, FileSize: uint64(fi.Size()), Mode: unix.S_IFREG | setID(fi.Mode()) | uint64(fi.Mode().Perm()), NLink: 1},
	})
	return nil
}

// addProgram copies an executable in and, when it is dynamic, its interpreter
// and libraries, each at its own path.
func (t *tree) addProgram(src, dst string) error {
	if err := t.addPath(src, dst); err != nil {
		return err
	}
	dynamic, err := isDynamic(src)
	if err != nil || !dynamic {
		return err
	}
	out, err := exec.Command("ldd", src).CombinedOutput()
	if err != nil {
		return fmt.Errorf("ldd %s: %w: %s", src, err, bytes.TrimSpace(out))
	}
	for line := range strings.Lines(string(out)) {
		// "libc.so.6 => /lib/... (0x...)" or "/lib64/ld-linux-x86-64.so.2 (0x...)"
		if name, _, ok := strings.Cut(line, "=> not found"); ok {
			return fmt.Errorf("%s needs %s, which is not on this machine", src, strings.TrimSpace(name))
		}
		for _, word := range strings.Fields(line) {
			if path.IsAbs(word) {
				if err := t.addPath(word, word); err != nil {
					return err
				}
				break
			}
		}
	}
	return nil
}

// isDynamic tells whether an executable needs an ELF interpreter.
func isDynamic(name string) (bool, error) {
	f, err := elf.Open(name)
	if err != nil {
		var bad *elf.FormatError
		if errors.As(err, &bad) || errors.Is(err, io.EOF) {
			return false, nil // a script, or nothing that ldd could tell about
		}
		return false, err
	}
	defer f.Close()
	for _, p := range f.Progs {
		if p.Type == elf.PT_INTERP {
			return true, nil
		}
	}
	return false, nil
}

// addTar takes a root file system from an uncompressed tar.
func (t *tree) addTar(name string) error {
	f, err := os.Open(name)
	if err != nil {
		return err
	}
	defer f.Close()
	tr := tar.NewReader(bufio.NewReaderSize(f, 1<<20))
	for {
		h, err := tr.Next()
		if err == io.EOF {
			return nil
		}
		if err != nil {
			return fmt.Errorf("%s: %w (a compressed tar must be unpacked first)", name, err)
		}
		info := cpio.Info{
			Name: h.Name, Mode: uint64(h.Mode) & 0o7777, NLink: 1, MTime: uint64(max(h.ModTime.Unix(), 0)),
			UID: uint64(h.Uid), GID: uint64(h.Gid), Rmajor: uint64(h.Devmajor), Rminor: uint64(h.Devminor),
		}
		switch h.Typeflag {
		case tar.TypeDir:
			info.Mode |= unix.S_IFDIR
			t.add(cpio.Record{Info: info})
		case tar.TypeReg:
			data, err := io.ReadAll(tr)
			if err != nil {
				return fmt.Errorf("%s: %w", name, err)
			}
			info.Mode |= unix.S_IFREG
			t.add(cpio.StaticRecord(data, info))
		case tar.TypeSymlink:
			info.Mode |= unix.S_IFLNK
			t.add(cpio.StaticRecord([]byte(h.Linkname), info))
		case tar.TypeLink: // a copy: the archive's links need not precede
			n, ok := t.index[t.resolve(h.Linkname)]
			if !ok {
				return fmt.Errorf("%s: %s links to %s, which is not in it", name, h.Name, h.Linkname)
			}
			r := t.records[n]
			r.Name = h.Name
			t.add(r)
		case tar.TypeChar:
			info.Mode |= unix.S_IFCHR
			t.add(cpio.Record{Info: info})
		case tar.TypeBlock:
			info.Mode |= unix.S_IFBLK
			t.add(cpio.Record{Info: info})
		case tar.TypeFifo:
			info.Mode |= unix.S_IFIFO
			t.add(cpio.Record{Info: info})
		}
	}
}

// write writes the tree as one cpio archive, padded so that another may follow.
func (t *tree) write(w io.Writer) error {
	b := bufio.NewWriterSize(w, 1<<20)
	cw := &counter{w: b}
	rw := cpio.Newc.Writer(cw)
	for i, r := range t.records {
		r.Ino = uint64(i) + 1
		if err := rw.WriteRecord(r); err != nil {
			return fmt.Errorf("%s: %w", r.Name, err)
		}
	}
	if err := cpio.WriteTrailer(rw); err != nil {
		return err
	}
	if _, err := b.Write(make([]byte, -cw.n&511)); err != nil {
		return err
	}
	return b.Flush()
}

type counter struct {
	w io.Writer
	n int64
}

func (c *counter) Write(p []byte) (int, error) {
	n, err := c.w.Write(p)
	c.n += int64(n)
	return n, err
}

// setID are the bits of a mode that Go keeps elsewhere: newuidmap(1) is nothing without.
func setID(m fs.FileMode) (bits uint64) {
	if m&fs.ModeSetuid != 0 {
		bits |= unix.S_ISUID
	}
	if m&fs.ModeSetgid != 0 {
		bits |= unix.S_ISGID
	}
	return bits
}
