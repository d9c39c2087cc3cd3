// Package server mounts a distro's tree on the host and serves it: a client of 9P below,
// FUSE above.
package server

import (
	"context"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"

	"github.com/wsl2/wsl2/internal/fusefs"
	"github.com/wsl2/wsl2/internal/p9"
	"github.com/wsl2/wsl2/internal/p9/remote"
	"github.com/wsl2/wsl2/internal/wire"
	"github.com/wsl2/wsl2/launcher/hostmount"
	"github.com/wsl2/wsl2/launcher/internal/guestconn"
)

// Run mounts, says so on control, and serves until the other end of control is closed,
// the distro ends, or the mount is taken away.
func Run(ctx context.Context, s hostmount.Spec, control *os.File) error {
	ended, err := mount(ctx, s)
	if err != nil {
		text := strings.ReplaceAll(strings.TrimSpace(err.Error()), "\n", "; ")
		io.WriteString(control, text+"\n") //nolint:errcheck // the service may be gone
		return err
	}
	defer hostmount.Detach(s.Dir) //nolint:errcheck // it may be gone already
	if _, err := io.WriteString(control, hostmount.MountedLine); err != nil {
		return err
	}
	closed := make(chan struct{}) // ends with the process at the latest
	go func() {
		io.Copy(io.Discard, control) //nolint:errcheck // its end is what is waited for
		close(closed)
	}()
	select {
	case <-closed:
	case <-ended:
	case <-ctx.Done():
	}
	return nil
}

// maxNodes is about how many files the host's kernel may know, each of which the distro's server has
// open: half of what it may have (p9.Config.MaxFIDs).
const maxNodes = 1 << 15

// mount returns a channel that is closed when there is nothing more to serve.
func mount(ctx context.Context, s hostmount.Spec) (<-chan struct{}, error) {
	conn, who, err := guestconn.DialFiles(s.VsockPath, s.Port, "", s.User)
	if err != nil {
		return nil, fmt.Errorf("files of %s: %w", s.Distro, err)
	}
	client, err := p9.NewClient(ctx, conn, 0)
	if err != nil {
		return nil, fmt.Errorf("files of %s: %w", s.Distro, err)
	}
	root, err := client.Attach(ctx, "", "", 0)
	if err != nil {
		client.Close()
		return nil, fmt.Errorf("files of %s: %w", s.Distro, err)
	}
	fs := fusefs.New(remote.Root(ctx, root), fusefs.Config{
		// Nothing is kept: a command in the distro is often followed by one here that reads what it made.
		// But attributes for a tick of the kernel's: each name is looked up with them, and the call that wanted them would ask again.
		AttrTimeout: time.Nanosecond,
		Root:        s.Dir,
		Owner:       &p9.Owner{UID: who.UID, GID: who.GID, ClientUID: uint32(os.Geteuid()), ClientGID: uint32(os.Getegid())},
		Access:      func(a p9.Attr, mask uint32) error { return access(who, a, mask) },
	})
	o := fusefs.Options()
	o.Name, o.FsName, o.DirectMount = "wsl2", s.Distro, os.Geteuid() == 0
	served, err := fuse.NewServer(fs, s.Dir, o)
	if err != nil {
		client.Close()
		return nil, fmt.Errorf("mount %s: %w", s.Dir, err)
	}
	ended := make(chan struct{})
	go func() { // until the mount is taken away
		served.Serve()
		client.Close()
	}()
	if err := served.WaitMount(); err != nil {
		hostmount.Detach(s.Dir) //nolint:errcheck // it may not be there
		return nil, fmt.Errorf("mount %s: %w", s.Dir, err)
	}
	pruning, stop := context.WithCancel(ctx)
	go fs.Prune(pruning, served, maxNodes)
	go func() {
		<-client.Done()
		stop()
		close(ended)
	}()
	return ended, nil
}

// access is what access(2) answers to who: the server's own answer to what is tried is by the same rules.
func access(who *wire.Serving, a p9.Attr, mask uint32) error {
	may := a.Mode & 7
	switch {
	case who.UID == 0:
		may = unix.R_OK | unix.W_OK
		if a.Mode&0o111 != 0 || a.Mode&unix.S_IFMT == unix.S_IFDIR {
			may |= unix.X_OK
		}
	case who.UID == a.UID:
		may = a.Mode >> 6 & 7
	case who.GID == a.GID || slices.Contains(who.Groups, a.GID):
		may = a.Mode >> 3 & 7
	}
	if mask&^may != 0 {
		return unix.EACCES
	}
	return nil
}
