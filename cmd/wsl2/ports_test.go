//go:build e2e || kvm

package main_test

import (
	"bytes"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/wsl2/wsl2/internal/testsys"
)

// What the two rings share to test ports of distros on the host.

// serveArg makes this test's binary a server (package serve).
const serveArg = "serve"

// installServer puts the server where distros have it.
func installServer(h *testsys.Host) {
	h.TB.Helper()
	exe, err := os.Executable()
	testsys.Must(h.TB, err)
	from, err := os.Open(exe)
	testsys.Must(h.TB, err)
	defer from.Close()
	to, err := os.OpenFile(h.Path("home", "server"), os.O_WRONLY|os.O_CREATE, 0o755)
	testsys.Must(h.TB, err)
	_, err = io.Copy(to, from)
	testsys.Must(h.TB, errors.Join(err, to.Close()))
}

// serving starts the server in the small distro and waits until its ports are open there.
func serving(h *testsys.Host, what ...string) *testsys.Live {
	h.TB.Helper()
	l := h.Start(append([]string{"-d", "small", "-e", "/mnt/host/server", serveArg}, what...)...)
	l.Expect("ready\n")
	return l
}

// portList is what `wsl2 ports --json` says.
type portList struct {
	Ports []struct {
		Distro, Proto, Note string
		Port                int
		Host                []string
		Published           bool
	}
}

// String lists the ports that the host listens for.
func (p portList) String() string {
	var all []string
	for _, x := range p.Ports {
		all = append(all, fmt.Sprintf("%s %d/%s %v", x.Distro, x.Port, x.Proto, x.Host))
	}
	return strings.Join(all, "; ")
}

// has tells whether the host listens for all these ports.
func (p portList) has(ports ...int) bool {
	for _, want := range ports {
		found := false
		for _, x := range p.Ports {
			found = found || x.Port == want && len(x.Host) > 0
		}
		if !found {
			return false
		}
	}
	return true
}

// portEvents are the lists of `wsl2 ports --follow`.
type portEvents struct {
	h    *testsys.Host
	json *json.Decoder
	last portList
}

func followPorts(h *testsys.Host) *portEvents {
	h.TB.Helper()
	return &portEvents{h: h, json: json.NewDecoder(h.Start("ports", "--follow", "--json").Stdout)}
}

// until waits for a list that is as wanted.
func (e *portEvents) until(what string, wanted func(portList) bool) portList {
	e.h.TB.Helper()
	for {
		var p portList
		if err := e.json.Decode(&p); err != nil {
			e.h.TB.Fatalf("waiting for %s: %v; last: %v", what, err, e.last)
		}
		if e.last = p; wanted(p) {
			return p
		}
	}
}

// hostPorts are ports of this machine that are free, and that neither it nor a guest gives
// out by itself.
func hostPorts(t *testing.T, n int) (list []int) {
	t.Helper()
	for p := 20000 + os.Getpid()%5000; len(list) < n; p++ {
		if p > 32000 {
			t.Fatal("no free ports")
		}
		free := true
		for _, a := range []string{"127.0.0.1", "0.0.0.0", "::1", "::"} {
			at := net.JoinHostPort(a, fmt.Sprint(p))
			l, err := net.Listen("tcp", at)
			if err == nil {
				l.Close()
			}
			u, uerr := net.ListenPacket("udp", at)
			if uerr == nil {
				u.Close()
			}
			free = free && err == nil && uerr == nil
		}
		if free {
			list = append(list, p)
		}
	}
	return list
}

// connect dials an address of the host.
func connect(t *testing.T, network, address string, port int) net.Conn {
	t.Helper()
	c, err := net.DialTimeout(network, net.JoinHostPort(address, fmt.Sprint(port)), testsys.Deadline)
	testsys.Must(t, err)
	c.SetDeadline(time.Now().Add(testsys.Deadline))
	t.Cleanup(func() { c.Close() })
	return c
}

// closedPort fails the test unless nobody listens.
func closedPort(t *testing.T, address string, port int) {
	t.Helper()
	c, err := net.DialTimeout("tcp", net.JoinHostPort(address, fmt.Sprint(port)), testsys.Deadline)
	if !errors.Is(err, unix.ECONNREFUSED) {
		t.Errorf("port %d of %s: %v, want it refused", port, address, err)
	}
	if err == nil {
		c.Close()
	}
}

// echo sends data and ends, and wants it back, and an end.
func echo(t *testing.T, c net.Conn, data []byte) {
	t.Helper()
	sum := make(chan [32]byte, 1)
	go func() {
		hash := sha256.New()
		io.Copy(hash, c)
		sum <- [32]byte(hash.Sum(nil))
	}()
	_, err := c.Write(data)
	testsys.Must(t, err)
	testsys.Must(t, c.(*net.TCPConn).CloseWrite())
	if got := <-sum; got != sha256.Sum256(data) {
		t.Errorf("%v: %d bytes do not come back", c.RemoteAddr(), len(data))
	}
	c.Close()
}

// ping sends a datagram and wants it back.
func ping(t *testing.T, c net.Conn, data []byte) {
	t.Helper()
	buf := make([]byte, 1<<16)
	_, err := c.Write(data)
	testsys.Must(t, err)
	n, err := c.Read(buf)
	if err != nil || !bytes.Equal(buf[:n], data) {
		t.Errorf("%v: %d bytes of %d come back, %v", c.RemoteAddr(), n, len(data), err)
	}
}

// many opens connections that are there at the same time, each with its own answer.
func many(t *testing.T, port, n int) {
	t.Helper()
	conns := make([]net.Conn, n)
	for i := range conns {
		conns[i] = connect(t, "tcp", "127.0.0.1", port)
		fmt.Fprintf(conns[i], "%04d", i)
	}
	for i, c := range conns {
		b := make([]byte, 4)
		if _, err := io.ReadFull(c, b); err != nil || string(b) != fmt.Sprintf("%04d", i) {
			t.Fatalf("connection %d of %d: %q, %v", i, n, b, err)
		}
	}
	for _, c := range conns {
		c.Close()
	}
}
