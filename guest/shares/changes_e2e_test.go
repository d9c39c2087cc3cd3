//go:build e2e

package shares

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
	"time"

	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"

	"github.com/wsl2/wsl2/internal/fusefs"
	"github.com/wsl2/wsl2/internal/p9/localfs"
	"github.com/wsl2/wsl2/internal/p9/replay"
	"github.com/wsl2/wsl2/internal/wire"
)

func check(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// TestReplay: what is replayed in a mount, this machine's kernel tells a watch there as it would have
// told of the change, also of a mount that is read-only at its place; and the tree stays what it is.
func TestReplay(t *testing.T) {
	for _, timeout := range []time.Duration{0, time.Hour} {
		t.Run(timeout.String(), func(t *testing.T) { testReplay(t, timeout) })
	}
}

// testReplay is TestReplay of a mount that keeps names and attributes, which it then has seen before they are replayed.
func testReplay(t *testing.T, timeout time.Duration) {
	tree, dir := t.TempDir(), t.TempDir()
	check(t, os.MkdirAll(tree+"/d/sub", 0o755))
	local, err := localfs.New(tree, localfs.Config{Untrusted: true})
	check(t, err)
	defer local.Close()
	root, err := local.Attach("", "", 0)
	check(t, err)
	stage := new(replay.Stage)
	served := fusefs.New(root, fusefs.Config{Timeout: timeout, Replay: stage})
	o := fusefs.Options()
	o.DirectMount, o.FsName, o.Name, o.AllowOther, o.Options = true, "test", "wsl2", true, []string{"default_permissions"}
	server, err := fuse.NewServer(served.Raw(), dir, o)
	check(t, err)
	ended := make(chan struct{})
	go func() { server.Serve(); close(ended) }()
	check(t, server.WaitMount())
	defer func() {
		check(t, unix.Unmount(dir, unix.MNT_DETACH))
		<-ended
		served.Close()
	}()
	check(t, unix.Mount("", dir, "", unix.MS_REMOUNT|unix.MS_BIND|unix.MS_RDONLY|unix.MS_NOSUID|unix.MS_NODEV, ""))
	var st unix.Stat_t
	check(t, unix.Stat(dir, &st))
	r := &replayer{guest: dir, dev: st.Dev}
	events, watch := watchTree(t, dir+"/d")

	id := func(name string) uint64 {
		var st unix.Stat_t
		check(t, unix.Stat(filepath.Join(tree, name), &st))
		return st.Ino
	}
	write := func(name string) { check(t, os.WriteFile(filepath.Join(tree, name), []byte("text"), 0o644)) }
	for _, c := range []struct {
		change replay.Change
		before func()
		events string
		self   string // of a watch on this file
	}{
		{replay.Change{Kind: replay.Created, Name: "f", Mode: unix.S_IFREG}, func() { write("d/f") }, "create f\n", ""},
		{replay.Change{Kind: replay.Modified, Name: "f"}, nil, "modify f\n", ""},
		{replay.Change{Kind: replay.Attributes, Name: "f"}, nil, "attrib f\nattrib\n", "f"},
		{replay.Change{Kind: replay.Written, Name: "f"}, nil, "written f\nwritten\n", ""},
		{replay.Change{Kind: replay.Created, Name: "l", Mode: unix.S_IFLNK}, func() { check(t, os.Symlink("f", tree+"/d/l")) }, "create l\n", ""},
		{replay.Change{Kind: replay.Created, Name: "p", Mode: unix.S_IFIFO}, func() { check(t, unix.Mkfifo(tree+"/d/p", 0o600)) }, "create p\n", ""},
		{replay.Change{Kind: replay.Created, Name: "n", Mode: unix.S_IFDIR}, func() { check(t, os.Mkdir(tree+"/d/n", 0o700)) }, "create n\n", ""},
		{replay.Change{Kind: replay.Renamed, Name: "f", NewName: "g"}, func() { check(t, os.Rename(tree+"/d/f", tree+"/d/g")) }, "from f\nto g\nmoved\n", "f"},
		{replay.Change{Kind: replay.Renamed, Name: "s~", NewName: "g"}, func() { write("d/s~"); check(t, os.Rename(tree+"/d/s~", tree+"/d/g")) }, "from s~\nto g\nattrib\ndeleted\n", "g"},
		{replay.Change{Kind: replay.Removed, Name: "g", Mode: unix.S_IFREG}, func() { check(t, os.Remove(tree+"/d/g")) }, "attrib\ndeleted\ndelete g\n", "g"},
		{replay.Change{Kind: replay.Removed, Name: "n", Mode: unix.S_IFDIR}, func() { check(t, os.Remove(tree+"/d/n")) }, "deleted\ndelete n\n", "n"},
		{replay.Change{Kind: replay.Removed, Name: "brief", Mode: unix.S_IFREG}, nil, "delete brief\n", ""}, // of it nothing was seen
	} {
		// What a watch is about has been looked at, mostly.
		os.ReadFile(dir + "/d/" + c.change.Name) //nolint:errcheck // it may be a directory, or not be there yet
		if c.self != "" {
			watch(dir + "/d/" + c.self)
		}
		if c.before != nil {
			c.before()
		}
		if timeout > 0 {
			os.Stat(dir + "/d/" + c.change.Name)    //nolint:errcheck // it may be gone
			os.Stat(dir + "/d/" + c.change.NewName) //nolint:errcheck // likewise
		}
		c.change.Dir = id("d")
		m := &wire.ShareChange{Kind: uint8(c.change.Kind), Mode: c.change.Mode, Dir: "d", Name: c.change.Name, NewName: c.change.NewName}
		if c.change.Kind == replay.Renamed {
			c.change.NewDir, m.NewDir = id("d"), "d"
			d, err := root.Walk("d")
			check(t, err)
			c.change.File, err = d.Walk(c.change.NewName)
			d.Close()
			check(t, err)
		}
		events() // what the looking and making has raised, of which nothing should be here
		before := entries(t, tree)
		stage.Set(&c.change)
		did := make(chan error, 1)
		go func() {
			runtime.LockOSThread() // it ends with the goroutine
			err := become(replay.UID)
			if err == nil {
				err = r.do(m)
			}
			did <- err
		}()
		err := <-did
		stage.Set(nil)
		if c.change.File != nil {
			c.change.File.Close()
		}
		if got := events(); err != nil || got != c.events {
			t.Errorf("%+v: %v, told %q, want %q", c.change, err, got, c.events)
		}
		if after := entries(t, tree); after != before {
			t.Errorf("%+v: the tree is\n%s\nwas\n%s", c.change, after, before)
		}
		if now := entries(t, dir); now != before {
			t.Errorf("%+v: in the mount is\n%s\nin the tree\n%s", c.change, now, before)
		}
	}
	// What it was not told of the kernel finds when it has forgotten what it has kept.
	write("d/untold")
	if out, err := os.ReadFile(dir + "/d/untold"); err != nil || string(out) != "text" {
		t.Fatalf("%q, %v", out, err)
	}
	check(t, os.Remove(tree+"/d/untold"))
	check(t, r.do(&wire.ShareChange{Kind: uint8(replay.Forget)}))
	if _, err := os.Stat(dir + "/d/untold"); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("after the kernel has forgotten it: %v", err)
	}
	// In another mount at its place nothing is done.
	check(t, unix.Mount("tmpfs", dir, "tmpfs", 0, ""))
	defer unix.Unmount(dir, 0) //nolint:errcheck // it is a temporary directory's
	check(t, os.MkdirAll(dir+"/d/n", 0o755))
	if err := r.do(&wire.ShareChange{Kind: uint8(replay.Removed), Dir: "d", Name: "n", Mode: unix.S_IFDIR}); err != unix.ESTALE {
		t.Errorf("over another mount: %v", err)
	}
	if _, err := os.Stat(dir + "/d/n"); err != nil {
		t.Error(err)
	}
}

