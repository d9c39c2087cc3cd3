package reaper

import (
	"context"
	"errors"
	"fmt"
	"os"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// limit ends a test that hangs; nothing in a passing test waits for it.
const limit = 60 * time.Second

var (
	theReaper *Reaper
	emptied   = make(chan struct{}, 1)
)

func TestMain(m *testing.M) {
	if err := unix.Prctl(unix.PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0); err != nil {
		fmt.Fprintln(os.Stderr, "prctl:", err)
		os.Exit(1)
	}
	theReaper = New(func() {
		select {
		case emptied <- struct{}{}:
		default:
		}
	})
	status := m.Run()
	theReaper.Close()
	os.Exit(status)
}

func sh(t testing.TB, script string) *Process {
	t.Helper()
	p, err := theReaper.Start("/bin/sh", []string{"sh", "-c", script}, &syscall.ProcAttr{
		Env: os.Environ(), Files: []uintptr{0, 1, 2}, Sys: &syscall.SysProcAttr{Setsid: true}})
	if err != nil {
		t.Fatal(err)
	}
	return p
}

func waitEmpty(t testing.TB) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), limit)
	defer cancel()
	if err := theReaper.WaitEmpty(ctx); err != nil {
		t.Fatalf("children are left: %v", err)
	}
}

// TestLoad: many processes at once, each of which leaves orphans behind; every
// owner gets the status of his own, and no zombie is left.
func TestLoad(t *testing.T) {
	var wg sync.WaitGroup
	for worker := range 16 {
		wg.Go(func() {
			for round := range 8 {
				want := (worker*8 + round) % 200
				p := sh(t, fmt.Sprintf("true & true & (exit 99) & (true &) ; exit %d", want))
				if s := <-p.Exited; !s.Exited() || s.ExitStatus() != want {
					t.Errorf("status %v, want %d", s, want)
				}
			}
		})
	}
	wg.Wait()
	waitEmpty(t)
	if !theReaper.Empty() {
		t.Error("zombies are left")
	}
	select {
	case <-emptied:
	case <-time.After(limit):
		t.Error("nobody was told that the last process ended")
	}
}

func TestSignals(t *testing.T) {
	p := sh(t, "kill -STOP $$; sleep 1000")
	if err := p.SignalGroup(syscall.SIGKILL); err != nil {
		t.Error(err)
	}
	if s := <-p.Exited; !s.Signaled() || s.Signal() != syscall.SIGKILL {
		t.Errorf("status %v", s)
	}
	// Its pid may belong to somebody else by now.
	if err := p.Signal(syscall.SIGKILL); !errors.Is(err, ErrGone) {
		t.Errorf("signal to a process that ended: %v", err)
	}
	waitEmpty(t)
}

func TestStartFails(t *testing.T) {
	if _, err := theReaper.Start("/no/such/program", []string{"x"}, &syscall.ProcAttr{}); err != syscall.ENOENT {
		t.Errorf("got %v", err)
	}
	waitEmpty(t)
}

func TestWaitEmptyGivesUp(t *testing.T) {
	p := sh(t, "sleep 1000")
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	if err := theReaper.WaitEmpty(ctx); !errors.Is(err, context.Canceled) {
		t.Errorf("got %v", err)
	}
	if theReaper.Empty() {
		t.Error("empty with a child")
	}
	p.SignalGroup(syscall.SIGKILL)
	<-p.Exited
	waitEmpty(t)
}

// TestOrphanKeepsItFromBeingEmpty: the last process is an orphan nobody started.
func TestOrphanKeepsItFromBeingEmpty(t *testing.T) {
	var pipe [2]int
	if err := syscall.Pipe(pipe[:]); err != nil {
		t.Fatal(err)
	}
	syscall.CloseOnExec(pipe[1])
	p, err := theReaper.Start("/bin/sh", []string{"sh", "-c", "read x & exit 0"}, &syscall.ProcAttr{
		Env: os.Environ(), Files: []uintptr{uintptr(pipe[0]), 1, 2}})
	syscall.Close(pipe[0])
	if err != nil {
		t.Fatal(err)
	}
	<-p.Exited
	// A background job of a shell without job control reads /dev/null, so this one
	// may be gone already; what counts is that it is waited for.
	syscall.Close(pipe[1])
	waitEmpty(t)
}
