package network

import (
	"os/exec"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/wsl2/wsl2/internal/testsys/namespace"
	"github.com/wsl2/wsl2/internal/wire"
)

// TestConfigure gives addresses to a card in a network namespace of its own, where the
// test starts itself again, and asks ip(8) what has become of it.
func TestConfigure(t *testing.T) {
	if !namespace.Inside(t, unix.CLONE_NEWNET) {
		return
	}
	ip := func(args string) string {
		t.Helper()
		out, err := exec.Command("ip", strings.Fields(args)...).CombinedOutput()
		if err != nil {
			t.Fatalf("ip %s: %v: %s", args, err, out)
		}
		return string(out)
	}
	ip("link add eth0 type veth peer name other")
	ip("link set other up")
	m := &wire.Network{Guest4: "10.77.0.2/24", Gateway4: "10.77.0.1", Guest6: "fd77::2/64", Gateway6: "fd77::1"}
	for range 2 { // a second time is no harm
		if err := configure(m); err != nil {
			t.Fatal(err)
		}
	}
	for args, want := range map[string]string{
		"addr show dev eth0": "inet 10.77.0.2/24", "-6 addr show dev eth0": "inet6 fd77::2/64",
		"route": "default via 10.77.0.1 dev eth0", "-6 route": "default via fd77::1 dev eth0", "link show eth0": "NOARP,UP",
	} {
		if out := ip(args); !strings.Contains(out, want) {
			t.Errorf("ip %s lacks %q: %s", args, want, out)
		}
	}
	if out := ip("-6 addr show dev eth0"); strings.Contains(out, "fe80") {
		t.Errorf("a link-local address: %s", out)
	}
	// Errors say which step it was.
	bad := *m
	bad.Gateway4 = "192.0.2.1"
	if err := configure(&bad); err == nil || !strings.Contains(err.Error(), "route to 192.0.2.1") {
		t.Errorf("a gateway that is not on the wire: %v", err)
	}
	bad = *m
	bad.Guest4 = "10.77.0.2"
	if err := configure(&bad); err == nil || !strings.Contains(err.Error(), "address of eth0") {
		t.Errorf("an address without a size: %v", err)
	}
}
