//go:build e2e

package main_test

import (
	"bytes"
	"context"
	"crypto/sha256"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/wsl2/wsl2/internal/testsys"
)

// in runs a script in the small distro, called from a directory of the host.
func in(h *testsys.Host, dir string, words ...string) testsys.Result {
	h.TB.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), testsys.Deadline)
	defer cancel()
	cmd := h.Cmd(ctx, append([]string{"-d", "small"}, words...)...)
	cmd.Dir = dir
	return h.Finish(ctx, cmd)
}

// TestShare is the user's home in a distro: both sides see the same files, and the
// caller's directory is the program's.
func TestShare(t *testing.T) {
	h := newHost(t)
	home := h.Path("home")
	project := filepath.Join(home, "a project")
	testsys.Must(t, os.MkdirAll(project, 0o755))
	script := func(text string) string {
		t.Helper()
		r := in(h, project, "-e", "sh", "-c", text)
		h.Want(r, 0)
		return r.Stdout
	}
	// Before anything else: the directory is there for the first program.
	if out := script("pwd"); out != "/mnt/host/a project\n" {
		t.Errorf("started in %q", out)
	}
	testsys.Must(t, os.WriteFile(project+"/of the host", []byte("host\n"), 0o640))
	if out := script("cat 'of the host'; stat -c '%a %u %g' 'of the host'; echo guest >'of the guest'; chmod 600 'of the guest'"); out != "host\n640 0 0\n" {
		t.Errorf("the guest sees %q", out)
	}
	st, err := os.Stat(project + "/of the guest")
	if err != nil || st.Mode() != 0o600 || st.Size() != 6 {
		t.Errorf("the guest's file on the host: %v, %v", st, err)
	}
	// What changes on the host shows at once, also in what the guest has seen before.
	testsys.Must(t, os.WriteFile(project+"/of the host", []byte("changed\n"), 0o640))
	testsys.Must(t, os.Remove(project+"/of the guest"))
	if out := script("cat *"); out != "changed\n" {
		t.Errorf("after a change: %q", out)
	}
	setuid := ""
	if version1() {
		setuid = "4" // a bind mount
	}
	// Names, links, times, holes, files that are open and gone.
	if out := script(`set -e
mkdir -p d/e; ln -s ../d/e l; readlink l; mv d D; ls
: >D/f; ln D/f D/g; stat -c %h D/f; rm D/f; stat -c %h D/g
exec 3<>open; echo kept >&3; rm open; cat /proc/self/fd/3; exec 3>&-
mkfifo p; (echo through >p &); cat p
touch -d @7000000000 t; stat -c %Y t
dd if=/dev/zero of=hole bs=1 count=1 seek=5000000000 2>/dev/null; stat -c %s hole; test $(stat -c %b hole) -lt 100
echo a >app; echo b >>app; cat app
chmod u+s app; stat -c %a app
rm -r D l p t hole app`); out != "../d/e\nD\nl\nof the host\n2\n1\nkept\nthrough\n7000000000\n5000000001\na\nb\n"+setuid+"644\n" {
		t.Errorf("%q", out)
	}
	h.Want(in(h, project, "-e", "sh", "-c", "mknod null c 1 3"), 1, "not permitted")

	// Appending is atomic, also beside the host's.
	log, err := os.OpenFile(project+"/log", os.O_WRONLY|os.O_CREATE|os.O_APPEND, 0o644)
	testsys.Must(t, err)
	defer log.Close()
	live := h.Start("-d", "small", "--cd", "/mnt/host/a project", "-e", "sh", "-c",
		"for i in 1 2 3 4; do (for j in $(seq 50); do echo guest; done >>log) & done; wait; echo done")
	for range 200 {
		_, err := log.WriteString("host\n")
		testsys.Must(t, err)
	}
	live.Expect("done\n")
	live.Wait()
	text, err := os.ReadFile(log.Name())
	if g, n := strings.Count(string(text), "guest\n"), strings.Count(string(text), "host\n"); err != nil || g != 200 || n != 200 || len(text) != 200*11 {
		t.Errorf("%d of 200 lines of the guest, %d of 200 of the host, %d bytes, %v", g, n, len(text), err)
	}
	// Locks hold on both sides.
	build := exec.Command("go", "build", "-o", home+"/lock", "./internal/testsys/lock")
	build.Dir, build.Env = testsys.Root(), append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	part := func(how int16) *unix.Flock_t { return &unix.Flock_t{Type: how, Start: 15, Len: 1} }
	for kind, lock := range map[string]func(take bool) error{
		"flock": func(take bool) error {
			return unix.Flock(int(log.Fd()), map[bool]int{true: unix.LOCK_EX | unix.LOCK_NB, false: unix.LOCK_UN}[take])
		},
		"fcntl": func(take bool) error {
			return unix.FcntlFlock(log.Fd(), unix.F_OFD_SETLK, part(map[bool]int16{true: unix.F_WRLCK, false: unix.F_UNLCK}[take]))
		},
	} {
		testsys.Must(t, lock(true))
		h.Want(in(h, project, "-e", "../lock", kind, "log"), 1, "temporarily unavailable")
		testsys.Must(t, lock(false))
		live := h.Start("-d", "small", "--cd", "/mnt/host/a project", "-e", "../lock", kind, "log")
		live.Expect("locked\n")
		if err := lock(true); err != unix.EAGAIN {
			t.Errorf("%s of what the guest has locked: %v", kind, err)
		}
		live.Stdin.Close()
		live.Wait()
		testsys.Must(t, lock(true))
		testsys.Must(t, lock(false))
	}

	// Paths on both sides.
	if out := script("wslpath -aw . && wslpath -u '" + project + "/x'"); out != project+"\n/mnt/host/a project/x\n" {
		t.Errorf("wslpath: %q", out)
	}
	h.Setenv("WHERE", project)
	h.Setenv("WSLENV", "WHERE/p")
	if out := script("echo $WHERE; host-exec pwd"); out != "/mnt/host/a project\n"+project+"\n" {
		t.Errorf("WSLENV and a host program's directory: %q", out)
	}
	for dir, want := range map[string]string{home: "/mnt/host\n", h.Dir: "/root\n", "/": "/root\n"} {
		if r := in(h, dir, "-e", "pwd"); r.Stdout != want || r.Stderr != "" {
			t.Errorf("from %s: %v, want %q", dir, r, want)
		}
	}
	if r := in(h, home, "--cd", "a project", "-e", "pwd"); r.Stdout != "/mnt/host/a project\n" {
		t.Errorf("--cd: %v", r)
	}
	if r := in(h, project, "--cd", "~", "-e", "pwd"); r.Stdout != "/root\n" {
		t.Errorf("--cd ~: %v", r)
	}
	// The home is the default user's, whoever that is.
	h.OK("--manage", "small", "--set-default-user", "alice")
	h.OK("--shutdown")
	if out := script("id -un; stat -c %U .; echo alice >hers; cat hers"); out != "alice\nalice\nalice\n" {
		t.Errorf("alice: %q", out)
	}
}

