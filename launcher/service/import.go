package service

import (
	"context"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"slices"
	"time"

	"golang.org/x/sys/unix"

	"github.com/wsl2/wsl2/images"
	"github.com/wsl2/wsl2/internal/wire"
	"github.com/wsl2/wsl2/launcher/api"
	"github.com/wsl2/wsl2/launcher/config"
	"github.com/wsl2/wsl2/launcher/registry"
)

// diskName is a distro's disk in its directory; partialSuffix marks it until
// the import has succeeded.
const (
	diskName      = "disk.ext4"
	partialSuffix = ".partial"
)

// pending is the note of an import under way, written before the first file of
// it is made: who finds it after a crash removes what it names.
type pending struct {
	Name    string `json:"name"`
	Dir     string `json:"dir"`
	Created bool   `json:"created"` // the directory is the import's own
}

const pendingPrefix = ".import-"

// importDistro makes a distro from an archive that the client sends. On any
// failure, the client's death included, nothing is left.
func (s *Service) importDistro(p *peer, reg *registry.Registry, c api.Call) (_ any, err error) {
	if err := registry.CheckName(c.Name); err != nil {
		return nil, api.Errorf(api.CodeBadRequest, "choose another name", "%v", err)
	}
	if d, err := reg.Get(c.Name); err == nil {
		return nil, api.Errorf(api.CodeExists, "choose another name, or remove it: wsl2 --unregister "+d.Name, "a distro named %s exists", d.Name)
	}
	if err := s.m.Lock(c.Name, "being imported"); err != nil {
		return nil, err
	}
	defer s.m.Unlock(c.Name)

	note := pending{Name: c.Name, Dir: c.Dir}
	if note.Dir == "" {
		note.Dir = filepath.Join(s.paths.Distros(), c.Name)
	}
	if !filepath.IsAbs(note.Dir) {
		return nil, api.Errorf(api.CodeBadRequest, "", "directory %q is not absolute", note.Dir)
	}
	// Before the note is written: what it names is removed after a crash.
	if disk := filepath.Join(note.Dir, diskName); exists(disk) {
		return nil, diskThere(disk)
	}
	if err := images.CheckSpace(note.Dir, c.ArchiveBytes); err != nil {
		return nil, importFailure(err)
	}
	ctx, sent, end := p.watch()
	defer end()
	undo, err := s.begin(&note)
	if err != nil {
		return nil, err
	}
	defer func() {
		if uerr := undo(err != nil); uerr != nil {
			s.log.Error("import not cleaned up", "dir", note.Dir, "err", uerr)
		}
	}()

	settings, _ := config.Load(s.paths.ConfigFile, config.ThisHost())
	partial := filepath.Join(note.Dir, diskName+partialSuffix)
	if err := images.CreateDisk(ctx, partial, settings.DefaultDiskBytes); err != nil {
		return nil, importFailure(err)
	}
	var archive wire.SessionID
	rand.Read(archive[:])
	var target Session
	unpacked := make(chan error, 1)
	ready := make(chan Session, 1)
	// Not ctx: the guest has to be done with the disk in any case. It is, as soon
	// as the archive's connection ends; one that is not gets killAfter.
	work, giveUp := context.WithCancelCause(context.Background())
	defer giveUp(nil)
	undone := func() {
		t := time.AfterFunc(killAfter, func() { giveUp(fmt.Errorf("the guest has not given up the import within %v", killAfter)) })
		defer t.Stop()
		<-unpacked
	}
	go func() {
		unpacked <- s.m.Import(work, c.Name, partial, archive, c.VM, func(at Session) { ready <- at })
	}()
	select {
	case target = <-ready:
		for _, n := range target.Notices {
			p.notice(n)
		}
		p.json(api.KindReady, api.Ready{VsockPath: target.VsockPath, Port: target.Port, Archive: archive})
	case err := <-unpacked:
		return nil, err
	case <-ctx.Done():
		go func() { // it may be about to wait for the archive
			select {
			case at := <-ready:
				cutArchive(at, archive)
			case <-work.Done():
			}
		}()
		undone()
		return nil, errClientGone
	}
	select {
	case err = <-unpacked:
	case <-ctx.Done():
		// The client has gone, perhaps before it sent anything: an archive
		// that ends at once lets the guest stop waiting.
		cutArchive(target, archive)
		undone()
		return nil, errClientGone
	}
	if err != nil {
		// To the guest a full host is an I/O error of its disk.
		if full := images.CheckSpace(note.Dir, 0); errors.Is(full, images.ErrNoSpace) {
			return nil, importFailure(full)
		}
		return nil, err
	}
	// The guest has seen the end of a tar; only the client knows whether that
	// was all of the file (a checksum may have failed behind it).
	select {
	case <-sent:
	case <-ctx.Done():
		return nil, errClientGone
	}
	disk := filepath.Join(note.Dir, diskName)
	if err := commit(partial, disk); err != nil {
		return nil, fmt.Errorf("the imported disk cannot be stored: %w", err)
	}
	err = reg.Add(registry.Distro{Name: c.Name, ID: registry.NewID(), Disk: disk, Created: time.Now().UTC().Truncate(time.Second)})
	if err != nil {
		return nil, err
	}
	s.log.Info("imported", "distro", c.Name, "disk", disk)
	return struct{}{}, nil
}

func exists(path string) bool {
	_, err := os.Lstat(path)
	return err == nil
}

func importFailure(err error) error {
	switch {
	case errors.Is(err, images.ErrNoSpace):
		return api.Errorf(api.CodeNoSpace, "free some, or give another directory: wsl2 --import NAME DIR FILE", "%v", err)
	case errors.Is(err, images.ErrNoMke2fs):
		return api.Errorf(api.CodeNoToolchain, "", "%v", err)
	}
	return err
}

