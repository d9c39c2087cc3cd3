// Package fakevm is a VM for tests of the launcher: in this process, without a
// kernel, but with the sockets and messages of a real one (package wire). Its
// programs are Go functions.
package fakevm

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"strconv"
	"strings"
	"sync"

	"github.com/wsl2/wsl2/internal/wire"
	"github.com/wsl2/wsl2/launcher/vmproc"
)

// VM is one running fake. Its knobs may be set before the request they concern.
type VM struct {
	Config vmproc.Config
	Lock   *os.File

	listener *net.UnixListener
	control  net.Conn
	done     chan struct{}
	term     chan struct{}
	sendMu   sync.Mutex

	mu      sync.Mutex
	exit    error
	ended   bool
	disks   map[int]string    // by slot
	distros map[string]uint32 // port by name
	ports   map[uint32]string // name by port
	busy    map[string]bool   // has background processes
	starts  int               // StartDistro requests that started something
	session map[wire.SessionID]*Session
	archive map[wire.SessionID]chan net.Conn
	conns   map[net.Conn]bool
	hook    Hooks
}

// Hooks change what the fake does.
type Hooks struct {
	// Import replaces reading the archive to its end.
	Import func(archive io.Reader) error
	// Export writes the archive; nil: nothing is written.
	Export func(archive io.Writer) error
	// Maintain does the work on the disk's file; tools is the archive of them.
	Maintain func(disk string, m *wire.Maintain, tools []byte) *wire.Reply
	// StartDistro may fail it.
	StartDistro func(name string) *wire.Reply
	// NoReady keeps /init from becoming ready.
	NoReady bool
	// NoAnswer keeps the guest from answering a session's Start.
	NoAnswer bool
	// Programs are there besides those of this package.
	Programs map[string]Program
	// Accel and Reason are what the VM says of itself.
	Accel, Reason string
}

// Fleet starts VMs and remembers them.
type Fleet struct {
	Hooks Hooks

	mu  sync.Mutex
	vms []*VM
}

// VMs returns those started so far.
func (f *Fleet) VMs() []*VM {
	f.mu.Lock()
	defer f.mu.Unlock()
	return append([]*VM(nil), f.vms...)
}

const firstPort = 5000

// Start starts one; it takes its own reference of the lock.
func (f *Fleet) Start(ctx context.Context, c vmproc.Config, lock *os.File) (*VM, error) {
	v := &VM{Config: c, done: make(chan struct{}), term: make(chan struct{}), disks: map[int]string{}, distros: map[string]uint32{}, ports: map[uint32]string{},
		busy: map[string]bool{}, session: map[wire.SessionID]*Session{}, archive: map[wire.SessionID]chan net.Conn{}, conns: map[net.Conn]bool{}, hook: f.Hooks}
	if v.hook.Accel == "" {
		v.hook.Accel = "kvm"
	}
	for i, d := range c.Disks {
		v.disks[i] = d
	}
	var err error
	if v.listener, err = net.ListenUnix("unix", &net.UnixAddr{Name: c.VsockPath, Net: "unix"}); err != nil {
		return nil, err
	}
	f.mu.Lock()
	f.vms = append(f.vms, v)
	f.mu.Unlock()
	go v.accept()
	if !v.hook.NoReady {
		if v.control, err = net.Dial("unix", fmt.Sprintf("%s_%d", c.VsockPath, wire.PortControl)); err != nil {
			return nil, err
		}
		go v.serveControl()
	}
	return v, nil
}

// End ends the VM; exit as Process.Exit has it.
func (v *VM) End(exit error) {
	v.mu.Lock()
	if v.ended {
		v.mu.Unlock()
		return
	}
	v.ended, v.exit = true, exit
	conns := v.conns
	v.conns = nil
	v.mu.Unlock()
	v.listener.Close()
	if v.control != nil {
		v.control.Close() // first: nothing is said any more, not even why a program ends
	}
	for c := range conns {
		c.Close()
	}
	close(v.done)
}

// The methods of service.Process.

// Kill ends it.
func (v *VM) Kill() { v.End(&vmproc.ExitError{Reason: "killed"}) }

// Terminated is closed by Term.
func (v *VM) Terminated() <-chan struct{} { return v.term }

