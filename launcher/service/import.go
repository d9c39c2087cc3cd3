package service

import (
	"cmp"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"time"

	"github.com/wsl2/wsl2/images"
	"github.com/wsl2/wsl2/internal/ini"
	"github.com/wsl2/wsl2/internal/wire"
	"github.com/wsl2/wsl2/launcher/api"
	"github.com/wsl2/wsl2/launcher/config"
	"github.com/wsl2/wsl2/launcher/native"
	"github.com/wsl2/wsl2/launcher/registry"
	"github.com/wsl2/wsl2/vmm/virtio/blk"
)

// diskName is a distro's disk in its directory; partialSuffix marks it until
// it is complete.
const (
	diskName      = "disk.ext4"
	rootName      = "rootfs" // of a distro of version 1, in place of a disk
	partialSuffix = ".partial"
)

// newName refuses what cannot be a new distro's name, and takes it.
func (s *Service) newName(reg *registry.Registry, name string, why lockReason) error {
	if err := registry.CheckName(name); err != nil {
		return api.Errorf(api.CodeBadRequest, "choose another name", "%v", err)
	}
	if d, err := reg.Get(name); err == nil {
		return api.Errorf(api.CodeExists, "choose another name, or remove it: wsl2 --unregister "+d.Name, "a distro named %s exists", d.Name)
	}
	return s.m.Lock(name, why)
}

// distroDir is the directory of a new distro's disk: dir if the user chose one,
// else one that is named after the distro and no other distro's.
func (s *Service) distroDir(reg *registry.Registry, name, dir string) string {
	if dir != "" {
		return dir
	}
	dir = filepath.Join(s.paths.Distros(), name)
	for _, d := range reg.List() {
		if filepath.Dir(d.Disk) == dir { // it was renamed
			return filepath.Join(s.paths.Distros(), name+"."+registry.NewID())
		}
	}
	return dir
}

// importDistro makes a distro from an archive that the client sends, or from a
// disk image. On any failure, the client's death included, nothing is left.
func (s *Service) importDistro(p *peer, reg *registry.Registry, c api.Call) (any, error) {
	version := cmp.Or(c.Version, reg.DefaultVersion())
	if c.Image != "" { // a disk is version 2's
		if c.Version == 1 {
			return nil, api.Errorf(api.CodeBadRequest, "import it as version 2, then: wsl2 --set-version "+c.Name+" 1", "a distro of version 1 has no disk")
		}
		version = 2
	}
	unnamed := c.Install && c.Name == ""
	if unnamed { // the archive has to say
		c.Name = "install-" + registry.NewID()
	}
	if err := s.newName(reg, c.Name, beingImported); err != nil {
		return nil, err
	}
	defer s.m.Unlock(c.Name)
	dir := s.distroDir(reg, c.Name, c.Dir)
	if err := images.CheckSpace(dir, c.ArchiveBytes); err != nil {
		return nil, importFailure(err)
	}
	ctx, sent, end := p.watch()
	defer end()
	op, err := s.begin(note{Name: c.Name}, dir, baseName(version))
	if err != nil {
		return nil, err
	}
	defer op.end(reg)
	disk := filepath.Join(dir, baseName(version))
	d := registry.Distro{Name: c.Name, ID: registry.NewID(), Disk: disk, Version: version, Created: now()}
	conf := ""
	if c.Image != "" {
		err = s.importImage(ctx, p, c.Image, disk+partialSuffix)
	} else {
		conf, err = s.importArchive(ctx, p, sent, c, d)
	}
	if err != nil {
		s.own.forget(d.ID)
		return nil, err
	}
	if c.Install {
		var name string
		if name, d.FirstRun = parseDistribution(conf); unnamed {
			if name == "" {
				return nil, api.Errorf(api.CodeBadRequest, "give it one: --name NAME", "the archive does not name its distro (defaultName in /etc/wsl-distribution.conf)")
			}
			if err := s.newName(reg, name, beingImported); err != nil {
				return nil, err
			}
			defer s.m.Unlock(name)
			d.Name = name
		}
	}
	if err := commit(disk+partialSuffix, disk); err != nil {
		return nil, fmt.Errorf("the imported disk cannot be stored: %w", err)
	}
	if err := reg.Add(d); err != nil {
		return nil, err
	}
	s.log.Info("imported", "distro", d.Name, "disk", disk)
	return api.Installed{Name: d.Name}, nil
}

