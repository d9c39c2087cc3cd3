//go:build e2e

package shares

import (
	"os"
	"testing"

	"golang.org/x/sys/unix"
)

// TestReadOnlyEverywhere: a read-only share is so in the namespaces that it propagates to, and its
// file system is not.
func TestReadOnlyEverywhere(t *testing.T) {
	here, peer := t.TempDir(), t.TempDir()
	check(t, unix.Mount("tmpfs", here, "tmpfs", 0, ""))
	defer unix.Unmount(here, unix.MNT_DETACH) //nolint:errcheck // it is a temporary directory's
	check(t, unix.Mount("", here, "", unix.MS_SHARED, ""))
	check(t, os.Mkdir(here+"/share", 0o755))
	check(t, unix.Mount(here, peer, "", unix.MS_BIND, ""))
	defer unix.Unmount(peer, unix.MNT_DETACH) //nolint:errcheck // it is a temporary directory's
	check(t, attach("tmpfs", "source", []string{"mode=700"}, here+"/share", true))
	for _, dir := range []string{here, peer} {
		var mounted unix.Statfs_t
		check(t, unix.Statfs(dir+"/share", &mounted))
		if want := int64(unix.ST_RDONLY | unix.ST_NOSUID | unix.ST_NODEV); mounted.Flags&want != want {
			t.Errorf("%s has flags %#x", dir, mounted.Flags)
		}
		if err := os.Mkdir(dir+"/share/d", 0o755); err == nil {
			t.Errorf("%s can be written", dir)
		}
	}
	var st unix.Stat_t
	check(t, unix.Stat(here+"/share", &st))
	root, err := (&replayer{guest: here + "/share", dev: st.Dev}).root()
	check(t, err)
	defer unix.Close(root)
	check(t, unix.Mkdirat(root, "replayed", 0o755))
	if st.Mode&0o777 != 0o700 {
		t.Errorf("mode %o", st.Mode)
	}
}
