package client

import (
	"errors"
	"fmt"
	"net"

	"github.com/wsl2/wsl2/launcher/api"
	"github.com/wsl2/wsl2/launcher/internal/guestconn"
)

// Files is a connection to a distro's tree, which speaks 9P. It keeps the distro running.
type Files struct {
	net.Conn // to the guest
	lease    *net.UnixConn
}

// Close ends both.
func (f *Files) Close() error { return errors.Join(f.Conn.Close(), f.lease.Close()) }

// Files starts the distro if need be and connects to its tree, as a user of it ("":
// its default user).
func (c *Client) Files(open api.Open, user string) (*Files, error) {
	lease, opened, err := c.open(&open)
	if err != nil {
		return nil, err
	}
	guest, _, err := guestconn.DialFiles(opened.VsockPath, opened.Port, user, opened.DefaultUser)
	if err != nil {
		lease.Close()
		return nil, fmt.Errorf("files of %s: %w", opened.Distro, err)
	}
	return &Files{guest, lease}, nil
}
