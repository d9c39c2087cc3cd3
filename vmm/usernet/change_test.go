package usernet

import (
	"bytes"
	"fmt"
	"io"
	"net"
	"os"
	"strings"
	"testing"
	"time"

	"golang.org/x/net/dns/dnsmessage"
	"golang.org/x/sys/unix"
	"gvisor.dev/gvisor/pkg/tcpip"

	"github.com/wsl2/wsl2/internal/testsys/namespace"
)

// rounds sends and gets back through an echo, again and again until its connection is closed; the channel has a
// value for each time.
func rounds(t *testing.T, c net.Conn) <-chan struct{} {
	t.Helper()
	c.SetDeadline(time.Time{}) //nolint:errcheck // the test's end closes it
	all, ended := make(chan struct{}), make(chan struct{})
	want := random(64 << 10)
	go func() {
		defer close(ended)
		got := make([]byte, len(want))
		for {
			sent := make(chan struct{})
			go func() {
				defer close(sent)
				c.Write(want) //nolint:errcheck // what does not come back is missed
			}()
			_, err := io.ReadFull(c, got)
			if err != nil || !bytes.Equal(got, want) {
				c.Close()
			}
			<-sent
			if err != nil {
				return
			}
			select {
			case all <- struct{}{}:
			case <-t.Context().Done():
				return
			}
		}
	}()
	t.Cleanup(func() {
		c.Close()
		<-ended
	})
	return all
}

// TestChanges: while connections are busy, the host's address, its network and its resolver change. What begins then
// uses the new ones at once, and what was there goes on as soon as its address is there again.
func TestChanges(t *testing.T) {
	if !namespace.Inside(t, unix.CLONE_NEWNET) {
		return
	}
	world(t)
	dir := t.TempDir()
	other := func(string, dnsmessage.Type) []dnsmessage.ResourceBody {
		return []dnsmessage.ResourceBody{&dnsmessage.AResource{A: [4]byte{192, 0, 2, 99}}}
	}
	_, port := newServers(t, map[string]zone{"127.0.0.1": testZone, "127.0.0.2": other})
	g := newGuest(t, func(c *Config) {
		c.DNS = DNSConfig{Port: uint16(port), Hosts: write(t, dir, "hosts", ""), ResolvConf: write(t, dir, "resolv.conf", "nameserver 127.0.0.1\n")}
	})
	var flows []<-chan struct{}
	for range 4 {
		for _, to := range []string{"198.51.100.1:7", "[2001:db8:1::1]:7"} {
			c, err := g.dial(to)
			if err != nil {
				t.Fatal(err)
			}
			flows = append(flows, rounds(t, c))
		}
	}
	// goOn waits until each flow has brought back two times what it sends: the second was sent after the call.
	goOn := func(what string) {
		t.Helper()
		for i, f := range flows {
			for range 2 {
				select {
				case <-f:
				case <-time.After(deadline):
					t.Fatalf("%s: flow %d stands still", what, i)
				}
			}
		}
	}
	// begin is what begins now.
	begin := func(what, address string) {
		t.Helper()
		for _, to := range []string{"198.51.100.1:7", "[2001:db8:1::1]:7"} {
			c, err := g.dial(to)
			if err != nil {
				t.Fatalf("%s: %v", what, err)
			}
			echoes(t, c, []byte(what))
		}
		if err := g.ping("198.51.100.1"); err != nil {
			t.Errorf("%s: ping: %v", what, err)
		}
		if got := g.ask("udp", "www.example.org.", dnsmessage.TypeA); got[0] != address {
			t.Errorf("%s: %q, want %s", what, got, address)
		}
	}
	goOn("at first")
	begin("at first", "192.0.2.1")

	// Another Wi-Fi: other addresses, another resolver.
	write(t, dir, "resolv.conf", "nameserver 127.0.0.2\n")
	run(t, "ip", "addr", "del", "198.51.100.2/24", "dev", "wire")
	run(t, "ip", "addr", "add", "198.51.100.3/24", "dev", "wire")
	begin("at another address", "192.0.2.99")
	run(t, "ip", "addr", "add", "198.51.100.2/24", "dev", "wire")
	goOn("with the address back")

	run(t, "ip", "link", "set", "wire", "down")
	if _, err := g.dial("198.51.100.1:7"); err == nil || !strings.Contains(err.Error(), "unreachable") {
		t.Errorf("while the network is down: %v", err)
	}
	run(t, "ip", "link", "set", "wire", "up")
	run(t, "ip", "addr", "replace", "2001:db8:1::2/64", "dev", "wire", "nodad") // which IPv6 loses with the link
	write(t, dir, "resolv.conf", "nameserver 127.0.0.1\n")
	begin("up again", "192.0.2.1")
	goOn("up again")
}

// TestHostPorts: the host has no port left to connect from. The guest is told at once, what it has goes on,
// other peers are reached, and what ends makes room.
func TestHostPorts(t *testing.T) {
	if !namespace.Inside(t, unix.CLONE_NEWNET) {
		return
	}
	world(t)
	const ports = 4
	if err := os.WriteFile("/proc/sys/net/ipv4/ip_local_port_range", fmt.Appendf(nil, "40000 %d", 40000+ports-1), 0); err != nil {
		t.Fatal(err)
	}
	g := newGuest(t, nil)
	var held []tcpip.Endpoint
	for range ports {
		held = append(held, g.endpoint("198.51.100.1:7"))
	}
	if c, err := g.dial("198.51.100.1:7"); err == nil || !strings.Contains(err.Error(), "unreachable") {
		t.Fatalf("one more: %v, %v; want unreachable", c, err)
	}
	other, err := g.dial("[2001:db8:1::1]:7")
	if err != nil {
		t.Fatalf("another peer: %v", err)
	}
	echoes(t, other, random(1<<20))
	held[0].Abort()
	var c net.Conn
	eventually(t, "room", func() bool { c, err = g.dial("198.51.100.1:7"); return err == nil })
	echoes(t, c, random(1<<20))
	if n := len(g.net.limits.tcp); n < ports-1 {
		t.Errorf("%d connections are left of %d", n, ports-1)
	}
}
