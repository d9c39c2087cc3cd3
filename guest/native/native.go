// Package native starts the roles of /init without a VM, in namespaces of the host's own kernel:
// version 1 of a distro. Package nsinit says what it is started with.
package native

import (
	"context"
	"errors"
	"fmt"
	"os"
	"runtime"
	"strconv"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/wsl2/wsl2/guest/distro"
	"github.com/wsl2/wsl2/guest/exporter"
	"github.com/wsl2/wsl2/guest/importer"
	"github.com/wsl2/wsl2/guest/mounts"
	"github.com/wsl2/wsl2/guest/remover"
	"github.com/wsl2/wsl2/internal/cgroup"
	"github.com/wsl2/wsl2/internal/nsinit"
	"github.com/wsl2/wsl2/internal/wire"
)

// roles are the names under which /init has them.
var roles = map[string]string{
	nsinit.Distro: distro.Argv0,
	nsinit.Import: importer.Argv0,
	nsinit.Export: exporter.Argv0,
	nsinit.Remove: remover.Argv0,
}

// namespaces are the distro's own, each owned by its root. The network is the host's.
const namespaces = unix.CLONE_NEWUSER | unix.CLONE_NEWNS | unix.CLONE_NEWPID | unix.CLONE_NEWUTS | unix.CLONE_NEWIPC | unix.CLONE_NEWCGROUP

// Run makes the mounts, starts the role in the namespaces and says at the gate how that went. It returns the exit
// status.
func Run(args []string) int {
	remove := len(args) == 3 && args[1] == nsinit.RemoveCgroup
	if !remove && (len(args) < 4 || roles[args[1]] == "") {
		fmt.Fprintf(os.Stderr, "`%s` is run by the service of wsl2, not by hand\n", nsinit.Argv0)
		return 1 // what the descriptors are, nobody knows
	}
	// Identity, capabilities and the filter are a thread's; the one that starts the role decides.
	runtime.LockOSThread()
	var pid int
	var err error
	if remove {
		err = removeCgroup(args[2])
	} else {
		pid, err = enter(args)
	}
	reply := &wire.Reply{Text: strconv.Itoa(pid)}
	if err != nil {
		reply = &wire.Reply{Code: wire.CodeInternal, Text: err.Error()}
	}
	if errors.As(err, new(noNamespaces)) {
		reply.Code = wire.CodeRefused
	}
	if werr := wire.Write(os.NewFile(nsinit.GateFD, "gate"), reply); errors.Join(err, werr) != nil {
		return 1
	}
	return 0
}

func removeCgroup(path string) error {
	if _, err := pass(0); err != nil {
		return err
	}
	return cgroup.Remove(context.Background(), path)
}

func enter(args []string) (pid int, err error) {
	role, root, name, shares := args[1], args[2], args[3], args[4:]
	trees, err := pass(len(shares))
	if err != nil {
		return 0, err
	}
	// Nothing that is mounted here is seen outside, nor the other way round.
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return 0, fmt.Errorf("make the mounts private: %w", err)
	}
	init, err := lockInit()
	if err != nil {
		return 0, err
	}
	isDistro := role == nsinit.Distro
	var taken []mounts.Item
	if isDistro {
		if taken, err = take(root, init, name, shares, trees); err != nil {
			return 0, err
		}
	}
	if err := unix.Chdir(root); err != nil {
		return 0, fmt.Errorf("enter the root: %w", err)
	}
	if err := becomeRoot(); err != nil {
		return 0, err
	}
	argv := []string{roles[role], strconv.Itoa(nsinit.Port), name}
	if isDistro {
		places, err := place(name, taken)
		if err != nil {
			return 0, err
		}
		argv = append(argv, places...)
	} else if err := unix.Prctl(unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0); err != nil { // in a distro su and sudo have to work
		return 0, fmt.Errorf("give up new privileges: %w", err)
	}
	if err := confine(); err != nil {
		return 0, err
	}
	return start(init, argv)
}

