//go:build e2e

package main_test

import (
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/wsl2/wsl2/internal/testsys"
)

// TestPorts: what a distro serves is on the host's loopback while it does, as it was served.
func TestPorts(t *testing.T) {
	h := newHost(t)
	installServer(h)
	p := hostPorts(t, 8)
	wild4, loop6, udp, resets, later, both, taken, shut := p[0], p[1], p[2], p[3], p[4], p[5], p[6], p[7]
	own, err := net.Listen("tcp", fmt.Sprintf("127.0.0.1:%d", taken))
	testsys.Must(t, err)
	defer own.Close()

	events := followPorts(h)
	l := serving(h,
		fmt.Sprintf("echo,tcp4,0.0.0.0:%d", wild4), fmt.Sprintf("echo,tcp6,[::1]:%d", loop6), fmt.Sprintf("echo,udp4,127.0.0.1:%d", udp),
		fmt.Sprintf("reset,tcp4,127.0.0.1:%d", resets), fmt.Sprintf("echo,tcp4,127.0.0.1:%d", taken), fmt.Sprintf("echo,tcp,[::]:%d", both),
		fmt.Sprintf("shut,tcp4,127.0.0.1:%d", shut), "echo,tcp4,0.0.0.0:81")
	list := events.until("the first ports", func(p portList) bool { return p.has(wild4, loop6, udp, resets, taken, both, shut) })

	wantOpen(h)
	// Bytes, ends, datagrams, resets.
	for address, port := range map[string]int{"127.0.0.1": wild4, "::1": loop6} {
		echo(t, connect(t, "tcp", address, port), []byte("hello"))
		echo(t, connect(t, "tcp", address, both), []byte("hello"))
	}
	echo(t, connect(t, "tcp", "127.0.0.1", wild4), testsys.PatternBytes(t, 8<<20))
	for _, n := range []int{0, 1, 1400, 20000} {
		ping(t, connect(t, "udp", "127.0.0.1", udp), make([]byte, n))
	}
	c := connect(t, "tcp", "127.0.0.1", resets)
	c.Write([]byte("x"))
	for err = nil; err == nil; { // the end may be seen before the reset
		if _, err = c.Read(make([]byte, 1)); err != nil && !errors.Is(err, unix.ECONNRESET) {
			_, err = c.Write([]byte("x"))
		}
	}
	if !errors.Is(err, unix.ECONNRESET) && !errors.Is(err, unix.EPIPE) {
		t.Errorf("a connection that the distro resets: %v", err)
	}
	many(t, wild4, 1000)

	// What the host uses stays the host's, what is privileged needs permission.
	for _, x := range list.Ports {
		switch {
		case x.Port == taken && (strings.HasSuffix(x.Host[0], fmt.Sprint(":", taken)) || !strings.Contains(x.Note, "in use")):
			t.Errorf("a port that the host uses: %+v", x)
		case x.Port == taken:
			echo(t, dialHost(t, x.Host[0]), []byte("elsewhere"))
		}
	}
	// The next command's user is told, and told once.
	notice := fmt.Sprintf("port %d/tcp of small: port %d of this host is in use", taken, taken)
	for _, told := range []bool{true, false} {
		if r := h.Run("-d", "small", "-e", "true"); strings.Contains(r.Stderr, notice) != told {
			t.Errorf("told %v expected: %v", told, r)
		}
	}
	start, err := os.ReadFile("/proc/sys/net/ipv4/ip_unprivileged_port_start")
	testsys.Must(t, err)
	out := h.OK("ports")
	if want := !strings.Contains("0 1 2 3 4 5 6 7 8 9 80 81", strings.TrimSpace(string(start))); want != strings.Contains(out, "ip_unprivileged_port_start=81") {
		t.Errorf("port 81, unprivileged from %s on: %s", start, out)
	}

	// Published, and not any more.
	if out := h.OK("ports", "--publish", fmt.Sprintf("small:%d:%d", wild4, later)); !strings.Contains(out, fmt.Sprintf("0.0.0.0:%d", later)) {
		t.Errorf("--publish: %q", out)
	}
	echo(t, connect(t, "tcp", "127.0.0.1", later), []byte("published"))
	wantOpen(h, fmt.Sprintf("0.0.0.0:%d", later), fmt.Sprintf("[::]:%d", later))
	h.Refused(h.Run("ports", "--publish", fmt.Sprintf("small:%d:%d", both, taken), "--address", "127.0.0.1"), "in use")
	h.OK("ports", "--unpublish", fmt.Sprintf("small:%d", both))
	h.OK("ports", "--unpublish", fmt.Sprintf("small:%d", wild4))
	wantClosed(t, "127.0.0.1", later)
	h.Refused(h.Run("ports", "--unpublish", fmt.Sprintf("small:%d", wild4)), "not published")
	h.Refused(h.Run("ports", "--publish", "nosuch:80"), "no distro")

	// The end of the servers is that of the ports; of the distro as well.
	l.Stdin.Close()
	h.Want(l.Wait(), 0)
	events.until("no port", func(p portList) bool { return len(p.Ports) == 0 })
	wantClosed(t, "127.0.0.1", wild4)
	wantClosed(t, "::1", loop6)
	serving(h, fmt.Sprintf("echo,tcp4,0.0.0.0:%d", later))
	events.until("a port that is opened later", func(p portList) bool { return p.has(later) })
	idle := connect(t, "tcp", "127.0.0.1", later)
	idle.Write([]byte("x"))
	_, err = idle.Read(make([]byte, 1))
	testsys.Must(t, err)
	h.OK("--terminate", "small")
	events.until("the end of the distro", func(p portList) bool { return len(p.Ports) == 0 })
	wantClosed(t, "127.0.0.1", later)
	if n, err := idle.Read(make([]byte, 1)); err == nil {
		t.Errorf("a connection outlives the distro: %d bytes", n)
	}
}

