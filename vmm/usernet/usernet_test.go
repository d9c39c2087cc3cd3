package usernet

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/adapters/gonet"
	"gvisor.dev/gvisor/pkg/tcpip/header"
	"gvisor.dev/gvisor/pkg/tcpip/network/arp"
	"gvisor.dev/gvisor/pkg/tcpip/network/ipv4"
	"gvisor.dev/gvisor/pkg/tcpip/network/ipv6"
	"gvisor.dev/gvisor/pkg/tcpip/stack"
	"gvisor.dev/gvisor/pkg/tcpip/transport/icmp"
	"gvisor.dev/gvisor/pkg/tcpip/transport/tcp"
	"gvisor.dev/gvisor/pkg/tcpip/transport/udp"
	"gvisor.dev/gvisor/pkg/waiter"

	"github.com/wsl2/wsl2/internal/testsys/namespace"
	"github.com/wsl2/wsl2/vmm/usernet/policy"
)

// deadline is how long a test waits for an event before it fails.
const deadline = time.Minute

// guest is a guest with a TCP/IP of its own at the other end of a Network's link.
type guest struct {
	t     testing.TB
	net   *Network
	stack *stack.Stack
	link  *link
	log   *lines
	ended chan error
}

// lines are what was logged.
type lines struct {
	mu sync.Mutex
	l  []string
}

func (l *lines) add(format string, args ...any) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.l = append(l.l, fmt.Sprintf(format, args...))
}

func (l *lines) all() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return strings.Join(l.l, "\n")
}

func testConfig() Config {
	return Config{
		GuestMAC: [6]byte{2, 0, 0, 0, 0, 2}, GatewayMAC: [6]byte{2, 0, 0, 0, 0, 1}, MTU: 65520,
		Guest4: netip.MustParseAddr("10.77.0.2"), Gateway4: netip.MustParseAddr("10.77.0.1"),
		Guest6: netip.MustParseAddr("fd77::2"), Gateway6: netip.MustParseAddr("fd77::1"),
		HostLoopback: true,
	}
}

func socketpair(t testing.TB) [2]int {
	t.Helper()
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	return pair
}

// newGuest starts a network and a guest with it; change may alter the network's Config.
func newGuest(t testing.TB, change func(*Config)) *guest {
	t.Helper()
	return newGuestBehind(t, change, nil)
}

// newGuestBehind is newGuest with a wire between both, if not nil. Each direction has one of its own, which returns what
// it carries when it is given a record.
func newGuestBehind(t testing.TB, change func(*Config), wire func() func(record []byte) [][]byte) *guest {
	t.Helper()
	c := testConfig()
	g := &guest{t: t, log: &lines{}, ended: make(chan error, 1)}
	c.Logf = g.log.add
	if change != nil {
		change(&c)
	}
	pair := socketpair(t)
	if wire != nil {
		far := socketpair(t)
		var pumps sync.WaitGroup
		near := pair[0]
		pumps.Go(func() { pump(far[1], near, wire()) })
		pumps.Go(func() { pump(near, far[1], wire()) })
		t.Cleanup(func() {
			pumps.Wait()
			unix.Close(near)
			unix.Close(far[1])
		})
		pair[0] = far[0]
	}
	var err error
	if g.net, err = New(c, pair[0]); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	go func() { g.ended <- g.net.Serve(ctx) }()

	// The word of a driver with all offloads, which virtio/net sends.
	if _, err := unix.Write(pair[1], []byte{0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff}); err != nil {
		t.Fatal(err)
	}
	own := c
	own.GatewayMAC, own.GuestMAC = c.GuestMAC, c.GatewayMAC
	if g.link, err = newLink(pair[1], own); err != nil {
		t.Fatal(err)
	}
	g.link.offloads.Store(true)
	g.stack = stack.New(stack.Options{
		NetworkProtocols:   []stack.NetworkProtocolFactory{ipv4.NewProtocol, ipv6.NewProtocol, arp.NewProtocol},
		TransportProtocols: []stack.TransportProtocolFactory{tcp.NewProtocol, udp.NewProtocol, icmp.NewProtocol4, icmp.NewProtocol6},
	})
	must := func(err tcpip.Error) {
		if err != nil {
			t.Fatal(err)
		}
	}
	must(g.stack.CreateNIC(1, g.link))
	for _, a := range []struct {
		proto tcpip.NetworkProtocolNumber
		ip    netip.Addr
		bits  int
	}{{ipv4.ProtocolNumber, c.Guest4, 24}, {ipv6.ProtocolNumber, c.Guest6, 64}} {
		must(g.stack.AddProtocolAddress(1, tcpip.ProtocolAddress{Protocol: a.proto,
			AddressWithPrefix: tcpip.AddressWithPrefix{Address: address(a.ip).addr(), PrefixLen: a.bits}}, stack.AddressProperties{}))
	}
	g.stack.SetRouteTable([]tcpip.Route{
		{Destination: header.IPv4EmptySubnet, Gateway: address(c.Gateway4).addr(), NIC: 1},
		{Destination: header.IPv6EmptySubnet, Gateway: address(c.Gateway6).addr(), NIC: 1},
	})
	served := make(chan struct{})
	go func() { defer close(served); g.link.serve() }() //nolint:errcheck // its end is all that counts
	t.Cleanup(func() {
		cancel()
		select {
		case err := <-g.ended:
			if err != nil {
				t.Errorf("the network ended: %v", err)
			}
		case <-time.After(deadline):
			t.Error("the network does not end")
		}
		g.link.shutdown()
		<-served
		g.stack.Destroy()
		g.link.close()
	})
	return g
}

