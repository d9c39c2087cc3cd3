//go:build e2e

package main_test

import (
	"fmt"
	"io"
	"net/http"
	"strings"
	"testing"

	"github.com/wsl2/wsl2/internal/testsys"
)

// TestDistroNetworks: a distro with a network of its own has an address and all ports to itself, and what it serves is on
// the host beside what others serve at the same port; distros find each other by their names; and one with
// none has nothing but loopback.
func TestDistroNetworks(t *testing.T) {
	h := newHost(t)
	h.OK("--manage", "small", "--clone", "one")
	h.OK("--manage", "small", "--clone", "alone")
	h.Config("[distro.one]", "network = own", "[distro.alone]", "network = none")
	port := hostPorts(t, 1)[0]
	events := followPorts(h)
	distros := []string{"small", "one", "alone"}
	for _, d := range distros {
		// In IPv6 and IPv4, at a port of its own and at one that is the same for all, and privileged.
		l := h.Start("-d", d, "-u", "root", "-e", "sh", "-c", fmt.Sprintf(`mkdir -p /srv/www && echo %s >/srv/www/index.html && cd /srv/www && httpd -p 80 && httpd -p %d && echo ready && cat`, d, port))
		l.Expect("ready\n")
	}

	// Each at a port of the host's.
	list := events.until("a port of each distro", func(p portList) bool {
		seen := map[string]bool{}
		for _, x := range p.Ports {
			if x.Port == port && len(x.Host) > 0 {
				seen[x.Distro] = true
			}
		}
		return len(seen) == len(distros)
	})
	moved := 0
	for _, x := range list.Ports {
		if x.Port != port {
			continue
		}
		for _, at := range x.Host {
			if got := get(t, "http://"+at+"/"); got != x.Distro {
				t.Errorf("at %s there is %q, not %s", at, got, x.Distro)
			}
		}
		if strings.Contains(x.Note, "in use") {
			moved++
		}
	}
	if moved < len(distros)-1 {
		t.Errorf("%d ports of three are said to be elsewhere: %+v", moved, list)
	}

	// Each from within the others, by name and by address.
	data := loopbackServer(t, []byte("the host\n"))
	closed := closedPort(t)
	for _, c := range []struct{ in, url, want string }{
		{"small", "http://localhost/", "small"},
		{"one", "http://localhost/", "one"},
		{"alone", "http://localhost/", "alone"},
		{"one", "http://small.wsl2.internal/", "small"},
		{"small", "http://one.wsl2.internal/", "one"},
		{"small", "http://small.wsl2.internal/", "small"},
		{"one", "http://One.WSL2.internal/", "one"},
		{"small", "http://[fd77:736c:3200::3]/", "one"},
		{"one", "http://[fd77:736c:3200::2]/", "small"},
		{"one", fmt.Sprintf("http://host.wsl2.internal:%d/", data), "the host"},
		{"one", fmt.Sprintf("http://[fd77:736c:3200::1]:%d/", data), "the host"},
	} {
		if r := h.Run("-d", c.in, "-e", "wget", "-q", "-O", "-", c.url); strings.TrimSpace(r.Stdout) != c.want {
			t.Errorf("%s from %s: want %q: %v", c.url, c.in, c.want, r)
		}
	}
	for _, c := range []struct{ in, script, want string }{
		{"one", "ls /sys/class/net; cat /sys/class/net/eth0/mtu; wslinfo --networking-mode", "eth0\nlo\n65520\nnat"},
		{"one", "ping -c 1 10.77.0.1 >/dev/null && ping -c 1 fd77:736c:3200::1 >/dev/null && ping -c 1 small.wsl2.internal >/dev/null && echo all", "all"},
		{"one", fmt.Sprintf("wget -O - http://10.77.0.1:%d/ 2>&1 | grep -o refused", closed), "refused"},
		{"alone", "ls /sys/class/net; wslinfo --networking-mode; wget -O - http://10.77.0.1/ 2>&1 | grep -o unreachable", "lo\nnone\nunreachable"},
		{"small", "ls /sys/class/net; nslookup alone.wsl2.internal | grep -o NXDOMAIN | head -n 1", "distro3\neth0\nlo\nNXDOMAIN"},
		{"small", "dmesg | grep 'no events of listening' | wc -l", "0"},
	} {
		if out := inside(h, c.in, c.script); out != c.want {
			t.Errorf("%s: %q, want %q", c.script, out, c.want)
		}
	}

	// A name ends with its distro, and so does the network; both come again.
	h.OK("--terminate", "one")
	events.until("the end of one", func(p portList) bool {
		for _, x := range p.Ports {
			if x.Distro == "one" {
				return false
			}
		}
		return true
	})
	if out := inside(h, "small", "ls /sys/class/net; nslookup one.wsl2.internal | grep -o NXDOMAIN | head -n 1"); out != "eth0\nlo\nNXDOMAIN" {
		t.Errorf("after the end of one: %q", out)
	}
	if out := inside(h, "one", "wget -q -O - http://small.wsl2.internal/"); out != "small" {
		t.Errorf("one again: %q", out)
	}
}

// get is what a server says.
func get(t *testing.T, url string) string {
	t.Helper()
	c := http.Client{Timeout: testsys.Deadline}
	r, err := c.Get(url)
	testsys.Must(t, err)
	defer r.Body.Close()
	b, err := io.ReadAll(r.Body)
	testsys.Must(t, err)
	return strings.TrimSpace(string(b))
}
