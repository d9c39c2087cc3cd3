// Package remover deletes the root of a distro of version 1: its files belong to users of which only
// the namespace's root is the master.
package remover

import (
	"os"

	"github.com/wsl2/wsl2/guest/diskjob"
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
	root, err := os.OpenRoot(".")
	if err != nil {
		return "", err
	}
	defer root.Close()
	dir, err := root.Open(".")
	if err != nil {
		return "", err
	}
	defer dir.Close()
	names, err := dir.Readdirnames(-1)
	if err != nil {
		return "", err
	}
	for _, name := range names {
		if err := root.RemoveAll(name); err != nil {
			return "", err
		}
	}
	return "", nil
}