// start starts init as the role in the working directory, as the root of all its namespaces and as a child of the launcher's.
func start(init string, argv []string) (pid int, err error) {
	uids, err := same("/proc/self/uid_map")
	if err != nil {
		return 0, err
	}
	gids, err := same("/proc/self/gid_map")
	if err != nil {
		return 0, err
	}
	pid, err = syscall.ForkExec(init, argv, &syscall.ProcAttr{
		Env:   []string{"PATH=/usr/sbin:/usr/bin:/sbin:/bin"},
		Files: []uintptr{0, 1, 2, nsinit.ChannelFD, nsinit.ListenerFD, closed, nsinit.LockFD},
		Sys: &syscall.SysProcAttr{
			Cloneflags:  namespaces | unix.CLONE_PARENT,
			UidMappings: uids, GidMappings: gids, GidMappingsEnableSetgroups: true,
			Setsid: true,
			// With the launcher, even if something in the distro has stopped this process. If it has gone already, the channel tells.
			// Package syscall takes the parent, which is outside of the new pid namespace, for dead and sends the signal at once; the
			// first process of a namespace is immune to its own.
			Pdeathsig: unix.SIGKILL,
		},
	})
	if err != nil {
		return 0, failure(argv[0], err)
	}
	return pid, nil
}

// failure says why a role was not started.
func failure(role string, err error) error {
	switch err {
	case unix.EPERM, unix.ENOSPC, unix.EINVAL:
		return noNamespaces{fmt.Errorf("start %s in its own: %w", role, err)}
	case unix.EAGAIN:
		return fmt.Errorf("start %s: no more processes are allowed (%w): raise pids in [distro.NAME] of wslconfig where it is set, or the user's limit (ulimit -u)", role, err)
	}
	return fmt.Errorf("start %s: %w", role, err)
}

// noNamespaces is the kernel's refusal, for reasons that the launcher tells of.
type noNamespaces struct{ error }

// closed is a descriptor that a process does not get (syscall.ProcAttr): nsinit.GateFD.
const closed = ^uintptr(0)

// same maps each user or group of this namespace to itself (user_namespaces(7), "uid_map").
func same(path string) (list []syscall.SysProcIDMap, err error) {
	text, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	for line := range strings.Lines(string(text)) {
		var inside, outside, count int
		if _, err := fmt.Sscan(line, &inside, &outside, &count); err != nil {
			return nil, fmt.Errorf("%s: %q: %w", path, line, err)
		}
		list = append(list, syscall.SysProcIDMap{ContainerID: inside, HostID: inside, Size: count})
	}
	return list, nil
}

// pass waits at the gate. It returns the mounts that come with the launcher's word, one for each share, or none.
func pass(shares int) (trees []int, err error) {
	var b [1]byte
	oob := make([]byte, unix.CmsgSpace(4*(shares+1)))
	var n, oobn int
	for {
		n, oobn, _, _, err = unix.Recvmsg(nsinit.GateFD, b[:], oob, unix.MSG_CMSG_CLOEXEC)
		if err != unix.EINTR {
			break
		}
	}
	if err != nil {
		return nil, fmt.Errorf("wait for the launcher: %w", err)
	}
	if n == 0 {
		return nil, errors.New("the launcher has given up")
	}
	messages, err := unix.ParseSocketControlMessage(oob[:oobn])
	if err != nil {
		return nil, err
	}
	for _, m := range messages {
		fds, err := unix.ParseUnixRights(&m)
		if err != nil {
			return nil, err
		}
		trees = append(trees, fds...)
	}
	if len(trees) != 0 && len(trees) != shares {
		return nil, fmt.Errorf("%d mounts came for %d shares", len(trees), shares)
	}
	return trees, nil
}

// becomeRoot makes the calling thread root, without what it has of the caller's. What starts in a new user namespace has
// that one's capabilities, and no others.
func becomeRoot() error {
	// A session keyring of its own: whoever has the caller's may read the keys in it.
	if _, _, errno := syscall.RawSyscall(unix.SYS_KEYCTL, unix.KEYCTL_JOIN_SESSION_KEYRING, 0, 0); errno != 0 && errno != unix.ENOSYS {
		return fmt.Errorf("leave the caller's keyring: %w", errno)
	}
	if _, _, errno := syscall.RawSyscall(unix.SYS_SETGROUPS, 0, 0, 0); errno != 0 {
		return fmt.Errorf("drop the groups: %w", errno)
	}
	if _, _, errno := syscall.RawSyscall(unix.SYS_SETRESGID, 0, 0, 0); errno != 0 {
		return fmt.Errorf("become root's group: %w", errno)
	}
	if _, _, errno := syscall.RawSyscall(unix.SYS_SETRESUID, 0, 0, 0); errno != 0 {
		return fmt.Errorf("become root: %w", errno)
	}
	return nil
}
