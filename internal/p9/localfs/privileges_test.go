package localfs

import (
	"os"
	"runtime"
	"testing"

	"golang.org/x/sys/unix"
)

// TestPrivileges: set-id bits go with a change, whether it takes them away itself or not. All else of a mode stays, also what
// the client does not see; and who may change a file but not its mode can do so.
func TestPrivileges(t *testing.T) {
	fs, err := New(t.TempDir(), Config{FileMask: 0o077})
	check(t, err)
	defer fs.Close()
	created, opened, err := fs.root.Create("f", unix.O_RDWR, 0o666, 0)
	check(t, err)
	defer created.Close()
	defer opened.Close()
	n := created.(*inode)
	for before, after := range map[uint32]uint32{0o6777: 0o777, 0o2767: 0o2767, 0o5755: 0o1755, 0o644: 0o644} {
		check(t, unix.Chmod(n.magic(), before))
		check(t, n.DropPrivileges())
		_, err := opened.WriteAt([]byte("text"), 0)
		check(t, err)
		var st unix.Stat_t
		check(t, unix.Fstat(n.fd, &st))
		if got := st.Mode & 0o7777; got != after {
			t.Errorf("mode %o is then %o, want %o", before, got, after)
		}
	}
	if os.Geteuid() != 0 {
		return // the file is nobody else's, and each writing above was without rights
	}
	check(t, unix.Chmod(n.magic(), 0o6777))
	written := make(chan error)
	go func() {
		runtime.LockOSThread() // for good: the thread ends with the user that it has become
		err := unix.Setfsuid(65534)
		if err == nil {
			err = n.DropPrivileges()
		}
		if err == nil {
			_, err = opened.WriteAt([]byte("text"), 0)
		}
		written <- err
	}()
	check(t, <-written)
	var st unix.Stat_t
	check(t, unix.Fstat(n.fd, &st))
	if got := st.Mode & 0o7777; got != 0o777 {
		t.Errorf("another's file has mode %o", got)
	}
}