// pump carries records until their end, which it passes on.
func pump(to, from int, carry func([]byte) [][]byte) {
	b := make([]byte, 1<<17)
	for {
		n, err := readFrame(from, b)
		if err != nil || n == 0 {
			break
		}
		for _, record := range carry(b[:n]) {
			if _, err = unix.Write(to, record); err != nil {
				break
			}
		}
		if err != nil {
			break
		}
	}
	unix.Shutdown(to, unix.SHUT_RDWR)   //nolint:errcheck // it may be gone
	unix.Shutdown(from, unix.SHUT_RDWR) //nolint:errcheck // it may be gone
}

func full(a netip.AddrPort) tcpip.FullAddress {
	return tcpip.FullAddress{NIC: 1, Addr: address(a.Addr()).addr(), Port: a.Port()}
}

func proto(a netip.Addr) tcpip.NetworkProtocolNumber {
	if a.Is4() {
		return ipv4.ProtocolNumber
	}
	return ipv6.ProtocolNumber
}

// dial connects from within the guest.
func (g *guest) dial(to string) (net.Conn, error) {
	ctx, cancel := context.WithTimeout(context.Background(), deadline)
	defer cancel()
	a := netip.MustParseAddrPort(to)
	c, err := gonet.DialContextTCP(ctx, g.stack, full(a), proto(a.Addr()))
	if err != nil {
		return nil, err
	}
	c.SetDeadline(time.Now().Add(deadline))
	return c, nil
}

// endpoint connects one of the guest's stack, which can be reset.
func (g *guest) endpoint(to string) tcpip.Endpoint {
	g.t.Helper()
	var queue waiter.Queue
	ep, err := g.stack.NewEndpoint(tcp.ProtocolNumber, ipv4.ProtocolNumber, &queue)
	if err != nil {
		g.t.Fatal(err)
	}
	entry, ready := waiter.NewChannelEntry(waiter.WritableEvents | waiter.EventErr)
	queue.EventRegister(&entry)
	ep.Connect(full(netip.MustParseAddrPort(to)))
	select {
	case <-ready:
	case <-time.After(deadline):
		g.t.Fatal("no connection")
	}
	return ep
}

// dialUDP makes a connected socket within the guest.
func (g *guest) dialUDP(to string) net.Conn {
	g.t.Helper()
	a := netip.MustParseAddrPort(to)
	remote := full(a)
	c, err := gonet.DialUDP(g.stack, nil, &remote, proto(a.Addr()))
	if err != nil {
		g.t.Fatal(err)
	}
	c.SetDeadline(time.Now().Add(deadline))
	g.t.Cleanup(func() { c.Close() })
	return c
}

// listen is a TCP server of the host, whose connections serve gets.
func listen(t testing.TB, addr string, serve func(*net.TCPConn)) (port int) {
	t.Helper()
	l, err := net.Listen("tcp", addr)
	if err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	wg.Go(func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			wg.Go(func() {
				defer c.Close()
				c.SetDeadline(time.Now().Add(deadline))
				serve(c.(*net.TCPConn))
			})
		}
	})
	t.Cleanup(func() { l.Close(); wg.Wait() })
	return l.Addr().(*net.TCPAddr).Port
}

func echo(c *net.TCPConn) {
	io.Copy(c, c) //nolint:errcheck // the test sees what comes back
	c.CloseWrite()
}

// closedPort is one where nobody listens.
func closedPort(t testing.TB) int {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	return l.Addr().(*net.TCPAddr).Port
}

func random(n int) []byte {
	b := make([]byte, n)
	rand.NewChaCha8([32]byte{}).Read(b)
	return b
}

