package remover

import (
	"errors"
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/wsl2/wsl2/guest/diskjob"
	"github.com/wsl2/wsl2/internal/testsys/namespace"
)

// TestRun deletes what is in a directory, but nothing while something is mounted in there. The test starts
// itself again in a mount namespace of its own.
func TestRun(t *testing.T) {
	if !namespace.Inside(t, unix.CLONE_NEWNS) {
		return
	}
	must := func(errs ...error) {
		t.Helper()
		if err := errors.Join(errs...); err != nil {
			t.Fatal(err)
		}
	}
	host, root := t.TempDir(), t.TempDir()
	point, file := filepath.Join(root, "a/b"), filepath.Join(host, "file")
	must(os.MkdirAll(point, 0o755), os.WriteFile(file, nil, 0o644), os.WriteFile(filepath.Join(root, "own"), nil, 0o644),
		unix.Mount(host, point, "", unix.MS_BIND, ""), os.Chdir(root))
	if _, err := run(nil, nil); !errors.Is(err, diskjob.ErrRefused) {
		t.Errorf("with a mount: %v", err)
	}
	for _, path := range []string{file, filepath.Join(root, "own")} {
		if _, err := os.Stat(path); err != nil {
			t.Error(err)
		}
	}
	must(unix.Unmount(point, 0))
	if _, err := run(nil, nil); err != nil {
		t.Error(err)
	}
	// A link leads nowhere, however often it takes the place of a directory meanwhile.
	kept := filepath.Join(host, "kept")
	must(os.Mkdir(kept, 0o755), os.WriteFile(filepath.Join(kept, "file"), nil, 0o644))
	link, dir := filepath.Join(root, "link"), filepath.Join(root, "dir")
	stop, swapped := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(swapped)
		for {
			select {
			case <-stop:
				return
			default:
				os.Mkdir(dir, 0o755)
				os.Symlink(kept, link)
				unix.Renameat2(unix.AT_FDCWD, dir, unix.AT_FDCWD, link, unix.RENAME_EXCHANGE) //nolint:errcheck // one of them may be deleted
			}
		}
	}()
	for range 200 {
		run(nil, nil) //nolint:errcheck // there may be something new in a directory
	}
	close(stop)
	<-swapped
	if _, err := run(nil, nil); err != nil {
		t.Error(err)
	}
	if _, err := os.Stat(filepath.Join(kept, "file")); err != nil {
		t.Errorf("a link was followed: %v", err)
	}
	if left, err := os.ReadDir(root); err != nil || len(left) != 0 {
		t.Errorf("left: %v, %v", left, err)
	}
	// A tree deeper than there are descriptors, with directories of the names that its own get.
	var limit unix.Rlimit
	must(unix.Getrlimit(unix.RLIMIT_NOFILE, &limit))
	low := limit
	low.Cur = 64
	for range 2 * low.Cur {
		must(os.MkdirAll("1/b", 0o755), os.WriteFile("file", nil, 0o644), os.Mkdir("2", 0o755), os.WriteFile("3", nil, 0o644), os.Symlink(kept, "link"), os.Mkdir("0", 0o500), os.Chdir("0"))
	}
	must(os.Chdir(root), unix.Setrlimit(unix.RLIMIT_NOFILE, &low))
	if err := os.RemoveAll(root); !errors.Is(err, unix.EMFILE) {
		t.Errorf("os.RemoveAll has descriptors enough: %v", err)
	}
	_, err := run(nil, nil)
	must(unix.Setrlimit(unix.RLIMIT_NOFILE, &limit), err)
	if left, err := os.ReadDir(root); err != nil || len(left) != 0 {
		t.Errorf("left of a deep tree: %v, %v", left, err)
	}
	if _, err := os.Stat(filepath.Join(kept, "file")); err != nil {
		t.Errorf("a link was followed: %v", err)
	}
	must(os.Chdir("/"))
}