// begin writes the note and makes the directory. undo removes the note and, if
// the import failed, what it made.
func (s *Service) begin(note *pending) (undo func(failed bool) error, err error) {
	if err := os.MkdirAll(s.paths.Distros(), 0o700); err != nil {
		return nil, err
	}
	if _, err := os.Lstat(note.Dir); errors.Is(err, fs.ErrNotExist) {
		note.Created = true
	}
	text, err := json.Marshal(note)
	if err != nil {
		return nil, err
	}
	path := filepath.Join(s.paths.Distros(), pendingPrefix+note.Name)
	if err := writeSynced(path, text); err != nil {
		os.Remove(path)
		return nil, err
	}
	lock, err := claimDir(note.Dir)
	if err != nil {
		os.Remove(path)
		if note.Created {
			os.Remove(note.Dir) // if it is empty, hence nobody else's
		}
		return nil, err
	}
	return func(failed bool) error {
		defer lock.Close()
		var err error
		if failed {
			err = note.remove()
		}
		return errors.Join(err, os.Remove(path))
	}, nil
}

// claimDir makes the directory and locks it (flock) for one import: two that were
// given the same one would take each other's disk. Nothing of an import may be there.
func claimDir(dir string) (lock *os.File, err error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, err
	}
	if lock, err = os.Open(dir); err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			lock.Close()
		}
	}()
	if err := unix.Flock(int(lock.Fd()), unix.LOCK_EX|unix.LOCK_NB); err == unix.EWOULDBLOCK {
		return nil, api.Errorf(api.CodeBusy, "choose another directory", "another distro is being imported to %s", dir)
	} else if err != nil {
		return nil, fmt.Errorf("lock %s: %w", dir, err)
	}
	for _, name := range []string{diskName, diskName + partialSuffix} {
		if path := filepath.Join(dir, name); exists(path) {
			return nil, diskThere(path)
		}
	}
	return lock, nil
}

func diskThere(path string) error {
	return api.Errorf(api.CodeExists, "move it away or choose another directory", "%s is there already, and belongs to no distro that is registered", path)
}

// remove takes away what the import made. A disk under its final name is the
// import's as well: none was there when it began.
func (n pending) remove() error {
	var errs []error
	for _, name := range []string{diskName + partialSuffix, diskName} {
		if err := os.Remove(filepath.Join(n.Dir, name)); err != nil && !errors.Is(err, fs.ErrNotExist) {
			errs = append(errs, err)
		}
	}
	if n.Created {
		// Only if it is empty: the user may have put something there.
		os.Remove(n.Dir)
	}
	return errors.Join(errs...)
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

// commit makes the disk durable under its final name.
func commit(partial, disk string) error {
	f, err := os.Open(partial)
	if err != nil {
		return err
	}
	if err := errors.Join(f.Sync(), f.Close()); err != nil {
		return err
	}
	if err := os.Rename(partial, disk); err != nil {
		return err
	}
	return registry.SyncDir(filepath.Dir(disk))
}

// sweep removes what imports that were cut off by a crash left. The VM that
// worked on them may still be ending: removing a file that it has open is harmless.
func (s *Service) sweep(reg *registry.Registry) {
	notes, _ := filepath.Glob(filepath.Join(s.paths.Distros(), pendingPrefix+"*"))
	for _, path := range notes {
		text, err := os.ReadFile(path)
		if err != nil {
			s.log.Warn("import's note not read", "err", err)
			continue
		}
		var n pending
		if json.Unmarshal(text, &n) != nil || registry.CheckName(n.Name) != nil || !filepath.IsAbs(n.Dir) {
			// Cut off while it was written: nothing else was made yet.
			os.Remove(path)
			continue
		}
		// The disk there may be that of a distro which was imported after all, or of
		// another one that was being imported to the same directory.
		if !slices.ContainsFunc(reg.List(), func(d registry.Distro) bool { return filepath.Dir(d.Disk) == n.Dir }) {
			if err := n.remove(); err != nil {
				s.log.Warn("import not cleaned up", "dir", n.Dir, "err", err)
				continue
			}
			s.log.Info("removed what was left of an import", "distro", n.Name)
		}
		os.Remove(path)
	}
}

// cutArchive opens an import's archive connection and closes it.
func cutArchive(at Session, archive wire.SessionID) {
	c, err := net.DialTimeout("unix", at.VsockPath, time.Second)
	if err != nil {
		return
	}
	defer c.Close()
	c.SetDeadline(time.Now().Add(time.Second))
	b := fmt.Appendf(nil, "CONNECT %d\n", at.Port)
	if b, err = wire.Append(b, &wire.Hello{Version: wire.Version, Role: wire.RoleArchive, Session: archive}); err == nil {
		c.Write(b)
	}
}

// unregister stops a distro and deletes it.
func (s *Service) unregister(reg *registry.Registry, d registry.Distro) error {
	if err := s.m.Lock(d.Name, "being unregistered"); err != nil {
		return err
	}
	defer s.m.Unlock(d.Name)
	if err := s.m.Terminate(context.Background(), d.Name); err != nil {
		return err
	}
	// Off the list first: a crash in between leaves a file, not an entry
	// without a disk.
	if err := reg.Remove(d.Name); err != nil {
		return err
	}
	if err := os.Remove(d.Disk); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return api.Errorf(api.CodeFailed, "delete it yourself", "%s is unregistered, but its disk could not be deleted: %v", d.Name, err)
	}
	os.Remove(filepath.Dir(d.Disk)) // if nothing else is there
	s.log.Info("unregistered", "distro", d.Name)
	return nil
}
