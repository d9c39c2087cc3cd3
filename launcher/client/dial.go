// Package client is the user's side of the launcher: it finds or starts the
// service, and carries sessions and archives straight to the VM.
package client

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/wsl2/wsl2/launcher/api"
	"github.com/wsl2/wsl2/launcher/config"
	"github.com/wsl2/wsl2/launcher/internal/spawn"
)

// Client asks the service. It is used by one goroutine.
type Client struct {
	Paths config.Paths
	Self  api.Identity
	// Service is how to run the service: the executable and its arguments.
	Service Command
	// Notice receives what the service has to tell the user.
	Notice func(text string)
	// Progress, if not nil, receives how far the service's work on a disk is.
	Progress func(api.Progress)
	// AnswerWait bounds the wait for the guest to start a program, which is the
	// only sign of a guest that hangs; 0 is a minute. A program may run for ever.
	AnswerWait time.Duration
}

// New returns a Client of this user's service, which it starts as `wsl2 service` if
// need be. Notices go to stderr.
func New(wsl2 string, getenv func(string) string) (*Client, error) {
	paths, err := config.FromEnv(getenv, os.Getuid())
	if err != nil {
		return nil, err
	}
	return &Client{
		Paths: paths, Self: api.IdentityOf(wsl2),
		Service: Command{Path: wsl2, Args: []string{"service"}, OpenLog: paths.OpenServiceLog},
		Notice:  func(text string) { fmt.Fprintf(os.Stderr, "wsl2: %s\n", text) },
	}, nil
}

// Command is a program and its arguments from argv[1].
type Command struct {
	Path string
	Args []string
	Env  []string // nil: ours
	// OpenLog opens the file for its stderr.
	OpenLog func() (*os.File, error)
}

// ErrNotRunning says that no service runs.
var ErrNotRunning = errors.New("no service runs")

// attempts bounds how often a request is sent anew because the service ended
// before it answered: by then it was idle and about to stop, or it crashed.
const attempts = 3

// roundTrip sends the request and returns the first frame of the answer with
// the connection. With start it starts the service if none runs.
func (c *Client) roundTrip(request []byte, start bool) (*net.UnixConn, api.Kind, []byte, error) {
	var last error
	for range attempts {
		conn, err := c.dial(start)
		if err != nil {
			return nil, 0, nil, err
		}
		var kind api.Kind
		var body []byte
		if _, err = conn.Write(request); err == nil || errors.Is(err, syscall.EPIPE) {
			// Who closes before he is asked may have said something first.
			kind, body, err = api.Read(conn)
		}
		if err == nil && kind == api.KindReplaced {
			conn.Close()
			last = errors.New("services of different builds replace each other")
			continue
		}
		if err == nil {
			return conn, kind, body, nil
		}
		conn.Close()
		if !errors.Is(err, io.EOF) && !errors.Is(err, syscall.ECONNRESET) && !errors.Is(err, syscall.EPIPE) {
			return nil, 0, nil, fmt.Errorf("what listens on %s is no service of wsl2 (%w); remove that socket and try again", c.Paths.ServiceSocket(), err)
		}
		last = err
	}
	return nil, 0, nil, fmt.Errorf("the service ends without an answer (%w); its log is %s", last, c.Paths.ServiceLog())
}

// dial connects to the service.
func (c *Client) dial(start bool) (*net.UnixConn, error) {
	conn, err := dialUnix(c.Paths.ServiceSocket())
	if err == nil {
		return conn, nil
	}
	if !errors.Is(err, syscall.ENOENT) && !errors.Is(err, syscall.ECONNREFUSED) {
		return nil, fmt.Errorf("service: %w", err)
	}
	if !start {
		return nil, ErrNotRunning
	}
	if err := c.startService(); err != nil {
		return nil, fmt.Errorf("the service cannot be started: %w", err)
	}
	// Its socket listens already: connections wait for it to accept.
	conn, err = dialUnix(c.Paths.ServiceSocket())
	if err != nil {
		return nil, fmt.Errorf("service: %w; its log is %s", err, c.Paths.ServiceLog())
	}
	return conn, nil
}

func dialUnix(path string) (*net.UnixConn, error) {
	return net.DialUnix("unix", nil, &net.UnixAddr{Name: path, Net: "unix"})
}

