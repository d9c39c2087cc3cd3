package network

import (
	"errors"
	"net"
	"os/exec"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/wsl2/wsl2/guest/netns"
	"github.com/wsl2/wsl2/internal/testsys/namespace"
	"github.com/wsl2/wsl2/internal/wire"
)

// TestConnect: of two namespaces behind a VM's, each reaches the other and what is behind the VM's card, by
// IPv4 and IPv6; and an end of one leaves no trace.
func TestConnect(t *testing.T) {
	if !namespace.Inside(t, unix.CLONE_NEWNET) {
		return
	}
	run := func(argv ...string) string {
		t.Helper()
		out, err := exec.Command(argv[0], argv[1:]...).CombinedOutput()
		if err != nil {
			t.Fatalf("%v: %v: %s", argv, err, out)
		}
		return string(out)
	}
	// namespace is one in which nothing runs but a sleeper.
	namespace := func() (*netns.Namespace, int) {
		t.Helper()
		cmd := exec.Command("sleep", "infinity")
		cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: unix.CLONE_NEWNET, Pdeathsig: unix.SIGKILL}
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { cmd.Process.Kill(); cmd.Wait() }) //nolint:errcheck // it is killed
		n, err := netns.Of(cmd.Process.Pid)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { n.Close() })
		if err := n.Do(Loopback); err != nil {
			t.Fatal(err)
		}
		return n, cmd.Process.Pid
	}

	// The host's end, with a card that takes frames for the guest's address, as usernet's does.
	gateway, pid := namespace()
	run("ip", "link", "add", "eth0", "mtu", "65520", "address", "02:00:00:00:00:02", "type", "veth", "peer", "name", "eth0", "mtu", "65520", "address", "02:00:00:00:00:02", "netns", strconv.Itoa(pid))
	vm := &wire.Network{Guest4: "10.77.0.2/24", Gateway4: "10.77.0.1", Guest6: "fd77::2/64", Gateway6: "fd77::1"}
	host := &wire.Network{Guest4: "10.77.0.1/24", Gateway4: "10.77.0.2", Guest6: "fd77::1/64", Gateway6: "fd77::2"}
	if err := Loopback(); err != nil {
		t.Fatal(err)
	}
	if err := configure(vm); err != nil {
		t.Fatal(err)
	}
	if err := gateway.Do(func() error { return configure(host) }); err != nil {
		t.Fatal(err)
	}
	one, pidOne := namespace()
	two, _ := namespace()
	for range 2 { // a second time, after the first has ended
		if err := Connect(one, vm, "10.77.0.3/24", "fd77::3/64"); err != nil {
			t.Fatal(err)
		}
		if err := Connect(two, vm, "10.77.0.4/24", "fd77::4/64"); err != nil {
			t.Fatal(err)
		}
		for from, to := range map[*netns.Namespace][]string{
			one:     {"10.77.0.1", "fd77::1", "10.77.0.2", "fd77::2", "10.77.0.4", "fd77::4"},
			two:     {"10.77.0.1", "fd77::1", "10.77.0.3", "fd77::3"},
			gateway: {"10.77.0.3", "fd77::4"},
		} {
			for _, ip := range to {
				err := from.Do(func() error {
					_, err := net.DialTimeout("tcp", net.JoinHostPort(ip, "9"), time.Minute)
					return err
				})
				if !errors.Is(err, unix.ECONNREFUSED) { // by who is there
					t.Errorf("%s: %v", ip, err)
				}
			}
		}
		// Nobody gets what one sends as another; what it sends as itself comes after that, and is the first to arrive.
		for _, c := range []struct{ own, forged, to string }{
			{"10.77.0.3", "10.77.0.4", "10.77.0.1"}, {"10.77.0.3", "10.77.0.4", "10.77.0.2"}, {"fd77::3", "fd77::4", "fd77::1"},
		} {
			at := map[string]*netns.Namespace{"10.77.0.1": gateway, "fd77::1": gateway}[c.to]
			var l net.PacketConn
			listen := func() (err error) { l, err = net.ListenPacket("udp", net.JoinHostPort(c.to, "9")); return err }
			do := func(f func() error) error { return f() } // in the VM's
			if at != nil {
				do = at.Do
			}
			if err := do(listen); err != nil {
				t.Fatal(err)
			}
			bits := map[bool]string{true: "/128", false: "/32"}[strings.Contains(c.own, ":")]
			run("nsenter", "-n", "-t", strconv.Itoa(pidOne), "ip", "addr", "replace", c.forged+bits, "dev", "lo", "nodad")
			for _, from := range []string{c.forged, c.own} {
				err := one.Do(func() error {
					d := net.Dialer{LocalAddr: &net.UDPAddr{IP: net.ParseIP(from)}}
					s, err := d.Dial("udp", net.JoinHostPort(c.to, "9"))
					if err != nil {
						return err
					}
					defer s.Close()
					_, err = s.Write([]byte(from))
					return err
				})
				if err != nil {
					t.Fatal(err)
				}
			}
			l.SetReadDeadline(time.Now().Add(time.Minute)) //nolint:errcheck // it can
			b := make([]byte, 64)
			if n, _, err := l.ReadFrom(b); err != nil || string(b[:n]) != c.own {
				t.Errorf("%s got %q first, %v; want %q", c.to, b[:n], err, c.own)
			}
			l.Close()
			run("nsenter", "-n", "-t", strconv.Itoa(pidOne), "ip", "addr", "del", c.forged+bits, "dev", "lo")
		}
		if out := run("nsenter", "-n", "-t", strconv.Itoa(pidOne), "ip", "link", "show", "eth0"); !strings.Contains(out, "mtu 65520") {
			t.Errorf("the card: %s", out)
		}
		for _, own := range []string{"10.77.0.3/24", "10.77.0.4/24", "10.77.0.4/24"} { // the last is not there any more
			if err := Disconnect(own); err != nil {
				t.Fatal(err)
			}
		}
		if out := run("ip", "link") + run("ip", "route") + run("ip", "-6", "route") + run("ip", "-6", "rule"); strings.Contains(out, "distro") || strings.Contains(out, "10.77.0.3") || strings.Contains(out, "fd77::3") {
			t.Errorf("a trace is left: %s", out)
		}
	}
	if err := Connect(one, vm, "10.77.0.3", ""); err == nil || !strings.Contains(err.Error(), "network's size") {
		t.Errorf("an address without a size: %v", err)
	}
}
