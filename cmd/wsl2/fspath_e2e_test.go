//go:build e2e

package main_test

import (
	"bytes"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/wsl2/wsl2/internal/testsys"
)

// TestFSPath is a distro's tree on the host: both sides see the same files, and the mount
// goes with the distro, whoever of those that hold it is killed.
func TestFSPath(t *testing.T) {
	h := newHost(t)
	path := strings.TrimSpace(h.OK("--fs-path", "small:/srv"))
	root := filepath.Dir(path)
	if want := filepath.Join("wsl2", "fs", "small", "srv"); !strings.HasSuffix(path, want) {
		t.Fatalf("it is at %s, want .../%s", path, want)
	}
	guest := func(script string) string {
		t.Helper()
		return h.OK("-d", "small", "-e", "sh", "-c", "cd /srv && "+script)
	}
	data := testsys.PatternBytes(t, 3<<20+5)
	testsys.Must(t, os.WriteFile(path+"/data", data, 0o640))
	if out := guest("stat -c '%s %a %u' data; cp data copy; ln -s /srv/data abs; ln -s data rel; echo one >f; chown alice f"); out != "3145733 640 0\n" {
		t.Errorf("in the distro: %q", out)
	}
	for _, name := range []string{"copy", "abs", "rel"} {
		if got, err := os.ReadFile(path + "/" + name); err != nil || !bytes.Equal(got, data) {
			t.Errorf("%s: %d bytes, %v", name, len(got), err)
		}
	}
	// What either side changes, the other sees at once.
	for _, text := range []string{"one\n", "and two\n", ""} {
		guest("printf '" + text + "' >f")
		if got, err := os.ReadFile(path + "/f"); err != nil || string(got) != text {
			t.Errorf("%q, %v, want %q", got, err, text)
		}
	}
	testsys.Must(t, os.Rename(path+"/copy", path+"/moved"))
	testsys.Must(t, os.Remove(path+"/rel"))
	if out := guest("ls"); out != "abs\ndata\nf\nmoved\n" {
		t.Errorf("after a rename here: %q", out)
	}
	// Owners: its default user is us, others are nobody.
	var st unix.Stat_t
	testsys.Must(t, unix.Stat(path+"/data", &st))
	if st.Uid != uint32(os.Geteuid()) {
		t.Errorf("root's file is %d's", st.Uid)
	}
	testsys.Must(t, unix.Stat(path+"/f", &st))
	if st.Uid != 65534 {
		t.Errorf("alice's file is %d's", st.Uid)
	}
	if err := os.Chown(path+"/data", 1234, -1); !errors.Is(err, unix.EPERM) {
		t.Errorf("chown to somebody else: %v", err)
	}
	// A mapping of the host's is written in the distro.
	f, err := os.OpenFile(path+"/data", os.O_RDWR, 0)
	testsys.Must(t, err)
	m, err := unix.Mmap(int(f.Fd()), 0, 4096, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	testsys.Must(t, err)
	copy(m, "mapped")
	testsys.Must(t, errors.Join(unix.Msync(m, unix.MS_SYNC), unix.Munmap(m), f.Close()))
	if out := guest("head -c 6 data"); out != "mapped" {
		t.Errorf("%q", out)
	}
	// A second one is the first; it holds the distro.
	if again := strings.TrimSpace(h.OK("--fs-path", "SMALL")); again != root {
		t.Errorf("again: %s, want %s", again, root)
	}
	mounted := func(want bool) {
		t.Helper()
		var here, above unix.Stat_t
		err := unix.Stat(root, &here)
		testsys.Must(t, unix.Stat(h.Path("run"), &above))
		if is := err == nil && here.Dev != above.Dev; is != want {
			t.Errorf("mounted: %v (%v), want %v", is, err, want)
		}
	}
	mounted(true)
	h.OK("--terminate", "small")
	mounted(false)
	// Killed: the server of the mount, and the service.
	h.OK("--fs-path", "small")
	h.Process("mount").Kill(t)
	h.OK("--terminate", "small") // returns when the service has seen the end of the mount
	mounted(false)
	h.OK("--fs-path", "small")
	mounted(true)
	server := h.Process("mount")
	h.Process("service").Kill(t)
	server.End(t)
	mounted(false)
	h.OK("--fs-path", "small:/etc")
	mounted(true)
	h.OK("--shutdown")
	mounted(false)
	h.Refused(h.Run("--fs-path", "nosuch"), "nosuch")
	h.Refused(h.Run("--fs-path", "small:etc"), "absolute")
	guest("echo team:x:5000:alice >>/etc/group; echo ours >team; chown 0:5000 team; chmod 640 team")
	h.OK("--manage", "small", "--set-default-user", "alice")
	path = strings.TrimSpace(h.OK("--fs-path", "small"))
	if err := os.WriteFile(path+"/etc/passwd", nil, 0o644); !errors.Is(err, unix.EACCES) {
		t.Errorf("alice writes /etc/passwd: %v", err)
	}
	if err := unix.Access(path+"/etc/passwd", unix.W_OK); err != unix.EACCES {
		t.Errorf("access(2): %v", err)
	}
	// Her groups' files as well, as far as they may.
	if got, err := os.ReadFile(path + "/srv/team"); err != nil || string(got) != "ours\n" {
		t.Errorf("alice reads her group's file: %q, %v", got, err)
	}
	if err := os.WriteFile(path+"/srv/team", nil, 0o644); !errors.Is(err, unix.EACCES) {
		t.Errorf("alice writes it: %v", err)
	}
	testsys.Must(t, os.WriteFile(path+"/home/alice/hers", nil, 0o600))
	if out := h.OK("-d", "small", "-e", "stat", "-c", "%U", "/home/alice/hers"); out != "alice\n" {
		t.Errorf("the owner is %q", out)
	}
}
