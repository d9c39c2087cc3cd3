// Package remover deletes the root of a distro of version 1: its files belong to users of which only
// the namespace's root is the master.
package remover

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"

	"golang.org/x/sys/unix"

	"github.com/wsl2/wsl2/guest/diskjob"
	"github.com/wsl2/wsl2/internal/nsinit"
	"github.com/wsl2/wsl2/internal/wire"
)

// Argv0 is the name under which /init deletes.
const Argv0 = "wsl2-remove"

// Run is the main function of a deletion. It returns the exit status.
func Run(args []string) int {
	return diskjob.Run(args, func(m *wire.RemoveRoot) uint32 { return m.ID }, run)
}

// run leaves the root itself to the launcher, whose directory it is in.
func run(*diskjob.Job, *wire.RemoveRoot) (string, error) {
	// What the host has mounted in there is not the distro's to delete. No more of it comes: the mounts of
	// this namespace are private.
	dir, err := os.Getwd()
	if err != nil {
		return "", err
	}
	mounts, err := nsinit.MountsBelow(dir)
	if err != nil {
		return "", err
	}
	if len(mounts) > 0 {
		return "", fmt.Errorf("%w: something is mounted on %s", diskjob.ErrRefused, mounts[0])
	}
	return "", deleteAll()
}

// deleteAll deletes what is in the working directory.
func deleteAll() error {
	root, err := os.OpenRoot(".")
	if err != nil {
		return err
	}
	defer root.Close()
	dir, err := root.Open(".")
	if err != nil {
		return err
	}
	defer dir.Close()
	names, err := dir.Readdirnames(-1)
	if err != nil {
		return err
	}
	for _, name := range names {
		err := root.RemoveAll(name)
		if errors.Is(err, unix.EMFILE) { // it holds a descriptor for each level
			err = flatten()
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// flatten deletes what is in the working directory with a few descriptors, however deep it is: the directories in each
// directory are moved up before that one is deleted.
func flatten() error {
	for moved := 0; ; {
		names, err := entries(unix.AT_FDCWD)
		if err != nil || len(names) == 0 {
			return err
		}
		for _, name := range names {
			if gone(unix.AT_FDCWD, name) {
				continue
			}
			if err := empty(name, &moved); err != nil {
				return err
			}
		}
	}
}

// empty moves the directories in a directory to the working directory and deletes all else in it, and the directory. A number
// that counts those that were moved is the name of each.
func empty(dir string, moved *int) error {
	fd, err := unix.Open(dir, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err != nil {
		return &os.PathError{Op: "open", Path: dir, Err: err}
	}
	defer unix.Close(fd)
	names, err := entries(fd)
	if err != nil {
		return err
	}
	for _, name := range names {
		if gone(fd, name) {
			continue
		}
		// Until a name is free, or that of an empty directory, which goes. NFS and some FUSE have no RENAME_NOREPLACE.
		for taken := true; taken; *moved++ {
			err = unix.Renameat(fd, name, unix.AT_FDCWD, strconv.Itoa(*moved))
			taken = err == unix.EEXIST || err == unix.ENOTEMPTY || err == unix.ENOTDIR || err == unix.EISDIR
		}
		if err != nil {
			return &os.PathError{Op: "rename", Path: filepath.Join(dir, name), Err: err}
		}
	}
	if err := unix.Rmdir(dir); err != nil {
		return &os.PathError{Op: "rmdir", Path: dir, Err: err}
	}
	return nil
}

// gone tells whether a file or an empty directory has been deleted.
func gone(dir int, name string) bool {
	return unix.Unlinkat(dir, name, 0) == nil || unix.Unlinkat(dir, name, unix.AT_REMOVEDIR) == nil
}

// entries returns the names in a directory.
func entries(dir int) ([]string, error) {
	fd, err := unix.Openat(dir, ".", unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, &os.PathError{Op: "open", Path: ".", Err: err}
	}
	f := os.NewFile(uintptr(fd), ".")
	defer f.Close()
	return f.Readdirnames(-1)
}
