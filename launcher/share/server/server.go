// Package server serves a directory of the host to a distro: over 9P, or as a virtio-fs device.
package server

import (
	"context"
	"errors"
	"net"
	"os"

	"golang.org/x/sys/unix"

	"github.com/wsl2/wsl2/internal/p9"
	"github.com/wsl2/wsl2/internal/p9/localfs"
	"github.com/wsl2/wsl2/internal/p9/replay"
	"github.com/wsl2/wsl2/internal/wire"
	"github.com/wsl2/wsl2/launcher/internal/guestconn"
	"github.com/wsl2/wsl2/launcher/share"
)

// spare are descriptors that the process needs beside those of fids.
const spare = 64

// Serve connects to the distro and serves it until it unmounts the share or stops.
func Serve(ctx context.Context, s share.Spec, logf func(format string, args ...any)) error {
	unix.Umask(0) // the guest has applied its own
	if s.Tag != "" {
		return serveDevice(ctx, s, logf)
	}
	// The connection first: its end is how the guest learns that there is nothing to mount.
	conn, err := guestconn.Dial(s.VsockPath, s.Port, wire.Hello{Version: wire.Version, Role: wire.RoleShare, Session: s.Session}, nil)
	if err != nil {
		return err
	}
	defer conn.Close()
	fs, err := open(s)
	if err != nil {
		return err
	}
	defer fs.Close()
	stage, _, _, stop := tellChanges(ctx, s, fs, logf)
	defer stop()
	err = p9.Serve(ctx, conn, replay.FS(fs, stage), p9.Config{MaxFIDs: maxFIDs(), Logf: logf})
	if errors.Is(err, unix.ECONNRESET) || errors.Is(err, unix.EPIPE) || errors.Is(err, net.ErrClosed) { // the VM's end
		return nil
	}
	return err
}

// open opens the directory, for a guest.
func open(s share.Spec) (*localfs.FS, error) {
	return localfs.New(s.Dir, localfs.Config{ReadOnly: s.ReadOnly, Untrusted: true, FileMask: s.FileMask, DirMask: s.DirMask, Metadata: s.Metadata, Owner: &p9.Owner{
		UID: uint32(os.Geteuid()), GID: uint32(os.Getegid()), ClientUID: s.UID, ClientGID: s.GID,
	}})
}

// maxFIDs are as many as there may be descriptors for: a fid has up to two, and an eighth is for
// the directories that are watched. (The Go runtime has raised the soft limit to the hard one.)
func maxFIDs() int {
	var l unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &l); err != nil || l.Cur < 4*spare {
		return spare
	}
	return int(min(l.Cur-spare, 2<<20) / 16 * 7)
}