// TestShareSettings: what wslconfig shares is there, what it does not is not.
func TestShareSettings(t *testing.T) {
	h := newHost(t)
	data := h.Path("some data")
	testsys.Must(t, os.MkdirAll(data, 0o755))
	testsys.Must(t, os.WriteFile(data+"/f", []byte("data\n"), 0o644))
	testsys.Must(t, os.Symlink(h.Path("home"), data+"/out"))
	testsys.Must(t, os.WriteFile(h.Path("home", "secret"), nil, 0o644))
	config := func(lines ...string) {
		t.Helper()
		h.OK("--shutdown")
		h.Config(lines...)
	}
	config("[shares]", "host = none", "data = "+data+", ro", "gone = /nosuchdir")
	r := in(h, data, "-e", "sh", "-c", "pwd; cat f; ls /mnt; echo x >f; ls out/; ls /mnt/gone")
	h.Want(r, 1, "Read-only file system", "out/", "/mnt/gone")
	mounts := "data\ngone\nwsl\n"
	if version1() {
		mounts = "data\n"
	}
	if r.Stdout != "/mnt/data\ndata\n"+mounts {
		t.Errorf("%v", r)
	}
	config("[shares]", "data = "+data, "[shares.Small]", "isolated = true")
	r = in(h, data, "-e", "sh", "-c", "pwd; cat /proc/mounts; ls /mnt/host /run/wsl2/shares")
	h.Want(r, 1)
	if !strings.HasPrefix(r.Stdout, "/root\n") || strings.Contains(r.Stdout, "autofs") || strings.Contains(r.Stdout, " 9p ") {
		t.Errorf("an isolated distro: %v", r)
	}
	// Owners and modes of the distro's own, and modes that it does not see.
	config("[shares]", "host = none", "data = "+data+", metadata, fmask=022")
	testsys.Must(t, os.WriteFile(data+"/open", nil, 0o666))
	testsys.Must(t, os.Chmod(data+"/open", 0o666))
	r = in(h, data, "-e", "sh", "-c", "chown alice f && chmod 4750 f && stat -c '%U %a' f open")
	h.Want(r, 0)
	if r.Stdout != "alice 4750\nroot 644\n" {
		t.Errorf("metadata: %v", r)
	}
	var st unix.Stat_t
	testsys.Must(t, unix.Stat(data+"/f", &st))
	if st.Uid != uint32(os.Geteuid()) || st.Mode&0o7777 != 0o644 {
		t.Errorf("on the host it is %d's, mode %o", st.Uid, st.Mode)
	}
	// The distro's own file makes less of it, and not more.
	h.OK("-d", "small", "-e", "sh", "-c", `printf '[shares]\ndata = ro\nhost = rw\n' >/etc/wsl.conf`)
	h.OK("--terminate", "small")
	r = in(h, data, "-e", "sh", "-c", "cat f; echo x >f; grep -c autofs /proc/mounts")
	h.Want(r, 0, "Read-only file system")
	if r.Stdout != "data\n1\n" {
		t.Errorf("narrowed: %v", r)
	}
	h.OK("-d", "small", "-e", "sh", "-c", `printf '[automount]\nenabled = false\n' >/etc/wsl.conf`)
	h.OK("--terminate", "small")
	if r = in(h, data, "-e", "sh", "-c", "grep autofs /proc/mounts; ls /mnt/data"); r.Stdout != "" {
		t.Errorf("without automount: %v", r)
	}
}