// TestTCP sends megabytes to an echo on the host's loopback, of either family and
// through either of the gateway's addresses, and half-closes.
func TestTCP(t *testing.T) {
	g := newGuest(t, nil)
	for _, addr := range []string{"127.0.0.1:0", "[::1]:0"} {
		port := listen(t, addr, echo)
		for _, gateway := range []string{"10.77.0.1", "[fd77::1]"} {
			c, err := g.dial(fmt.Sprintf("%s:%d", gateway, port))
			if err != nil {
				t.Fatalf("to %s by %s: %v", addr, gateway, err)
			}
			want := random(4 << 20)
			go func() {
				c.Write(want) //nolint:errcheck // what does not come back is missed
				c.(*gonet.TCPConn).CloseWrite()
			}()
			got, err := io.ReadAll(c)
			if err != nil || !bytes.Equal(got, want) {
				t.Errorf("to %s by %s: %d of %d bytes came back, %v", addr, gateway, len(got), len(want), err)
			}
			c.Close()
		}
	}
}

// TestFullFrames: of much that waits for the guest, a frame takes as much as frames can hold, and no rest follows.
func TestFullFrames(t *testing.T) {
	there := make(chan struct{}) // all is
	first := make(chan int, 1)   // bytes of the first frame that has some
	wire := func(record []byte) [][]byte {
		h := header.IPv4(record[min(len(record), 10+header.EthernetMinimumSize):])
		if len(h) < header.IPv4MinimumSize+header.TCPMinimumSize || h.TransportProtocol() != header.TCPProtocolNumber {
			return [][]byte{record}
		}
		segment := header.TCP(h.Payload())
		if segment.Flags() == header.TCPFlagAck {
			<-there // the connection is not there before
		}
		if n := len(segment) - int(segment.DataOffset()); n > 0 {
			select {
			case first <- n:
			default:
			}
		}
		return [][]byte{record}
	}
	g := newGuestBehind(t, nil, func() func([]byte) [][]byte { return wire })
	want := random(65400) // what the guest's first window has room for
	over := make(chan struct{})
	port := listen(t, "127.0.0.1:0", func(c *net.TCPConn) {
		raw, err := c.SyscallConn()
		if err == nil {
			_, err = c.Write(want)
		}
		left := len(want)
		for end := time.Now().Add(deadline); left > 0 && err == nil && time.Now().Before(end); time.Sleep(time.Millisecond) {
			err = raw.Control(func(fd uintptr) { left, _ = unix.IoctlGetInt(int(fd), unix.TIOCOUTQ) })
		}
		if left > 0 || err != nil {
			t.Errorf("%d bytes are not at the other end, %v", left, err)
		}
		close(there)
		<-over
	})
	defer close(over)
	c, err := g.dial(fmt.Sprintf("10.77.0.1:%d", port))
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	got := make([]byte, len(want))
	if _, err := io.ReadFull(c, got); err != nil || !bytes.Equal(got, want) {
		t.Fatalf("it came damaged, %v", err)
	}
	if n := <-first; n != len(want) {
		t.Errorf("of %d bytes the first frame has %d", len(want), n)
	}
}

// TestTCPUrgent: what the host's peer sends behind urgent data arrives as well.
func TestTCPUrgent(t *testing.T) {
	g := newGuest(t, nil)
	port := listen(t, "127.0.0.1:0", func(c *net.TCPConn) {
		raw, err := c.SyscallConn()
		if err != nil {
			t.Error(err)
			return
		}
		for i := range 100 {
			flags := 0
			if i%3 == 1 {
				flags = unix.MSG_OOB
			}
			raw.Write(func(fd uintptr) bool { err = unix.Send(int(fd), []byte{byte(i)}, flags); return err != unix.EAGAIN }) //nolint:errcheck // err
			if err != nil {
				t.Error(err)
			}
		}
	})
	c, err := g.dial(fmt.Sprintf("10.77.0.1:%d", port))
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	got, err := io.ReadAll(c)
	if err != nil {
		t.Fatal(err)
	}
	// A byte that is urgent no longer, as another one is, may come among the others.
	var plain []byte
	for _, b := range got {
		if b%3 != 1 {
			plain = append(plain, b)
		}
	}
	var want []byte
	for i := range 100 {
		if i%3 != 1 {
			want = append(want, byte(i))
		}
	}
	if !bytes.Equal(plain, want) {
		t.Errorf("% d came", got)
	}
}

func TestTCPRefused(t *testing.T) {
	g := newGuest(t, nil)
	for _, gateway := range []string{"10.77.0.1", "[fd77::1]"} {
		_, err := g.dial(fmt.Sprintf("%s:%d", gateway, closedPort(t)))
		if err == nil || !strings.Contains(err.Error(), "refused") {
			t.Errorf("by %s: %v", gateway, err)
		}
	}
}

