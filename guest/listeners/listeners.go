// Package listeners tells on which ports processes of the VM serve, as it happens.
//
// Three small BPF programs on the root cgroup see sockets begin to listen, bind and close;
// they write their cookies into a ring buffer, whose readers the kernel wakes. What a cookie
// stands for, and what was there before, sock_diag(7) says. Nothing is polled.
//
// A kernel that lacks one of these (--kernel) is asked for its sockets every second instead.
//
// Only sockets of certain network namespaces count (Namespaces): what listens in a container of a
// distro is no port of the distro.
package listeners

import (
	"context"
	"fmt"
	"maps"
	"os"
	"time"

	"golang.org/x/sys/unix"
)

// Listener is a port that a process serves, reachable by loopback.
type Listener struct {
	UDP    bool
	V4, V6 bool // reachable at 127.0.0.1, at ::1
	Port   uint16
	Cgroup uint64 // the ID of the socket's cgroup
}

// pollInterval is how often a kernel without the events is asked.
const pollInterval = time.Second

// Watcher has the programs loaded.
type Watcher struct {
	ring       *ring
	ephemeral  portRange
	namespaces *Namespaces
	maps       kernelMaps
	fds        []int // links, and maps but for the ring
	open       map[uint64]Listener
}

// maxTold bounds the sockets that are told of.
const maxTold = 8192

// maxNamespaces is more than there are distros in a VM.
const maxNamespaces = 64

// New attaches the programs to a cgroup, the root of all. It needs Close.
func New(cgroup string, namespaces *Namespaces) (w *Watcher, err error) {
	w = &Watcher{ephemeral: ephemeralPorts(), namespaces: namespaces, open: map[uint64]Listener{}}
	defer func() {
		if err != nil {
			w.Close()
		}
	}()
	dir, err := unix.Open(cgroup, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("open %s: %w", cgroup, err)
	}
	defer unix.Close(dir)
	fd, err := newMap(unix.BPF_MAP_TYPE_RINGBUF, 0, 0, ringSize, 0)
	if err != nil {
		return nil, err
	}
	if w.ring, err = newRing(fd); err != nil {
		return nil, err
	}
	w.maps.ring = fd
	if w.maps.told, err = newMap(unix.BPF_MAP_TYPE_HASH, 8, 8, maxTold, unix.BPF_F_NO_PREALLOC); err != nil {
		return nil, err
	}
	w.fds = append(w.fds, w.maps.told)
	if w.maps.namespaces, err = newMap(unix.BPF_MAP_TYPE_HASH, 8, 8, maxNamespaces, unix.BPF_F_NO_PREALLOC); err != nil {
		return nil, err
	}
	w.fds = append(w.fds, w.maps.namespaces)
	if err := namespaces.tell(w.maps.namespaces); err != nil {
		return nil, err
	}
	bind := udpBind(w.maps, w.ephemeral)
	for _, a := range []struct {
		name         string
		kind, attach uint32
		p            *program
	}{
		{"tcp_listen", unix.BPF_PROG_TYPE_SOCK_OPS, unix.BPF_CGROUP_SOCK_OPS, tcpListen(w.maps)},
		{"udp_bind4", unix.BPF_PROG_TYPE_CGROUP_SOCK, unix.BPF_CGROUP_INET4_POST_BIND, bind},
		{"udp_bind6", unix.BPF_PROG_TYPE_CGROUP_SOCK, unix.BPF_CGROUP_INET6_POST_BIND, bind},
		{"release", unix.BPF_PROG_TYPE_CGROUP_SOCK, unix.BPF_CGROUP_INET_SOCK_RELEASE, release(w.maps)},
	} {
		prog, err := load(a.name, a.kind, a.attach, a.p)
		if err != nil {
			return nil, err
		}
		l, err := link(prog, dir, a.attach)
		unix.Close(prog)
		if err != nil {
			return nil, fmt.Errorf("attach %s to %s: %w", a.name, cgroup, err)
		}
		w.fds = append(w.fds, l)
	}
	return w, nil
}

