package pid1

import (
	"fmt"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"
)

const cgroupRoot = "/sys/fs/cgroup"

// maxCgroupName leaves room for the prefix in NAME_MAX (255).
const maxCgroupName = 240

// makeCgroup makes a distro's cgroup and opens it. The caller closes fd.
func makeCgroup(name string) (path string, fd int, err error) {
	path = filepath.Join(cgroupRoot, "distro-"+name[:min(len(name), maxCgroupName)])
	if err := unix.Mkdir(path, 0o755); err != nil && err != unix.EEXIST {
		return "", -1, fmt.Errorf("make %s: %w", path, err)
	}
	fd, err = unix.Open(path, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return "", -1, fmt.Errorf("open %s: %w", path, err)
	}
	return path, fd, nil
}

// removeCgroup removes a cgroup and those that the distro made below it. They
// are empty: the processes ended with the pid namespace. What remains for any
// reason is used again at the distro's next start.
func removeCgroup(path string) {
	if path == "" {
		return
	}
	entries, err := os.ReadDir(path)
	if err != nil {
		return
	}
	for _, e := range entries {
		if e.IsDir() {
			removeCgroup(filepath.Join(path, e.Name()))
		}
	}
	unix.Rmdir(path) //nolint:errcheck // see above
}
