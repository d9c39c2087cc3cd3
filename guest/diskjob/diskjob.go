// Package diskjob is what the processes share that work on a disk outside of any
// distro: imports, exports, maintenance.
//
// Each is a process of /init with a mount namespace of its own: what is on the
// disk can crash nobody else, and the mount ends with the process. PID 1 of the VM
// talks to it over a stream socket (descriptor 3) with the frames of internal/wire: the
// request comes; ImportReady, where it needs an archive's connection, and a Reply go back.
package diskjob

import (
	"errors"
	"fmt"
	"os"
	"strconv"
	"time"

	"golang.org/x/sys/unix"

	"github.com/wsl2/wsl2/guest/distro"
	"github.com/wsl2/wsl2/guest/kmsg"
	"github.com/wsl2/wsl2/guest/port"
	"github.com/wsl2/wsl2/guest/untar"
	"github.com/wsl2/wsl2/internal/nsinit"
	"github.com/wsl2/wsl2/internal/wire"
)

// connectTimeout bounds the wait for the archive's connection.
const connectTimeout = 30 * time.Second

// Job is one piece of work. It is used by one goroutine.
type Job struct {
	Log *kmsg.Logger

	port    uint32
	channel *os.File
}

// Run is the main function of such a process: args[1] is the port (package port) on which
// it may listen. It hands the request of type M, whose ID is id's, to work, whose text goes
// into the Reply whatever the error, and returns the exit status.
func Run[M wire.Message](args []string, id func(M) uint32, work func(*Job, M) (text string, err error)) int {
	j := &Job{Log: kmsg.New(args[0]), channel: os.NewFile(distro.ChannelFD, "channel")}
	m, err := wire.Read(j.channel)
	request, ok := m.(M)
	if err != nil || !ok || len(args) < 2 {
		j.Log.Errorf("unexpected request: %v %v %v", m, err, args)
		return 1
	}
	n, err := strconv.ParseUint(args[1], 10, 32)
	reply := &wire.Reply{ID: id(request)}
	if err == nil {
		if j.port = uint32(n); j.port == nsinit.Port {
			j.Log = kmsg.ToStderr(args[0])
			go j.watch()
		}
		reply.Text, err = work(j, request)
	}
	if err != nil {
		reply.Code = codeOf(err)
		if reply.Text != "" {
			reply.Text = err.Error() + ":\n" + reply.Text
		} else {
			reply.Text = err.Error()
		}
	}
	if err := wire.Write(j.channel, reply); err != nil {
		j.Log.Errorf("%v", err)
		return 1
	}
	return 0
}

// watch ends the process with the launcher, where no VM's end does.
func (j *Job) watch() {
	wire.Read(j.channel) //nolint:errcheck // nothing but the end comes
	os.Exit(1)
}

// Private keeps the process's mounts to itself, and lets go of what others mount.
func Private() error {
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return fmt.Errorf("make mounts private: %w", err)
	}
	// EINVAL, ENOENT: no distro has run yet.
	if err := unix.Unmount(distro.Shared, unix.MNT_DETACH); err != nil && err != unix.EINVAL && err != unix.ENOENT {
		return fmt.Errorf("detach %s: %w", distro.Shared, err)
	}
	return nil
}

// Mount mounts the disk of a slot with mount(2)'s flags, for this process only, and
// returns where.
func Mount(slot int32, flags uintptr) (dir string, err error) {
	if slot == wire.DirSlot {
		return ".", nil
	}
	if err := Private(); err != nil {
		return "", err
	}
	device, err := distro.Device(slot)
	if err == nil {
		err = distro.MountDisk(device, distro.MountPoint, flags)
	}
	if err != nil {
		return "", DiskError{err}
	}
	return distro.MountPoint, nil
}

// Enter confines the process to the disk mounted on dir.
func Enter(dir string) error {
	if dir == "." {
		return distro.Pivot(dir)
	}
	if err := unix.Chdir(dir); err != nil {
		return fmt.Errorf("enter the disk: %w", err)
	}
	if err := unix.Chroot("."); err != nil {
		return fmt.Errorf("change root to the disk: %w", err)
	}
	return nil
}

// Finish writes the file system of dir back, so that errors are told, and makes
// it clean.
func Finish(dir string) error {
	fd, err := unix.Open(dir, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return DiskError{fmt.Errorf("open the disk: %w", err)}
	}
	err = unix.Syncfs(fd)
	unix.Close(fd)
	if err != nil {
		return DiskError{fmt.Errorf("write back the disk: %w", err)}
	}
	// Where it is a directory of the host, the file system is not ours to close.
	if err := unix.Mount("", dir, "", unix.MS_REMOUNT|unix.MS_RDONLY, ""); err != nil && err != unix.EPERM {
		return DiskError{fmt.Errorf("make the disk clean: %w", err)}
	}
	return nil
}

// Accept says ImportReady for the request and waits for its archive's connection,
// passing over any other. The caller closes it.
func (j *Job) Accept(request uint32, archive wire.SessionID) (port.Conn, error) {
	l, err := port.Listen(j.port)
	if err != nil {
		return nil, err
	}
	defer l.Close()
	if err := wire.Write(j.channel, &wire.ImportReady{ID: request, Port: j.port}); err != nil {
		return nil, err
	}
	deadline := time.Now().Add(connectTimeout)
	if err := l.(interface{ SetDeadline(time.Time) error }).SetDeadline(deadline); err != nil {
		return nil, err
	}
	for {
		c, err := l.Accept()
		if err != nil {
			return nil, fmt.Errorf("the archive's connection did not come within %v: %w", connectTimeout, err)
		}
		c.SetDeadline(deadline) //nolint:errcheck // Read tells
		m, err := wire.Read(c)
		hello, ok := m.(*wire.Hello)
		switch {
		case err == nil && ok && hello.Role == wire.RoleArchive && hello.Session == archive:
			c.SetDeadline(time.Time{}) //nolint:errcheck // Read tells
			return c.(port.Conn), nil
		case err == nil:
			err = errors.New("not the connection of this request")
		}
		wire.Write(c, &wire.Failed{Code: wire.CodeRefused, Text: err.Error()}) //nolint:errcheck // the peer may be gone
		c.Close()
	}
}

// DiskError marks errors that are the disk's fault.
type DiskError struct{ Err error }

func (e DiskError) Error() string { return e.Err.Error() }

// Unwrap returns the cause.
func (e DiskError) Unwrap() error { return e.Err }

// ErrRefused marks requests that make no sense for this disk.
var ErrRefused = errors.New("refused")

// codeOf is the one place where an error becomes a code on the wire.
func codeOf(err error) wire.Code {
	switch {
	case errors.Is(err, unix.ENOSPC), errors.Is(err, unix.EDQUOT):
		return wire.CodeNoSpace
	case errors.Is(err, untar.ErrArchive):
		return wire.CodeArchive
	case errors.Is(err, ErrRefused):
		return wire.CodeRefused
	case errors.Is(err, untar.ErrNoShell):
		return wire.CodeNoShell
	case errors.As(err, new(DiskError)), errors.Is(err, unix.EIO), errors.Is(err, unix.EROFS):
		return wire.CodeDisk
	}
	return wire.CodeInternal
}
