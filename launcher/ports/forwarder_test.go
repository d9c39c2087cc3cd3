package ports

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/wsl2/wsl2/internal/forward"
	"github.com/wsl2/wsl2/internal/wire"
)

const deadline = time.Minute

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// guest answers on a VMM's vsock socket as a distro does whose servers send back what they
// get; port 9 is refused. dialled receives each DialPort.
type guest struct {
	path    string
	dialled chan wire.DialPort
}

func newGuest(t *testing.T) *guest {
	t.Helper()
	g := &guest{path: filepath.Join(t.TempDir(), "vsock"), dialled: make(chan wire.DialPort, 2000)}
	l, err := net.Listen("unix", g.path)
	must(t, err)
	var wg sync.WaitGroup
	t.Cleanup(func() {
		l.Close()
		wg.Wait()
	})
	wg.Go(func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			wg.Go(func() { g.serve(t, c) })
		}
	})
	return g
}

func (g *guest) serve(t *testing.T, c net.Conn) {
	defer c.Close()
	c.SetDeadline(time.Now().Add(deadline))
	var port uint32
	if _, err := fmt.Fscanf(c, "CONNECT %d\n", &port); err != nil || port != 7 {
		t.Errorf("connected to %d: %v", port, err)
		return
	}
	hello, err := wire.Read(c)
	if h, ok := hello.(*wire.Hello); !ok || h.Role != wire.RolePort {
		t.Errorf("%+v, %v", hello, err)
		return
	}
	m, err := wire.Read(c)
	dial, ok := m.(*wire.DialPort)
	if !ok {
		t.Errorf("%+v, %v", m, err)
		return
	}
	g.dialled <- *dial
	io.WriteString(c, "OK 1\n")
	if dial.Number == 9 {
		wire.Write(c, &wire.Failed{Code: wire.CodeRefused, Text: "connection refused"})
		return
	}
	wire.Write(c, &wire.Started{})
	if dial.Number == stuckPort {
		<-t.Context().Done()
		return
	}
	io.Copy(c, c) // datagrams keep their frames
}

// stuckPort is one whose server reads nothing.
const stuckPort = 8

func newForwarder(t *testing.T, path string) *Forwarder {
	t.Helper()
	f := NewForwarder(path)
	f.unprivileged = 1024
	t.Cleanup(f.Close)
	return f
}

// portsTried makes each freePort another one.
var portsTried atomic.Uint32

// freePort is a port that neither TCP nor UDP has, and the next one neither; out of the range
// that the kernel gives out by itself, where others may take it at any time.
func freePort(t *testing.T) uint16 {
	t.Helper()
	for range 5000 {
		p := uint16(20000 + (uint32(os.Getpid())*10+2*portsTried.Add(1))%12000)
		if free(p) && free(p+1) {
			return p
		}
	}
	t.Fatal("no free port")
	return 0
}

func free(port uint16) bool {
	for _, a := range []string{"127.0.0.1", "0.0.0.0", "::1"} {
		at := netip.AddrPortFrom(netip.MustParseAddr(a), port).String()
		l, err := net.Listen("tcp", at)
		if err != nil {
			return false
		}
		l.Close()
		p, err := net.ListenPacket("udp", at)
		if err != nil {
			return false
		}
		p.Close()
	}
	return true
}

func dial(t *testing.T, network, address string) net.Conn {
	t.Helper()
	c, err := net.DialTimeout(network, address, deadline)
	must(t, err)
	c.SetDeadline(time.Now().Add(deadline))
	t.Cleanup(func() { c.Close() })
	return c
}

// echoes fails the test unless what is sent comes back.
func echoes(t *testing.T, network, address string) {
	t.Helper()
	c := dial(t, network, address)
	defer c.Close()
	want := []byte("to " + address)
	c.Write(want)
	got := make([]byte, len(want))
	if _, err := io.ReadFull(c, got); err != nil || !bytes.Equal(got, want) {
		t.Errorf("%s %s: %q, %v", network, address, got, err)
	}
}

