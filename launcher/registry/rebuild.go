package registry

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"time"

	"golang.org/x/sys/unix"
)

// This file is what happens when the registry's file is damaged: each disk says itself,
// in an extended attribute, which distro it is.

// attribute of a disk's file: its Distro as JSON, without Disk. It goes where the
// file goes, but for copies.
const attribute = "user.wsl2.distro"

// maxAttribute is what XATTR_SIZE_MAX allows.
const maxAttribute = 64 << 10

// Mark writes down with the file at path that it is d's disk. A file system without
// extended attributes costs a damaged registry the distro's name, if that is not its directory's.
func Mark(path string, d Distro) error {
	if d.Version == 1 { // its root is none of the user's files, the directory around it is
		path = filepath.Dir(path)
	}
	d.Disk = ""
	text, err := json.Marshal(d)
	if err != nil {
		return err
	}
	return unix.Setxattr(path, attribute, text, 0)
}

// marked reads the mark of a disk.
func marked(path string) (d Distro, err error) {
	text := make([]byte, maxAttribute)
	n, err := unix.Getxattr(path, attribute, text)
	if err == nil {
		err = json.Unmarshal(text[:n], &d)
	}
	if err == nil {
		err = CheckName(d.Name)
	}
	return d, err
}

// legible returns the strings that a damaged file still shows as values of a field.
func legible(text []byte, field string) (values []string) {
	name := fmt.Appendf(nil, "%q:", field)
	for {
		_, rest, found := bytes.Cut(text, name)
		if !found {
			return values
		}
		var value string
		if json.NewDecoder(bytes.NewReader(rest)).Decode(&value) == nil {
			values = append(values, value)
		}
		text = rest
	}
}

// Rebuild makes a registry in place of the damaged one at path, which is kept under
// the name returned. Its distros are those of the disks that the patterns (filepath.Glob)
// find, and of those that the damaged file still names. A disk without a mark is the distro of its directory's name.
func Rebuild(path string, patterns ...string) (r *Registry, kept string, err error) {
	text, err := os.ReadFile(path)
	if err != nil {
		return nil, "", err
	}
	f, err := salvage(text, patterns...)
	if err != nil {
		return nil, "", err
	}
	kept = path + ".damaged"
	for i := 2; ; i++ {
		if _, err := os.Lstat(kept); errors.Is(err, os.ErrNotExist) {
			break
		}
		kept = fmt.Sprint(path, ".damaged", i)
	}
	if err := WriteFile(kept, text); err != nil {
		return nil, "", err
	}
	r = &Registry{path: path}
	return r, kept, r.change(func(old *file) error { *old = f; return nil })
}

// salvage finds the distros for Rebuild.
func salvage(text []byte, patterns ...string) (f file, err error) {
	var disks []string
	for _, pattern := range patterns {
		paths, err := filepath.Glob(pattern)
		if err != nil {
			return f, err
		}
		disks = append(disks, paths...)
	}
	found := len(disks)
	for _, disk := range legible(text, "disk") {
		if filepath.IsAbs(disk) {
			disks = append(disks, disk)
		}
	}
	f.Version = fileVersion
	for i, disk := range disks {
		st, err := os.Stat(disk)
		if err != nil {
			continue
		}
		version, carrier := 2, disk
		if st.IsDir() {
			version, carrier = 1, filepath.Dir(disk)
		}
		d, err := marked(carrier)
		if err != nil {
			if name := filepath.Base(filepath.Dir(disk)); i < found && CheckName(name) == nil {
				d = Distro{Name: name, ID: NewID(), Created: time.Now().UTC().Truncate(time.Second)}
			} else {
				continue
			}
		}
		d.Disk, d.Version = disk, version
		// One disk of two is left by a move that was cut off.
		if slices.ContainsFunc(f.Distros, func(o Distro) bool { return o.Disk == disk || o.ID == d.ID }) {
			continue
		}
		if f.find(d.Name) >= 0 {
			d.Name = d.Name[:min(len(d.Name), maxName/2)] + "." + NewID()
		}
		f.Distros = append(f.Distros, d)
	}
	slices.SortStableFunc(f.Distros, func(a, b Distro) int { return a.Created.Compare(b.Created) })
	if len(f.Distros) > 0 {
		f.Default = f.Distros[0].Name
	}
	for _, name := range legible(text, "default") {
		if i := f.find(name); i >= 0 {
			f.Default = f.Distros[i].Name
		}
	}
	return f, f.check()
}
