package service

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/wsl2/wsl2/launcher/api"
	"github.com/wsl2/wsl2/launcher/native"
	"github.com/wsl2/wsl2/launcher/registry"
)

// This file keeps changes of files whole. The registry says which disk belongs to a
// distro, and its change is atomic: what a verb makes is garbage before that change,
// what it takes away is garbage after it. So a note of both, written before the first file is
// touched, is enough to clean up in every case: success, failure, and kill -9,
// after which the next service finds the note.

// note is what stands in the file of an operation under way.
type note struct {
	Name string `json:"name"` // of the distro
	// Make are the files that it makes; one that is no registered distro's disk goes.
	Make []string `json:"make,omitempty"`
	// Drop are those that it takes away: one goes if no registered distro has it,
	// and one of Make, if there are any, took its place.
	Drop []string `json:"drop,omitempty"`
	// Dirs are the directories that it made; those that are empty go.
	Dirs []string `json:"dirs,omitempty"`
}

const notePrefix = ".change-"

// operation is a noted change.
type operation struct {
	s    *Service
	note note
	path string
	lock *os.File // of the directory that files are made in, or nil
}

// begin notes a change. dir, if not "", is the directory that it makes a disk or a root in, which is
// called base there: it is made if need be and claimed, and has nothing of that name yet. The caller ends it with end.
func (s *Service) begin(n note, dir, base string) (*operation, error) {
	if err := os.MkdirAll(s.paths.Distros(), 0o700); err != nil {
		return nil, err
	}
	if dir != "" {
		if !filepath.IsAbs(dir) {
			return nil, api.Errorf(api.CodeBadRequest, "", "directory %q is not absolute", dir)
		}
		partial, disk := filepath.Join(dir, base+partialSuffix), filepath.Join(dir, base)
		// Before the note is written: what it names is removed after a crash.
		if exists(disk) || exists(partial) {
			lock, err := claimDir(dir, base) // says what it is
			if err == nil {
				lock.Close() // it has gone meanwhile
				err = diskThere(disk)
			}
			return nil, err
		}
		n.Make = append(n.Make, partial, disk)
		if !exists(dir) {
			n.Dirs = append(n.Dirs, dir)
		}
	}
	o := &operation{s: s, note: n}
	var err error
	if o.path, err = s.writeNote(n); err != nil {
		return nil, err
	}
	if dir == "" {
		return o, nil
	}
	if o.lock, err = claimDir(dir, base); err != nil {
		os.Remove(o.path)
		for _, d := range n.Dirs {
			os.Remove(d) // if it is empty, hence nobody else's
		}
		return nil, err
	}
	return o, nil
}

// writeNote makes a note durable, in a file of its own: one that could not be settled stays, whatever is
// done with the distro until the next service tries again.
func (s *Service) writeNote(n note) (path string, err error) {
	text, err := json.Marshal(n)
	if err != nil {
		return "", err
	}
	path = filepath.Join(s.paths.Distros(), notePrefix+n.Name+"-"+registry.NewID())
	if err := writeSynced(path, text); err != nil {
		os.Remove(path)
		return "", err
	}
	return path, nil
}

// end removes what the change leaves behind, whether it was made or not, and
// the note.
func (o *operation) end(reg *registry.Registry) { o.endWithin(context.Background(), reg) }

func (o *operation) endWithin(ctx context.Context, reg *registry.Registry) {
	if o.lock != nil {
		defer o.lock.Close()
	}
	err := settle(&o.note, reg, func(path string) error { return o.s.remove(ctx, path) })
	if err == nil {
		err = os.Remove(o.path)
	}
	if err != nil {
		o.s.log.Error("not cleaned up", "distro", o.note.Name, "err", err)
	}
}

// settle removes, by the function, what is garbage by the registry.
func settle(n *note, reg *registry.Registry, remove func(path string) error) error {
	distros := reg.List()
	registered := func(path string) bool {
		return slices.ContainsFunc(distros, func(d registry.Distro) bool { return d.Disk == path })
	}
	var errs []error
	tryRemove := func(path string) {
		if registered(path) {
			return
		}
		if err := remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
			errs = append(errs, err)
		}
	}
	if len(n.Make) == 0 || slices.ContainsFunc(n.Make, registered) {
		for _, path := range n.Drop {
			tryRemove(path)
			os.Remove(filepath.Dir(path)) // if nothing else is there
		}
	}
	for _, path := range n.Make {
		tryRemove(path)
	}
	for _, dir := range n.Dirs {
		os.Remove(dir) // if it is empty: the user may have put something there
	}
	return errors.Join(errs...)
}

// asideMark makes the name of a root that is being deleted of its name, in front of a random ID.
const asideMark = ".deleted-"

// isRoot tells whether the path is a root's, complete or not, or one's that was put aside.
func isRoot(path string) bool {
	base := filepath.Base(path)
	return base == rootName || base == rootName+partialSuffix || isAside(path)
}

