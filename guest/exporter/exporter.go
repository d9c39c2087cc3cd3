// Package exporter sends a disk's files as a tar archive, in a process of its own
// (package diskjob) whose root is that disk.
package exporter

import (
	"fmt"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/wsl2/wsl2/guest/diskjob"
	"github.com/wsl2/wsl2/internal/wire"
)

// Argv0 is the name under which /init exports.
const Argv0 = "wsl2-export"

// Run is the main function of an export. It returns the exit status.
func Run(args []string) int {
	return diskjob.Run(args, func(m *wire.Export) uint32 { return m.ID }, run)
}

func run(j *diskjob.Job, m *wire.Export) (string, error) {
	// A descriptor for each level of directories.
	limit := syscall.Rlimit{Cur: 1 << 18, Max: 1 << 18}
	if m.Slot == wire.DirSlot { // no root of the host that could raise it
		if err := syscall.Getrlimit(unix.RLIMIT_NOFILE, &limit); err == nil {
			limit.Cur = limit.Max
		}
	}
	if err := syscall.Setrlimit(unix.RLIMIT_NOFILE, &limit); err != nil {
		j.Log.Errorf("raise the limit of descriptors: %v", err)
	}
	// The journal of a disk that was not unmounted is replayed nevertheless.
	dir, err := diskjob.Mount(m.Slot, unix.MS_RDONLY)
	if err != nil {
		return "", err
	}
	c, err := j.Accept(m.ID, m.Archive)
	if err != nil {
		return "", err
	}
	if err = diskjob.Enter(dir); err == nil {
		err = Pack("/", c, func(name, why string) { j.Log.Printf("%s: left out: %s", name, why) })
	}
	if err != nil {
		c.Close()
		return "", fmt.Errorf("make the archive: %w", err)
	}
	// The launcher has it all when it closes its side; closing ours at once could cut
	// off what is on its way.
	if err := c.CloseWrite(); err == nil {
		c.Read(make([]byte, 1)) //nolint:errcheck // its end is what is waited for
	}
	c.Close()
	return "", nil
}
