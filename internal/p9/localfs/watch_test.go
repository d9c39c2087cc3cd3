package localfs

import (
	"context"
	"os"
	"os/exec"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/wsl2/wsl2/internal/p9"
	"github.com/wsl2/wsl2/internal/p9/replay"
)

var kinds = map[replay.Kind]string{replay.Created: "created", replay.Removed: "removed", replay.Renamed: "renamed",
	replay.Modified: "modified", replay.Attributes: "attributes", replay.Written: "written"}

// TestWatch: what others change where a client has looked is told, with its path; what the client
// changes is not, nor what happens where it has not looked.
func TestWatch(t *testing.T) {
	dir := t.TempDir()
	for _, name := range []string{"known/below", "unknown"} {
		check(t, os.MkdirAll(dir+"/"+name, 0o755))
	}
	fs := must(New(dir, Config{}))(t)
	defer fs.Close()
	full := 0
	w := must(fs.Watch(3, func() { full++ }))(t)
	ctx, cancel := context.WithCancel(t.Context())
	told, ended := make(chan string, 1000), make(chan error, 1)
	go func() {
		ended <- w.Run(ctx, func(c *replay.Change) {
			path, err := w.Path(c.Dir)
			line := kinds[c.Kind] + " " + path + "/" + c.Name
			if c.Kind == replay.Renamed && err == nil {
				path, err = w.Path(c.NewDir)
				line += " " + path + "/" + c.NewName
			}
			if err != nil {
				line += ": " + err.Error()
			}
			told <- line
		}, func() { t.Error("changes were lost") })
	}()
	defer func() {
		cancel()
		check(t, <-ended)
	}()
	root := connect(t, fs, p9.Config{})
	must(root.Walk(t.Context(), "known", "below"))(t)
	others := func(script string, lines ...string) {
		t.Helper()
		cmd := exec.Command("sh", "-c", script)
		cmd.Dir = dir
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Fatalf("%v: %s", err, out)
		}
		for _, want := range lines {
			for got := ""; got != want; {
				select {
				case got = <-told:
					if strings.Contains(got, "unknown") || strings.HasSuffix(got, "/own") {
						t.Errorf("told: %s", got)
					}
				case <-time.After(time.Minute):
					t.Fatalf("%s: not told %q", script, want)
				}
			}
		}
	}
	others("echo x >known/f", "created known/f")
	others("echo y >>known/f", "modified known/f", "written known/f")
	others("chmod 600 known/f", "attributes known/f")
	own := create(t, must(root.Walk(t.Context(), "known"))(t), "own", "text")
	check(t, own.SetAttr(t.Context(), p9.SetAttr{Valid: p9.SetMode, Mode: 0o600}))
	check(t, own.Close(t.Context()))
	others("touch unknown/f; mv known/f known/below/g", "renamed known/f known/below/g")
	others("mv known/below/g unknown", "removed known/below/g")
	others("mv unknown/g known", "created known/g", "written known/g")
	others("mkdir known/dir; rm -r known/dir known/g", "removed known/g")
	others("mv known moved; touch moved/h", "created moved/h")
	// The two that were looked at last are watched, and the root.
	must(root.Walk(t.Context(), "unknown"))(t)
	must(root.Walk(t.Context(), "moved", "below"))(t)
	others("touch unknown/i moved/j moved/below/k", "created moved/below/k")
	others("touch root", "created ./root")
	others("chmod 700 .", "attributes ./.")
	if full == 0 {
		t.Error("it is not said that there are too many")
	}
}

// TestForgotten: a directory is watched as long as a client has a node of it, and holds none but itself.
func TestForgotten(t *testing.T) {
	dir := t.TempDir()
	check(t, os.MkdirAll(dir+"/a/b", 0o755))
	fs := must(New(dir, Config{}))(t)
	defer fs.Close()
	w := must(fs.Watch(2, func() {}))(t)
	defer w.close()
	watching := func(dirs ...p9.Node) {
		t.Helper()
		w.mu.Lock()
		defer w.mu.Unlock()
		if len(w.dirs) != len(dirs) || len(w.byID) != len(dirs) || w.order.Len() != len(dirs) {
			t.Errorf("%d directories are watched, want %d", len(w.dirs), len(dirs))
		}
		for _, n := range dirs {
			if w.dirs[n.QID().Path] == nil {
				t.Errorf("%v is not watched", n.QID())
			}
		}
	}
	a := must(fs.root.Walk("a"))(t)
	watching(fs.root, a)
	b := must(a.Walk("b"))(t)
	a.Close() // b has it
	watching(fs.root, b)
	must(a.Walk("b"))(t).Close() // which it is looked up once more by
	watching(fs.root, b)
	again := must(fs.root.Walk("a"))(t)
	watching(fs.root, again)
	must(again.Walk("b"))(t).Close() // b was evicted, and is still known
	watching(fs.root, b)
	again.Close()
	b.Close()
	watching(fs.root)
	if len(w.nodes) != 0 {
		t.Errorf("nodes are left: %v", w.nodes)
	}
}