// parseDistribution reads a distro's wsl-distribution.conf (wsl.md §3.12): the name
// that it wants and what is to run before its first shell.
func parseDistribution(conf string) (name string, first *registry.FirstRun) {
	first = &registry.FirstRun{}
	entries, _ := ini.Parse(conf) // whoever made it has read its warnings
	for _, e := range entries {
		switch e.Name() {
		case "oobe.command":
			first.Command = e.Value
		case "oobe.defaultuid":
			if _, err := strconv.ParseUint(e.Value, 10, 32); err == nil {
				first.UID = e.Value
			}
		case "oobe.defaultname":
			name = e.Value
		}
	}
	if first.Command != "" && first.UID == "" {
		first.UID = "1000" // WSL's default
	}
	return name, first
}

func now() time.Time { return time.Now().UTC().Truncate(time.Second) }

// baseName is how a distro's disk or root is called in its directory.
func baseName(version int) string {
	if version == 1 {
		return rootName
	}
	return diskName
}

// createEmpty makes a new disk of this size, 0 for the default, or a new root.
func (s *Service) createEmpty(ctx context.Context, version int, path string, size uint64) error {
	if version == 1 {
		if size != 0 {
			return api.Errorf(api.CodeBadRequest, "leave the size out", "a distro of version 1 has no disk")
		}
		return native.MakeRoot(path)
	}
	settings, _ := config.Load(s.paths.ConfigFile, config.ThisHost())
	bytes := settings.DefaultDiskBytes
	if size != 0 {
		if size < minInstall || size > maxResize {
			return api.Errorf(api.CodeSize, "", "a disk of %d bytes: from %d MiB to %d TiB are possible", size, minInstall>>20, maxResize>>40)
		}
		bytes = (size + sizeStep - 1) / sizeStep * sizeStep
	}
	return images.CreateDisk(ctx, path, bytes)
}

// makerOf returns the Manager under which the disk or root of a distro that is not registered
// yet is filled.
func (s *Service) makerOf(d registry.Distro) *Manager {
	if d.Version == 1 {
		return s.own.ofVersion1(d.ID)
	}
	return s.m
}

// importArchive fills the new disk from the client's archive.
func (s *Service) importArchive(ctx context.Context, p *peer, sent <-chan struct{}, c api.Call, d registry.Distro) (conf string, err error) {
	disk := d.Disk + partialSuffix
	if err := s.createEmpty(ctx, d.Version, disk, c.Size); err != nil {
		return "", importFailure(err)
	}
	archive := newArchive()
	err = s.transfer(ctx, p, api.Ready{Archive: archive}, func(ctx context.Context, ready func(Session)) (err error) {
		conf, err = s.makerOf(d).Import(ctx, c.Name, disk, archive, c.VM, ready)
		return err
	})
	if err != nil {
		// To the guest a full host is an I/O error of its disk.
		if full := images.CheckSpace(filepath.Dir(disk), 0); errors.Is(full, images.ErrNoSpace) {
			return "", importFailure(full)
		}
		return "", err
	}
	// The guest has seen the end of a tar; only the client knows whether that
	// was all of the file (a checksum may have failed behind it).
	select {
	case <-sent:
		return conf, nil
	case <-ctx.Done():
		return "", errClientGone
	}
}

// minInstall is the smallest disk that a new file system with its journal fits.
const minInstall = 256 << 20