// Term is SIGTERM to its process. It must be called once at most.
func (v *VM) Term() { close(v.term) }

// Done is closed at the end.
func (v *VM) Done() <-chan struct{} { return v.done }

// Exit says how it ended.
func (v *VM) Exit() error { return v.exit }

// Started describes it.
func (v *VM) Started() vmproc.Started {
	return vmproc.Started{PID: os.Getpid(), Accel: v.hook.Accel, AccelReason: v.hook.Reason}
}

// Attach takes the lowest free slot.
func (v *VM) Attach(ctx context.Context, path string) (int, error) {
	v.mu.Lock()
	defer v.mu.Unlock()
	if v.ended {
		return 0, vmproc.ErrEnded
	}
	for slot := range v.Config.DiskSlots {
		if v.disks[slot] == "" {
			v.disks[slot] = path
			return slot, nil
		}
	}
	return 0, errors.New("no free slot")
}

// Detach frees a slot.
func (v *VM) Detach(ctx context.Context, slot int) error {
	v.mu.Lock()
	defer v.mu.Unlock()
	if v.ended {
		return vmproc.ErrEnded
	}
	if v.disks[slot] == "" {
		return fmt.Errorf("slot %d holds no disk", slot)
	}
	delete(v.disks, slot)
	return nil
}

// Disks returns how many disks are attached.
func (v *VM) Disks() int {
	v.mu.Lock()
	defer v.mu.Unlock()
	return len(v.disks)
}

// Starts returns how many distros were started.
func (v *VM) Starts() int {
	v.mu.Lock()
	defer v.mu.Unlock()
	return v.starts
}

// SetBusy says whether a distro has background processes.
func (v *VM) SetBusy(name string, busy bool) {
	v.mu.Lock()
	v.busy[name] = busy
	v.mu.Unlock()
	if !busy {
		v.send(&wire.DistroIdle{Name: name})
	}
}

// ExitDistro lets a distro's init end.
func (v *VM) ExitDistro(name, text string) { v.send(&wire.DistroExited{Name: name, Text: text}) }

// LoseControl closes the control channel only.
func (v *VM) LoseControl() { v.control.Close() }

// Sessions returns how many sessions run.
func (v *VM) Sessions() int {
	v.mu.Lock()
	defer v.mu.Unlock()
	return len(v.session)
}

func (v *VM) send(m wire.Message) {
	v.sendMu.Lock()
	defer v.sendMu.Unlock()
	wire.Write(v.control, m)
}

func (v *VM) serveControl() {
	v.send(&wire.Ready{Version: wire.Version, KernelRelease: "6.12.0-fake"})
	r := bufio.NewReader(v.control)
	for {
		m, err := wire.Read(r)
		if err != nil {
			return
		}
		switch m := m.(type) {
		case *wire.StartDistro:
			v.send(v.startDistro(m))
		case *wire.StopDistro:
			v.send(v.stopDistro(m))
		case *wire.Import:
			go v.importArchive(m)
		case *wire.Export:
			go v.exportArchive(m)
		case *wire.Maintain:
			go v.maintain(m)
		case *wire.MountDisk:
			v.send(&wire.Reply{ID: m.ID, Text: "/mnt/wsl/" + m.Name})
		case *wire.ReleaseDisk:
			v.send(&wire.Reply{ID: m.ID})
		case *wire.SwapOn:
			v.send(&wire.Reply{ID: m.ID})
		case *wire.Shutdown:
			v.End(nil)
			return
		}
	}
}

func (v *VM) startDistro(m *wire.StartDistro) *wire.Reply {
	if v.hook.StartDistro != nil {
		if r := v.hook.StartDistro(m.Name); r != nil {
			r.ID = m.ID
			return r
		}
	}
	v.mu.Lock()
	defer v.mu.Unlock()
	if m.Slot >= 0 && v.disks[int(m.Slot)] == "" {
		return &wire.Reply{ID: m.ID, Code: wire.CodeDisk, Text: fmt.Sprintf("no disk in slot %d", m.Slot)}
	}
	port, ok := v.distros[m.Name]
	if !ok {
		v.starts++
		port = firstPort + uint32(v.starts)
		v.distros[m.Name], v.ports[port] = port, m.Name
	}
	return &wire.Reply{ID: m.ID, Port: port}
}

