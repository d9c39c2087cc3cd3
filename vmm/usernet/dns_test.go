package usernet

import (
	"encoding/binary"
	"io"
	"strconv"

	"net"
	"net/netip"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"testing"

	"golang.org/x/net/dns/dnsmessage"

	"github.com/wsl2/wsl2/vmm/usernet/policy"
)

// zone says what a server answers for a question: records, or nil for NXDOMAIN. A name that
// begins with "silent" gets no answer.
type zone = func(name string, typ dnsmessage.Type) []dnsmessage.ResourceBody

// server is a DNS server of the host.
type server struct{ asked atomic.Int64 }

// newServers starts servers, each on UDP and TCP of its address, all at one port; a nil zone is
// one that never answers.
func newServers(t *testing.T, zones map[string]zone) (servers map[string]*server, port int) {
	t.Helper()
	var open []io.Closer
	try := func() (err error) {
		port, open = 0, nil
		for ip := range zones {
			l, err := net.Listen("tcp", net.JoinHostPort(ip, strconv.Itoa(port)))
			if err != nil {
				return err
			}
			open = append(open, l)
			port = l.Addr().(*net.TCPAddr).Port
			u, err := net.ListenPacket("udp", net.JoinHostPort(ip, strconv.Itoa(port)))
			if err != nil {
				return err
			}
			open = append(open, u)
		}
		return nil
	}
	var err error
	for range 100 { // somebody else may have one of the ports
		if err = try(); err == nil {
			break
		}
		for _, c := range open {
			c.Close()
		}
	}
	if err != nil {
		t.Fatal(err)
	}
	servers = map[string]*server{}
	for i := 0; i < len(open); i += 2 {
		l, u := open[i].(net.Listener), open[i+1].(net.PacketConn)
		ip := l.Addr().(*net.TCPAddr).IP.String()
		s := &server{}
		servers[ip] = s
		s.serve(t, l, u, zones[ip])
	}
	return servers, port
}

func (s *server) serve(t *testing.T, l net.Listener, u net.PacketConn, zone zone) {
	t.Cleanup(func() { l.Close(); u.Close() })
	if zone == nil {
		return
	}
	go func() {
		buf := make([]byte, 4096)
		for {
			n, from, err := u.ReadFrom(buf)
			if err != nil {
				return
			}
			if a := s.answer(buf[:n], zone); a != nil {
				u.WriteTo(a, from) //nolint:errcheck // it is missed
			}
		}
	}()
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			go func() {
				defer c.Close()
				buf := make([]byte, 4096)
				n, err := readMessage(c, buf, true)
				if err != nil {
					return
				}
				a := s.answer(buf[:n], zone)
				c.Write(append(binary.BigEndian.AppendUint16(nil, uint16(len(a))), a...)) //nolint:errcheck // it is missed
			}()
		}
	}()
}

func (s *server) answer(message []byte, zone zone) []byte {
	h, q, err := parseQuestion(message)
	if err != nil {
		return nil
	}
	s.asked.Add(1)
	name := canonical(q.Name)
	if strings.HasPrefix(name, "silent") {
		return nil
	}
	bodies := zone(name, q.Type)
	code := dnsmessage.RCodeSuccess
	if bodies == nil {
		code = dnsmessage.RCodeNameError
	}
	var rs []dnsmessage.Resource
	for _, b := range bodies {
		rs = append(rs, dnsmessage.Resource{Header: dnsmessage.ResourceHeader{Name: q.Name, Class: dnsmessage.ClassINET, TTL: 60}, Body: b})
	}
	return reply(h, q, code, rs)
}

