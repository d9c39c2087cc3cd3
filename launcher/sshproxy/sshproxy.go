// Package sshproxy speaks SSH for a distro, so that what knows SSH (scp, rsync,
// editors, Ansible) works with distros that have no SSH server and no network.
//
// # Trust
//
// It serves one connection on a pipe: ssh(1) runs it as ProxyCommand. Whoever can
// write to the pipe is the user who started it, so nobody is asked for a key; the host
// key only keeps ssh(1) from asking, and is made once for each user (HostKey).
//
// # Sessions
//
// Each channel is a `wsl2` of its own, on a terminal or on pipes, as a person would
// call it: there is one implementation of streams, signals and statuses. What
// needs a program inside the distro (sftp, forwarded ports) runs this very executable
// there: Helper is a copy of it, made when it is first needed.
package sshproxy

import (
	"bytes"
	"context"
	"crypto/ed25519"
	"crypto/rand"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"sync"
	"syscall"

	"github.com/creack/pty"
	"golang.org/x/crypto/ssh"
	"golang.org/x/sys/unix"
)

// DefaultUser is the login name that stands for the distro's default user.
const DefaultUser = "default"

// Helper is where a running distro keeps a copy of this executable.
const Helper = "/run/wsl2/bin/wsl2-ssh"

// Config says for which distro to speak.
type Config struct {
	Wsl2    string // the launcher's executable
	Self    string // this executable
	Distro  string // "" is the default distro
	HostKey ssh.Signer
	// Logf, if set, is told what the client cannot be told.
	Logf func(format string, a ...any)
}

// HostKey reads the user's host key, or makes it.
func HostKey(path string) (ssh.Signer, error) {
	text, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		text, err = makeKey(path)
	}
	if err != nil {
		return nil, fmt.Errorf("the SSH host key: %w", err)
	}
	key, err := ssh.ParsePrivateKey(text)
	if err != nil {
		return nil, fmt.Errorf("the SSH host key %s: %w; remove the file, and a new one is made", path, err)
	}
	// ssh(1) reads this once the key has been exchanged, hence after now.
	line := append([]byte("*.wsl2 "), ssh.MarshalAuthorizedKey(key.PublicKey())...)
	known := KnownHosts(path)
	if have, err := os.ReadFile(known); err != nil || !bytes.Equal(have, line) {
		if err := os.WriteFile(known, line, 0o600); err != nil {
			return nil, err
		}
	}
	return key, nil
}

// KnownHosts is where the host key's public half lies for ssh(1) (UserKnownHostsFile).
func KnownHosts(key string) string { return filepath.Join(filepath.Dir(key), "known_hosts") }

// makeKey makes a key. Of several processes that do so at once, one wins.
func makeKey(path string) ([]byte, error) {
	_, key, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		return nil, err
	}
	block, err := ssh.MarshalPrivateKey(key, "wsl2")
	if err != nil {
		return nil, err
	}
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		return nil, err
	}
	f, err := os.CreateTemp(filepath.Dir(path), ".key-*") // mode 0600
	if err != nil {
		return nil, err
	}
	defer os.Remove(f.Name())
	_, err = f.Write(pem.EncodeToMemory(block))
	if err = errors.Join(err, f.Close()); err != nil {
		return nil, err
	}
	if err := os.Link(f.Name(), path); err != nil && !errors.Is(err, fs.ErrExist) {
		return nil, err
	}
	return os.ReadFile(path)
}

// Serve speaks SSH on c until the client is done, and closes it.
func Serve(c net.Conn, cfg Config) error {
	if cfg.Logf == nil {
		cfg.Logf = func(string, ...any) {}
	}
	server := &ssh.ServerConfig{NoClientAuth: true, ServerVersion: "SSH-2.0-wsl2"}
	server.AddHostKey(cfg.HostKey)
	conn, channels, requests, err := ssh.NewServerConn(c, server)
	if err != nil {
		return fmt.Errorf("SSH handshake: %w", err)
	}
	defer conn.Close()
	p := &proxy{cfg: cfg, user: conn.User()}
	go ssh.DiscardRequests(requests) // keep-alives are answered, forwarding to here refused
	ctx, gone := context.WithCancel(context.Background())
	defer gone()
	var open sync.WaitGroup
	for ch := range channels {
		switch ch.ChannelType() {
		case "session":
			if c, r, err := ch.Accept(); err == nil {
				open.Go(func() { p.session(c, r) })
			}
		case "direct-tcpip":
			open.Go(func() { p.forward(ctx, ch) })
		default:
			ch.Reject(ssh.UnknownChannelType, ch.ChannelType()+" is not served")
		}
	}
	gone()
	open.Wait()
	return nil
}

type proxy struct {
	cfg  Config
	user string
}

