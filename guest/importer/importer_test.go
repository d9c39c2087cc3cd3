package importer

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

func TestDistributionConf(t *testing.T) {
	root := t.TempDir()
	etc := filepath.Join(root, "etc")
	path := filepath.Join(etc, "wsl-distribution.conf")
	if got := distributionConf(root); got != "" {
		t.Errorf("without /etc: %q", got)
	}
	if err := os.Mkdir(etc, 0o755); err != nil {
		t.Fatal(err)
	}
	secret := filepath.Join(t.TempDir(), "secret")
	os.WriteFile(secret, []byte("secret"), 0o600)
	for _, c := range []struct {
		name string
		make func() error
		want string
	}{
		{"good", func() error { return os.WriteFile(path, []byte("[oobe]\r\ndefaultName = x\r\n"), 0o644) }, "[oobe]\ndefaultName = x\n"},
		{"too large", func() error { return os.WriteFile(path, []byte(strings.Repeat("x", maxConf+1)), 0o644) }, ""},
		{"a link out of the root", func() error { return os.Symlink(secret, path) }, ""},
		{"a FIFO", func() error { return unix.Mkfifo(path, 0o644) }, ""},
		{"a directory", func() error { return os.Mkdir(path, 0o755) }, ""},
		{"a link inside", func() error {
			os.WriteFile(filepath.Join(root, "conf"), []byte("inside"), 0o644)
			return os.Symlink("/conf", path)
		}, "inside"},
	} {
		if err := c.make(); err != nil {
			t.Fatal(err)
		}
		if got := distributionConf(root); got != c.want {
			t.Errorf("%s: %q, want %q", c.name, got, c.want)
		}
		os.RemoveAll(path)
	}
}