// ask sends a question from the guest; the answer is its records, or its code.
func (g *guest) ask(network, name string, typ dnsmessage.Type) []string {
	g.t.Helper()
	q := dnsmessage.Question{Name: dnsmessage.MustNewName(name), Type: typ, Class: dnsmessage.ClassINET}
	m := dnsmessage.Message{Header: dnsmessage.Header{ID: 4711, RecursionDesired: true}, Questions: []dnsmessage.Question{q}}
	query, err := m.Pack()
	if err != nil {
		g.t.Fatal(err)
	}
	var c net.Conn
	if network == "tcp" {
		if c, err = g.dial("10.77.0.1:53"); err != nil {
			g.t.Fatal(err)
		}
		defer c.Close()
		query = append(binary.BigEndian.AppendUint16(nil, uint16(len(query))), query...)
	} else {
		c = g.dialUDP("10.77.0.1:53")
	}
	if _, err := c.Write(query); err != nil {
		g.t.Fatal(err)
	}
	buf := make([]byte, maxMessage)
	n, err := readMessage(c, buf, network == "tcp")
	if err != nil {
		g.t.Fatalf("%s: %v", name, err)
	}
	if err := m.Unpack(buf[:n]); err != nil {
		g.t.Fatal(err)
	}
	if m.ID != 4711 || !m.Response || len(m.Questions) != 1 || m.Questions[0] != q {
		g.t.Errorf("%s: answer to something else: %+v", name, m)
	}
	if m.RCode != dnsmessage.RCodeSuccess {
		return []string{m.RCode.String()}
	}
	list := []string{}
	for _, a := range m.Answers {
		switch b := a.Body.(type) {
		case *dnsmessage.AResource:
			list = append(list, netip.AddrFrom4(b.A).String())
		case *dnsmessage.AAAAResource:
			list = append(list, netip.AddrFrom16(b.AAAA).String())
		case *dnsmessage.PTRResource:
			list = append(list, b.PTR.String())
		case *dnsmessage.TXTResource:
			list = append(list, strings.Join(b.TXT, ""))
		case *dnsmessage.CNAMEResource:
			list = append(list, "= "+b.CNAME.String())
		}
	}
	return list
}

func testZone(name string, typ dnsmessage.Type) []dnsmessage.ResourceBody {
	switch {
	case name == "www.example.org" && typ == dnsmessage.TypeA, name == "intra.corp.example" && typ == dnsmessage.TypeA:
		return []dnsmessage.ResourceBody{&dnsmessage.AResource{A: [4]byte{192, 0, 2, 1}}, &dnsmessage.AResource{A: [4]byte{192, 0, 2, 2}}}
	case name == "www.example.org" && typ == dnsmessage.TypeTXT:
		return []dnsmessage.ResourceBody{&dnsmessage.TXTResource{TXT: []string{"text"}}}
	case name == "www.example.org", name == "intra.corp.example":
		return []dnsmessage.ResourceBody{}
	}
	return nil
}

const testHosts = `127.0.0.1 localhost
::1 localhost
127.0.1.1 thishost # its own name
192.0.2.77 printer printer.lan
2001:db8::77 printer
`

