package service

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/wsl2/wsl2/internal/wire"
	"github.com/wsl2/wsl2/launcher/api"
	"github.com/wsl2/wsl2/launcher/config"
)

// memMachine is a Machine without sockets, so that time can be fake (synctest).
type memMachine struct {
	req  BootRequest
	done chan struct{}

	mu           sync.Mutex
	exit         error
	ended        bool
	disks        map[int]string
	running      map[string]bool
	busy         map[string]bool
	mounted      map[string]string // disk by path in the distros
	attachErr    error
	devices      bool // there is a virtio-fs device
	starts       int
	startFn      func(name string) error
	startRequest func(r wire.StartDistro) error // instead of startFn
	stopFn       func(name string) error
	hang         bool             // Shutdown has no effect
	warnings     string           // of each start
	started      wire.StartDistro // the last one
	watched      int              // requests to watch ports
	// maintain is what the guest does to a disk; nil: nothing.
	maintain func(disk string, r wire.Maintain) (string, error)
	names    string // MachineInfo.NamesPath
}

func (m *memMachine) setBusy(name string, busy bool) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.busy[name] = busy
}

func (m *memMachine) onStop(f func(name string) error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.stopFn = f
}

func (m *memMachine) end(exit error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if !m.ended {
		m.ended, m.exit = true, exit
		close(m.done)
	}
}

func (m *memMachine) Attach(ctx context.Context, path string) (int, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.attachErr != nil {
		return 0, m.attachErr
	}
	for i := 0; ; i++ {
		if m.disks[i] == "" {
			m.disks[i] = path
			return i, nil
		}
	}
}

func (m *memMachine) Detach(ctx context.Context, slot int) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.disks[slot] == "" {
		return fmt.Errorf("slot %d is empty", slot)
	}
	delete(m.disks, slot)
	return nil
}