func (v *VM) stopDistro(m *wire.StopDistro) *wire.Reply {
	v.mu.Lock()
	defer v.mu.Unlock()
	if m.IfIdle && v.busy[m.Name] {
		return &wire.Reply{ID: m.ID, Code: wire.CodeBusy, Text: "processes run"}
	}
	for _, s := range v.session {
		if s.distro == m.Name {
			s.kill(15)
		}
	}
	delete(v.ports, v.distros[m.Name])
	delete(v.distros, m.Name)
	return &wire.Reply{ID: m.ID}
}

func (v *VM) importArchive(m *wire.Import) {
	v.withArchive(m.ID, m.Slot, m.Archive, func(_ string, c net.Conn) *wire.Reply {
		read := v.hook.Import
		if read == nil {
			read = func(r io.Reader) error { _, err := io.Copy(io.Discard, r); return err }
		}
		if err := read(c); err != nil {
			return &wire.Reply{Code: wire.CodeArchive, Text: err.Error()}
		}
		return &wire.Reply{}
	})
}

func (v *VM) exportArchive(m *wire.Export) {
	v.withArchive(m.ID, m.Slot, m.Archive, func(_ string, c net.Conn) *wire.Reply {
		if v.hook.Export != nil {
			if err := v.hook.Export(c); err != nil {
				return &wire.Reply{Code: wire.CodeDisk, Text: err.Error()}
			}
		}
		if h, ok := c.(interface{ CloseWrite() error }); ok {
			h.CloseWrite()
		}
		io.Copy(io.Discard, c)
		return &wire.Reply{}
	})
}

func (v *VM) maintain(m *wire.Maintain) {
	work := func(disk string, c net.Conn) *wire.Reply {
		var tools []byte
		if c != nil {
			tools, _ = io.ReadAll(c)
		}
		if v.hook.Maintain == nil {
			return &wire.Reply{}
		}
		return v.hook.Maintain(disk, m, tools)
	}
	if m.Task.NeedsTools() {
		v.withArchive(m.ID, m.Slot, m.Archive, work)
		return
	}
	v.mu.Lock()
	disk := v.disks[int(m.Slot)]
	v.mu.Unlock()
	r := work(disk, nil)
	r.ID = m.ID
	v.send(r)
}

// withArchive waits for a request's connection, works, and replies.
func (v *VM) withArchive(id uint32, slot int32, archive wire.SessionID, work func(disk string, c net.Conn) *wire.Reply) {
	ch := make(chan net.Conn, 1)
	v.mu.Lock()
	v.archive[archive] = ch
	disk := v.disks[int(slot)]
	v.mu.Unlock()
	if disk == "" {
		v.send(&wire.Reply{ID: id, Code: wire.CodeDisk, Text: "no disk"})
		return
	}
	v.send(&wire.ImportReady{ID: id, Port: firstPort})
	select {
	case c := <-ch:
		reply := work(disk, c)
		c.Close()
		reply.ID = id
		v.send(reply)
	case <-v.done:
	}
}

func (v *VM) accept() {
	for {
		c, err := v.listener.Accept()
		if err != nil {
			return
		}
		v.mu.Lock()
		if v.ended {
			v.mu.Unlock()
			c.Close()
			return
		}
		v.conns[c] = true
		v.mu.Unlock()
		go v.serve(c.(*net.UnixConn))
	}
}

// serve is what the VMM and a distro's init do with one connection.
func (v *VM) serve(c *net.UnixConn) {
	r := bufio.NewReader(c)
	line, err := r.ReadString('\n')
	var port uint32
	if err == nil {
		_, err = fmt.Sscanf(line, "CONNECT %d\n", &port)
	}
	v.mu.Lock()
	name := v.ports[port]
	v.mu.Unlock()
	if err != nil || name == "" && port != firstPort {
		c.Close()
		return
	}
	fmt.Fprintf(c, "OK %d\n", port)
	m, err := wire.Read(r)
	hello, ok := m.(*wire.Hello)
	if err != nil || !ok {
		c.Close()
		return
	}
	conn := &bufConn{UnixConn: c, r: r}
	if hello.Role == wire.RoleArchive {
		v.mu.Lock()
		ch := v.archive[hello.Session]
		delete(v.archive, hello.Session)
		v.mu.Unlock()
		if ch != nil {
			ch <- conn
		}
		return
	}
	v.mu.Lock()
	s := v.session[hello.Session]
	if s == nil {
		s = &Session{vm: v, id: hello.Session, distro: name, streams: map[wire.Role]*bufConn{}, signals: make(chan uint8, 16), sizes: make(chan wire.WindowSize, 16), hup: make(chan struct{})}
		v.session[hello.Session] = s
	}
	v.mu.Unlock()
	s.add(hello.Role, conn)
}

