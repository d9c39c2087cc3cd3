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
		if out := run("nsenter", "-n", "-t", strconv.Itoa(pidOne), "ip", "link", "show", "eth0"); !strings.Contains(out, "mtu 65520") {
			t.Errorf("the card: %s", out)
		}
		for _, own := range []string{"10.77.0.3/24", "10.77.0.4/24", "10.77.0.4/24"} { // the last is not there any more
			if err := Disconnect(own); err != nil {
				t.Fatal(err)
			}
		}
		if out := run("ip", "link") + run("ip", "route") + run("ip", "-6", "route"); strings.Contains(out, "distro") || strings.Contains(out, "10.77.0.3") || strings.Contains(out, "fd77::3") {
			t.Errorf("a trace is left: %s", out)
		}
	}
	if err := Connect(one, vm, "10.77.0.3", ""); err == nil || !strings.Contains(err.Error(), "network's size") {
		t.Errorf("an address without a size: %v", err)
	}
}
