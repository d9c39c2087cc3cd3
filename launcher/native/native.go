package native

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"runtime"
	"strconv"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/wsl2/wsl2/internal/nsinit"
	"github.com/wsl2/wsl2/internal/wire"
	"github.com/wsl2/wsl2/launcher/api"
	"github.com/wsl2/wsl2/launcher/internal/filelock"
)

// namespaces are those in which /init makes the mounts of a distro's own (package nsinit).
const namespaces = unix.CLONE_NEWUSER | unix.CLONE_NEWNS

// What is beside a root, by its name.
const (
	lockSuffix = ".lock" // who holds it uses the root
	idsSuffix  = ".ids"  // whose its files are (mapOf)
)

// Spec is what is started.
type Spec struct {
	Init   string // the program
	Role   string // nsinit's
	Root   string // the directory
	Name   string // for ps(1) and the log
	Socket string // where it listens; replaced
	Shares []wire.Share
	Limits wire.Limits
	// Logf is told what it writes to its standard error.
	Logf func(format string, args ...any)
}

// Process is /init in a role. Messages are read by one goroutine.
type Process struct {
	PID      int
	R        *bufio.Reader // the channel
	Warnings []string      // for the user

	cmd     *exec.Cmd        // what makes its namespaces
	child   chan *os.Process // itself, once; nil if there will be none
	process *os.Process      // set when Start returns
	socket  string
	cgroup  string // the link to it, "" without
	channel *os.File
	writeMu sync.Mutex // serialises frames on channel
	ended   chan struct{}
	status  syscall.WaitStatus // set before ended is closed
}

// Start starts /init once nobody uses the root any more; ctx bounds it. Everything in
// its namespaces ends with it, and it ends with the channel, hence with this process.
func Start(ctx context.Context, s Spec) (*Process, error) {
	user, err := thisUser()
	if err != nil {
		return nil, err
	}
	lock, err := Lock(ctx, s.Root)
	if err != nil {
		return nil, err
	}
	defer lock.Close() // the process has it now
	ids, err := user.mapOf(s.Root, lock)
	if err != nil {
		return nil, err
	}
	channel, theirs, err := pair("channel")
	if err != nil {
		return nil, err
	}
	defer theirs.Close()
	gate, theirGate, err := pair("gate")
	if err != nil {
		channel.Close()
		return nil, err
	}
	defer gate.Close()
	defer theirGate.Close()
	os.Remove(s.Socket) // of one that was killed
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: s.Socket, Net: "unix"})
	if err != nil {
		channel.Close()
		return nil, err
	}
	// The process is the only one that holds it: whoever waits to be accepted learns of its end.
	l.SetUnlinkOnClose(false)
	listener, err := l.File()
	l.Close()
	if err == nil {
		defer listener.Close()
		err = os.Chmod(s.Socket, 0o600)
	}
	stderr, theirStderr, perr := os.Pipe()
	if err = errors.Join(err, perr); err != nil {
		channel.Close()
		os.Remove(s.Socket)
		return nil, err
	}
	defer theirStderr.Close()
	args := []string{s.Role, s.Root, s.Name}
	for _, share := range s.Shares {
		if share.ReadOnly {
			share.Host = nsinit.ReadOnly + share.Host
		}
		args = append(args, share.Host)
	}
	cmd, err := command(s.Init, args...)
	var group *os.File
	var link string
	if err == nil && s.Role == nsinit.Distro {
		group, link, err = cgroupOf(ctx, s)
	}
	if err != nil {
		channel.Close()
		stderr.Close()
		os.Remove(s.Socket)
		return nil, err
	}
	if group != nil {
		defer group.Close()
		cmd.SysProcAttr.UseCgroupFD, cmd.SysProcAttr.CgroupFD = true, int(group.Fd())
	}
	cmd.Stderr = theirStderr
	cmd.ExtraFiles = []*os.File{theirs, listener, theirGate, lock} // nsinit.ChannelFD and so on
	p := &Process{R: bufio.NewReader(channel), cmd: cmd, socket: s.Socket, cgroup: link, channel: channel, child: make(chan *os.Process, 1), ended: make(chan struct{})}
	started := make(chan error, 1)
	go p.run(started)
	if err := <-started; err != nil {
		channel.Close()
		stderr.Close()
		os.Remove(s.Socket)
		removeEnded(link, s.Init)
		return nil, refusal(err)
	}
	theirGate.Close() // its end is the end of the process
	go logLines(stderr, s)
	stop := context.AfterFunc(ctx, func() { cmd.Process.Kill() })
	if err = ids.write(cmd.Process.Pid); err == nil {
		err = pass(gate, cmd.Process.Pid, s)
	}
	var text string
	if err == nil {
		text, err = answer(gate)
	}
	var pid int
	if err == nil {
		pid, err = strconv.Atoi(text)
	}
	if err == nil {
		p.process, err = os.FindProcess(pid)
	}
	if !stop() {
		err = context.Cause(ctx)
	}
	p.child <- p.process
	if err != nil {
		cmd.Process.Kill()
		if p.process != nil {
			p.Kill()
		}
		p.Close() // which ends what is not known yet
		<-p.ended
		return nil, err
	}
	p.PID = p.process.Pid
	for _, w := range user.overlaps(ids) {
		p.Warnings = append(p.Warnings, w+"; "+separate)
	}
	return p, nil
}

