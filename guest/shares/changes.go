package shares

import (
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"runtime"

	"golang.org/x/sys/unix"

	"github.com/wsl2/wsl2/internal/p9/replay"
	"github.com/wsl2/wsl2/internal/wire"
)

// Changes takes the connection over which the server of a mounted share tells what
// the host changes there (wire.RoleShareChanges), and replays it until the connection ends.
func (m *Mounter) Changes(c net.Conn, id wire.SessionID) {
	go func() {
		defer c.Close()
		// The thread is another user (replay.UID) from here on, and ends with the goroutine.
		runtime.LockOSThread()
		if err := m.replay(c, id); err != nil {
			m.cfg.Logf("changes of the host's: %v", err)
		}
	}()
}

func (m *Mounter) replay(c net.Conn, id wire.SessionID) error {
	r := m.replayer(id)
	if r == nil { // mounted anew meanwhile
		return nil
	}
	if err := become(replay.UID); err != nil {
		return err
	}
	for {
		message, err := wire.Read(c)
		if errors.Is(err, io.EOF) || errors.Is(err, unix.ECONNRESET) {
			return nil
		}
		if err != nil {
			return err
		}
		change, ok := message.(*wire.ShareChange)
		if !ok {
			return fmt.Errorf("%v instead of a change", message.Type())
		}
		r.do(change) //nolint:errcheck // what has changed once more meanwhile cannot be made
		if err := wire.Write(c, &wire.ShareRaised{}); err != nil {
			return nil
		}
	}
}

// become makes the thread another user, for file systems, with all that root may do there.
func become(uid int) error {
	unix.SetfsuidRetUid(uid) //nolint:errcheck // it does not tell; the next call does
	if now, err := unix.SetfsuidRetUid(-1); err != nil || now != uid {
		return fmt.Errorf("setfsuid: %d, %v", now, err)
	}
	// The kernel has taken the capabilities for files away with root's number.
	header := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var data [2]unix.CapUserData
	if err := unix.Capget(&header, &data[0]); err != nil {
		return fmt.Errorf("capget: %w", err)
	}
	for i := range data {
		data[i].Effective = data[i].Permitted
	}
	if err := unix.Capset(&header, &data[0]); err != nil {
		return fmt.Errorf("capset: %w", err)
	}
	return nil
}

// replayer replays changes in one mount.
type replayer struct {
	guest string
	dev   uint64 // of the mount
}