func TestDNS(t *testing.T) {
	dir := t.TempDir()
	servers, port := newServers(t, map[string]zone{"127.0.0.1": testZone})
	g := newGuest(t, func(c *Config) {
		c.DNS = DNSConfig{Port: uint16(port), Hosts: write(t, dir, "hosts", testHosts), Names: write(t, dir, "names", "10.77.0.9 Debian\n"),
			ResolvConf: write(t, dir, "resolv.conf", "# comment\nnameserver 127.0.0.1\nsearch nowhere.example corp.example.\n")}
	})
	a, aaaa := dnsmessage.TypeA, dnsmessage.TypeAAAA
	for _, network := range []string{"udp", "tcp"} {
		for _, tc := range []struct {
			name string
			typ  dnsmessage.Type
			want []string
		}{
			{"host.wsl2.internal.", a, []string{"10.77.0.1"}},
			{"Host.WSL2.internal.", aaaa, []string{}},
			{"nobody.wsl2.internal.", a, []string{"RCodeNameError"}},
			{"debian.WSL2.internal.", a, []string{"10.77.0.9"}},
			{"debian.wsl2.internal.", aaaa, []string{}},
			{"9.0.77.10.in-addr.arpa.", dnsmessage.TypePTR, []string{"debian.wsl2.internal."}},
			{"1.0.77.10.in-addr.arpa.", dnsmessage.TypePTR, []string{"host.wsl2.internal."}},
			{"localhost.", a, []string{"127.0.0.1"}},
			{"localhost.", aaaa, []string{"::1"}},
			{"thishost.", a, []string{"10.77.0.1"}},
			{"printer.lan.", a, []string{"192.0.2.77"}},
			{"PRINTER.", aaaa, []string{"2001:db8::77"}},
			{"77.2.0.192.in-addr.arpa.", dnsmessage.TypePTR, []string{"printer.", "printer.lan."}},
			{"7.7.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.8.b.d.0.1.0.0.2.ip6.arpa.", dnsmessage.TypePTR, []string{"printer."}},
			{"www.example.org.", a, []string{"192.0.2.1", "192.0.2.2"}},
			{"www.example.org.", aaaa, []string{}},
			{"www.example.org.", dnsmessage.TypeTXT, []string{"text"}},
			{"nothing.example.org.", a, []string{"RCodeNameError"}},
			{"intra.", a, []string{"= intra.corp.example.", "192.0.2.1", "192.0.2.2"}},
		} {
			if got := g.ask(network, tc.name, tc.typ); !slices.Equal(got, tc.want) {
				t.Errorf("%s, %s %v: %q, want %q", network, tc.name, tc.typ, got, tc.want)
			}
		}
	}
	if n := len(g.net.limits.udp); n != 0 {
		t.Errorf("questions hold %d flows", n)
	}
	if servers["127.0.0.1"].asked.Load() == 0 {
		t.Error("the host's server was not asked")
	}
}

// TestDNSFollows: what the host's files say is followed at once.
func TestDNSFollows(t *testing.T) {
	dir := t.TempDir()
	other := func(string, dnsmessage.Type) []dnsmessage.ResourceBody {
		return []dnsmessage.ResourceBody{&dnsmessage.AResource{A: [4]byte{192, 0, 2, 99}}}
	}
	_, port := newServers(t, map[string]zone{"127.0.0.1": testZone, "127.0.0.2": other})
	g := newGuest(t, func(c *Config) {
		c.DNS = DNSConfig{Port: uint16(port), Hosts: write(t, dir, "hosts", ""), ResolvConf: write(t, dir, "resolv.conf", "nameserver 127.0.0.1\n"), Names: filepath.Join(dir, "names")}
	})
	askFor := func(name, want string) {
		t.Helper()
		if got := g.ask("udp", name, dnsmessage.TypeA); got[0] != want {
			t.Errorf("%q, want %s", got, want)
		}
	}
	ask := func(want string) { t.Helper(); askFor("www.example.org.", want) }
	askFor("debian.wsl2.internal.", "RCodeNameError")
	write(t, dir, "names", "10.77.0.2 debian\n")
	askFor("debian.wsl2.internal.", "10.77.0.2")
	ask("192.0.2.1")
	write(t, dir, "resolv.conf", "nameserver 127.0.0.2\n") // a VPN comes up
	ask("192.0.2.99")
	write(t, dir, "hosts", "192.0.2.55 www.example.org\n")
	ask("192.0.2.55")
}

