//go:build e2e

package main_test

import (
	"bytes"
	"context"
	"crypto/sha256"
	"fmt"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"strings"
	"sync"
	"testing"

	"github.com/wsl2/wsl2/internal/testsys"
)

// TestNetworkPrograms: the programs that people use a network by work in a distro: of packages, of names, of files, a
// bridge with NAT as container engines make it, rules of netfilter, a VPN.
func TestNetworkPrograms(t *testing.T) {
	h := newDebian(t)
	h.Config("[wsl2]", "vmIdleTimeout=-1", "safeMode=true", "[general]", "instanceIdleTimeout=-1") // nothing here needs its systemd
	is := func(what, script, want string) {
		t.Helper()
		if out := inside(h, "one", script); out != want {
			t.Errorf("%s: %q, want %q", what, out, want)
		}
	}
	at := repository(t, h)
	is("apt", fmt.Sprintf(`echo 'deb [trusted=yes] http://%s/ ./' >/srv/list
apt="apt-get -q -o Dir::Etc::SourceList=/srv/list -o Dir::Etc::SourceParts=-"
out=$($apt update && $apt install -y wsl2-test 2>&1) && cat /srv/installed || echo "$out"`, at), "by apt")
	data := bytes.Repeat([]byte("0123456789abcdef\n"), 100_000)
	sum := fmt.Sprintf("%x", sha256.Sum256(data))
	web := loopbackServer(t, data)
	is("curl", fmt.Sprintf("url=http://host.wsl2.internal:%d/; curl -sS $url >/srv/data; sha256sum </srv/data; curl -sS --data-binary @/srv/data $url", web), sum+"  -\n"+sum)
	is("curl, refused", fmt.Sprintf("curl -sS http://host.wsl2.internal:%d/ || echo $?", closedPort(t)), "7")
	is("dig", "dig +short host.wsl2.internal; dig +tcp +short one.wsl2.internal; dig -x 10.77.0.1 +short; dig nobody.wsl2.internal | grep -o NXDOMAIN", "10.77.0.1\n10.77.0.2\nhost.wsl2.internal.\nNXDOMAIN")
	is("ping", "ping -q -c 1 -W 60 -s 1400 host.wsl2.internal | grep -o ' 0% packet loss'; ping -c 1 -W 60 10.77.0.9 | grep -o Unreachable", "0% packet loss\nUnreachable")

	git := gitServer(t, h)
	is("git clone", fmt.Sprintf("git clone -q git://host.wsl2.internal:%d/repo /srv/repo && cat /srv/repo/file", git), "content")

	// Garbage at line rate does no harm to what is beside it.
	nets := h.Process("net")
	flood := h.Start("-d", "one", "-u", "root", "-e", "perl", "-e", garbage)
	flood.Expect("flood\n")
	is("curl beside garbage", fmt.Sprintf("for i in 1 2 3; do curl -sS http://host.wsl2.internal:%d/ | sha256sum; done", web), strings.TrimSuffix(strings.Repeat(sum+"  -\n", 3), "\n"))
	flood.Kill()
	if now := h.Process("net"); now.PID != nets.PID {
		t.Errorf("wsl2-net is another one: %v, then %v", nets, now)
	}

	const bridge = `exec 2>&1; set -e
ip link add br0 type bridge
ip addr add 172.18.0.1/24 dev br0
ip link set br0 up
for n in 2 3; do
	ip netns add box$n
	ip link add v$n type veth peer name eth0 netns box$n
	ip link set v$n master br0 up
	ip -n box$n addr add 172.18.0.$n/24 dev eth0
	ip -n box$n link set eth0 up
	ip -n box$n link set lo up
	ip -n box$n route add default via 172.18.0.1
done
echo 1 >/proc/sys/net/ipv4/ip_forward
iptables -t nat -A POSTROUTING -s 172.18.0.0/24 ! -o br0 -j MASQUERADE
ip netns exec box2 git clone -q git://10.77.0.1:%[1]d/repo /srv/boxed
cat /srv/boxed/file
iptables -t nat -nvL POSTROUTING | grep -c '^ *[1-9].*MASQUERADE'
ip netns exec box2 ping -q -c 1 -W 60 172.18.0.3 | grep -o ' 0%% packet loss'
nft add table inet filter
nft 'add chain inet filter forward { type filter hook forward priority filter; }'
nft add rule inet filter forward tcp dport %[1]d reject with tcp reset
! ip netns exec box2 git clone -q git://10.77.0.1:%[1]d/repo /srv/refused 2>/srv/error
grep -o refused /srv/error | head -n 1
nft delete table inet filter`
	is("a bridge with NAT and a rule", fmt.Sprintf(bridge, git), "content\n1\n 0% packet loss\nrefused")

	// A wire that loses, and is not in order: what arrives is whole.
	is("a bad wire", fmt.Sprintf(`set -e
box="ip netns exec box2" url=http://10.77.0.1:%d/ sum=%s
tc qdisc add dev v2 root netem delay 2ms 1ms loss 2%% reorder 25%% 50%%
$box tc qdisc add dev eth0 root netem delay 2ms 1ms loss 2%% reorder 25%% 50%%
until tc -s qdisc show dev v2 | grep -q 'dropped [1-9]' && $box tc -s qdisc show dev eth0 | grep -q 'dropped [1-9]'; do
	[ "$($box curl -sS $url | sha256sum)" = "$sum  -" ]
	[ "$($box curl -sS --data-binary @/srv/data $url)" = $sum ]
done
echo whole`, web, sum), "whole")

	// The VPN's far end is in a box; what both send goes by way of the host.
	near, far := datagramRelay(t)
	inside(h, "one", "openvpn --genkey secret /srv/key")
	const vpn = "--dev tun --proto udp --nobind --secret /srv/key --cipher AES-256-CBC --auth-nocache --ping 1"
	var ends []*testsys.Live
	for _, end := range []string{
		fmt.Sprintf("exec openvpn %s --remote host.wsl2.internal %d --ifconfig 10.9.0.1 10.9.0.2", vpn, near),
		fmt.Sprintf("exec ip netns exec box3 openvpn %s --remote 10.77.0.1 %d --ifconfig 10.9.0.2 10.9.0.1", vpn, far),
	} {
		ends = append(ends, h.Start("-d", "one", "-u", "root", "-e", "sh", "-c", end))
	}
	for _, l := range ends { // each hears of the other
		l.Expect("Initialization Sequence Completed")
	}
	is("ping by way of the VPN", "ping -q -c 1 -W 60 -s 1000 10.9.0.2 | grep -o ' 0% packet loss'", "0% packet loss")
}

