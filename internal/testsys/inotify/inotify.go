// Command inotify prints what inotify(7) tells of a directory or file, as tests in a distro want to
// know it, whose busybox tells a letter for each: a line for each event, "from dir/name"; of what is watched itself "moved dir".
// Directories that are made are watched as well, as what watches trees does.
package main

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"os"

	"golang.org/x/sys/unix"
)

var names = []struct {
	mask uint32
	name string
}{
	{unix.IN_CREATE, "create"}, {unix.IN_DELETE, "delete"}, {unix.IN_MODIFY, "modify"}, {unix.IN_ATTRIB, "attrib"},
	{unix.IN_CLOSE_WRITE, "written"}, {unix.IN_MOVED_FROM, "from"}, {unix.IN_MOVED_TO, "to"},
	{unix.IN_MOVE_SELF, "moved"}, {unix.IN_DELETE_SELF, "deleted"},
}

func main() {
	if err := watch(os.Args[1]); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

func watch(root string) error {
	fd, err := unix.InotifyInit1(unix.IN_CLOEXEC)
	if err != nil {
		return err
	}
	dirs := map[int32]string{}
	add := func(dir string) error {
		mask := uint32(0)
		for _, n := range names {
			mask |= n.mask
		}
		wd, err := unix.InotifyAddWatch(fd, dir, mask)
		if err != nil {
			return fmt.Errorf("%s: %w", dir, err)
		}
		dirs[int32(wd)] = dir
		fmt.Println("watching " + dir)
		return nil
	}
	if err := add(root); err != nil {
		return err
	}
	buf := make([]byte, 64<<10)
	for {
		n, err := unix.Read(fd, buf)
		if err != nil {
			return err
		}
		for b := buf[:n]; len(b) >= unix.SizeofInotifyEvent; {
			mask, size := binary.NativeEndian.Uint32(b[4:]), binary.NativeEndian.Uint32(b[12:])
			name, _, _ := bytes.Cut(b[unix.SizeofInotifyEvent:unix.SizeofInotifyEvent+size], []byte{0})
			path := dirs[int32(binary.NativeEndian.Uint32(b))]
			if len(name) > 0 {
				path += "/" + string(name)
			}
			for _, n := range names {
				if mask&n.mask != 0 {
					fmt.Println(n.name + " " + path)
				}
			}
			if mask&unix.IN_CREATE != 0 && mask&unix.IN_ISDIR != 0 {
				if err := add(path); err != nil {
					return err
				}
			}
			b = b[unix.SizeofInotifyEvent+size:]
		}
	}
}
