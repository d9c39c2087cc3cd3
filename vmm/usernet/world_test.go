package usernet

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
	"gvisor.dev/gvisor/pkg/tcpip/adapters/gonet"

	"github.com/wsl2/wsl2/internal/testsys/namespace"
)

// The tests of this file run in a network namespace of their own, beside another one that is
// the world: the test starts itself again in a user namespace, where it may make both.
//
//	this process: guest ── Network ── sockets ── veth "wire" 198.51.100.2, 2001:db8:1::2
//	its child, the world:                        veth "wire" 198.51.100.1, 2001:db8:1::1, MTU 1400

const (
	roleVariable = "WSL2_TEST_USERNET_ROLE"
	roleWorld    = "world"
)

// run runs a command of the namespace's.
func run(t *testing.T, argv ...string) {
	t.Helper()
	if out, err := exec.Command(argv[0], argv[1:]...).CombinedOutput(); err != nil {
		t.Fatalf("%v: %v: %s", argv, err, out)
	}
}

// world starts the other namespace and joins it to ours.
func world(t *testing.T) {
	t.Helper()
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = append(os.Environ(), roleVariable+"="+roleWorld)
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: unix.CLONE_NEWNET, Pdeathsig: unix.SIGKILL}
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { in.Close(); cmd.Wait() }) //nolint:errcheck // it served its purpose
	run(t, "ip", "link", "set", "lo", "up")
	run(t, "ip", "link", "add", "wire", "mtu", "1400", "type", "veth", "peer", "name", "wire", "netns", fmt.Sprint(cmd.Process.Pid))
	run(t, "ip", "addr", "add", "198.51.100.2/24", "dev", "wire")
	run(t, "ip", "addr", "add", "2001:db8:1::2/64", "dev", "wire", "nodad")
	run(t, "ip", "link", "set", "wire", "up")
	if _, err := io.WriteString(in, "go\n"); err != nil {
		t.Fatal(err)
	}
	if err := waitLine(out, "ready"); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile("/proc/sys/net/ipv4/ping_group_range", []byte("0 0"), 0); err != nil {
		t.Fatal(err)
	}
}

func waitLine(r io.Reader, want string) error {
	var text []byte
	b := make([]byte, 1)
	for !bytes.HasSuffix(text, []byte(want+"\n")) {
		if _, err := r.Read(b); err != nil {
			return fmt.Errorf("%q, then %w", text, err)
		}
		text = append(text, b...)
	}
	return nil
}

// TestMain is the world, if this process was started as that: TCP that echoes, at port 7,
// and else nothing.
func TestMain(m *testing.M) {
	if os.Getenv(roleVariable) != roleWorld {
		os.Exit(m.Run())
	}
	if err := serveWorld(); err != nil {
		fmt.Println(err)
		os.Exit(1)
	}
}

func serveWorld() error {
	if err := waitLine(os.Stdin, "go"); err != nil {
		return err
	}
	for _, c := range []string{
		"link set lo up", "link set wire mtu 1400",
		"addr add 198.51.100.1/24 dev wire", "addr add 2001:db8:1::1/64 dev wire nodad", "link set wire up",
	} {
		if out, err := exec.Command("ip", strings.Fields(c)...).CombinedOutput(); err != nil {
			return fmt.Errorf("ip %s: %w: %s", c, err, out)
		}
	}
	l, err := net.Listen("tcp", "[::]:7")
	if err != nil {
		return err
	}
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			go func() {
				defer c.Close()
				echo(c.(*net.TCPConn))
			}()
		}
	}()
	fmt.Println("ready")
	_, err = io.Copy(io.Discard, os.Stdin) // its end is the test's
	return err
}

// echoes sends data through an echo and compares what comes back.
func echoes(t *testing.T, c io.ReadWriteCloser, want []byte) {
	t.Helper()
	defer c.Close()
	go func() {
		c.Write(want) //nolint:errcheck // what does not come back is missed
		c.(*gonet.TCPConn).CloseWrite()
	}()
	got, err := io.ReadAll(c)
	if err != nil || !bytes.Equal(got, want) {
		t.Errorf("%d of %d bytes came back: %v", len(got), len(want), err)
	}
}

