package client

import (
	"errors"
	"fmt"
	"io"
	"net"
	"time"

	"github.com/wsl2/wsl2/images"
	"github.com/wsl2/wsl2/internal/wire"
	"github.com/wsl2/wsl2/launcher/api"
	"github.com/wsl2/wsl2/launcher/internal/guestconn"
)

// Archive is a stream of tar and what is known of the file that it comes from
// (package images/archive, whose decompressors would cost every client their
// initialisation if this package named it).
type Archive interface {
	io.ReadCloser
	// Label names the file in messages.
	Label() string
	// Consumed is how much of the file has been read; FileSize how large it is, 0
	// if that is not known. They may be called by any goroutine.
	Consumed() int64
	FileSize() int64
}

// Import makes the distro named in call from an archive: the service prepares a
// disk in the VM, and the archive is sent there, decompressed on the way. progress,
// if not nil, is told how much of the file has been read. Import closes the archive,
// if need be after it has returned: reading it may block (a pipe) while the service already knows that the import has failed.
func (c *Client) Import(call api.Call, a Archive, progress images.Progress) (api.Installed, error) {
	call.Verb = api.VerbImport
	if n := a.FileSize(); n > 0 {
		call.ArchiveBytes = uint64(n)
	}
	var guest *guestconn.Conn
	failed := make(chan error, 1)
	var made api.Installed
	err := c.call(call, &made, true, func(service net.Conn, r api.Ready) (err error) {
		guest, err = guestconn.Dial(r.VsockPath, r.Port, wire.Hello{Version: wire.Version, Role: wire.RoleArchive, Session: r.Archive}, nil)
		if err != nil {
			return fmt.Errorf("send the archive: %w", err)
		}
		go func() {
			defer a.Close()
			// A file that cannot be read to its end fails the import: without
			// the word that all is sent the service takes it back.
			complete, err := send(guest, a, progress)
			switch {
			case err != nil:
				failed <- err
				giveUp(guest, service)
			case complete:
				api.Write(service, api.KindSent, nil)
			}
		}()
		return nil
	})
	if guest == nil {
		a.Close()
		return made, err
	}
	guest.Close() // ends send, unless it waits for the file
	select {
	case ferr := <-failed:
		return made, ferr
	default:
	}
	var told *api.Error
	if errors.As(err, &told) && told.Code == api.CodeArchive {
		told.Text = a.Label() + ": " + told.Text
	}
	return made, err
}

// undoWait bounds the wait for the service to take back an import.
const undoWait = 10 * time.Second

// ImportImage makes the distro named in call from a disk image, call.Image, by the
// service alone.
func (c *Client) ImportImage(call api.Call) error {
	call.Verb = api.VerbImport
	return c.call(call, nil, true, nil)
}

// giveUp ends an import from this side. The service answers, or closes the
// connection, once it has taken it back, so that the next command does not meet
// its remains.
func giveUp(guest *guestconn.Conn, service net.Conn) {
	guest.Close()
	service.SetReadDeadline(time.Now().Add(undoWait))
	if c, ok := service.(interface{ CloseWrite() error }); !ok || c.CloseWrite() != nil {
		service.Close()
	}
}

// send carries the archive to the guest and tells whether all of it went. An
// error is the archive's own; why the guest takes no more is the service's to say.
func send(g *guestconn.Conn, a Archive, progress images.Progress) (complete bool, err error) {
	buf := make([]byte, archiveBuffer)
	for {
		n, err := a.Read(buf)
		if n > 0 {
			if _, werr := g.Write(buf[:n]); werr != nil {
				return false, nil
			}
			if progress != nil {
				progress(a.Consumed(), a.FileSize())
			}
		}
		if errors.Is(err, io.EOF) {
			// The guest closes its side once it has read all: closing ours
			// earlier could cut off what is on its way.
			g.CloseWrite()
			io.Copy(io.Discard, g)
			return true, nil
		}
		if err != nil {
			return false, err
		}
	}
}

// archiveBuffer is what is read of an archive at once.
const archiveBuffer = 256 << 10
