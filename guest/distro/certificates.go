package distro

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// trustStore is how a family of distros is told to trust an authority: by a file in a directory, and a
// program that makes its bundles anew.
type trustStore struct{ dir, program string }

var trustStores = []trustStore{
	{"usr/local/share/ca-certificates", "update-ca-certificates"},   // Debian, Ubuntu, Alpine
	{"etc/pki/ca-trust/source/anchors", "update-ca-trust"},          // Fedora, RHEL
	{"etc/ca-certificates/trust-source/anchors", "update-ca-trust"}, // Arch
	{"etc/pki/trust/anchors", "update-ca-certificates"},             // SUSE
}

// certificatePrefix begins the names of the files that are the host's.
const certificatePrefix = "wsl2-host-"

// pendingTrust is there from before the first change until the program has succeeded: what was interrupted is done
// at the next start. It is no anchor, hence elsewhere.
const pendingTrust = "etc/wsl2-certificates-pending"

// trustTimeout bounds the program, which nobody waits for.
const trustTimeout = 2 * time.Minute

var errNoStore = errors.New("the distro has no place for them; install its package ca-certificates")

// findStore is the one that the distro with this root has.
func findStore(root string) (trustStore, error) {
	for _, s := range trustStores {
		if st, err := os.Stat(filepath.Join(root, s.dir)); err != nil || !st.IsDir() {
			continue
		}
		for _, dir := range programDirs {
			if unix.Access(filepath.Join(root, dir, s.program), unix.X_OK) == nil {
				return s, nil
			}
		}
	}
	return trustStore{}, errNoStore
}

// trust makes the distro trust these authorities, and no longer those that it was given before.
func (d *distro) trust(root string, certificates []string) error {
	s, err := findStore(root)
	if err != nil {
		if len(certificates) == 0 {
			return nil
		}
		return err
	}
	pending, err := s.place(root, certificates)
	if err != nil || !pending {
		return err
	}
	// Everybody reads its bundles, whatever the distro's umask is.
	if text, err := d.run(trustTimeout, "sh", "-c", "umask 022; exec "+s.program); err != nil {
		return fmt.Errorf("%s: %w: %s", s.program, err, text)
	}
	return os.Remove(filepath.Join(root, pendingTrust))
}

// place makes the certificates the only ones of the host's there. pending tells whether the program has not yet
// run since they became others.
func (s trustStore) place(root string, certificates []string) (pending bool, err error) {
	dir := filepath.Join(root, s.dir)
	list, err := os.ReadDir(dir)
	if err != nil {
		return false, err
	}
	wanted := map[string]string{}
	for i, c := range certificates {
		wanted[fmt.Sprintf("%s%d.crt", certificatePrefix, i+1)] = c // one each: Debian takes no more of a file
	}
	var stale []string
	for _, e := range list {
		if !strings.HasPrefix(e.Name(), certificatePrefix) {
			continue
		}
		path := filepath.Join(dir, e.Name())
		c, ok := wanted[e.Name()]
		if st, err := e.Info(); ok && err == nil && st.Mode().IsRegular() && st.Size() == int64(len(c)) {
			if old, err := os.ReadFile(path); err == nil && string(old) == c {
				delete(wanted, e.Name())
				continue
			}
		}
		stale = append(stale, path)
	}
	mark := filepath.Join(root, pendingTrust)
	if len(stale) == 0 && len(wanted) == 0 {
		_, err := os.Lstat(mark)
		return err == nil, nil
	}
	if err := replaceFile(mark, ""); err != nil {
		return false, err
	}
	for _, path := range stale {
		if err := os.Remove(path); err != nil {
			return true, err
		}
	}
	for name, c := range wanted {
		if err := replaceFile(filepath.Join(dir, name), c); err != nil {
			return true, err
		}
	}
	return true, nil
}