// command is `wsl2 args...` in the distro, as the connection's user, in its home: where
// ssh was called from is nobody's business there.
func (p *proxy) command(args ...string) *exec.Cmd {
	var line []string
	if p.cfg.Distro != "" {
		line = append(line, "-d", p.cfg.Distro)
	}
	if p.user != DefaultUser {
		line = append(line, "-u", p.user)
	}
	line = append(line, "--cd", "~")
	return exec.Command(p.cfg.Wsl2, append(line, args...)...)
}

// install puts a copy of this executable into the distro, unless there is one. Nothing here
// remembers that: a distro that stops, as it does when it is idle, loses it.
func (p *proxy) install() error {
	self, err := os.Open(p.cfg.Self)
	if err != nil {
		return err
	}
	defer self.Close()
	root := &proxy{cfg: p.cfg, user: "root"}
	cmd := root.command("-e", "sh", "-c", `test -x "$0" || { cat >"$0.$$" && chmod 755 "$0.$$" && mv "$0.$$" "$0"; }`, Helper)
	cmd.Stdin = self
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("put %s into the distro: %w: %s", Helper, err, out)
	}
	return nil
}

// sftpServers are where distros keep OpenSSH's, which is preferred; ours stands in.
const sftpServers = `for f in /usr/lib/openssh/sftp-server /usr/libexec/openssh/sftp-server /usr/lib/ssh/sftp-server /usr/libexec/sftp-server; do
test -x $f && exec $f; done; exec ` + Helper + ` sftp-server`

// session serves a session channel (RFC 4254 §6): requests that prepare it, one
// that starts the program, and then those that concern the running program.
func (p *proxy) session(ch ssh.Channel, requests <-chan *ssh.Request) {
	defer ch.Close()
	s := &session{p: p, ch: ch, answered: make(chan struct{})}
	for r := range requests {
		waiting := s.cmd == nil
		ok := s.request(r)
		if r.WantReply {
			r.Reply(ok, nil)
		}
		if waiting && s.cmd != nil {
			close(s.answered)
		}
	}
	s.hangup()
}

type session struct {
	p   *proxy
	ch  ssh.Channel
	env []string
	tty *ptyRequest // nil: pipes
	cmd *exec.Cmd   // nil until it has been started

	master *os.File

	// answered is closed when the request that started cmd has its answer, which
	// must come before the channel's end.
	answered chan struct{}
}

// ptyRequest is RFC 4254 §6.2, windowChange §6.7.
type ptyRequest struct {
	Term          string
	Cols, Rows    uint32
	Width, Height uint32
	Modes         string
}

type windowChange struct{ Cols, Rows, Width, Height uint32 }

func (s *session) request(r *ssh.Request) bool {
	switch r.Type {
	case "pty-req":
		var m ptyRequest
		if s.cmd != nil || ssh.Unmarshal(r.Payload, &m) != nil {
			return false
		}
		s.tty = &m
		return true
	case "env":
		var m struct{ Name, Value string }
		if s.cmd != nil || ssh.Unmarshal(r.Payload, &m) != nil {
			return false
		}
		s.env = append(s.env, m.Name+"="+m.Value)
		return true
	case "shell":
		return s.start(s.p.command())
	case "exec":
		var m struct{ Command string }
		if ssh.Unmarshal(r.Payload, &m) != nil {
			return false
		}
		return s.start(s.p.command("--", m.Command))
	case "subsystem":
		var m struct{ Name string }
		if ssh.Unmarshal(r.Payload, &m) != nil || m.Name != "sftp" {
			return false
		}
		if err := s.p.install(); err != nil {
			s.p.cfg.Logf("%v", err)
			return false
		}
		return s.start(s.p.command("-e", "sh", "-c", sftpServers))
	case "window-change":
		var m windowChange
		if s.master == nil || ssh.Unmarshal(r.Payload, &m) != nil {
			return false
		}
		return setSize(s.master, m) == nil
	case "signal":
		var m struct{ Name string }
		sig := unix.Signal(0)
		if ssh.Unmarshal(r.Payload, &m) == nil {
			sig = unix.SignalNum("SIG" + m.Name)
		}
		return sig != 0 && s.cmd != nil && s.cmd.Process.Signal(sig) == nil
	}
	return false
}

// setSize tells a terminal its size, also while another goroutine closes it.
func setSize(master *os.File, m windowChange) error {
	raw, err := master.SyscallConn()
	if err != nil {
		return err
	}
	cerr := raw.Control(func(fd uintptr) {
		err = unix.IoctlSetWinsize(int(fd), unix.TIOCSWINSZ, &unix.Winsize{Row: uint16(m.Rows), Col: uint16(m.Cols)})
	})
	return errors.Join(cerr, err)
}

