package qemu

import (
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// TestDoorLongPath: a TMPDIR of any length will do, and nothing is left in it.
func TestDoorLongPath(t *testing.T) {
	tmp := filepath.Join(t.TempDir(), strings.Repeat("long", 40))
	if err := os.Mkdir(tmp, 0o700); err != nil {
		t.Fatal(err)
	}
	t.Setenv("TMPDIR", tmp)
	d, dir, err := newDoor()
	if err != nil {
		t.Fatal(err)
	}
	defer dir.Close()
	c, err := net.Dial("unix", fmt.Sprintf("/proc/self/fd/%d/%s", dir.Fd(), doorName))
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	through, err := d.accept()
	if err != nil {
		t.Fatal(err)
	}
	through.Close()
	if left, err := os.ReadDir(tmp); err != nil || len(left) > 0 {
		t.Errorf("left: %v, %v", left, err)
	}
}
