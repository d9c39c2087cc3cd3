package vmproc

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/wsl2/wsl2/launcher/internal/spawn"
)

// Process is a running `wsl2 vm`, seen from the service.
type Process struct {
	started Started // immutable after Start

	conn      net.Conn
	diskError func(slot int, err error)

	kill     func() // SIGKILL, harmless after the end; immutable
	killOnce sync.Once

	writeMu sync.Mutex // serialises requests
	enc     *json.Encoder

	mu      sync.Mutex
	nextID  uint64                  // guarded by mu
	pending map[uint64]chan message // guarded by mu

	first chan message  // capacity 1: started or failed
	term  chan struct{} // closed when the process was sent SIGTERM
	done  chan struct{} // closed when the process has ended
	exit  error         // set before done is closed
}

// diskError is an error of a disk's file; that of a full host is ENOSPC still.
type diskError struct {
	text string
	full bool
}

func (e *diskError) Error() string { return e.text }

// Is makes it comparable to ENOSPC.
func (e *diskError) Is(target error) bool { return e.full && target == unix.ENOSPC }

// ErrEnded says that the VM's process has ended.
var ErrEnded = errors.New("the VM has ended")

// Started describes a VM that runs.
type Started struct {
	PID         int
	Accel       string // kvm or tcg
	AccelReason string // why tcg, if KVM is unusable
}

// Started describes the VM.
func (p *Process) Started() Started { return p.started }

// Terminated is closed when somebody sent the process SIGTERM: its guest is to power off.
func (p *Process) Terminated() <-chan struct{} { return p.term }

// Command is how to run `wsl2 vm`: the executable and its arguments.
type Command struct {
	Path string
	Args []string // from argv[1]
	Env  []string // nil: ours
}

// Start runs the process and returns when its vCPUs run. lock is inherited;
// logFile receives its stderr. diskError is told of I/O errors of disks; it must
// not block. ctx bounds the start.
func Start(ctx context.Context, command Command, c Config, lock, logFile *os.File, diskError func(slot int, err error)) (*Process, error) {
	config, err := json.Marshal(c)
	if err != nil {
		return nil, err
	}
	// A memfd holds it all at once: nobody has to write while the child reads.
	fd, err := unix.MemfdCreate("wsl2-vm-config", unix.MFD_CLOEXEC)
	if err != nil {
		return nil, os.NewSyscallError("memfd_create", err)
	}
	cf := os.NewFile(uintptr(fd), "config")
	defer cf.Close()
	if _, err := cf.Write(config); err != nil {
		return nil, err
	}
	if _, err := cf.Seek(0, 0); err != nil {
		return nil, err
	}
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, os.NewSyscallError("socketpair", err)
	}
	ours, theirs := os.NewFile(uintptr(pair[0]), "control"), os.NewFile(uintptr(pair[1]), "control")
	defer theirs.Close() // for the ways out before it is closed below
	conn, err := net.FileConn(ours)
	ours.Close()
	if err != nil {
		return nil, err
	}
	child, err := spawn.Start(spawn.Command{
		Path: command.Path, Args: command.Args, Env: command.Env,
		Output: logFile, Files: []*os.File{cf, theirs, lock}, Attr: &syscall.SysProcAttr{Setpgid: true},
	})
	if err != nil {
		conn.Close()
		return nil, fmt.Errorf("start the VM's process: %w", err)
	}
	theirs.Close() // or its end would not be seen while we wait for the start
	p := newProcess(conn, diskError, child.Wait, child.Kill)
	p.started.PID = child.PID()
	return p.awaitStart(ctx)
}

// newProcess speaks with the process at the other end of conn; wait returns
// when it has ended, kill makes it end.
func newProcess(conn net.Conn, diskError func(int, error), wait func() error, kill func()) *Process {
	p := &Process{conn: conn, diskError: diskError, kill: kill, enc: json.NewEncoder(conn), pending: map[uint64]chan message{},
		first: make(chan message, 1), term: make(chan struct{}), done: make(chan struct{})}
	go p.read(wait)
	return p
}

