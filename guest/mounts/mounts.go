// Package mounts describes file systems, device nodes and links as tables of
// values that can make and print themselves, each with its reason.
package mounts

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"
)

// Item is one entry of a table.
type Item interface {
	// Make creates the item. It does not replace what is there.
	Make() error
	String() string
}

// Mount is a file system. Its target is created if it is not there.
type Mount struct {
	FSType, Target string
	Flags          uintptr
	Data           string
	// Optional: the kernel may lack the file system.
	Optional bool
	Why      string
}

// Flags that most kernel file systems are mounted with.
const (
	NoSuidDevExec = unix.MS_NOSUID | unix.MS_NODEV | unix.MS_NOEXEC
	NoSuidDev     = unix.MS_NOSUID | unix.MS_NODEV
)

// Make mounts the file system.
func (m Mount) Make() error {
	err := unix.Mount(m.FSType, m.Target, m.FSType, m.Flags, m.Data)
	if err == unix.ENOENT {
		if err := os.MkdirAll(m.Target, 0o755); err != nil {
			return err
		}
		err = unix.Mount(m.FSType, m.Target, m.FSType, m.Flags, m.Data)
	}
	if err == unix.ENODEV && m.Optional {
		return nil
	}
	if err != nil {
		return fmt.Errorf("%v: %w", m, err)
	}
	return nil
}

func (m Mount) String() string { return fmt.Sprintf("mount %s on %s", m.FSType, m.Target) }

// Node is a character device.
type Node struct {
	Path         string
	Mode         uint32
	Major, Minor uint32
	Why          string
}

// Make creates the node; the mode is exact whatever the umask.
func (n Node) Make() error {
	err := unix.Mknod(n.Path, unix.S_IFCHR|n.Mode, int(unix.Mkdev(n.Major, n.Minor)))
	if err == unix.ENOENT {
		if err = os.MkdirAll(filepath.Dir(n.Path), 0o755); err == nil {
			err = unix.Mknod(n.Path, unix.S_IFCHR|n.Mode, int(unix.Mkdev(n.Major, n.Minor)))
		}
	}
	if err == nil {
		err = unix.Chmod(n.Path, n.Mode)
	}
	if err != nil && !errors.Is(err, unix.EEXIST) {
		return fmt.Errorf("%v: %w", n, err)
	}
	return nil
}

func (n Node) String() string { return fmt.Sprintf("node %s (%d:%d)", n.Path, n.Major, n.Minor) }

// Bind shows a file or a directory, with what is mounted below it, at a second place, whose
// target is created if it is not there.
type Bind struct {
	From, Target string
	Dir          bool
	// Attributes are mount_setattr(2)'s, for the whole of it.
	Attributes uint64
	// Optional: the source may not be there.
	Optional bool
	Why      string
}

// OpenTree takes hold of what is at a path, with what is mounted below it, as a mount that has no place yet.
func OpenTree(path string) (fd int, err error) {
	return unix.OpenTree(unix.AT_FDCWD, path, unix.OPEN_TREE_CLONE|unix.OPEN_TREE_CLOEXEC|unix.AT_RECURSIVE)
}

// Take takes hold of it, to be placed when the source cannot be reached any more. Without an optional
// source there is nothing to place, and no error.
func (b Bind) Take() (t Tree, ok bool, err error) {
	fd, err := OpenTree(b.From)
	if err == unix.ENOENT && b.Optional {
		return t, false, nil
	}
	if err != nil {
		return t, false, fmt.Errorf("%v: %w", b, err)
	}
	return Tree{FD: fd, Target: b.Target, File: !b.Dir, Attributes: b.Attributes}, true, nil
}

// Make binds it.
func (b Bind) Make() error {
	t, ok, err := b.Take()
	if err != nil || !ok {
		return err
	}
	return t.Make()
}

func (b Bind) String() string { return fmt.Sprintf("bind %s to %s", b.From, b.Target) }

// place moves a mount that has none yet to target, making that if need be.
func place(fd int, target string, dir bool) error {
	err := moveTo(fd, target)
	if err != unix.ENOENT {
		return err
	}
	if dir {
		err = os.MkdirAll(target, 0o755)
	} else if err = os.MkdirAll(filepath.Dir(target), 0o755); err == nil {
		var f *os.File
		if f, err = os.OpenFile(target, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o644); err == nil {
			f.Close()
		}
	}
	if err != nil {
		return err
	}
	return moveTo(fd, target)
}

