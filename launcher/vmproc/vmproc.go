// Package vmproc keeps the VM in a process of its own (`wsl2 vm`): both ends of
// what the service and that process say to each other.
//
// The process gets its Config as JSON on descriptor 3, a control socket on 4
// and on 5 the file whose flock says that disks are in use; the lock is held as
// long as any process has that file open, hence to the end of this one, however it ends.
//
// On the control socket each side sends JSON values:
//
//	service                        vm
//	   <-------- {event: started, accel, reason}
//	  {id, op: attach, path} ------>
//	   <--------------- {id, slot | error}
//	  {id, op: detach, slot} ------>
//	   <----------------------- {id | error}
//	  {op: kill} ------------------>
//	   <-------- {event: disk-error, slot, error}
//	   <------------------------- {event: term}
//	   <-------- {event: exit, reason, detail, tail}
//
// # When the service dies
//
// The control socket ends and, with the service's other sockets, the guest's
// control channel: /init then stops its distros, unmounts and powers off. This
// process waits orphanGrace for that and kills the VM if it does not happen; what
// the guest had not written by then is what a power failure would lose, and
// ext4's journal makes the file system consistent at the next mount. Meanwhile
// the lock keeps a new service from opening the same disks.
package vmproc

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/signal"
	"runtime"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// Config is what a VM is made of.
type Config struct {
	Accel       string // auto, kvm or tcg
	Kernel      string
	Initramfs   string
	Cmdline     string
	MemoryBytes uint64
	CPUs        int
	Disks       []string // attached from the start, in slots from 0
	DiskSlots   int
	LateSlots   bool
	GuestCID    uint64
	VsockPath   string
	ConsoleLog  string   // file; replaced
	Verdict     string   // file; vmm.Config.Verdict
	Network     []string // arguments of the network's process (netproc.Config.Args); nil without a network
}

// Machine is what this package needs of package vmm.
type Machine interface {
	Start(ctx context.Context) error
	// Wait returns when the machine has ended; nil means that the guest
	// powered off.
	Wait(ctx context.Context) error
	Kill()
	AttachDisk(ctx context.Context, path string) (slot int, err error)
	DetachDisk(ctx context.Context, slot int) error
	// Accel says what runs the guest, kvm or tcg, and if it is tcg because KVM
	// is unusable, why; valid after Start.
	Accel() (name, reason string)
	ConsoleTail() string
}

// NewMachine makes a Machine; console receives what the kernel prints and
// diskError is called when a disk's host file fails.
type NewMachine func(c Config, console io.Writer, diskError func(slot int, err error)) (Machine, error)

// Descriptors of the process.
const (
	fdConfig  = 3
	fdControl = 4
)

// busyDevices is how many devices are usually busy at a time: vsock, the disks of
// a distro or two, and one to spare.
const busyDevices = 4

// orphanGrace is how long the guest has to power off after the service died.
const orphanGrace = 15 * time.Second

// request is what the service asks.
type request struct {
	ID   uint64 `json:"id,omitempty"`
	Op   string `json:"op"`
	Path string `json:"path,omitempty"`
	Slot int    `json:"slot,omitempty"`
}

// message is what the process says: an answer if ID is set, else an event.
type message struct {
	ID     uint64 `json:"id,omitempty"`
	Event  string `json:"event,omitempty"`
	Slot   int    `json:"slot"`
	Error  string `json:"error,omitempty"`
	Full   bool   `json:"full,omitempty"` // the error is that of a full host (ENOSPC)
	Accel  string `json:"accel,omitempty"`
	Reason string `json:"reason,omitempty"`
	Tail   string `json:"tail,omitempty"`
}

const (
	opAttach = "attach"
	opDetach = "detach"
	opKill   = "kill"

	eventStarted   = "started"
	eventFailed    = "failed" // before started: the VM could not be started
	eventExit      = "exit"
	eventDiskError = "disk-error"
	eventTerm      = "term" // SIGTERM: the guest is to power off
)

// Main is the `wsl2 vm` process. It returns when the VM has ended.
func Main(newMachine NewMachine) error {
	var c Config
	f := os.NewFile(fdConfig, "config")
	err := json.NewDecoder(f).Decode(&c)
	f.Close()
	if err != nil {
		return fmt.Errorf("`wsl2 vm` is run by `wsl2 service`, not by hand (%w)", err)
	}
	// Threads that wait in the kernel, one for each vCPU and for each device that is
	// busy, take the runtime's processors with them. Where none is left to spare,
	// its monitor takes turns with the guest to find some, every 20 µs.
	runtime.GOMAXPROCS(runtime.GOMAXPROCS(0) + c.CPUs + busyDevices)
	cf := os.NewFile(fdControl, "control")
	conn, err := net.FileConn(cf)
	cf.Close()
	if err != nil {
		return err
	}
	defer conn.Close()
	unix.CloseOnExec(fdControl + 1) // children do not hold the lock longer than we
	console, err := newConsoleLog(c.ConsoleLog)
	if err != nil {
		return err
	}
	defer console.Close()
	// The service ends the VM; a hang-up or Ctrl-C in some terminal does not.
	signal.Ignore(unix.SIGHUP, unix.SIGINT)
	ctx, stop := signal.NotifyContext(context.Background(), unix.SIGTERM)
	defer stop()
	return serve(ctx, c, conn, console, newMachine, orphanGrace)
}

