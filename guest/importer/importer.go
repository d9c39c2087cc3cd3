// Package importer fills a fresh disk from an archive.
//
// It runs in a process and a mount namespace of its own: a hostile archive can
// crash nobody else, the root of the process is the disk itself, and the mount ends
// with the process. PID 1 of the VM talks to it over a stream socket (descriptor 3)
// with the frames of internal/wire: Import comes, ImportReady and then a Reply go back.
package importer

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strconv"
	"time"

	"github.com/mdlayher/vsock"
	"golang.org/x/sys/unix"

	"github.com/wsl2/wsl2/guest/distro"
	"github.com/wsl2/wsl2/guest/kmsg"
	"github.com/wsl2/wsl2/guest/untar"
	"github.com/wsl2/wsl2/internal/wire"
)

// Argv0 is the name under which /init imports; os.Args[1] is the vsock port on
// which it waits for the archive.
const Argv0 = "wsl2-import"

// connectTimeout bounds the wait for the archive's connection.
const connectTimeout = 30 * time.Second

// Run is the main function of an import. It returns the exit status.
func Run(args []string) int {
	log := kmsg.New(Argv0)
	channel := os.NewFile(distro.ChannelFD, "channel")
	m, err := wire.Read(channel)
	im, ok := m.(*wire.Import)
	if err != nil || !ok || len(args) < 2 {
		log.Errorf("expected Import and a port: %v %v %v", m, err, args)
		return 1
	}
	port, err := strconv.ParseUint(args[1], 10, 32)
	if err == nil {
		err = run(im, uint32(port), log, func(m wire.Message) error { return wire.Write(channel, m) })
	}
	reply := &wire.Reply{ID: im.ID}
	if err != nil {
		reply.Code, reply.Text = codeOf(err), err.Error()
	}
	if err := wire.Write(channel, reply); err != nil {
		log.Errorf("%v", err)
		return 1
	}
	return 0
}

// run mounts, receives, unpacks, checks and unmounts.
func run(m *wire.Import, port uint32, log *kmsg.Logger, send func(wire.Message) error) error {
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return fmt.Errorf("make mounts private: %w", err)
	}
	device, err := distro.Device(m.Slot)
	if err == nil {
		err = distro.MountDisk(device, distro.MountPoint)
	}
	if err != nil {
		return diskError{err}
	}
	if err := checkEmpty(distro.MountPoint); err != nil {
		return err
	}
	l, err := vsock.ListenContextID(unix.VMADDR_CID_ANY, port, nil)
	if err != nil {
		return fmt.Errorf("listen on vsock port %d: %w", port, err)
	}
	defer l.Close()
	if err := send(&wire.ImportReady{ID: m.ID, Port: port}); err != nil {
		return err
	}
	c, err := accept(l, m.Archive)
	if err != nil {
		return err
	}
	err = unpack(c, log)
	// Before the Reply: a launcher blocked in writing wakes up.
	c.Close()
	if err != nil {
		return err
	}
	if err := untar.CheckRoot("/"); err != nil {
		return err
	}
	return finish()
}

// errNotEmpty: the disk of a distro must not be unpacked over.
var errNotEmpty = errors.New("the disk is not empty; an import needs a fresh one")

func checkEmpty(dir string) error {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return diskError{err}
	}
	for _, e := range entries {
		if e.Name() != "lost+found" {
			return fmt.Errorf("%w (it holds /%s)", errNotEmpty, e.Name())
		}
	}
	return nil
}

// accept waits for the archive's connection and passes over any other.
func accept(l *vsock.Listener, id wire.SessionID) (*vsock.Conn, error) {
	deadline := time.Now().Add(connectTimeout)
	if err := l.SetDeadline(deadline); err != nil {
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
		case err == nil && ok && hello.Role == wire.RoleArchive && hello.Session == id:
			c.SetDeadline(time.Time{}) //nolint:errcheck // Read tells
			return c.(*vsock.Conn), nil
		case err == nil:
			err = errors.New("not the connection of this import")
		}
		wire.Write(c, &wire.Failed{Code: wire.CodeRefused, Text: err.Error()}) //nolint:errcheck // the peer may be gone
		c.Close()
	}
}

// unpack confines the process to the disk and unpacks there.
func unpack(c *vsock.Conn, log *kmsg.Logger) error {
	if err := unix.Chdir(distro.MountPoint); err != nil {
		return fmt.Errorf("enter the disk: %w", err)
	}
	if err := unix.Chroot("."); err != nil {
		return fmt.Errorf("change root to the disk: %w", err)
	}
	const logged = 10
	n := 0
	err := untar.Unpack(context.Background(), "/", c, func(name, attr string) {
		if n++; n <= logged {
			log.Printf("%s: attribute %s is not supported here and was left out", name, attr)
		}
	})
	if n > logged {
		log.Printf("%d attributes were left out in all", n)
	}
	return err
}

// finish writes the disk back, so that errors are told, and makes it clean.
func finish() error {
	fd, err := unix.Open("/", unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return diskError{fmt.Errorf("open the disk: %w", err)}
	}
	err = unix.Syncfs(fd)
	unix.Close(fd)
	if err != nil {
		return diskError{fmt.Errorf("write back the disk: %w", err)}
	}
	if err := unix.Mount("", "/", "", unix.MS_REMOUNT|unix.MS_RDONLY, ""); err != nil {
		return diskError{fmt.Errorf("make the disk clean: %w", err)}
	}
	return nil
}

type diskError struct{ error }

func (e diskError) Unwrap() error { return e.error }

// codeOf is the one place where an error becomes a code on the wire.
func codeOf(err error) wire.Code {
	switch {
	case errors.Is(err, unix.ENOSPC), errors.Is(err, unix.EDQUOT):
		return wire.CodeNoSpace
	case errors.Is(err, untar.ErrArchive):
		return wire.CodeArchive
	case errors.Is(err, errNotEmpty):
		return wire.CodeRefused
	case errors.Is(err, untar.ErrNoShell):
		return wire.CodeNoShell
	case errors.As(err, new(diskError)), errors.Is(err, unix.EIO), errors.Is(err, unix.EROFS):
		return wire.CodeDisk
	}
	return wire.CodeInternal
}