// importImage copies or converts a disk image to the new disk.
func (s *Service) importImage(ctx context.Context, p *peer, image, disk string) error {
	format, err := images.DetectDisk(image)
	if err != nil {
		return api.Errorf(api.CodeArchive, "", "%v", err)
	}
	if format == images.Raw {
		// No distro may run from it meanwhile.
		lock, err := blk.Open(image, true)
		if err != nil {
			return diskBusy(err, image)
		}
		defer lock.Close()
		_, err = images.CopyDisk(ctx, image, disk, p.progress("copying the disk"))
		return importFailure(err)
	}
	f, err := os.OpenFile(disk, os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	defer f.Close()
	if err := images.Convert(ctx, image, format, f, images.Raw, p.progress("converting the disk")); err != nil {
		return importFailure(err)
	}
	if _, err := images.Ext4Size(disk); err != nil {
		if errors.Is(err, images.ErrNotExt4) {
			err = images.ErrNotExt4
		}
		return api.Errorf(api.CodeArchive, "", "%s: %v", image, err)
	}
	return nil
}

// importInPlace registers a disk where it lies.
func (s *Service) importInPlace(reg *registry.Registry, c api.Call) (any, error) {
	if err := s.newName(reg, c.Name, beingImported); err != nil {
		return nil, err
	}
	defer s.m.Unlock(c.Name)
	if !filepath.IsAbs(c.Image) {
		return nil, api.Errorf(api.CodeBadRequest, "", "disk %q is not absolute", c.Image)
	}
	st, err := os.Stat(c.Image)
	if err != nil {
		return nil, err
	}
	for _, d := range reg.List() {
		if other, err := os.Stat(d.Disk); err == nil && os.SameFile(st, other) {
			return nil, api.Errorf(api.CodeExists, "to have it twice: wsl2 --manage "+d.Name+" --clone NAME", "%s is the disk of %s", c.Image, d.Name)
		}
	}
	switch format, err := images.DetectDisk(c.Image); {
	case err != nil:
		return nil, api.Errorf(api.CodeArchive, "", "%v", err)
	case format != images.Raw:
		return nil, api.Errorf(api.CodeArchive, "make a distro of a copy: wsl2 --import "+c.Name+" --vhd "+c.Image, "%s is a %s image, and a distro runs from a raw one", c.Image, format)
	}
	lock, err := blk.Open(c.Image, false)
	if err != nil {
		return nil, diskBusy(err, c.Image)
	}
	lock.Close()
	if err := reg.Add(registry.Distro{Name: c.Name, ID: registry.NewID(), Disk: c.Image, Created: now()}); err != nil {
		return nil, err
	}
	s.log.Info("registered in place", "distro", c.Name, "disk", c.Image)
	return struct{}{}, nil
}

// diskBusy says what a lock that was not to be had means.
func diskBusy(err error, disk string) error {
	if errors.Is(err, blk.ErrInUse) {
		return api.Errorf(api.CodeBusy, "end the program that has it open (fuser -v shows it)", "the disk %s is in use", disk)
	}
	return err
}

func newArchive() (id wire.SessionID) {
	rand.Read(id[:])
	return id
}

// transfer runs guest work that needs the client's connection for an archive: it
// tells the client where to, as answer with the place filled in, once the guest
// is ready. ctx's end, the client's, cuts the connection; the work's end is waited for in any case.
func (s *Service) transfer(ctx context.Context, p *peer, answer api.Ready, work func(ctx context.Context, ready func(Session)) error) error {
	// Not ctx: the guest has to be done with the disk in any case. It is, as soon
	// as the archive's connection ends; one that is not gets killAfter.
	background, giveUp := context.WithCancelCause(context.Background())
	defer giveUp(nil)
	done := make(chan error, 1)
	ready := make(chan Session, 1)
	undone := func() error {
		t := time.AfterFunc(killAfter, func() { giveUp(fmt.Errorf("the guest has not given up the archive within %v", killAfter)) })
		defer t.Stop()
		<-done
		return errClientGone
	}
	go func() { done <- work(background, func(at Session) { ready <- at }) }()
	var at Session
	select {
	case at = <-ready:
		for _, n := range at.Notices {
			p.notice(n)
		}
		answer.VsockPath, answer.Port = at.VsockPath, at.Port
		p.json(api.KindReady, answer)
	case err := <-done:
		return err
	case <-ctx.Done():
		go func() { // it may be about to wait for the archive
			select {
			case at := <-ready:
				cutArchive(at, answer.Archive)
			case <-background.Done():
			}
		}()
		return undone()
	}
	select {
	case err := <-done:
		return err
	case <-ctx.Done():
		// The client has gone, perhaps before it sent anything: an archive
		// that ends at once lets the guest stop waiting.
		cutArchive(at, answer.Archive)
		return undone()
	}
}

func importFailure(err error) error {
	switch {
	case errors.Is(err, images.ErrNoSpace):
		return api.Errorf(api.CodeNoSpace, "free some, or give another directory (wsl2 --import NAME DIR FILE, wsl2 --manage NAME --move DIR)", "%v", err)
	case errors.Is(err, images.ErrNoMke2fs), errors.Is(err, images.ErrNoQemuImg), errors.Is(err, images.ErrNoE2fsprogs):
		return api.Errorf(api.CodeNoToolchain, "", "%v", err)
	}
	return err
}

// cutArchive opens a request's archive connection and closes it.
func cutArchive(at Session, archive wire.SessionID) {
	if c, err := dialArchive(at, archive); err == nil {
		c.Close()
	}
}

// dialArchive opens a request's archive connection.
func dialArchive(at Session, archive wire.SessionID) (*net.UnixConn, error) {
	c, err := net.DialTimeout("unix", at.VsockPath, time.Second)
	if err != nil {
		return nil, err
	}
	c.SetDeadline(time.Now().Add(time.Second))
	b := fmt.Appendf(nil, "CONNECT %d\n", at.Port)
	if b, err = wire.Append(b, &wire.Hello{Version: wire.Version, Role: wire.RoleArchive, Session: archive}); err == nil {
		_, err = c.Write(b)
	}
	if err != nil {
		c.Close()
		return nil, err
	}
	c.SetDeadline(time.Time{})
	return c.(*net.UnixConn), nil
}

// unregister stops a distro and deletes it.
func (s *Service) unregister(reg *registry.Registry, d registry.Distro) error {
	if err := s.m.Lock(d.Name, beingUnregistered); err != nil {
		return err
	}
	defer s.m.Unlock(d.Name)
	if err := s.terminate(d.Name); err != nil {
		return err
	}
	if err := nothingMounted(d); err != nil {
		return err
	}
	// Off the list first: a crash in between leaves a file, which the note
	// names, not an entry without a disk.
	op, err := s.begin(note{Name: d.Name, Drop: []string{d.Disk}}, "", "")
	if err != nil {
		return err
	}
	defer op.end(reg)
	if err := s.m.book.rename(d.Name, ""); err != nil {
		return err
	}
	if err := reg.Remove(d.Name); err != nil {
		return err
	}
	if err := s.remove(context.Background(), d.Disk); err != nil && !errors.Is(err, os.ErrNotExist) {
		return api.Errorf(api.CodeFailed, "delete it yourself", "%s is unregistered, but its disk could not be deleted: %v", d.Name, err)
	}
	os.Remove(filepath.Dir(d.Disk)) // if nothing else is there
	own := s.paths.ForVM(d.ID)
	for _, path := range []string{own.VMLock(), own.ConsoleLog(), own.ConsoleLog() + ".1"} {
		os.Remove(path) // most have none
	}
	s.log.Info("unregistered", "distro", d.Name)
	return nil
}
