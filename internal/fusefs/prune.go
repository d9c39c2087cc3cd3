package fusefs

import (
	"context"
	"slices"

	"github.com/hanwen/go-fuse/v2/fuse"
)

// Notifier tells a kernel that a name means nothing any more (*fuse.Server).
type Notifier interface {
	EntryNotify(dir uint64, name string) fuse.Status
}

// Prune keeps the kernel from knowing many more than keep files, until ctx ends: a host with
// much memory forgets none by itself, and each is one that the other side holds open. The oldest
// go until three quarters are left, with all below them; what is open, or somebody's directory, stays known.
func (fs *FS) Prune(ctx context.Context, kernel Notifier, keep int) {
	fs.mu.Lock()
	fs.prune, fs.keep = make(chan struct{}, 1), keep
	fs.isFull()
	full := fs.prune
	fs.mu.Unlock()
	for {
		select {
		case <-full:
		case <-ctx.Done():
			return
		}
		for _, n := range fs.oldest() {
			kernel.EntryNotify(n.dir, n.name) // one that is gone already is no loss
		}
	}
}

// isFull tells Prune. Preconditions: mu is held.
func (fs *FS) isFull() {
	if fs.prune == nil || len(fs.nodes) <= fs.keep {
		return
	}
	select {
	case fs.prune <- struct{}{}:
	default:
	}
}

// oldest are the names of the nodes that have been known for longest, as many as are to go.
func (fs *FS) oldest() (list []node) {
	fs.mu.Lock()
	defer fs.mu.Unlock()
	ids := make([]uint64, 0, len(fs.nodes))
	for id := range fs.nodes {
		if id != fuse.FUSE_ROOT_ID {
			ids = append(ids, id)
		}
	}
	slices.Sort(ids)
	for _, id := range ids[:max(len(ids)-fs.keep/4*3, 0)] {
		list = append(list, node{dir: fs.nodes[id].dir, name: fs.nodes[id].name})
	}
	return list
}