func moveTo(fd int, target string) error {
	return unix.MoveMount(fd, "", unix.AT_FDCWD, target, unix.MOVE_MOUNT_F_EMPTY_PATH)
}

// Tree is a mount that somebody has taken hold of (open_tree(2), fsmount(2)) and that is placed once; FD is
// closed.
type Tree struct {
	FD         int
	Target     string
	File       bool // and no directory
	Attributes uint64
}

// Make places the mount.
func (t Tree) Make() error {
	defer unix.Close(t.FD)
	err := unix.MountSetattr(t.FD, "", unix.AT_EMPTY_PATH|unix.AT_RECURSIVE, &unix.MountAttr{Attr_set: t.Attributes})
	if err == nil {
		err = place(t.FD, t.Target, !t.File)
	}
	if err != nil {
		return fmt.Errorf("%v: %w", t, err)
	}
	return nil
}

// Take makes the file system without placing it; its flags are those of Attributes.
func (m Mount) Take(attributes int) (Tree, error) {
	fs, err := unix.Fsopen(m.FSType, unix.FSOPEN_CLOEXEC)
	if err != nil {
		return Tree{}, fmt.Errorf("%v: %w", m, err)
	}
	defer unix.Close(fs)
	fd := -1
	if err = unix.FsconfigCreate(fs); err == nil {
		fd, err = unix.Fsmount(fs, unix.FSMOUNT_CLOEXEC, attributes)
	}
	if err != nil {
		return Tree{}, fmt.Errorf("%v: %w", m, err)
	}
	return Tree{FD: fd, Target: m.Target, Attributes: uint64(attributes)}, nil
}

func (t Tree) String() string { return fmt.Sprintf("mount on %s", t.Target) }

// Link is a symbolic link.
type Link struct{ Path, To, Why string }

// Make creates the link.
func (l Link) Make() error {
	if err := unix.Symlink(l.To, l.Path); err != nil && err != unix.EEXIST {
		return fmt.Errorf("%v: %w", l, err)
	}
	return nil
}

func (l Link) String() string { return fmt.Sprintf("link %s to %s", l.Path, l.To) }

// Dir is a directory.
type Dir struct {
	Path string
	Mode uint32
	Why  string
}

// Make creates the directory; the mode is exact whatever the umask.
func (d Dir) Make() error {
	err := unix.Mkdir(d.Path, d.Mode)
	if err == unix.EEXIST {
		return nil
	}
	if err == nil {
		err = unix.Chmod(d.Path, d.Mode)
	}
	if err != nil {
		return fmt.Errorf("%v: %w", d, err)
	}
	return nil
}

func (d Dir) String() string { return fmt.Sprintf("directory %s", d.Path) }

// File is a small text.
type File struct{ Path, Content, Why string }

// Make writes the file unless there is one.
func (f File) Make() error {
	file, err := os.OpenFile(f.Path, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o644)
	if errors.Is(err, unix.EEXIST) {
		return nil
	}
	if err == nil {
		_, err = file.WriteString(f.Content)
		err = errors.Join(err, file.Close())
	}
	if err != nil {
		return fmt.Errorf("%v: %w", f, err)
	}
	return nil
}

func (f File) String() string { return fmt.Sprintf("file %s", f.Path) }

// Value is a number or word written to a file of /proc or /sys.
type Value struct{ Path, Value, Why string }

// Make writes the value.
func (v Value) Make() error {
	fd, err := unix.Open(v.Path, unix.O_WRONLY|unix.O_CLOEXEC, 0)
	if err == nil {
		_, err = unix.Write(fd, []byte(v.Value))
		unix.Close(fd)
	}
	if err != nil {
		return fmt.Errorf("%v: %w", v, err)
	}
	return nil
}

func (v Value) String() string { return fmt.Sprintf("write %q to %s", v.Value, v.Path) }

// All makes every item of the table, in order. A failure does not keep it from
// making the rest; all failures are returned together.
func All(table []Item) error {
	var errs []error
	for _, i := range table {
		if err := i.Make(); err != nil {
			errs = append(errs, err)
		}
	}
	return errors.Join(errs...)
}
