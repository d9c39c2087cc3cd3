package vmproc

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"golang.org/x/sys/unix"
)

// fakeMachine is a Machine that does what it is told to.
type fakeMachine struct {
	startErr error
	deaf     bool // Kill has no effect
	ended    chan error

	mu    sync.Mutex
	disks []string
}

func newFake() *fakeMachine { return &fakeMachine{ended: make(chan error, 2)} }

func (m *fakeMachine) Start(context.Context) error { return m.startErr }
func (m *fakeMachine) Wait(context.Context) error  { return <-m.ended }
func (m *fakeMachine) Kill() {
	if !m.deaf {
		m.ended <- errors.New("killed")
	}
}
func (m *fakeMachine) AttachDisk(_ context.Context, path string) (int, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.disks = append(m.disks, path)
	return len(m.disks) - 1, nil
}
func (m *fakeMachine) DetachDisk(_ context.Context, slot int) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if slot >= len(m.disks) {
		return errors.New("no such slot")
	}
	return nil
}
func (m *fakeMachine) Accel() (string, string) { return "tcg", "no luck" }
func (m *fakeMachine) ConsoleTail() string     { return "last line\n" }

// rig is both ends in one process, on a pipe that time can be fake with.
type rig struct {
	*Process
	machine   *fakeMachine
	conn      net.Conn // the service's end
	diskError func(int, error)
	sigterm   func() // what SIGTERM does
	killed    chan struct{}
}

func newRig(t *testing.T, m *fakeMachine) (*rig, error) {
	t.Helper()
	r := &rig{machine: m, killed: make(chan struct{})}
	ours, theirs := net.Pipe()
	r.conn = ours
	served := make(chan error, 1)
	ctx, sigterm := context.WithCancel(context.Background())
	r.sigterm = sigterm
	go func() {
		served <- serve(ctx, Config{}, theirs, io.Discard, func(_ Config, _ io.Writer, f func(int, error)) (Machine, error) {
			r.diskError = f
			return m, nil
		}, orphanGrace)
		theirs.Close() // as the process's end does
	}()
	var once sync.Once
	kill := func() { once.Do(func() { close(r.killed); theirs.Close(); m.ended <- errors.New("SIGKILL") }) }
	p := newProcess(ours, func(int, error) {}, func() error { return <-served }, kill)
	var err error
	r.Process, err = p.awaitStart(t.Context())
	return r, err
}

func TestProcess(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r, err := newRig(t, newFake())
		if err != nil || r.Started() != (Started{Accel: "tcg", AccelReason: "no luck"}) {
			t.Fatal(err, r.Started())
		}
		var wg sync.WaitGroup
		for range 20 {
			wg.Go(func() {
				if _, err := r.Attach(t.Context(), "/d"); err != nil {
					t.Error(err)
				}
			})
		}
		wg.Wait()
		if err := r.Detach(t.Context(), 3); err != nil {
			t.Error(err)
		}
		if err := r.Detach(t.Context(), 99); err == nil || err.Error() != "no such slot" {
			t.Error(err)
		}
		r.machine.ended <- nil
		<-r.Done()
		if err := r.Exit(); err != nil {
			t.Error(err)
		}
		if _, err := r.Attach(t.Context(), "/d"); !errors.Is(err, ErrEnded) {
			t.Error(err)
		}
		r.Kill() // harmless
	})
}

func TestProcessDoesNotStart(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := newFake()
		m.startErr = errors.New("no kernel")
		_, err := newRig(t, m)
		var exit *ExitError
		if !errors.As(err, &exit) || exit.Reason != "no kernel" || !strings.Contains(err.Error(), "last line") {
			t.Error(err)
		}
	})
}

func TestProcessCrash(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r, _ := newRig(t, newFake())
		r.machine.ended <- errors.New("triple fault")
		<-r.Done()
		if err := r.Exit(); err == nil || !strings.Contains(err.Error(), "triple fault") || !strings.Contains(err.Error(), "last line") {
			t.Error(err)
		}
	})
}

// Kill ends the machine at once if it can, else the process.
func TestKill(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r, _ := newRig(t, newFake())
		began := time.Now()
		r.Kill()
		<-r.Done()
		if d := time.Since(began); d != 0 {
			t.Errorf("it took %v", d)
		}

		deaf := newFake()
		deaf.deaf = true
		r, _ = newRig(t, deaf)
		began = time.Now()
		r.Kill()
		<-r.Done()
		if d := time.Since(began); d != killWait {
			t.Errorf("killed after %v", d)
		}
		<-r.killed
		if r.Exit() == nil {
			t.Error("a killed VM ended well")
		}
	})
}

// A VM whose service has died gets its time, then it is killed.
func TestOrphan(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r, _ := newRig(t, newFake())
		began := time.Now()
		r.conn.Close()
		<-r.Done()
		if d := time.Since(began); d != orphanGrace {
			t.Errorf("it lived %v", d)
		}
		r, _ = newRig(t, newFake())
		began = time.Now()
		r.conn.Close()
		r.machine.ended <- nil // /init powers off
		<-r.Done()
		if d := time.Since(began); d != 0 {
			t.Errorf("it lived %v", d)
		}
	})
}

// SIGTERM is the service's to act on, which has the guest power off.
func TestTerm(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r, _ := newRig(t, newFake())
		synctest.Wait()
		select {
		case <-r.Terminated():
			t.Error("terminated by nobody")
		default:
		}
		r.sigterm()
		<-r.Terminated()
		synctest.Wait()
		select {
		case <-r.Done():
			t.Error("the VM was not asked first")
		default:
		}
		r.machine.ended <- nil // /init powers off
		<-r.Done()
		if err := r.Exit(); err != nil {
			t.Error(err)
		}
	})
}

// TestDiskError: the service is told of a disk's error with what kind it is.
func TestDiskError(t *testing.T) {
	told := make(chan error, 1)
	ours, theirs := net.Pipe()
	served := make(chan error, 1)
	m := &fakeMachine{ended: make(chan error, 1)}
	report := make(chan func(int, error), 1)
	go func() {
		served <- serve(context.Background(), Config{}, theirs, io.Discard, func(_ Config, _ io.Writer, f func(int, error)) (Machine, error) {
			report <- f
			return m, nil
		}, orphanGrace)
		theirs.Close()
	}()
	p, err := newProcess(ours, func(slot int, err error) { told <- fmt.Errorf("slot %d: %w", slot, err) }, func() error { return <-served }, func() {}).awaitStart(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	f := <-report
	for _, c := range []struct {
		err  error
		full bool
	}{{fmt.Errorf("no room: %w", unix.ENOSPC), true}, {unix.EIO, false}} {
		f(3, c.err)
		if got := <-told; errors.Is(got, unix.ENOSPC) != c.full || got.Error() != "slot 3: "+c.err.Error() {
			t.Errorf("told %v of %v", got, c.err)
		}
	}
	m.ended <- nil
	<-p.Done()
}