func refused(t *testing.T, address string) {
	t.Helper()
	if c, err := net.DialTimeout("tcp", address, deadline); !errors.Is(err, unix.ECONNREFUSED) {
		t.Errorf("%s: %v, want it refused", address, err)
		if err == nil {
			c.Close()
		}
	}
}

// breaks fails the test unless the connection is reset, at once or when it is used.
func breaks(t *testing.T, address string) {
	t.Helper()
	c, err := net.DialTimeout("tcp", address, deadline)
	if err == nil {
		c.SetDeadline(time.Now().Add(deadline))
		_, err = c.Read(make([]byte, 1))
		c.Close()
	}
	if !errors.Is(err, unix.ECONNRESET) {
		t.Errorf("%s: %v, want a reset", address, err)
	}
}

func at(address string, port uint16) string {
	return netip.AddrPortFrom(netip.MustParseAddr(address), port).String()
}

// TestForward: ports of both families and protocols are there while they are wanted.
func TestForward(t *testing.T) {
	g := newGuest(t)
	f := newForwarder(t, g.path)
	p := freePort(t)
	list := []Forward{
		{Distro: "a", Session: 7, Port: p, V4: true, V6: true, Loopback: true},
		{Distro: "a", Session: 7, Port: p, UDP: true, V6: true, Loopback: true},
	}
	bound := f.Apply(list, false)
	want := []Bound{
		{Distro: "a", Proto: "tcp", Port: p, Host: []string{at("127.0.0.1", p), at("::1", p)}},
		{Distro: "a", Proto: "udp", Port: p, Host: []string{at("::1", p)}},
	}
	if !reflect.DeepEqual(bound, want) {
		t.Fatalf("%+v\nwant %+v", bound, want)
	}
	for _, c := range []struct {
		network, address string
		dialled          wire.DialPort
	}{
		{"tcp", at("127.0.0.1", p), wire.DialPort{Number: p}},
		{"tcp", at("::1", p), wire.DialPort{Number: p, V6: true}},
		{"udp", at("::1", p), wire.DialPort{Number: p, V6: true, UDP: true}},
	} {
		echoes(t, c.network, c.address)
		if got := <-g.dialled; got != c.dialled {
			t.Errorf("%+v was dialled, want %+v", got, c.dialled)
		}
	}
	// A connection outlives its listener; the port does not.
	standing := dial(t, "tcp", at("127.0.0.1", p))
	standing.Write([]byte("x"))
	_, err := io.ReadFull(standing, make([]byte, 1))
	must(t, err)
	if bound = f.Apply(list[1:], false); !reflect.DeepEqual(bound, want[1:]) {
		t.Errorf("%+v", bound)
	}
	refused(t, at("127.0.0.1", p))
	refused(t, at("::1", p))
	standing.Write([]byte("y"))
	_, err = io.ReadFull(standing, make([]byte, 1))
	must(t, err)
	echoes(t, "udp", at("::1", p))
}

// TestRefused: where the guest's port refuses the client sees a connection that breaks.
func TestRefused(t *testing.T) {
	g := newGuest(t)
	f := newForwarder(t, g.path)
	f.unprivileged = 1
	p := freePort(t)
	f.Apply([]Forward{{Distro: "a", Session: 7, Port: 9, V4: true, Rules: []Rule{{HostPort: p, Address: netip.MustParseAddr("127.0.0.1")}}}}, false)
	breaks(t, at("127.0.0.1", p))
}

