//go:build e2e

package fusefs_test

import (
	"context"
	"fmt"
	"net"
	"os"
	"os/exec"
	"testing"
	"time"

	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"

	"github.com/wsl2/wsl2/internal/fusefs"
	"github.com/wsl2/wsl2/internal/p9"
	"github.com/wsl2/wsl2/internal/p9/localfs"
	"github.com/wsl2/wsl2/internal/p9/remote"
)

func check(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// TestPosix holds a directory of this machine, mounted by this machine's kernel, to what the
// directory itself does: directly, and over 9P.
func TestPosix(t *testing.T) {
	suite := t.TempDir() + "/posix"
	if out, err := exec.Command("go", "test", "-c", "-o", suite, "../posixtest").CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	unix.Umask(0)
	for name, how := range map[string]func(*testing.T, *localfs.FS) p9.Node{"direct": direct, "9P": over9P} {
		t.Run(name, func(t *testing.T) {
			fs, err := localfs.New(t.TempDir(), localfs.Config{})
			check(t, err)
			defer fs.Close()
			dir := t.TempDir()
			served := fusefs.New(how(t, fs), fusefs.Config{})
			o := fusefs.Options()
			o.DirectMount, o.FsName, o.Name, o.Options = true, "test", "wsl2", []string{"default_permissions"}
			server, err := fuse.NewServer(served, dir, o)
			check(t, err)
			ended := make(chan struct{})
			go func() { server.Serve(); close(ended) }()
			check(t, server.WaitMount())
			defer func() {
				check(t, unix.Unmount(dir, unix.MNT_DETACH))
				<-ended
				served.Close()
			}()
			ctx, cancel := context.WithTimeout(t.Context(), 3*time.Minute)
			defer cancel()
			tests := "."
			if name == "9P" { // rename has no flags there
				tests = "Test[^R]|TestReaddir"
			}
			cmd := exec.CommandContext(ctx, suite, "-test.v", "-test.run="+tests)
			cmd.Env = append(os.Environ(), "WSL2_POSIX_DIR="+dir)
			if out, err := cmd.CombinedOutput(); err != nil {
				t.Errorf("%v\n%s", err, out)
			}
		})
	}
}

func direct(t *testing.T, fs *localfs.FS) p9.Node {
	root, err := fs.Attach("", "", 0)
	check(t, err)
	return root
}

func over9P(t *testing.T, fs *localfs.FS) p9.Node {
	ours, theirs := net.Pipe()
	served := make(chan error, 1)
	go func() { served <- p9.Serve(context.Background(), theirs, fs, p9.Config{}) }()
	c, err := p9.NewClient(t.Context(), ours, 0)
	check(t, err)
	root, err := c.Attach(t.Context(), "", "", 0)
	check(t, err)
	t.Cleanup(func() {
		c.Close()
		<-served
	})
	return remote.Root(context.Background(), root)
}

// TestPrune: a kernel that has seen many files forgets the oldest, and finds them again.
func TestPrune(t *testing.T) {
	tree, dir := t.TempDir(), t.TempDir()
	const files, keep = 1000, 100
	for i := range files {
		sub := fmt.Sprintf("%s/%d", tree, i%10)
		check(t, os.MkdirAll(sub, 0o755))
		check(t, os.WriteFile(fmt.Sprintf("%s/%d", sub, i), nil, 0o644))
	}
	local, err := localfs.New(tree, localfs.Config{})
	check(t, err)
	defer local.Close()
	served := fusefs.New(direct(t, local), fusefs.Config{Timeout: time.Hour})
	o := fusefs.Options()
	o.DirectMount, o.FsName, o.Name = true, "test", "wsl2"
	forgotten := make(chan struct{}, 1)
	server, err := fuse.NewServer(forgetful{served, forgotten}, dir, o)
	check(t, err)
	ended := make(chan struct{})
	go func() { server.Serve(); close(ended) }()
	check(t, server.WaitMount())
	ctx, cancel := context.WithCancel(context.Background())
	pruned := make(chan struct{})
	go func() {
		served.Prune(ctx, server, keep)
		close(pruned)
	}()
	defer func() {
		cancel()
		<-pruned
		check(t, unix.Unmount(dir, unix.MNT_DETACH))
		<-ended
		served.Close()
	}()
	before := descriptors(t)
	for range 3 {
		for i := range files {
			if _, err := os.Stat(fmt.Sprintf("%s/%d/%d", dir, i%10, i)); err != nil {
				t.Fatal(err)
			}
		}
	}
	for descriptors(t)-before > files/2 {
		select {
		case <-forgotten:
		case <-time.After(time.Minute):
			t.Fatalf("%d files are known, want about %d", descriptors(t)-before, keep)
		}
	}
}

// forgetful tells of each file that the kernel has forgotten.
type forgetful struct {
	*fusefs.FS
	told chan struct{}
}

func (f forgetful) Forget(id, lookups uint64) {
	f.FS.Forget(id, lookups)
	select {
	case f.told <- struct{}{}:
	default:
	}
}

func descriptors(t *testing.T) int {
	t.Helper()
	entries, err := os.ReadDir("/proc/self/fd")
	check(t, err)
	return len(entries)
}