// TestCopy is `wsl2 cp`, with the rights of the user it is for.
func TestCopy(t *testing.T) {
	h := newHost(t)
	dir := h.Path("files")
	testsys.Must(t, os.MkdirAll(dir+"/sub", 0o755))
	data := testsys.PatternBytes(t, 3<<20)
	testsys.Must(t, os.WriteFile(dir+"/sub/data", data, 0o640))
	testsys.Must(t, os.Symlink("data", dir+"/sub/link"))
	h.OK("cp", dir+"/sub", "small:/srv")
	if out := h.OK("-d", "small", "-e", "sh", "-c", "cd /srv/sub && sha256sum <data && stat -c '%a %u' data && readlink link"); out != fmt.Sprintf("%x  -\n640 0\ndata\n", sha256.Sum256(data)) {
		t.Errorf("in the distro: %q", out)
	}
	h.OK("cp", "small:/srv/sub/link", "small:/etc/passwd", dir)
	if got, err := os.ReadFile(dir + "/link"); err != nil || !bytes.Equal(got, data) {
		t.Errorf("back on the host: %d bytes, %v", len(got), err)
	}
	if got, err := os.ReadFile(dir + "/passwd"); err != nil || !strings.HasPrefix(string(got), "root:") {
		t.Errorf("%q, %v", got, err)
	}
	// Alice may write in her home, and only there.
	h.OK("cp", "-u", "alice", dir+"/sub", "small:/home/alice/mine")
	if out := h.OK("-d", "small", "-e", "stat", "-c", "%U", "/home/alice/mine/data"); out != "alice\n" {
		t.Errorf("the owner is %q", out)
	}
	h.Refused(h.Run("cp", "-u", "alice", dir+"/passwd", "small:/etc/passwd"), "permission denied")
	h.Refused(h.Run("cp", "-u", "alice", "small:/root", dir), "permission denied")
	h.Refused(h.Run("cp", "-u", "nobody-here", "small:/etc/passwd", dir), "nobody-here")
	h.Refused(h.Run("cp", "small:/no/such", dir), "/no/such", "no such file")
	h.Refused(h.Run("cp", "nosuch:/etc/passwd", dir), "nosuch")
}
