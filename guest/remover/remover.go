// Package remover deletes the root of a distro of version 1: its files belong to users of which only
// the namespace's root is the master.
package remover

import (
	"fmt"
	"os"

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
		if err := root.RemoveAll(name); err != nil {
			return err
		}
	}
	return nil
}
