package filecopy

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path"
	"strings"
	"sync"
	"sync/atomic"
	"unicode"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"github.com/wsl2/wsl2/internal/p9"
)

// Options of a copy.
type Options struct {
	// Owners keeps numeric owners, set-id bits and devices, which takes root's rights. Else what
	// is made belongs to who makes it.
	Owners bool
	// Progress, if set, is told how many bytes have been copied so far, by several goroutines.
	Progress func(bytes int64)
	// Skipped, if set, is told of what cannot be copied: a socket, say. Also by several.
	Skipped func(path, why string)
}

// Copy copies what src is, a file or a directory with all in it, to dst: into it, if
// that is a directory, else under that name. Symbolic links are copied as such, but
// src itself is followed.
func Copy(ctx context.Context, from *Tree, src string, to *Tree, dst string, o Options) error {
	f, err := from.find(ctx, src)
	if err != nil {
		return err
	}
	defer f.Close(context.WithoutCancel(ctx)) //nolint:errcheck // it was not written
	dir, name, err := to.place(ctx, dst, path.Base(path.Clean(src)))
	if err != nil {
		return err
	}
	defer dir.Close(context.WithoutCancel(ctx)) //nolint:errcheck // it was not opened
	if name == "/" || name == "." || name == ".." {
		return fmt.Errorf("copy %s: give the copy a name", src)
	}
	c := &copier{Options: o, buffers: sync.Pool{New: func() any { b := make([]byte, max(block, min(f.MaxIO(), dir.MaxIO())/block*block)); return &b }},
		slots: make(chan struct{}, filesAtOnce), same: from.client == to.client}
	return c.node(ctx, f, src, dir, name)
}

// block is what holes are found by, and the multiple that reads and writes are of.
const block = 64 << 10

// Requests in flight: files of a tree, and pieces of a file.
const (
	filesAtOnce  = 8
	piecesAtOnce = 4
)

// maxPath bounds the paths that are kept for people, one for each level of a tree.
const maxPath = 16 << 10

type copier struct {
	Options
	buffers sync.Pool // *[]byte
	bytes   atomic.Int64
	slots   chan struct{} // one token for each file in flight
	same    bool          // the copy is in the original's tree: their QIDs can be compared
	top     uint64        // QID of the first directory made. Directories are copied one after the other
}

// printable is a name of the other side, for a terminal.
func printable(name string) string {
	return strings.Map(func(r rune) rune {
		if unicode.IsControl(r) || r == unicode.ReplacementChar {
			return '?'
		}
		return r
	}, name)
}

func wrap(op, name string, err error) error {
	if err == nil || errors.As(err, new(*fs.PathError)) {
		return err
	}
	return &fs.PathError{Op: op, Path: name, Err: err}
}

// node copies one file of any kind. name is its path, for people.
func (c *copier) node(ctx context.Context, src *p9.File, name string, dir *p9.File, as string) error {
	a, err := src.GetAttr(ctx, p9.AttrBasic)
	if err != nil {
		return wrap("stat", name, err)
	}
	switch a.Mode & unix.S_IFMT {
	case unix.S_IFDIR:
		return wrap("copy", name, c.directory(ctx, src, name, a, dir, as))
	case unix.S_IFREG:
		return wrap("copy", name, c.file(ctx, src, a, dir, as))
	case unix.S_IFLNK:
		target, err := src.Readlink(ctx)
		if err != nil {
			return wrap("read link", name, err)
		}
		return wrap("copy", name, c.make(ctx, a, dir, as, func() error { return second(dir.Symlink(ctx, as, target, 0)) }))
	case unix.S_IFCHR, unix.S_IFBLK:
		if !c.Owners {
			c.skip(name, "a device")
			return nil
		}
	case unix.S_IFSOCK:
		c.skip(name, "a socket")
		return nil
	}
	return wrap("copy", name, c.make(ctx, a, dir, as, func() error {
		return second(dir.Mknod(ctx, as, a.Mode&(unix.S_IFMT|0o777), unix.Major(a.Rdev), unix.Minor(a.Rdev), 0))
	}))
}

func second[T any](_ T, err error) error { return err }

func (c *copier) skip(name, why string) {
	if c.Skipped != nil {
		c.Skipped(name, why)
	}
}

