package server

import (
	"context"
	"errors"
	"fmt"
	"runtime"
	"time"

	"golang.org/x/sys/unix"

	"github.com/wsl2/wsl2/internal/fusefs"
	"github.com/wsl2/wsl2/internal/wire"
	"github.com/wsl2/wsl2/launcher/internal/guestconn"
	"github.com/wsl2/wsl2/launcher/share"
	"github.com/wsl2/wsl2/vmm/virtio/fs"
)

// mountWait is how long the guest has for its first request.
const mountWait = time.Minute

// lockWait is how long a request for a lock waits that somebody else has, before the guest's
// program is told EINTR, after which most ask again. Linux' virtio-fs does not tell us of
// signals: a program that waits cannot be ended before it has an answer.
const lockWait = time.Second

// keep is how long a guest keeps names and attributes: a tick of its kernel's, 4 ms. One stat(2) asks for both, and for
// those of its directory.
const keep = time.Millisecond

// workers is how many threads wait for requests at a time where there are no more than one after the other.
const workers = 4

// serveDevice serves a virtio-fs device until the guest unmounts it or the VM ends.
func serveDevice(ctx context.Context, s share.Spec, logf func(format string, args ...any)) error {
	// The device first: it is kept for its server until that has been there.
	conn, err := fs.Dial(s.Socket)
	if err != nil {
		return err
	}
	dir, err := open(s)
	if err != nil {
		conn.Close()
		return errors.Join(err, announce(s, ""))
	}
	defer dir.Close()
	root, err := dir.Attach("", "", 0)
	if err != nil {
		conn.Close()
		return err
	}
	stage, lease, forget, stopChanges := tellChanges(ctx, s, dir, logf)
	defer stopChanges()
	files := fusefs.New(root, fusefs.Config{Timeout: keep, Lease: lease, LockWait: lockWait, Replay: stage, MaxNodes: maxFIDs(), MaxHandles: maxFIDs() / 2, Full: forget})
	defer files.Close()
	stop := context.AfterFunc(ctx, func() { conn.Close() })
	defer stop()
	mounted := time.AfterFunc(mountWait, func() {
		logf("%s: the guest has not mounted it within %v", s.Dir, mountWait)
		conn.Close()
	})
	defer mounted.Stop()
	if err = fs.Accept(conn); err == nil {
		err = announce(s, s.Tag)
	}
	if err != nil {
		conn.Close()
		return err
	}
	handle := files.Handler(logf)
	// A thread that waits in the kernel takes one of the runtime's processors with it, which another has to win back otherwise.
	runtime.GOMAXPROCS(runtime.GOMAXPROCS(0) + workers)
	err = fs.Serve(conn, func(request, room []byte) int {
		mounted.Stop()
		return handle(request, room)
	})
	if errors.Is(err, unix.ECONNRESET) { // the VM's end
		return nil
	}
	return err
}

// announce tells the distro which device it is; "" that there is none.
func announce(s share.Spec, tag string) error {
	guest, err := guestconn.Dial(s.VsockPath, s.Port, wire.Hello{Version: wire.Version, Role: wire.RoleShareDevice, Session: s.Session}, nil)
	if err != nil {
		return err
	}
	defer guest.Close()
	if err := wire.Write(guest, &wire.ShareDevice{Tag: tag}); err != nil {
		return fmt.Errorf("tell the distro of its share: %w", err)
	}
	guest.SetReadDeadline(time.Now().Add(mountWait)) //nolint:errcheck // Read tells
	m, err := wire.Read(guest)
	if refused, ok := m.(*wire.Failed); err == nil && ok {
		return fmt.Errorf("the distro does not take the share: %s", refused.Text)
	}
	return nil // its end: the distro has read it
}
