package service

import (
	"context"
	"errors"
	"fmt"
	"io"
	"path/filepath"
	"time"

	"github.com/wsl2/wsl2/images"
	"github.com/wsl2/wsl2/internal/nsinit"
	"github.com/wsl2/wsl2/internal/wire"
	"github.com/wsl2/wsl2/launcher/api"
	"github.com/wsl2/wsl2/launcher/internal/guestconn"
	"github.com/wsl2/wsl2/launcher/registry"
)

// This file is what distros of both versions are copied and converted by: the export of one is the
// import of the other.

// noDisk refuses what a distro of version 1 cannot: it has no such thing.
func noDisk(d registry.Distro, has string) error {
	return api.Errorf(api.CodeBadRequest, "version 2 can: wsl2 --set-version "+d.Name+" 2", "%s is a distro of version 1 and has %s", d.Name, has)
}

// nothingMounted refuses to take away a root of version 1 in which the host has mounted something: a copy
// would have its files, and the root could not be deleted.
func nothingMounted(d registry.Distro) error {
	if d.Version != 1 || !exists(d.Disk) {
		return nil
	}
	root, err := filepath.EvalSymlinks(d.Disk)
	if err != nil {
		return err
	}
	mounts, err := nsinit.MountsBelow(root)
	if err == nil && len(mounts) > 0 {
		err = api.Errorf(api.CodeBusy, "unmount it: umount "+mounts[0], "something is mounted in the root of %s, on %s", d.Name, mounts[0])
	}
	return err
}

// setVersion converts a distro in the directory where it is.
func (s *Service) setVersion(ctx context.Context, p *peer, reg *registry.Registry, d registry.Distro, c api.Call) (changed api.Changed, err error) {
	if c.Version != 1 && c.Version != 2 {
		return changed, api.Errorf(api.CodeBadRequest, "", "version %d: there are 1 and 2", c.Version)
	}
	if c.Version == d.Version {
		return changed, api.Errorf(api.CodeBadRequest, "", "%s is of version %d already", d.Name, d.Version)
	}
	return changed, s.transform(ctx, p, reg, d, c.Version, filepath.Dir(d.Disk), c.VM)
}

// transform makes what a distro is in dir anew, of this version, and takes it for the
// distro. Until the registry names it both are complete.
func (s *Service) transform(ctx context.Context, p *peer, reg *registry.Registry, d registry.Distro, version int, dir string, o api.VMOptions) error {
	if err := nothingMounted(d); err != nil {
		return err
	}
	op, err := s.begin(note{Name: d.Name, Drop: []string{d.Disk}}, dir, baseName(version))
	if err != nil {
		return err
	}
	defer op.end(reg)
	to := d
	to.Disk, to.Version = filepath.Join(dir, baseName(version)), version
	if err := s.copyTo(ctx, p, d, to, o); err != nil {
		return err
	}
	return reg.Update(d.Name, func(d *registry.Distro) { d.Disk, d.Version = to.Disk, to.Version })
}

// copyTo makes the disk or root of the distro to, with the files of another that does not run.
func (s *Service) copyTo(ctx context.Context, p *peer, from, to registry.Distro, o api.VMOptions) error {
	partial := to.Disk + partialSuffix
	_, total := diskUse(from.Disk) // of a root it is not known
	if err := images.CheckSpace(filepath.Dir(to.Disk), uint64(total)); err != nil {
		return err
	}
	if err := s.createEmpty(ctx, to.Version, partial, 0); err != nil {
		return err
	}
	// Not ctx: the guests have to be done with disk and root in any case. They are, as soon as the
	// archive's connections end.
	work, giveUp := context.WithCancelCause(context.Background())
	defer giveUp(nil)
	gone := ctx
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	source, target := newEnd(), newEnd()
	done := make(chan error, 2)
	maker := to
	maker.ID = registry.NewID() // one machine works on one root: both may be the same distro's
	defer s.own.forget(maker.ID)
	go func() {
		defer close(source.ended)
		done <- s.managerOf(from).Export(work, from.Name, from.Disk, source.archive, o, source.isReady)
	}()
	go func() {
		defer close(target.ended)
		_, err := s.makerOf(maker).Import(work, to.Name, partial, target.archive, o, target.isReady)
		done <- err
	}()
	progress := p.progress("copying the files")
	pumped := make(chan error, 1)
	go func() { pumped <- pump(ctx, source, target, func(n int64) { progress(n, max(n+1, total)) }) }()
	defer context.AfterFunc(ctx, func() {
		time.AfterFunc(killAfter, func() { giveUp(fmt.Errorf("the archive was not given up within %v", killAfter)) })
	})()
	var failure error // the first is the reason of the other
	for range 2 {
		if err := <-done; err != nil && failure == nil {
			failure = err
			cancel(err)
		}
	}
	err := <-pumped
	switch {
	case failure != nil && gone.Err() != nil:
		return context.Cause(gone)
	case failure != nil:
		return failure
	case err != nil:
		return err
	}
	return commit(partial, to.Disk)
}

// end is one side of a copy.
type end struct {
	archive wire.SessionID
	ready   chan Session  // where it waits for the archive's connection
	ended   chan struct{} // closed when it does not any more
}

func newEnd() end { return end{newArchive(), make(chan Session, 1), make(chan struct{})} }

func (e end) isReady(at Session) { e.ready <- at }

// dial opens the archive's connection; when ctx has ended, one that ends at once, so that the side stops
// waiting. It is nil if the side has failed.
func (e end) dial(ctx context.Context) (*guestconn.Conn, error) {
	var at Session
	select {
	case at = <-e.ready:
	case <-e.ended:
		return nil, nil
	}
	if ctx.Err() != nil {
		cutArchive(at, e.archive)
		return nil, nil
	}
	c, err := guestconn.Dial(at.VsockPath, at.Port, wire.Hello{Version: wire.Version, Role: wire.RoleArchive, Session: e.archive}, nil)
	if err != nil {
		return nil, fmt.Errorf("carry the files over: %w", err)
	}
	return c, nil
}

// pump carries the archive from the one to the other until ctx ends.
func pump(ctx context.Context, source, target end, progress func(int64)) error {
	r, err := source.dial(ctx)
	if r != nil {
		defer r.Close()
		defer context.AfterFunc(ctx, func() { r.Close() })()
	}
	w, werr := target.dial(ctx)
	if w != nil {
		defer w.Close()
		defer context.AfterFunc(ctx, func() { w.Close() })()
	}
	if err = errors.Join(err, werr); err != nil || r == nil || w == nil {
		return err // a side that has failed says why
	}
	if _, err := io.Copy(counted{w, new(int64), progress}, r); err != nil {
		return fmt.Errorf("carry the files over: %w", err)
	}
	// It closes its side once it has read all: closing ours earlier could cut off what is on its way.
	if err := w.CloseWrite(); err != nil {
		return err
	}
	if _, err := io.Copy(io.Discard, w); err != nil && !errors.Is(err, io.EOF) {
		return err
	}
	return nil
}

// counted tells how much was written.
type counted struct {
	io.Writer
	n        *int64
	progress func(int64)
}

func (c counted) Write(p []byte) (int, error) {
	n, err := c.Writer.Write(p)
	*c.n += int64(n)
	c.progress(*c.n)
	return n, err
}
