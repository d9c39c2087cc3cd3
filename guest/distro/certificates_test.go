package distro

import (
	"errors"
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"
)

// TestCertificates: each family's place gets the host's, in files of their own, anew only when they are others; and what
// is not the host's stays.
func TestCertificates(t *testing.T) {
	defer unix.Umask(unix.Umask(0o077)) // of a distro, which is not that of files for everybody
	for _, s := range trustStores {
		root := t.TempDir()
		if _, err := findStore(root); !errors.Is(err, errNoStore) {
			t.Errorf("a distro without any place: %v", err)
		}
		dir := filepath.Join(root, s.dir)
		for _, err := range []error{
			os.MkdirAll(dir, 0o755), os.MkdirAll(filepath.Join(root, "usr/sbin"), 0o755), os.MkdirAll(filepath.Join(root, "etc"), 0o755), os.WriteFile(filepath.Join(dir, "own.crt"), []byte("own"), 0o644),
			os.WriteFile(filepath.Join(root, "usr/sbin", s.program), nil, 0o755), os.Symlink("/etc/passwd", filepath.Join(dir, certificatePrefix+"1.crt")),
		} {
			if err != nil {
				t.Fatal(err)
			}
		}
		got, err := findStore(root)
		if err != nil || got != s {
			t.Fatalf("%v, %v; want %v", got, err, s)
		}
		for _, step := range []struct {
			certificates []string
			pending      bool
		}{{[]string{"A", "B"}, true}, {[]string{"A", "B"}, false}, {[]string{"A", "C"}, true}, {[]string{"C"}, true}, {nil, true}, {nil, false}} {
			for range 2 { // interrupted, and again
				pending, err := s.place(root, step.certificates)
				if err != nil || pending != step.pending {
					t.Errorf("%s: %q: pending %v, %v", s.dir, step.certificates, pending, err)
				}
			}
			if err := os.Remove(filepath.Join(root, pendingTrust)); err == nil != step.pending {
				t.Errorf("%s: %q: the mark: %v", s.dir, step.certificates, err)
			}
			var there []string
			list, _ := filepath.Glob(filepath.Join(dir, certificatePrefix+"*"))
			for _, path := range list {
				if st, err := os.Stat(path); err != nil || st.Mode().Perm() != 0o644 {
					t.Errorf("%s: %v, %v", path, st, err)
				}
				b, err := os.ReadFile(path)
				if err != nil {
					t.Fatal(err)
				}
				there = append(there, string(b))
			}
			if len(there) != len(step.certificates) {
				t.Errorf("%s: %q there, want %q", s.dir, there, step.certificates)
			}
			for i := range there {
				if there[i] != step.certificates[i] {
					t.Errorf("%s: %q there, want %q", s.dir, there, step.certificates)
				}
			}
		}
		if b, err := os.ReadFile(filepath.Join(dir, "own.crt")); err != nil || string(b) != "own" {
			t.Errorf("the distro's own: %q, %v", b, err)
		}
	}
}
