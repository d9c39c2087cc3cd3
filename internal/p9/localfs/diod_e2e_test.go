//go:build e2e

package localfs

import (
	"bytes"
	"context"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/wsl2/wsl2/internal/p9"
)

// diodWait bounds what another's program takes.
const diodWait = time.Minute

// TestDiodServer: our client is understood by diod, another 9P2000.L server, and understands it.
func TestDiodServer(t *testing.T) {
	ctx, cancel := context.WithTimeout(t.Context(), diodWait)
	defer cancel()
	dir := t.TempDir()
	ours, theirs := socketPair(t)
	f, err := theirs.(*net.UnixConn).File()
	check(t, err)
	theirs.Close()
	var log bytes.Buffer
	// One thread: its several fall over each other now and then, when fids are clunked.
	cmd := exec.CommandContext(ctx, "/usr/sbin/diod", "--foreground", "--nwthreads=1", "--no-auth", "--no-userdb", "--config-file=/dev/null", "--rfdno=3", "--wfdno=3", "--export="+dir)
	cmd.Dir, cmd.ExtraFiles, cmd.Stderr = t.TempDir(), []*os.File{f}, &log
	check(t, cmd.Start())
	f.Close()
	defer func() {
		if err := cmd.Wait(); t.Failed() {
			t.Logf("diod: %v\n%s", err, log.Bytes())
		}
	}()
	c, err := p9.NewClient(ctx, ours, 0)
	check(t, err)
	defer c.Close()
	uid := uint32(os.Geteuid())
	root := must(c.Attach(ctx, "", dir, uid))(t)
	made := must(root.Walk(ctx))(t)
	check(t, made.Create(ctx, "file", os.O_RDWR, 0o640, uint32(os.Getegid())))
	// More than one frame, and many at once.
	data := bytes.Repeat([]byte("0123456789abcdef"), 40_000)
	for at := 0; at < len(data); {
		n, err := made.WriteAt(ctx, data[at:], int64(at))
		check(t, err)
		at += n
	}
	check(t, made.Fsync(ctx, false))
	var readers sync.WaitGroup
	for i := range 16 {
		readers.Go(func() {
			b := make([]byte, 4096)
			at := int64(i * len(b))
			if n, err := made.ReadAt(ctx, b, at); err != nil || !bytes.Equal(b[:n], data[at:][:n]) || n != len(b) {
				t.Errorf("read at %d: %d bytes, %v", at, n, err)
			}
		})
	}
	readers.Wait()
	lock := p9.Lock{Type: p9.LockWrite, ProcID: 7, ClientID: "test"}
	if st, err := made.Lock(ctx, lock); err != nil || st != p9.LockSuccess {
		t.Errorf("lock: %v, %v", st, err)
	}
	lock.Type = p9.LockUnlock
	if st, err := made.Lock(ctx, lock); err != nil || st != p9.LockSuccess {
		t.Errorf("unlock: %v, %v", st, err)
	}
	check(t, made.Close(ctx))
	if got, err := os.ReadFile(dir + "/file"); err != nil || !bytes.Equal(got, data) {
		t.Errorf("diod's host has %d bytes, %v", len(got), err)
	}

	must(root.Mkdir(ctx, "d", 0o755, 0))(t)
	must(root.Symlink(ctx, "link", "d/../file", 0))(t)
	must(root.Mknod(ctx, "fifo", unix.S_IFIFO|0o600, 0, 0, 0))(t)
	d := must(root.Walk(ctx, "d"))(t)
	file := must(root.Walk(ctx, "file"))(t)
	check(t, d.Link(ctx, "hard", file))
	// diod has no renameat and no unlinkat.
	fifo := must(root.Walk(ctx, "fifo"))(t)
	check(t, fifo.Rename(ctx, d, "moved"))
	check(t, file.SetAttr(ctx, p9.SetAttr{Valid: p9.SetMode | p9.SetSize | p9.SetMtime | p9.SetMtimeTo, Mode: 0o600, Size: 5, Mtime: p9.Time{Sec: 1 << 33, Nsec: 123456789}}))
	a := must(file.GetAttr(ctx, p9.AttrBasic))(t)
	var st unix.Stat_t
	check(t, unix.Lstat(dir+"/file", &st))
	if a.Mode != st.Mode || a.Size != 5 || st.Size != 5 || a.Nlink != 2 || a.Mtime != (p9.Time{Sec: 1 << 33, Nsec: 123456789}) || st.Mtim.Sec != 1<<33 {
		t.Errorf("%+v, on diod's host %+v", a, st)
	}
	link := must(root.Walk(ctx, "link"))(t)
	if to := must(link.Readlink(ctx))(t); to != "d/../file" {
		t.Errorf("readlink: %q", to)
	}
	if s := must(root.Statfs(ctx))(t); s.Blocks == 0 || s.Namelen != 255 {
		t.Errorf("statfs: %+v", s)
	}
	if _, err := root.Walk(ctx, "d", "nothing"); err != unix.ENOENT {
		t.Errorf("walk to nothing: %v", err)
	}
	if err := must(root.Walk(ctx, "d"))(t).Remove(ctx); err != unix.ENOTEMPTY {
		t.Errorf("rmdir: %v", err)
	}
	for i := range 300 { // several answers
		check(t, os.WriteFile(fmt.Sprintf("%s/d/%0200d", dir, i), nil, 0o644))
	}
	list := must(d.Walk(ctx))(t)
	check(t, list.Open(ctx, os.O_RDONLY|unix.O_DIRECTORY))
	var names []string
	for offset := uint64(0); ; {
		entries := must(list.Readdir(ctx, offset))(t)
		if len(entries) == 0 {
			break
		}
		for _, e := range entries {
			names, offset = append(names, e.Name), e.Offset
		}
	}
	check(t, list.Close(ctx))
	for _, want := range []string{".", "..", "hard", "moved"} {
		if !slices.Contains(names, want) {
			t.Errorf("%q is not listed", want)
		}
	}
	if len(names) != 304 {
		t.Errorf("%d names of 304", len(names))
	}
	check(t, must(d.Walk(ctx, "hard"))(t).Remove(ctx))
	check(t, file.Remove(ctx))
	check(t, link.Remove(ctx))
	left, err := os.ReadDir(dir)
	if err != nil || len(left) != 1 || left[0].Name() != "d" {
		t.Errorf("left are %v, %v", left, err)
	}
}