// TestDNSSilent: a server that is silent, and one that is not there, cost a second, not
// the answer; if nobody answers, the guest learns that.
func TestDNSSilent(t *testing.T) {
	dir := t.TempDir()
	_, port := newServers(t, map[string]zone{"127.0.0.1": testZone, "127.0.0.3": nil})
	g := newGuest(t, func(c *Config) {
		c.DNS = DNSConfig{Port: uint16(port), ResolvConf: write(t, dir, "resolv.conf", "nameserver 127.0.0.4\nnameserver 127.0.0.3\nnameserver 127.0.0.1\n")}
	})
	if got := g.ask("udp", "www.example.org.", dnsmessage.TypeA); got[0] != "192.0.2.1" {
		t.Errorf("%q", got)
	}
	write(t, dir, "resolv.conf", "nameserver 127.0.0.4\n")
	if got := g.ask("udp", "www.example.org.", dnsmessage.TypeA); got[0] != "RCodeServerFailure" {
		t.Errorf("%q", got)
	}
}

// TestDNSRules: names are refused by name, and addresses by the names that led to them.
func TestDNSRules(t *testing.T) {
	dir := t.TempDir()
	_, port := newServers(t, map[string]zone{"127.0.0.1": testZone})
	g := newGuest(t, func(c *Config) {
		r, err := policy.Parse("*.example.org:443")
		if err != nil {
			t.Fatal(err)
		}
		c.Policy = policy.Policy{Restricted: true, Allow: []policy.Rule{r}}
		c.DNS = DNSConfig{Port: uint16(port), Hosts: write(t, dir, "hosts", ""), ResolvConf: write(t, dir, "resolv.conf", "nameserver 127.0.0.1\n")}
	})
	dst := netip.MustParseAddrPort("192.0.2.1:443")
	if _, v := g.net.decide(dst); v != prohibit {
		t.Errorf("before its name is known: %d", v)
	}
	if got := g.ask("udp", "www.example.net.", dnsmessage.TypeA); got[0] != "RCodeRefused" {
		t.Errorf("another name: %q", got)
	}
	if got := g.ask("udp", "WWW.example.org.", dnsmessage.TypeA); got[0] != "192.0.2.1" {
		t.Errorf("an allowed name: %q", got)
	}
	if _, v := g.net.decide(dst); v != forward {
		t.Errorf("by its name: %d", v)
	}
	if _, v := g.net.decide(netip.AddrPortFrom(dst.Addr(), 80)); v != prohibit {
		t.Errorf("at another port: %d", v)
	}
	if log := g.log.all(); !strings.Contains(log, `refused: DNS for "www.example.net"`) {
		t.Errorf("logged: %s", log)
	}
}

// TestDNSRulesOfDomains: a word that the host's search domains complete is judged as what it became, and an
// alias for what is forbidden leads nowhere; nor does one for what is allowed allow anything.
func TestDNSRulesOfDomains(t *testing.T) {
	dir := t.TempDir()
	answers := func(name string, typ dnsmessage.Type) []dnsmessage.ResourceBody {
		a := func(last byte) dnsmessage.ResourceBody { return &dnsmessage.AResource{A: [4]byte{192, 0, 2, last}} }
		alias := func(to string) dnsmessage.ResourceBody {
			return &dnsmessage.CNAMEResource{CNAME: dnsmessage.MustNewName(to)}
		}
		switch name {
		case "intra.corp.example":
			return []dnsmessage.ResourceBody{a(1)}
		case "secret.corp.example":
			return []dnsmessage.ResourceBody{a(2)}
		case "to-secret.example":
			return []dnsmessage.ResourceBody{alias("Secret.corp.example."), a(2)}
		case "to-intra.example":
			return []dnsmessage.ResourceBody{alias("intra.corp.example."), a(3)}
		}
		return nil
	}
	_, port := newServers(t, map[string]zone{"127.0.0.1": answers})
	rules := func(text ...string) (list []policy.Rule) {
		for _, s := range text {
			r, err := policy.Parse(s)
			if err != nil {
				t.Fatal(err)
			}
			list = append(list, r)
		}
		return list
	}
	g := newGuest(t, func(c *Config) {
		c.Policy = policy.Policy{Restricted: true, Allow: rules("*.corp.example", "*.example:443"), Deny: rules("secret.corp.example")}
		c.DNS = DNSConfig{Port: uint16(port), Hosts: write(t, dir, "hosts", ""), ResolvConf: write(t, dir, "resolv.conf", "nameserver 127.0.0.1\nsearch corp.example\n")}
	})
	for _, tc := range []struct {
		name, first string
		dst         string
		want        verdict
	}{
		{"intra.", "= intra.corp.example.", "192.0.2.1:22", forward},
		{"secret.", "RCodeRefused", "192.0.2.2:443", prohibit},
		{"to-secret.example.", "= Secret.corp.example.", "192.0.2.2:443", prohibit},
		{"to-intra.example.", "= intra.corp.example.", "192.0.2.3:443", forward},
		{"to-intra.example.", "= intra.corp.example.", "192.0.2.3:22", prohibit},
	} {
		if got := g.ask("udp", tc.name, dnsmessage.TypeA); len(got) == 0 || got[0] != tc.first {
			t.Errorf("%s: %q, want %s", tc.name, got, tc.first)
		}
		if _, v := g.net.decide(netip.MustParseAddrPort(tc.dst)); v != tc.want {
			t.Errorf("%s: %s: verdict %d, want %d", tc.name, tc.dst, v, tc.want)
		}
	}
}

