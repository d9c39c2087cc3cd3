package forward

import (
	"bytes"
	"crypto/sha256"
	"errors"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

const deadline = time.Minute

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// tcpPair is a TCP connection's two ends.
func tcpPair(t *testing.T) (client, server *net.TCPConn) {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	must(t, err)
	defer l.Close()
	c, err := net.Dial("tcp", l.Addr().String())
	must(t, err)
	s, err := l.Accept()
	must(t, err)
	return keep(t, c).(*net.TCPConn), keep(t, s).(*net.TCPConn)
}

// unixPair stands for a vsock connection's two ends.
func unixPair(t *testing.T) (a, b *net.UnixConn) {
	t.Helper()
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	must(t, err)
	var pair [2]*net.UnixConn
	for i, fd := range fds {
		f := os.NewFile(uintptr(fd), "pair")
		c, err := net.FileConn(f)
		f.Close()
		must(t, err)
		pair[i] = keep(t, c).(*net.UnixConn)
	}
	return pair[0], pair[1]
}

func keep(t *testing.T, c net.Conn) net.Conn {
	c.SetDeadline(time.Now().Add(deadline))
	t.Cleanup(func() { c.Close() })
	return c
}

// chain is a client, the host's relay, a vsock connection, the guest's relay, a server.
func chain(t *testing.T) (client, server *net.TCPConn, results <-chan error) {
	t.Helper()
	client, hostSide := tcpPair(t)
	guestSide, server := tcpPair(t)
	a, b := unixPair(t)
	var buffers Buffers
	errs := make(chan error, 2)
	go func() { errs <- buffers.Relay(hostSide, a) }()
	go func() { errs <- buffers.Relay(b, guestSide) }()
	return client, server, errs
}

// TestRelay passes much both ways at once, and each end of a direction by itself.
func TestRelay(t *testing.T) { relayed(t, func() {}) }

// TestRelayWithoutDescriptors: who may have no pipe copies.
func TestRelayWithoutDescriptors(t *testing.T) {
	var old unix.Rlimit
	must(t, unix.Getrlimit(unix.RLIMIT_NOFILE, &old))
	t.Cleanup(func() { must(t, unix.Setrlimit(unix.RLIMIT_NOFILE, &old)) })
	relayed(t, func() { must(t, unix.Setrlimit(unix.RLIMIT_NOFILE, &unix.Rlimit{Cur: 3, Max: old.Max})) })
}

// relayed carries a stream each way; before is called when all connections stand.
func relayed(t *testing.T, before func()) {
	client, server, results := chain(t)
	before()
	data := make([]byte, 16<<20)
	r := rand.NewChaCha8([32]byte{1})
	r.Read(data)
	sums := make(chan [32]byte, 2)
	for _, c := range []*net.TCPConn{client, server} {
		go func() {
			h := sha256.New()
			io.Copy(h, c)
			sums <- [32]byte(h.Sum(nil))
		}()
	}
	go func() {
		server.Write(data)
		server.CloseWrite()
	}()
	_, err := client.Write(data)
	must(t, err)
	must(t, client.CloseWrite())
	for range 2 {
		if got := <-sums; got != sha256.Sum256(data) {
			t.Errorf("what arrives is not what was sent")
		}
	}
	for range 2 {
		must(t, <-results)
	}
}

// TestHalfClose: after the client's end the server can still answer, and the other way round.
func TestHalfClose(t *testing.T) {
	for _, serverFirst := range []bool{false, true} {
		client, server, results := chain(t)
		first, second := client, server
		if serverFirst {
			first, second = server, client
		}
		first.Write([]byte("question"))
		must(t, first.CloseWrite())
		got, err := io.ReadAll(second)
		if err != nil || string(got) != "question" {
			t.Fatalf("%q, %v", got, err)
		}
		second.Write([]byte("answer"))
		must(t, second.CloseWrite())
		if got, err = io.ReadAll(first); err != nil || string(got) != "answer" {
			t.Fatalf("%q, %v", got, err)
		}
		for range 2 {
			must(t, <-results)
		}
	}
}

// TestAbort: a reset of one end is a broken connection at the other.
func TestAbort(t *testing.T) {
	for _, ofServer := range []bool{false, true} {
		client, server, results := chain(t)
		aborts, other := client, server
		if ofServer {
			aborts, other = server, client
		}
		aborts.Write([]byte("x"))
		_, err := io.ReadFull(other, make([]byte, 1))
		must(t, err)
		Abort(aborts)
		if _, err := other.Read(make([]byte, 1)); !errors.Is(err, unix.ECONNRESET) {
			t.Errorf("read: %v, want a reset", err)
		}
		for range 2 {
			if err := <-results; err == nil {
				t.Error("a relay takes it for an end")
			}
		}
	}
}

// TestSlowReader: who does not read stops the writer, and nothing is lost.
func TestSlowReader(t *testing.T) {
	client, server, results := chain(t)
	must(t, server.CloseWrite())
	// Until nothing more is taken.
	raw, err := client.SyscallConn()
	must(t, err)
	b := bytes.Repeat([]byte("slow"), 1<<16)
	sent := 0
	const limit = 256 << 20
	for full := false; !full; {
		must(t, raw.Write(func(fd uintptr) bool {
			n, err := unix.Write(int(fd), b)
			if err == unix.EAGAIN {
				// The relays may still be at it: a second without room is for good.
				n, _ := unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLOUT}}, 1000)
				full = n == 0
				return true
			}
			sent += max(n, 0)
			return true
		}))
		if sent > limit {
			t.Fatalf("%d bytes are stored for a peer that does not read", sent)
		}
	}
	must(t, client.CloseWrite())
	n, err := io.Copy(io.Discard, server)
	if err != nil || n != int64(sent) {
		t.Errorf("%d of %d bytes, %v", n, sent, err)
	}
	for range 2 {
		must(t, <-results)
	}
}