// make makes what is neither a file nor a directory, in place of what was there.
func (c *copier) make(ctx context.Context, a p9.Attr, dir *p9.File, as string, what func() error) error {
	err := what()
	if errors.Is(err, unix.EEXIST) {
		if err = dir.UnlinkAt(ctx, as, 0); err == nil {
			err = what()
		}
	}
	if err != nil {
		return err
	}
	made, err := dir.Walk(ctx, as)
	if err != nil {
		return err
	}
	defer made.Close(context.WithoutCancel(ctx)) //nolint:errcheck // it was not opened
	return c.finish(ctx, made, a)
}

// finish gives a copy what the original has beside its contents.
func (c *copier) finish(ctx context.Context, f *p9.File, a p9.Attr) error {
	set := p9.SetAttr{Valid: p9.SetAtime | p9.SetAtimeTo | p9.SetMtime | p9.SetMtimeTo, Atime: a.Atime, Mtime: a.Mtime}
	mask := uint32(0o1777)
	if c.Owners {
		set.Valid |= p9.SetUID | p9.SetGID
		set.UID, set.GID = a.UID, a.GID
		mask = 0o7777
	}
	if a.Mode&unix.S_IFMT != unix.S_IFLNK { // which have none
		set.Valid |= p9.SetMode
		set.Mode = a.Mode & mask
	}
	return f.SetAttr(ctx, set)
}

func (c *copier) directory(ctx context.Context, src *p9.File, name string, a p9.Attr, dir *p9.File, as string) error {
	if len(name) > maxPath {
		return unix.ENAMETOOLONG
	}
	if c.top != 0 && src.QID().Path == c.top {
		return errors.New("a directory is not copied into itself")
	}
	// Ours until all is in it, whatever the original's mode.
	if _, err := dir.Mkdir(ctx, as, 0o700, 0); err != nil && !errors.Is(err, unix.EEXIST) {
		return err
	}
	made, err := dir.Walk(ctx, as)
	if err != nil {
		return err
	}
	defer made.Close(context.WithoutCancel(ctx)) //nolint:errcheck // it was not opened
	if made.QID().Type&p9.QTDir == 0 {
		return unix.ENOTDIR
	}
	if c.same && c.top == 0 {
		c.top = made.QID().Path
	}
	list, err := src.Walk(ctx)
	if err != nil {
		return err
	}
	defer list.Close(context.WithoutCancel(ctx)) //nolint:errcheck // it was not written
	if err := list.Open(ctx, os.O_RDONLY); err != nil {
		return err
	}
	files, ctx2 := errgroup.WithContext(ctx)
	err = c.entries(ctx2, list, func(e p9.Dirent) error {
		f, err := src.Walk(ctx2, e.Name)
		if err != nil {
			return wrap("find", path.Join(name, printable(e.Name)), err)
		}
		one := func() error {
			defer f.Close(context.WithoutCancel(ctx)) //nolint:errcheck // it was not written
			return c.node(ctx2, f, path.Join(name, printable(e.Name)), made, e.Name)
		}
		if f.QID().Type&p9.QTDir != 0 {
			return one() // one after the other: trees may be deep
		}
		select {
		case c.slots <- struct{}{}:
		case <-ctx2.Done():
			f.Close(context.WithoutCancel(ctx)) //nolint:errcheck // it was not opened
			return context.Cause(ctx2)
		}
		files.Go(func() error {
			defer func() { <-c.slots }()
			return one()
		})
		return nil
	})
	if werr := files.Wait(); werr != nil {
		return werr
	}
	if err != nil {
		return err
	}
	return c.finish(ctx, made, a)
}

// entries calls what for each entry of an open directory.
func (c *copier) entries(ctx context.Context, dir *p9.File, what func(p9.Dirent) error) error {
	for offset := uint64(0); ; {
		list, err := dir.Readdir(ctx, offset)
		if err != nil || len(list) == 0 {
			return err
		}
		for _, e := range list {
			offset = e.Offset
			if e.Name == "." || e.Name == ".." {
				continue
			}
			if err := what(e); err != nil {
				return err
			}
		}
	}
}

