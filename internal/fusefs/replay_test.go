package fusefs

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"os"
	"reflect"
	"testing"
	"time"

	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"

	"github.com/wsl2/wsl2/internal/p9"
	"github.com/wsl2/wsl2/internal/p9/localfs"
	"github.com/wsl2/wsl2/internal/p9/replay"
)

// TestReplayedTime: what the kernel is told of a replayed change of times is no file's time, so that it drops
// its pages when it next looks.
func TestReplayedTime(t *testing.T) {
	k, dir := serve(t, Config{Replay: new(replay.Stage)})
	k.init(t)
	if err := os.WriteFile(dir+"/f", []byte("text"), 0o644); err != nil {
		t.Fatal(err)
	}
	file := k.lookup(t, "f")
	times := func(opcode uint32, body []byte) []byte {
		errno, b := k.do(t, opcode, file, body)
		if errno != 0 {
			t.Fatal(errno)
		}
		const mtime, mtimensec = 16 + 32, 16 + 52
		return join(b[mtime:mtime+8], b[mtimensec:mtimensec+4])
	}
	before := times(opGetattr, make([]byte, 16))
	k.uid = replay.UID
	if told := times(opSetattr, join(u32(fuse.FATTR_MTIME|fuse.FATTR_MTIME_NOW), make([]byte, 84))); bytes.Equal(told, before) {
		t.Error("the kernel is told the file's own time")
	}
	if after := times(opGetattr, make([]byte, 16)); !bytes.Equal(after, before) {
		t.Errorf("%x, was %x", after, before)
	}
}

// TestReplayedContent: what the kernel has read of a file it may not keep for what it is told of a replayed change, whether or not
// that shows in the file's size and times.
func TestReplayedContent(t *testing.T) {
	k, dir := serve(t, Config{Timeout: time.Millisecond, Lease: func(p9.Node) time.Duration { return time.Hour }, Replay: new(replay.Stage)})
	k.init(t)
	if err := os.WriteFile(dir+"/f", []byte("text"), 0o644); err != nil {
		t.Fatal(err)
	}
	file := k.lookup(t, "f")
	kept := func(what string, want bool) {
		t.Helper()
		errno, b := k.do(t, opOpen, file, u32(unix.O_RDONLY, 0))
		if errno != 0 {
			t.Fatalf("%s: %v", what, errno)
		}
		if flags := binary.LittleEndian.Uint32(b[8:]); flags&fuse.FOPEN_KEEP_CACHE != 0 != want {
			t.Errorf("%s: flags %#x", what, flags)
		}
	}
	replayed := func() {
		t.Helper()
		k.uid = replay.UID
		errno, _ := k.do(t, opSetattr, file, join(u32(fuse.FATTR_MTIME|fuse.FATTR_MTIME_NOW), make([]byte, 84)))
		k.uid = 0
		if errno != 0 {
			t.Fatal(errno)
		}
	}
	kept("first", false)
	kept("again", true)
	if err := os.WriteFile(dir+"/f", []byte("longer"), 0o644); err != nil {
		t.Fatal(err)
	}
	replayed()
	kept("changed", false)
	kept("changed, again", true)
	replayed() // of the same size, within a tick
	kept("changed unseen", false)
	kept("changed unseen, again", true)
}

