// Package hostexec is the guest's side of programs of the host: the process that
// stands in the guest for one, in its own streams and terminal.
//
// It asks the distro's init (package session, interop.go), which has the launcher
// open the connections of a session and hands them over. See wire.HostExec.
package hostexec

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"os"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/wsl2/wsl2/guest/session"
	"github.com/wsl2/wsl2/internal/console"
	"github.com/wsl2/wsl2/internal/hostpath"
	"github.com/wsl2/wsl2/internal/wire"
	"github.com/wsl2/wsl2/internal/wslenv"
)

// answerWait bounds the wait for the launcher to open the connections.
const answerWait = time.Minute

// Run runs argv on the host in this process's streams and returns the exit
// status. Errors are told on stderr. shares are the distro's.
func Run(argv []string, shares hostpath.Table) int {
	status, err := run(argv, shares)
	if err != nil {
		fmt.Fprintf(os.Stderr, "host-exec: %v\n", err)
	}
	return status
}

func run(argv []string, shares hostpath.Table) (int, error) {
	c, err := dial(os.Getenv("WSL_INTEROP"))
	if err != nil {
		return console.StatusFailed, err
	}
	defer c.Close()
	if _, err := c.Write([]byte{session.AskProgram}); err != nil {
		return console.StatusFailed, err
	}
	dir, err := os.Getwd()
	if err != nil {
		dir = "" // it has been removed, perhaps; the host chooses another
	}
	start := wire.Start{Shell: wire.ShellNone, Argv: argv, Cwd: dir,
		Env: wslenv.Select(os.Getenv("WSLENV"), os.Environ(), wslenv.ToHost, shares.ToHost)}
	s := console.Session{Peer: &peer{c: c}, Stdio: console.Stdio{In: os.Stdin, Out: os.Stdout, Err: os.Stderr}}
	return s.Run(start, environ)
}

// environ is what a program takes over from the guest beside WSLENV: what
// describes the terminal.
func environ(terminal bool) (env []string) {
	if terminal {
		for _, name := range []string{"TERM", "COLORTERM"} {
			if v := os.Getenv(name); v != "" {
				env = append(env, name+"="+v)
			}
		}
	}
	return env
}

// dial connects to the session's socket, or, for a process that has outlived its
// session, to the one that is always there.
func dial(path string) (*net.UnixConn, error) {
	var err error
	for _, p := range []string{path, session.InteropAny} {
		if p == "" {
			continue
		}
		var c *net.UnixConn
		if c, err = net.DialUnix("unix", nil, &net.UnixAddr{Name: p, Net: "unix"}); err == nil {
			return c, nil
		}
	}
	if errors.Is(err, fs.ErrNotExist) {
		return nil, errors.New("programs of the host are turned off in this distro; [interop] enabled in /etc/wsl.conf turns them on, from its next start")
	}
	return nil, err
}

// peer is the host, as console.Peer. Its connections come over c, in any order.
type peer struct {
	c *net.UnixConn

	mu   sync.Mutex
	have map[wire.Role]console.Conn // came before they were asked for; guarded by mu
	end  error                      // why no more will come; guarded by mu
}

// Open waits for the connection.
func (p *peer) Open(role wire.Role, start *wire.Start) (console.Conn, error) {
	if role == wire.RoleControl {
		role = wire.RoleHost
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	for p.have[role] == nil {
		if p.end == nil {
			p.end = p.receive()
		}
		if p.end != nil {
			return nil, p.end
		}
	}
	conn := p.have[role]
	delete(p.have, role)
	if start != nil {
		if err := wire.Write(conn, start); err != nil {
			return nil, err
		}
	}
	return conn, nil
}

// receive takes one connection. Preconditions: p.mu is held.
func (p *peer) receive() error {
	p.c.SetReadDeadline(time.Now().Add(answerWait)) //nolint:errcheck // the read tells
	role, oob := make([]byte, 1), make([]byte, unix.CmsgSpace(4))
	n, oobn, _, _, err := p.c.ReadMsgUnix(role, oob)
	if err != nil {
		return err
	}
	if n == 0 {
		return io.EOF
	}
	messages, err := unix.ParseSocketControlMessage(oob[:oobn])
	if err != nil || len(messages) != 1 {
		return fmt.Errorf("the distro's init sent no connection (%v)", err)
	}
	fds, err := unix.ParseUnixRights(&messages[0])
	if err != nil || len(fds) != 1 {
		return fmt.Errorf("the distro's init sent no connection (%v)", err)
	}
	unix.CloseOnExec(fds[0])
	if p.have == nil {
		p.have = map[wire.Role]console.Conn{}
	}
	p.have[wire.Role(role[0])] = stream{os.NewFile(uintptr(fds[0]), "host")}
	return nil
}

// Notice, and the methods that follow, are those of console.Peer.
func (p *peer) Notice(text string) { fmt.Fprintf(os.Stderr, "host-exec: %s\n", text) }

// Message knows none.
func (p *peer) Message(wire.Message) bool { return false }

// Failed gives the host's words.
func (p *peer) Failed(f *wire.Failed) error { return errors.New(f.Text) }

// Silent is a host that hangs.
func (p *peer) Silent(wait time.Duration) error {
	return fmt.Errorf("the host has not answered for %v", wait)
}

// Broken is a host that went away.
func (p *peer) Broken(err error) error {
	if errors.Is(err, os.ErrDeadlineExceeded) {
		return p.Silent(answerWait)
	}
	return fmt.Errorf("the wsl2 that ran the program on the host has gone (%w)", err)
}

// Gone is never known before the connection's end.
func (p *peer) Gone() bool { return false }

// stream is a socket as a file.
type stream struct{ *os.File }

// CloseWrite tells the other side that no more will come.
func (s stream) CloseWrite() error {
	rc, err := s.SyscallConn()
	if err != nil {
		return err
	}
	cerr := rc.Control(func(fd uintptr) { err = syscall.Shutdown(int(fd), syscall.SHUT_WR) })
	return errors.Join(cerr, err)
}