// startService starts the service unless another client has done so meanwhile.
// The lock makes one of many clients the starter; the socket is made here and
// handed over, so that nobody has to wait for the service to be ready to listen.
func (c *Client) startService() error {
	lock, err := os.OpenFile(c.Paths.StartLock(), os.O_RDWR|os.O_CREATE|syscall.O_NOFOLLOW, 0o600)
	if err != nil {
		return err
	}
	defer lock.Close() // and with it the lock: the service does not inherit it
	for {
		err := unix.Flock(int(lock.Fd()), unix.LOCK_EX)
		if err == nil {
			break
		}
		if err != unix.EINTR {
			return os.NewSyscallError("flock", err)
		}
	}
	path := c.Paths.ServiceSocket()
	if conn, err := dialUnix(path); err == nil {
		// Another client was first. This connection ends without a request.
		conn.Close()
		return nil
	}
	os.Remove(path) // left by a service that was killed
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		return err
	}
	l.SetUnlinkOnClose(false)
	defer l.Close()
	if err := os.Chmod(path, 0o600); err != nil {
		return err
	}
	f, err := l.File()
	if err != nil {
		return err
	}
	defer f.Close()
	log, err := c.Service.OpenLog()
	if err != nil {
		return err
	}
	defer log.Close()
	// What we were left by our caller (a pipe whose reader waits for its end, a
	// lock) is not for a process that stays. Best effort: Linux 5.11.
	unix.CloseRange(3, ^uint(0), unix.CLOSE_RANGE_CLOEXEC)
	// It outlives us and is not waited for.
	_, err = spawn.Start(spawn.Command{
		Path: c.Service.Path, Args: c.Service.Args, Env: c.Service.Env,
		Dir:    "/", // keep no mount busy
		Output: log, Files: []*os.File{f}, Attr: &syscall.SysProcAttr{Setsid: true},
	})
	if err != nil {
		os.Remove(path)
	}
	return err
}

// answer reads frames until one that ends the request, handing notices on. A
// Ready is handed to ready.
func (c *Client) answer(conn net.Conn, kind api.Kind, body []byte, ready func(net.Conn, api.Ready) error) (api.Kind, []byte, error) {
	for {
		switch kind {
		case api.KindNotice:
			c.Notice(string(body))
		case api.KindProgress:
			var p api.Progress
			if err := json.Unmarshal(body, &p); err == nil && c.Progress != nil {
				c.Progress(p)
			}
		case api.KindReady:
			var r api.Ready
			if err := json.Unmarshal(body, &r); err != nil || ready == nil {
				return 0, nil, fmt.Errorf("unexpected answer of the service (%v)", err)
			}
			if err := ready(conn, r); err != nil {
				return 0, nil, err
			}
		case api.KindError:
			return 0, nil, api.DecodeError(body)
		default:
			return kind, body, nil
		}
		var err error
		if kind, body, err = api.Read(conn); err != nil {
			return 0, nil, fmt.Errorf("the service has ended before it was done (%w); its log is %s", err, c.Paths.ServiceLog())
		}
	}
}

// Call sends a request and decodes its Result into result (nil to ignore it).
// Without start it fails with ErrNotRunning if no service runs.
func (c *Client) Call(call api.Call, result any, start bool) error {
	return c.call(call, result, start, nil)
}

func (c *Client) call(call api.Call, result any, start bool, ready func(net.Conn, api.Ready) error) error {
	request, err := api.AppendCall(nil, c.Self, &call)
	if err != nil {
		return err
	}
	conn, kind, body, err := c.roundTrip(request, start)
	if err != nil {
		return err
	}
	defer conn.Close()
	if kind, body, err = c.answer(conn, kind, body, ready); err != nil {
		return err
	}
	if kind != api.KindResult {
		return fmt.Errorf("unexpected answer %d of the service", kind)
	}
	if result == nil {
		return nil
	}
	return json.Unmarshal(body, result)
}

// open asks for a session. The connection is its lease.
func (c *Client) open(o *api.Open) (*net.UnixConn, api.Opened, error) {
	conn, kind, body, err := c.roundTrip(api.AppendOpen(nil, c.Self, o), true)
	if err != nil {
		return nil, api.Opened{}, err
	}
	if kind, body, err = c.answer(conn, kind, body, nil); err == nil {
		if kind == api.KindOpened {
			var opened api.Opened
			if opened, err = api.DecodeOpened(body); err == nil {
				return conn, opened, nil
			}
		} else {
			err = fmt.Errorf("unexpected answer %d of the service", kind)
			if kind == api.KindEnded {
				err = api.DecodeError(body)
			}
		}
	}
	conn.Close()
	return nil, api.Opened{}, err
}
