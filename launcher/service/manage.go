package service

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/wsl2/wsl2/images"
	"github.com/wsl2/wsl2/internal/wire"
	"github.com/wsl2/wsl2/launcher/api"
	"github.com/wsl2/wsl2/launcher/registry"
	"github.com/wsl2/wsl2/vmm/virtio/blk"
)

// This file is `wsl2 --manage` and --export: what is done to a distro that exists.

// sizeStep is what a disk's size is a multiple of.
const sizeStep = 1 << 20

// minResize is the smallest size that can be asked for; what is on the disk
// decides in the end.
const minResize = 64 << 20

// manage holds a distro still and does what the call says.
func (s *Service) manage(p *peer, reg *registry.Registry, d registry.Distro, c api.Call) (any, error) {
	var why lockReason
	var work func(ctx context.Context) (api.Changed, error)
	switch c.Verb {
	case api.VerbRename:
		return struct{}{}, s.rename(reg, d, c.New)
	case api.VerbSetUser:
		return struct{}{}, reg.Update(d.Name, func(d *registry.Distro) { d.DefaultUser = c.User })
	case api.VerbSetUp:
		return struct{}{}, reg.Update(d.Name, func(d *registry.Distro) { d.FirstRun, d.DefaultUser = nil, c.User })
	case api.VerbExport:
		return struct{}{}, s.export(p, d, c)
	case api.VerbSetVersion:
		why, work = beingConverted, func(ctx context.Context) (api.Changed, error) { return s.setVersion(ctx, p, reg, d, c) }
	case api.VerbMove:
		why, work = beingMoved, func(ctx context.Context) (api.Changed, error) { return s.move(ctx, p, reg, d, c.Dir) }
	case api.VerbClone:
		why, work = beingCloned, func(ctx context.Context) (api.Changed, error) { return s.clone(ctx, p, reg, d, c) }
	case api.VerbResize:
		why, work = beingResized, func(ctx context.Context) (api.Changed, error) { return s.resize(ctx, p, reg, d, c) }
	case api.VerbCompact:
		why, work = beingCompacted, func(ctx context.Context) (api.Changed, error) {
			_, err := s.maintain(ctx, p, d, d.Disk, wire.Maintain{Task: wire.TaskTrim}, c.VM)
			return api.Changed{}, err
		}
	case api.VerbRepair:
		why, work = beingRepaired, func(ctx context.Context) (ch api.Changed, err error) {
			ch.Report, err = s.maintain(ctx, p, d, d.Disk, wire.Maintain{Task: wire.TaskCheck}, c.VM)
			return ch, err
		}
	default:
		return nil, api.Errorf(api.CodeBadRequest, "", "unknown request %q", c.Verb)
	}
	if d.Version == 1 && (c.Verb == api.VerbResize || c.Verb == api.VerbCompact || c.Verb == api.VerbRepair) {
		return nil, noDisk(d, "no disk")
	}
	release, err := s.hold(d.Name, why)
	if err != nil {
		return nil, err
	}
	defer release()
	sizeBefore, usedBefore := diskUse(d.Disk)
	ctx, _, end := p.watch()
	defer end()
	changed, err := work(ctx)
	if err != nil {
		return nil, importFailure(err)
	}
	if now, err := reg.Get(d.Name); err == nil {
		d = now
	}
	changed.SizeBefore, changed.UsedBefore = sizeBefore, usedBefore
	changed.SizeAfter, changed.UsedAfter = diskUse(d.Disk)
	s.log.Info(c.Verb, "distro", d.Name, "result", changed)
	return changed, nil
}

// diskUse returns a disk's size and what it takes of the host's file system; nothing for a root: to
// count its files would take too long.
func diskUse(disk string) (size, used int64) {
	var st unix.Stat_t
	if unix.Stat(disk, &st) != nil || st.Mode&unix.S_IFMT != unix.S_IFREG {
		return 0, 0
	}
	return st.Size, st.Blocks * 512
}

// hold locks a distro and stops it if it is idle.
func (s *Service) hold(name string, why lockReason) (release func(), err error) {
	if err := s.m.Lock(name, why); err != nil {
		return nil, err
	}
	for _, m := range s.managers() {
		if err := m.StopIdle(context.Background(), name); err != nil {
			s.m.Unlock(name)
			return nil, err
		}
	}
	return func() { s.m.Unlock(name) }, nil
}

// rename changes a distro's name; its disk stays where it is.
func (s *Service) rename(reg *registry.Registry, d registry.Distro, name string) error {
	if !strings.EqualFold(name, d.Name) {
		if err := s.newName(reg, name, beingRenamed); err != nil {
			return err
		}
		defer s.m.Unlock(name)
	}
	release, err := s.hold(d.Name, beingRenamed)
	if err != nil {
		return err
	}
	defer release()
	if err := reg.Update(d.Name, func(d *registry.Distro) { d.Name = name }); err != nil {
		return err
	}
	return s.m.book.rename(d.Name, name)
}