// TestTCPUnreachable: nobody is on the wire but the two, and the guest is told.
func TestTCPUnreachable(t *testing.T) {
	g := newGuest(t, nil)
	// (This stack, as a guest, does not know IPv6's reasons. Linux does: TestNetwork in cmd/wsl2.)
	if _, err := g.dial("10.77.0.99:80"); err == nil || !strings.Contains(err.Error(), "no route to host") {
		t.Error(err)
	}
}

// TestTCPReset: a reset on the host's side is one on the guest's.
func TestTCPReset(t *testing.T) {
	g := newGuest(t, nil)
	port := listen(t, "127.0.0.1:0", func(c *net.TCPConn) {
		c.Read(make([]byte, 1)) //nolint:errcheck // the guest's word
		c.SetLinger(0)
	})
	c, err := g.dial(fmt.Sprintf("10.77.0.1:%d", port))
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if _, err := c.Write([]byte("x")); err != nil {
		t.Fatal(err)
	}
	if n, err := c.Read(make([]byte, 1)); err == nil || errors.Is(err, io.EOF) {
		t.Errorf("read %d, %v; want a reset", n, err)
	}
}

// TestTCPResetAfterEnd: a peer that has ended its direction and is reset then is a reset for the other side
// even if that says nothing.
func TestTCPResetAfterEnd(t *testing.T) {
	g := newGuest(t, nil)
	reset := make(chan struct{})
	ended := make(chan error, 1)
	port := listen(t, "127.0.0.1:0", func(c *net.TCPConn) {
		c.CloseWrite() //nolint:errcheck // the guest misses it
		<-reset
		c.SetLinger(0)
	})
	ep := g.endpoint(fmt.Sprintf("10.77.0.1:%d", port))
	closeWait := func() bool { return tcp.EndpointState(ep.State()) == tcp.StateCloseWait }
	eventually(t, "the guest sees the end", closeWait)
	close(reset)
	eventually(t, "the guest learns of the reset", func() bool { return ep.LastError() != nil })

	port = listen(t, "127.0.0.1:0", func(c *net.TCPConn) {
		c.SetDeadline(time.Now().Add(deadline))
		if n, err := c.Read(make([]byte, 1)); err != io.EOF {
			ended <- fmt.Errorf("read %d, %w; want the end", n, err)
			return
		}
		ended <- nil
		// Silent, and waiting for nothing but an end.
		ended <- watchHost(c)
	})
	ep = g.endpoint(fmt.Sprintf("10.77.0.1:%d", port))
	ep.Shutdown(tcpip.ShutdownWrite)
	if err := <-ended; err != nil {
		t.Fatal(err)
	}
	ep.Abort()
	if err := <-ended; err == nil {
		t.Error("the host does not learn of the guest's reset")
	}
}

// TestTCPGuestReset is the other way round.
func TestTCPGuestReset(t *testing.T) {
	g := newGuest(t, nil)
	ended := make(chan error, 1)
	port := listen(t, "127.0.0.1:0", func(c *net.TCPConn) {
		_, err := c.Read(make([]byte, 1))
		ended <- err
	})
	g.endpoint(fmt.Sprintf("10.77.0.1:%d", port)).Abort()
	select {
	case err := <-ended:
		if !errors.Is(err, unix.ECONNRESET) {
			t.Errorf("the host read %v; want a reset", err)
		}
	case <-time.After(deadline):
		t.Error("the host's connection goes on")
	}
}

// TestManyConnections opens them at once, holds them, and closes them; nothing is left.
func TestManyConnections(t *testing.T) {
	g := newGuest(t, nil)
	port := listen(t, "127.0.0.1:0", echo)
	before := runtime.NumGoroutine()
	const n = 200
	var wg sync.WaitGroup
	errs := make(chan error, n)
	release := make(chan struct{})
	var opened sync.WaitGroup
	opened.Add(n)
	for i := range n {
		wg.Go(func() {
			c, err := g.dial(fmt.Sprintf("10.77.0.1:%d", port))
			opened.Done()
			if err != nil {
				errs <- err
				return
			}
			defer c.Close()
			<-release
			want := []byte(fmt.Sprint(i))
			c.Write(want) //nolint:errcheck // missed below
			c.(*gonet.TCPConn).CloseWrite()
			if got, err := io.ReadAll(c); err != nil || !bytes.Equal(got, want) {
				errs <- fmt.Errorf("connection %d: %q, %v", i, got, err)
			}
		})
	}
	opened.Wait()
	if n := len(g.net.limits.tcp); n != 200 {
		t.Errorf("%d connections are counted", n)
	}
	close(release)
	wg.Wait()
	close(errs)
	for err := range errs {
		t.Error(err)
	}
	eventually(t, "connections end", func() bool { return len(g.net.limits.tcp) == 0 && runtime.NumGoroutine() < before+50 })
}

