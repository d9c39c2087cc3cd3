package images

import (
	"context"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
)

func TestCreateDisk(t *testing.T) {
	path := filepath.Join(t.TempDir(), "disk.ext4")
	if err := CreateDisk(context.Background(), path, 4<<30); err != nil {
		t.Fatal(err)
	}
	st, err := os.Stat(path)
	if err != nil || st.Size() != 4<<30 || st.Mode().Perm() != 0o600 {
		t.Fatalf("%v %v", st, err)
	}
	mke2fs, _ := FindMke2fs()
	out, err := exec.Command(filepath.Join(filepath.Dir(mke2fs), "e2fsck"), "-fn", path).CombinedOutput()
	if err != nil {
		t.Errorf("e2fsck: %v\n%s", err, out)
	}
	if err := CreateDisk(context.Background(), path, 4<<30); !errors.Is(err, os.ErrExist) {
		t.Errorf("a disk was written over: %v", err)
	}
	if _, err := os.Stat(path); err != nil {
		t.Errorf("the disk that was there is gone: %v", err)
	}
}

func TestCreateDiskFailureLeavesNothing(t *testing.T) {
	dir := t.TempDir()
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	if err := CreateDisk(ctx, filepath.Join(dir, "a"), 1<<30); !errors.Is(err, context.Canceled) {
		t.Errorf("cancelled: %v", err)
	}
	if err := CreateDisk(context.Background(), filepath.Join(dir, "b"), 1<<62); err == nil {
		t.Error("a disk of 4 EiB was made")
	}
	if err := CreateDisk(context.Background(), filepath.Join(dir, "c"), 4096); err == nil {
		t.Error("a disk of one block was made")
	}
	if left, _ := os.ReadDir(dir); len(left) != 0 {
		t.Errorf("left over: %v", left)
	}
}

func TestCheckSpace(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "not", "there")
	if err := CheckSpace(dir, 1); err != nil {
		t.Error(err)
	}
	if err := CheckSpace(dir, 1<<60); !errors.Is(err, ErrNoSpace) {
		t.Errorf("an exbibyte fits: %v", err)
	}
}

// The limiter hands every byte on, whatever it makes of them.
