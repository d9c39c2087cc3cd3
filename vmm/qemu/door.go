package qemu

import (
	"fmt"
	"net"
	"os"

	"golang.org/x/sys/unix"
)

// door is where QEMU connects for a device: its -netdev vhost-user refuses a connection
// that it only inherits ("does not support FD passing"), for such have no address to
// tell that from. The socket lies in a directory that is the user's alone, which QEMU
// reaches by a descriptor, and is removed once QEMU has come through.
type door struct {
	dir      string
	listener *net.UnixListener
}

const doorName = "net"

// newDoor returns the door and, for the child, its directory.
func newDoor() (*door, *os.File, error) {
	dir, err := os.MkdirTemp("", "wsl2-qemu-")
	if err != nil {
		return nil, nil, fmt.Errorf("qemu: %w", err)
	}
	d := &door{dir: dir}
	fd, err := unix.Open(dir, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		d.close()
		return nil, nil, fmt.Errorf("qemu: %w", &os.PathError{Op: "open", Path: dir, Err: err})
	}
	f := os.NewFile(uintptr(fd), dir)
	// By the descriptor: a socket's address has no room for a long TMPDIR.
	at := fmt.Sprintf("/proc/self/fd/%d/%s", fd, doorName)
	if d.listener, err = net.ListenUnix("unix", &net.UnixAddr{Name: at, Net: "unix"}); err != nil {
		f.Close()
		d.close()
		return nil, nil, fmt.Errorf("qemu: listen in %s: %w", dir, err)
	}
	d.listener.SetUnlinkOnClose(false) // the directory goes as a whole
	return d, f, nil
}

// accept waits for QEMU, or for close, and shuts the door.
func (d *door) accept() (*net.UnixConn, error) {
	defer d.close()
	return d.listener.AcceptUnix()
}

// close ends accept. It is harmless if repeated.
func (d *door) close() {
	if d.listener != nil {
		d.listener.Close()
	}
	os.RemoveAll(d.dir)
}
