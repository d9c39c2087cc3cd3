//go:build e2e

package server

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/wsl2/wsl2/internal/p9"
	"github.com/wsl2/wsl2/internal/p9/localfs"
	"github.com/wsl2/wsl2/internal/wire"
	"github.com/wsl2/wsl2/launcher/hostmount"
)

func check(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// guest answers as a distro does that serves tree, on a VM's socket. Its connections end with end.
func guest(t *testing.T, tree string) (socket string, end context.CancelFunc) {
	dir := t.TempDir()
	l, err := net.Listen("unix", dir+"/vsock")
	check(t, err)
	fs, err := localfs.New(tree, localfs.Config{})
	check(t, err)
	ctx, end := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() {
		defer close(done)
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			r := bufio.NewReader(c)
			line, err := r.ReadString('\n')
			hello, err1 := wire.Read(r)
			start, err2 := wire.Read(r)
			if err := errors.Join(err, err1, err2); err != nil || line != "CONNECT 7\n" || hello.(*wire.Hello).Role != wire.RoleFiles || start.(*wire.Start).Default != "me" {
				t.Errorf("%q, %+v, %+v, %v", line, hello, start, err)
				c.Close()
				continue
			}
			io.WriteString(c, "OK 7\n")
			check(t, wire.Write(c, &wire.Serving{UID: uint32(os.Geteuid()), GID: uint32(os.Getegid())}))
			p9.Serve(ctx, struct {
				io.Reader
				io.WriteCloser
			}{r, c}, fs, p9.Config{})
		}
	}()
	t.Cleanup(func() {
		end()
		l.Close()
		<-done
		fs.Close()
	})
	return dir + "/vsock", end
}

// TestRun mounts, and takes the mount away when the service closes its end, when the
// distro ends, and when somebody has unmounted it.
func TestRun(t *testing.T) {
	tree, dir := t.TempDir(), t.TempDir()
	check(t, os.WriteFile(tree+"/f", []byte("text"), 0o644))
	for name, finish := range map[string]func(control *os.File, end context.CancelFunc){
		"control": func(control *os.File, _ context.CancelFunc) { control.Close() },
		"distro":  func(_ *os.File, end context.CancelFunc) { end() },
		"unmount": func(*os.File, context.CancelFunc) { check(t, hostmount.Detach(dir)) },
	} {
		t.Run(name, func(t *testing.T) {
			socket, end := guest(t, tree)
			fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
			check(t, err)
			ours, theirs := os.NewFile(uintptr(fds[0]), "ours"), os.NewFile(uintptr(fds[1]), "theirs")
			defer ours.Close()
			ran := make(chan error, 1)
			go func() {
				ran <- Run(t.Context(), hostmount.Spec{VsockPath: socket, Port: 7, Distro: "d", User: "me", Dir: dir}, theirs)
				theirs.Close()
			}()
			if line, err := bufio.NewReader(ours).ReadString('\n'); line != hostmount.MountedLine {
				t.Fatalf("%q, %v", line, err)
			}
			check(t, os.WriteFile(dir+"/g", []byte("new"), 0o600))
			got, err := os.ReadFile(tree + "/g")
			if old, err2 := os.ReadFile(dir + "/f"); err != nil || err2 != nil || string(got) != "new" || string(old) != "text" {
				t.Errorf("%q, %q, %v, %v", got, old, err, err2)
			}
			finish(ours, end)
			check(t, <-ran)
			if entries, err := os.ReadDir(dir); err != nil || len(entries) != 0 {
				t.Errorf("%v, %v are left at the mount point", entries, err)
			}
		})
	}
}

// TestUser is TestRun without root's rights, by fusermount3.
func TestUser(t *testing.T) {
	exe, err := os.Executable()
	check(t, err)
	dir, err := os.MkdirTemp("", "mount-user-") // the parents of t.TempDir are not for others
	check(t, err)
	defer os.RemoveAll(dir)
	program, err := os.ReadFile(exe)
	check(t, err)
	check(t, errors.Join(os.Chmod(dir, 0o777), os.WriteFile(filepath.Join(dir, "test"), program, 0o755)))
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	// In a mount namespace of its own, where users may open /dev/fuse, as distributions have it.
	cmd := exec.CommandContext(ctx, "unshare", "--mount", "sh", "-ec", `mknod -m 666 fuse c 10 229
		mount --bind fuse /dev/fuse
		exec setpriv --reuid 65534 --regid 65534 --clear-groups ./test -test.run=TestRun -test.v`)
	cmd.Dir, cmd.Env = dir, append(os.Environ(), "TMPDIR="+dir)
	out, err := cmd.CombinedOutput()
	if err != nil || !bytes.Contains(out, []byte("PASS: TestRun/unmount")) {
		t.Errorf("%v\n%s", err, out)
	}
}
