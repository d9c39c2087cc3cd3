package ports

import (
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"reflect"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"github.com/wsl2/wsl2/internal/forward"
	"github.com/wsl2/wsl2/internal/wire"
	"github.com/wsl2/wsl2/launcher/internal/guestconn"
)

// Bound is what became of a Forward.
type Bound struct {
	Distro string   `json:"distro"`
	Proto  string   `json:"proto"` // tcp or udp
	Port   uint16   `json:"port"`
	Host   []string `json:"host"` // where the host listens
	// Published: not on loopback alone.
	Published bool `json:"published,omitempty"`
	// Note says what is not as it should be, and the next step.
	Note string `json:"note,omitempty"`
}

const (
	// maxConnections of a VM, at a time; each takes two descriptors.
	maxConnections = 8192
	// nextPorts is how many ports are tried when one is taken.
	nextPorts = 100
	// answerTimeout bounds the guest's answer; a full backlog there takes two minutes.
	answerTimeout = 3 * time.Minute
)

// Forwarder listens on the host for the ports of one VM.
type Forwarder struct {
	// dial connects to a distro's session port.
	dial func(port uint32, hello wire.Hello) (*guestconn.Conn, error)
	// unprivileged is the first port that needs no permission.
	unprivileged uint16
	// isHost tells whether a peer is the host itself: netip.Addr.IsLoopback but for tests.
	isHost  func(netip.Addr) bool
	buffers forward.Buffers
	wg      sync.WaitGroup // of all goroutines

	entries map[key]*entry // owned by who calls Apply

	mu     sync.Mutex
	conns  map[io.Closer]struct{} // those that Close closes; guarded by mu
	closed bool                   // guarded by mu
	freed  chan struct{}          // of capacity 1: a connection has ended
	queued atomic.Int64           // bytes of all datagrams that wait for the guest
}

// entry is a Forward with its listeners.
type entry struct {
	spec      Forward
	bound     Bound
	listeners []io.Closer
}

func (e *entry) close() {
	for _, l := range e.listeners {
		l.Close()
	}
	e.listeners = nil
}

// NewForwarder returns one for the VM with this vsock socket.
func NewForwarder(vsockPath string) *Forwarder {
	return &Forwarder{
		dial: func(port uint32, hello wire.Hello) (*guestconn.Conn, error) {
			return guestconn.Dial(vsockPath, port, hello, nil)
		},
		unprivileged: unprivilegedStart(), isHost: netip.Addr.IsLoopback, entries: map[key]*entry{}, conns: map[io.Closer]struct{}{}, freed: make(chan struct{}, 1),
	}
}

func unprivilegedStart() uint16 {
	if text, err := os.ReadFile("/proc/sys/net/ipv4/ip_unprivileged_port_start"); err == nil {
		if n, err := strconv.ParseUint(strings.TrimSpace(string(text)), 10, 16); err == nil {
			return uint16(n)
		}
	}
	return 1024
}

// Apply makes the list what the host listens for, and says what became of it. Connections
// that stand are not touched.
func (f *Forwarder) Apply(list []Forward, privileged bool) []Bound {
	wanted := map[key]*Forward{}
	for i := range list {
		wanted[list[i].key()] = &list[i]
	}
	for k, e := range f.entries {
		if w := wanted[k]; w == nil || !reflect.DeepEqual(*w, e.spec) {
			e.close()
			delete(f.entries, k)
		}
	}
	var taken []*entry
	for _, spec := range list {
		if f.entries[spec.key()] != nil {
			continue
		}
		e := &entry{spec: spec, bound: Bound{Distro: spec.Distro, Proto: spec.proto(), Port: spec.Port, Host: []string{}}}
		f.entries[spec.key()] = e
		f.publish(e)
		if f.loopback(e, privileged) {
			taken = append(taken, e)
		}
	}
	// After all that get the port they ask for.
	for _, e := range taken {
		f.another(e)
	}
	all := make([]Bound, 0, len(list))
	for _, spec := range list {
		all = append(all, f.entries[spec.key()].bound)
	}
	return all
}

