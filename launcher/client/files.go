package client

import (
	"errors"
	"fmt"
	"io"
	"net"
	"time"

	"github.com/wsl2/wsl2/internal/wire"
	"github.com/wsl2/wsl2/launcher/api"
	"github.com/wsl2/wsl2/launcher/internal/guestconn"
)

// Files is a connection to a distro's tree, which speaks 9P. It keeps the distro running.
type Files struct {
	io.ReadWriter
	guest io.Closer
	lease *net.UnixConn
}

// Close ends both.
func (f *Files) Close() error { return errors.Join(f.guest.Close(), f.lease.Close()) }

// Files starts the distro if need be and connects to its tree, as a user of it ("":
// its default user).
func (c *Client) Files(open api.Open, user string) (*Files, error) {
	lease, opened, err := c.open(&open)
	if err != nil {
		return nil, err
	}
	if user == "" {
		user = opened.DefaultUser
	}
	guest, err := dialFiles(opened, user)
	if err != nil {
		lease.Close()
		return nil, err
	}
	return &Files{guest, guest, lease}, nil
}

func dialFiles(o api.Opened, user string) (*guestconn.Conn, error) {
	guest, err := guestconn.Dial(o.VsockPath, o.Port, wire.Hello{Version: wire.Version, Role: wire.RoleFiles}, &wire.Start{User: user})
	if err != nil {
		return nil, err
	}
	guest.SetReadDeadline(time.Now().Add(time.Minute))
	m, err := wire.Read(guest)
	if err == nil {
		switch m := m.(type) {
		case *wire.Started:
			guest.SetReadDeadline(time.Time{})
			return guest, nil
		case *wire.Failed:
			err = errors.New(m.Text)
		default:
			err = fmt.Errorf("unexpected %v of the guest", m.Type())
		}
	}
	guest.Close()
	return nil, fmt.Errorf("files of %s: %w", o.Distro, err)
}
