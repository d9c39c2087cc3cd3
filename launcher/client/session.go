package client

import (
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"time"

	"golang.org/x/sys/unix"

	"github.com/wsl2/wsl2/internal/console"
	"github.com/wsl2/wsl2/internal/wire"
	"github.com/wsl2/wsl2/launcher/api"
	"github.com/wsl2/wsl2/launcher/config"
	"github.com/wsl2/wsl2/launcher/hostexec"
	"github.com/wsl2/wsl2/launcher/internal/guestconn"
)

// RunSpec is one command in a distro.
type RunSpec struct {
	Open api.Open
	User string // "" = the distro's default user
	// Cwd is absolute in the distro, or "~" for the home; "" is the caller's directory
	// where that is shared with the distro, else the home.
	Cwd string
	// HostCwd says that Cwd is a path on the host, relative to the caller's directory.
	HostCwd bool
	Shell   wire.Shell
	Argv    []string

	aside bool // no program of the user's: console.Session
}

// Stdio are the caller's standard streams and environment.
type Stdio struct {
	In, Out, Err *os.File
	Getenv       func(string) string
	Environ      []string
}

// Exit statuses of the launcher itself.
const (
	StatusFailed        = console.StatusFailed
	StatusNotExecutable = console.StatusNotExecutable
	StatusNotFound      = console.StatusNotFound
)

// endedWait bounds the wait for the service's word on why a session broke off.
const endedWait = 10 * time.Second

// session is one running session: the guest's side of a console.
type session struct {
	c      *Client
	lease  *net.UnixConn
	opened api.Opened
	id     wire.SessionID
	hosts  *hostexec.Runner // nil until the guest asks; of the goroutine that reads the control connection
	env    []string         // ours
	agent  string           // our SSH agent's socket
}

// Run runs one command and returns its exit status. The error, if any, is for
// the user, and the status is then the launcher's own.
func (c *Client) Run(spec RunSpec, std Stdio) (status int, err error) {
	if path := carried(&spec, std.Getenv); path != "" && c.carryIn(spec, path) {
		defer c.carryOut(spec, path)
	}
	return c.run(spec, std)
}

func (c *Client) run(spec RunSpec, std Stdio) (status int, err error) {
	lease, opened, err := c.open(&spec.Open)
	if err != nil {
		return StatusFailed, err
	}
	defer lease.Close()
	if opened.FirstRun && interactive(spec, std) {
		if err := c.firstRun(opened, spec, std); err != nil {
			return StatusFailed, err
		}
		return c.run(spec, std) // as the user that was made
	}
	s := &session{c: c, lease: lease, opened: opened, env: std.Environ, agent: std.Getenv("SSH_AUTH_SOCK")}
	rand.Read(s.id[:])
	start := wire.Start{Shell: spec.Shell, Argv: spec.Argv, User: spec.User, Default: opened.DefaultUser, Cwd: spec.Cwd, Agent: s.agent != ""}
	switch {
	case spec.HostCwd:
		if start.Cwd, err = guestDir(spec.Cwd, opened.Shares); err != nil { // as in WSL, it ends nothing
			c.Notice(fmt.Sprintf("cannot change to directory %s: %v; started in the home", spec.Cwd, err))
		}
	case spec.Cwd == "" && len(opened.Shares) > 0:
		start.Cwd = c.callersDir(spec, std, opened.Shares)
	}
	run := console.Session{Peer: s, Stdio: console.Stdio{In: std.In, Out: std.Out, Err: std.Err}, AnswerWait: c.AnswerWait, Aside: spec.aside}
	return run.Run(start, func(terminal bool) []string { return guestEnv(std, terminal, opened) })
}

// Open opens one connection to the distro's session port.
func (s *session) Open(role wire.Role, start *wire.Start) (console.Conn, error) {
	g, err := guestconn.Dial(s.opened.VsockPath, s.opened.Port, wire.Hello{Version: wire.Version, Role: role, Session: s.id}, start)
	if err != nil {
		return nil, err
	}
	return g, nil
}

// Notice, and the methods that follow, are those of console.Peer.
func (s *session) Notice(text string) { s.c.Notice(text) }

// Message starts programs of the host, which run as children of this process.
func (s *session) Message(m wire.Message) bool {
	host, ok := m.(*wire.HostExec)
	if !ok {
		return false
	}
	if s.hosts == nil {
		dir, _ := os.Getwd() // one that is gone: the program's start tells
		s.hosts = &hostexec.Runner{
			Dial: func(role wire.Role, id wire.SessionID) (hostexec.Conn, error) {
				return hostexec.Dial(s.opened.VsockPath, s.opened.Port, role, id)
			},
			Policy: s.policy, Environ: s.env, Dir: dir, Shares: s.opened.Shares,
		}
	}
	if host.Kind == wire.HostAgent {
		go s.hosts.Agent(host.Session, s.agent)
	} else {
		go s.hosts.Run(host.Session)
	}
	return true
}

// policy says which programs of the host may run. The service tells what is
// wrong with the file.
func (s *session) policy() hostexec.Policy {
	settings, _ := config.Load(s.c.Paths.ConfigFile, config.ThisHost())
	return hostexec.PolicyOf(settings)
}

// Failed gives the guest's words, with advice where there is some.
func (s *session) Failed(f *wire.Failed) error {
	if f.Code == wire.CodeUnknownUser {
		return api.Errorf(api.CodeFailed, "`wsl2 -u root -- getent passwd` lists the users", "%s", f.Text)
	}
	return errors.New(f.Text)
}

// Silent says what to do about a guest that hangs.
func (s *session) Silent(wait time.Duration) error {
	return api.Errorf(api.CodeFailed, "`wsl2 --shutdown --force` ends the VM; the next command starts it anew",
		"the guest has not answered for %v: its kernel may hang", wait)
}

// Gone tells, without waiting, whether the service has something to say, or
// is gone.
func (s *session) Gone() (over bool) {
	raw, err := s.lease.SyscallConn()
	if err != nil {
		return true
	}
	raw.Control(func(fd uintptr) {
		var b [1]byte
		_, _, err := unix.Recvfrom(int(fd), b[:], unix.MSG_PEEK|unix.MSG_DONTWAIT)
		over = err != unix.EAGAIN
	})
	return over
}

// Broken explains a session that broke off: the service knows whether the VM or
// the distro is gone.
func (s *session) Broken(err error) error {
	s.lease.SetReadDeadline(time.Now().Add(endedWait))
	kind, body, rerr := api.Read(s.lease)
	switch {
	case rerr == nil && kind == api.KindEnded:
		return api.DecodeError(body)
	case rerr == nil:
		return fmt.Errorf("unexpected word %d of the service", kind)
	case errors.Is(rerr, os.ErrDeadlineExceeded):
		if err == io.EOF {
			err = errors.New("it closed the connection")
		}
		return api.Errorf(api.CodeFailed, "run the command again; `wsl2 --terminate "+s.opened.Distro+"` restarts the distro", "the session with the guest broke off: %v", err)
	}
	return api.Errorf(api.CodeFailed, "run the command again to start it anew", "the service of wsl2 has ended, and with it the VM (its log is %s)", s.c.Paths.ServiceLog())
}
