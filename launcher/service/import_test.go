package service

import (
	"encoding/json"
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
	reg, err := registry.Open(s.paths.Registry())
	if err != nil {
		t.Fatal(err)
	}
	dir := filepath.Join(base, "shared")
	partial := filepath.Join(dir, diskName+partialSuffix)
	one, err := s.begin(note{Name: "one"}, dir, diskName)
	if err != nil {
		t.Fatal(err)
	}
	os.WriteFile(partial, nil, 0o600)
	if _, err := s.begin(note{Name: "two"}, dir, diskName); err == nil || api.AsError(err).Code != api.CodeBusy {
		t.Fatal(err)
	}
	notes, _ := filepath.Glob(filepath.Join(s.paths.Distros(), notePrefix+"*"))
	if !exists(partial) || len(notes) != 1 {
		t.Fatal("the first lost its disk, or the second left its note", notes)
	}
	if one.end(reg); exists(partial) || exists(dir) || exists(one.path) {
		t.Fatal("left", partial)
	}
	// A disk that is nobody's is nobody's to remove.
	os.Mkdir(dir, 0o700)
	os.WriteFile(partial, nil, 0o600)
	if _, err := s.begin(note{Name: "three"}, dir, diskName); err == nil || api.AsError(err).Code != api.CodeExists || !exists(partial) {
		t.Fatal(err)
	}
}

// What is left of a change that was cut off depends on the registry alone.
func TestSettle(t *testing.T) {
	for _, c := range []struct {
		name           string
		make, drop     string // "" for none
		registered     string // the distro's disk; "" for none
		wantOld, wantN bool
	}{
		{"import before it was registered", "new", "", "", true, false},
		{"import after it was registered", "new", "", "new", true, true},
		{"move before the registry's change", "new", "old", "old", true, false},
		{"move after it", "new", "old", "new", false, true},
		{"move, and the registry is lost", "new", "old", "", true, false},
		{"unregister before the registry's change", "", "old", "old", true, true},
		{"unregister after it", "", "old", "", false, true},
	} {
		t.Run(c.name, func(t *testing.T) {
			base := t.TempDir()
			s := &Service{paths: config.Paths{Data: base}, log: slog.New(slog.DiscardHandler)}
			reg, err := registry.Open(s.paths.Registry())
			if err != nil {
				t.Fatal(err)
			}
			path := func(name string) string { return filepath.Join(base, name, diskName) }
			n := note{Name: "d", Dirs: []string{filepath.Join(base, "new")}}
			for _, name := range []string{"old", "new"} {
				os.Mkdir(filepath.Dir(path(name)), 0o700)
				os.WriteFile(path(name), nil, 0o600)
			}
			if c.make != "" {
				n.Make = []string{path(c.make) + partialSuffix, path(c.make)}
			}
			if c.drop != "" {
				n.Drop = []string{path(c.drop)}
			}
			if c.registered != "" {
				if err := reg.Add(registry.Distro{Name: "d", Disk: path(c.registered)}); err != nil {
					t.Fatal(err)
				}
			}
			text, err := json.Marshal(n)
			err = errors.Join(err, os.Mkdir(s.paths.Distros(), 0o700), os.WriteFile(filepath.Join(s.paths.Distros(), notePrefix+"d"), text, 0o600))
			if err != nil {
				t.Fatal(err)
			}
			s.sweep(reg)
			if exists(path("old")) != c.wantOld || exists(path("new")) != c.wantN {
				t.Errorf("old %v, want %v; new %v, want %v", exists(path("old")), c.wantOld, exists(path("new")), c.wantN)
			}
			for _, name := range []string{"old", "new"} {
				if dir := filepath.Dir(path(name)); exists(dir) != exists(path(name)) {
					t.Errorf("directory %s", dir)
				}
			}
			if exists(filepath.Join(s.paths.Distros(), notePrefix+"d")) {
				t.Error("the note is left")
			}
		})
	}
}