// command is /init where it makes the mounts.
func command(init string, args ...string) (*exec.Cmd, error) {
	last, err := lastCapability()
	if err != nil {
		return nil, err
	}
	cmd := exec.Command(init, args...)
	cmd.Args[0] = nsinit.Argv0
	cmd.Dir, cmd.Env = "/", []string{}
	// Without a mapping it is nobody in its namespace, and only ambient capabilities outlive execve(2).
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: namespaces, Setsid: true, Pdeathsig: unix.SIGKILL}
	for c := range last + 1 {
		cmd.SysProcAttr.AmbientCaps = append(cmd.SysProcAttr.AmbientCaps, c)
	}
	return cmd, nil
}

// answer waits for what /init says when it is done.
func answer(gate *os.File) (string, error) {
	m, err := wire.Read(gate)
	reply, ok := m.(*wire.Reply)
	switch {
	case err != nil:
		return "", fmt.Errorf("/init ended in the namespaces of version 1 (the service's log tells more): %w", err)
	case !ok:
		return "", fmt.Errorf("/init answers %v in the namespaces of version 1", m)
	case reply.Code == wire.CodeRefused:
		return "", noNamespaces(reply.Text)
	case reply.Code != wire.CodeOK:
		return "", errors.New(reply.Text)
	}
	return reply.Text, nil
}

// refusal says why the kernel makes no namespaces.
func refusal(err error) error {
	if errors.Is(err, unix.EPERM) || errors.Is(err, unix.ENOSPC) || errors.Is(err, unix.EINVAL) {
		return noNamespaces(err.Error())
	}
	return err
}

func noNamespaces(why string) error {
	return api.Errorf(api.CodeFailed, "let users make namespaces (sysctl user.max_user_namespaces and the others of its kind, kernel.unprivileged_userns_clone, kernel.apparmor_restrict_unprivileged_userns), or use version 2",
		"this host makes no namespaces for a distro of version 1: %s", why)
}

// pair makes a socket pair; the first end is the launcher's, on the runtime's poller.
func pair(name string) (ours, theirs *os.File, err error) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, nil, fmt.Errorf("make a %s: %w", name, err)
	}
	unix.SetNonblock(fds[0], true) //nolint:errcheck // it cannot fail on a socket
	return os.NewFile(uintptr(fds[0]), name), os.NewFile(uintptr(fds[1]), name), nil
}

// pass opens the gate. Root hands the mounts of the shares over, in which the host's users are
// the distro's: nobody else may map a mount, and without that all of root's files would be nobody's.
func pass(gate *os.File, pid int, s Spec) error {
	var oob []byte
	if os.Geteuid() == 0 && len(s.Shares) > 0 {
		users, err := os.Open(fmt.Sprintf("/proc/%d/ns/user", pid))
		if err != nil {
			return err
		}
		defer users.Close()
		var fds []int
		defer func() {
			for _, fd := range fds {
				unix.Close(fd)
			}
		}()
		for _, share := range s.Shares {
			fd, err := mapped(share.Host, int(users.Fd()))
			if err != nil {
				s.Logf("share %s: %v", share.Host, err)
				// What cannot be mapped is an empty place of the message: a descriptor of nothing
				// that can be mounted.
				if fd, err = unix.Open(os.DevNull, unix.O_PATH|unix.O_CLOEXEC, 0); err != nil {
					return err
				}
			}
			fds = append(fds, fd)
		}
		oob = unix.UnixRights(fds...)
	}
	raw, err := gate.SyscallConn()
	if err != nil {
		return err
	}
	var serr error
	err = raw.Write(func(fd uintptr) bool {
		serr = unix.Sendmsg(int(fd), []byte{1}, oob, nil, unix.MSG_NOSIGNAL)
		return serr != unix.EAGAIN
	})
	if err = errors.Join(err, serr); err != nil {
		return fmt.Errorf("open the gate of the namespaces: %w", err)
	}
	return nil
}

