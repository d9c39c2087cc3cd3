package server

import (
	"bufio"
	"errors"
	"io"
	"net"
	"os"
	"os/exec"
	"slices"
	"strconv"
	"testing"
	"time"

	"github.com/wsl2/wsl2/internal/p9/localfs"
	"github.com/wsl2/wsl2/internal/p9/replay"
	"github.com/wsl2/wsl2/internal/wire"
	"github.com/wsl2/wsl2/launcher/share"
)

// TestChanges: the distro is told of the host's changes one at a time, in their order, from the first on.
func TestChanges(t *testing.T) {
	s := share.Spec{Dir: t.TempDir(), VsockPath: t.TempDir() + "/vsock", Session: wire.SessionID{1}}
	fs, err := localfs.New(s.Dir, localfs.Config{})
	if err != nil {
		t.Fatal(err)
	}
	defer fs.Close()
	guest := accept(t, s.VsockPath)
	_, _, _, stop := tellChanges(t.Context(), s, fs, t.Logf)
	others := func(script string) {
		t.Helper()
		cmd := exec.Command("sh", "-c", script)
		cmd.Dir = s.Dir
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Fatalf("%v: %s", err, out)
		}
	}
	others("mkdir missed")
	// A guest that fails misses that change, and is told the next.
	g, r := greet(t, s, <-guest)
	if m, err := wire.Read(r); err != nil || m.Type() != wire.TypeShareChange {
		t.Fatalf("%v, %v", m, err)
	}
	g.Close()
	others("mkdir d")
	g, r = greet(t, s, <-guest)
	defer g.Close()
	others("mv d e; rmdir e")
	for _, want := range []wire.ShareChange{
		{Kind: uint8(replay.Created), Dir: ".", Name: "d"},
		{Kind: uint8(replay.Removed), Dir: ".", Name: "d"}, // it is not at its new name any more
		{Kind: uint8(replay.Removed), Dir: ".", Name: "e"},
	} {
		var got *wire.ShareChange
		for got == nil || got.Name != want.Name || got.Kind != want.Kind {
			m, err := wire.Read(r)
			if got, _ = m.(*wire.ShareChange); err != nil || got == nil {
				t.Fatalf("waiting for %+v: %+v, %v", want, m, err)
			}
			if r.Buffered() > 0 {
				t.Error("another change comes before this is answered")
			}
			if err := wire.Write(g, &wire.ShareRaised{}); err != nil {
				t.Fatal(err)
			}
		}
		if got.Dir != want.Dir || got.Mode&0o170000 != 0o040000 {
			t.Errorf("%+v, want %+v of a directory", got, want)
		}
	}
	stop()
	g.SetReadDeadline(time.Now().Add(time.Minute)) //nolint:errcheck // it cannot fail on a socket
	if _, err := io.Copy(io.Discard, r); errors.Is(err, os.ErrDeadlineExceeded) {
		t.Error("the connection has not ended")
	}
}

// greet takes the connection over which changes come.
func greet(t *testing.T, s share.Spec, g net.Conn) (net.Conn, *bufio.Reader) {
	t.Helper()
	r := bufio.NewReader(g)
	if line, err := r.ReadString('\n'); err != nil || line != "CONNECT 0\n" {
		t.Fatalf("%q, %v", line, err)
	}
	io.WriteString(g, "OK 1\n") //nolint:errcheck // the answers tell
	hello, err := wire.Read(r)
	if h, ok := hello.(*wire.Hello); err != nil || !ok || h.Role != wire.RoleShareChanges || h.Session != s.Session {
		t.Fatalf("%+v, %v", hello, err)
	}
	return g, r
}

// TestLease: a guest may rely on being told of changes while there are none, and not while it may keep something older than
// one that it was not told of.
func TestLease(t *testing.T) {
	c := &changes{again: map[replay.Change]bool{}, some: make(chan struct{}, 1), logf: func(string, ...any) {}}
	want := func(what string, lease time.Duration) {
		t.Helper()
		if got := c.lease(); got != lease {
			t.Errorf("%s: the lease is %v, want %v", what, got, lease)
		}
	}
	want("before any change", leaseTime)
	c.add(&replay.Change{Kind: replay.Modified, Name: "f"})
	want("with a change pending", 0)
	c.last = c.last.Add(-quietTime)
	want("long after one that is pending", 0)
	c.next()
	want("while the guest is told", 0)
	c.next()
	want("long after a change", leaseTime)
	c.last = time.Now().Add(time.Hour)
	want("after a change", 0)
	c.lose()
	c.last = time.Time{}
	want("after one was lost", 0)
	c.untold = c.untold.Add(-leaseTime)
	want("long after one was lost", leaseTime)
}

// TestForget: a guest that is to forget is told so once, before anything else.
func TestForget(t *testing.T) {
	c := &changes{again: map[replay.Change]bool{}, some: make(chan struct{}, 1), logf: func(string, ...any) {}}
	c.add(&replay.Change{Kind: replay.Modified, Name: "f"})
	<-c.some
	c.forget()
	c.forget()
	select {
	case <-c.some:
	default:
		t.Error("nobody is woken")
	}
	var kinds []replay.Kind
	for one := c.next(); one != nil; one = c.next() {
		kinds = append(kinds, one.Kind)
	}
	if !slices.Equal(kinds, []replay.Kind{replay.Forget, replay.Modified}) {
		t.Errorf("the guest is told %v", kinds)
	}
}

// TestPending: what was said and not told yet is not said again, and of too many the last are lost, once.
func TestPending(t *testing.T) {
	said := 0
	c := &changes{again: map[replay.Change]bool{}, some: make(chan struct{}, 1), logf: func(string, ...any) { said++ }}
	modified := &replay.Change{Kind: replay.Modified, Name: "f"}
	for range 3 {
		c.add(modified)
	}
	c.add(&replay.Change{Kind: replay.Removed, Name: "f"})
	c.add(&replay.Change{Kind: replay.Created, Name: "f"})
	c.add(modified)
	var kinds []replay.Kind
	for one := c.next(); one != nil; one = c.next() {
		kinds = append(kinds, one.Kind)
	}
	if len(kinds) != 4 || kinds[0] != replay.Modified || kinds[3] != replay.Modified {
		t.Errorf("%v", kinds)
	}
	c.add(modified)
	if c.next() == nil {
		t.Error("what was told is not said again")
	}
	written := &replay.Change{Kind: replay.Written, Name: "f"}
	c.add(modified)
	c.add(written)
	c.next()
	c.add(modified)
	c.add(written)
	if n := len(c.pending); n != 3 || c.pending[n-1].Kind != replay.Written {
		t.Errorf("%d are pending, and the last is not that the file was closed", n)
	}
	for c.next() != nil {
	}
	for i := range maxPending + 10 {
		for range 2 {
			c.add(&replay.Change{Kind: replay.Created, Name: strconv.Itoa(i)})
		}
	}
	if len(c.pending) != maxPending || said != 1 {
		t.Errorf("%d are pending, said %d times", len(c.pending), said)
	}
	if c.lease() != 0 {
		t.Error("a guest that misses some may keep what it has")
	}
}