// TestDNSOver6: the gateway's other address answers as well.
func TestDNSOver6(t *testing.T) {
	g := newGuest(t, nil)
	query, err := (&dnsmessage.Message{Questions: []dnsmessage.Question{{Name: dnsmessage.MustNewName("host.wsl2.internal."), Type: dnsmessage.TypeA, Class: dnsmessage.ClassINET}}}).Pack()
	if err != nil {
		t.Fatal(err)
	}
	c := g.dialUDP("[fd77::1]:53")
	if _, err := c.Write(query); err != nil {
		t.Fatal(err)
	}
	var m dnsmessage.Message
	buf := make([]byte, maxMessage)
	if n, err := c.Read(buf); err != nil || m.Unpack(buf[:n]) != nil || len(m.Answers) != 1 {
		t.Errorf("%v, %+v", err, m)
	}
}

// TestDNSStreamBounds: a connection for questions is one of the guest's, and a question of absurd size
// ends it.
func TestDNSStreamBounds(t *testing.T) {
	g := newGuest(t, nil)
	others := cap(g.net.limits.tcp) - 1
	for range others {
		g.net.limits.tcp <- struct{}{}
	}
	c, err := g.dial("10.77.0.1:53")
	if err != nil {
		t.Fatal(err)
	}
	if c2, err := g.dial("10.77.0.1:53"); err == nil {
		c2.Close()
		t.Error("one more than may be")
	}
	if _, err := c.Write([]byte{0xff, 0xff}); err != nil {
		t.Fatal(err)
	}
	if _, err := c.Read(make([]byte, 1)); err == nil {
		t.Error("there is an answer")
	}
	c.Close()
	eventually(t, "the connection ends", func() bool { return len(g.net.limits.tcp) == others })
}

// TestDNSStream: several questions on a connection, and one that ends in the middle.
func TestDNSStream(t *testing.T) {
	g := newGuest(t, nil)
	c, err := g.dial("10.77.0.1:53")
	if err != nil {
		t.Fatal(err)
	}
	q := dnsmessage.Message{Questions: []dnsmessage.Question{{Name: dnsmessage.MustNewName("host.wsl2.internal."), Type: dnsmessage.TypeA, Class: dnsmessage.ClassINET}}}
	query, _ := q.Pack()
	framed := append(binary.BigEndian.AppendUint16(nil, uint16(len(query))), query...)
	for range 3 {
		if _, err := c.Write(framed); err != nil {
			t.Fatal(err)
		}
		if n, err := readMessage(c, make([]byte, 4096), true); err != nil || n == 0 {
			t.Fatalf("%d, %v", n, err)
		}
	}
	c.Write(framed[:5]) //nolint:errcheck // its end is what counts
	c.Close()
	eventually(t, "the connection ends", func() bool { return len(g.net.limits.questions) == 0 })
}