// TestConflict: a port that the host uses is not taken, and the next one said.
func TestConflict(t *testing.T) {
	g := newGuest(t)
	f := newForwarder(t, g.path)
	p := freePort(t)
	own, err := net.Listen("tcp4", at("0.0.0.0", p)) // all addresses: loopback as well
	must(t, err)
	defer own.Close()
	// The next is another distro's own: it goes before.
	list := []Forward{{Distro: "a", Session: 7, Port: p, V4: true, Loopback: true}, {Distro: "b", Session: 7, Port: p + 1, V4: true, Loopback: true}}
	bound := f.Apply(list, false)
	if len(bound[0].Host) != 1 || !strings.Contains(bound[0].Note, fmt.Sprintf("port %d of this host is in use", p)) || bound[0].Host[0] == at("127.0.0.1", p+1) {
		t.Errorf("%+v", bound[0])
	}
	if bound[1].Note != "" || !slices.Equal(bound[1].Host, []string{at("127.0.0.1", p+1)}) {
		t.Errorf("%+v", bound[1])
	}
	for _, b := range bound {
		for _, h := range b.Host {
			echoes(t, "tcp", h)
		}
	}
	// It stays where it is while nothing changes.
	if again := f.Apply(list, false); !reflect.DeepEqual(again, bound) {
		t.Errorf("%+v", again)
	}
	// Published ports are not moved.
	bound = f.Apply([]Forward{{Distro: "a", Session: 7, Port: p, V4: true, Rules: []Rule{{Port: p, HostPort: p}}}}, false)
	if len(bound[0].Host) != 0 || bound[0].Published || !strings.Contains(bound[0].Note, "in use") {
		t.Errorf("%+v", bound)
	}
}

// TestPrivileged: not without permission, and the way out is told.
func TestPrivileged(t *testing.T) {
	g := newGuest(t)
	f := newForwarder(t, g.path)
	p := freePort(t)
	f.unprivileged = p + 1
	list := []Forward{{Distro: "a", Session: 7, Port: p, V4: true, Loopback: true}}
	bound := f.Apply(list, false)
	if len(bound[0].Host) != 0 || !strings.Contains(bound[0].Note, fmt.Sprintf("ip_unprivileged_port_start=%d", p)) || !strings.Contains(bound[0].Note, "wsl2 ports --publish a:") {
		t.Errorf("%+v", bound)
	}
	refused(t, at("127.0.0.1", p))
	// A rule for loopback is a permission, and answers the question.
	list[0].Rules = []Rule{{Port: p, HostPort: p + 1, Address: netip.MustParseAddr("127.0.0.1")}}
	if bound = f.Apply(list, false); bound[0].Note != "" || bound[0].Published || !slices.Equal(bound[0].Host, []string{at("127.0.0.1", p+1)}) {
		t.Errorf("%+v", bound)
	}
	f.Apply(nil, false)
	list[0].Rules = nil
	if bound = f.Apply(list, true); bound[0].Note != "" || !slices.Equal(bound[0].Host, []string{at("127.0.0.1", p)}) {
		t.Errorf("%+v", bound)
	}
}

// TestPublish: other machines' addresses, and who may connect.
func TestPublish(t *testing.T) {
	g := newGuest(t)
	f := newForwarder(t, g.path)
	p := freePort(t)
	everywhere := Forward{Distro: "a", Session: 7, Port: p, V4: true, Loopback: true, Rules: []Rule{{Port: p, HostPort: p, Allow: []netip.Prefix{netip.MustParsePrefix("203.0.113.0/24")}}}}
	bound := f.Apply([]Forward{everywhere}, false)
	if !bound[0].Published || !slices.Equal(bound[0].Host, []string{at("0.0.0.0", p), at("::", p)}) {
		t.Fatalf("%+v", bound)
	}
	echoes(t, "tcp", at("127.0.0.1", p)) // the host itself always may
	echoes(t, "tcp", at("::1", p))
	// Peers that are not the host itself.
	f.Apply(nil, false)
	f = newForwarder(t, g.path)
	f.isHost = func(netip.Addr) bool { return false }
	f.Apply([]Forward{everywhere}, false)
	breaks(t, at("127.0.0.1", p))
	f.Apply(nil, false)
	everywhere.Rules = []Rule{{Port: p, HostPort: p, Allow: []netip.Prefix{netip.MustParsePrefix("127.0.0.0/8")}}}
	f.Apply([]Forward{everywhere}, false)
	echoes(t, "tcp", at("127.0.0.1", p))
	breaks(t, at("::1", p))
	everywhere.Rules = nil
	if bound = f.Apply([]Forward{everywhere}, false); bound[0].Published || !slices.Equal(bound[0].Host, []string{at("127.0.0.1", p)}) {
		t.Errorf("%+v", bound)
	}
}

