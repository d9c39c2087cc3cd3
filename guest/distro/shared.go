package distro

import (
	"fmt"
	"os"

	"golang.org/x/sys/unix"
)

// Shared is the VM's tmpfs that every distro sees, as in WSL. It is one group of
// peers: what anybody mounts below it is there for all.
const Shared = "/mnt/wsl"

// SharedDev holds the nodes of disks that are attached without being mounted.
const SharedDev = Shared + "/dev"

// moveShared takes this namespace's copy of Shared along into the new root. It is
// moved, not bound anew: nothing that is mounted meanwhile is missed.
func moveShared() error {
	root, err := os.OpenRoot(MountPoint) // what links there may lead out
	if err != nil {
		return err
	}
	defer root.Close()
	if err := root.MkdirAll(Shared[1:], 0o755); err != nil {
		return err
	}
	to, err := root.Open(Shared[1:])
	if err != nil {
		return err
	}
	defer to.Close()
	if err := unix.MoveMount(unix.AT_FDCWD, Shared, int(to.Fd()), "", unix.MOVE_MOUNT_T_EMPTY_PATH); err != nil {
		return fmt.Errorf("move %s: %w", Shared, err)
	}
	return nil
}
