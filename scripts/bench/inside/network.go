package main

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/wsl2/wsl2/internal/wire"
	"github.com/wsl2/wsl2/scripts/bench/report"
)

// The world that guests reach is a network namespace beside the host's, joined to it by a veth pair.
const (
	worldAddress = "198.51.100.1"
	hostAddress  = "198.51.100.2"
	ipPath       = "/rig/bin/ip"
	passtPath    = "/rig/bin/passt"
	slirpPath    = "/rig/bin/slirp4netns"
)

// The peers: networks in user space, of QEMU's guests and, without any VM, of a namespace.
const (
	peerSlirp = "qemu-slirp"
	peerPasst = "qemu-passt"
	peerFloor = "slirp4netns"
)

// networkLimit is how long one measurement may take: slirp is slow.
const networkLimit = 20 * hangs

// card is a network card of QEMU's guest.
type card struct {
	args    []string
	network wire.Network
}

// slirpNet is QEMU's own NAT, with ports of the host's loopback that are the guest's.
func slirpNet(ports ...int) card {
	user := "user,id=net,net=" + peerNet4 + ",ipv6-net=" + peerNet6
	for _, p := range ports {
		user += fmt.Sprintf(",hostfwd=tcp:127.0.0.1:%[1]d-:%[1]d", p)
	}
	return card{
		[]string{"-netdev", user, "-device", "virtio-net-device,netdev=net"},
		wire.Network{Guest4: "10.0.2.15/24", Gateway4: "10.0.2.2", Guest6: "fec0::15/64", Gateway6: "fec0::2"},
	}
}

// passtNet is passt, which listens at this socket. The MTU is the largest, as it tells guests by DHCP.
func passtNet(socket string) card {
	c := slirpNet()
	c.args = []string{"-netdev", "stream,id=net,server=off,addr.type=unix,addr.path=" + socket, "-device", "virtio-net-device,netdev=net,host_mtu=65520"}
	return c
}

// network measures what a guest has of the world: ours, QEMU's by slirp and by passt, and that of a
// namespace behind slirp4netns, which has no VM to pay for.
func network(h *host) ([]report.Row, error) {
	stop, err := startWorld()
	if err != nil {
		return nil, fmt.Errorf("make the world: %w", err)
	}
	defer stop()
	r, err := h.ours()
	if err != nil {
		return nil, err
	}
	r.output = func(argv ...string) (string, error) {
		return outputFor(networkLimit, h.wsl2(append([]string{"-d", distroName, "-e"}, argv...)...))
	}
	ours, err := measureNetwork(r, "10.77.0.1")
	if err != nil {
		return nil, err
	}
	// After that: what a VM loads once to see its ports is not to be in the other figures.
	forwarded, err := measureLink(h.forwarded(r))
	if err != nil {
		return nil, err
	}
	direct, err := measureLink(r)
	if err != nil {
		return nil, err
	}
	if err := r.stop(); err != nil {
		return nil, err
	}
	found := map[string]networkFigures{}
	missing := map[string]string{}
	for _, p := range []struct {
		name    string
		measure func() (networkFigures, error)
	}{
		{peerSlirp, func() (networkFigures, error) {
			return h.measurePeer(slirpNet(firstPort+1, firstPort+2, firstPort+3), "10.0.2.3")
		}},
		{peerPasst, h.measurePasst},
		{peerFloor, h.measureFloor},
	} {
		f, err := p.measure()
		if err != nil {
			missing[p.name] = err.Error()
			logf("%s: %v", p.name, err)
			continue
		}
		found[p.name] = f
	}

	var rows []report.Row
	add := func(name, unit string, atLeast bool, figure func(networkFigures) float64) {
		row := report.Row{Row: name, Unit: unit, Ours: figure(ours), Peers: map[string]float64{}, Missing: missing}
		for p, f := range found {
			if v := figure(f); v != 0 { // slirp4netns has no ports here
				row.Peers[p] = v
			}
		}
		row.Bar = stricter(row, &report.Bar{Peer: peerSlirp, Factor: 2, AtLeast: atLeast}, &report.Bar{Peer: peerPasst, Factor: 1, AtLeast: atLeast})
		rows = append(rows, row)
	}
	const faster, lower = true, false
	add("TCP, one stream, guest to world", "MB/s", faster, func(f networkFigures) float64 { return f.up })
	add("TCP, one stream, world to guest", "MB/s", faster, func(f networkFigures) float64 { return f.down })
	add("TCP, eight streams, guest to world", "MB/s", faster, func(f networkFigures) float64 { return f.up8 })
	add("TCP, eight streams, world to guest", "MB/s", faster, func(f networkFigures) float64 { return f.down8 })
	add("a byte there and back", "µs", lower, func(f networkFigures) float64 { return f.trip })
	add("connections with a byte each way", "1/s", faster, func(f networkFigures) float64 { return f.connects })
	add("UDP, 1400 bytes there and back, 16 under way", "1/s", faster, func(f networkFigures) float64 { return f.datagrams })
	add("DNS questions, each from a new socket", "1/s", faster, func(f networkFigures) float64 { return f.names })
	add("connect beside a stream, median", "µs", lower, func(f networkFigures) float64 { return f.loaded50 })
	add("connect beside a stream, 99th percentile", "µs", lower, func(f networkFigures) float64 { return f.loaded99 })
	spread := func(f networkFigures) float64 { return f.loaded99 / f.loaded50 }
	add("connect beside a stream, 99th percentile by median", "times", lower, spread)
	rows[len(rows)-1].Bar = &report.Bar{Factor: 3}
	ours.forwarded = forwarded
	add("localhost to a server in the guest", "MB/s", faster, func(f networkFigures) float64 { return f.forwarded.toGuest })
	add("a server in the guest to localhost", "MB/s", faster, func(f networkFigures) float64 { return f.forwarded.toHost })
	add("a byte there and back, by localhost", "µs", lower, func(f networkFigures) float64 { return f.forwarded.trip })
	const vsock = "vsock, without a forward"
	for _, w := range []struct {
		name            string
		forward, direct float64
	}{
		{"localhost to a server in the guest, by a forward", forwarded.toGuest, direct.toGuest},
		{"a server in the guest to localhost, by a forward", forwarded.toHost, direct.toHost},
	} {
		rows = append(rows, report.Row{Row: w.name, Unit: "MB/s", Ours: w.forward, Peers: map[string]float64{vsock: w.direct},
			Bar: &report.Bar{Peer: vsock, Factor: 0.75, AtLeast: true}})
	}
	return rows, nil
}

