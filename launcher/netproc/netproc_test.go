package netproc

import (
	"net/netip"
	"reflect"
	"testing"

	"github.com/wsl2/wsl2/vmm/usernet/policy"
)

// TestArgs: what the VM's process is told is what the network's process reads.
func TestArgs(t *testing.T) {
	rule := func(s string) policy.Rule {
		r, err := policy.Parse(s)
		if err != nil {
			t.Fatal(err)
		}
		return r
	}
	for _, c := range []Config{
		{},
		{HostLoopback: true, BytesPerSecond: 1 << 20, Names: "/run/a b/names"},
		{Policy: policy.Policy{Restricted: true}},
		{HostLoopback: true, Policy: policy.Policy{Restricted: true,
			Allow: []policy.Rule{rule("*.debian.org:443"), rule("192.0.2.0/24")}, Deny: []policy.Rule{rule("[2001:db8::1]:25"), rule("*")}}},
	} {
		got, err := Parse(c.Args())
		if err != nil || !reflect.DeepEqual(got, c) {
			t.Errorf("%q: %+v, %v; want %+v", c.Args(), got, err, c)
		}
	}
	for _, args := range [][]string{nil, {"x"}, {"net", "allow"}, {"net", "deny", "a b"}, {"net", "loopback"}, {"net", "names"}, {"net", "bytes-per-second", "x"}} {
		if c, err := Parse(args); err == nil {
			t.Errorf("%q is taken for %+v", args, c)
		}
	}
}

// TestOwn: the addresses are of the VM's network, and nobody else's.
func TestOwn(t *testing.T) {
	for _, n := range []int{FirstOwn, LastOwn} {
		ip4, ip6 := Own(n)
		for own, guest := range map[string]string{ip4: Guest4 + Bits4, ip6: Guest6 + Bits6} {
			if own == Guest4 || own == Guest6 || !netip.MustParsePrefix(guest).Contains(netip.MustParseAddr(own)) {
				t.Errorf("number %d is %s", n, own)
			}
		}
	}
}
