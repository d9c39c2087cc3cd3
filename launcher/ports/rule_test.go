package ports

import (
	"net/netip"
	"reflect"
	"strings"
	"testing"

	"github.com/wsl2/wsl2/internal/wire"
)

func rule(t testing.TB, text string, address string, allow ...string) Rule {
	t.Helper()
	r, err := ParseRule(text)
	if err == nil {
		err = r.Restrict(address, allow)
	}
	if err != nil {
		t.Fatal(err)
	}
	return r
}

func TestParseRule(t *testing.T) {
	for text, want := range map[string]Rule{
		"debian:80":          {Distro: "debian", Port: 80, HostPort: 80},
		"debian:80:8080":     {Distro: "debian", Port: 80, HostPort: 8080},
		"debian-12.1:53/udp": {Distro: "debian-12.1", UDP: true, Port: 53, HostPort: 53},
		"a:65535:1/tcp":      {Distro: "a", Port: 65535, HostPort: 1},
		"debian:53:5353/udp": {Distro: "debian", UDP: true, Port: 53, HostPort: 5353},
	} {
		got, err := ParseRule(text)
		if err != nil || !reflect.DeepEqual(got, want) {
			t.Errorf("%s: %+v, %v", text, got, err)
		}
		if back := got.String(); back != strings.TrimSuffix(text, "/tcp") {
			t.Errorf("%s becomes %s", text, back)
		}
	}
	for _, text := range []string{"", "debian", "debian:", "80", ":80", "debian:0", "debian:65536", "debian:80:", "debian:80:0", "debian:1:2:3",
		"debian:80/sctp", "debian:80/", "debian:-1", "debian:+80", "debian: 80", "debian:80/udp/tcp"} {
		if r, err := ParseRule(text); err == nil {
			t.Errorf("%q is %+v", text, r)
		}
	}
}

func TestParseRules(t *testing.T) {
	got, err := ParseRules(" debian:80:8080 allow=10.1.2.3/8,::1 address=192.168.1.5 ; a:53/udp;")
	want := []Rule{rule(t, "debian:80:8080", "192.168.1.5", "10.0.0.0/8", "::1/128"), rule(t, "a:53/udp", "")}
	if err != nil || !reflect.DeepEqual(got, want) {
		t.Errorf("%+v, %v", got, err)
	}
	for _, text := range []string{"debian", "debian:80 allow", "debian:80 allow=", "debian:80 from=1.2.3.4", "debian:80 address=host", "debian:80 address=fe80::1%eth0", "debian:80 allow=10.0.0.0/33"} {
		if got, err := ParseRules(text); err == nil {
			t.Errorf("%q is %+v", text, got)
		}
	}
}

func TestAllows(t *testing.T) {
	some := rule(t, "a:1", "", "10.0.0.0/8", "fd00::/64", "192.168.1.5")
	for peer, want := range map[string]bool{
		"10.255.0.1": true, "::ffff:10.1.1.1": true, "192.168.1.5": true, "fd00::2": true, "fd00::2%eth0": true,
		"11.0.0.1": false, "192.168.1.6": false, "fd00:1::2": false, "::ffff:11.0.0.1": false,
	} {
		if got := some.allows(netip.MustParseAddr(peer)); got != want {
			t.Errorf("%s: %v", peer, got)
		}
		if !(Rule{}).allows(netip.MustParseAddr(peer)) {
			t.Errorf("%s is refused although none is", peer)
		}
	}
}

func TestParseRanges(t *testing.T) {
	got, err := ParseRanges("5432, 6000-6010\t1")
	if want := []Range{{5432, 5432}, {6000, 6010}, {1, 1}}; err != nil || !reflect.DeepEqual(got, want) {
		t.Errorf("%v, %v", got, err)
	}
	for _, text := range []string{"x", "0", "5-4", "1-65536", "-5", "5-"} {
		if got, err := ParseRanges(text); err == nil {
			t.Errorf("%q is %v", text, got)
		}
	}
}

// TestPlan: of what a guest says is open the host has what it may, each once.
func TestPlan(t *testing.T) {
	port := func(distro string, n uint16) wire.Port { return wire.Port{Distro: distro, V4: true, Number: n} }
	published := rule(t, "Debian:5432", "")
	policy := Policy{Localhost: true, Ignore: []Range{{5000, 6000}}, Rules: []Rule{published, rule(t, "debian:8080/udp", "")}}
	got := Plan([]wire.Port{
		port("debian", 8080), port("debian", 8080), port("debian", 22),
		port("debian", 5000), port("debian", 5432), // ignored; the second is published
		port("gone", 80), port("debian", 0), {Distro: "debian", Number: 81}, // not running, no port, nowhere
		{Distro: "debian", UDP: true, V6: true, Number: 22},
	}, map[string]uint32{"debian": 7}, policy)
	want := []Forward{
		{Distro: "debian", Session: 7, Port: 22, V4: true, Loopback: true},
		{Distro: "debian", Session: 7, UDP: true, Port: 22, V6: true, Loopback: true},
		{Distro: "debian", Session: 7, Port: 5432, V4: true, Rules: []Rule{published}},
		{Distro: "debian", Session: 7, Port: 8080, V4: true, Loopback: true},
	}
	if !reflect.DeepEqual(got, want) {
		t.Errorf("%+v\nwant %+v", got, want)
	}
	policy.Localhost = false
	if got := Plan([]wire.Port{port("debian", 22), port("debian", 5432)}, map[string]uint32{"debian": 7}, policy); len(got) != 1 || got[0].Port != 5432 || got[0].Loopback {
		t.Errorf("without localhostForwarding: %+v", got)
	}
	var many []wire.Port
	for i := range wire.MaxPorts {
		many = append(many, port("debian", uint16(i+1)))
	}
	if got := Plan(many, map[string]uint32{"debian": 7}, Policy{Localhost: true}); len(got) != maxForwards {
		t.Errorf("%d ports of one VM", len(got))
	}
}

// FuzzParseRules: what is read says the same when it is written and read again.
func FuzzParseRules(f *testing.F) {
	for _, s := range []string{"debian:80:8080 allow=10.0.0.0/8,::1 address=192.168.1.5; a:53/udp", ";;", "a:1 address=::ffff:1.2.3.4", "a:1 allow=1.2.3.4"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, text string) {
		list, err := ParseRules(text)
		if err != nil {
			return
		}
		for _, r := range list {
			again, err := ParseRule(r.String())
			if err != nil || again.Distro != r.Distro || !again.Same(r) || again.HostPort != r.HostPort || r.Port == 0 || r.HostPort == 0 {
				t.Fatalf("%q: %+v is %q, which is %+v, %v", text, r, r, again, err)
			}
		}
	})
}
