// Package registry is the list of a user's distros, kept in one JSON file.
//
// The file is replaced as a whole (write, fsync, rename, fsync of the
// directory), so that a crash at any moment leaves the old or the new list. A
// file that cannot be understood is an error for every caller and never
// written over: it says where the user's disks are. Rebuild makes a new one by the
// disks themselves.
//
// One process owns the registry at a time: the service, which holds its lock.
package registry

import (
	"bytes"
	"cmp"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"
)

// fileVersion of the format. Files of a higher version are refused.
const fileVersion = 1

// Distro is one registered distro.
type Distro struct {
	Name string `json:"name"`
	// ID is random and stays when the name changes.
	ID string `json:"id"`
	// Disk is the absolute path of its ext4 disk; with Version 1 of the directory that is its root.
	Disk string `json:"disk"`
	// Version is 2 for a distro in a VM, 1 for one on the host's kernel.
	Version int `json:"version,omitempty"`
	// DefaultUser runs its sessions; "" leaves the choice to the distro (root).
	DefaultUser string    `json:"defaultUser,omitempty"`
	Created     time.Time `json:"created"`
	// FirstRun is what has to run before the first interactive shell; nil if nothing.
	FirstRun *FirstRun `json:"firstRun,omitempty"`
}

// FirstRun is a distro's set-up (WSL's OOBE).
type FirstRun struct {
	// Command is a shell's, run as root; "" is our own.
	Command string `json:"command,omitempty"`
	// UID is who the default user is afterwards, if there is such a user.
	UID string `json:"uid,omitempty"`
}

// file is what stands on disk.
type file struct {
	Version int      `json:"version"`
	Default string   `json:"default"` // a distro's name, "" if there is none
	Distros []Distro `json:"distros"`
	// DefaultVersion is that of new distros, 0 if none was chosen: 2.
	DefaultVersion int `json:"defaultVersion,omitempty"`
}

// Errors that callers decide on.
var (
	ErrNotFound = errors.New("no such distro")
	ErrExists   = errors.New("a distro of this name exists")
	ErrName     = errors.New("invalid name")
)

// CorruptError says that the registry's file cannot be used.
type CorruptError struct {
	Path   string
	Reason error
	// Damaged: it is not one of a later version, and Rebuild may help.
	Damaged bool
}

func (e *CorruptError) Error() string {
	return fmt.Sprintf("the registry of distros %s cannot be read: %v; repair it or move it away (the disks it names stay where they are)", e.Path, e.Reason)
}

func (e *CorruptError) Unwrap() error { return e.Reason }

// Registry is the loaded list. Its methods may be called concurrently; those
// that change it return once the change is on disk.
type Registry struct {
	path string

	mu sync.Mutex
	f  file // guarded by mu
}

// Open loads the registry at path. A file that is not there is an empty
// registry; one that cannot be understood is a *CorruptError.
func Open(path string) (*Registry, error) {
	r := &Registry{path: path}
	text, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		return r, nil
	}
	if err != nil {
		return nil, &CorruptError{Path: path, Reason: err}
	}
	d := json.NewDecoder(bytes.NewReader(text))
	if err := d.Decode(&r.f); err != nil {
		return nil, &CorruptError{path, err, true}
	}
	if err := r.f.check(); err != nil {
		return nil, &CorruptError{path, err, r.f.Version <= fileVersion}
	}
	for i := range r.f.Distros { // before there was another
		r.f.Distros[i].Version = cmp.Or(r.f.Distros[i].Version, 2)
	}
	return r, nil
}

func (f *file) check() error {
	if f.Version < 1 || f.Version > fileVersion {
		return fmt.Errorf("it has format version %d, this wsl2 reads up to %d (update wsl2)", f.Version, fileVersion)
	}
	for i, d := range f.Distros {
		if err := CheckName(d.Name); err != nil {
			return err
		}
		if !filepath.IsAbs(d.Disk) {
			return fmt.Errorf("distro %s: disk path %q is not absolute", d.Name, d.Disk)
		}
		if d.Version < 0 || d.Version > 2 {
			return fmt.Errorf("distro %s: version %d", d.Name, d.Version)
		}
		if f.find(d.Name) != i {
			return fmt.Errorf("distro %s is listed twice", d.Name)
		}
	}
	if f.Default != "" && f.find(f.Default) < 0 {
		return fmt.Errorf("its default distro %q is not listed", f.Default)
	}
	return nil
}

// find returns the index of the named distro, -1 if there is none. Names
// ignore case, as WSL's do.
func (f *file) find(name string) int {
	return slices.IndexFunc(f.Distros, func(d Distro) bool { return strings.EqualFold(d.Name, name) })
}

// Names that are in no registry: of the system distro, and of what is no distro but the
// VM's own root.
const (
	System     = "system"
	DebugShell = "debug-shell"
)

// maxName is the length with which what is named after a distro, with a prefix of
// its own, fits a directory entry (255).
const maxName = 240

// CheckName applies WSL's rule ^[a-zA-Z0-9._-]+$, "Legacy" being reserved, and
// ours: no name that is a directory entry of its own or looks like an option.
func CheckName(name string) error {
	bad := func(why string) error { return fmt.Errorf("%w %q: %s", ErrName, name, why) }
	switch {
	case name == "":
		return bad("it is empty")
	case len(name) > maxName:
		return bad(fmt.Sprintf("longer than %d characters", maxName))
	case name == "." || name == ".." || name[0] == '-':
		return bad("it may not be . or .. or begin with -")
	case strings.EqualFold(name, "Legacy"), strings.EqualFold(name, System), strings.EqualFold(name, DebugShell):
		return bad("it is reserved")
	}
	for _, c := range []byte(name) {
		if !(c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z' || c >= '0' && c <= '9' || c == '.' || c == '_' || c == '-') {
			return bad("use letters, digits, '.', '_' and '-'")
		}
	}
	return nil
}

