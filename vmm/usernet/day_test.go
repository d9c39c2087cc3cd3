//go:build icount

package usernet

import (
	"fmt"
	"io"
	"net"
	"os"
	"runtime"
	"slices"
	"testing"
	"time"

	"golang.org/x/net/dns/dnsmessage"
)

// TestDay: a day (an hour in `make test`) of a network that is used each minute, in every way, in the rig's virtual time:
// there a minute in which nothing happens is over at once. A connection that is silent all day is there in the evening, and nothing is left of
// all others: no descriptor, no goroutine, no memory.
func TestDay(t *testing.T) {
	hours := 1
	if os.Getenv("WSL2_SOAK") != "" {
		hours = 24
	}
	dir := t.TempDir()
	_, names := newServers(t, map[string]zone{"127.0.0.1": testZone, "127.0.0.3": nil})
	g := newGuest(t, func(c *Config) {
		c.DNS = DNSConfig{Port: uint16(names), Hosts: write(t, dir, "hosts", testHosts), ResolvConf: write(t, dir, "resolv.conf", "nameserver 127.0.0.3\nnameserver 127.0.0.1\n")}
	})
	port := listen(t, "127.0.0.1:0", echo)
	u := listenUDP(t)
	u.SetDeadline(time.Time{}) //nolint:errcheck // it can
	go func() {
		for b := make([]byte, 1<<16); ; {
			n, from, err := u.ReadFrom(b)
			if err != nil {
				return // closed
			}
			u.WriteTo(b[:n], from) //nolint:errcheck // it is missed
		}
	}()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	silent, err := g.dial(fmt.Sprintf("10.77.0.1:%d", l.Addr().(*net.TCPAddr).Port))
	if err != nil {
		t.Fatal(err)
	}
	defer silent.Close()
	host, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	defer host.Close()

	minute := func() {
		g.t.Helper()
		for range 3 {
			c, err := g.dial(fmt.Sprintf("10.77.0.1:%d", port))
			if err != nil {
				g.t.Fatal(err)
			}
			echoes(t, c, random(10_000))
		}
		if c, err := g.dial(fmt.Sprintf("10.77.0.1:%d", closedPort(g.t))); err == nil {
			c.Close()
			g.t.Error("a closed port is open")
		}
		for range 3 {
			c := g.dialUDP(fmt.Sprintf("10.77.0.1:%d", u.LocalAddr().(*net.UDPAddr).Port))
			if _, err := c.Write([]byte("x")); err != nil {
				g.t.Fatal(err)
			}
			if _, err := c.Read(make([]byte, 1)); err != nil {
				g.t.Fatal(err)
			}
		}
		for _, network := range []string{"udp", "tcp"} {
			if got := g.ask(network, "www.example.org.", dnsmessage.TypeA); !slices.Contains(got, "192.0.2.1") {
				g.t.Fatalf("%s: %q", network, got)
			}
		}
		for _, to := range []string{"10.77.0.1", "fd77::1"} {
			if err := g.ping(to); err != nil {
				g.t.Fatal(err)
			}
		}
	}
	type held struct{ flows, files, goroutines, bytes int }
	// settled is what is held when all flows have been forgotten.
	settled := func() (h held) {
		time.Sleep(5 * time.Minute)
		for range 2 { // what sync.Pool holds goes with the second
			runtime.GC()
		}
		var m runtime.MemStats
		runtime.ReadMemStats(&m)
		list, err := os.ReadDir("/proc/self/fd")
		if err != nil {
			t.Fatal(err)
		}
		return held{len(g.net.limits.tcp) + len(g.net.limits.udp) + len(g.net.limits.pings) + len(g.net.limits.questions), len(list), runtime.NumGoroutine(), int(m.HeapAlloc)}
	}
	hour := func(name string, minutes int) {
		t.Run(name, func(t *testing.T) {
			g.t = t
			for range minutes {
				minute()
				time.Sleep(time.Minute)
			}
		})
		g.t = t
	}
	hour("dawn", 10)
	morning := settled()
	for i := range hours {
		hour(fmt.Sprint(i), 60)
	}
	evening := settled()
	t.Logf("%+v, in the morning %+v", evening, morning)
	if evening.flows != morning.flows || evening.files > morning.files || evening.goroutines > morning.goroutines || evening.bytes > morning.bytes+1<<20 {
		t.Errorf("held in the evening: %+v, in the morning: %+v", evening, morning)
	}
	silent.SetDeadline(time.Now().Add(deadline)) //nolint:errcheck // it can
	if _, err := host.Write([]byte("x")); err != nil {
		t.Error(err)
	}
	if _, err := io.ReadFull(silent, make([]byte, 1)); err != nil {
		t.Errorf("the silent connection: %v", err)
	}
}
