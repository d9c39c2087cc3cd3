package service

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// TestMakeSwap: the file is a swap area to others, takes no room, and takes nobody
// else's place.
func TestMakeSwap(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "swap")
	for _, size := range []uint64{64 << 20, 1<<30 + 77} { // and again, over the first
		if err := makeSwap(path, size); err != nil {
			t.Fatal(err)
		}
		var st unix.Stat_t
		if err := unix.Stat(path, &st); err != nil || uint64(st.Size) != size/4096*4096 || st.Blocks*512 > 64<<10 || st.Mode&0o777 != 0o600 {
			t.Errorf("%+v, %v", st, err)
		}
	}
	out, err := exec.Command("/sbin/swaplabel", "--label", "read", path).CombinedOutput()
	if err != nil {
		t.Errorf("swaplabel: %v: %s", err, out)
	}
	for name, make := range map[string]func(path string) error{
		"text":      func(path string) error { return os.WriteFile(path, []byte(strings.Repeat("text", 2000)), 0o600) },
		"short":     func(path string) error { return os.WriteFile(path, []byte("text"), 0o600) },
		"directory": func(path string) error { return os.Mkdir(path, 0o700) },
		"fifo":      func(path string) error { return unix.Mkfifo(path, 0o600) },
		"link":      func(path string) error { return os.Symlink("swap", path) },
	} {
		path := filepath.Join(dir, name)
		if err := make(path); err != nil {
			t.Fatal(err)
		}
		if err := makeSwap(path, 1<<20); err == nil {
			t.Errorf("%s was made a swap file", name)
		}
	}
	if text, err := os.ReadFile(filepath.Join(dir, "short")); string(text) != "text" {
		t.Errorf("%q, %v", text, err)
	}
}