// NewID returns a random identifier.
func NewID() string { return rand.Text() }

// List returns the distros in the order in which they were added.
func (r *Registry) List() []Distro {
	r.mu.Lock()
	defer r.mu.Unlock()
	return slices.Clone(r.f.Distros)
}

// Default returns the default distro's name, "" if there is none.
func (r *Registry) Default() string {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.f.Default
}

// Get returns the named distro or ErrNotFound.
func (r *Registry) Get(name string) (Distro, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	i := r.f.find(name)
	if i < 0 {
		return Distro{}, ErrNotFound
	}
	return r.f.Distros[i], nil
}

// Add registers d; the first distro becomes the default.
func (r *Registry) Add(d Distro) error {
	if err := CheckName(d.Name); err != nil {
		return err
	}
	if !filepath.IsAbs(d.Disk) {
		return fmt.Errorf("registry: disk path %q is not absolute", d.Disk)
	}
	d.Version = cmp.Or(d.Version, 2)
	err := r.change(func(f *file) error {
		if f.find(d.Name) >= 0 {
			return ErrExists
		}
		f.Distros = append(f.Distros, d)
		if f.Default == "" {
			f.Default = d.Name
		}
		return nil
	})
	if err == nil {
		Mark(d.Disk, d) // not every file system can
	}
	return err
}

// Remove takes the named distro off the list; its disk is the caller's. If it
// was the default, the oldest of the others becomes it.
func (r *Registry) Remove(name string) error {
	return r.change(func(f *file) error {
		i := f.find(name)
		if i < 0 {
			return ErrNotFound
		}
		wasDefault := strings.EqualFold(f.Default, f.Distros[i].Name)
		f.Distros = slices.Delete(f.Distros, i, i+1)
		if wasDefault {
			f.Default = ""
			if len(f.Distros) > 0 {
				f.Default = f.Distros[0].Name
			}
		}
		return nil
	})
}

// Update changes the named distro by edit, which must not change its ID. It may change
// its Name, which must be free; the default follows.
func (r *Registry) Update(name string, edit func(*Distro)) error {
	var changed Distro
	err := r.change(func(f *file) error {
		i := f.find(name)
		if i < 0 {
			return ErrNotFound
		}
		d := f.Distros[i]
		edit(&d)
		if err := CheckName(d.Name); err != nil {
			return err
		}
		if !filepath.IsAbs(d.Disk) {
			return fmt.Errorf("registry: disk path %q is not absolute", d.Disk)
		}
		if j := f.find(d.Name); j >= 0 && j != i {
			return ErrExists
		}
		if strings.EqualFold(f.Default, f.Distros[i].Name) {
			f.Default = d.Name
		}
		f.Distros[i] = d
		changed = d
		return nil
	})
	if err == nil {
		Mark(changed.Disk, changed) // as in Add
	}
	return err
}

// SetDefault makes the named distro the default.
func (r *Registry) SetDefault(name string) error {
	return r.change(func(f *file) error {
		i := f.find(name)
		if i < 0 {
			return ErrNotFound
		}
		f.Default = f.Distros[i].Name
		return nil
	})
}

// DefaultVersion returns the version of new distros.
func (r *Registry) DefaultVersion() int {
	r.mu.Lock()
	defer r.mu.Unlock()
	return cmp.Or(r.f.DefaultVersion, 2)
}

// SetDefaultVersion changes it.
func (r *Registry) SetDefaultVersion(version int) error {
	return r.change(func(f *file) error {
		f.DefaultVersion = version
		return nil
	})
}

// change applies edit to a copy, writes the copy and only then takes it over.
func (r *Registry) change(edit func(*file) error) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	next := r.f
	next.Version = fileVersion
	next.Distros = slices.Clone(r.f.Distros)
	if err := edit(&next); err != nil {
		return err
	}
	text, err := json.MarshalIndent(next, "", "  ")
	if err != nil {
		return fmt.Errorf("registry: %w", err)
	}
	if err := WriteFile(r.path, append(text, '\n')); err != nil {
		return fmt.Errorf("registry: %w", err)
	}
	r.f = next
	return nil
}

// WriteFile replaces path's contents atomically and durably.
func WriteFile(path string, text []byte) (err error) {
	dir := filepath.Dir(path)
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return err
	}
	t, err := os.CreateTemp(dir, "."+filepath.Base(path)+".*")
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			t.Close()
			os.Remove(t.Name())
		}
	}()
	if _, err := t.Write(text); err != nil {
		return err
	}
	if err := t.Sync(); err != nil {
		return err
	}
	if err := t.Close(); err != nil {
		return err
	}
	if err := os.Rename(t.Name(), path); err != nil {
		return err
	}
	return SyncDir(dir)
}

// Sweep removes what a WriteFile of path that was killed has left. Nobody may be writing.
func Sweep(path string) {
	left, _ := filepath.Glob(filepath.Join(filepath.Dir(path), "."+filepath.Base(path)+".*"))
	for _, file := range left {
		os.Remove(file)
	}
}

// SyncDir makes the entries of a directory durable.
func SyncDir(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	defer d.Close()
	return d.Sync()
}