// garbage sends frames of random lengths and bytes, some of which begin as packets do.
const garbage = `sub sys { open(my $f, "/sys/class/net/eth0/$_[0]") or die; my $x = <$f>; chomp $x; $x }
my $mac = join "", map { chr hex } split /:/, sys("address");
socket(my $s, 17, 3, 0) or die "socket: $!";
bind($s, pack("SnlSCCa8", 17, 0, sys("ifindex"), 0, 0, 6, $mac)) or die "bind: $!";
my @frames = map {
	my $p = join "", map { chr int rand 256 } 1 .. 1 + rand 1400;
	my $type = (0x0800, 0x86dd, 0x0806, int rand 65536)[rand 4];
	substr($p, 0, 1) = chr($type == 0x0800 ? 0x45 : 0x60) if rand() < .7;
	$mac . $mac . pack("n", $type) . $p;
} 1 .. 200;
$| = 1; print "flood\n";
while (1) { send($s, $_, 0) for @frames }
`

// repository serves a package "wsl2-test" of /srv/installed on the host's loopback; its address is one for distros.
func repository(t *testing.T, h *testsys.Host) (at string) {
	t.Helper()
	root, dir := h.Path("package"), h.Path("repository")
	for path, text := range map[string]string{
		root + "/srv/installed":  "by apt\n",
		root + "/DEBIAN/control": "Package: wsl2-test\nVersion: 1\nArchitecture: all\nMaintainer: nobody <nobody@localhost>\nDescription: a test\n",
		dir + "/Packages":        "",
	} {
		testsys.Must(t, os.MkdirAll(path[:strings.LastIndex(path, "/")], 0o755))
		testsys.Must(t, os.WriteFile(path, []byte(text), 0o644))
	}
	if out, err := exec.Command("dpkg-deb", "--root-owner-group", "--build", root, dir+"/test.deb").CombinedOutput(); err != nil {
		t.Fatalf("dpkg-deb: %v: %s", err, out)
	}
	deb, err := os.ReadFile(dir + "/test.deb")
	testsys.Must(t, err)
	control, err := os.ReadFile(root + "/DEBIAN/control")
	testsys.Must(t, err)
	index := fmt.Sprintf("%sFilename: ./test.deb\nSize: %d\nSHA256: %x\n", control, len(deb), sha256.Sum256(deb))
	testsys.Must(t, os.WriteFile(dir+"/Packages", []byte(index), 0o644))
	s := httptest.NewServer(http.FileServer(http.Dir(dir)))
	t.Cleanup(s.Close)
	return fmt.Sprintf("host.wsl2.internal:%d", s.Listener.Addr().(*net.TCPAddr).Port)
}

