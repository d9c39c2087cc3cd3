package session

import (
	"fmt"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"

	"github.com/wsl2/wsl2/internal/wire"
)

// ttyGroup owns terminals in every distro that has the group at all: the number
// is fixed in Debian, Fedora, Arch, Alpine and SUSE.
const ttyGroup = 5

// openPTY opens a terminal in the devpts of root, owned by uid, and returns the
// master (non-blocking, on the runtime's poller) and the terminal's descriptor.
// The caller closes both.
func openPTY(root string, uid uint32, size wire.WindowSize) (master *os.File, tty int, err error) {
	path := filepath.Join("/", root, "dev/ptmx")
	fd, err := unix.Open(path, unix.O_RDWR|unix.O_NOCTTY|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, -1, fmt.Errorf("open %s: %w", path, err)
	}
	master = os.NewFile(uintptr(fd), "ptmx")
	defer func() {
		if err != nil {
			master.Close()
		}
	}()
	if err := unix.IoctlSetPointerInt(fd, unix.TIOCSPTLCK, 0); err != nil {
		return nil, -1, fmt.Errorf("unlock the terminal: %w", err)
	}
	// The peer by descriptor, not by name: /dev/pts may be anything to the distro.
	slave, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), unix.TIOCGPTPEER, unix.O_RDWR|unix.O_NOCTTY|unix.O_CLOEXEC)
	if errno != 0 {
		return nil, -1, fmt.Errorf("open the terminal: %w", errno)
	}
	tty = int(slave)
	defer func() {
		if err != nil {
			unix.Close(int(slave))
		}
	}()
	if err := unix.Fchown(tty, int(uid), ttyGroup); err != nil {
		return nil, -1, fmt.Errorf("give the terminal to the user: %w", err)
	}
	if err := unix.Fchmod(tty, 0o620); err != nil { // as login(1): mesg y
		return nil, -1, fmt.Errorf("set the terminal's mode: %w", err)
	}
	// Line editing must know that é is one character; the kernel's default does not.
	t, err := unix.IoctlGetTermios(tty, unix.TCGETS)
	if err != nil {
		return nil, -1, fmt.Errorf("read the terminal's settings: %w", err)
	}
	t.Iflag |= unix.IUTF8
	if err := unix.IoctlSetTermios(tty, unix.TCSETS, t); err != nil {
		return nil, -1, fmt.Errorf("set the terminal's settings: %w", err)
	}
	if err := setSize(fd, size); err != nil {
		return nil, -1, err
	}
	return master, tty, nil
}

func setSize(fd int, size wire.WindowSize) error {
	ws := unix.Winsize{Row: size.Rows, Col: size.Cols}
	if err := unix.IoctlSetWinsize(fd, unix.TIOCSWINSZ, &ws); err != nil {
		return fmt.Errorf("set the terminal's size: %w", err)
	}
	return nil
}

// foreground returns the terminal's foreground process group, or 0.
func foreground(fd int) int {
	pgrp, err := unix.IoctlGetInt(fd, unix.TIOCGPGRP)
	if err != nil || pgrp <= 1 {
		return 0
	}
	return pgrp
}
