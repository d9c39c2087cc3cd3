package registry

import (
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
	"time"
)

// damagedHost is a registry with distros in and outside of the usual directory.
func damagedHost(t testing.TB) (path, pattern string, before []Distro) {
	t.Helper()
	dir := t.TempDir()
	path = filepath.Join(dir, "registry.json")
	r, err := Open(path)
	if err != nil {
		t.Fatal(err)
	}
	for i, name := range []string{"first", "second", "elsewhere"} {
		disk := filepath.Join(dir, "distros", name, "disk.ext4")
		if name == "elsewhere" {
			disk = filepath.Join(dir, "else where", "d\"isk.raw")
		}
		if err := os.MkdirAll(filepath.Dir(disk), 0o700); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(disk, []byte(name), 0o600); err != nil {
			t.Fatal(err)
		}
		if err := r.Add(Distro{Name: name, ID: NewID(), Disk: disk, Created: time.Unix(int64(1000+i), 0).UTC()}); err != nil {
			t.Fatal(err)
		}
	}
	err = errors.Join(
		r.Update("second", func(d *Distro) {
			d.Name, d.DefaultUser, d.FirstRun = "renamed", "me", &FirstRun{Command: "setup", UID: "1000"}
		}),
		r.SetDefault("renamed"))
	if err != nil {
		t.Fatal(err)
	}
	return path, filepath.Join(dir, "distros", "*", "disk.ext4"), r.List()
}

func TestRebuild(t *testing.T) {
	for name, damage := range map[string]func(text string) string{
		"cut off":   func(text string) string { return text[:len(text)-3] },
		"a bit":     func(text string) string { return strings.Replace(text, "{", "\x7b\x00", 1) },
		"a version": func(text string) string { return strings.Replace(text, `"version": 1`, `"version": 0`, 1) },
		"twice":     func(text string) string { return strings.ReplaceAll(text, "first\"", "renamed\"") },
	} {
		t.Run(name, func(t *testing.T) {
			path, pattern, before := damagedHost(t)
			text, err := os.ReadFile(path)
			if err != nil {
				t.Fatal(err)
			}
			damaged := damage(string(text))
			os.WriteFile(path, []byte(damaged), 0o600)
			var corrupt *CorruptError
			if _, err := Open(path); !errors.As(err, &corrupt) || !corrupt.Damaged {
				t.Fatalf("opened: %v", err)
			}
			r, kept, err := Rebuild(path, pattern)
			if err != nil {
				t.Fatal(err)
			}
			equal := func(a, b Distro) bool {
				first := a.FirstRun == nil && b.FirstRun == nil || a.FirstRun != nil && b.FirstRun != nil && *a.FirstRun == *b.FirstRun
				a.FirstRun, b.FirstRun = nil, nil
				return first && a == b
			}
			if got := r.List(); !slices.EqualFunc(got, before, equal) || r.Default() != "renamed" {
				t.Errorf("rebuilt\n%+v\nwant\n%+v, default %s", got, before, r.Default())
			}
			if again, err := Open(path); err != nil || !slices.EqualFunc(again.List(), before, equal) {
				t.Errorf("the file: %v", err)
			}
			if text, err := os.ReadFile(kept); err != nil || string(text) != damaged {
				t.Errorf("the damaged file is not kept: %v", err)
			}
		})
	}
}

// TestRebuildFromLittle: of an empty file only the usual directory is known, of a disk
// without a mark only its directory's name.
func TestRebuildFromLittle(t *testing.T) {
	path, pattern, before := damagedHost(t)
	os.WriteFile(path, nil, 0o600)
	os.Remove(before[0].Disk)
	unmarked := filepath.Join(filepath.Dir(path), "distros", "Unmarked", "disk.ext4")
	same := filepath.Join(filepath.Dir(path), "distros", "copy", "disk.ext4") // by hand, with its attributes
	for _, disk := range []string{unmarked, same} {
		os.MkdirAll(filepath.Dir(disk), 0o700)
		os.WriteFile(disk, nil, 0o600)
	}
	if err := Mark(same, before[1]); err != nil {
		t.Fatal(err)
	}
	os.MkdirAll(filepath.Join(filepath.Dir(path), "distros", "system"), 0o700)
	os.WriteFile(filepath.Join(filepath.Dir(path), "distros", "system", "disk.ext4"), nil, 0o600) // no name for a distro
	r, _, err := Rebuild(path, pattern)
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for _, d := range r.List() {
		names = append(names, d.Name)
	}
	if strings.Join(names, " ") != "renamed Unmarked" || r.Default() != "renamed" {
		t.Errorf("rebuilt %q, default %s", names, r.Default())
	}
	// A registry of a later version is not damaged.
	os.WriteFile(path, []byte(`{"version": 1000}`), 0o600)
	var corrupt *CorruptError
	if _, err := Open(path); !errors.As(err, &corrupt) || corrupt.Damaged {
		t.Errorf("of a later version: %v", err)
	}
}

// FuzzSalvage: whatever a damaged file holds, what is made of it is a registry.
func FuzzSalvage(f *testing.F) {
	path, pattern, _ := damagedHost(f)
	text, err := os.ReadFile(path)
	if err != nil {
		f.Fatal(err)
	}
	f.Add(text)
	f.Add(text[:len(text)/2])
	f.Add([]byte(`"disk":"/etc/passwd" "default": "\u0000" "disk" : "\x"`))
	f.Fuzz(func(t *testing.T, damaged []byte) {
		if got, err := salvage(damaged, pattern); err != nil || len(got.Distros) < 2 {
			t.Fatalf("%v of %q", err, damaged)
		}
	})
}

// TestRebuildVersion1: a root is found by the mark of the directory around it, which is the user's.
func TestRebuildVersion1(t *testing.T) {
	base := t.TempDir()
	root := filepath.Join(base, "distros/dir/rootfs")
	if err := os.MkdirAll(root, 0o700); err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(base, "registry.json")
	r, err := Open(path)
	if err != nil {
		t.Fatal(err)
	}
	d := Distro{Name: "one", ID: NewID(), Disk: root, Version: 1, DefaultUser: "alice"}
	if err := r.Add(d); err != nil {
		t.Fatal(err)
	}
	if _, err := unix.Getxattr(filepath.Dir(root), attribute, make([]byte, maxAttribute)); err != nil {
		d.Name, d.ID, d.DefaultUser = "dir", "", "" // a file system without attributes: by the directory's name
	}
	if err := os.WriteFile(path, []byte("damaged"), 0o600); err != nil {
		t.Fatal(err)
	}
	r, _, err = Rebuild(path, filepath.Join(base, "distros/*/disk.ext4"), filepath.Join(base, "distros/*/rootfs"))
	if err != nil {
		t.Fatal(err)
	}
	got := r.List()
	if len(got) != 1 || got[0].Name != d.Name || d.ID != "" && got[0].ID != d.ID || got[0].Version != 1 || got[0].Disk != root || got[0].DefaultUser != d.DefaultUser {
		t.Errorf("%+v, want %+v", got, d)
	}
}