// TestCovers: a node is covered where its directory is watched, and a directory where it is itself.
func TestCovers(t *testing.T) {
	dir := t.TempDir()
	check(t, os.MkdirAll(dir+"/a/b", 0o755))
	check(t, os.WriteFile(dir+"/a/f", nil, 0o644))
	fs := must(New(dir, Config{}))(t)
	defer fs.Close()
	w := must(fs.Watch(2, func() {}))(t)
	a := must(fs.root.Walk("a"))(t)
	defer a.Close()
	f := must(a.Walk("f"))(t)
	defer f.Close()
	covered := func(what string, want map[p9.Node]bool) {
		t.Helper()
		for n, want := range want {
			if w.Covers(n) != want {
				t.Errorf("%s: %v is covered: %v", what, n.QID(), !want)
			}
		}
	}
	covered("with the root and a", map[p9.Node]bool{fs.root: true, a: true, f: true})
	b := must(a.Walk("b"))(t) // in place of a
	defer b.Close()
	covered("with the root and b", map[p9.Node]bool{fs.root: true, a: false, b: false, f: false})
	w.close()
	covered("closed", map[p9.Node]bool{fs.root: false, a: false, b: false, f: false})
}

// TestMerged: what the kernel has merged before it was read ends with what is there.
func TestMerged(t *testing.T) {
	dir := t.TempDir()
	fs := must(New(dir, Config{}))(t)
	defer fs.Close()
	w := must(fs.Watch(2, func() {}))(t)
	defer w.close()
	for _, name := range []string{"log", "log.1", "remade"} {
		check(t, os.WriteFile(dir+"/"+name, nil, 0o644))
	}
	id := must(identify(fs.root.fd))(t)
	for _, c := range []struct {
		event event
		told  string
	}{
		{event{mask: unix.FAN_CREATE | unix.FAN_DELETE, dir: id, name: "gone"}, "removed gone"},
		{event{mask: unix.FAN_CREATE | unix.FAN_DELETE, dir: id, name: "remade"}, "removed remade, created remade"},
		{event{mask: unix.FAN_CREATE | unix.FAN_CLOSE_WRITE, dir: id, name: "gone"}, ""},
		{event{mask: unix.FAN_RENAME, dir: id, name: "gone", newDir: id, newName: "log"}, "renamed gone"},
		{event{mask: unix.FAN_RENAME, dir: id, name: "log", newDir: id, newName: "log.1"}, "renamed log, created log"},
		{event{mask: unix.FAN_RENAME, dir: id, name: "log", newDir: id, newName: "gone"}, "removed log, created log"},
		{event{mask: unix.FAN_RENAME, name: "x", newDir: id, newName: "log"}, "created log, written log"},
	} {
		var told []string
		w.changes(&c.event, func(c *replay.Change) { told = append(told, kinds[c.Kind]+" "+c.Name) })
		if got := strings.Join(told, ", "); got != c.told {
			t.Errorf("%+v: %q, want %q", c.event, got, c.told)
		}
	}
}

// FuzzEvent: no bytes make the parser leave them.
func FuzzEvent(f *testing.F) {
	f.Add([]byte("\x38\x00\x00\x00\x03\x00\x18\x00\x02\x01\x00\x00\x00\x00\x00\x00\xff\xff\xff\xff\x00\x00\x00\x00" +
		"\x02\x00\x20\x00\xd3\xea\xea\xc4\x17\x91\x33\x61\x08\x00\x00\x00\x01\x00\x00\x00\x2c\xa0\x98\x00\x0d\x07\x1e\x8ax\x00\x00\x00"))
	f.Add([]byte{24, 0, 0, 0, unix.FANOTIFY_METADATA_VERSION, 0, 24, 0, 23: 0})
	f.Fuzz(func(t *testing.T, b []byte) {
		for len(b) > 0 {
			var e event
			rest, err := e.parse(b)
			if err != nil {
				return
			}
			if len(rest) >= len(b) {
				t.Fatal("it does not end")
			}
			b = rest
		}
	})
}
