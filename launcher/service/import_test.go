package service

import (
	"context"
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
	for _, path := range []string{partial, filepath.Join(dir, diskName)} {
		os.WriteFile(path, nil, 0o600)
		if _, err := s.begin(note{Name: "three"}, dir, diskName); err == nil || api.AsError(err).Code != api.CodeExists || !exists(path) {
			t.Fatal(err)
		}
		os.Remove(path)
	}
}

// TestNoteKept: what could not be cleaned up is not forgotten for the next change of the same distro.
func TestNoteKept(t *testing.T) {
	base := t.TempDir()
	stuck := errors.New("it cannot be deleted")
	s := &Service{paths: config.Paths{Data: base}, log: slog.New(slog.DiscardHandler), removeRoot: func(context.Context, string) error { return stuck }}
	reg, err := registry.Open(s.paths.Registry())
	if err != nil {
		t.Fatal(err)
	}
	for _, dir := range []string{"first", "second"} {
		o, err := s.begin(note{Name: "one"}, filepath.Join(base, dir), rootName)
		if err != nil {
			t.Fatal(err)
		}
		o.end(reg)
	}
	if notes, _ := filepath.Glob(filepath.Join(s.paths.Distros(), notePrefix+"*")); len(notes) != 2 {
		t.Errorf("%d notes, want 2: %v", len(notes), notes)
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

// TestSweepAside: whoever waits for a service does not wait for the deletion of a root that a change left; and
// a deletion that is cut off is taken up by the next service.
func TestSweepAside(t *testing.T) {
	base := t.TempDir()
	dir := filepath.Join(base, "one")
	root := filepath.Join(dir, rootName+partialSuffix)
	for _, err := range []error{os.MkdirAll(root, 0o700), os.WriteFile(root+".lock", nil, 0o600)} {
		if err != nil {
			t.Fatal(err)
		}
	}
	var deleted []string
	service := func(remove func(ctx context.Context, root string) error) *Service {
		return New(Config{Paths: config.Paths{Data: base}, Log: slog.New(slog.DiscardHandler), RemoveRoot: func(ctx context.Context, root string) error {
			deleted = append(deleted, root)
			return remove(ctx, root)
		}})
	}
	noMore := func(context.Context, string) error { return context.Canceled }
	before := service(noMore)
	reg, err := before.registry()
	if err == nil {
		err = os.MkdirAll(before.paths.Distros(), 0o700)
	}
	if err == nil {
		_, err = before.writeNote(note{Name: "one", Make: []string{root}, Dirs: []string{dir}})
	}
	if err != nil {
		t.Fatal(err)
	}
	first := service(noMore)
	if exists(root) || exists(root+".lock") || len(deleted) != 0 {
		t.Errorf("the root is still where a new one would be made, or deleted: %q", deleted)
	}
	first.deleteAside(context.Background(), reg)
	if len(deleted) != 1 || !exists(deleted[0]) || !exists(deleted[0]+".lock") {
		t.Fatalf("%q were deleted, the root with its lock wanted", deleted)
	}
	second := service(func(_ context.Context, root string) error {
		return errors.Join(os.Remove(root), os.Remove(root+".lock"))
	})
	second.deleteAside(context.Background(), reg)
	if len(deleted) != 2 || deleted[1] != deleted[0] || exists(dir) {
		t.Errorf("%q were deleted, twice the same wanted; is %s left: %v", deleted, dir, exists(dir))
	}
	if notes, _ := filepath.Glob(filepath.Join(before.paths.Distros(), notePrefix+"*")); len(notes) != 0 {
		t.Errorf("left: %v", notes)
	}
}