// entries are what lies in a tree.
func entries(t *testing.T, dir string) (list string) {
	t.Helper()
	check(t, filepath.WalkDir(dir, func(path string, d os.DirEntry, err error) error {
		if err != nil {
			return err
		}
		var st unix.Stat_t
		if err := unix.Lstat(path, &st); err != nil {
			return err
		}
		rel, _ := filepath.Rel(dir, path)
		list += fmt.Sprintln(rel, st.Ino, st.Mode, st.Size, st.Mtim, st.Ctim, st.Nlink)
		return nil
	}))
	return list
}

// watchTree watches a directory, and what else watch is called with, of which an event has no name; events tells those since it was called last.
func watchTree(t *testing.T, dir string) (events func() string, watch func(path string)) {
	t.Helper()
	fd, err := unix.InotifyInit1(unix.IN_CLOEXEC | unix.IN_NONBLOCK)
	check(t, err)
	t.Cleanup(func() { unix.Close(fd) })
	names := []struct {
		mask uint32
		name string
	}{{unix.IN_CREATE, "create"}, {unix.IN_DELETE, "delete"}, {unix.IN_MODIFY, "modify"}, {unix.IN_ATTRIB, "attrib"},
		{unix.IN_CLOSE_WRITE, "written"}, {unix.IN_MOVED_FROM, "from"}, {unix.IN_MOVED_TO, "to"}, {unix.IN_DELETE_SELF, "deleted"}, {unix.IN_MOVE_SELF, "moved"}}
	mask := uint32(0)
	for _, n := range names {
		mask |= n.mask
	}
	watch = func(path string) {
		_, err := unix.InotifyAddWatch(fd, path, mask)
		check(t, err)
	}
	watch(dir)
	return func() (told string) {
		buf := make([]byte, 64<<10)
		n, err := unix.Read(fd, buf) // events are there when the call that raised them has returned
		if err == unix.EAGAIN {
			return ""
		}
		check(t, err)
		for b := buf[:n]; len(b) >= unix.SizeofInotifyEvent; {
			size := binary.NativeEndian.Uint32(b[12:])
			name, _, _ := bytes.Cut(b[unix.SizeofInotifyEvent:unix.SizeofInotifyEvent+size], []byte{0})
			for _, n := range names {
				if binary.NativeEndian.Uint32(b[4:])&n.mask != 0 {
					told += strings.TrimSuffix(n.name+" "+string(name), " ") + "\n"
				}
			}
			b = b[unix.SizeofInotifyEvent+size:]
		}
		return told
	}, watch
}
