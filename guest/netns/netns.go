// Package netns works in network namespaces that are not the process' own.
package netns

import (
	"fmt"
	"os"
	"runtime"
	"runtime/debug"

	"golang.org/x/sys/unix"
)

// Namespace is a network namespace. It lives at least until Close.
type Namespace struct{ f *os.File }

// Of returns the namespace of a process.
func Of(pid int) (*Namespace, error) { return open(fmt.Sprintf("/proc/%d/ns/net", pid)) }

func open(path string) (*Namespace, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, fmt.Errorf("find a network namespace: %w", err)
	}
	return &Namespace{f}, nil
}

// Close lets it end with the last process and socket in it.
func (n *Namespace) Close() error { return n.f.Close() }

// Dup returns the same namespace, which is to be closed as well.
func (n *Namespace) Dup() (*Namespace, error) {
	fd, err := unix.FcntlInt(n.f.Fd(), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("hold a network namespace: %w", os.NewSyscallError("fcntl", err))
	}
	return &Namespace{os.NewFile(uintptr(fd), n.f.Name())}, nil
}

// Fd is a descriptor of it, until Close.
func (n *Namespace) Fd() int { return int(n.f.Fd()) }

// Do calls f in the namespace: sockets that it makes belong there. It must not start goroutines.
func (n *Namespace) Do(f func() error) error {
	done := make(chan error, 1)
	go func() {
		runtime.LockOSThread()
		ours, err := open("/proc/thread-self/ns/net")
		if err == nil {
			defer ours.Close()
			err = n.enter()
		}
		if err != nil {
			runtime.UnlockOSThread()
			done <- err
			return
		}
		defer func() {
			// A thread that cannot come back ends with the goroutine.
			if ours.enter() == nil {
				runtime.UnlockOSThread()
			}
		}()
		done <- recovered(f)
	}()
	return <-done
}

// recovered calls f, whose panic is an error: on a goroutine of its own, it would end the process, which is PID 1.
func recovered(f func() error) (err error) {
	defer func() {
		if p := recover(); p != nil {
			err = fmt.Errorf("BUG: panic in a network namespace: %v\n%s", p, debug.Stack())
		}
	}()
	return f()
}

func (n *Namespace) enter() error {
	if err := unix.Setns(n.Fd(), unix.CLONE_NEWNET); err != nil {
		return fmt.Errorf("enter a network namespace: %w", os.NewSyscallError("setns", err))
	}
	return nil
}

// Cookie is the number of the calling thread's namespace.
func Cookie() (uint64, error) {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return 0, os.NewSyscallError("socket", err)
	}
	defer unix.Close(fd)
	cookie, err := unix.GetsockoptUint64(fd, unix.SOL_SOCKET, unix.SO_NETNS_COOKIE)
	return cookie, os.NewSyscallError("getsockopt(SO_NETNS_COOKIE)", err)
}
