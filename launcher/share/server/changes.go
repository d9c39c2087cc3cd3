package server

import (
	"context"
	"fmt"
	"os"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/wsl2/wsl2/internal/p9"
	"github.com/wsl2/wsl2/internal/p9/localfs"
	"github.com/wsl2/wsl2/internal/p9/replay"
	"github.com/wsl2/wsl2/internal/wire"
	"github.com/wsl2/wsl2/launcher/internal/guestconn"
	"github.com/wsl2/wsl2/launcher/share"
)

const (
	// maxWatched is how many directories are watched at most.
	maxWatched = 4096
	// maxPending is how many changes wait for the guest at most.
	maxPending = 1 << 14
	// leaseTime is how long a guest keeps names and attributes in directories that are watched, where the host has not
	// changed anything for quietTime. What it cannot be told of (by a mapping, by another machine, by another name of a file, in
	// a directory that is no longer watched) it sees thereafter.
	leaseTime = 10 * time.Second
	quietTime = time.Second
	// raiseWait bounds the guest's answer to a change.
	raiseWait = time.Minute
)

// changes are those of the host's that the guest is still to be told.
type changes struct {
	mu      sync.Mutex
	pending []*replay.Change       // guarded by mu
	again   map[replay.Change]bool // those of pending that need not be told twice; guarded by mu
	drop    bool                   // the guest is to forget what nobody uses; guarded by mu
	said    bool                   // that some were missed; guarded by mu
	untold  time.Time              // when the guest was last not told of one; guarded by mu
	some    chan struct{}          // holds a token while there are pending
	raising bool                   // the guest is being told of one; guarded by mu
	last    time.Time              // when the last one came; guarded by mu
	logf    func(format string, args ...any)
}

// tellChanges tells the distro what others than we change in directories that it knows, until stop is
// called. Where that does not work, a share is one without it.
// lease is how long the guest may keep what it knows of a node, for being told of its changes (fusefs.Config), and forget has it
// forget what nobody uses.
func tellChanges(ctx context.Context, s share.Spec, fs *localfs.FS, logf func(format string, args ...any)) (stage *replay.Stage, lease func(p9.Node) time.Duration, forget, stop func()) {
	stage = new(replay.Stage)
	limit := watchLimit()
	c := &changes{again: map[replay.Change]bool{}, some: make(chan struct{}, 1), logf: logf}
	watch, err := fs.Watch(limit, sync.OnceFunc(func() {
		logf("%s: the distro knows more than %d directories: inotify there does not see what the host changes in those that it looked up first", s.Dir, limit)
	}))
	if err != nil {
		logf("%s: inotify in the distro will not see what the host changes: %v", s.Dir, err)
		return stage, nil, nil, func() {}
	}
	ctx, cancel := context.WithCancel(ctx)
	var running sync.WaitGroup
	running.Go(func() {
		defer cancel()
		if err := watch.Run(ctx, c.add, c.lose); err != nil {
			logf("%s: %v", s.Dir, err)
		}
	})
	running.Go(func() {
		defer cancel()
		c.tell(ctx, s, watch, stage)
	})
	lease = func(n p9.Node) time.Duration {
		if !watch.Covers(n) {
			return 0
		}
		return c.lease()
	}
	return stage, lease, c.forget, func() {
		cancel()
		running.Wait()
	}
}

// lease is how long the guest may keep what it is told all changes of: not at all while the host is at it, as more will come, nor
// while it may keep something older than a change that it was not told of.
func (c *changes) lease() time.Duration {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.raising || len(c.pending) > 0 || time.Since(c.last) <= quietTime || time.Since(c.untold) <= leaseTime {
		return 0
	}
	return leaseTime
}

// watchLimit is our part of what the user may watch, and of our descriptors.
func watchLimit() int {
	limit := min(maxWatched, maxFIDs()/4)
	if text, err := os.ReadFile("/proc/sys/fs/fanotify/max_user_marks"); err == nil {
		if n, err := strconv.Atoi(strings.TrimSpace(string(text))); err == nil {
			limit = min(limit, n/8)
		}
	}
	return max(limit, 2)
}

// add takes a change.
func (c *changes) add(change *replay.Change) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.last = time.Now()
	if len(c.pending) == maxPending {
		c.missed()
		return
	}
	one := *change
	if n := len(c.pending); n > 0 && *c.pending[n-1] == one { // as after a rename, of the old name
		return
	}
	switch one.Kind {
	case replay.Modified, replay.Attributes, replay.Written:
		if c.again[one] {
			return
		}
		c.again[one] = true
		if one.Kind == replay.Modified { // the closing comes last
			written := one
			written.Kind = replay.Written
			delete(c.again, written)
		}
	default: // of what comes behind it the guest is told again
		clear(c.again)
	}
	c.pending = append(c.pending, &one)
	c.wake()
}