// bufConn reads what the bufio.Reader has first.
type bufConn struct {
	*net.UnixConn
	r *bufio.Reader
}

func (b *bufConn) Read(p []byte) (int, error) { return b.r.Read(p) }

// Session is a program under way, as the guest sees it.
type Session struct {
	vm      *VM
	id      wire.SessionID
	distro  string
	signals chan uint8
	sizes   chan wire.WindowSize
	hup     chan struct{} // closed when the client is gone

	mu      sync.Mutex
	streams map[wire.Role]*bufConn
	start   *wire.Start
	n       [8]uint64 // bytes written, by role
	over    bool
	sendMu  sync.Mutex
}

func (s *Session) add(role wire.Role, c *bufConn) {
	if role == wire.RoleControl {
		m, err := wire.Read(c)
		start, ok := m.(*wire.Start)
		if err != nil || !ok {
			c.Close()
			return
		}
		s.mu.Lock()
		s.start = start
		s.mu.Unlock()
		go s.readControl(c)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.streams[role] = c
	if s.start == nil {
		return
	}
	for _, x := range []struct {
		bit  wire.Streams
		role wire.Role
	}{{wire.StreamStdin, wire.RoleStdin}, {wire.StreamStdout, wire.RoleStdout}, {wire.StreamStderr, wire.RoleStderr}, {wire.StreamPTY, wire.RolePTY}} {
		if s.start.Streams&x.bit != 0 && s.streams[x.role] == nil {
			return
		}
	}
	if s.streams[wire.RoleControl] != nil {
		go s.run()
	}
}

func (s *Session) readControl(c *bufConn) {
	for {
		m, err := wire.Read(c)
		if err != nil {
			close(s.hup)
			return
		}
		switch m := m.(type) {
		case *wire.Signal:
			s.signals <- m.Number
		case *wire.Resize:
			s.sizes <- m.Size
		}
	}
}

func (s *Session) send(m wire.Message) {
	s.sendMu.Lock()
	defer s.sendMu.Unlock()
	wire.Write(s.streams[wire.RoleControl], m)
}

// kill ends it from outside. Preconditions: vm.mu is held.
func (s *Session) kill(sig uint8) {
	select {
	case s.signals <- sig:
	default:
	}
}

// HangUp is closed when the client is gone.
func (s *Session) HangUp() <-chan struct{} { return s.hup }

// Signals are those that the client sends.
func (s *Session) Signals() <-chan uint8 { return s.signals }

// Start is what the client asked for.
func (s *Session) Start() *wire.Start { return s.start }

// Write writes to a stream: the session's own, else the terminal, else nowhere.
func (s *Session) Write(role wire.Role, p []byte) error {
	c := s.streams[role]
	if c == nil {
		role = wire.RolePTY
		if c = s.streams[role]; c == nil {
			return nil
		}
	}
	n, err := c.Write(p)
	s.n[role] += uint64(n)
	return err
}

// Stdin is the program's.
func (s *Session) Stdin() io.Reader {
	if c := s.streams[wire.RoleStdin]; c != nil {
		return c
	}
	if c := s.streams[wire.RolePTY]; c != nil {
		return c
	}
	return strings.NewReader("")
}

// Terminal is what is typed; the session has a terminal.
func (s *Session) Terminal() io.Reader { return s.streams[wire.RolePTY] }

// run runs the program that Argv names.
func (s *Session) run() {
	defer func() {
		s.vm.mu.Lock()
		delete(s.vm.session, s.id)
		s.vm.mu.Unlock()
	}()
	argv := s.start.Argv
	if len(argv) == 0 {
		argv = []string{"shell"}
	}
	program := s.vm.hook.Programs[argv[0]]
	if program == nil {
		program = programs[argv[0]]
	}
	if program == nil {
		s.send(&wire.Failed{Code: wire.CodeNotFound, Text: argv[0] + ": not found"})
		return
	}
	if s.vm.hook.NoAnswer {
		return
	}
	s.send(&wire.Started{PID: 42})
	status, sig := program(s, argv[1:])
	s.vm.mu.Lock()
	ended := s.vm.ended
	s.vm.mu.Unlock()
	if ended { // it cannot tell any more
		return
	}
	s.send(&wire.Exited{Status: status, Signal: sig,
		StdoutBytes: s.n[wire.RoleStdout], StderrBytes: s.n[wire.RoleStderr], PTYBytes: s.n[wire.RolePTY]})
	for role, c := range s.streams {
		if role != wire.RoleControl && role != wire.RoleStdin {
			c.CloseWrite()
		}
	}
}

// Program is a guest program: it returns its status or the signal that ended it.
type Program func(s *Session, args []string) (status, signal uint8)

var programs = map[string]Program{
	"true": func(*Session, []string) (uint8, uint8) { return 0, 0 },
	"exit": func(s *Session, args []string) (uint8, uint8) { return number(args), 0 },
	"die":  func(s *Session, args []string) (uint8, uint8) { return 0, number(args) },
	"echo": func(s *Session, args []string) (uint8, uint8) {
		s.Write(wire.RoleStdout, []byte(strings.Join(args, " ")+"\n"))
		return 0, 0
	},
	"both": func(s *Session, args []string) (uint8, uint8) {
		s.Write(wire.RoleStdout, []byte("out\n"))
		s.Write(wire.RoleStderr, []byte("err\n"))
		return 0, 0
	},
	// cat copies stdin to stdout.
	"cat": func(s *Session, args []string) (uint8, uint8) {
		buf := make([]byte, 64<<10)
		in := s.Stdin()
		for {
			n, err := in.Read(buf)
			if n > 0 {
				if s.Write(wire.RoleStdout, buf[:n]) != nil {
					return 0, 13
				}
			}
			if err != nil {
				return 0, 0
			}
		}
	},
	// yes writes until nobody reads.
	"yes": func(s *Session, args []string) (uint8, uint8) {
		buf := []byte(strings.Repeat("y\n", 4096))
		for s.Write(wire.RoleStdout, buf) == nil {
		}
		return 0, 13
	},
	// wait says that it runs and waits for a signal or a hang-up.
	"wait": func(s *Session, args []string) (uint8, uint8) {
		s.Write(wire.RoleStdout, []byte("waiting\n"))
		select {
		case sig := <-s.signals:
			return 0, sig
		case <-s.hup:
			return 0, 1
		}
	},
	// size reports the terminal's size and each new one, up to a signal.
	"size": func(s *Session, args []string) (uint8, uint8) {
		size := s.start.Size
		for {
			s.Write(wire.RolePTY, fmt.Appendf(nil, "%dx%d\r\n", size.Cols, size.Rows))
			select {
			case size = <-s.sizes:
			case sig := <-s.signals:
				return 0, sig
			case <-s.hup:
				return 0, 1
			}
		}
	},
	// env prints what came with Start.
	"env": func(s *Session, args []string) (uint8, uint8) {
		s.Write(wire.RoleStdout, fmt.Appendf(nil, "user=%s cwd=%s shell=%d streams=%d\n%s\n", s.start.User, s.start.Cwd, s.start.Shell, s.start.Streams, strings.Join(s.start.Env, "\n")))
		return 0, 0
	},
	// shell echoes lines of the terminal until "exit".
	"shell": func(s *Session, args []string) (uint8, uint8) {
		s.Write(wire.RolePTY, []byte("$ "))
		in := bufio.NewReader(s.Stdin())
		for {
			line, err := in.ReadString('\r')
			if err != nil {
				return 0, 1
			}
			if rest, ok := strings.CutPrefix(strings.TrimSpace(line), "exit "); ok {
				return number([]string{rest}), 0
			}
			s.Write(wire.RolePTY, []byte("got "+strings.TrimSpace(line)+"\r\n$ "))
		}
	},
}

func number(args []string) uint8 {
	if len(args) == 0 {
		return 0
	}
	n, _ := strconv.Atoi(args[0])
	return uint8(n)
}