// publish listens where rules say.
func (f *Forwarder) publish(e *entry) {
	for _, r := range e.spec.Rules {
		addresses := []netip.Addr{r.Address}
		if !r.Address.IsValid() {
			addresses = []netip.Addr{netip.IPv4Unspecified(), netip.IPv6Unspecified()}
		}
		err := f.listen(e, addresses, r.HostPort, r)
		if err != nil {
			e.note(fmt.Sprintf("not published on port %d: %s", r.HostPort, f.explain(err, e.spec, r.HostPort)))
			continue
		}
		e.bound.Published = e.bound.Published || !r.Address.IsLoopback()
	}
}

func (e *entry) note(text string) {
	if e.bound.Note != "" {
		text = e.bound.Note + "; " + text
	}
	e.bound.Note = text
}

// loopback listens there, unless a rule does already. It tells whether the port is taken.
func (f *Forwarder) loopback(e *entry, privileged bool) (taken bool) {
	if !e.spec.Loopback {
		return false
	}
	for _, r := range e.spec.Rules {
		covers := !r.Address.IsValid() || r.Address.IsUnspecified() || r.Address.IsLoopback()
		if covers && (r.HostPort == e.spec.Port || e.spec.Port < f.unprivileged && !privileged) {
			return false
		}
	}
	if e.spec.Port < f.unprivileged && !privileged {
		e.note(f.explain(unix.EACCES, e.spec, e.spec.Port))
		return false
	}
	err := f.listen(e, e.spec.loopbacks(), e.spec.Port, Rule{})
	if errors.Is(err, unix.EADDRINUSE) {
		return true
	}
	if err != nil {
		e.note(f.explain(err, e.spec, e.spec.Port))
	}
	return false
}

// loopbacks are the host's addresses that stand for the guest's.
func (f Forward) loopbacks() (list []netip.Addr) {
	if f.V4 {
		list = append(list, netip.AddrFrom4([4]byte{127, 0, 0, 1}))
	}
	if f.V6 {
		list = append(list, netip.IPv6Loopback())
	}
	return list
}

// another listens on the next port that is free.
func (f *Forwarder) another(e *entry) {
	port := int(e.spec.Port)
	first := max(port+1, int(f.unprivileged))
	for p := first; p < min(first+nextPorts, 65536); p++ {
		err := f.listen(e, e.spec.loopbacks(), uint16(p), Rule{})
		if err == nil {
			e.note(fmt.Sprintf("port %d of this host is in use; %d stands for it", port, p))
			return
		}
		if !errors.Is(err, unix.EADDRINUSE) {
			e.note(f.explain(err, e.spec, uint16(p)))
			return
		}
	}
	e.note(fmt.Sprintf("port %d of this host is in use, and those after it; choose one: wsl2 ports --publish %s:%d:HOSTPORT --address 127.0.0.1", port, e.spec.Distro, port))
}

// explain says why a port cannot be listened on, and what to do.
func (f *Forwarder) explain(err error, spec Forward, port uint16) string {
	switch {
	case errors.Is(err, unix.EACCES) || errors.Is(err, unix.EPERM):
		udp := ""
		if spec.UDP {
			udp = "/udp"
		}
		return fmt.Sprintf("port %[1]d is privileged on this host; allow it: sudo sysctl net.ipv4.ip_unprivileged_port_start=%[1]d, or take another: wsl2 ports --publish %[2]s:%[3]d:%[4]d%[5]s --address 127.0.0.1",
			port, spec.Distro, spec.Port, 8000+spec.Port%1000, udp)
	case errors.Is(err, unix.EADDRINUSE):
		return "it is in use on this host; end what uses it, or choose another HOSTPORT"
	case errors.Is(err, unix.EADDRNOTAVAIL):
		return "the host does not have that address"
	}
	return err.Error()
}

// listen listens on one port of all the addresses, or of none. An address family that the
// host lacks is passed over, if another is left.
func (f *Forwarder) listen(e *entry, addresses []netip.Addr, port uint16, r Rule) error {
	var opened []io.Closer
	var host []string
	var lacking error
	for _, a := range addresses {
		l, err := f.listenOn(e.spec, netip.AddrPortFrom(a, port), r)
		if len(addresses) > 1 && (errors.Is(err, unix.EADDRNOTAVAIL) || errors.Is(err, unix.EAFNOSUPPORT)) {
			lacking = err
			continue
		}
		if err != nil {
			for _, l := range opened {
				l.Close()
			}
			return err
		}
		opened, host = append(opened, l), append(host, netip.AddrPortFrom(a, port).String())
	}
	if len(opened) == 0 {
		return lacking
	}
	e.listeners = append(e.listeners, opened...)
	e.bound.Host = append(e.bound.Host, host...)
	return nil
}