func isAside(path string) bool {
	return strings.HasPrefix(filepath.Base(path), rootName) && strings.Contains(filepath.Base(path), asideMark)
}

// remove removes a disk, or a root with all that is in it.
func (s *Service) remove(ctx context.Context, path string) error {
	if isRoot(path) {
		return s.removeRoot(ctx, path)
	}
	return os.Remove(path)
}

// putAside gives a root that is garbage another name and a note of its own, by which it is deleted while the
// service works: that takes as long as it has files. dirs are to go with it, if they are empty then.
func (s *Service) putAside(path string, dirs []string) error {
	if !exists(path) {
		return s.removeRoot(context.Background(), path) // what else there may be of it
	}
	aside := path + asideMark + registry.NewID()
	n := note{Make: []string{aside}, Dirs: dirs}
	at, err := s.writeNote(n)
	if err != nil {
		return err
	}
	if err := native.Rename(path, aside); err != nil {
		return err
	}
	s.aside = append(s.aside, operation{s: s, note: n, path: at})
	return nil
}

// deleteAside deletes the roots that the sweep has put aside, until ctx ends; the next service
// does the rest.
func (s *Service) deleteAside(ctx context.Context, reg *registry.Registry) {
	for _, o := range s.aside {
		if ctx.Err() != nil {
			return
		}
		o.endWithin(ctx, reg)
	}
}

// sweep settles the changes that a crash cut off. The VM that worked on them may
// still be ending: removing a file that it has open is harmless.
func (s *Service) sweep(reg *registry.Registry) {
	registry.Sweep(s.paths.Registry())
	registry.Sweep(s.paths.PortRules())
	notes, _ := filepath.Glob(filepath.Join(s.paths.Distros(), notePrefix+"*"))
	for _, path := range notes {
		text, err := os.ReadFile(path)
		if err != nil {
			s.log.Warn("note of a change not read", "err", err)
			continue
		}
		var n note
		relative := func(p string) bool { return !filepath.IsAbs(p) }
		if json.Unmarshal(text, &n) != nil || slices.ContainsFunc(slices.Concat(n.Make, n.Drop, n.Dirs), relative) {
			// Cut off while it was written: nothing else was done yet.
			os.Remove(path)
			continue
		}
		if slices.ContainsFunc(n.Make, isAside) {
			s.aside = append(s.aside, operation{s: s, note: n, path: path})
			continue
		}
		dirs := n.Dirs
		for _, path := range n.Drop {
			dirs = append(dirs, filepath.Dir(path))
		}
		err = settle(&n, reg, func(path string) error {
			if isRoot(path) {
				return s.putAside(path, dirs)
			}
			return os.Remove(path)
		})
		if err != nil {
			s.log.Warn("not cleaned up", "distro", n.Name, "err", err)
			continue
		}
		s.log.Info("cleaned up after a change that was cut off", "distro", n.Name)
		os.Remove(path)
	}
}

// claimDir makes the directory and locks it (flock) for one change: two that were
// given the same one would take each other's disk. Nothing of a disk may be there.
func claimDir(dir, base string) (lock *os.File, err error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, err
	}
	f, err := os.Open(dir)
	if err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			f.Close()
		}
	}()
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err == unix.EWOULDBLOCK {
		return nil, api.Errorf(api.CodeBusy, "choose another directory", "another distro is being made in %s", dir)
	} else if err != nil {
		return nil, fmt.Errorf("lock %s: %w", dir, err)
	}
	for _, name := range []string{base, base + partialSuffix} {
		if path := filepath.Join(dir, name); exists(path) {
			return nil, diskThere(path)
		}
	}
	return f, nil
}

func diskThere(path string) error {
	return api.Errorf(api.CodeExists, "move it away or choose another directory", "%s is there already, and belongs to no distro that is registered", path)
}

func exists(path string) bool {
	_, err := os.Lstat(path)
	return err == nil
}

func writeSynced(path string, text []byte) error {
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return err
	}
	_, err = f.Write(text)
	if err = errors.Join(err, f.Sync(), f.Close()); err != nil {
		return err
	}
	return registry.SyncDir(filepath.Dir(path))
}

// commit makes a file durable under its final name.
func commit(partial, disk string) error {
	// Who filled a root has written it back; to its user it may be closed.
	if filepath.Base(disk) != rootName {
		f, err := os.Open(partial)
		if err != nil {
			return err
		}
		if err := errors.Join(f.Sync(), f.Close()); err != nil {
			return err
		}
	}
	rename := os.Rename
	if filepath.Base(disk) == rootName {
		rename = native.Rename
	}
	if err := rename(partial, disk); err != nil {
		return err
	}
	return registry.SyncDir(filepath.Dir(disk))
}