// TestSoakConnections: of very many connections, one after the other and at once, nothing stays: no descriptor, no
// goroutine. WSL2_SOAK is for the whole count (make soak).
func TestSoakConnections(t *testing.T) {
	const workers = 8
	total, held := 10_000, 1_000
	if os.Getenv("WSL2_SOAK") != "" {
		total, held = 100_000, 10_000
	}
	// Both ends of the host's connections are in this process.
	var limit unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &limit); err != nil {
		t.Fatal(err)
	}
	held = min(held, int(limit.Cur)/4)
	g := newGuest(t, nil)
	// The guest's ports are used again and again.
	short := tcpip.TCPTimeWaitTimeoutOption(time.Second)
	if err := g.stack.SetTransportProtocolOption(tcp.ProtocolNumber, &short); err != nil {
		t.Fatal(err)
	}
	port := listen(t, "127.0.0.1:0", func(c *net.TCPConn) {
		// Not TCPConn.ReadFrom, which keeps pipes for splice(2) in a pool: descriptors, too.
		io.Copy(struct{ io.Writer }{c}, struct{ io.Reader }{c}) //nolint:errcheck // the test sees what comes back
	})
	to := fmt.Sprintf("10.77.0.1:%d", port)
	round := func() (net.Conn, error) {
		c, err := g.dial(to)
		if err != nil {
			return nil, err
		}
		if _, err = c.Write([]byte("x")); err == nil {
			_, err = io.ReadFull(c, make([]byte, 1))
		}
		if err != nil {
			c.Close()
		}
		return c, err
	}
	// inParallel calls f so many times, until one fails.
	inParallel := func(n int, f func() error) {
		t.Helper()
		var left atomic.Int64
		left.Store(int64(n))
		var wg sync.WaitGroup
		for range workers {
			wg.Go(func() {
				for left.Add(-1) >= 0 {
					if err := f(); err != nil {
						left.Store(0)
						t.Error(err)
					}
				}
			})
		}
		wg.Wait()
	}
	files := func() int {
		list, err := os.ReadDir("/proc/self/fd")
		if err != nil {
			t.Fatal(err)
		}
		return len(list)
	}
	beforeFiles, before := files(), runtime.NumGoroutine()
	var mu sync.Mutex
	var open []net.Conn
	inParallel(held, func() error {
		c, err := round()
		if err == nil {
			mu.Lock()
			open = append(open, c)
			mu.Unlock()
		}
		return err
	})
	if n := len(g.net.limits.tcp); !t.Failed() && n != held {
		t.Errorf("%d connections are counted, of %d", n, held)
	}
	for _, c := range open {
		c.Close()
	}
	eventually(t, "what was held ends", func() bool { return len(g.net.limits.tcp) == 0 })
	inParallel(total, func() error {
		c, err := round()
		if err == nil {
			err = c.Close()
		}
		return err
	})
	t.Cleanup(func() {
		if t.Failed() {
			t.Logf("%d connections, %d descriptors of %d, %d goroutines of %d", len(g.net.limits.tcp), files(), beforeFiles, runtime.NumGoroutine(), before)
			t.Log(g.log.all())
		}
	})
	eventually(t, "connections end", func() bool {
		return len(g.net.limits.tcp) == 0 && files() <= beforeFiles+workers && runtime.NumGoroutine() <= before+5*workers
	})
}

// eventually waits for what the network does by itself, and tells nobody of.
func eventually(t *testing.T, what string, done func() bool) {
	t.Helper()
	end := time.Now().Add(deadline)
	for !done() {
		if time.Now().After(end) {
			t.Fatalf("%s: not within %v", what, deadline)
		}
		time.Sleep(time.Millisecond)
	}
}

// TestBandwidth: a limit holds, each way.
func TestBandwidth(t *testing.T) {
	const limit, size = 1 << 20, 2 << 20
	g := newGuest(t, func(c *Config) { c.BytesPerSecond = limit })
	port := listen(t, "127.0.0.1:0", echo)
	c, err := g.dial(fmt.Sprintf("10.77.0.1:%d", port))
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	start := time.Now()
	go func() {
		c.Write(random(size)) //nolint:errcheck // what does not come back is missed
		c.(*gonet.TCPConn).CloseWrite()
	}()
	n, err := io.Copy(io.Discard, c)
	if err != nil || n != size {
		t.Fatalf("%d bytes came back, %v", n, err)
	}
	// But for the first tenth of a second's.
	if took := time.Since(start); took < time.Second {
		t.Errorf("%d bytes took %v at %d in a second", size, took, limit)
	}
}

