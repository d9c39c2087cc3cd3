package pid1

import (
	"bufio"
	"bytes"
	"fmt"
	"os"
	"strconv"
	"sync"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/wsl2/wsl2/guest/reaper"
	"github.com/wsl2/wsl2/internal/wire"
)

// self is our own binary, from whatever root we were started.
const self = "/proc/self/exe"

// child is /init in another role, with a channel of frames on its descriptor 3.
type child struct {
	proc *reaper.Process

	writeMu sync.Mutex // serialises frames on channel
	channel *os.File
	r       *bufio.Reader // owned by the one goroutine that reads
}

// spawn starts /init as argv0 with its port and name, in new namespaces
// (cloneFlags) and, if cgroup is not negative, in that cgroup; with new namespaces in
// one for it as well.
func (v *vm) spawn(argv0 string, port uint32, name string, cloneFlags uintptr, cgroup int) (*child, error) {
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("make a channel: %w", err)
	}
	defer unix.Close(pair[1])
	// What it writes to its stderr, a panic say, goes to the kernel log.
	var errPipe [2]int
	if err := unix.Pipe2(errPipe[:], unix.O_CLOEXEC); err != nil {
		unix.Close(pair[0])
		return nil, fmt.Errorf("make a pipe: %w", err)
	}
	defer unix.Close(errPipe[1])
	unix.SetNonblock(errPipe[0], true) //nolint:errcheck // it cannot fail on a pipe
	stderr := os.NewFile(uintptr(errPipe[0]), "stderr")
	attr := &syscall.ProcAttr{
		Dir:   "/",
		Env:   []string{"PATH=/usr/sbin:/usr/bin:/sbin:/bin"},
		Files: []uintptr{0, 1, uintptr(errPipe[1]), uintptr(pair[1])},
		Sys:   &syscall.SysProcAttr{Cloneflags: cloneFlags, Setsid: true},
	}
	if cgroup >= 0 {
		// Into the cgroup by clone3, so that the namespace unshared after it has the
		// cgroup as its root; CLONE_NEWCGROUP would take the parent's.
		attr.Sys.UseCgroupFD, attr.Sys.CgroupFD = true, cgroup
		if cloneFlags != 0 {
			attr.Sys.Unshareflags = unix.CLONE_NEWCGROUP
		}
	}
	proc, err := v.rp.Start(self, []string{argv0, strconv.FormatUint(uint64(port), 10), name}, attr)
	if err != nil {
		unix.Close(pair[0])
		stderr.Close()
		return nil, fmt.Errorf("start %s: %w", argv0, err)
	}
	go v.logLines(argv0+" "+name, stderr)
	unix.SetNonblock(pair[0], true) //nolint:errcheck // it cannot fail on a socket
	f := os.NewFile(uintptr(pair[0]), "channel")
	return &child{proc: proc, channel: f, r: bufio.NewReader(f)}, nil
}

// logLines logs what a child writes until it ends.
func (v *vm) logLines(name string, stderr *os.File) {
	defer stderr.Close()
	r := bufio.NewReader(stderr)
	for {
		line, err := r.ReadSlice('\n') // longer lines come in pieces
		if text := bytes.TrimSpace(line); len(text) > 0 {
			v.log.Errorf("%s: %s", name, text)
		}
		if err != nil && err != bufio.ErrBufferFull {
			return
		}
	}
}

// send writes one frame to the child.
func (c *child) send(m wire.Message) error {
	c.writeMu.Lock()
	defer c.writeMu.Unlock()
	return wire.Write(wire.Within(c.channel, sendTimeout), m)
}

// describe says how a process ended, for people.
func describe(status syscall.WaitStatus) string {
	if status.Signaled() {
		return fmt.Sprintf("killed by signal %d (%v)", int(status.Signal()), status.Signal())
	}
	return fmt.Sprintf("exit status %d", status.ExitStatus())
}
