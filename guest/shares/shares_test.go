package shares

import (
	"net"
	"os"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/wsl2/wsl2/internal/wire"
)

// TestConnect: a connection goes to the mount that asked for it, once.
func TestConnect(t *testing.T) {
	asked := make(chan *wire.MountShare, 2)
	m := Start(Config{Ask: func(r *wire.MountShare) { asked <- r }, Logf: t.Logf})
	type result struct {
		a   arrival
		err error
	}
	got := map[string]chan result{"/mnt/a": make(chan result, 1), "/mnt/b": make(chan result, 1)}
	for guest, ch := range got {
		go func() {
			a, err := m.ask(&trap{}, &wire.MountShare{Guest: guest, UID: 1000, GID: 1001})
			ch <- result{a, err}
		}()
	}
	first, second := <-asked, <-asked
	if first.Session == second.Session || first.UID != 1000 || first.GID != 1001 {
		t.Fatalf("%+v, %+v", first, second)
	}
	ours, theirs := net.Pipe()
	defer ours.Close()
	defer theirs.Close()
	if m.Deliver(theirs, wire.SessionID{1}) {
		t.Error("a session that nobody asked for was taken")
	}
	for _, r := range []*wire.MountShare{second, first} {
		deliver, want := func() bool { return m.Deliver(theirs, r.Session) }, arrival{conn: theirs}
		if r == first {
			deliver, want = func() bool { return m.DeliverDevice("tag", r.Session) }, arrival{tag: "tag"}
		}
		if !deliver() {
			t.Errorf("%s: not taken", r.Guest)
		}
		if m.Deliver(theirs, r.Session) {
			t.Errorf("%s: taken twice", r.Guest)
		}
		if res := <-got[r.Guest]; res.err != nil || res.a != want {
			t.Errorf("%s: %v, %v", r.Guest, res.a, res.err)
		}
	}
}

// TestNoTrap: what cannot be mounted is logged, and neither Reach nor Close waits for it.
func TestNoTrap(t *testing.T) {
	dir := t.TempDir()
	if err := os.WriteFile(dir+"/file", nil, 0o644); err != nil {
		t.Fatal(err)
	}
	logged := make(chan string, 10)
	m := Start(Config{Shares: []wire.Share{{Host: "/", Guest: dir + "/file/share"}}, Logf: func(format string, args ...any) {
		if len(args) > 0 {
			if s, ok := args[0].(string); ok {
				logged <- s
			}
		}
	}})
	m.Reach(dir + "/file/share/x")
	if s := <-logged; !strings.HasPrefix(s, dir) {
		t.Errorf("logged %q", s)
	}
	m.Close()
}

// TestDescriptor: a mount has a descriptor of its own, which outlives the connection's.
func TestDescriptor(t *testing.T) {
	l, err := net.Listen("unix", t.TempDir()+"/s")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	c, err := net.Dial("unix", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	peer, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	defer peer.Close()
	fd, err := descriptor(c)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fd)
	c.Close()
	if _, err := unix.Write(fd, []byte("x")); err != nil {
		t.Error(err)
	}
	b := make([]byte, 2)
	if n, err := peer.Read(b); err != nil || string(b[:n]) != "x" {
		t.Errorf("%q, %v", b[:n], err)
	}
	if flags, err := unix.FcntlInt(uintptr(fd), unix.F_GETFD, 0); err != nil || flags&unix.FD_CLOEXEC == 0 {
		t.Errorf("flags %#x, %v: programs would inherit it", flags, err)
	}
	a, z := net.Pipe()
	defer a.Close()
	defer z.Close()
	if _, err := descriptor(a); err == nil {
		t.Error("a pipe without a descriptor has one")
	}
}

// TestReplayer: the changes of a mounted share do not wait for another that is being mounted, and those of
// one that was mounted anew are nobody's.
func TestReplayer(t *testing.T) {
	asked := make(chan *wire.MountShare, 1)
	m := Start(Config{Ask: func(r *wire.MountShare) { asked <- r }, Logf: t.Logf})
	mount := func(tr *trap) wire.SessionID {
		done := make(chan error, 1)
		go func() { _, err := m.ask(tr, &wire.MountShare{}); done <- err }()
		id := (<-asked).Session
		m.DeliverDevice("tag", id)
		if err := <-done; err != nil {
			t.Fatal(err)
		}
		return id
	}
	share, other := &trap{share: wire.Share{Guest: "/mnt/a"}, dev: 1}, &trap{share: wire.Share{Guest: "/mnt/b"}}
	share.session = mount(share)
	mounting := mount(other)
	other.mu.Lock()
	if r := m.replayer(share.session); r == nil || r.guest != "/mnt/a" || r.dev != 1 {
		t.Errorf("%+v", r)
	}
	got := make(chan *replayer, 1)
	go func() { got <- m.replayer(mounting) }()
	other.session, other.dev = mounting, 2
	other.mu.Unlock()
	if r := <-got; r == nil || r.guest != "/mnt/b" || r.dev != 2 {
		t.Errorf("%+v", r)
	}
	before := share.session
	share.session = mount(share)
	if r := m.replayer(before); r != nil {
		t.Errorf("of a share that was mounted anew: %+v", r)
	}
}
