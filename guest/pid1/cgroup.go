package pid1

import (
	"fmt"
	"hash/fnv"
	"path/filepath"

	"golang.org/x/sys/unix"

	"github.com/wsl2/wsl2/internal/cgroup"
)

const cgroupRoot = cgroup.Root

// cgroupName is a distro's alone: of a long name, which the prefix would take beyond
// NAME_MAX (255), the end is a hash of all.
func cgroupName(distro string) string {
	const longest = 220
	if len(distro) > longest {
		h := fnv.New64a()
		h.Write([]byte(distro))
		distro = fmt.Sprintf("%s-%016x", distro[:longest], h.Sum64())
	}
	return "distro-" + distro
}

// makeCgroup makes a distro's cgroup and opens it. The caller closes fd.
func makeCgroup(name string) (path string, fd int, err error) {
	path = filepath.Join(cgroupRoot, cgroupName(name))
	if err := unix.Mkdir(path, 0o755); err != nil && err != unix.EEXIST {
		return "", -1, fmt.Errorf("make %s: %w", path, err)
	}
	fd, err = unix.Open(path, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return "", -1, fmt.Errorf("open %s: %w", path, err)
	}
	return path, fd, nil
}