// TestFoundBeforeReplay: what somebody has looked up before its making is replayed is looked up again by who does that,
// and is nothing to him.
func TestFoundBeforeReplay(t *testing.T) {
	stage := new(replay.Stage)
	k, dir := serve(t, Config{Timeout: time.Hour, Replay: stage})
	k.init(t)
	if err := os.WriteFile(dir+"/f", []byte("text"), 0o644); err != nil {
		t.Fatal(err)
	}
	var st unix.Stat_t
	if err := unix.Stat(dir, &st); err != nil {
		t.Fatal(err)
	}
	root, file := st.Ino, k.lookup(t, "f")
	getattr := func(uid uint32, node uint64) unix.Errno {
		k.uid = uid
		errno, _ := k.do(t, opGetattr, node, make([]byte, 16))
		return errno
	}
	for i, c := range []replay.Change{{Kind: replay.Created, Dir: root, Name: "f"}, {Kind: replay.Renamed, Dir: root, Name: "e", NewDir: root, NewName: "f"}} {
		stage.Set(&c)
		for node, want := range map[uint64]unix.Errno{file: unix.ESTALE, 1: 0} {
			if errno := getattr(replay.UID, node); errno != want {
				t.Errorf("change %d: node %d: %v, want %v", i, node, errno, want)
			}
			if errno := getattr(0, node); errno != 0 {
				t.Errorf("change %d: node %d, for another: %v", i, node, errno)
			}
		}
		k.uid = replay.UID
		if errno, _ := k.do(t, opLookup, 1, []byte("f\x00")); errno != unix.ENOENT {
			t.Errorf("change %d: looked up: %v", i, errno)
		}
	}
	stage.Set(nil)
	if errno := getattr(replay.UID, file); errno != 0 {
		t.Errorf("afterwards: %v", errno)
	}
}

// TestAway: what has left a directory that is watched is kept for no lease, by whatever it left, until it is looked up where it is
// now; then as what is there.
func TestAway(t *testing.T) {
	const timeout, lease = time.Second, time.Hour
	var watched uint64
	stage := new(replay.Stage)
	k, dir := serve(t, Config{Timeout: timeout, Replay: stage, Lease: func(n p9.Node) time.Duration {
		parent := n.Parent()
		defer parent.Close()
		if parent.QID().Path == watched {
			return lease
		}
		return 0
	}})
	k.init(t)
	do := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	for _, sub := range []string{"/in", "/in2", "/out"} {
		do(os.Mkdir(dir+sub, 0o755))
	}
	in, in2, out := k.lookup(t, "in"), k.lookup(t, "in2"), k.lookup(t, "out")
	var st unix.Stat_t
	do(unix.Stat(dir+"/in", &st))
	watched = st.Ino
	lookup := func(node uint64, name string) uint64 {
		t.Helper()
		errno, b := k.do(t, opLookup, node, []byte(name+"\x00"))
		if errno != 0 {
			t.Fatal(errno)
		}
		return binary.LittleEndian.Uint64(b)
	}
	request := func(opcode uint32, node uint64, body []byte) {
		t.Helper()
		if errno, _ := k.do(t, opcode, node, body); errno != 0 {
			t.Fatal(errno)
		}
	}
	rename := func(from, to uint64) { t.Helper(); request(opRename, from, join(u64(to), []byte("f\x00f\x00"))) }
	replayed := func(c replay.Change, make func()) {
		t.Helper()
		stage.Set(&c)
		k.uid = replay.UID
		lookup(in, "f")
		make()
		k.uid = 0
		stage.Set(nil)
	}
	removed := replay.Change{Kind: replay.Removed, Dir: watched, Name: "f", Mode: unix.S_IFREG}
	for _, c := range []struct {
		what  string
		leave func()
	}{
		{"moved by the host", func() {
			do(os.Rename(dir+"/in/f", dir+"/out/f"))
			replayed(removed, func() { request(opUnlink, in, []byte("f\x00")) })
		}},
		{"renamed by the guest", func() { rename(in, out) }},
		{"exchanged by the guest", func() {
			do(os.WriteFile(dir+"/out/f", nil, 0o644))
			lookup(out, "f")
			request(opRename2, out, join(u64(in), u32(unix.RENAME_EXCHANGE, 0), []byte("f\x00f\x00")))
			do(os.Remove(dir + "/in/f"))
		}},
		{"another name is left", func() {
			do(os.Link(dir+"/in/f", dir+"/out/f"))
			request(opUnlink, in, []byte("f\x00"))
		}},
		{"another name is left, by the host", func() {
			do(os.Link(dir+"/in/f", dir+"/out/f"))
			do(os.Remove(dir + "/in/f"))
			replayed(removed, func() { request(opUnlink, in, []byte("f\x00")) })
		}},
		{"another name is left, and was looked up", func() {
			do(os.Link(dir+"/in/f", dir+"/out/f"))
			lookup(out, "f")
			do(os.Remove(dir + "/in/f"))
		}},
		{"another in its place", func() {
			do(os.Link(dir+"/in/f", dir+"/out/f"))
			do(os.WriteFile(dir+"/in2/f", nil, 0o644))
			rename(in2, in)
			do(os.Remove(dir + "/in/f"))
		}},
	} {
		do(os.WriteFile(dir+"/in/f", nil, 0o644))
		f := lookup(in, "f")
		kept := func(when string, want time.Duration) {
			t.Helper()
			errno, b := k.do(t, opGetattr, f, make([]byte, 16))
			if got := time.Duration(binary.LittleEndian.Uint64(b)) * time.Second; errno != 0 || got != want {
				t.Errorf("%s: %s: %v, kept for %v, want %v", c.what, when, errno, got, want)
			}
		}
		kept("at first", lease)
		c.leave()
		kept("now", timeout)
		if found := lookup(out, "f"); found != f {
			t.Fatalf("%s: it is node %d, was %d", c.what, found, f)
		}
		kept("looked up", timeout)
		rename(out, in)
		kept("back", timeout)
		lookup(in, "f")
		kept("back, looked up", lease)
		do(os.Remove(dir + "/in/f"))
	}
}