// clone makes a distro of a copy of another one's disk.
func (s *Service) clone(ctx context.Context, p *peer, reg *registry.Registry, d registry.Distro, c api.Call) (changed api.Changed, err error) {
	if err := s.newName(reg, c.New, beingCloned); err != nil {
		return changed, err
	}
	defer s.m.Unlock(c.New)
	dir := s.distroDir(reg, c.New, c.Dir)
	op, err := s.begin(note{Name: c.New}, dir, baseName(d.Version))
	if err != nil {
		return changed, err
	}
	defer op.end(reg)
	if d.Version == 1 {
		clone := registry.Distro{Name: c.New, ID: registry.NewID(), Disk: filepath.Join(dir, rootName), Version: 1, DefaultUser: d.DefaultUser, Created: now()}
		if err := s.copyTo(ctx, p, d, clone, c.VM); err != nil {
			return changed, err
		}
		return changed, reg.Add(clone)
	}
	lock, err := blk.Open(d.Disk, true)
	if err != nil {
		return changed, diskBusy(err, d.Disk)
	}
	defer lock.Close()
	disk := filepath.Join(dir, diskName)
	if changed.Shared, err = images.CopyDisk(ctx, d.Disk, disk+partialSuffix, p.progress("copying the disk")); err != nil {
		return changed, err
	}
	if err := commit(disk+partialSuffix, disk); err != nil {
		return changed, err
	}
	return changed, reg.Add(registry.Distro{Name: c.New, ID: registry.NewID(), Disk: disk, DefaultUser: d.DefaultUser, Created: now()})
}

// move takes a distro's disk to another directory. Until the registry names the
// new place both are complete.
func (s *Service) move(ctx context.Context, p *peer, reg *registry.Registry, d registry.Distro, dir string) (changed api.Changed, err error) {
	if filepath.Clean(dir) == filepath.Dir(d.Disk) {
		return changed, api.Errorf(api.CodeBadRequest, "", "%s is in %s already", d.Name, dir)
	}
	if d.Version == 1 {
		return changed, s.transform(ctx, p, reg, d, 1, filepath.Clean(dir), api.VMOptions{})
	}
	op, err := s.begin(note{Name: d.Name, Drop: []string{d.Disk}}, filepath.Clean(dir), diskName)
	if err != nil {
		return changed, err
	}
	defer op.end(reg)
	lock, err := blk.Open(d.Disk, false)
	if err != nil {
		return changed, diskBusy(err, d.Disk)
	}
	defer lock.Close()
	disk := filepath.Join(filepath.Clean(dir), diskName)
	if os.Link(d.Disk, disk) == nil { // on one file system
		err = registry.SyncDir(dir)
	} else {
		if _, err = images.CopyDisk(ctx, d.Disk, disk+partialSuffix, p.progress("copying the disk")); err == nil {
			err = commit(disk+partialSuffix, disk)
		}
	}
	if err != nil {
		return changed, err
	}
	return changed, reg.Update(d.Name, func(d *registry.Distro) { d.Disk = disk })
}

// resize changes the size of a distro's disk and of its file system.
func (s *Service) resize(ctx context.Context, p *peer, reg *registry.Registry, d registry.Distro, c api.Call) (changed api.Changed, err error) {
	size := int64((c.Size + sizeStep - 1) / sizeStep * sizeStep)
	if c.Size < minResize || c.Size > maxResize {
		return changed, api.Errorf(api.CodeSize, "", "a disk of %d bytes: from %d MiB to %d TiB are possible", c.Size, minResize>>20, maxResize>>40)
	}
	has, err := images.Ext4Size(d.Disk)
	if err != nil {
		return changed, err
	}
	old, _ := diskUse(d.Disk)
	if int64(has) > size {
		return changed, s.shrink(ctx, p, reg, d, size, c)
	}
	// A host that becomes full in the middle would leave a file system that is neither
	// the old one nor the new one.
	if err := images.CheckSpace(filepath.Dir(d.Disk), growRoom(uint64(size)-has)); err != nil {
		return changed, err
	}
	// The kernel does not grow a file system in which errors are noted.
	if _, err := s.maintain(ctx, p, d, d.Disk, wire.Maintain{Task: wire.TaskPreen}, c.VM); err != nil {
		return changed, err
	}
	// A file that is larger than its file system is as good as before: a
	// crash in between costs nothing.
	if err := os.Truncate(d.Disk, size); err != nil {
		if errors.Is(err, unix.EFBIG) {
			err = api.Errorf(api.CodeSize, "", "the host's file system takes no file of %d GiB, even sparse", size>>30)
		}
		return changed, err
	}
	if _, err = s.maintain(ctx, p, d, d.Disk, wire.Maintain{Task: wire.TaskGrow}, c.VM); err != nil {
		if has, err := images.Ext4Size(d.Disk); err == nil && int64(has) <= old {
			os.Truncate(d.Disk, old)
		}
	}
	return changed, err
}

// growRoom is what growing a file system by n bytes writes at most: bitmaps and
// descriptors of its groups, some of them twice, and the journal.
func growRoom(n uint64) uint64 {
	const group, perGroup, journal = 128 << 20, 16 << 10, 32 << 20
	return n/group*perGroup + journal
}