// forget has the guest forget what nobody uses.
func (c *changes) forget() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.drop = true
	c.wake()
}

// lose is called when changes are lost on their way to us.
func (c *changes) lose() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.last = time.Now()
	c.missed()
}

// missed is called when the guest is not told of a change. Preconditions: mu is held.
func (c *changes) missed() {
	c.untold = time.Now()
	if !c.said {
		c.said = true
		c.logf("the host changes more than inotify in the distro is told of; it misses some")
	}
}

// wake has tell look for something to tell. Preconditions: mu is held.
func (c *changes) wake() {
	select {
	case c.some <- struct{}{}:
	default:
	}
}

// next returns a change, after the one before it was raised, or nil. Preconditions: the token was taken.
func (c *changes) next() *replay.Change {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.drop { // before all others: it may be out of descriptors soon
		c.drop, c.raising = false, true
		return &replay.Change{Kind: replay.Forget}
	}
	c.raising = len(c.pending) > 0
	if !c.raising {
		return nil
	}
	one := c.pending[0]
	c.pending = c.pending[1:]
	delete(c.again, *one)
	return one
}

// tell has the distro replay changes, until ctx ends. One that it does not, for whatever reason, is missed.
func (c *changes) tell(ctx context.Context, s share.Spec, watch *localfs.Watch, stage *replay.Stage) {
	to := guest{spec: s}
	defer to.close()
	failed := false
	for {
		select {
		case <-c.some:
		case <-ctx.Done():
			return
		}
		for one := c.next(); one != nil && ctx.Err() == nil; one = c.next() {
			if one.Kind == replay.Renamed { // not earlier: each is a descriptor
				file, err := watch.Walk(one.NewDir, one.NewName)
				if err == nil {
					one.File = file
				} else { // gone again
					one.Kind = replay.Removed
				}
			}
			if one.Kind == replay.Forget && s.Tag == "" { // over 9P nothing is kept
				continue
			}
			if m, err := message(one, watch); err == nil {
				stage.Set(one)
				err = to.raise(ctx, m)
				stage.Set(nil)
				if err != nil && ctx.Err() == nil {
					c.mu.Lock()
					c.untold = time.Now()
					c.mu.Unlock()
					if !failed {
						failed = true // said once: each change may
						c.logf("%s: tell the distro of changes: %v; inotify there misses some", s.Dir, err)
					}
				}
			}
			if one.File != nil {
				one.File.Close()
			}
		}
	}
}

// message is a change as the distro is told it; an error if its directory is no longer there.
func message(c *replay.Change, watch *localfs.Watch) (m *wire.ShareChange, err error) {
	m = &wire.ShareChange{Kind: uint8(c.Kind), Mode: c.Mode, Name: c.Name, NewName: c.NewName}
	if c.Kind == replay.Forget {
		return m, nil
	}
	if m.Dir, err = watch.Path(c.Dir); err == nil && c.Kind == replay.Renamed {
		m.NewDir, err = watch.Path(c.NewDir)
	}
	return m, err
}

// guest is the connection to the distro's init.
type guest struct {
	spec share.Spec
	conn *guestconn.Conn // nil: to be made with the next change
}

// raise returns when the distro has replayed a change. After a failure it may still be at it, and the connection is of no use.
func (g *guest) raise(ctx context.Context, m *wire.ShareChange) (err error) {
	if g.conn == nil {
		g.conn, err = guestconn.Dial(g.spec.VsockPath, g.spec.Port, wire.Hello{Version: wire.Version, Role: wire.RoleShareChanges, Session: g.spec.Session}, nil)
		if err != nil {
			return err
		}
	}
	conn := g.conn
	stop := context.AfterFunc(ctx, func() { conn.Close() })
	defer stop()
	defer func() {
		if err != nil {
			g.close()
		}
	}()
	conn.SetDeadline(time.Now().Add(raiseWait)) //nolint:errcheck // what is read and written tells
	defer conn.SetDeadline(time.Time{})         //nolint:errcheck // see wire.Within
	if err := wire.Write(conn, m); err != nil {
		return err
	}
	answer, err := wire.Read(conn)
	if err != nil {
		return err
	}
	if _, ok := answer.(*wire.ShareRaised); !ok {
		return fmt.Errorf("the distro answers with %v", answer.Type())
	}
	return nil
}

func (g *guest) close() {
	if g.conn != nil {
		g.conn.Close()
		g.conn = nil
	}
}