func TestParseResolvConf(t *testing.T) {
	for text, want := range map[string]resolvConf{
		"": {servers: []string{"127.0.0.1:53"}},
		"nameserver 192.0.2.1\nnameserver fe80::1%eth0\nnameserver x\nnameserver 1.1.1.1\nnameserver 2.2.2.2\n": {servers: []string{"192.0.2.1:53", "[fe80::1%eth0]:53", "1.1.1.1:53"}},
		"domain A.example\nsearch B.example. c.example\noptions ndots:5\nnameserver ::1":                        {servers: []string{"[::1]:53"}, search: []string{"b.example", "c.example"}},
	} {
		if got := parseResolvConf(text, 53); !slices.Equal(got.servers, want.servers) || !slices.Equal(got.search, want.search) {
			t.Errorf("%q: %+v, want %+v", text, got, want)
		}
	}
}

// FuzzDNS: whatever is asked, there is an answer to that very question or none, and
// nobody outside is asked.
func FuzzDNS(f *testing.F) {
	for _, name := range []string{"host.wsl2.internal.", "localhost.", "1.0.77.10.in-addr.arpa.", "x.", "."} {
		m := dnsmessage.Message{Header: dnsmessage.Header{ID: 1}, Questions: []dnsmessage.Question{{Name: dnsmessage.MustNewName(name), Type: dnsmessage.TypeA, Class: dnsmessage.ClassINET}}}
		b, _ := m.Pack()
		f.Add(b)
	}
	f.Add([]byte{0, 1, 2})
	c := testConfig()
	c.Policy.Restricted = true // names of the world are refused
	c.Logf = func(string, ...any) {}
	outside, err := net.ListenPacket("udp", "127.0.0.1:0")
	if err != nil {
		f.Fatal(err)
	}
	f.Cleanup(func() { outside.Close() })
	var asked atomic.Int64
	go func() {
		for b := make([]byte, 1); ; asked.Add(1) {
			if _, _, err := outside.ReadFrom(b); err != nil {
				return
			}
		}
	}()
	dir := f.TempDir()
	c.DNS = DNSConfig{Port: uint16(outside.LocalAddr().(*net.UDPAddr).Port), Hosts: write(f, dir, "hosts", ""), ResolvConf: write(f, dir, "resolv.conf", "nameserver 127.0.0.1\n")}
	n := &Network{cfg: c}
	n.log.logf = c.Logf
	n.dns = newResolver(n)
	f.Fuzz(func(t *testing.T, message []byte) {
		answer := n.dns.answer(t.Context(), message, false)
		if asked.Load() != 0 { // by this one or one before
			t.Fatal("somebody was asked")
		}
		if answer == nil {
			return
		}
		var m dnsmessage.Message
		if err := m.Unpack(answer); err != nil || !m.Response || len(m.Questions) != 1 {
			t.Fatalf("% x is answered by % x: %v", message, answer, err)
		}
		if m.ID != binary.BigEndian.Uint16(message) {
			t.Fatalf("ID %d", m.ID)
		}
	})
}

// TestReplyUnpackable: an answer that no message can hold is told as a failure, and not kept from who waits for it.
func TestReplyUnpackable(t *testing.T) {
	q := dnsmessage.Question{Name: dnsmessage.MustNewName("2.0.77.10.in-addr.arpa."), Type: dnsmessage.TypePTR, Class: dnsmessage.ClassINET}
	var m dnsmessage.Message
	if err := m.Unpack(reply(dnsmessage.Header{ID: 7}, q, dnsmessage.RCodeSuccess, records(q, nil, []string{"a..b", "c"}))); err != nil || m.ID != 7 || m.RCode != dnsmessage.RCodeServerFailure {
		t.Errorf("%+v, %v", m, err)
	}
}