// TestTCPLimit: one connection too many is refused at once, and one that ends makes room.
func TestTCPLimit(t *testing.T) {
	g := newGuest(t, nil)
	others := cap(g.net.limits.tcp) - 1
	for range others {
		g.net.limits.tcp <- struct{}{}
	}
	port := listen(t, "127.0.0.1:0", echo)
	to := fmt.Sprintf("10.77.0.1:%d", port)
	c, err := g.dial(to)
	if err != nil {
		t.Fatal(err)
	}
	if c2, err := g.dial(to); err == nil {
		c2.Close()
		t.Error("a second connection is accepted")
	}
	if log := g.log.all(); !strings.Contains(log, "as many as it may") {
		t.Errorf("logged: %s", log)
	}
	c.Close()
	eventually(t, "the connection ends", func() bool { return len(g.net.limits.tcp) == others })
	if c, err = g.dial(to); err != nil {
		t.Error(err)
	} else {
		c.Close()
	}
}

// TestManySilent: a guest that waits for more silent peers than there are places does not keep
// others from connecting.
func TestManySilent(t *testing.T) {
	if !namespace.Inside(t, unix.CLONE_NEWNET) {
		return
	}
	world(t)
	// The world takes what is for this network, and says nothing of it.
	run(t, "ip", "route", "add", "192.0.2.0/24", "via", "198.51.100.1")
	g := newGuest(t, nil)
	for i := range maxHandshakes + 100 {
		g.frame(syn(uint16(1024+i), "192.0.2.1:80"))
	}
	c, err := g.dial("198.51.100.1:7")
	if err != nil {
		t.Fatal(err)
	}
	echoes(t, c, random(1000))
}

// TestBuffersAreBounded: the more connections there are, the less a further one may hold.
func TestBuffersAreBounded(t *testing.T) {
	g := newGuest(t, nil)
	port := listen(t, "127.0.0.1:0", echo)
	to := fmt.Sprintf("10.77.0.1:%d", port)
	sizes := func() (grow, fixed int) {
		for _, ep := range g.net.stack.RegisteredEndpoints() {
			ep, ok := ep.(*tcp.Endpoint)
			if !ok {
				continue
			}
			o := ep.SocketOptions()
			if o.GetSendBufferSize() == bufferOf(100) && o.GetReceiveBufferSize() == bufferOf(100) {
				fixed++
			} else {
				grow++
			}
		}
		return grow, fixed
	}
	for range 70 {
		c, err := g.dial(to)
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		// It is known to both sides when it carries something.
		if _, err := c.Write([]byte("x")); err != nil {
			t.Fatal(err)
		}
		if _, err := io.ReadFull(c, make([]byte, 1)); err != nil {
			t.Fatal(err)
		}
	}
	if grow, fixed := sizes(); grow != 64 || fixed != 6 {
		t.Errorf("%d with buffers that grow, %d with small ones", grow, fixed)
	}
	const most = 64*2*maxBuffer + (1024-64)*2*256<<10 + (maxTCP-1024)*2*32<<10
	if most > 2<<30 {
		t.Errorf("all together may hold %d bytes", most)
	}
}

func listenUDP(t testing.TB) *net.UDPConn {
	t.Helper()
	c, err := net.ListenUDP("udp", &net.UDPAddr{IP: net.IPv4(127, 0, 0, 1)})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	c.SetDeadline(time.Now().Add(deadline))
	return c
}

func TestUDP(t *testing.T) {
	g := newGuest(t, nil)
	s := listenUDP(t)
	c := g.dialUDP(fmt.Sprintf("10.77.0.1:%d", s.LocalAddr().(*net.UDPAddr).Port))
	buf := make([]byte, 1<<17)
	for _, n := range []int{0, 1, 1400, 60000, 65507} {
		want := random(n)
		if _, err := c.Write(want); err != nil {
			t.Fatal(err)
		}
		k, from, err := s.ReadFromUDP(buf)
		if err != nil || !bytes.Equal(buf[:k], want) {
			t.Fatalf("%d bytes came as %d, %v", n, k, err)
		}
		if _, err := s.WriteToUDP(want, from); err != nil {
			t.Fatal(err)
		}
		if k, err = c.Read(buf); err != nil || !bytes.Equal(buf[:k], want) {
			t.Fatalf("%d bytes came back as %d, %v", n, k, err)
		}
	}
	if n := len(g.net.limits.udp); n != 1 {
		t.Errorf("%d flows for one", n)
	}
}