// stricter returns the one that asks for more, of those whose peer was measured.
func stricter(r report.Row, bars ...*report.Bar) *report.Bar {
	var hardest *report.Bar
	for _, b := range bars {
		limit, ok := r.Peers[b.Peer]
		if !ok {
			continue
		}
		if !b.AtLeast { // twice as good is half as much
			b.Factor = 1 / b.Factor
		}
		if limit *= b.Factor; hardest == nil || b.AtLeast == (limit > hardest.Factor*r.Peers[hardest.Peer]) {
			hardest = b
		}
	}
	return hardest
}

type networkFigures struct {
	up, down, up8, down8 float64 // MB/s
	trip                 float64 // µs
	connects             float64 // a second
	datagrams, names     float64 // a second
	loaded50, loaded99   float64 // µs
	forwarded            linkFigures
}

// What one measurement carries.
const (
	networkBytes     = 16 << 20
	networkTrips     = 100
	networkConnects  = 200
	networkDatagrams = 1000
	networkNames     = 200
)

// measureNetwork runs guest's programs at one end of a network, whose DNS server is at names.
func measureNetwork(r *running, names string) (f networkFigures, err error) {
	run := func(mode string, at string, args ...int) (all [3]float64) {
		if err != nil {
			return
		}
		argv := []string{guestTool, "network", mode, at}
		for _, a := range args {
			argv = append(argv, strconv.Itoa(a))
		}
		var text string
		if text, err = r.output(argv...); err != nil {
			err = fmt.Errorf("%s: %w", strings.Join(argv[1:], " "), err)
			return
		}
		for i, field := range strings.Fields(text) {
			if all[i], err = strconv.ParseFloat(field, 64); err != nil {
				return
			}
		}
		logf("%s: %s: %s", r.name, strings.Join(argv[2:], " "), text)
		return all
	}
	rate := func(n int, ns float64) float64 { return float64(n) / ns * 1e9 }
	stream := func(mode string, streams int) float64 {
		return rate(networkBytes, run(mode, worldAddress, streams, networkBytes)[0]) / 1e6
	}
	run("trips", worldAddress, 10) // what begins with the first packet is not measured
	f.up, f.down = stream("up", 1), stream("down", 1)
	f.up8, f.down8 = stream("up", 8), stream("down", 8)
	f.trip = run("trips", worldAddress, networkTrips)[0] / 1e3
	f.connects = rate(networkConnects, run("connects", worldAddress, networkConnects)[0])
	datagrams := run("datagrams", worldAddress, networkDatagrams, 16)
	f.datagrams = rate(networkDatagrams-int(datagrams[1]), datagrams[0])
	f.names = rate(networkNames, run("names", names, networkNames)[0])
	if err != nil {
		return f, err
	}
	stop, err := r.spawn(guestTool, "network", "load", worldAddress)
	if err != nil {
		return f, fmt.Errorf("load: %w", err)
	}
	defer stop()
	loaded := run("connects", worldAddress, networkConnects)
	f.loaded50, f.loaded99 = loaded[1]/1e3, loaded[2]/1e3
	return f, err
}

// measurePeer is QEMU with a card.
func (h *host) measurePeer(c card, names string) (f networkFigures, err error) {
	p, err := h.peerOn(c)
	if err != nil {
		return f, err
	}
	defer p.stop()
	// Our guests have no use for it, but these networks find their guests by it.
	if _, err := p.output("/bin/busybox", "ifconfig", "eth0", "arp"); err != nil {
		return f, err
	}
	if f, err = measureNetwork(p, names); err != nil {
		return f, err
	}
	f.forwarded, err = measureLink(viaLocalhost(p))
	return f, err
}