// sender serialises messages to the service. Once the service is gone they are
// dropped.
type sender struct {
	mu  sync.Mutex
	enc *json.Encoder
}

func (s *sender) send(m message) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.enc.Encode(m)
}

// serve runs the VM for the service at the other end of conn. At ctx's end the service
// is asked to have the guest power off, as also at the host's shutdown, when both get
// SIGTERM at once. grace is how long the guest may take without the service.
func serve(ctx context.Context, c Config, conn net.Conn, console io.Writer, newMachine NewMachine, grace time.Duration) error {
	out := &sender{enc: json.NewEncoder(conn)}
	fail := func(err error, tail string) error {
		out.send(message{Event: eventFailed, Error: err.Error(), Tail: tail})
		return err
	}
	m, err := newMachine(c, console, func(slot int, err error) {
		out.send(message{Event: eventDiskError, Slot: slot, Error: err.Error(), Full: errors.Is(err, unix.ENOSPC)})
	})
	if err != nil {
		return fail(err, "")
	}
	if err := m.Start(ctx); err != nil {
		return fail(err, m.ConsoleTail())
	}
	accel, reason := m.Accel()
	out.send(message{Event: eventStarted, Accel: accel, Reason: reason})

	ended := make(chan error, 1)
	go func() { ended <- m.Wait(context.Background()) }()
	orphaned := make(chan struct{})
	var requests sync.WaitGroup
	requests.Go(func() {
		defer close(orphaned)
		work, cancel := context.WithCancel(context.Background())
		defer cancel()
		in := json.NewDecoder(conn)
		for {
			var r request
			if in.Decode(&r) != nil {
				return
			}
			if r.Op == opKill {
				m.Kill()
				continue
			}
			// Attaching waits for the guest; requests do not wait for each other.
			requests.Go(func() { out.send(handle(work, m, r)) })
		}
	})

	term := context.AfterFunc(ctx, func() { out.send(message{Event: eventTerm}) })
	defer term()
	var exit error
	select {
	case exit = <-ended:
	case <-orphaned:
		t := time.NewTimer(grace)
		select {
		case exit = <-ended:
		case <-t.C:
			m.Kill()
			exit = <-ended
		}
		t.Stop()
	}
	e := message{Event: eventExit}
	if exit != nil {
		e.Error, e.Tail = exit.Error(), m.ConsoleTail()
	}
	out.send(e)
	conn.Close() // ends the reader
	requests.Wait()
	return nil
}

func handle(ctx context.Context, m Machine, r request) message {
	answer := message{ID: r.ID}
	var err error
	switch r.Op {
	case opAttach:
		answer.Slot, err = m.AttachDisk(ctx, r.Path)
	case opDetach:
		err = m.DetachDisk(ctx, r.Slot)
	default:
		err = fmt.Errorf("unknown operation %q", r.Op)
	}
	if err != nil {
		answer.Error = err.Error()
	}
	return answer
}

// maxConsoleLog bounds the log of a guest that prints without end: it begins anew
// then. The log of the VM before is kept under the name with ".1".
const maxConsoleLog = 4 << 20

type consoleLog struct {
	path string
	f    *os.File
	n    int
}

func newConsoleLog(path string) (*consoleLog, error) {
	if path == "" {
		return nil, errors.New("no path for the console's log")
	}
	os.Rename(path, path+".1")
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return nil, err
	}
	return &consoleLog{path: path, f: f}, nil
}

// Write never fails: a full disk must not stop the guest.
func (l *consoleLog) Write(p []byte) (int, error) {
	if l.n+len(p) > maxConsoleLog {
		l.f.Truncate(0)
		l.f.Seek(0, io.SeekStart)
		l.n = 0
	}
	n, _ := l.f.Write(p)
	l.n += n
	return len(p), nil
}

func (l *consoleLog) Close() error { return l.f.Close() }

// ExitError says why a VM ended that was not meant to, or could not start.
type ExitError struct {
	Reason string
	Tail   string // the last lines of its kernel
}

// tailLines is how many lines of the kernel's log an error shows: the last, or
// those from where it panicked.
const tailLines = 12

func (e *ExitError) Error() string {
	tail := strings.TrimRight(e.Tail, "\n")
	if tail == "" {
		return e.Reason
	}
	lines := strings.Split(tail, "\n")
	// A panic's first line says why, and a long trace follows it.
	for i, l := range lines {
		if strings.Contains(l, "Kernel panic") {
			lines = lines[max(i-2, 0):]
			lines = lines[:min(len(lines), tailLines)]
			break
		}
	}
	if len(lines) > tailLines {
		lines = lines[len(lines)-tailLines:]
	}
	return e.Reason + "\nlast lines of its kernel:\n  " + strings.Join(lines, "\n  ")
}