// TestDiodClients: diod's own programs work with our server.
func TestDiodClients(t *testing.T) {
	dir := t.TempDir()
	fs, err := New(dir, Config{})
	check(t, err)
	defer fs.Close()
	address := filepath.Join(t.TempDir(), "9p")
	l, err := net.Listen("unix", address)
	check(t, err)
	ctx, cancel := context.WithTimeout(t.Context(), diodWait)
	defer cancel()
	var served sync.WaitGroup
	served.Go(func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return // closed
			}
			served.Go(func() {
				if err := p9.Serve(ctx, conn, fs, p9.Config{}); err != nil {
					t.Errorf("serve: %v", err)
				}
			})
		}
	})
	defer served.Wait()
	defer l.Close()
	run := func(argv ...string) string {
		t.Helper()
		var out, errs bytes.Buffer
		cmd := exec.CommandContext(ctx, "/usr/sbin/"+argv[0], append([]string{"--server=" + address, "--aname=/"}, argv[1:]...)...)
		cmd.Stdout, cmd.Stderr = &out, &errs
		if err := cmd.Run(); err != nil {
			t.Errorf("%q: %v: %s", argv, err, errs.Bytes())
		}
		return out.String()
	}
	data := bytes.Repeat([]byte("0123456789abcdef"), 40_000) // more than diod's msize
	check(t, os.Mkdir(dir+"/sub", 0o750))
	check(t, os.WriteFile(dir+"/sub/file", data, 0o640))
	var want []string
	for i := range 500 {
		name := fmt.Sprintf("%0200d", i)
		want = append(want, name)
		check(t, os.WriteFile(dir+"/sub/"+name, nil, 0o644))
	}
	if got := run("diodcat", "sub/file"); got != string(data) {
		t.Errorf("diodcat: %d bytes of %d", len(got), len(data))
	}
	names := strings.Fields(run("diodls", "sub"))
	slices.Sort(names)
	if want = append(want, "file"); !slices.Equal(names, want) {
		t.Errorf("diodls: %d names of %d: %.300q", len(names), len(want), names)
	}
	if long := run("diodls", "-l", "sub"); !strings.Contains(long, fmt.Sprint(len(data))) || !strings.Contains(long, "-rw-r-----") {
		t.Errorf("diodls --long: %.300q", long)
	}
	err = exec.CommandContext(ctx, "/usr/sbin/diodcat", "--server="+address, "--aname=/", "nothing").Run()
	if exit, ok := err.(*exec.ExitError); !ok || exit.ExitCode() < 1 {
		t.Errorf("diodcat of nothing: %v", err)
	}
}