// viaLocalhost reaches the peer's servers by the ports that it has on the host.
func viaLocalhost(p *running) *running {
	f := *p
	f.scheme, f.dial = "tcp:", dialLocalhost
	return &f
}

func (h *host) measurePasst() (f networkFigures, err error) {
	dir := "/passt" // it ceases to be root before it makes its socket there
	if err := errors.Join(os.Mkdir(dir, 0), os.Chmod(dir, 0o777)); err != nil {
		return f, err
	}
	socket := filepath.Join(dir, "socket")
	// It leaves the terminal when it listens, and ends with its only guest.
	c := exec.Command(passtPath, "-4", "-i", "wire", "-a", "10.0.2.15", "-n", "24", "-g", "10.0.2.2", "-s", socket, "-1", "--runas", "65534",
		"-t", fmt.Sprintf("127.0.0.1/%d-%d", firstPort+1, firstPort+3))
	if _, err := outputFor(networkLimit, c); err != nil {
		return f, err
	}
	// Its guests ask the host's own server.
	return h.measurePeer(passtNet(socket), worldAddress)
}

// measureFloor is slirp4netns.
func (h *host) measureFloor() (f networkFigures, err error) {
	ns := exec.Command(busyboxPath, "sleep", "1000000")
	ns.SysProcAttr = &syscall.SysProcAttr{Cloneflags: unix.CLONE_NEWNET}
	if err := ns.Start(); err != nil {
		return f, err
	}
	defer func() { ns.Process.Kill(); ns.Wait() }()
	ready, w, err := os.Pipe()
	if err != nil {
		return f, err
	}
	defer ready.Close()
	pid := strconv.Itoa(ns.Process.Pid)
	var errs bytes.Buffer
	c := exec.Command(slirpPath, "--configure", "--mtu=65520", "--ready-fd=3", pid, "tap0")
	c.ExtraFiles, c.Stderr = []*os.File{w}, &errs
	err = c.Start()
	w.Close()
	if err != nil {
		return f, err
	}
	ended := func() { c.Process.Kill(); c.Wait() }
	if err := firstLine(ready); err != nil {
		ended()
		return f, fmt.Errorf("%w: %s", err, errs.Bytes())
	}
	defer ended()
	inside := func(argv ...string) *exec.Cmd {
		argv[0] = guestPath
		return exec.Command(busyboxPath, append([]string{"nsenter", "-t", pid, "-n"}, argv...)...)
	}
	r := &running{name: peerFloor}
	r.output = func(argv ...string) (string, error) { return outputFor(networkLimit, inside(argv...)) }
	r.spawn = func(argv ...string) (func(), error) { return spawn(inside(argv...)) }
	return measureNetwork(r, "10.0.2.3")
}

// startWorld makes the namespace and the way to it, and makes its DNS server the host's.
func startWorld() (stop func(), err error) {
	c := exec.Command(guestPath, "world", worldAddress)
	c.SysProcAttr = &syscall.SysProcAttr{Cloneflags: unix.CLONE_NEWNET}
	c.Stderr = os.Stderr
	in, err := c.StdinPipe()
	if err != nil {
		return nil, err
	}
	out, err := c.StdoutPipe()
	if err != nil {
		return nil, err
	}
	if err := c.Start(); err != nil {
		return nil, err
	}
	stop = func() { c.Process.Kill(); c.Wait() }
	pid := strconv.Itoa(c.Process.Pid)
	there := []string{busyboxPath, "nsenter", "-t", pid, "-n", ipPath}
	here := []string{ipPath}
	for _, step := range []struct {
		where []string
		what  string
	}{
		{here, "link add wire type veth peer name wire netns " + pid},
		{here, "addr add " + hostAddress + "/24 dev wire"},
		{here, "link set wire up"},
		{there, "addr add " + worldAddress + "/24 dev wire"},
		{there, "link set wire up"},
		{here, "route add default via " + worldAddress},
	} {
		argv := append(append([]string(nil), step.where...), strings.Fields(step.what)...)
		if _, err := outputFor(networkLimit, exec.Command(argv[0], argv[1:]...)); err != nil {
			stop()
			return nil, err
		}
	}
	err = os.WriteFile("/etc/resolv.conf", []byte("nameserver "+worldAddress+"\n"), 0o644)
	if err == nil {
		_, err = io.WriteString(in, "\n")
	}
	if err == nil {
		err = firstLine(out)
	}
	if err != nil {
		stop()
		return nil, err
	}
	return stop, nil
}

// outputFor runs a program for so long at most and returns what it prints.
func outputFor(limit time.Duration, c *exec.Cmd) (string, error) {
	var out, errs bytes.Buffer
	c.Stdout, c.Stderr = &out, &errs
	if err := superviseFor(limit, c); err != nil {
		if errors.Is(err, errHang) {
			err = fmt.Errorf("it did not end within %v", limit)
		}
		return "", fmt.Errorf("%s: %w: %s", strings.Join(c.Args, " "), err, bytes.TrimSpace(errs.Bytes()))
	}
	return out.String(), nil
}
