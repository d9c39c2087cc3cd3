// Package native starts the roles of /init without a VM, in namespaces of the host's own kernel:
// version 1 of a distro. Package nsinit says what it is started with.
package native

import (
	"errors"
	"fmt"
	"os"
	"runtime"
	"strconv"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/wsl2/wsl2/guest/distro"
	"github.com/wsl2/wsl2/guest/exporter"
	"github.com/wsl2/wsl2/guest/importer"
	"github.com/wsl2/wsl2/guest/remover"
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

// Run becomes root of the namespaces and executes the role; it returns only an exit status of
// failure.
func Run(args []string) int {
	// Identity and capabilities are a thread's; the one that executes the role decides.
	runtime.LockOSThread()
	err := enter(args)
	// Whoever waits for the first answer is told instead. Nobody has a channel if nothing else.
	wire.Write(os.NewFile(nsinit.ChannelFD, "channel"), &wire.Reply{Code: wire.CodeInternal, Text: err.Error()}) //nolint:errcheck // the launcher has gone
	return 1
}

func enter(args []string) error {
	if len(args) < 4 || roles[args[1]] == "" {
		return fmt.Errorf("`%s` is run by the service of wsl2, not by hand", nsinit.Argv0)
	}
	role, root, name, shares := args[1], args[2], args[3], args[4:]
	trees, err := pass(len(shares))
	if err != nil {
		return err
	}
	// The launcher has it start where its limits are (package cgroup).
	if err := unix.Unshare(unix.CLONE_NEWCGROUP); err != nil {
		return fmt.Errorf("make a namespace of cgroups: %w", err)
	}
	// Nothing that is mounted here is seen outside, nor the other way round.
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return fmt.Errorf("make the mounts private: %w", err)
	}
	argv := []string{roles[role], strconv.Itoa(nsinit.Port), name}
	for i, dir := range shares {
		// Still with the eyes of the user that the directory is shared by.
		tree := -1
		if len(trees) > 0 {
			tree = trees[i]
		} else if tree, err = unix.OpenTree(unix.AT_FDCWD, dir, unix.OPEN_TREE_CLONE|unix.AT_RECURSIVE); err != nil {
			fmt.Fprintf(os.Stderr, "%s: share %s: %v\n", name, dir, err)
			tree = -1
		}
		argv = append(argv, strconv.Itoa(tree))
	}
	// A mount of its own, so that it can become the root; what is mounted below it comes along.
	if err := unix.Mount(root, root, "", unix.MS_BIND|unix.MS_REC, ""); err != nil {
		return fmt.Errorf("bind the root %s: %w", root, err)
	}
	if err := unix.Chdir(root); err != nil {
		return fmt.Errorf("enter the root: %w", err)
	}
	if err := becomeRoot(); err != nil {
		return err
	}
	if role == nsinit.Distro {
		if err := confine(); err != nil {
			return err
		}
	}
	err = syscall.Exec("/proc/self/exe", argv, []string{"PATH=/usr/sbin:/usr/bin:/sbin:/bin"})
	return fmt.Errorf("execute %s: %w", argv[0], err)
}

// pass waits at the gate. It returns the mounts that come with the launcher's word, one for each share, or none.
func pass(shares int) (trees []int, err error) {
	var b [1]byte
	oob := make([]byte, unix.CmsgSpace(4*(shares+1)))
	var n, oobn int
	for {
		n, oobn, _, _, err = unix.Recvmsg(nsinit.GateFD, b[:], oob, 0)
		if err != unix.EINTR {
			break
		}
	}
	unix.Close(nsinit.GateFD)
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

// becomeRoot makes the calling thread root, and root only: capabilities that programs would
// inherit whoever they run as are dropped.
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
	if err := unix.Prctl(unix.PR_CAP_AMBIENT, unix.PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0); err != nil {
		return fmt.Errorf("drop the ambient capabilities: %w", err)
	}
	header := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var caps [2]unix.CapUserData
	if err := unix.Capget(&header, &caps[0]); err != nil {
		return fmt.Errorf("read the capabilities: %w", err)
	}
	caps[0].Inheritable, caps[1].Inheritable = 0, 0
	if err := unix.Capset(&header, &caps[0]); err != nil {
		return fmt.Errorf("drop the inheritable capabilities: %w", err)
	}
	// With the launcher, even if something in the distro has stopped this process. Becoming somebody else has
	// taken the launcher's own setting back; if it has gone in between, the channel tells.
	if err := unix.Prctl(unix.PR_SET_PDEATHSIG, uintptr(unix.SIGKILL), 0, 0, 0); err != nil {
		return fmt.Errorf("ask for the signal of the launcher's end: %w", err)
	}
	return nil
}
