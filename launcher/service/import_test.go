package service

import (
	"errors"
	"log/slog"
	"os"
	"path/filepath"
	"testing"

	"github.com/wsl2/wsl2/launcher/api"
	"github.com/wsl2/wsl2/launcher/config"
	"github.com/wsl2/wsl2/launcher/registry"
)

// Two imports to one directory: the second neither begins nor takes the first one's disk.
func TestImportsToOneDirectory(t *testing.T) {
	base := t.TempDir()
	s := &Service{paths: config.Paths{Data: base}, log: slog.New(slog.DiscardHandler)}
	dir := filepath.Join(base, "shared")
	partial := filepath.Join(dir, diskName+partialSuffix)
	undo, err := s.begin(&pending{Name: "one", Dir: dir})
	if err != nil {
		t.Fatal(err)
	}
	os.WriteFile(partial, nil, 0o600)
	if _, err := s.begin(&pending{Name: "two", Dir: dir}); err == nil || api.AsError(err).Code != api.CodeBusy {
		t.Fatal(err)
	}
	notes, _ := filepath.Glob(filepath.Join(s.paths.Distros(), pendingPrefix+"*"))
	if !exists(partial) || len(notes) != 1 {
		t.Fatal("the first lost its disk, or the second left its note", notes)
	}
	if err := undo(true); err != nil || exists(partial) || exists(dir) {
		t.Fatal(err)
	}
	// A disk that is nobody's is nobody's to remove.
	os.Mkdir(dir, 0o700)
	os.WriteFile(partial, nil, 0o600)
	if _, err := s.begin(&pending{Name: "three", Dir: dir}); err == nil || api.AsError(err).Code != api.CodeExists || !exists(partial) {
		t.Fatal(err)
	}
}

// A note of an import that was cut off does not cost another distro its disk.
func TestSweepKeepsRegistered(t *testing.T) {
	base := t.TempDir()
	s := &Service{paths: config.Paths{Data: base}, log: slog.New(slog.DiscardHandler)}
	reg, err := registry.Open(s.paths.Registry())
	if err != nil {
		t.Fatal(err)
	}
	dir := filepath.Join(base, "shared")
	disk := filepath.Join(dir, diskName)
	err = errors.Join(os.Mkdir(dir, 0o700), os.WriteFile(disk, nil, 0o600), os.Mkdir(s.paths.Distros(), 0o700),
		os.WriteFile(filepath.Join(s.paths.Distros(), pendingPrefix+"two"), []byte(`{"name":"two","dir":"`+dir+`"}`), 0o600),
		reg.Add(registry.Distro{Name: "one", Disk: disk}))
	if err != nil {
		t.Fatal(err)
	}
	s.sweep(reg)
	if !exists(disk) {
		t.Fatal("the disk of a registered distro was removed")
	}
}