// TestNothingChanges: whatever method is called as replay.UID, with whatever on the stage and also by what another has opened for
// writing, the tree stays what it is.
func TestNothingChanges(t *testing.T) {
	dir := t.TempDir()
	if err := os.Mkdir(dir+"/d", 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(dir+"/f", []byte("text"), 0o644); err != nil {
		t.Fatal(err)
	}
	if err := unix.Setxattr(dir+"/f", "user.x", []byte("y"), 0); err != nil {
		t.Fatal(err)
	}
	list := func() (text string) {
		for _, name := range []string{"", "/d", "/f"} {
			var st unix.Stat_t
			if err := unix.Lstat(dir+name, &st); err != nil { // what is new changes its directory's time
				return err.Error()
			}
			value := make([]byte, 8)
			unix.Getxattr(dir+name, "user.x", value) //nolint:errcheck // only f has one
			st.Atim = unix.Timespec{}
			text += fmt.Sprintf("%s %+v %q\n", name, st, value)
		}
		return text
	}
	before := list()
	local, err := localfs.New(dir, localfs.Config{Untrusted: true})
	if err != nil {
		t.Fatal(err)
	}
	defer local.Close()
	at, err := local.Attach("", "", 0)
	if err != nil {
		t.Fatal(err)
	}
	stage := new(replay.Stage)
	fs := New(at, Config{Replay: stage})
	defer fs.Close()
	raw := fs.Raw()
	root := at.QID().Path
	id := func(name string) uint64 {
		if name == "" {
			return fuse.FUSE_ROOT_ID
		}
		var out fuse.EntryOut
		if s := fs.lookup(nil, fuse.FUSE_ROOT_ID, name, &out); s != fuse.OK {
			t.Fatal(s)
		}
		return out.NodeId
	}
	methods := reflect.TypeFor[fuse.RawFileSystem]()
	called := map[string]bool{}
	for _, c := range []*replay.Change{nil, {Kind: replay.Created, Dir: root, Name: "f"}, {Kind: replay.Removed, Dir: root, Name: "f", Mode: unix.S_IFREG},
		{Kind: replay.Removed, Dir: root, Name: "d", Mode: unix.S_IFDIR}, {Kind: replay.Renamed, Dir: root, Name: "f", NewDir: root, NewName: "new"}} {
		for i := range methods.NumMethod() {
			m := methods.Method(i)
			if m.Type.NumIn() == 0 || m.Type.In(0).Kind() != reflect.Chan { // what is no request of somebody's
				continue
			}
			for _, names := range [][]string{{"f", "new"}, {"d", "new"}, {"new", "f"}, {"user.x", "user.x"}, {"user.new", "d"}} {
				for _, of := range []string{"", "d", "f"} {
					stage.Set(nil)
					node, file := id(of), id("f")
					header := fuse.InHeader{NodeId: node, Caller: fuse.Caller{Owner: fuse.Owner{Uid: replay.UID}}}
					var opened fuse.OpenOut
					raw.Open(nil, &fuse.OpenIn{InHeader: header, Flags: unix.O_RDWR | unix.O_TRUNC}, &opened)
					if of == "f" {
						fs.release(opened.Fh)
						if s := raw.Open(nil, &fuse.OpenIn{InHeader: fuse.InHeader{NodeId: node}, Flags: unix.O_RDWR}, &opened); s != fuse.OK {
							t.Fatal(s)
						}
					}
					stage.Set(c)
					raw.Lookup(nil, &fuse.InHeader{NodeId: fuse.FUSE_ROOT_ID, Caller: header.Caller}, names[0], new(fuse.EntryOut))
					reflect.ValueOf(raw).MethodByName(m.Name).Call(arguments(m.Type, header, names, file, opened.Fh))
					fs.release(opened.Fh)
					called[m.Name] = true
					if after := list(); after != before {
						t.Fatalf("%s of %q, %q, with %+v:\n%s\nwas\n%s", m.Name, of, names, c, after, before)
					}
				}
			}
		}
	}
	for _, name := range []string{"Create", "Link", "SetXAttr", "RemoveXAttr", "Write", "SetAttr", "Fallocate"} {
		if !called[name] {
			t.Errorf("%s was not called", name)
		}
	}
}

// arguments are those of a method that asks for something, with all that it might need to change the tree.
func arguments(method reflect.Type, header fuse.InHeader, names []string, file, fh uint64) (args []reflect.Value) {
	for i := range method.NumIn() {
		arg := reflect.New(method.In(i)).Elem()
		switch {
		case arg.Kind() == reflect.String:
			arg.SetString(names[0])
			names = names[1:]
		case arg.Type() == reflect.TypeFor[*fuse.InHeader]():
			arg.Set(reflect.ValueOf(&header))
		case arg.Type() == reflect.TypeFor[[]byte]():
			arg.SetBytes([]byte("data"))
		case arg.Kind() == reflect.Pointer:
			arg.Set(reflect.New(arg.Type().Elem()))
			for name, value := range map[string]any{"InHeader": header, "Fh": fh, "Oldnodeid": file, "Newdir": uint64(fuse.FUSE_ROOT_ID),
				"Mode": uint32(unix.S_IFREG | 0o600), "Length": uint64(100), "Size": uint32(4)} {
				field := arg.Elem().FieldByName(name)
				if field.IsValid() && field.Type() == reflect.TypeOf(value) {
					field.Set(reflect.ValueOf(value))
				}
			}
			switch in := arg.Interface().(type) {
			case *fuse.SetAttrIn:
				in.InHeader, in.Valid, in.Size = header, fuse.FATTR_SIZE|fuse.FATTR_MODE|fuse.FATTR_MTIME, 1
			case *fuse.OpenIn:
				in.Flags = unix.O_RDWR | unix.O_TRUNC
			case *fuse.CreateIn:
				in.Flags = unix.O_RDWR
			case *fuse.FallocateIn:
				in.Mode = 0
			}
		}
		args = append(args, arg)
	}
	return args
}

// TestGone: who replays a removal finds what the kernel still knows by the name and is no more, also behind what has taken
// its place; never what is there, nor what is of another kind.
func TestGone(t *testing.T) {
	stage := new(replay.Stage)
	dir := t.TempDir()
	local, err := localfs.New(dir, localfs.Config{})
	if err != nil {
		t.Fatal(err)
	}
	defer local.Close()
	at, err := local.Attach("", "", 0)
	if err != nil {
		t.Fatal(err)
	}
	fs := New(at, Config{Replay: stage})
	defer fs.Close()
	k := &kernel{handle: fs.Handler(t.Logf)}
	k.init(t)
	do := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	root := at.QID().Path
	found := func(what string, c replay.Change, name string, want uint64) {
		t.Helper()
		stage.Set(&c)
		k.uid = replay.UID
		errno, b := k.do(t, opLookup, 1, []byte(name+"\x00"))
		stage.Set(nil)
		k.uid = 0
		got := uint64(0)
		if errno == 0 {
			got = binary.LittleEndian.Uint64(b)
		}
		if errno != 0 && errno != unix.ENOENT || want != 0 && got != want {
			t.Errorf("%s: node %d, %v, want %d", what, got, errno, want)
		}
		for _, known := range []string{"f", "link", "d"} {
			if _, err := os.Lstat(dir + "/" + known); err == nil && got != want && got == k.lookup(t, known) {
				t.Errorf("%s: it is what is there", what)
			}
		}
	}
	removed := replay.Change{Kind: replay.Removed, Dir: root, Name: "f", Mode: unix.S_IFREG}
	do(os.WriteFile(dir+"/f", nil, 0o644))
	do(os.Link(dir+"/f", dir+"/link"))
	first := k.lookup(t, "f")
	do(os.Remove(dir + "/f"))
	found("another name is left", removed, "f", 0)
	do(os.Remove(dir + "/link"))
	found("nothing is left", removed, "f", first)
	do(os.WriteFile(dir+"/f", nil, 0o644))
	second := k.lookup(t, "f")
	found("another in its place", removed, "f", first)
	found("renamed over", replay.Change{Kind: replay.Renamed, Dir: root, Name: "e", NewDir: root, NewName: "f", Mode: unix.S_IFREG}, "f", first)
	found("of another kind", replay.Change{Kind: replay.Removed, Dir: root, Name: "f", Mode: unix.S_IFDIR}, "f", 0)
	do(os.Mkdir(dir+"/d", 0o755))
	d := k.lookup(t, "d")
	found("a directory that is there", replay.Change{Kind: replay.Removed, Dir: root, Name: "d", Mode: unix.S_IFDIR}, "d", 0)
	do(os.Remove(dir + "/d"))
	found("a directory", replay.Change{Kind: replay.Removed, Dir: root, Name: "d", Mode: unix.S_IFDIR}, "d", d)
	// What has been renamed the kernel knows without looking it up.
	rename := func(old, now string) {
		t.Helper()
		if errno, _ := k.do(t, opRename, 1, join(u64(1), []byte(old+"\x00"+now+"\x00"))); errno != 0 {
			t.Fatal(errno)
		}
	}
	do(os.WriteFile(dir+"/own", nil, 0o644))
	own := k.lookup(t, "own")
	rename("own", "mine")
	do(os.Rename(dir+"/mine", dir+"/theirs"))
	file, err := at.Walk("theirs")
	do(err)
	found("of the host's", replay.Change{Kind: replay.Renamed, Dir: root, Name: "mine", NewDir: root, NewName: "theirs", File: file, Mode: unix.S_IFREG}, "mine", own)
	stage.Set(&replay.Change{Kind: replay.Renamed, Dir: root, Name: "mine", NewDir: root, NewName: "theirs", File: file, Mode: unix.S_IFREG})
	k.uid = replay.UID
	k.lookup(t, "mine")
	rename("mine", "theirs")
	stage.Set(nil)
	k.uid = 0
	file.Close()
	do(os.Remove(dir + "/theirs"))
	found("renamed by both", replay.Change{Kind: replay.Removed, Dir: root, Name: "theirs", Mode: unix.S_IFREG}, "theirs", own)
	for id := first; id <= fs.lastNode; id++ {
		k.handle(k.request(opForget, id, u64(1<<40)), nil)
	}
	found("forgotten", removed, "f", 0)
	for id := second; id <= fs.lastNode; id++ {
		k.handle(k.request(opForget, id, u64(1<<40)), nil)
	}
	if len(fs.names) != 0 || len(fs.nodes) != 1 {
		t.Errorf("%d names and %d nodes are left", len(fs.names), len(fs.nodes))
	}
}