func (m *memMachine) StartDistro(ctx context.Context, r wire.StartDistro) (uint32, string, error) {
	m.mu.Lock()
	f := m.startFn
	if m.startRequest != nil {
		f = func(string) error { return m.startRequest(r) }
	}
	m.mu.Unlock()
	if f != nil {
		if err := f(r.Name); err != nil {
			return 0, "", err
		}
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.ended {
		return 0, "", errControlLost
	}
	m.starts++
	m.running[r.Name], m.started = true, r
	return 1000 + uint32(m.starts), m.warnings, nil
}

func (m *memMachine) StopDistro(ctx context.Context, r wire.StopDistro) error {
	m.mu.Lock()
	f, busy := m.stopFn, m.busy[r.Name]
	m.mu.Unlock()
	if f != nil {
		if err := f(r.Name); err != nil {
			return err
		}
	}
	if r.IfIdle && busy {
		return &GuestError{wire.CodeBusy, "busy"}
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	if !m.running[r.Name] {
		return &GuestError{wire.CodeUnknownDistro, r.Name + " is not running"}
	}
	delete(m.running, r.Name)
	return nil
}

// exitDistro is the end of a distro's init.
func (m *memMachine) exitDistro(name, text string) {
	m.mu.Lock()
	delete(m.running, name)
	m.mu.Unlock()
	m.req.DistroExited(name, text)
}

func (m *memMachine) Import(ctx context.Context, r wire.Import, ready func(uint32)) (string, error) {
	ready(999)
	if m.hang {
		<-ctx.Done()
		return "", context.Cause(ctx)
	}
	return "", nil
}

func (m *memMachine) Export(ctx context.Context, r wire.Export, ready func(uint32)) error {
	ready(998)
	return nil
}

func (m *memMachine) Maintain(ctx context.Context, r wire.Maintain, ready func(uint32)) (string, error) {
	if m.maintain == nil {
		return "", nil
	}
	m.mu.Lock()
	disk := m.disks[int(r.Slot)]
	m.mu.Unlock()
	return m.maintain(disk, r)
}

func (m *memMachine) MountDisk(ctx context.Context, r wire.MountDisk) (string, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	disk := m.disks[int(r.Slot)]
	if disk == "" || r.FSType == "unknown" {
		return "", &GuestError{wire.CodeDisk, "no such file system"}
	}
	if m.mounted == nil {
		m.mounted = map[string]string{}
	}
	m.mounted["/mnt/wsl/"+r.Name] = disk
	return "/mnt/wsl/" + r.Name, nil
}

func (m *memMachine) WatchPorts() error {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.watched++
	return nil
}

func (m *memMachine) ShareDevice(context.Context) (tag, socket string, err error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if !m.devices {
		return "", "", errors.New("no device")
	}
	return "tag", "/socket", nil
}

func (m *memMachine) ReleaseDisk(ctx context.Context, slot int) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.busy[m.disks[slot]] {
		return &GuestError{wire.CodeBusy, "in use"}
	}
	maps.DeleteFunc(m.mounted, func(_, disk string) bool { return disk == m.disks[slot] })
	return nil
}

func (m *memMachine) mounts() map[string]string {
	m.mu.Lock()
	defer m.mu.Unlock()
	return maps.Clone(m.mounted)
}

func (m *memMachine) Shutdown(time.Duration) error {
	if !m.hang {
		m.end(nil)
	}
	return nil
}
func (m *memMachine) Kill()                 { m.end(errors.New("killed")) }
func (m *memMachine) Done() <-chan struct{} { return m.done }
func (m *memMachine) Exit() error           { return m.exit }
func (m *memMachine) Info() MachineInfo {
	return MachineInfo{VM: api.VM{Accel: "tcg", AccelReason: "no luck"}, VsockPath: "/v", NamesPath: m.names}
}

// setup is a Manager whose VMs are memMachines.
type setup struct {
	m        *Manager
	settings config.Settings
	warnings []string
	idle     atomic.Int32

	mu       sync.Mutex
	machines []*memMachine
	bootErr  error
	bootTime time.Duration
	prepare  func(*memMachine)
}

func newSetup(t *testing.T) *setup {
	s := &setup{settings: config.Defaults(config.Host{MemoryBytes: 8 << 30, CPUs: 2})}
	s.m = NewManager(s.boot, func() (config.Settings, []string) { return s.settings, s.warnings }, slog.New(slog.DiscardHandler), func() { s.idle.Add(1) })
	s.m.tools = func(context.Context) ([]byte, error) { return nil, nil }
	t.Cleanup(s.m.Close)
	return s
}

func (s *setup) boot(ctx context.Context, r BootRequest) (Machine, error) {
	if s.bootTime > 0 {
		select {
		case <-time.After(s.bootTime):
		case <-ctx.Done():
			return nil, context.Cause(ctx)
		}
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.bootErr != nil {
		return nil, s.bootErr
	}
	m := &memMachine{req: r, done: make(chan struct{}), disks: map[int]string{}, running: map[string]bool{}, busy: map[string]bool{}}
	if r.Disk != "" {
		m.disks[0] = r.Disk
	}
	if s.prepare != nil {
		s.prepare(m)
	}
	s.machines = append(s.machines, m)
	return m, nil
}

func (s *setup) machine(i int) *memMachine {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.machines[i]
}

func (s *setup) boots() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return len(s.machines)
}

var debian = DistroSpec{Name: "debian", Disk: "/d/debian"}

func (s *setup) open(t *testing.T, spec DistroSpec, ended func(error)) *Lease {
	t.Helper()
	if ended == nil {
		ended = func(error) {}
	}
	l, _, err := s.m.Open(t.Context(), spec, api.VMOptions{}, ended)
	if err != nil {
		t.Fatal(err)
	}
	return l
}

func (s *setup) state(name string) string {
	if st, ok := s.m.States()[name]; ok {
		return st.State
	}
	return api.StateStopped
}

// inBubble runs f with fake time; everything it starts has ended when it returns.
func inBubble(t *testing.T, f func(t *testing.T, s *setup)) {
	synctest.Test(t, func(t *testing.T) { f(t, newSetup(t)) })
}

func TestIdle(t *testing.T) {
	inBubble(t, func(t *testing.T, s *setup) {
		l := s.open(t, debian, nil)
		second := s.open(t, debian, nil)
		if s.boots() != 1 || s.machine(0).starts != 1 {
			t.Fatalf("%d boots, %d starts", s.boots(), s.machine(0).starts)
		}
		l.Release()
		l.Release() // harmless
		time.Sleep(time.Hour)
		if got := s.state("debian"); got != api.StateRunning {
			t.Fatalf("with a lease: %s", got)
		}
		second.Release()
		time.Sleep(14 * time.Second)
		synctest.Wait()
		if got := s.state("debian"); got != api.StateRunning {
			t.Fatalf("before the timeout: %s", got)
		}
		time.Sleep(2 * time.Second)
		synctest.Wait()
		if got := s.state("debian"); got != api.StateStopped || len(s.machine(0).disks) != 0 {
			t.Fatalf("after the timeout: %s, disks %v", got, s.machine(0).disks)
		}
		if s.m.VM() == nil {
			t.Fatal("the VM stopped with its distro")
		}
		time.Sleep(58 * time.Second)
		synctest.Wait()
		if s.m.VM() == nil || s.idle.Load() != 0 {
			t.Fatal("the VM stopped early")
		}
		time.Sleep(2 * time.Second)
		synctest.Wait()
		if s.m.VM() != nil || s.idle.Load() != 1 || !s.m.Idle() {
			t.Fatalf("VM %v, idle %d", s.m.VM(), s.idle.Load())
		}
		// And again.
		s.open(t, debian, nil).Release()
		if s.boots() != 2 {
			t.Fatalf("%d boots", s.boots())
		}
	})
}

// A new session within the timeout keeps everything.
func TestIdleIsInterrupted(t *testing.T) {
	inBubble(t, func(t *testing.T, s *setup) {
		for range 10 {
			l := s.open(t, debian, nil)
			l.Release()
			time.Sleep(14 * time.Second)
		}
		if s.boots() != 1 || s.machine(0).starts != 1 {
			t.Fatalf("%d boots, %d starts", s.boots(), s.machine(0).starts)
		}
		// The distro stops, the VM stays for another one.
		time.Sleep(time.Minute)
		s.open(t, DistroSpec{Name: "alpine", Disk: "/d/alpine"}, nil).Release()
		if s.boots() != 1 || s.machine(0).disks[0] != "/d/alpine" {
			t.Fatalf("%d boots, disks %v", s.boots(), s.machine(0).disks)
		}
	})
}

func TestIdleNever(t *testing.T) {
	inBubble(t, func(t *testing.T, s *setup) {
		s.settings.InstanceIdleTimeout, s.settings.VMIdleTimeout = -1, -1
		s.open(t, debian, nil).Release()
		time.Sleep(1000 * time.Hour)
		synctest.Wait()
		if got := s.state("debian"); got != api.StateRunning {
			t.Fatal(got)
		}
		if err := s.m.Terminate(t.Context(), "Debian"); err != nil {
			t.Fatal(err)
		}
		time.Sleep(1000 * time.Hour)
		synctest.Wait()
		if s.m.VM() == nil || s.state("debian") != api.StateStopped {
			t.Fatal("the VM stopped, or the distro did not")
		}
	})
}

// A process in the background keeps its distro; its end lets the timer start anew.
func TestIdleWithBackgroundProcess(t *testing.T) {
	inBubble(t, func(t *testing.T, s *setup) {
		s.open(t, debian, nil).Release()
		m := s.machine(0)
		m.setBusy("debian", true)
		time.Sleep(10 * time.Minute)
		synctest.Wait()
		if got := s.state("debian"); got != api.StateRunning {
			t.Fatal(got)
		}
		s.open(t, debian, nil).Release() // usable after the refused stop
		time.Sleep(10 * time.Minute)
		m.setBusy("debian", false)
		m.req.DistroIdle("debian")
		time.Sleep(14 * time.Second)
		synctest.Wait()
		if got := s.state("debian"); got != api.StateRunning {
			t.Fatalf("before the timeout: %s", got)
		}
		time.Sleep(2 * time.Second)
		synctest.Wait()
		if got := s.state("debian"); got != api.StateStopped {
			t.Fatal(got)
		}
	})
}

// The last process ends while the guest is being asked: its event comes before
// the refusal is handled.
func TestIdleEventDuringRefusal(t *testing.T) {
	inBubble(t, func(t *testing.T, s *setup) {
		s.open(t, debian, nil).Release()
		m := s.machine(0)
		m.setBusy("debian", true)
		m.onStop(func(name string) error {
			m.mu.Lock()
			busy := m.busy[name]
			m.busy[name] = false
			m.mu.Unlock()
			if busy {
				m.req.DistroIdle(name)
				return &GuestError{wire.CodeBusy, "busy"}
			}
			return nil
		})
		time.Sleep(16 * time.Second)
		synctest.Wait()
		if got := s.state("debian"); got != api.StateRunning {
			t.Fatal(got)
		}
		time.Sleep(15 * time.Second)
		synctest.Wait()
		if got := s.state("debian"); got != api.StateStopped {
			t.Fatal(got)
		}
	})
}

// A session that comes while the distro stops waits and starts it anew.
func TestOpenWhileStopping(t *testing.T) {
	inBubble(t, func(t *testing.T, s *setup) {
		s.open(t, debian, nil).Release()
		m := s.machine(0)
		m.onStop(func(string) error { time.Sleep(3 * time.Second); return nil })
		time.Sleep(16 * time.Second)
		synctest.Wait()
		if got := s.state("debian"); got != api.StateStopping {
			t.Fatal(got)
		}
		s.open(t, debian, nil)
		if m.starts != 2 || len(m.disks) != 1 || s.boots() != 1 {
			t.Fatalf("%d starts, disks %v, %d boots", m.starts, m.disks, s.boots())
		}
	})
}

func TestConcurrentOpen(t *testing.T) {
	inBubble(t, func(t *testing.T, s *setup) {
		s.bootTime = time.Second
		var wg sync.WaitGroup
		for i := range 60 {
			wg.Go(func() {
				spec := DistroSpec{Name: fmt.Sprint("d", i%3), Disk: fmt.Sprint("/d/", i%3)}
				l, session, err := s.m.Open(t.Context(), spec, api.VMOptions{}, func(error) {})
				if err != nil {
					t.Error(err)
					return
				}
				if session.Port == 0 || session.VsockPath != "/v" {
					t.Errorf("%+v", session)
				}
				l.Release()
			})
		}
		wg.Wait()
		if m := s.machine(0); s.boots() != 1 || m.starts != 3 || len(m.disks) != 3 {
			t.Fatalf("%d boots, %d starts, disks %v", s.boots(), m.starts, m.disks)
		}
	})
}

// The notice about KVM goes to the one command that started the VM.
func TestNotices(t *testing.T) {
	inBubble(t, func(t *testing.T, s *setup) {
		s.warnings = []string{"Unknown key"}
		var all []string
		for range 3 {
			_, session, err := s.m.Open(t.Context(), debian, api.VMOptions{}, func(error) {})
			if err != nil {
				t.Fatal(err)
			}
			all = append(all, session.Notices...)
		}
		if len(all) != 2 || !strings.Contains(all[0], "KVM unusable: no luck; using QEMU TCG (slow)") || all[1] != "Unknown key" {
			t.Fatalf("%q", all)
		}
	})
}

// TestDistroSettings: a distro starts with what wslconfig says of it by then, and
// what it warns of is told to whoever started it.
func TestDistroSettings(t *testing.T) {
	inBubble(t, func(t *testing.T, s *setup) {
		s.prepare = func(m *memMachine) { m.warnings = "one\ntwo" }
		if _, session, err := s.m.Open(t.Context(), DistroSpec{Name: "other"}, api.VMOptions{}, func(error) {}); err != nil || !strings.HasSuffix(fmt.Sprint(session.Notices), " one two]") {
			t.Errorf("%q, %v", session.Notices, err)
		}
		if got := s.machine(0).started; got.Limits != (wire.Limits{}) || got.SafeMode || got.Hostname == "" {
			t.Errorf("%+v", got)
		}
		want := wire.Limits{MemoryBytes: 1 << 30, PIDs: 100}
		s.settings.Limits, s.settings.SafeMode = map[string]wire.Limits{"debian": want}, true
		s.open(t, debian, nil)
		if got := s.machine(0).started; got.Limits != want || !got.SafeMode {
			t.Errorf("%+v", got)
		}
		if _, session, err := s.m.Open(t.Context(), debian, api.VMOptions{}, func(error) {}); err != nil || len(session.Notices) != 0 {
			t.Errorf("the second session is told %q, %v", session.Notices, err)
		}
	})
}

func TestVMDies(t *testing.T) {
	inBubble(t, func(t *testing.T, s *setup) {
		var mu sync.Mutex
		var told []error
		ended := func(err error) { mu.Lock(); told = append(told, err); mu.Unlock() }
		l := s.open(t, debian, ended)
		s.open(t, debian, ended)
		s.open(t, DistroSpec{Name: "alpine", Disk: "/a"}, ended)
		released := s.open(t, debian, func(error) { t.Error("a released lease was told") })
		released.Release()
		s.machine(0).end(errors.New("Kernel panic - not syncing"))
		synctest.Wait()
		if len(told) != 3 || !strings.Contains(told[0].Error(), "Kernel panic") {
			t.Fatalf("told %q", told)
		}
		l.Release() // harmless now
		s.open(t, debian, nil)
		if s.boots() != 2 || s.machine(1).disks[0] != "/d/debian" {
			t.Fatalf("%d boots", s.boots())
		}
	})
}

func TestBootFails(t *testing.T) {
	inBubble(t, func(t *testing.T, s *setup) {
		s.bootErr = errors.New("no kernel")
		for range 2 {
			if _, _, err := s.m.Open(t.Context(), debian, api.VMOptions{}, func(error) {}); err == nil || !strings.Contains(err.Error(), "no kernel") {
				t.Fatal(err)
			}
		}
		if !s.m.Idle() || s.idle.Load() == 0 {
			t.Fatal("something is left")
		}
		s.bootErr = nil
		s.open(t, debian, nil)
	})
}

func TestBootTimeout(t *testing.T) {
	inBubble(t, func(t *testing.T, s *setup) {
		s.bootTime = time.Hour
		began := time.Now()
		_, _, err := s.m.Open(t.Context(), debian, api.VMOptions{}, func(error) {})
		if err == nil || !strings.Contains(err.Error(), "not ready within 1m0s") || time.Since(began) != time.Minute {
			t.Fatal(err, time.Since(began))
		}
	})
}

// A client that goes away does not undo the start: the next one finds it done.
func TestClientLeavesDuringStart(t *testing.T) {
	inBubble(t, func(t *testing.T, s *setup) {
		s.bootTime = 10 * time.Second
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		if _, _, err := s.m.Open(ctx, debian, api.VMOptions{}, func(error) {}); !errors.Is(err, context.DeadlineExceeded) {
			t.Fatal(err)
		}
		time.Sleep(10 * time.Second)
		synctest.Wait()
		if got := s.state("debian"); got != api.StateRunning {
			t.Fatal(got)
		}
		time.Sleep(80 * time.Second) // and nobody holds it
		synctest.Wait()
		if !s.m.Idle() {
			t.Fatal("it stays")
		}
	})
}

// TestWorkOnFullHost: to the guest a full host is some I/O error; the user is told what it is,
// and of the next piece of work only what concerns it.
func TestWorkOnFullHost(t *testing.T) {
	inBubble(t, func(t *testing.T, s *setup) {
		var diskErr error
		s.prepare = func(m *memMachine) {
			m.maintain = func(disk string, r wire.Maintain) (string, error) {
				if diskErr != nil {
					m.req.DiskError(int(r.Slot), diskErr)
				}
				return "", &GuestError{wire.CodeDisk, "input/output error"}
			}
		}
		for _, c := range []struct {
			err  error
			want api.Code
		}{{syscall.ENOSPC, api.CodeNoSpace}, {nil, api.CodeFailed}, {syscall.EIO, api.CodeFailed}} {
			diskErr = c.err
			_, err := s.m.Maintain(t.Context(), "debian", debian.Disk, wire.Maintain{Task: wire.TaskGrow}, api.VMOptions{}, nil)
			if code(err) != c.want {
				t.Errorf("with %v: %v", c.err, err)
			}
		}
	})
}

// TestStartDamaged: a disk with errors is repaired before the distro starts, or, where
// that fails, mounted read-only with a warning for each session; one that cannot be
// mounted at all is refused for the reason that was met first.
func TestStartDamaged(t *testing.T) {
	refuse := func(code wire.Code) error { return &GuestError{code, "first words"} }
	for _, c := range []struct {
		name               string
		code               wire.Code
		repairs, readable  bool
		first, every, fail string
	}{
		{"repaired", wire.CodeUnchecked, true, true, "were repaired", "", ""},
		{"not mountable, repaired", wire.CodeDisk, true, true, "were repaired", "", ""},
		{"not repairable", wire.CodeUnchecked, false, true, "", "read-only", ""},
		{"nothing helps", wire.CodeDisk, false, false, "", "", "first words"},
	} {
		t.Run(c.name, func(t *testing.T) {
			inBubble(t, func(t *testing.T, s *setup) {
				checked := false
				s.prepare = func(m *memMachine) {
					m.maintain = func(disk string, r wire.Maintain) (string, error) {
						if disk != debian.Disk || r.Task != wire.TaskPreen {
							t.Errorf("%s, %+v", disk, r)
						}
						checked = true
						if !c.repairs {
							return "", refuse(wire.CodeDisk)
						}
						return "", nil
					}
					m.startRequest = func(r wire.StartDistro) error {
						if r.Checked != (checked && c.repairs) && !r.ReadOnly {
							t.Errorf("asked for %+v", r)
						}
						if r.Checked || r.ReadOnly && c.readable {
							return nil
						}
						return refuse(c.code)
					}
				}
				for i, want := range []string{c.first + c.every, c.every} {
					l, session, err := s.m.Open(t.Context(), debian, api.VMOptions{}, func(error) {})
					if c.fail != "" {
						if err == nil || !strings.Contains(err.Error(), c.fail) || !strings.Contains(err.Error(), "--repair") {
							t.Errorf("refused with %v", err)
						}
						continue
					}
					if err != nil {
						t.Fatal(err)
					}
					defer l.Release()
					said := strings.Join(session.Notices, "\n")
					if want != "" && !strings.Contains(said, want) || want == "" && said != "" {
						t.Errorf("session %d is told %q, want %q", i, said, want)
					}
				}
			})
		})
	}
}

func TestStartRefused(t *testing.T) {
	inBubble(t, func(t *testing.T, s *setup) {
		s.prepare = func(m *memMachine) {
			m.startFn = func(name string) error {
				if name == "debian" {
					return &GuestError{wire.CodeDisk, "bad superblock"}
				}
				return nil
			}
		}
		_, _, err := s.m.Open(t.Context(), debian, api.VMOptions{}, func(error) {})
		var told *api.Error
		if !errors.As(err, &told) || !strings.Contains(told.Text, "bad superblock") || told.Hint == "" {
			t.Fatal(err)
		}
		if m := s.machine(0); len(m.disks) != 0 {
			t.Fatalf("disks %v", m.disks)
		}
		s.open(t, DistroSpec{Name: "alpine", Disk: "/a"}, nil)
		if s.boots() != 1 {
			t.Fatal("the VM did not survive")
		}
	})
}

func TestTerminate(t *testing.T) {
	inBubble(t, func(t *testing.T, s *setup) {
		if err := s.m.Terminate(t.Context(), "debian"); err != nil {
			t.Fatal(err)
		}
		var told error
		s.open(t, debian, func(err error) { told = err })
		s.machine(0).setBusy("debian", true) // of no matter
		if err := s.m.Terminate(t.Context(), "DEBIAN"); err != nil {
			t.Fatal(err)
		}
		if s.state("debian") != api.StateStopped || told == nil || !strings.Contains(told.Error(), "terminated") || len(s.machine(0).disks) != 0 {
			t.Fatal(s.state("debian"), told, s.machine(0).disks)
		}
		// The guest cannot: the distro runs on and the user is told.
		s.open(t, debian, nil)
		s.machine(0).onStop(func(string) error { return &GuestError{wire.CodeInternal, "umount: busy"} })
		if err := s.m.Terminate(t.Context(), "debian"); err == nil || !strings.Contains(err.Error(), "umount: busy") || !strings.Contains(err.Error(), "--shutdown") {
			t.Fatal(err)
		}
		if got := s.state("debian"); got != api.StateRunning {
			t.Fatal(got)
		}
	})
}

// A guest that does not answer at all loses its VM: nothing else frees the disk.
func TestTerminateSilentGuest(t *testing.T) {
	inBubble(t, func(t *testing.T, s *setup) {
		s.open(t, debian, nil)
		s.machine(0).hang = true
		s.machine(0).onStop(func(string) error { time.Sleep(killAfter); return context.DeadlineExceeded })
		if err := s.m.Terminate(t.Context(), "debian"); err != nil {
			t.Fatal(err)
		}
		if s.m.VM() != nil {
			t.Fatal("the VM lives")
		}
	})
}

func TestDistroExits(t *testing.T) {
	inBubble(t, func(t *testing.T, s *setup) {
		var told error
		s.open(t, debian, func(err error) { told = err })
		other := s.open(t, DistroSpec{Name: "alpine", Disk: "/a"}, func(err error) { t.Errorf("the other distro's session: %v", err) })
		s.machine(0).exitDistro("debian", "init was killed")
		s.machine(0).exitDistro("nosuch", "")
		synctest.Wait()
		other.Release()
		if told == nil || !strings.Contains(told.Error(), "init was killed") || s.state("debian") != api.StateStopped || len(s.machine(0).disks) != 1 {
			t.Fatal(told, s.state("debian"))
		}
		s.open(t, debian, nil)
		if s.machine(0).starts != 3 {
			t.Fatal(s.machine(0).starts)
		}
	})
}

// A distro whose init ends while it is being stopped is stopped, not stuck.
func TestDistroExitsWhileStopping(t *testing.T) {
	inBubble(t, func(t *testing.T, s *setup) {
		s.open(t, debian, nil)
		m := s.machine(0)
		m.onStop(func(name string) error { m.exitDistro(name, "poweroff"); return nil })
		if err := s.m.Terminate(t.Context(), "debian"); err != nil {
			t.Fatal(err)
		}
		if s.state("debian") != api.StateStopped || len(m.disks) != 0 || s.m.VM() == nil {
			t.Fatal(s.state("debian"), m.disks, s.m.VM())
		}
	})
}

// The same before its start has been told.
func TestDistroExitsWhileStarting(t *testing.T) {
	inBubble(t, func(t *testing.T, s *setup) {
		s.prepare = func(m *memMachine) {
			m.startFn = func(name string) error { m.req.DistroExited(name, "init was killed"); return nil }
		}
		told := make(chan error, 1)
		s.m.Open(t.Context(), debian, api.VMOptions{}, func(err error) { told <- err })
		if err := <-told; !strings.Contains(err.Error(), "init was killed") {
			t.Fatal(err)
		}
		synctest.Wait()
		if s.state("debian") != api.StateStopped || len(s.machine(0).disks) != 0 {
			t.Fatal(s.state("debian"), s.machine(0).disks)
		}
	})
}

// A guest that does not say whether a distro runs keeps no disk that is given away.
func TestStartTimesOut(t *testing.T) {
	inBubble(t, func(t *testing.T, s *setup) {
		s.prepare = func(m *memMachine) {
			m.startFn = func(name string) error {
				m.mu.Lock()
				defer m.mu.Unlock()
				m.running[name] = true // it does come up, too late
				return context.DeadlineExceeded
			}
		}
		if _, _, err := s.m.Open(t.Context(), debian, api.VMOptions{}, func(error) {}); err == nil {
			t.Fatal("started")
		}
		m := s.machine(0)
		if len(m.running) != 0 || len(m.disks) != 0 || s.m.VM() == nil {
			t.Fatal(m.running, m.disks, s.m.VM())
		}
		// Nor does one that cannot stop it.
		m.hang = true
		m.onStop(func(string) error { time.Sleep(killAfter); return context.DeadlineExceeded })
		if _, _, err := s.m.Open(t.Context(), debian, api.VMOptions{}, func(error) {}); err == nil {
			t.Fatal("started")
		}
		if s.m.VM() != nil {
			t.Fatal("the VM lives")
		}
	})
}

// A session that waits for the end of a VM must not start another one in a
// service that is shutting down.
func TestRefuse(t *testing.T) {
	inBubble(t, func(t *testing.T, s *setup) {
		s.open(t, debian, nil)
		s.machine(0).hang = true
		go s.m.Shutdown(false)
		synctest.Wait()
		result := make(chan error, 2)
		for _, spec := range []DistroSpec{debian, {Name: "alpine", Disk: "/a"}} {
			go func() {
				_, _, err := s.m.Open(context.Background(), spec, api.VMOptions{}, func(error) {})
				result <- err
			}()
		}
		synctest.Wait()
		s.m.Refuse()
		for range 2 {
			if err := <-result; !errors.Is(err, errClosing) {
				t.Error(err)
			}
		}
		if s.boots() != 1 {
			t.Errorf("%d boots", s.boots())
		}
		_, err := s.m.Import(context.Background(), "x", "/x", wire.SessionID{}, api.VMOptions{}, func(Session) {})
		if !errors.Is(err, errClosing) {
			t.Error(err)
		}
	})
}

func TestShutdown(t *testing.T) {
	inBubble(t, func(t *testing.T, s *setup) {
		s.m.Shutdown(false) // of nothing
		var told error
		s.open(t, debian, func(err error) { told = err })
		s.m.Shutdown(false)
		synctest.Wait()
		if told == nil || s.m.VM() != nil || s.machine(0).exit != nil {
			t.Fatal(told, s.m.VM(), s.machine(0).exit)
		}
		// A guest that hangs is killed after its time, or at once.
		s.open(t, debian, nil)
		s.machine(1).hang = true
		began := time.Now()
		s.m.Shutdown(false)
		if d := time.Since(began); d != killAfter {
			t.Fatalf("killed after %v", d)
		}
		s.open(t, debian, nil)
		s.machine(2).hang = true
		began = time.Now()
		s.m.Shutdown(true)
		if d := time.Since(began); d != 0 || s.machine(2).exit == nil {
			t.Fatalf("killed after %v", d)
		}
		// While it boots.
		s.bootTime = 30 * time.Second
		result := make(chan error, 1)
		go func() {
			_, _, err := s.m.Open(context.Background(), debian, api.VMOptions{}, func(error) {})
			result <- err
		}()
		synctest.Wait()
		s.m.Shutdown(true)
		if err := <-result; err == nil || !strings.Contains(err.Error(), "shut down while it started") {
			t.Fatal(err)
		}
	})
}

// An import that the guest does not give up leaves it no disk to write to.
func TestImportGivenUp(t *testing.T) {
	inBubble(t, func(t *testing.T, s *setup) {
		s.prepare = func(m *memMachine) { m.hang = true }
		ctx, cancel := context.WithCancelCause(context.Background())
		why := errors.New("enough")
		_, err := s.m.Import(ctx, "x", "/x", wire.SessionID{}, api.VMOptions{}, func(Session) { cancel(why) })
		if !errors.Is(err, why) || s.m.VM() != nil {
			t.Fatal(err, s.m.VM())
		}
	})
}

func TestOptionsConflict(t *testing.T) {
	inBubble(t, func(t *testing.T, s *setup) {
		tcg := api.VMOptions{Accel: "tcg"}
		l, _, err := s.m.Open(t.Context(), debian, tcg, func(error) {})
		if err != nil || s.machine(0).req.Settings.Accel != "tcg" {
			t.Fatal(err)
		}
		defer l.Release()
		for _, spec := range []DistroSpec{debian, {Name: "alpine", Disk: "/a"}} {
			for _, o := range []api.VMOptions{{Accel: "kvm"}, {Kernel: "/k"}} {
				if _, _, err := s.m.Open(t.Context(), spec, o, func(error) {}); err == nil || !strings.Contains(err.Error(), "--shutdown") {
					t.Errorf("%v: %v", o, err)
				}
			}
			if _, _, err := s.m.Open(t.Context(), spec, tcg, func(error) {}); err != nil {
				t.Error(err)
			}
		}
	})
}

func TestLock(t *testing.T) {
	inBubble(t, func(t *testing.T, s *setup) {
		if err := s.m.Lock("Debian", "being imported"); err != nil {
			t.Fatal(err)
		}
		if err := s.m.Lock("debian", "x"); err == nil || !strings.Contains(err.Error(), "being imported") {
			t.Fatal(err)
		}
		if _, _, err := s.m.Open(t.Context(), debian, api.VMOptions{}, func(error) {}); err == nil || !strings.Contains(err.Error(), "being imported") {
			t.Fatal(err)
		}
		s.m.Unlock("debian")
		s.open(t, debian, nil)
	})
}

func TestTryStopIdle(t *testing.T) {
	inBubble(t, func(t *testing.T, s *setup) {
		l := s.open(t, debian, nil)
		if s.m.TryStopIdle() {
			t.Fatal("stopped under a lease")
		}
		l.Release()
		s.machine(0).setBusy("debian", true)
		if s.m.TryStopIdle() {
			t.Fatal("stopped a distro that runs something")
		}
		s.open(t, debian, nil).Release()
		s.machine(0).setBusy("debian", false)
		if !s.m.TryStopIdle() || s.m.VM() != nil {
			t.Fatal("not stopped")
		}
		if !s.m.TryStopIdle() {
			t.Fatal("nothing is not idle")
		}
		// The next service starts what is asked for now.
		if _, _, err := s.m.Open(t.Context(), debian, api.VMOptions{}, func(error) {}); !errors.Is(err, errClosing) {
			t.Fatal(err)
		}
	})
}
