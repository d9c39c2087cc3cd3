package pid1

import (
	"fmt"
	"hash/fnv"
	"os"
	"path/filepath"
	"strconv"

	"golang.org/x/sys/unix"

	"github.com/wsl2/wsl2/guest/mounts"
	"github.com/wsl2/wsl2/internal/wire"
)

const cgroupRoot = "/sys/fs/cgroup"

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

// limit sets what a distro may use, or takes away what an earlier start of it left.
// A limit that cannot be set is an error: whoever asks for one relies on it.
func limit(path string, l wire.Limits) error {
	orMax := func(n uint64) string {
		if n == 0 {
			return "max"
		}
		return strconv.FormatUint(n, 10)
	}
	const period = 100_000 // µs; cgroup-v2.rst, "cpu.max"
	for _, v := range []struct {
		file, value string
		wanted      bool
	}{
		{"memory.max", orMax(l.MemoryBytes), l.MemoryBytes != 0},
		{"cpu.max", orMax(uint64(l.MilliCPUs)*period/1000) + " " + strconv.Itoa(period), l.MilliCPUs != 0},
		{"pids.max", orMax(uint64(l.PIDs)), l.PIDs != 0},
	} {
		if err := (mounts.Value{Path: filepath.Join(path, v.file), Value: v.value}).Make(); v.wanted && (err != nil || path == "") {
			return fmt.Errorf("limit the distro (%s): %w", v.file, err)
		}
	}
	return nil
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
