package native

import (
	"context"
	"os"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/wsl2/wsl2/internal/cgroup"
	"github.com/wsl2/wsl2/internal/wire"
)

// cgroupSuffix makes the link to a distro's cgroup of its socket's name: it is there while the cgroup may
// be, and a later service removes what it finds.
const cgroupSuffix = ".cgroup"

// ErrNoCgroup: the user may make none here, from where the service runs.
type ErrNoCgroup struct{ Reason string }

func (e *ErrNoCgroup) Error() string { return e.Reason }

// limited makes a cgroup with limits and opens the one below it, in which the distro is: there it is
// root, also of files that belong to who runs wsl2 (cgroup-v2.rst, "Delegation"), and nothing it writes there
// raises the limits above. The caller closes dir.
func limited(socket string, l wire.Limits) (dir *os.File, err error) {
	base, err := delegated()
	if err != nil {
		return nil, err
	}
	path := filepath.Join(base, "wsl2-"+filepath.Base(socket))
	inner := filepath.Join(path, "distro")
	os.Remove(socket + cgroupSuffix) // of one that was killed
	if err := os.Symlink(path, socket+cgroupSuffix); err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			removeCgroup(socket)
		}
	}()
	if err := cgroup.Enable(base, l); err != nil {
		return nil, &ErrNoCgroup{err.Error()}
	}
	for _, p := range []string{path, inner} {
		if err := os.Mkdir(p, 0o755); err != nil && !os.IsExist(err) {
			return nil, err
		}
		if err := cgroup.Limit(p, l); err != nil {
			return nil, err
		}
		if p == path {
			if err := cgroup.Enable(p, l); err != nil {
				return nil, err
			}
		}
	}
	return os.OpenFile(inner, unix.O_DIRECTORY, 0)
}

// emptyTimeout is what a killed distro's processes get to end.
const emptyTimeout = 10 * time.Second

// removeCgroup removes the cgroup of the distro that listened on a socket, if it had one, and ends what is in it: with
// its service killed a distro may still be ending. Where that fails the link stays, for the next Sweep.
func removeCgroup(socket string) {
	path, err := os.Readlink(socket + cgroupSuffix)
	if err != nil {
		return
	}
	ctx, cancel := context.WithTimeout(context.Background(), emptyTimeout)
	defer cancel()
	if cgroup.Kill(ctx, path) != nil || cgroup.Remove(path) != nil {
		return
	}
	os.Remove(socket + cgroupSuffix)
}

// Sweep removes what a distro has left that was killed with its service: where it listened, and its cgroup.
func Sweep(socket string) {
	if s, ok := strings.CutSuffix(socket, cgroupSuffix); ok {
		removeCgroup(s)
		return
	}
	os.Remove(socket)
}

// delegated returns the highest cgroup above this process in which the user may make others and move
// processes there: for root that of the host, for users what systemd delegates to them (user@UID.service), if the
// service is in it.
func delegated() (string, error) {
	var fs unix.Statfs_t
	if err := unix.Statfs(cgroup.Root, &fs); err != nil || fs.Type != unix.CGROUP2_SUPER_MAGIC {
		return "", &ErrNoCgroup{cgroup.Root + " is no cgroup2"}
	}
	text, err := os.ReadFile("/proc/self/cgroup")
	if err != nil {
		return "", err
	}
	own, ok := ownCgroup(string(text))
	if !ok {
		return "", &ErrNoCgroup{"the service is in no cgroup that can be seen from here"}
	}
	path := cgroup.Root
	for _, name := range append([]string{""}, strings.Split(own, "/")...) {
		path = filepath.Join(path, name)
		if unix.Access(path, unix.W_OK) == nil && unix.Access(filepath.Join(path, "cgroup.procs"), unix.W_OK) == nil {
			return path, nil
		}
	}
	return "", &ErrNoCgroup{"no cgroup is delegated to this user where the service runs, " + own}
}

// ownCgroup finds the path in cgroup2 in the text of /proc/self/cgroup (cgroups(7)).
func ownCgroup(text string) (path string, ok bool) {
	for line := range strings.Lines(text) {
		if path, ok := strings.CutPrefix(line, "0::"); ok {
			path = strings.TrimSuffix(path, "\n")
			return path, strings.HasPrefix(path, "/") && path != "/.." && !strings.HasPrefix(path, "/../")
		}
	}
	return "", false
}
