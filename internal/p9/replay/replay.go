// Package replay lets a client's kernel see changes that others have made to the tree that
// it mounts, as its own: so that inotify(7) tells of them.
//
// Only what is done through a mount raises events there. So somebody at the client, init, does
// once more what has been done: mkdir(2) of the directory that there is, unlink(2) of the file
// that there was. He does so as the user UID, and the server, who knows which change he is at
// (Stage), shows him the tree as it was before, until he has made it. Nobody else is shown anything but the tree.
//
// # Trust
//
// Nothing that is asked for as UID changes the tree, whoever asks and whatever is on the stage.
package replay

import (
	"sync"

	"golang.org/x/sys/unix"

	"github.com/wsl2/wsl2/internal/p9"
)

// UID is the user (fsuid) who replays. No account has it.
const UID = 1<<32 - 16

// Kind of a change.
type Kind uint8

// Kinds.
const (
	Created    Kind = iota + 1
	Removed         // Mode tells what it was
	Renamed         // to NewName
	Modified        // the content of a file
	Attributes      // owner, mode, times
	Written         // a program that wrote to the file has closed it
)

// Change is one that was made to the entry Name of a directory.
type Change struct {
	Kind    Kind
	Dir     uint64 // QID.Path
	Name    string
	NewDir  uint64 // of Renamed
	NewName string
	File    p9.Node // of Renamed: by its new name
	Mode    uint32  // S_IFMT of the file
}

// Stage holds the change that is replayed.
type Stage struct {
	mu      sync.Mutex
	current *Change // nil: none; guarded by mu
	done    bool    // the client has made it; guarded by mu
}

// Set puts a change on the stage, or clears it with nil.
func (s *Stage) Set(c *Change) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.current, s.done = c, false
}

// Done is what the client calls the change by, whatever it is, in place of making it.
func (s *Stage) Done() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.done = true
}

// Walk returns the child of dir that was there before the change.
func (s *Stage) Walk(dir p9.Node, name string) (p9.Node, error) {
	n, err := s.before(dir, name)
	if n == nil && err == nil {
		return dir.Walk(name)
	}
	return n, err
}

// before is Walk for what the change has made another; nil for all else.
func (s *Stage) before(dir p9.Node, name string) (p9.Node, error) {
	s.mu.Lock() // who calls Set(nil) closes the File then
	defer s.mu.Unlock()
	c := s.current
	if c == nil || s.done {
		return nil, nil
	}
	path := dir.QID().Path
	old, target := path == c.Dir && name == c.Name, path == c.NewDir && name == c.NewName
	switch {
	case c.Kind == Created && old, c.Kind == Renamed && target:
		return nil, unix.ENOENT
	case c.Kind == Removed && old:
		return newGhost(dir, c.Mode), nil
	case c.Kind == Renamed && old && c.File != nil:
		return c.File.Clone(), nil
	}
	return nil, nil
}