// replayer returns that of a share, which it waits for if it is being mounted, and for no other; nil if there is none.
func (m *Mounter) replayer(id wire.SessionID) *replayer {
	<-m.set
	m.mu.Lock()
	t := m.asked[id]
	m.mu.Unlock()
	if t == nil {
		return nil
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.session != id || t.dev == 0 {
		return nil
	}
	return &replayer{t.share.Guest, t.dev}
}

// do makes a change that the host has made, through the mount, so that the kernel tells of
// it. The server leaves everything as it is.
func (r *replayer) do(c *wire.ShareChange) error {
	if replay.Kind(c.Kind) == replay.Forget {
		return forget()
	}
	root, err := r.root()
	if err != nil {
		return err
	}
	defer unix.Close(root)
	dir, err := below(root, c.Dir)
	if err != nil {
		return err
	}
	defer unix.Close(dir)
	switch replay.Kind(c.Kind) {
	case replay.Created:
		ask(dir, c.Name)
		return create(dir, c.Name, c.Mode)
	case replay.Removed:
		flags := 0
		if c.Mode&unix.S_IFMT == unix.S_IFDIR {
			flags = unix.AT_REMOVEDIR
		}
		return found(dir, c, func() error { return unix.Unlinkat(dir, c.Name, flags) })
	case replay.Renamed:
		to, err := below(root, c.NewDir)
		if err != nil {
			return err
		}
		defer unix.Close(to)
		ask(to, c.NewName)
		return found(dir, c, func() error { return unix.Renameat(dir, c.Name, to, c.NewName) })
	case replay.Modified: // of the modification time alone the kernel says that the file was modified
		return touch(dir, c.Name, unix.UTIME_OMIT)
	case replay.Attributes:
		return touch(dir, c.Name, 0)
	case replay.Written:
		ask(dir, c.Name) // of what was written to a mapping nothing else tells
		return closeWritten(dir, c.Name)
	}
	return unix.EINVAL
}

// forget has the kernel forget the names and files that nobody uses, of all file systems: there is nothing for one.
func forget() error {
	f, err := os.OpenFile("/proc/sys/vm/drop_caches", os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	_, err = f.WriteString("2")
	return err
}

// root opens the root of the mount, as a mount that can be written whatever that at its place is.
// What was mounted over it or in its place is not what the server tells of, and would be changed.
func (r *replayer) root() (int, error) {
	root, err := unix.OpenTree(unix.AT_FDCWD, r.guest, unix.OPEN_TREE_CLONE|unix.OPEN_TREE_CLOEXEC)
	if err != nil {
		return -1, err
	}
	var st unix.Stat_t
	if err = unix.Fstat(root, &st); err == nil && st.Dev != r.dev {
		err = unix.ESTALE
	}
	if err == nil {
		err = unix.MountSetattr(root, "", unix.AT_EMPTY_PATH, &unix.MountAttr{Attr_clr: unix.MOUNT_ATTR_RDONLY})
	}
	if err != nil {
		unix.Close(root)
		return -1, err
	}
	return root, nil
}

// below opens a directory of the mount.
func below(root int, path string) (int, error) {
	return unix.Openat2(root, path, &unix.OpenHow{Flags: unix.O_PATH | unix.O_DIRECTORY | unix.O_CLOEXEC,
		Resolve: unix.RESOLVE_BENEATH | unix.RESOLVE_NO_SYMLINKS | unix.RESOLVE_NO_XDEV})
}

// ask has the kernel ask for a name that it may have looked up: what the change has made is not there yet to
// the server (fusefs).
func ask(dir int, name string) {
	var st unix.Statx_t
	unix.Statx(dir, name, unix.AT_SYMLINK_NOFOLLOW|unix.AT_STATX_FORCE_SYNC, unix.STATX_BASIC_STATS, &st) //nolint:errcheck // ENOENT, if all is well
}

// found makes a change of what was there before it, also where the kernel has kept that nothing was: what makes a file
// has it ask.
func found(dir int, c *wire.ShareChange, change func() error) error {
	err := change()
	if err == unix.ENOENT {
		create(dir, c.Name, c.Mode) //nolint:errcheck // EEXIST, if all is well
		err = change()
	}
	return err
}

func create(dir int, name string, mode uint32) error {
	switch kind := mode & unix.S_IFMT; kind {
	case unix.S_IFDIR:
		return unix.Mkdirat(dir, name, 0o755)
	case unix.S_IFLNK:
		return unix.Symlinkat("-", dir, name)
	default:
		return unix.Mknodat(dir, name, kind|0o600, 0)
	}
}

func touch(dir int, name string, atime int64) error {
	return unix.UtimesNanoAt(dir, name, []unix.Timespec{{Nsec: atime}, {}}, unix.AT_SYMLINK_NOFOLLOW)
}

// closeWritten opens a file for writing and closes it. Not one that can be run: who starts
// it at that moment would be told that it is busy.
func closeWritten(dir int, name string) error {
	fd, err := unix.Openat(dir, name, unix.O_PATH|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return err
	}
	if st.Mode&unix.S_IFMT != unix.S_IFREG || st.Mode&0o111 != 0 {
		return unix.EACCES
	}
	file, err := unix.Open(fmt.Sprintf("/proc/self/fd/%d", fd), unix.O_WRONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return err
	}
	return unix.Close(file)
}
