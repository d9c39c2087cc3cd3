package session

import (
	"errors"
	"fmt"
	"os"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/wsl2/wsl2/guest/files"
	"github.com/wsl2/wsl2/internal/wire"
)

// files starts the process that serves the distro's tree on c (package files).
func (s *Server) files(c conn) {
	m, err := wire.Read(c)
	start, ok := m.(*wire.Start)
	if err != nil || !ok {
		s.refuse(c, fmt.Errorf("%w: no Start behind Hello (%v)", wire.ErrMalformed, err))
		return
	}
	defer c.Close()                                    // the process has a descriptor of its own
	c.SetWriteDeadline(time.Now().Add(controlTimeout)) //nolint:errcheck // Write tells
	who, err := s.startFiles(c, start)
	if err != nil {
		wire.Write(c, toFailed(err)) //nolint:errcheck // the client may be gone
		return
	}
	wire.Write(c, who) //nolint:errcheck // the client may be gone
}

func (s *Server) startFiles(c conn, start *wire.Start) (*wire.Serving, error) {
	p, err := newProgram(&s.cfg, &wire.Start{User: start.User, Default: start.Default, Shell: wire.ShellStandard})
	if err != nil {
		return nil, err
	}
	p.reach("/") // the shares' traps are set: what is served may be behind them
	null, err := unix.Open(os.DevNull, unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("open %s: %w", os.DevNull, err)
	}
	defer unix.Close(null)
	raw, ok := c.(syscall.Conn)
	if !ok {
		return nil, fmt.Errorf("a connection of type %T has no descriptor", c)
	}
	rc, err := raw.SyscallConn()
	if err != nil {
		return nil, err
	}
	cerr := rc.Control(func(fd uintptr) {
		_, err = s.cfg.Reaper.Start("/proc/self/exe", []string{files.Argv0}, &syscall.ProcAttr{
			Dir: "/", Env: p.env, Files: []uintptr{uintptr(null), uintptr(null), uintptr(null), fd},
			Sys: &syscall.SysProcAttr{
				Setsid:     true,
				Credential: &syscall.Credential{Uid: p.user.UID, Gid: p.user.GID, Groups: p.groups()},
			},
		})
	})
	if err = errors.Join(cerr, err); err != nil {
		return nil, fmt.Errorf("start a server of files: %w", err)
	}
	return &wire.Serving{UID: p.user.UID, GID: p.user.GID, Groups: p.user.Groups}, nil
}
