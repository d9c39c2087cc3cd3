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
// Nothing that is asked for as UID changes the tree, whoever asks and whatever is on the stage. What is not the
// change on the stage fails: the client's kernel would take a success for the end of files that are there.
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
	Forget          // no change: the client's kernel is to forget the names and files that nobody uses
)

// Change is one that was made to the entry Name of a directory.
type Change struct {
	Kind    Kind
	Dir     uint64 // QID.Path
	Name    string
	NewDir  uint64 // of Renamed
	NewName string
	File    p9.Node // of Renamed, on the stage: by its new name
	Mode    uint32  // S_IFMT of the file
}

// Stage holds the change that is replayed.
type Stage struct {
	mu      sync.Mutex
	current *Change // nil: none; guarded by mu
	done    bool    // the client has made it; guarded by mu
	// The client was shown what the old name was of, and that the new one was of nothing that is there. It may know files
	// by name without asking: it would take away one that is there. Guarded by mu.
	shown, cleared bool
}

// Set puts a change on the stage, or clears it with nil.
func (s *Stage) Set(c *Change) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.current, s.done, s.shown, s.cleared = c, false, false, false
}

// Done is called in place of what the client makes of a change, by kind and names. ESTALE says that it is not
// the one on the stage, or that the client means files that are there.
func (s *Stage) Done(made Change) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	c := s.current
	if c == nil || s.done || made.Kind != c.Kind || made.Dir != c.Dir || made.Name != c.Name {
		return unix.ESTALE
	}
	switch c.Kind {
	case Removed:
		if !s.shown {
			return unix.ESTALE
		}
	case Renamed:
		if !s.shown || made.NewDir != c.NewDir || made.NewName != c.NewName {
			return unix.ESTALE
		}
		// A file that the client knows by that name is no loss to it, but a directory would be dead to who is in it.
		if c.Mode&unix.S_IFMT == unix.S_IFDIR && !s.cleared {
			return unix.ESTALE
		}
	}
	s.done = true
	return nil
}

// Hides tells whether the change has made an entry, which was not there before.
func (s *Stage) Hides(dir uint64, name string) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	c := s.current
	if c == nil || s.done {
		return false
	}
	return c.Kind == Created && dir == c.Dir && name == c.Name || c.Kind == Renamed && dir == c.NewDir && name == c.NewName
}

// Walk returns the child of dir that was there before the change. gone, if it is known, is a file that is no more and had the name:
// the client, who takes its own for it, then tells also those who watch it of its end.
func (s *Stage) Walk(dir p9.Node, name string, gone p9.Node) (p9.Node, error) {
	n, err := s.before(dir, name, gone)
	if n == nil && err == nil {
		return dir.Walk(name)
	}
	return n, err
}

// before is Walk for what the change has made another; nil for all else.
func (s *Stage) before(dir p9.Node, name string, gone p9.Node) (p9.Node, error) {
	s.mu.Lock() // who calls Set(nil) closes the File then
	defer s.mu.Unlock()
	c := s.current
	if c == nil || s.done {
		return nil, nil
	}
	if gone != nil && (gone.QID().Type == p9.QTDir) != (c.Mode&unix.S_IFMT == unix.S_IFDIR) {
		gone = nil
	}
	path := dir.QID().Path
	old, target := path == c.Dir && name == c.Name, path == c.NewDir && name == c.NewName
	switch {
	case c.Kind == Created && old:
		return nil, unix.ENOENT
	case c.Kind == Renamed && target:
		s.cleared = true
		if gone != nil {
			return gone.Clone(), nil
		}
		return nil, unix.ENOENT
	case c.Kind == Removed && old:
		s.shown = true
		if gone != nil {
			return gone.Clone(), nil
		}
		return newGhost(dir, c.Mode), nil
	case c.Kind == Renamed && old && c.File != nil:
		s.shown = true
		return c.File.Clone(), nil
	}
	return nil, nil
}