func dialHost(t *testing.T, address string) net.Conn {
	t.Helper()
	c, err := net.DialTimeout("tcp", address, testsys.Deadline)
	testsys.Must(t, err)
	return c
}

// wantOpen looks at all sockets of a host's processes: those, and no others, wait at an address that is not loopback's.
func wantOpen(h *testsys.Host, want ...string) {
	h.TB.Helper()
	owned := map[string]testsys.Process{} // by the inodes of sockets
	for _, p := range h.Processes() {
		fds, _ := filepath.Glob(fmt.Sprintf("/proc/%d/fd/*", p.PID))
		for _, fd := range fds {
			if to, err := os.Readlink(fd); err == nil && strings.HasPrefix(to, "socket:[") {
				owned[to[len("socket:["):len(to)-1]] = p
			}
		}
	}
	local := 0
	open := []string{}
	for table, waits := range map[string]string{"tcp": "0A", "tcp6": "0A", "udp": "07", "udp6": "07"} {
		text, err := os.ReadFile("/proc/net/" + table)
		testsys.Must(h.TB, err)
		for _, line := range strings.Split(strings.TrimSpace(string(text)), "\n")[1:] {
			f := strings.Fields(line)
			p, ours := owned[f[9]]
			if !ours || f[3] != waits {
				continue
			}
			at := socketAddress(h.TB, f[1])
			if at.Addr().IsLoopback() {
				local++
			} else if !slices.Contains(want, at.String()) {
				h.TB.Errorf("%v waits for %s at %v", p, table, at)
			} else {
				open = append(open, at.String())
			}
		}
	}
	if local == 0 || len(open) != len(want) {
		h.TB.Errorf("%d at loopback, and %q; want %q", local, open, want)
	}
}

// socketAddress reads an address of /proc/net/tcp: words in the machine's order.
func socketAddress(tb testing.TB, text string) netip.AddrPort {
	tb.Helper()
	host, port, _ := strings.Cut(text, ":")
	b, err := hex.DecodeString(host)
	testsys.Must(tb, err)
	for w := b; len(w) >= 4; w = w[4:] {
		binary.NativeEndian.PutUint32(w, binary.BigEndian.Uint32(w))
	}
	ip, _ := netip.AddrFromSlice(b)
	n, err := strconv.ParseUint(port, 16, 16)
	testsys.Must(tb, err)
	return netip.AddrPortFrom(ip.Unmap(), uint16(n))
}