// gitServer serves the repository "repo", with one file, on the host's loopback.
func gitServer(t *testing.T, h *testsys.Host) (port int) {
	t.Helper()
	dir := h.Path("git")
	const make = `git init -q "$0/repo" && cd "$0/repo" && echo content >file && git add file && git -c user.name=a -c user.email=a@b commit -qm one && touch .git/git-daemon-export-ok`
	if out, err := exec.Command("sh", "-c", make, dir).CombinedOutput(); err != nil {
		t.Fatalf("make a repository: %v: %s", err, out)
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	testsys.Must(t, err)
	ctx, cancel := context.WithCancel(context.Background())
	var servers sync.WaitGroup
	t.Cleanup(func() {
		cancel()
		l.Close()
		servers.Wait()
	})
	servers.Go(func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return // closed
			}
			f, err := c.(*net.TCPConn).File()
			c.Close()
			if err != nil {
				t.Error(err)
				continue
			}
			d := exec.CommandContext(ctx, "git", "daemon", "--inetd", "--base-path="+dir, dir)
			d.Stdin, d.Stdout = f, f
			servers.Go(func() {
				d.Run() //nolint:errcheck // the guest tells
				f.Close()
			})
		}
	})
	return l.Addr().(*net.TCPAddr).Port
}

// datagramRelay makes two ports of the host's loopback: what is sent to one comes from the other, to who sent there last.
func datagramRelay(t *testing.T) (a, b int) {
	t.Helper()
	var ends [2]net.PacketConn
	for i := range ends {
		c, err := net.ListenPacket("udp4", "127.0.0.1:0")
		testsys.Must(t, err)
		ends[i] = c
	}
	var mu sync.Mutex
	var peers [2]net.Addr // guarded by mu
	var relays sync.WaitGroup
	for i, c := range ends {
		relays.Go(func() {
			p := make([]byte, 1<<16)
			for {
				n, from, err := c.ReadFrom(p)
				if err != nil {
					return // closed
				}
				mu.Lock()
				peers[i] = from
				to := peers[1-i]
				mu.Unlock()
				if to != nil {
					ends[1-i].WriteTo(p[:n], to) //nolint:errcheck // what does not arrive is missed
				}
			}
		})
	}
	t.Cleanup(func() {
		for _, c := range ends {
			c.Close()
		}
		relays.Wait()
	})
	return ends[0].LocalAddr().(*net.UDPAddr).Port, ends[1].LocalAddr().(*net.UDPAddr).Port
}
