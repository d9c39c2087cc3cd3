//go:build e2e || kvm

package main_test

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"github.com/wsl2/wsl2/images"
	"github.com/wsl2/wsl2/internal/testsys"
)

// hostTool finds a program that may lie in an sbin.
func hostTool(t *testing.T, name string) string {
	t.Helper()
	path, err := images.FindTool(name, errors.New("not found"))
	testsys.Must(t, err)
	return path
}

// mke2fs makes an ext4 file system of megabytes at offset of a file, with a file
// in it that says its name.
func mke2fs(t *testing.T, path string, offset, megabytes int64, name string) {
	t.Helper()
	root := t.TempDir()
	testsys.Must(t, os.WriteFile(filepath.Join(root, "name"), []byte(name+"\n"), 0o644))
	testsys.Must(t, os.Chmod(root, 0o755))
	out, err := exec.Command(hostTool(t, "mke2fs"), "-q", "-t", "ext4", "-d", root, "-E", fmt.Sprintf("offset=%d,root_owner=0:0", offset), path, fmt.Sprintf("%dM", megabytes)).CombinedOutput()
	if err != nil {
		t.Fatalf("%v: %s", err, out)
	}
}

// fsckFile fails the test unless the file system is clean.
func fsckFile(t *testing.T, path string) {
	t.Helper()
	if out, err := exec.Command(hostTool(t, "e2fsck"), "-f", "-n", path).CombinedOutput(); err != nil {
		t.Errorf("e2fsck %s: %v: %s", path, err, out)
	}
}

// diskFile makes a disk image with one file system.
func diskFile(h *testsys.Host, name string) string {
	path := h.File(name, nil)
	testsys.Must(h.TB, os.Truncate(path, 16<<20))
	mke2fs(h.TB.(*testing.T), path, 0, 16, name)
	return path
}

// partitioned makes one with an MBR and two partitions of 8 MB.
func partitioned(h *testsys.Host, name string) string {
	path := h.File(name, nil)
	testsys.Must(h.TB, os.Truncate(path, 20<<20))
	mbr := make([]byte, 512)
	mbr[510], mbr[511] = 0x55, 0xaa
	for i := range 2 {
		start := int64(1+9*i) << 20
		mke2fs(h.TB.(*testing.T), path, start, 8, fmt.Sprint(name, i+1))
		entry := mbr[446+16*i:]
		entry[4] = 0x83 // Linux
		binary.LittleEndian.PutUint32(entry[8:], uint32(start/512))
		binary.LittleEndian.PutUint32(entry[12:], 8<<20/512)
	}
	f, err := os.OpenFile(path, os.O_WRONLY, 0)
	testsys.Must(h.TB, err)
	_, err = f.WriteAt(mbr, 0)
	testsys.Must(h.TB, err)
	testsys.Must(h.TB, f.Close())
	return path
}
