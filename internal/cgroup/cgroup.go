// Package cgroup sets what a distro may use, in a control group (cgroups(7), cgroup-v2.rst): in the VM
// and, with version 1, on the host.
package cgroup

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/wsl2/wsl2/internal/wire"
)

// Root is where cgroup2 is mounted.
const Root = "/sys/fs/cgroup"

// limits are the files of a cgroup that hold these limits.
func limits(l wire.Limits) []struct {
	controller, file, value string
	wanted                  bool
} {
	orMax := func(n uint64) string {
		if n == 0 {
			return "max"
		}
		return strconv.FormatUint(n, 10)
	}
	const period = 100_000 // µs; cgroup-v2.rst, "cpu.max"
	return []struct {
		controller, file, value string
		wanted                  bool
	}{
		{"memory", "memory.max", orMax(l.MemoryBytes), l.MemoryBytes != 0},
		{"cpu", "cpu.max", orMax(uint64(l.MilliCPUs)*period/1000) + " " + strconv.Itoa(period), l.MilliCPUs != 0},
		{"pids", "pids.max", orMax(uint64(l.PIDs)), l.PIDs != 0},
	}
}

// Limit sets what may be used in a cgroup, or takes away what an earlier distro in it left.
// A limit that cannot be set is an error: whoever asks for one relies on it.
func Limit(path string, l wire.Limits) error {
	for _, v := range limits(l) {
		if err := write(filepath.Join(path, v.file), v.value); v.wanted && (err != nil || path == "") {
			return fmt.Errorf("limit the distro (%s): %w", v.file, err)
		}
	}
	return nil
}

// Enable gives what is below a cgroup the controllers that limits need.
func Enable(path string, l wire.Limits) error {
	has, err := os.ReadFile(filepath.Join(path, "cgroup.subtree_control"))
	if err != nil {
		return err
	}
	for _, v := range limits(l) {
		if !v.wanted || strings.Contains(" "+strings.TrimSpace(string(has))+" ", " "+v.controller+" ") {
			continue
		}
		if err := write(filepath.Join(path, "cgroup.subtree_control"), "+"+v.controller); err != nil {
			return fmt.Errorf("the controller %s is not to be had in %s: %w", v.controller, path, err)
		}
	}
	return nil
}

func write(path, value string) error {
	fd, err := unix.Open(path, unix.O_WRONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	_, err = unix.Write(fd, []byte(value))
	return err
}

// Remove removes a cgroup and those that the distro made below it, until ctx ends. They are empty: the processes ended with the pid
// namespace. However deep they are nested, and however long their names, it needs two descriptors and no long path.
func Remove(ctx context.Context, path string) error {
	if path == "" {
		return nil
	}
	fd, err := unix.Open(path, openDir, 0)
	if err == unix.ENOENT {
		return nil
	}
	if err == nil {
		fd, err = empty(ctx, fd)
		unix.Close(fd)
	}
	if err == nil {
		err = unix.Rmdir(path)
	}
	if err != nil {
		return &os.PathError{Op: "remove", Path: path, Err: err}
	}
	return nil
}

const openDir = unix.O_RDONLY | unix.O_DIRECTORY | unix.O_NOFOLLOW | unix.O_CLOEXEC

// empty removes the directories in a directory. It returns another descriptor in place of the directory's.
func empty(ctx context.Context, dir int) (same int, err error) {
	names, err := directories(dir)
	for i := 0; err == nil && i < len(names); i++ {
		if err = context.Cause(ctx); err != nil || unix.Unlinkat(dir, names[i], unix.AT_REMOVEDIR) == nil {
			continue
		}
		below, oerr := unix.Openat(dir, names[i], openDir, 0)
		if oerr != nil {
			return dir, oerr
		}
		unix.Close(dir)
		below, err = empty(ctx, below)
		if dir, oerr = unix.Openat(below, "..", openDir, 0); err == nil {
			err = oerr
		}
		unix.Close(below)
		if err == nil {
			err = unix.Unlinkat(dir, names[i], unix.AT_REMOVEDIR)
		}
	}
	return dir, err
}

// directories returns the names of those in a directory.
func directories(dir int) (names []string, err error) {
	fd, err := unix.Openat(dir, ".", openDir, 0)
	if err != nil {
		return nil, err
	}
	f := os.NewFile(uintptr(fd), "cgroup")
	defer f.Close()
	entries, err := f.ReadDir(-1)
	for _, e := range entries {
		if e.IsDir() {
			names = append(names, e.Name())
		}
	}
	return names, err
}

// Kill ends all processes in a cgroup and below it, and returns when there are none; ctx bounds that wait.
func Kill(ctx context.Context, path string) error {
	events, err := os.Open(filepath.Join(path, "cgroup.events"))
	if errors.Is(err, os.ErrNotExist) {
		return nil // the cgroup has gone
	}
	if err != nil {
		return err
	}
	defer events.Close()
	// There is no cgroup.kill before Linux 5.14: what ends with its service is waited for there as well.
	if err := write(filepath.Join(path, "cgroup.kill"), "1"); err != nil && err != unix.ENOENT {
		return fmt.Errorf("end what runs in %s: %w", path, err)
	}
	wake, stop, err := os.Pipe()
	if err != nil {
		return err
	}
	defer wake.Close()
	defer stop.Close()
	defer context.AfterFunc(ctx, func() { stop.Write([]byte{0}) })() //nolint:errcheck // the pipe has room
	for {
		text, err := io.ReadAll(io.NewSectionReader(events, 0, maxEvents))
		if err != nil {
			return err
		}
		if strings.Contains(string(text), "populated 0") {
			return nil
		}
		if ctx.Err() != nil {
			return fmt.Errorf("processes in %s have not ended: %w", path, context.Cause(ctx))
		}
		// The kernel tells of a change since it was read (cgroup-v2.rst, "cgroup.events").
		fds := []unix.PollFd{{Fd: int32(events.Fd()), Events: unix.POLLPRI}, {Fd: int32(wake.Fd()), Events: unix.POLLIN}}
		if _, err := unix.Poll(fds, -1); err != nil && err != unix.EINTR {
			return os.NewSyscallError("poll", err)
		}
	}
}

// maxEvents bounds what is read of cgroup.events.
const maxEvents = 4096