// TestDatagrams: each keeps its length, also of nothing and of the most there can be.
func TestDatagrams(t *testing.T) {
	echo, err := net.ListenPacket("udp", "127.0.0.1:0")
	must(t, err)
	defer echo.Close()
	go func() {
		buf := make([]byte, 1<<16)
		for {
			n, from, err := echo.ReadFrom(buf)
			if err != nil {
				return
			}
			echo.WriteTo(buf[:n], from)
		}
	}()
	udp, err := net.DialUDP("udp", nil, echo.LocalAddr().(*net.UDPAddr))
	must(t, err)
	host, guest := unixPair(t)
	var buffers Buffers
	done := make(chan error, 1)
	go func() { done <- buffers.RelayDatagrams(udp, guest) }()
	var got []byte
	for _, n := range []int{5, 0, 1, 1400, 65507, 2} {
		want := bytes.Repeat([]byte{byte(n)}, n)
		must(t, WriteDatagram(host, make([]byte, n+Overhead), want))
		if got, err = ReadDatagram(host, got[:0]); err != nil || !bytes.Equal(got, want) {
			t.Fatalf("%d bytes come back as %d, %v", n, len(got), err)
		}
	}
	host.Close()
	must(t, <-done)
}

// FuzzReadDatagram: whatever comes, it is a datagram or an error, and reads back as it was written.
func FuzzReadDatagram(f *testing.F) {
	f.Add([]byte{0, 0})
	f.Add([]byte{2, 0, 'a', 'b', 1, 0, 'c'})
	f.Add([]byte{0xff, 0xff})
	f.Add([]byte{3, 0, 1})
	f.Fuzz(func(t *testing.T, b []byte) {
		r := bytes.NewReader(b)
		var again bytes.Buffer
		for {
			d, err := ReadDatagram(r, nil)
			if err != nil {
				break
			}
			if len(d) > MaxDatagram {
				t.Fatalf("%d bytes", len(d))
			}
			must(t, WriteDatagram(&again, make([]byte, len(d)+Overhead), d))
		}
		if !bytes.HasPrefix(b, again.Bytes()) {
			t.Fatalf("%x was read as %x", b, again.Bytes())
		}
	})
}

// TestRelayUrgent: what follows TCP's urgent data arrives as well.
func TestRelayUrgent(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	pair := func() (near, far *net.TCPConn) {
		c, err := net.Dial("tcp", l.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		s, err := l.Accept()
		if err != nil {
			t.Fatal(err)
		}
		return c.(*net.TCPConn), s.(*net.TCPConn)
	}
	client, x := pair()
	y, server := pair()
	defer client.Close()
	defer server.Close()
	var b Buffers
	go b.Relay(x, y) //nolint:errcheck // ends with the connections
	raw, err := client.SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	client.Write([]byte("hello"))
	raw.Control(func(fd uintptr) { err = unix.Send(int(fd), []byte("!"), unix.MSG_OOB) })
	if err != nil {
		t.Fatal(err)
	}
	client.Write([]byte("world"))
	got := make([]byte, len("helloworld"))
	server.SetReadDeadline(time.Now().Add(time.Minute))
	if _, err := io.ReadFull(server, got); err != nil || string(got) != "helloworld" {
		t.Errorf("%q, %v", got, err)
	}
}