// Close detaches the programs and ends Run.
func (w *Watcher) Close() {
	w.namespaces.tell(0) //nolint:errcheck // only telling fails
	if w.ring != nil {
		w.ring.close()
	}
	for _, fd := range w.fds {
		unix.Close(fd)
	}
	w.fds = nil
}

// Run calls changed with the listeners there are, and again whenever others are. It returns
// with an error, of the kernel's or of Close.
func (w *Watcher) Run(changed func([]Listener)) error {
	// Those from before the programs: their end is to be told as well.
	old, _, err := w.namespaces.dump(w.ephemeral)
	if err != nil {
		return err
	}
	for _, s := range old {
		insert(w.maps.told, s.cookie) //nolint:errcheck // full: the next change shows its end
	}
	if old, _, err = w.namespaces.dump(w.ephemeral); err != nil { // some may have ended before the map had them
		return err
	}
	for _, s := range old {
		w.open[s.cookie] = s.Listener
	}
	changed(w.list())
	for {
		opened, closed := map[uint64]bool{}, false
		err := w.ring.wait(func(cookie, what uint64) {
			if what == socketOpened {
				opened[cookie] = true
				return
			}
			delete(opened, cookie)
			if _, known := w.open[cookie]; known {
				delete(w.open, cookie)
				closed = true
			}
		})
		if err != nil {
			return err
		}
		if len(opened) > 0 {
			now, complete, err := w.namespaces.dump(w.ephemeral)
			// While sockets come and go, a dump may pass over one that is there all the time.
			if err == nil && w.lacks(now, opened) {
				var again []socket
				again, complete, err = w.namespaces.dump(w.ephemeral)
				now = append(now, again...)
			}
			if err != nil {
				return err
			}
			w.update(now, opened, complete)
		}
		if len(opened) > 0 || closed {
			changed(w.list())
		}
	}
}

// lacks tells whether any that should be there is not: one that was opened, or that is known.
func (w *Watcher) lacks(now []socket, opened map[uint64]bool) bool {
	there := make(map[uint64]bool, len(now))
	for _, s := range now {
		there[s.cookie] = true
	}
	for cookie := range opened {
		if !there[cookie] {
			return true
		}
	}
	for cookie := range w.open {
		if !there[cookie] {
			return true
		}
	}
	return false
}

// update takes up those that were opened, and drops what is not there any more, should an
// event be lost. Others that are there may be about to close: their event has come already.
func (w *Watcher) update(now []socket, opened map[uint64]bool, complete bool) {
	there := make(map[uint64]bool, len(now))
	for _, s := range now {
		there[s.cookie] = true
		if opened[s.cookie] {
			w.open[s.cookie] = s.Listener
		}
	}
	if !complete {
		return
	}
	maps.DeleteFunc(w.open, func(cookie uint64, _ Listener) bool { return !there[cookie] })
}

func (w *Watcher) list() []Listener {
	list := make([]Listener, 0, len(w.open))
	for _, l := range w.open {
		list = append(list, l)
	}
	return list
}

// Poll does what Run does without the programs, until ctx ends or the kernel cannot say.
func Poll(ctx context.Context, namespaces *Namespaces, changed func([]Listener)) error {
	ticker := time.NewTicker(pollInterval)
	defer ticker.Stop()
	var last map[uint64]Listener
	for {
		list, _, err := namespaces.dump(ephemeralPorts())
		if err != nil {
			return err
		}
		w := Watcher{open: map[uint64]Listener{}}
		for _, s := range list {
			w.open[s.cookie] = s.Listener
		}
		if last == nil || !maps.Equal(last, w.open) {
			changed(w.list())
		}
		last = w.open
		select {
		case <-ticker.C:
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
}

// portRange is that of the ports which the kernel gives to who asks for none.
type portRange struct{ first, last uint16 }

func (r portRange) contains(port uint16) bool { return port >= r.first && port <= r.last }

func ephemeralPorts() portRange {
	r := portRange{32768, 60999} // Linux's default
	if text, err := os.ReadFile("/proc/sys/net/ipv4/ip_local_port_range"); err == nil {
		var is portRange
		if _, err := fmt.Sscan(string(text), &is.first, &is.last); err == nil {
			r = is
		}
	}
	return r
}