// TestThousand connections at once, each with its own answer.
func TestThousand(t *testing.T) {
	g := newGuest(t)
	f := newForwarder(t, g.path)
	p := freePort(t)
	f.Apply([]Forward{{Distro: "a", Session: 7, Port: p, V4: true, Loopback: true}}, false)
	var conns []net.Conn
	for i := range 1000 {
		c := dial(t, "tcp", at("127.0.0.1", p))
		fmt.Fprintf(c, "%04d", i)
		conns = append(conns, c)
	}
	for i, c := range conns {
		b := make([]byte, 4)
		if _, err := io.ReadFull(c, b); err != nil || string(b) != fmt.Sprintf("%04d", i) {
			t.Fatalf("connection %d: %q, %v", i, b, err)
		}
		c.Close()
	}
	f.Close() // waits for all of them
	f.mu.Lock()
	defer f.mu.Unlock()
	if len(f.conns) != 0 {
		t.Errorf("%d connections are left", len(f.conns))
	}
}

// TestFlows: each peer of a UDP port has answers of its own.
func TestFlows(t *testing.T) {
	g := newGuest(t)
	f := newForwarder(t, g.path)
	p := freePort(t)
	f.Apply([]Forward{{Distro: "a", Session: 7, UDP: true, Port: p, V4: true, Loopback: true}}, false)
	var peers []net.Conn
	for i := range 20 {
		c := dial(t, "udp", at("127.0.0.1", p))
		fmt.Fprint(c, i)
		peers = append(peers, c)
	}
	buf := make([]byte, forward.MaxDatagram)
	for i, c := range peers {
		if n, err := c.Read(buf); err != nil || string(buf[:n]) != fmt.Sprint(i) {
			t.Errorf("peer %d: %q, %v", i, buf[:n], err)
		}
	}
	if n := len(g.dialled); n != 20 {
		t.Errorf("%d connections for 20 peers", n)
	}
}

// TestFlowStuck: a guest that takes no datagrams holds no flow up: it ends with the Forwarder, and what was queued
// is forgotten.
func TestFlowStuck(t *testing.T) {
	g := newGuest(t)
	f := newForwarder(t, g.path)
	host := freePort(t)
	bound := f.Apply([]Forward{{Distro: "debian", Session: 7, UDP: true, Port: stuckPort, V4: true,
		Rules: []Rule{{Distro: "debian", UDP: true, Port: stuckPort, HostPort: host, Address: netip.MustParseAddr("127.0.0.1")}}}}, false)
	if len(bound[0].Host) != 1 {
		t.Fatalf("%+v", bound)
	}
	c := dial(t, "udp", netip.AddrPortFrom(netip.MustParseAddr("127.0.0.1"), host).String())
	// Until the connection takes no more, and datagrams wait.
	for end := time.Now().Add(deadline); f.queued.Load() < 1<<20; {
		if _, err := c.Write(make([]byte, 60000)); err != nil || time.Now().After(end) {
			t.Fatalf("%d bytes are queued, %v", f.queued.Load(), err)
		}
	}
	closed := make(chan struct{})
	go func() { f.Close(); close(closed) }()
	select {
	case <-closed:
	case <-time.After(deadline):
		t.Fatal("the flow goes on")
	}
	if n := f.queued.Load(); n != 0 {
		t.Errorf("%d bytes are still queued", n)
	}
}

// TestFlowsAreBounded: all datagrams that wait take so much and no more.
func TestFlowsAreBounded(t *testing.T) {
	f := newForwarder(t, "")
	u := &udpListener{f: f}
	d := make([]byte, forward.MaxDatagram)
	for range 2 * maxQueued / (flowQueue * len(d)) {
		one := &flow{l: u, queue: make(chan []byte, flowQueue)}
		for range flowQueue + 1 {
			one.pushLocked(d)
		}
	}
	if n := int(f.queued.Load()); n > maxQueued || n+len(d) < maxQueued {
		t.Errorf("%d bytes are queued, of %d", n, maxQueued)
	}
}
