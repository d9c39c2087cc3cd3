// Package reaper starts processes and collects exit statuses in a process that
// is the parent of orphans: PID 1 of a pid namespace, or a subreaper.
//
// One Reaper is the only one in its process that waits for children. Nothing
// else there may use os/exec, os.Process.Wait or wait4: those would race with it.
// It is driven by SIGCHLD and never polls. A process started through Start
// belongs to its caller, who alone gets its status; every other child is an
// orphan, is reaped and forgotten.
package reaper

import (
	"context"
	"errors"
	"os"
	"os/signal"
	"sync"
	"syscall"

	"golang.org/x/sys/unix"
)

// ErrGone means that the process has ended, whether its owner has read the
// status yet or not.
var ErrGone = errors.New("process has ended")

// Reaper is safe for concurrent use.
type Reaper struct {
	onEmpty func()         // immutable after New
	sigs    chan os.Signal // immutable after New
	done    chan struct{}  // closed when the loop has ended

	// mu is held around fork and around wait4, so that a child is known as soon
	// as it can be reaped, and that no pid is signalled after it was reaped.
	mu      sync.Mutex
	owners  map[int]chan syscall.WaitStatus
	empty   chan struct{} // closed while there are no children
	isEmpty bool
	oom     *os.File // see Spare; nil without
}

// New returns a running Reaper. onEmpty, if not nil, is called (from the
// reaper's goroutine, no lock held) each time the last child has ended.
func New(onEmpty func()) *Reaper {
	r := &Reaper{
		onEmpty: onEmpty,
		sigs:    make(chan os.Signal, 1),
		done:    make(chan struct{}),
		owners:  map[int]chan syscall.WaitStatus{},
		empty:   make(chan struct{}),
		isEmpty: true,
	}
	close(r.empty)
	signal.Notify(r.sigs, unix.SIGCHLD)
	go r.loop()
	return r
}

// Close ends the reaper's goroutine. Children that still run are no longer reaped.
func (r *Reaper) Close() {
	signal.Stop(r.sigs)
	close(r.sigs)
	<-r.done
}

func (r *Reaper) loop() {
	defer close(r.done)
	for range r.sigs {
		if r.reap() && r.onEmpty != nil {
			r.onEmpty()
		}
	}
}

// reap collects every child that has ended and reports whether the last one
// went. SIGCHLDs merge, so one signal may stand for many children; one that
// ends after the loop raises another signal.
func (r *Reaper) reap() (emptied bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for {
		var status syscall.WaitStatus
		pid, err := syscall.Wait4(-1, &status, syscall.WNOHANG|unix.WALL, nil)
		switch {
		case err == syscall.EINTR:
		case err == syscall.ECHILD:
			if r.isEmpty {
				return false
			}
			r.isEmpty = true
			close(r.empty)
			return true
		case err != nil || pid == 0:
			if r.isEmpty { // an orphan was handed to us without a Start
				r.isEmpty = false
				r.empty = make(chan struct{})
			}
			return false
		default:
			if ch := r.owners[pid]; ch != nil {
				delete(r.owners, pid)
				ch <- status // has room for one
			}
		}
	}
}

// What the kernel adds to a process' badness when memory runs out (proc_pid_oom_score_adj(5)).
const (
	oomNever   = "-1000"
	oomDefault = "0"
)

// Spare keeps the kernel from ending this process when memory runs out. What it
// starts is not spared.
func (r *Reaper) Spare() error {
	f, err := os.OpenFile("/proc/self/oom_score_adj", os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	if _, err := f.WriteString(oomNever); err != nil {
		f.Close()
		return err
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	r.oom = f
	return nil
}

// Process is a child started by Start.
type Process struct {
	// PID of the child, which is also its process group if it was asked for one.
	PID int
	// Exited delivers the wait status, once.
	Exited <-chan syscall.WaitStatus
	r      *Reaper
}

// Start forks and executes like syscall.ForkExec, whose errors it returns as
// they are.
func (r *Reaper) Start(path string, argv []string, attr *syscall.ProcAttr) (*Process, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.oom != nil { // a child begins with its parent's
		r.oom.WriteString(oomDefault)     //nolint:errcheck // Spare could
		defer r.oom.WriteString(oomNever) //nolint:errcheck // the same
	}
	pid, err := syscall.ForkExec(path, argv, attr)
	if err != nil {
		// ForkExec has waited for a child that failed to exec. It may have been
		// the last one: the next SIGCHLD, its own, makes the loop find out.
		return nil, err
	}
	ch := make(chan syscall.WaitStatus, 1)
	r.owners[pid] = ch
	if r.isEmpty {
		r.isEmpty = false
		r.empty = make(chan struct{})
	}
	return &Process{PID: pid, Exited: ch, r: r}, nil
}

// Signal sends sig to the process.
func (p *Process) Signal(sig syscall.Signal) error { return p.kill(p.PID, sig) }

// SignalGroup sends sig to the process group that the process leads.
func (p *Process) SignalGroup(sig syscall.Signal) error { return p.kill(-p.PID, sig) }

func (p *Process) kill(target int, sig syscall.Signal) error {
	p.r.mu.Lock()
	defer p.r.mu.Unlock()
	if _, ok := p.r.owners[p.PID]; !ok {
		return ErrGone
	}
	return syscall.Kill(target, sig)
}

// Empty reports whether there is no child at all, dead or alive. With no
// children there are no other descendants either, in a pid namespace of our own.
func (r *Reaper) Empty() bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	return unix.Waitid(unix.P_ALL, 0, nil, unix.WEXITED|unix.WNOHANG|unix.WNOWAIT|unix.WALL, nil) == unix.ECHILD
}

// WaitEmpty waits until every child has ended.
func (r *Reaper) WaitEmpty(ctx context.Context) error {
	for {
		r.mu.Lock()
		ch := r.empty
		r.mu.Unlock()
		select {
		case <-ch:
			if r.Empty() {
				return nil
			}
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}
