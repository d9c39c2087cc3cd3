package client

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"

	"github.com/wsl2/wsl2/images"
	"github.com/wsl2/wsl2/internal/wire"
	"github.com/wsl2/wsl2/launcher/api"
	"github.com/wsl2/wsl2/launcher/internal/guestconn"
)

// Compressor wraps what an archive is written to (package images/archive).
type Compressor func(io.Writer) (io.WriteCloser, error)

// Export writes the distro named in call to out: as an archive if compress is not nil,
// else as a disk image of the format. Archives are made in the VM and compressed here; disk images are made from the distro's disk,
// which the service holds still meanwhile, and want a file that can be sought in, but for
// raw. progress may be nil. On an error what out holds is worth nothing.
func (c *Client) Export(ctx context.Context, call api.Call, format images.DiskFormat, compress Compressor, out *os.File, progress images.Progress) error {
	call.Verb = api.VerbExport
	call.Disk = compress == nil
	var failed error // ours, which comes first: the service only sees a connection end
	err := c.call(call, nil, true, func(service net.Conn, r api.Ready) error {
		if call.Disk {
			if failed = exportDisk(ctx, r.Disk, format, out, progress); failed == nil {
				failed = api.Write(service, api.KindSent, nil)
			}
			return failed
		}
		failed = exportArchive(r, compress, out, progress)
		return nil // why it ended early is the service's to say
	})
	if failed != nil {
		return failed
	}
	return err
}

// exportDisk makes a disk image of the distro's disk.
func exportDisk(ctx context.Context, disk string, format images.DiskFormat, out *os.File, progress images.Progress) error {
	if format != images.Raw {
		return images.Convert(ctx, disk, images.Raw, out, format, progress)
	}
	in, err := os.Open(disk)
	if err != nil {
		return err
	}
	defer in.Close()
	if st, err := out.Stat(); err == nil && st.Mode().IsRegular() {
		_, err := images.CopyTo(ctx, in, out, progress)
		return err
	}
	st, err := in.Stat()
	if err != nil {
		return err
	}
	_, err = io.Copy(out, &meter{r: in, total: st.Size(), progress: progress})
	return err
}

// exportArchive receives the archive up to the end of its connection.
func exportArchive(r api.Ready, compress Compressor, out io.Writer, progress images.Progress) error {
	z, err := compress(out)
	if err != nil {
		return err
	}
	guest, err := guestconn.Dial(r.VsockPath, r.Port, wire.Hello{Version: wire.Version, Role: wire.RoleArchive, Session: r.Archive}, nil)
	if err != nil {
		return fmt.Errorf("receive the archive: %w", err)
	}
	defer guest.Close()
	in := &meter{r: guest, total: r.Bytes, progress: progress}
	_, err = io.CopyBuffer(z, in, make([]byte, archiveBuffer))
	if in.failed {
		return nil // the VM has ended, and the service says so
	}
	return errors.Join(err, z.Close())
}

// meter tells how much has been read.
type meter struct {
	r           io.Reader
	done, total int64
	progress    images.Progress
	failed      bool // r itself, other than by its end
}

func (m *meter) Read(p []byte) (int, error) {
	n, err := m.r.Read(p)
	m.failed = err != nil && err != io.EOF
	if m.done += int64(n); m.progress != nil && n > 0 {
		m.progress(m.done, max(m.total, m.done))
	}
	return n, err
}
