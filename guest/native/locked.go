package native

import (
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/wsl2/wsl2/guest/distro"
	"github.com/wsl2/wsl2/guest/mounts"
	"github.com/wsl2/wsl2/internal/nsinit"
)

// This file makes the mounts that the root of a distro must not change. In the distro's namespace they are copies, of
// which the kernel locks what they forbid and what they cover (mount_namespaces(7), "Restrictions on mount namespaces").

const cgroups = "/sys/fs/cgroup"

var (
	hostSys = mounts.Bind{From: "/sys", Target: "/sys", Dir: true,
		Attributes: unix.MOUNT_ATTR_RDONLY | unix.MOUNT_ATTR_NOSUID | unix.MOUNT_ATTR_NODEV | unix.MOUNT_ATTR_NOEXEC,
		Why:        "the network's, hence the host's: a new one is not allowed"}
	noCgroups  = mounts.Mount{FSType: "tmpfs", Target: cgroups, Flags: mounts.NoSuidDevExec, Data: "mode=755,size=4k", Why: "a file system is not mounted onto itself, and the host's cgroup2 is there"}
	ownCgroups = mounts.Mount{FSType: "cgroup2", Target: cgroups, Flags: mounts.NoSuidDevExec, Data: "nsdelegate", Optional: true, Why: "as seen from its cgroup namespace"}
)

// lockInit mounts /init on itself, read-only, and returns a path to it there, for as long as this process runs. What is
// executed by that path is no file of a mount that may be written to: where /init belongs to a user of the distro, its root
// is the file's master, and what is /init at the next start would be his, in the name of the host's user.
func lockInit() (path string, err error) {
	const self = "/proc/self/exe"
	fd, err := mounts.OpenTree(self)
	if err == nil {
		err = unix.MountSetattr(fd, "", unix.AT_EMPTY_PATH, &unix.MountAttr{Attr_set: unix.MOUNT_ATTR_RDONLY | unix.MOUNT_ATTR_NOSUID | unix.MOUNT_ATTR_NODEV})
	}
	if err == nil {
		err = unix.MoveMount(fd, "", unix.AT_FDCWD, self, unix.MOVE_MOUNT_F_EMPTY_PATH|unix.MOVE_MOUNT_T_SYMLINKS)
	}
	if err != nil {
		return "", fmt.Errorf("make /init read-only: %w", err)
	}
	return "/proc/self/fd/" + strconv.Itoa(fd), nil
}

// take takes hold of the root, of init and of the shares, while all that the user can reach can be reached, and covers the root with
// an empty directory. Shares come as trees, or by their paths; one that cannot be had is nil.
func take(root, init, name string, shares []string, trees []int) (taken []mounts.Item, err error) {
	staged := []mounts.Tree{{Target: distro.StagedRoot}, {Target: distro.StagedInit, File: true}}
	for i, path := range []string{root, init} {
		if staged[i].FD, err = mounts.OpenTree(path); err != nil {
			return nil, fmt.Errorf("open %s: %w", path, err)
		}
		taken = append(taken, staged[i])
	}
	for i, share := range shares {
		dir, readOnly := strings.CutPrefix(share, nsinit.ReadOnly)
		tree := mounts.Tree{Target: strconv.Itoa(i), Attributes: unix.MOUNT_ATTR_NOSUID | unix.MOUNT_ATTR_NODEV}
		if readOnly {
			tree.Attributes |= unix.MOUNT_ATTR_RDONLY
		}
		if len(trees) > 0 {
			tree.FD = trees[i]
		} else if tree.FD, err = mounts.OpenTree(dir); err != nil {
			fmt.Fprintf(os.Stderr, "%s: share %s: %v\n", name, dir, err)
			taken = append(taken, nil)
			continue
		}
		taken = append(taken, tree)
	}
	// Who makes it may be nobody in this namespace.
	return taken, mounts.Mount{FSType: "tmpfs", Target: root, Flags: mounts.NoSuidDevExec, Data: "mode=755,uid=0,gid=0"}.Make()
}

// place mounts in the working directory what take has taken, and covers what /sys has of the host's. It returns where the
// shares are, "" for one that is not.
func place(name string, taken []mounts.Item) (places []string, err error) {
	staged, shares := taken[:2], taken[2:]
	if err := mounts.All(staged); err != nil {
		return nil, err
	}
	for i, share := range shares {
		places = append(places, "")
		if share == nil {
			continue
		}
		if err := share.Make(); err != nil {
			fmt.Fprintf(os.Stderr, "%s: share %d: %v\n", name, i, err)
			continue
		}
		places[i] = strconv.Itoa(i)
	}
	if err := hostSys.Make(); err != nil {
		return nil, err
	}
	if _, err := os.Stat(cgroups); errors.Is(err, os.ErrNotExist) { // a kernel without
		return places, nil
	}
	if err := noCgroups.Make(); err != nil {
		return nil, err
	}
	// The launcher has this process start where the distro's limits are (package cgroup).
	if err := unix.Unshare(unix.CLONE_NEWCGROUP); err != nil {
		return nil, fmt.Errorf("make a namespace of cgroups: %w", err)
	}
	if err := ownCgroups.Make(); err != nil {
		fmt.Fprintf(os.Stderr, "%s: %v\n", name, err)
	}
	return places, nil
}
