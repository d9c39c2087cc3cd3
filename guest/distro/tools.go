package distro

import (
	"errors"
	"fmt"
	"io/fs"
	"os"

	"golang.org/x/sys/unix"

	"github.com/wsl2/wsl2/guest/mounts"
	"github.com/wsl2/wsl2/guest/tools"
)

// openTree takes hold of what is mounted at a path of the VM's root, or of a file
// there, before that is left behind: a mount that can be placed in the distro's root.
func openTree(path string) (int, error) {
	fd, err := mounts.OpenTree(path)
	if err != nil {
		return -1, fmt.Errorf("take hold of %s: %w", path, err)
	}
	return fd, nil
}

// installTools makes /init and the names under which users call it, as WSL does:
// a read-only mount of the VM's file, so that it is always the one that fits, and links,
// where the distro has nothing of that name. It closes init.
func installTools(init int) error {
	defer unix.Close(init)
	err := unix.MountSetattr(init, "", unix.AT_EMPTY_PATH, &unix.MountAttr{Attr_set: unix.MOUNT_ATTR_RDONLY | unix.MOUNT_ATTR_NODEV | unix.MOUNT_ATTR_NOSUID})
	if err != nil {
		return fmt.Errorf("make %s read-only: %w", tools.Init, err)
	}
	err = unix.MoveMount(init, "", unix.AT_FDCWD, tools.Init, unix.MOVE_MOUNT_F_EMPTY_PATH)
	if errors.Is(err, unix.ENOENT) {
		var f *os.File
		if f, err = os.OpenFile(tools.Init, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o755); err == nil {
			f.Close()
			err = unix.MoveMount(init, "", unix.AT_FDCWD, tools.Init, unix.MOVE_MOUNT_F_EMPTY_PATH)
		}
	}
	if err != nil {
		return fmt.Errorf("place %s: %w", tools.Init, err)
	}
	dir := "/usr/bin/"
	if st, err := os.Stat(dir); err != nil || !st.IsDir() {
		dir = "/bin/"
	}
	for _, name := range tools.Names {
		if err := os.Symlink(tools.Init, dir+name); err != nil && !errors.Is(err, fs.ErrExist) {
			return err
		}
	}
	return nil
}