// maxResize is ext4's limit with blocks of 4 KiB and the descriptors reserved for growing.
const maxResize = 16 << 40

// shrink makes a smaller copy and puts it in the disk's place: resize2fs does not
// survive being cut off, a copy can be thrown away.
func (s *Service) shrink(ctx context.Context, p *peer, reg *registry.Registry, d registry.Distro, size int64, c api.Call) error {
	partial := d.Disk + partialSuffix
	if exists(partial) {
		return diskThere(partial)
	}
	op, err := s.begin(note{Name: d.Name, Make: []string{partial}}, "", "")
	if err != nil {
		return err
	}
	defer op.end(reg)
	lock, err := blk.Open(d.Disk, false)
	if err != nil {
		return diskBusy(err, d.Disk)
	}
	defer lock.Close()
	if _, err := images.CopyDisk(ctx, d.Disk, partial, p.progress("copying the disk")); err != nil {
		return err
	}
	if _, err := s.maintain(ctx, p, d, partial, wire.Maintain{Task: wire.TaskShrink, Bytes: uint64(size)}, c.VM); err != nil {
		return err
	}
	if has, err := images.Ext4Size(partial); err != nil || int64(has) > size {
		return fmt.Errorf("the file system has %d bytes after it was made smaller, not %d: %w", has, size, err)
	}
	if err := os.Truncate(partial, size); err != nil {
		return err
	}
	registry.Mark(partial, d) // as the disk whose place it takes
	return commit(partial, d.Disk)
}

// toolsTimeout bounds the handing over of the tools.
const toolsTimeout = time.Minute

// maintain has the guest of the distro's VM work on a disk, handing it the tools for that.
func (s *Service) maintain(ctx context.Context, p *peer, d registry.Distro, disk string, m wire.Maintain, o api.VMOptions) (string, error) {
	var tools []byte
	if m.Task.NeedsTools() {
		var err error
		if tools, err = s.tools(ctx); err != nil {
			return "", err
		}
	}
	m.Archive = newArchive()
	// The client's end does not end it: half a repair is worse than a whole one.
	ctx = context.WithoutCancel(ctx)
	text, err := handing(m.Archive, tools, func(ready func(Session)) (string, error) {
		return s.managerOf(d).Maintain(ctx, d.Name, disk, m, o, func(at Session) {
			for _, n := range at.Notices {
				p.notice(n)
			}
			ready(at)
		})
	})
	var told *api.Error
	if errors.As(err, &told) && m.Task == wire.TaskShrink && told.Code == api.CodeFailed {
		return text, api.Errorf(api.CodeSize, "free some space in the distro, or choose a larger size", "%s", told.Text)
	}
	return text, err
}

// handing does the work, for which the guest may want the tools: ready says where it
// waits for them. They have been handed over when it returns.
func handing(archive wire.SessionID, tools []byte, work func(ready func(Session)) (string, error)) (string, error) {
	var handed chan error
	text, err := work(func(at Session) {
		handed = make(chan error, 1)
		go func() { handed <- handOver(at, archive, tools) }()
	})
	if handed != nil {
		if herr := <-handed; herr != nil && err == nil {
			err = fmt.Errorf("hand the tools to the guest: %w", herr)
		}
	}
	return text, err
}

// handOver sends the tools.
func handOver(at Session, archive wire.SessionID, tools []byte) error {
	c, err := dialArchive(at, archive)
	if err != nil {
		return err
	}
	defer c.Close()
	c.SetDeadline(time.Now().Add(toolsTimeout))
	if _, err := c.Write(tools); err != nil {
		return err
	}
	if err := c.CloseWrite(); err != nil {
		return err
	}
	// The guest closes once it has all: closing earlier could cut off what is on its way.
	_, err = io.Copy(io.Discard, c)
	return err
}

// export lets the client read a distro: as an archive that the guest makes, or
// the disk itself.
func (s *Service) export(p *peer, d registry.Distro, c api.Call) error {
	release, err := s.hold(d.Name, beingExported)
	if err != nil {
		return err
	}
	defer release()
	ctx, sent, end := p.watch()
	defer end()
	if d.Version == 1 && c.Disk {
		return noDisk(d, "no disk that could be exported")
	}
	_, used := diskUse(d.Disk)
	if c.Disk {
		lock, err := blk.Open(d.Disk, true)
		if err != nil {
			return diskBusy(err, d.Disk)
		}
		defer lock.Close()
		p.json(api.KindReady, api.Ready{Disk: d.Disk, Bytes: used})
		select {
		case <-sent:
			return nil
		case <-ctx.Done():
			return errClientGone
		}
	}
	archive := newArchive()
	return s.transfer(ctx, p, api.Ready{Archive: archive, Bytes: used}, func(ctx context.Context, ready func(Session)) error {
		return s.managerOf(d).Export(ctx, d.Name, d.Disk, archive, c.VM, ready)
	})
}