func TestUDPRefused(t *testing.T) {
	g := newGuest(t, nil)
	s := listenUDP(t)
	port := s.LocalAddr().(*net.UDPAddr).Port
	s.Close()
	c := g.dialUDP(fmt.Sprintf("10.77.0.1:%d", port))
	// (This stack, as a guest, does not wake up for it.)
	var err error
	eventually(t, "a refusal", func() bool { _, err = c.Write([]byte("x")); return err != nil })
	if !strings.Contains(err.Error(), "refused") {
		t.Errorf("%v; want refused", err)
	}
}

// TestUDPUnreachable is TestTCPUnreachable. This stack, as a guest, counts what it is told and does not pass it on.
func TestUDPUnreachable(t *testing.T) {
	g := newGuest(t, nil)
	told := g.stack.Stats().ICMP.V4.PacketsReceived.DstUnreachable
	if _, err := g.dialUDP("10.77.0.99:80").Write([]byte("x")); err != nil {
		t.Fatal(err)
	}
	eventually(t, "what is told", func() bool { return told.Value() == 1 })
}

// ping sends an echo request from the guest and returns what answers it.
func (g *guest) ping(to string) error {
	g.t.Helper()
	dst := netip.MustParseAddr(to)
	transport, request := icmp.ProtocolNumber4, []byte{8, 0, 0, 0, 0, 0, 0, 1, 'p'}
	if dst.Is6() {
		transport, request = icmp.ProtocolNumber6, []byte{128, 0, 0, 0, 0, 0, 0, 1, 'p'}
	}
	var queue waiter.Queue
	ep, err := g.stack.NewEndpoint(transport, proto(dst), &queue)
	if err != nil {
		g.t.Fatal(err)
	}
	defer ep.Close()
	if err := ep.Connect(tcpip.FullAddress{NIC: 1, Addr: address(dst).addr()}); err != nil {
		g.t.Fatal(err)
	}
	c := &guestConn{ep: ep}
	entry, ready := waiter.NewChannelEntry(waiter.ReadableEvents)
	queue.EventRegister(&entry)
	for end := time.After(deadline); ; {
		p := payload(request)
		if _, err := c.ep.Write(&p, tcpip.WriteOptions{}); err != nil {
			return errors.New(err.String())
		}
		select {
		case <-ready:
			return nil
		case <-time.After(time.Second): // it may be lost, if the link is full
		case <-end:
			return errors.New("no answer")
		}
	}
}

func TestPingGateway(t *testing.T) {
	g := newGuest(t, nil)
	for _, to := range []string{"10.77.0.1", "fd77::1"} {
		if err := g.ping(to); err != nil {
			t.Errorf("%s: %v", to, err)
		}
	}
}

// TestServeEnds: when the card goes, everything of the network ends, and with it the
// host's connections.
func TestServeEnds(t *testing.T) {
	pair := socketpair(t)
	n, err := New(testConfig(), pair[0])
	if err != nil {
		t.Fatal(err)
	}
	ended := make(chan error, 1)
	go func() { ended <- n.Serve(context.Background()) }()
	unix.Close(pair[1])
	select {
	case err := <-ended:
		if err != nil {
			t.Error(err)
		}
	case <-time.After(deadline):
		t.Error("Serve goes on")
	}
}

