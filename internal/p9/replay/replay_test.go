package replay_test

import (
	"errors"
	"net"
	"os"
	"os/exec"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/wsl2/wsl2/internal/p9"
	"github.com/wsl2/wsl2/internal/p9/localfs"
	"github.com/wsl2/wsl2/internal/p9/replay"
)

func check(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// serve serves a directory with a stage, and returns its root for an ordinary user, and for replay.UID.
func serve(t *testing.T) (dir string, stage *replay.Stage, user, init *p9.File) {
	t.Helper()
	dir, stage = t.TempDir(), new(replay.Stage)
	fs, err := localfs.New(dir, localfs.Config{Untrusted: true})
	check(t, err)
	ours, theirs := net.Pipe()
	served := make(chan error, 1)
	go func() { served <- p9.Serve(t.Context(), theirs, replay.FS(fs, stage), p9.Config{Logf: t.Errorf}) }()
	c, err := p9.NewClient(t.Context(), ours, 0)
	check(t, err)
	t.Cleanup(func() {
		c.Close()
		<-served
		fs.Close()
	})
	user, err = c.Attach(t.Context(), "", "", 1000)
	check(t, err)
	init, err = c.Attach(t.Context(), "", "", replay.UID)
	check(t, err)
	return dir, stage, user, init
}

// list is what lies in a directory, with all that a client could change.
func list(t *testing.T, dir string) string {
	t.Helper()
	out, err := exec.Command("sh", "-c", "cd '"+dir+"' && find . -printf '%p %i %m %u %n %s %T@ %C@ %l\n' | sort && cat $(find . -type f)").CombinedOutput()
	if err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	return string(out)
}

// TestStage: the one who replays a change sees the tree as it was before it, until he has made
// it; nobody else does.
func TestStage(t *testing.T) {
	ctx := t.Context()
	dir, stage, user, init := serve(t)
	check(t, os.Mkdir(dir+"/sub", 0o755))
	for _, name := range []string{"made", "after", "sub/after"} {
		check(t, os.WriteFile(dir+"/"+name, []byte("x"), 0o644))
	}
	root := user.QID().Path
	walk := func(f *p9.File, names ...string) error {
		found, err := f.Walk(ctx, names...)
		if err == nil {
			err = found.Close(ctx)
		}
		return err
	}
	see := func(who string, f *p9.File, there bool, names ...string) {
		t.Helper()
		if err := walk(f, names...); (err == nil) != there || err != nil && !errors.Is(err, unix.ENOENT) {
			t.Errorf("%s sees %q: %v, want %v", who, names, err, there)
		}
	}

	stage.Set(&replay.Change{Kind: replay.Created, Dir: root, Name: "made", Mode: unix.S_IFREG})
	see("init", init, false, "made")
	see("init", init, true, "after")
	see("the user", user, true, "made")
	if q, err := init.Mknod(ctx, "made", unix.S_IFREG|0o600, 0, 0, 0); err != nil || q.Type != p9.QTFile {
		t.Errorf("%+v, %v", q, err)
	}
	see("init", init, true, "made")

	stage.Set(&replay.Change{Kind: replay.Removed, Dir: root, Name: "gone", Mode: unix.S_IFDIR})
	see("init", init, true, "gone")
	see("the user", user, false, "gone")
	ghost, err := init.Walk(ctx, "gone")
	check(t, err)
	if a, err := ghost.GetAttr(ctx, p9.AttrBasic); err != nil || a.Mode&unix.S_IFMT != unix.S_IFDIR || a.QID.Type != p9.QTDir {
		t.Errorf("%+v, %v", a, err)
	}
	if err := walk(ghost, "below"); !errors.Is(err, unix.ENOENT) {
		t.Error(err)
	}
	check(t, init.UnlinkAt(ctx, "gone", p9.UnlinkDir))
	see("init", init, false, "gone")

	sub, err := user.Walk(ctx, "sub")
	check(t, err)
	local, err := localfs.New(dir, localfs.Config{})
	check(t, err)
	defer local.Close()
	at, err := local.Attach("", "", 0)
	check(t, err)
	defer at.Close()
	file, err := at.Walk("after")
	check(t, err)
	defer file.Close()
	stage.Set(&replay.Change{Kind: replay.Renamed, Dir: sub.QID().Path, Name: "before", NewDir: root, NewName: "after", File: file, Mode: unix.S_IFREG})
	see("init", init, true, "sub", "before")
	see("init", init, false, "after")
	see("init", init, true, "sub", "after")
	see("the user", user, false, "sub", "before")
	see("the user", user, true, "after")
	was, err := init.Walk(ctx, "sub", "before")
	check(t, err)
	if was.QID().Path != file.QID().Path {
		t.Error("by its old name it is another file")
	}
	from, err := init.Walk(ctx, "sub")
	check(t, err)
	check(t, from.RenameAt(ctx, "before", init, "after"))
	see("init", init, false, "sub", "before")
	see("init", init, true, "after")
	stage.Set(nil)
	see("init", init, false, "gone")
}

// TestStale: what the client makes of its own knowledge, without having been shown the change, fails; so does all
// that is not the change, and the change a second time.
func TestStale(t *testing.T) {
	ctx := t.Context()
	dir, stage, user, init := serve(t)
	check(t, os.MkdirAll(dir+"/new/sub", 0o755))
	root := user.QID().Path
	local, err := localfs.New(dir, localfs.Config{})
	check(t, err)
	defer local.Close()
	at, err := local.Attach("", "", 0)
	check(t, err)
	defer at.Close()
	file, err := at.Walk("new")
	check(t, err)
	defer file.Close()
	sub, err := init.Walk(ctx, "new")
	check(t, err)
	see := func(name string) {
		if f, err := init.Walk(ctx, name); err == nil {
			check(t, f.Close(ctx))
		}
	}
	stale := func(what string, err error) {
		t.Helper()
		if !errors.Is(err, unix.ESTALE) {
			t.Errorf("%s: %v", what, err)
		}
	}
	made := func() error { _, err := init.Mkdir(ctx, "new", 0o755, 0); return err }
	removed := func() error { return init.UnlinkAt(ctx, "sub", p9.UnlinkDir) }
	renamed := func() error { return init.RenameAt(ctx, "old", init, "new") }
	stale("made, without a change", made())
	stale("removed, without a change", removed())
	stale("renamed, without a change", renamed())

	stage.Set(&replay.Change{Kind: replay.Removed, Dir: root, Name: "sub", Mode: unix.S_IFDIR})
	stale("removed unseen", removed())
	see("sub")
	stale("removed from elsewhere", sub.UnlinkAt(ctx, "sub", p9.UnlinkDir))
	stale("another one removed", init.UnlinkAt(ctx, "new", p9.UnlinkDir))
	stale("made, of what is removed", made())
	check(t, removed())
	stale("removed twice", removed())

	stage.Set(&replay.Change{Kind: replay.Renamed, Dir: root, Name: "old", NewDir: root, NewName: "new", File: file, Mode: unix.S_IFDIR})
	stale("renamed unseen", renamed())
	see("old")
	stale("renamed to one that is there", renamed())
	see("new")
	stale("renamed elsewhere", init.RenameAt(ctx, "old", sub, "new"))
	check(t, renamed())

	stage.Set(&replay.Change{Kind: replay.Created, Dir: root, Name: "new", Mode: unix.S_IFDIR})
	check(t, made())
	stale("made twice", made())
}

// TestNothingChanges: whatever is asked for as replay.UID, with whatever on the stage, the tree stays
// what it is, also for what is of both.
func TestNothingChanges(t *testing.T) {
	ctx := t.Context()
	dir, stage, user, init := serve(t)
	check(t, os.Mkdir(dir+"/d", 0o755))
	check(t, os.WriteFile(dir+"/f", []byte("text"), 0o644))
	before := list(t, dir)
	root := user.QID().Path
	for _, c := range []*replay.Change{nil, {Kind: replay.Created, Dir: root, Name: "f"}, {Kind: replay.Removed, Dir: root, Name: "f", Mode: unix.S_IFREG},
		{Kind: replay.Renamed, Dir: root, Name: "f", NewDir: root, NewName: "d"}} {
		try := map[string]func(f *p9.File) error{
			"mkdir":   func(*p9.File) error { _, err := init.Mkdir(ctx, "x", 0o700, 0); return err },
			"mknod":   func(*p9.File) error { _, err := init.Mknod(ctx, "x", unix.S_IFREG|0o700, 0, 0, 0); return err },
			"symlink": func(*p9.File) error { _, err := init.Symlink(ctx, "x", "f", 0); return err },
			"unlink":  func(*p9.File) error { return init.UnlinkAt(ctx, "f", 0) },
			"rmdir":   func(*p9.File) error { return init.UnlinkAt(ctx, "d", p9.UnlinkDir) },
			"rename":  func(*p9.File) error { return init.RenameAt(ctx, "f", init, "g") },
			"from":    func(*p9.File) error { return user.RenameAt(ctx, "f", init, "g") },
			"to":      func(*p9.File) error { return init.RenameAt(ctx, "f", user, "g") },
			"link":    func(f *p9.File) error { return user.Link(ctx, "g", f) },
			"links":   func(f *p9.File) error { return init.Link(ctx, "g", f) },
			"setattr": func(f *p9.File) error {
				return f.SetAttr(ctx, p9.SetAttr{Valid: p9.SetMode | p9.SetSize | p9.SetMtime | p9.SetUID, Mode: 0o777, UID: 1})
			},
			"xattr":  func(f *p9.File) error { return f.SetXattr(ctx, "user.x", []byte("y"), 0) },
			"create": func(*p9.File) error { n, _ := init.Walk(ctx); return n.Create(ctx, "x", os.O_RDWR, 0o600, 0) },
			"move":   func(f *p9.File) error { return f.Rename(ctx, init, "g") },
			"remove": func(f *p9.File) error { return f.Remove(ctx) },
			"write": func(f *p9.File) error {
				if err := f.Open(ctx, os.O_RDWR|os.O_TRUNC|os.O_APPEND); err != nil {
					return err
				}
				_, err := f.WriteAt(ctx, []byte("other"), 0)
				return errors.Join(err, f.SetAttr(ctx, p9.SetAttr{Valid: p9.SetSize}))
			},
		}
		for what, do := range try {
			stage.Set(nil)
			f, err := init.Walk(ctx, "f")
			check(t, err)
			stage.Set(c)
			do(f) //nolint:errcheck // what is refused and what seems to be done is all the same here
			if after := list(t, dir); after != before {
				t.Fatalf("%s with %+v:\n%s\nwas\n%s", what, c, after, before)
			}
		}
	}
}