// listenOn starts to serve one address.
func (f *Forwarder) listenOn(spec Forward, at netip.AddrPort, r Rule) (io.Closer, error) {
	family := "4"
	if at.Addr().Is6() {
		family = "6"
	}
	v6 := family == "6" && spec.V6 || !spec.V4
	if spec.UDP {
		c, err := net.ListenUDP("udp"+family, net.UDPAddrFromAddrPort(at))
		if err != nil {
			return nil, err
		}
		u := &udpListener{f: f, c: c, spec: spec, v6: v6, rule: r, flows: map[netip.AddrPort]*flow{}}
		f.wg.Go(u.serve)
		return c, nil
	}
	l, err := net.ListenTCP("tcp"+family, net.TCPAddrFromAddrPort(at))
	if err != nil {
		return nil, err
	}
	f.wg.Go(func() { f.accept(l, spec, v6, r) })
	return l, nil
}

// acceptPause bounds how long a process that has no descriptors left waits for a connection to end.
const acceptPause = time.Second

func (f *Forwarder) accept(l *net.TCPListener, spec Forward, v6 bool, r Rule) {
	for {
		c, err := l.AcceptTCP()
		if errors.Is(err, net.ErrClosed) {
			return
		}
		if err != nil {
			select {
			case <-f.freed:
			case <-time.After(acceptPause):
			}
			continue
		}
		peer, ok := c.RemoteAddr().(*net.TCPAddr)
		if !ok || !f.may(peer.AddrPort().Addr(), r) || !f.enter(c) {
			forward.Abort(c)
			continue
		}
		f.wg.Go(func() {
			defer f.leave(c)
			f.serveTCP(c, spec, v6)
		})
	}
}

// may tells whether a peer may connect to what a rule publishes.
func (f *Forwarder) may(peer netip.Addr, r Rule) bool {
	return r.allows(peer) || f.isHost(peer.Unmap())
}

// enter notes a connection, unless there are too many.
func (f *Forwarder) enter(c io.Closer) bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.closed || len(f.conns) >= maxConnections {
		return false
	}
	f.conns[c] = struct{}{}
	return true
}

func (f *Forwarder) leave(c io.Closer) {
	f.mu.Lock()
	defer f.mu.Unlock()
	delete(f.conns, c)
	select {
	case f.freed <- struct{}{}:
	default:
	}
}

func (f *Forwarder) serveTCP(c *net.TCPConn, spec Forward, v6 bool) {
	g, err := f.connect(spec, v6)
	if err != nil {
		forward.Abort(c) // as if nobody listened
		return
	}
	if rest := g.Unread(); len(rest) > 0 {
		if _, err := c.Write(rest); err != nil {
			g.Close()
			forward.Abort(c)
			return
		}
	}
	f.buffers.Relay(c, g.UnixConn) //nolint:errcheck // how it ends is the peers' business
}

// connect has the distro connect to its port.
func (f *Forwarder) connect(spec Forward, v6 bool) (*guestconn.Conn, error) {
	g, err := f.dial(spec.Session, wire.Hello{Version: wire.Version, Role: wire.RolePort})
	if err != nil {
		return nil, err
	}
	g.SetDeadline(time.Now().Add(answerTimeout))
	err = wire.Write(g.UnixConn, &wire.DialPort{UDP: spec.UDP, V6: v6, Number: spec.Port})
	var m wire.Message
	if err == nil {
		m, err = wire.Read(g)
	}
	if err == nil {
		if _, ok := m.(*wire.Started); !ok {
			err = fmt.Errorf("the distro answers %v", m)
		}
	}
	if err != nil {
		g.Close()
		return nil, err
	}
	g.SetDeadline(time.Time{})
	return g, nil
}

// Close ends everything, connections too.
func (f *Forwarder) Close() {
	for _, e := range f.entries {
		e.close()
	}
	f.mu.Lock()
	f.closed = true
	for c := range f.conns {
		c.Close()
	}
	f.mu.Unlock()
	f.wg.Wait()
}
