package guestconn

import (
	"errors"
	"fmt"
	"time"

	"github.com/wsl2/wsl2/internal/wire"
)

// serverStart bounds the wait for the distro's server of files, a process of a distro that is up.
const serverStart = time.Minute

// DialFiles connects to the tree of the distro at port as a user of it, or (user is "") as its
// default user, who registered is unless the distro says otherwise: what follows on the connection is 9P.
func DialFiles(vsockPath string, port uint32, user, registered string) (*Conn, *wire.Serving, error) {
	c, err := Dial(vsockPath, port, wire.Hello{Version: wire.Version, Role: wire.RoleFiles}, &wire.Start{User: user, Default: registered})
	if err != nil {
		return nil, nil, err
	}
	c.SetReadDeadline(time.Now().Add(serverStart))
	m, err := wire.Read(c)
	if err == nil {
		switch m := m.(type) {
		case *wire.Serving:
			c.SetReadDeadline(time.Time{})
			return c, m, nil
		case *wire.Failed:
			err = errors.New(m.Text)
		default:
			err = fmt.Errorf("unexpected %v of the guest", m.Type())
		}
	}
	c.Close()
	return nil, nil, err
}
