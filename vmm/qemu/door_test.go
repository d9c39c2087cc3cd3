package qemu

import (
	"fmt"
	"net"
	"os"
	"testing"
)

// TestDoor: who has the directory's descriptor comes through, once; nothing is left then.
func TestDoor(t *testing.T) {
	t.Setenv("TMPDIR", t.TempDir())
	d, dir, err := newDoor()
	if err != nil {
		t.Fatal(err)
	}
	defer dir.Close()
	if st, err := os.Stat(d.dir); err != nil || st.Mode().Perm() != 0o700 {
		t.Errorf("the directory: %v, %v", st, err)
	}
	c, err := net.Dial("unix", fmt.Sprintf("/proc/self/fd/%d/%s", dir.Fd(), doorName))
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	conn, err := d.accept()
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	if _, err := os.Stat(d.dir); !os.IsNotExist(err) {
		t.Errorf("the directory is left: %v", err)
	}
	d.close() // is harmless

	d, dir2, err := newDoor()
	if err != nil {
		t.Fatal(err)
	}
	defer dir2.Close()
	ended := make(chan error)
	go func() { _, err := d.accept(); ended <- err }()
	d.close()
	if err := <-ended; err == nil {
		t.Error("somebody came through a closed door")
	}
	if list, err := os.ReadDir(os.Getenv("TMPDIR")); err != nil || len(list) > 0 {
		t.Errorf("left behind: %v, %v", list, err)
	}
}
