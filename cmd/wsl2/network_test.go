//go:build e2e || kvm

package main_test

import (
	"bytes"
	"crypto/sha256"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/wsl2/wsl2/internal/testsys"
)

// loopbackServer serves HTTP on the host's loopback: /data is that, and what is sent to
// anywhere is hashed.
func loopbackServer(t *testing.T, data []byte) (port int) {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	testsys.Must(t, err)
	s := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.Method == http.MethodPost {
			h := sha256.New()
			io.Copy(h, r.Body) //nolint:errcheck // the hash tells
			fmt.Fprintf(w, "%x\n", h.Sum(nil))
			return
		}
		w.Write(data) //nolint:errcheck // the guest tells
	})}
	go s.Serve(l) //nolint:errcheck // its end is the test's
	t.Cleanup(func() { s.Close() })
	return l.Addr().(*net.TCPAddr).Port
}

// network uses the network of the distro "small" in every way that there is.
func network(h *testsys.Host) {
	t := h.TB.(*testing.T)
	t.Helper()
	data := bytes.Repeat([]byte("0123456789abcdef\n"), 100_000)
	port := loopbackServer(t, data)
	sum := fmt.Sprintf("%x", sha256.Sum256(data))
	sh := func(script string) testsys.Result {
		t.Helper()
		return h.Run("-d", "small", "-e", "sh", "-c", script)
	}
	is := func(script, want string) {
		t.Helper()
		if r := sh(script); r.Status != 0 || strings.TrimSpace(r.Stdout) != want {
			t.Errorf("%s: want %q: %v", script, want, r)
		}
	}
	fails := func(script string, words ...string) {
		t.Helper()
		r := sh(script)
		if r.Status == 0 {
			t.Errorf("%s succeeds: %v", script, r)
		}
		for _, w := range words {
			if strings.Contains(r.Stderr, w) {
				return
			}
		}
		t.Errorf("%s: want one of %q: %v", script, words, r)
	}

	// The first thing that a distro does: the network is there.
	is(fmt.Sprintf("wget -q -O - http://host.wsl2.internal:%d/ | sha256sum | cut -d' ' -f1", port), sum)
	is(fmt.Sprintf("wget -q -O - 'http://[fd77:736c:3200::1]:%d/' | sha256sum | cut -d' ' -f1", port), sum)
	is(fmt.Sprintf(`n=$((17*100000)); d=$(printf %%s 0123456789abcdef); { printf 'POST / HTTP/1.0\r\nContent-Length: %%d\r\n\r\n' $n; yes $d | head -n 100000; } | nc 10.77.0.1 %d | tail -n 1`, port), sum)
	is("nslookup host.wsl2.internal | grep -A1 ^Name | grep -o '10\\.77\\.0\\.1'", "10.77.0.1")
	is("ping -c 1 10.77.0.1 >/dev/null && ping -c 1 fd77:736c:3200::1 >/dev/null && echo both", "both")
	is("cat /sys/class/net/eth0/mtu", "65520")

	// What is not there is said to be not there, as fast as on the host.
	closed := closedPort(t)
	fails(fmt.Sprintf("wget -O - http://host.wsl2.internal:%d/", closed), "refused")
	fails("wget -O - http://10.77.0.9/", "No route to host")
	fails("wget -O - http://169.254.169.254/", "No route to host")
	fails("wget -O - 'http://[fe80::1]/'", "Permission denied", "unreachable", "No route to host", "Invalid argument")
	fails("nslookup nobody.wsl2.internal", "")

	// A network that dies takes its connections along, and nothing else.
	h.Process("net").Kill(t)
	is(fmt.Sprintf("until wget -q -O - http://host.wsl2.internal:%d/ | sha256sum | cut -d' ' -f1 | grep %s; do :; done", port, sum), sum)
}

// closedPort is one of the host's loopback where nobody listens.
func closedPort(t *testing.T) int {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	testsys.Must(t, err)
	defer l.Close()
	return l.Addr().(*net.TCPAddr).Port
}

// serviceLog is what the service and its processes wrote.
func serviceLog(h *testsys.Host) string {
	h.TB.Helper()
	text, err := os.ReadFile(filepath.Join(h.State(), "service.log"))
	testsys.Must(h.TB, err)
	return string(text)
}
