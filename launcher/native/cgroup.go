package native

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/wsl2/wsl2/internal/cgroup"
	"github.com/wsl2/wsl2/internal/nsinit"
	"github.com/wsl2/wsl2/internal/wire"
)

// cgroupSuffix makes the link to a distro's cgroup of its socket's name: it is there while the cgroup may
// be, and a later service removes what it finds.
const cgroupSuffix = ".cgroup"

// maxCgroups is how many a distro may have, all but one of earlier starts and not to be removed.
const maxCgroups = 9

// ErrNoCgroup: the user may make none here, from where the service runs. Next is what to do.
type ErrNoCgroup struct{ Reason, Next string }

// inDelegated is what to do where the service is in no cgroup of the user's.
const inDelegated = "where systemd runs: wsl2 --shutdown, then systemd-run --user --scope -p Delegate=yes wsl2"

// controllers is what to do where one is missing.
func controllers() string {
	if os.Geteuid() == 0 {
		return "start the host's kernel with it: /proc/cgroups lists them"
	}
	return "as root: systemctl edit user@.service, add the lines [Service] and Delegate=cpu memory pids, and log in anew"
}

// noController tells of a controller that is not to be had.
func noController(err error) *ErrNoCgroup {
	if errors.Is(err, unix.EBUSY) { // for what is below a cgroup with processes in itself (cgroup-v2.rst, "No Internal Process Constraint")
		return &ErrNoCgroup{err.Error(), inDelegated}
	}
	return &ErrNoCgroup{err.Error(), controllers()}
}

func (e *ErrNoCgroup) Error() string { return e.Reason }

// cgroupOf makes a distro's cgroup; link leads to it. Without limits it does without where none can be made, and is in the service's.
func cgroupOf(ctx context.Context, s Spec) (dir *os.File, link string, err error) {
	dir, link, err = limited(ctx, s.Socket, s.Init, s.Limits)
	if errors.As(err, new(*ErrNoCgroup)) && s.Limits == (wire.Limits{}) {
		return nil, "", nil
	}
	return dir, link, err
}

// limited makes a cgroup with limits and opens the one below it, in which the distro is: there it is
// root, also of files that belong to who runs wsl2 (cgroup-v2.rst, "Delegation"), and nothing it writes there
// raises the limits above. The caller closes dir.
func limited(ctx context.Context, socket, init string, l wire.Limits) (dir *os.File, link string, err error) {
	base, err := delegated()
	if err != nil {
		return nil, "", err
	}
	within, cancel := context.WithTimeout(ctx, emptyTimeout)
	defer cancel()
	var path, at string
	for n := 1; ; n++ {
		name := socket
		if n > 1 {
			name = fmt.Sprintf("%s-%d", socket, n)
		}
		path, at = filepath.Join(base, "wsl2-"+filepath.Base(name)), name+cgroupSuffix
		// Of one that was killed. It is not used again: what is started in a cgroup that cgroup.kill was written in can be killed at
		// once (Linux 6.12 and later).
		err := removeCgroup(within, at, init)
		if err == nil {
			err = remove(within, path, init)
		}
		if err == nil {
			break
		}
		if ctx.Err() != nil {
			return nil, "", context.Cause(ctx)
		}
		if n == maxCgroups {
			return nil, "", &ErrNoCgroup{fmt.Sprintf("those of its last starts cannot be removed: %v", err), "as root: find " + path + " -depth -type d -delete"}
		}
	}
	if err := os.Symlink(path, at); err != nil {
		return nil, "", err
	}
	defer func() {
		if err != nil {
			removeEnded(at, init)
		}
	}()
	if err := cgroup.Enable(base, l); err != nil {
		return nil, "", noController(err)
	}
	inner := filepath.Join(path, "distro")
	for _, p := range []string{path, inner} {
		if err := os.Mkdir(p, 0o755); err != nil {
			return nil, "", &ErrNoCgroup{err.Error(), inDelegated}
		}
		if err := cgroup.Limit(p, l); err != nil {
			return nil, "", noController(err)
		}
		if p == path {
			if err := cgroup.Enable(p, l); err != nil {
				return nil, "", noController(err)
			}
		}
	}
	dir, err = os.OpenFile(inner, unix.O_DIRECTORY, 0)
	return dir, at, err
}

// emptyTimeout is what a killed distro's processes get to end.
const emptyTimeout = 10 * time.Second

// removeCgroup removes the cgroup that a link leads to, if there is one, and ends what is in it: with its service killed a distro may
// still be ending. Where that fails the link stays, for the next Sweep.
func removeCgroup(ctx context.Context, link, init string) error {
	path, err := os.Readlink(link)
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if err == nil {
		err = remove(ctx, path, init)
	}
	if err == nil {
		err = os.Remove(link)
	}
	return err
}

// removeEnded removes it after the distro's end.
func removeEnded(link, init string) {
	ctx, cancel := context.WithTimeout(context.Background(), emptyTimeout)
	defer cancel()
	removeCgroup(ctx, link, init) //nolint:errcheck // the link stays
}

// remove removes a cgroup with all in it, if it is there.
func remove(ctx context.Context, path, init string) error {
	if err := cgroup.Kill(ctx, path); err != nil {
		return err
	}
	err := cgroup.Remove(ctx, path)
	if errors.Is(err, os.ErrPermission) {
		err = removeAs(ctx, path, init)
	}
	return err
}

// removeAs removes a cgroup in which there are others that belong to users of the distro: only root of their namespace
// may delete what is in those.
func removeAs(ctx context.Context, path, init string) error {
	user, err := thisUser()
	if err != nil {
		return err
	}
	cmd, err := command(init, nsinit.RemoveCgroup, path)
	if err != nil {
		return err
	}
	gate, theirs, err := pair("gate")
	if err != nil {
		return err
	}
	defer gate.Close()
	cmd.ExtraFiles = []*os.File{nsinit.GateFD - nsinit.ChannelFD: theirs}
	cmd.SysProcAttr.Pdeathsig = 0 // which a thread's end sends, and no thread is kept for this; the gate tells
	err = cmd.Start()
	theirs.Close()
	if err != nil {
		return err
	}
	defer context.AfterFunc(ctx, func() { cmd.Process.Kill() })()
	if err = user.all().write(cmd.Process.Pid); err == nil {
		err = pass(gate, cmd.Process.Pid, Spec{})
	}
	if err == nil {
		_, err = answer(gate)
	}
	gate.Close()
	return errors.Join(err, cmd.Wait())
}

// Sweep removes what a distro has left that was killed with its service: where it listened, and its cgroup.
func Sweep(socket, init string) {
	if strings.HasSuffix(socket, cgroupSuffix) {
		removeEnded(socket, init)
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
		return "", &ErrNoCgroup{cgroup.Root + " is no cgroup2", "mount it there: systemd does with systemd.unified_cgroup_hierarchy=1 on the kernel's command line"}
	}
	text, err := os.ReadFile("/proc/self/cgroup")
	if err != nil {
		return "", err
	}
	own, ok := ownCgroup(string(text))
	if !ok {
		return "", &ErrNoCgroup{"the service is in no cgroup that can be seen from here", inDelegated}
	}
	path := cgroup.Root
	for _, name := range append([]string{""}, strings.Split(own, "/")...) {
		path = filepath.Join(path, name)
		if unix.Access(path, unix.W_OK) == nil && unix.Access(filepath.Join(path, "cgroup.procs"), unix.W_OK) == nil {
			return path, nil
		}
	}
	return "", &ErrNoCgroup{"no cgroup is delegated to this user where the service runs, " + own, inDelegated}
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