func (c *copier) file(ctx context.Context, src *p9.File, a p9.Attr, dir *p9.File, as string) (err error) {
	in, err := src.Walk(ctx)
	if err != nil {
		return err
	}
	defer in.Close(context.WithoutCancel(ctx)) //nolint:errcheck // it was not written
	if err := in.Open(ctx, os.O_RDONLY); err != nil {
		return err
	}
	out, err := dir.Walk(ctx)
	if err != nil {
		return err
	}
	defer func() {
		if cerr := out.Close(context.WithoutCancel(ctx)); err == nil {
			err = cerr
		}
	}()
	err = out.Create(ctx, as, os.O_RDWR|os.O_EXCL, 0o600, 0)
	old := errors.Is(err, unix.EEXIST)
	if old { // not truncated: by this name or another it may be the original
		err = out.Create(ctx, as, os.O_RDWR, 0o600, 0)
	}
	if errors.Is(err, unix.ELOOP) || errors.Is(err, unix.ENXIO) { // a link or a FIFO is replaced, not followed
		old = false
		if err = dir.UnlinkAt(ctx, as, 0); err == nil {
			err = out.Create(ctx, as, os.O_RDWR|os.O_EXCL, 0o600, 0)
		}
	}
	if err != nil {
		return err
	}
	if err := c.contents(ctx, in, out, int64(a.Size), old); err != nil {
		return err
	}
	return c.finish(ctx, out, a)
}

// contents copies the bytes, several pieces at a time. Blocks of zeros become holes,
// unless old bytes are overwritten; what was longer is cut at the end.
func (c *copier) contents(ctx context.Context, in, out *p9.File, size int64, old bool) error {
	var next, end atomic.Int64 // end: of what was read
	var holes atomic.Bool
	holes.Store(old)
	pieces, pctx := errgroup.WithContext(ctx)
	for n := range int64(piecesAtOnce) {
		if n > 0 && size <= n*block { // a small file needs no second one
			break
		}
		pieces.Go(func() error {
			b := c.buffers.Get().(*[]byte)
			defer c.buffers.Put(b)
			for {
				at := next.Add(int64(len(*b))) - int64(len(*b))
				if at >= size {
					return nil
				}
				n, err := readFull(pctx, in, (*b)[:min(int64(len(*b)), size-at)], at)
				if err != nil {
					return err
				}
				for e := end.Load(); at+int64(n) > e && !end.CompareAndSwap(e, at+int64(n)); e = end.Load() {
				}
				if err := c.write(pctx, out, (*b)[:n], at, old, &holes); err != nil {
					return err
				}
				done := c.bytes.Add(int64(n))
				if c.Progress != nil {
					c.Progress(done)
				}
			}
		})
	}
	if err := pieces.Wait(); err != nil || !holes.Load() {
		return err
	}
	return out.SetAttr(ctx, p9.SetAttr{Valid: p9.SetSize, Size: uint64(end.Load())})
}

// readFull reads until p is full or the file ends.
func readFull(ctx context.Context, f *p9.File, p []byte, at int64) (int, error) {
	done := 0
	for done < len(p) {
		n, err := f.ReadAt(ctx, p[done:], at+int64(done))
		if err != nil || n == 0 {
			return done, err
		}
		done += n
	}
	return done, nil
}

// write writes the blocks of p that are not zeros, over old bytes those as well.
func (c *copier) write(ctx context.Context, f *p9.File, p []byte, at int64, old bool, holes *atomic.Bool) error {
	for len(p) > 0 {
		n := 0
		for !old && n < len(p) && zero(p[n:min(n+block, len(p))]) {
			n = min(n+block, len(p))
		}
		if n > 0 {
			holes.Store(true)
			p, at = p[n:], at+int64(n)
			continue
		}
		for n < len(p) && (old || !zero(p[n:min(n+block, len(p))])) {
			n = min(n+block, len(p))
		}
		for rest := p[:n]; len(rest) > 0; {
			w, err := f.WriteAt(ctx, rest, at)
			if err == nil && w == 0 {
				err = unix.EIO
			}
			if err != nil {
				return err
			}
			rest, at = rest[w:], at+int64(w)
		}
		p = p[n:]
	}
	return nil
}

func zero(b []byte) bool { return b[0] == 0 && bytes.Equal(b[1:], b[:len(b)-1]) }