// awaitStart waits for the first event and kills the process if ctx ends first.
func (p *Process) awaitStart(ctx context.Context) (*Process, error) {
	select {
	case m := <-p.first:
		return p.onStart(m)
	case <-p.done:
		select {
		case m := <-p.first: // it was told just before the end
			return p.onStart(m)
		default:
		}
		return nil, p.exit
	case <-ctx.Done():
		p.kill()
		<-p.done
		return nil, context.Cause(ctx)
	}
}

func (p *Process) onStart(m message) (*Process, error) {
	if m.Event == eventFailed {
		<-p.done
		return nil, &ExitError{Reason: m.Error, Tail: m.Tail}
	}
	p.started.Accel, p.started.AccelReason = m.Accel, m.Reason
	return p, nil
}

// read handles what the process says until it has ended.
func (p *Process) read(wait func() error) {
	in := json.NewDecoder(p.conn)
	var exit error
	reported := false
	for {
		var m message
		if err := in.Decode(&m); err != nil {
			break
		}
		switch {
		case m.ID != 0:
			p.mu.Lock()
			answer := p.pending[m.ID]
			delete(p.pending, m.ID)
			p.mu.Unlock()
			if answer != nil {
				answer <- m
			}
		case m.Event == eventStarted, m.Event == eventFailed:
			select {
			case p.first <- m:
			default:
			}
		case m.Event == eventTerm:
			select {
			case <-p.term: // once more
			default:
				close(p.term)
			}
		case m.Event == eventDiskError:
			p.diskError(m.Slot, &diskError{m.Error, m.Full})
		case m.Event == eventExit:
			reported = true
			if m.Error != "" {
				exit = &ExitError{Reason: m.Error, Tail: m.Tail}
			}
		}
	}
	err := wait()
	p.conn.Close()
	if !reported {
		if err == nil {
			err = errors.New("it exited without a report")
		}
		exit = &ExitError{Reason: fmt.Sprintf("its process died: %v", err)}
	}
	p.exit = exit
	close(p.done)
}

func (p *Process) send(r request) error {
	p.writeMu.Lock()
	defer p.writeMu.Unlock()
	if err := p.enc.Encode(r); err != nil {
		return ErrEnded
	}
	return nil
}

func (p *Process) request(ctx context.Context, r request) (message, error) {
	answer := make(chan message, 1)
	p.mu.Lock()
	p.nextID++
	r.ID = p.nextID
	p.pending[r.ID] = answer
	p.mu.Unlock()
	defer func() {
		p.mu.Lock()
		delete(p.pending, r.ID)
		p.mu.Unlock()
	}()
	if err := p.send(r); err != nil {
		return message{}, err
	}
	select {
	case m := <-answer:
		if m.Error != "" {
			return m, errors.New(m.Error)
		}
		return m, nil
	case <-p.done:
		return message{}, ErrEnded
	case <-ctx.Done():
		return message{}, context.Cause(ctx)
	}
}

// Attach gives the VM a disk and returns its slot.
func (p *Process) Attach(ctx context.Context, path string) (int, error) {
	m, err := p.request(ctx, request{Op: opAttach, Path: path})
	return m.Slot, err
}

// Detach takes the disk of slot away.
func (p *Process) Detach(ctx context.Context, slot int) error {
	_, err := p.request(ctx, request{Op: opDetach, Slot: slot})
	return err
}

// killWait is what the process gets to end after Kill; freeing a large VM's
// memory takes part of a second.
const killWait = 10 * time.Second

// Kill ends the VM without asking the guest. A process that does not even do
// that is killed itself.
func (p *Process) Kill() {
	p.killOnce.Do(func() {
		p.conn.SetWriteDeadline(time.Now().Add(killWait)) // also for who is writing now
		go func() {
			if p.send(request{Op: opKill}) == nil {
				t := time.NewTimer(killWait)
				defer t.Stop()
				select {
				case <-p.done:
					return
				case <-t.C:
				}
			}
			p.kill()
		}()
	})
}

// Done is closed when the process has ended.
func (p *Process) Done() <-chan struct{} { return p.done }

// Exit says how the VM ended, after Done: nil if the guest powered off, else an
// *ExitError.
func (p *Process) Exit() error { return p.exit }
