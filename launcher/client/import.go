package client

import (
	"errors"
	"fmt"
	"io"
	"sync/atomic"

	"github.com/wsl2/wsl2/images"
	"github.com/wsl2/wsl2/internal/wire"
	"github.com/wsl2/wsl2/launcher/api"
)

// Import makes the distro named in call from an archive: the service prepares a
// disk in the VM, and the archive is sent there, decompressed on the way.
// sent, if not nil, is told now and then how far it is, from another goroutine.
func (c *Client) Import(call api.Call, a *images.Archive, progress func(*Progress)) error {
	call.Verb = api.VerbImport
	if a.Size > 0 {
		call.ArchiveBytes = uint64(a.Size)
	}
	p := &Progress{archive: a}
	sent := make(chan error, 1)
	streaming := false
	err := c.call(call, nil, true, func(r api.Ready) error {
		g, err := dialGuest(r.VsockPath, r.Port, wire.Hello{Version: wire.Version, Role: wire.RoleArchive, Session: r.Archive}, nil)
		if err != nil {
			return fmt.Errorf("send the archive: %w", err)
		}
		streaming = true
		if progress != nil {
			progress(p)
		}
		go func() { sent <- send(g, p) }()
		// A file that cannot be read ends the import: the service sees us go.
		if err := <-sent; err != nil {
			return err
		}
		return nil
	})
	p.done.Store(true)
	_ = streaming
	return err
}

// Progress is how far an import is. Its methods may be called by any goroutine.
type Progress struct {
	archive *images.Archive
	bytes   atomic.Int64
	done    atomic.Bool
}

// Read returns how much of the file has been read, of how much (0 if that is not
// known), and how many bytes of tar have been sent.
func (p *Progress) Read() (read, size, sent int64) {
	return p.archive.Consumed(), p.archive.Size, p.bytes.Load()
}

// send carries the archive to the guest. An error is the archive's own; that the
// guest takes no more is the service's to explain.
func send(g *guestConn, p *Progress) error {
	defer g.Close()
	buf := make([]byte, bigBuffer)
	for {
		n, err := p.archive.Read(buf)
		if n > 0 {
			if _, werr := g.Write(buf[:n]); werr != nil {
				return nil
			}
			p.bytes.Add(int64(n))
		}
		if errors.Is(err, io.EOF) {
			// Until the guest has closed its side too, everything is on its way.
			g.CloseWrite()
			io.Copy(io.Discard, g)
			return nil
		}
		if err != nil {
			return err
		}
	}
}