// mapped takes hold of a directory as a mount that is mapped by a user namespace
// (mount_setattr(2), MOUNT_ATTR_IDMAP): with what is mounted below it, if that can all be mapped.
func mapped(dir string, users int) (int, error) {
	var failure error
	for _, recursive := range []uint{unix.AT_RECURSIVE, 0} {
		fd, err := unix.OpenTree(unix.AT_FDCWD, dir, unix.OPEN_TREE_CLONE|unix.OPEN_TREE_CLOEXEC|recursive)
		if err == nil {
			err = unix.MountSetattr(fd, "", unix.AT_EMPTY_PATH|recursive, &unix.MountAttr{
				Attr_set: unix.MOUNT_ATTR_IDMAP, Userns_fd: uint64(users),
				Propagation: unix.MS_PRIVATE, // a peer would bring to the host what is mounted on it in the distro
			})
			if err == nil {
				return fd, nil
			}
			unix.Close(fd)
		}
		failure = err
	}
	return -1, fmt.Errorf("map its users: %w", failure)
}

// maxLines is what a process may make us log.
const maxLines = 100

// logLines logs what a process writes until it, and all that it left its stderr to, has ended.
func logLines(stderr *os.File, s Spec) {
	defer stderr.Close()
	scanner := bufio.NewScanner(stderr)
	for n := 0; scanner.Scan(); n++ {
		if n < maxLines {
			s.Logf("%s", strconv.QuoteToASCII(scanner.Text()))
		}
	}
}

// run starts it and waits for its end, on a thread that is there as long: the signal of its parent's death
// would come at the end of that thread (prctl(2)).
func (p *Process) run(started chan<- error) {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	err := p.cmd.Start()
	started <- err
	if err != nil {
		return
	}
	p.cmd.Wait()
	p.status = p.cmd.ProcessState.Sys().(syscall.WaitStatus)
	if child := <-p.child; child != nil {
		if state, err := child.Wait(); err == nil {
			p.status = state.Sys().(syscall.WaitStatus)
		}
	}
	// What it has made and not told of, before it was killed. No other child is this thread's.
	for err := error(nil); err == nil || err == unix.EINTR; {
		_, err = unix.Wait4(-1, nil, unix.WNOTHREAD, nil)
	}
	os.Remove(p.socket)
	removeEnded(p.cgroup, p.cmd.Path)
	close(p.ended)
}

// Ended is closed when it has ended, and all in its namespaces.
func (p *Process) Ended() <-chan struct{} { return p.ended }

// Status is how it ended, after Ended.
func (p *Process) Status() syscall.WaitStatus { return p.status }

// Kill ends it, and all in its namespaces, without asking.
func (p *Process) Kill() { p.process.Kill() }

// Close closes the channel.
func (p *Process) Close() { p.channel.Close() }

// sendTimeout is what it gets to take a message.
const sendTimeout = 10 * time.Second

// Send sends one message.
func (p *Process) Send(m wire.Message) error {
	p.writeMu.Lock()
	defer p.writeMu.Unlock()
	return wire.Write(wire.Within(p.channel, sendTimeout), m)
}

// Lock takes the lock of a root, waiting for who holds it until ctx ends. The distro's root can take the descriptor from its
// init (pidfd_getfd(2), /proc/1/fd), and is the master of the file if that is a user's of his: nothing is read of it, and
// one that was closed to its user is replaced.
func Lock(ctx context.Context, root string) (*os.File, error) {
	path := root + lockSuffix
	f, err := filelock.Lock(ctx, path, os.O_RDONLY)
	if errors.Is(err, os.ErrPermission) && os.Remove(path) == nil {
		f, err = filelock.Lock(ctx, path, os.O_RDONLY)
	}
	if err != nil && err == context.Cause(ctx) {
		return nil, fmt.Errorf("%s is still used by an earlier start of its distro: %w", root, err)
	}
	return f, err
}

// Rename gives a root another name, with what is beside it: who still has the lock may be ending only now.
func Rename(from, to string) error {
	for _, suffix := range []string{lockSuffix, idsSuffix} {
		if err := os.Rename(from+suffix, to+suffix); err != nil && !errors.Is(err, os.ErrNotExist) {
			return err
		}
	}
	return os.Rename(from, to)
}

// Forget removes what was beside a root that has gone, if it is there.
func Forget(root string) {
	os.Remove(root + lockSuffix)
	os.Remove(root + idsSuffix)
}