func TestDecide(t *testing.T) {
	rules := func(list ...string) (rs []policy.Rule) {
		for _, s := range list {
			r, err := policy.Parse(s)
			if err != nil {
				t.Fatal(err)
			}
			rs = append(rs, r)
		}
		return rs
	}
	type want map[string]verdict
	for name, tc := range map[string]struct {
		policy   policy.Policy
		loopback bool
		want     want
	}{
		"no rules": {loopback: true, want: want{
			"1.1.1.1:443": forward, "[2001:db8::1]:443": forward, "192.168.1.1:80": forward,
			"10.77.0.1:80": forward, "[fd77::1]:80": forward, "10.77.0.1:53": local, "10.77.0.1:0": local,
			"127.0.0.1:80": prohibit, "127.1.2.3:80": prohibit, "[::1]:80": prohibit, "0.0.0.0:80": prohibit, "0.1.2.3:80": prohibit, "[::]:80": prohibit,
			"169.254.169.254:80": prohibit, "[fe80::1]:80": prohibit, "224.0.0.251:5353": prohibit, "[ff02::fb]:5353": prohibit,
			"255.255.255.255:67": prohibit, "240.0.0.1:80": prohibit, "[::ffff:127.0.0.1]:80": silent,
			"10.77.0.3:80": silent, "[fd77::3]:80": silent,
			// Other clouds' metadata, and IPv6's forms of addresses that are refused.
			"100.100.100.200:80": prohibit, "168.63.129.16:80": prohibit, "192.0.0.192:80": prohibit, "[fd00:ec2::254]:80": prohibit, "[fd20:ce::254]:80": prohibit,
			"[64:ff9b::169.254.169.254]:80": prohibit, "[64:ff9b::127.0.0.1]:80": prohibit, "[64:ff9b:1::100.100.100.200]:80": prohibit, "[::127.0.0.1]:80": prohibit,
			"[64:ff9b::1.1.1.1]:443": forward,
		}},
		"no loopback": {want: want{"10.77.0.1:80": prohibit, "[fd77::1]:80": prohibit, "10.77.0.1:53": local, "1.1.1.1:80": forward}},
		"deny":        {loopback: true, policy: policy.Policy{Deny: rules("10.0.0.0/8", "*:25", "host.wsl2.internal")}, want: want{"10.1.2.3:80": prohibit, "[64:ff9b::10.1.2.3]:80": prohibit, "1.1.1.1:25": prohibit, "1.1.1.1:26": forward, "10.77.0.1:80": prohibit}},
		"allow": {loopback: true, policy: policy.Policy{Restricted: true, Allow: rules("192.0.2.0/24:443", "2001:db8::/32")},
			want: want{"192.0.2.7:443": forward, "[64:ff9b::192.0.2.7]:443": forward, "192.0.2.7:80": prohibit, "[2001:db8::9]:1": forward, "1.1.1.1:443": prohibit, "10.77.0.1:80": prohibit}},
		"nothing":             {loopback: true, policy: policy.Policy{Restricted: true}, want: want{"1.1.1.1:443": prohibit, "10.77.0.1:80": prohibit, "10.77.0.1:53": local}},
		"everything":          {loopback: true, policy: policy.Policy{Restricted: true, Allow: rules("*", "0.0.0.0/0", "::/0")}, want: want{"1.1.1.1:443": forward, "169.254.169.254:80": prohibit, "168.63.129.16:80": prohibit, "[fd00:ec2::254]:80": prohibit, "[64:ff9b::169.254.169.254]:80": prohibit, "127.0.0.1:1": prohibit}},
		"metadata by number":  {policy: policy.Policy{Restricted: true, Allow: rules("169.254.169.254:80")}, want: want{"169.254.169.254:80": forward, "169.254.169.254:81": prohibit, "169.254.1.1:80": prohibit}},
		"another cloud's":     {policy: policy.Policy{Restricted: true, Allow: rules("100.64.0.0/10", "fd00:ec2::254")}, want: want{"100.100.100.200:80": forward, "[fd00:ec2::254]:80": forward, "[fd00:ec2::23]:80": prohibit}},
		"metadata is denied":  {policy: policy.Policy{Restricted: true, Allow: rules("169.254.0.0/16"), Deny: rules("169.254.169.254")}, want: want{"169.254.169.254:80": prohibit, "169.254.1.1:80": forward}},
		"loopback by number":  {policy: policy.Policy{Restricted: true, Allow: rules("127.0.0.0/8", "::1")}, want: want{"127.0.0.1:80": prohibit, "[::1]:80": prohibit}},
		"host by its name":    {loopback: true, policy: policy.Policy{Restricted: true, Allow: rules("host.wsl2.internal:8080")}, want: want{"10.77.0.1:8080": forward, "10.77.0.1:8081": prohibit}},
		"host by its address": {loopback: true, policy: policy.Policy{Restricted: true, Allow: rules("10.77.0.1")}, want: want{"10.77.0.1:8080": forward}},
	} {
		c := testConfig()
		c.Policy, c.HostLoopback = tc.policy, tc.loopback
		n := &Network{cfg: c}
		n.dns = newResolver(n)
		for dst, v := range tc.want {
			if _, got := n.decide(netip.MustParseAddrPort(dst)); got != v {
				t.Errorf("%s: %s: verdict %d, want %d", name, dst, got, v)
			}
		}
	}
}

// TestProhibited: the guest is told at once, and the log says what it was.
func TestProhibited(t *testing.T) {
	g := newGuest(t, func(c *Config) { c.Policy.Restricted = true })
	for _, to := range []string{"192.0.2.9:443", "169.254.169.254:80"} {
		if _, err := g.dial(to); err == nil || !strings.Contains(err.Error(), "no route to host") {
			t.Errorf("%s: %v", to, err)
		}
		if !strings.Contains(g.log.all(), "refused: TCP to "+to) {
			t.Errorf("%s is not in the log: %s", to, g.log.all())
		}
	}
}

// write puts a file of the host's in a directory of the test's.
func write(t testing.TB, dir, name, text string) string {
	t.Helper()
	path := filepath.Join(dir, name)
	if err := os.WriteFile(path+".new", []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(path+".new", path); err != nil {
		t.Fatal(err)
	}
	return path
}