// start starts the channel's program; its end closes the channel.
func (s *session) start(cmd *exec.Cmd) bool {
	if s.cmd != nil {
		return false
	}
	cmd.Env = append(os.Environ(), s.passed()...)
	if s.tty != nil {
		cmd.Env = append(cmd.Env, "TERM="+s.tty.Term)
		master, err := pty.StartWithSize(cmd, &pty.Winsize{Rows: uint16(s.tty.Rows), Cols: uint16(s.tty.Cols)})
		if err != nil {
			s.p.cfg.Logf("%v", err)
			return false
		}
		s.cmd, s.master = cmd, master
		go io.Copy(master, s.ch)
		go func() {
			io.Copy(s.ch, master) // EIO at the end
			s.end(cmd.Wait())
			master.Close()
		}()
		return true
	}
	in, err := cmd.StdinPipe()
	if err != nil {
		return false
	}
	cmd.Stdout, cmd.Stderr = s.ch, s.ch.Stderr()
	if err := cmd.Start(); err != nil {
		s.p.cfg.Logf("%v", err)
		return false
	}
	s.cmd = cmd
	go func() {
		io.Copy(in, s.ch)
		in.Close()
	}()
	go func() { s.end(cmd.Wait()) }()
	return true
}

// passed is the client's environment (SendEnv): language and what else ssh's user
// has chosen goes through wsl2's own rules, by way of WSLENV.
func (s *session) passed() []string {
	list := os.Getenv("WSLENV")
	for _, kv := range s.env {
		for i := range kv {
			if kv[i] == '=' {
				list += ":" + kv[:i] + "/u"
				break
			}
		}
	}
	return append(append([]string{}, s.env...), "WSLENV="+list)
}

// end tells the client how the program ended (RFC 4254 §6.10). A signal in the
// distro is 128+N already, as a shell there would say.
func (s *session) end(err error) {
	status := 0
	var exit *exec.ExitError
	switch {
	case errors.As(err, &exit):
		if status = exit.ExitCode(); status < 0 {
			status = 128 + int(exit.Sys().(syscall.WaitStatus).Signal())
		}
	case err != nil:
		status = 255
	}
	<-s.answered
	s.ch.SendRequest("exit-status", false, ssh.Marshal(struct{ Status uint32 }{uint32(status)}))
	s.ch.Close()
}

// hangup ends what still runs when the client has gone.
func (s *session) hangup() {
	if s.cmd != nil {
		s.cmd.Process.Signal(unix.SIGHUP) // os.ErrProcessDone: nothing to end
	}
}

// forward serves a direct-tcpip channel (RFC 4254 §7.2): a port in the distro. ctx ends with
// the client.
func (p *proxy) forward(ctx context.Context, ch ssh.NewChannel) {
	var m struct {
		Host       string
		Port       uint32
		Origin     string
		OriginPort uint32
	}
	if err := ssh.Unmarshal(ch.ExtraData(), &m); err != nil {
		ch.Reject(ssh.ConnectionFailed, err.Error())
		return
	}
	r, err := p.dial(ctx, m.Host, m.Port)
	if errors.Is(err, errNoHelper) {
		if err = p.install(); err == nil {
			r, err = p.dial(ctx, m.Host, m.Port)
		}
	}
	if err != nil {
		ch.Reject(ssh.ConnectionFailed, err.Error())
		return
	}
	stop := context.AfterFunc(ctx, r.hangup)
	defer stop()
	c, requests, err := ch.Accept()
	if err != nil {
		r.hangup()
		r.out.Close()
		r.cmd.Wait()
		return
	}
	go func() {
		ssh.DiscardRequests(requests) // until the channel is closed
		r.hangup()
	}()
	go func() {
		io.Copy(r.in, c)
		r.in.Close()
	}()
	io.Copy(c, r.out)
	r.out.Close() // what the client no longer takes must not keep wsl2
	c.CloseWrite()
	r.cmd.Wait()
	c.Close()
}

// remote is a connection to a port of the distro: wsl2, whose streams it is.
type remote struct {
	cmd *exec.Cmd
	in  io.WriteCloser
	out io.ReadCloser
}

func (r *remote) hangup() { r.cmd.Process.Signal(unix.SIGHUP) } // os.ErrProcessDone: nothing to end

var errNoHelper = errors.New("the distro has no " + Helper + "; see that its /run can be written")

// dial has the helper connect to a port of the distro. When ctx ends it gives up.
func (p *proxy) dial(ctx context.Context, host string, port uint32) (*remote, error) {
	cmd := p.command("-e", Helper, "dial", host, strconv.FormatUint(uint64(port), 10))
	in, ierr := cmd.StdinPipe()
	out, oerr := cmd.StdoutPipe()
	if err := errors.Join(ierr, oerr, cmd.Start()); err != nil {
		return nil, fmt.Errorf("the connection is made by wsl2: %w; see that it can be run", err)
	}
	r := &remote{cmd, in, out}
	stop := context.AfterFunc(ctx, r.hangup)
	defer stop()
	// One byte says that the connection stands.
	if _, err := io.ReadFull(out, make([]byte, 1)); err == nil {
		return r, nil
	}
	const notFound = 127
	if cmd.Wait(); cmd.ProcessState.ExitCode() == notFound {
		return nil, errNoHelper
	}
	return nil, fmt.Errorf("%s port %d in the distro takes no connection; see that a server listens there", host, port)
}
