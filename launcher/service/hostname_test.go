package service

import (
	"os"
	"path/filepath"
	"testing"
)

// TestTimezone: the name is the link's, else that of Debian's file.
func TestTimezone(t *testing.T) {
	dir, err := filepath.EvalSymlinks(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	etc := filepath.Join(dir, "etc")
	zone := filepath.Join(dir, "usr/share/zoneinfo/Europe/Berlin")
	for _, d := range []string{etc, filepath.Dir(zone)} {
		if err := os.MkdirAll(d, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.WriteFile(zone, nil, 0o644); err != nil {
		t.Fatal(err)
	}
	if got := timezoneIn(etc); got != "" {
		t.Errorf("nothing said: %q", got)
	}
	if err := os.WriteFile(filepath.Join(etc, "timezone"), []byte("Asia/Tokyo\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	if got := timezoneIn(etc); got != "Asia/Tokyo" {
		t.Errorf("the file: %q", got)
	}
	if err := os.Symlink("../usr/share/zoneinfo/Europe/Berlin", filepath.Join(etc, "localtime")); err != nil {
		t.Fatal(err)
	}
	if got := timezoneIn(etc); got != "Europe/Berlin" {
		t.Errorf("the link: %q", got)
	}
}