// TestNAT: the world is reached by IPv4 and IPv6 over a network of a smaller MTU, what is
// not there is told, and pings are answered by who is asked.
func TestNAT(t *testing.T) {
	if !namespace.Inside(t, unix.CLONE_NEWNET) {
		return
	}
	world(t)
	g := newGuest(t, nil)
	for _, to := range []string{"198.51.100.1:7", "[2001:db8:1::1]:7"} {
		c, err := g.dial(to)
		if err != nil {
			t.Fatalf("%s: %v", to, err)
		}
		echoes(t, c, random(2<<20))
	}
	if _, err := g.dial("198.51.100.1:8"); err == nil || !strings.Contains(err.Error(), "refused") {
		t.Errorf("a closed port: %v", err)
	}
	if _, err := g.dial("203.0.113.1:7"); err == nil || !strings.Contains(err.Error(), "unreachable") {
		t.Errorf("a network without a route: %v", err)
	}
	for _, to := range []string{"198.51.100.1", "2001:db8:1::1"} {
		if err := g.ping(to); err != nil {
			t.Errorf("ping %s: %v", to, err)
		}
	}
	// The broadcast address of the host's network.
	if c, err := dialUDP(t.Context(), netip.MustParseAddrPort("198.51.100.255:9")); !errors.Is(err, unix.EACCES) {
		t.Errorf("a socket for a broadcast to the host's network: %v, %v", c, err)
	}
	if _, err := g.dial("198.51.100.255:9"); err == nil {
		t.Error("a connection to all")
	}
	// The host's kernel looks for a neighbour that is not there, for three seconds.
	if _, err := g.dial("198.51.100.77:7"); err == nil || !strings.Contains(err.Error(), "no route to host") {
		t.Errorf("a host that is not there: %v", err)
	}
}

// TestLinkDown: the host's network goes and comes back under a connection, which goes on.
func TestLinkDown(t *testing.T) {
	if !namespace.Inside(t, unix.CLONE_NEWNET) {
		return
	}
	world(t)
	g := newGuest(t, nil)
	c, err := g.dial("198.51.100.1:7")
	if err != nil {
		t.Fatal(err)
	}
	round := func() {
		t.Helper()
		want := random(100 << 10)
		go c.Write(want) //nolint:errcheck // what does not come back is missed
		got := make([]byte, len(want))
		if _, err := io.ReadFull(c, got); err != nil || !bytes.Equal(got, want) {
			t.Fatalf("%v", err)
		}
	}
	round()
	run(t, "ip", "link", "set", "wire", "down")
	if _, err := g.dial("198.51.100.1:7"); err == nil || !strings.Contains(err.Error(), "unreachable") {
		t.Errorf("while it is down: %v", err)
	}
	run(t, "ip", "link", "set", "wire", "up")
	round()
	c.Close()
}

// TestLossyWire: the wire loses and reorders frames, both ways; what arrives is whole.
func TestLossyWire(t *testing.T) {
	port := listen(t, "127.0.0.1:0", echo)
	var seed, lost, late atomic.Int64
	g := newGuestBehind(t, nil, func() func([]byte) [][]byte {
		r := rand.New(rand.NewPCG(3, uint64(seed.Add(1))))
		var held []byte
		return func(record []byte) [][]byte {
			const word = 12 // what is no longer is no frame
			switch {
			case len(record) > word && r.IntN(50) == 0:
				lost.Add(1)
				return nil
			case len(record) > word && held == nil && r.IntN(20) == 0:
				held = bytes.Clone(record)
				return nil
			case held != nil:
				late.Add(1)
				all := [][]byte{record, held}
				held = nil
				return all
			}
			return [][]byte{record}
		}
	})
	c, err := g.dial(fmt.Sprintf("10.77.0.1:%d", port))
	if err != nil {
		t.Fatal(err)
	}
	echoes(t, c, random(8<<20))
	if lost.Load() == 0 || late.Load() == 0 {
		t.Errorf("%d frames were lost, %d late", lost.Load(), late.Load())
	}
}
