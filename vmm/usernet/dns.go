package usernet

import (
	"cmp"
	"context"
	"encoding/binary"
	"errors"
	"io"
	"math/rand/v2"
	"net"
	"net/netip"
	"strings"
	"time"

	"golang.org/x/net/dns/dnsmessage"
	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/header"
	"gvisor.dev/gvisor/pkg/tcpip/stack"
	"gvisor.dev/gvisor/pkg/waiter"

	"github.com/wsl2/wsl2/vmm/usernet/policy"
)

const (
	dnsPort = 53

	// Domain is where the names are that only the guest knows; hostName is the host.
	Domain   = "wsl2.internal"
	hostName = "host." + Domain

	// hedge is how long a server may be silent until the next one is asked, too.
	hedge = time.Second
	// dnsTimeout bounds a question; resolvers ask again after 5 s.
	dnsTimeout = 10 * time.Second
	// dnsIdle is how long a connection without a question is kept.
	dnsIdle = 30 * time.Second
	// answerTTL is that of answers from this process, which change when the host's do.
	answerTTL = 5

	maxMessage = 64 << 10
	// maxQuestion is many times what a question with all its options takes.
	maxQuestion = 4 << 10
)

// DNSConfig says whom questions go to.
type DNSConfig struct {
	// ResolvConf and Hosts are the host's files, if not those of /etc. They are read
	// again when they have changed.
	ResolvConf, Hosts string
	// Names is a file as Hosts is, of what has a name in Domain in the guest's network, without the domain;
	// "" for none.
	Names string
	// Port is where servers listen, if not at 53.
	Port uint16
}

// resolver answers the guest's questions as the host's own resolver would: from
// /etc/hosts, or by the servers that /etc/resolv.conf names by then, which on many hosts
// is a resolver on loopback that knows of VPNs.
type resolver struct {
	n     *Network
	hosts hostsFile
	names hostsFile // of Domain
	conf  resolvFile
	seen  seen
}

func newResolver(n *Network) *resolver {
	c := n.cfg.DNS
	r := &resolver{n: n, seen: seen{on: !n.cfg.Policy.Empty()}}
	r.hosts.path, r.conf.path = "/etc/hosts", "/etc/resolv.conf"
	if c.Hosts != "" {
		r.hosts.path = c.Hosts
	}
	r.names.path = c.Names
	r.conf.port = cmp.Or(c.Port, dnsPort)
	if c.ResolvConf != "" {
		r.conf.path = c.ResolvConf
	}
	return r
}

// serveDNSPacket answers a question. Each stands for itself, so that no flow is kept for it: a resolver
// takes another port for each.
func (n *Network) serveDNSPacket(id stack.TransportEndpointID, pkt *stack.PacketBuffer) {
	data := pkt.Data().AsRange().ToSlice()
	size := int(header.UDP(pkt.TransportHeader().Slice()).Length()) - header.UDPMinimumSize
	if size < 0 || size > min(len(data), maxQuestion) {
		return
	}
	release := take(n.limits.questions)
	if release == nil {
		return // it is asked again
	}
	n.tasks.Go(func() {
		defer release()
		if answer := n.dns.answer(n.ctx, data[:size], false); answer != nil {
			n.sendUDP(id, answer)
		}
	})
}

// serveDNSStream answers those of one connection, one after the other.
func (n *Network) serveDNSStream(g *guestConn) {
	defer g.ep.Close()
	for {
		ctx, cancel := context.WithTimeout(n.ctx, dnsIdle)
		var head [2]byte
		err := g.readFull(ctx, head[:])
		size := binary.BigEndian.Uint16(head[:])
		if size > maxQuestion {
			err = errReset
		}
		var question []byte
		if err == nil {
			question = make([]byte, size)
			err = g.readFull(ctx, question)
		}
		if err == nil {
			err = n.answerStream(ctx, g, question)
		}
		cancel()
		if err != nil {
			return
		}
	}
}

func (n *Network) answerStream(ctx context.Context, g *guestConn, question []byte) error {
	release := take(n.limits.questions)
	if release == nil {
		return errReset
	}
	defer release()
	answer := n.dns.answer(ctx, question, true)
	if answer == nil {
		return io.ErrUnexpectedEOF
	}
	framed := payload(append(binary.BigEndian.AppendUint16(nil, uint16(len(answer))), answer...))
	return g.write(ctx, &framed)
}

func (g *guestConn) readFull(ctx context.Context, p []byte) error {
	for len(p) > 0 {
		err := g.wait(ctx, waiter.ReadableEvents, func() tcpip.Error {
			w := tcpip.SliceWriter(p)
			res, err := g.ep.Read(&w, tcpip.ReadOptions{})
			p = p[res.Count:]
			return err
		})
		if err != nil {
			return err
		}
	}
	return nil
}

// answer returns the answer to a message of the guest's; nil for what is no question.
func (r *resolver) answer(ctx context.Context, message []byte, stream bool) []byte {
	h, q, err := parseQuestion(message)
	if err != nil {
		return nil
	}
	ctx, cancel := context.WithTimeout(ctx, dnsTimeout)
	defer cancel()
	name := canonical(q.Name)
	permitted := r.n.cfg.Policy.PermitsName(name) || inDomain(name)
	if permitted {
		if addrs, names, known := r.local(name, q.Type); known {
			r.seen.add(addrs, policy.Names{Asked: []string{name}})
			return reply(h, q, dnsmessage.RCodeSuccess, records(q, addrs, names))
		}
	}
	if inDomain(name) {
		return reply(h, q, dnsmessage.RCodeNameError, nil)
	}
	conf := r.conf.load()
	if answer := r.search(ctx, conf, h, q, stream); answer != nil {
		return answer
	}
	if !permitted {
		r.n.log.printf("refused: DNS for %q", name)
		return reply(h, q, dnsmessage.RCodeRefused, nil)
	}
	answer := exchange(ctx, conf.servers, message, q, stream)
	if answer == nil {
		return reply(h, q, dnsmessage.RCodeServerFailure, nil)
	}
	r.seen.learn(answer, name)
	return answer
}

func parseQuestion(message []byte) (dnsmessage.Header, dnsmessage.Question, error) {
	var p dnsmessage.Parser
	h, err := p.Start(message)
	if err != nil {
		return h, dnsmessage.Question{}, err
	}
	if h.Response || h.OpCode != 0 {
		return h, dnsmessage.Question{}, errors.New("no query")
	}
	q, err := p.Question()
	if err == nil {
		// One, as all of the world's servers want it.
		if _, more := p.Question(); more != dnsmessage.ErrSectionDone {
			err = errors.New("more than one question")
		}
	}
	return h, q, err
}

func canonical(n dnsmessage.Name) string {
	return strings.ToLower(strings.TrimSuffix(n.String(), "."))
}

func inDomain(name string) bool { return name == Domain || strings.HasSuffix(name, "."+Domain) }

// local answers what needs no server; known tells whether the name is one of these, also if
// it has no address of the type asked for.
func (r *resolver) local(name string, typ dnsmessage.Type) (addrs []netip.Addr, names []string, known bool) {
	c := r.n.cfg
	switch {
	case name == hostName:
		// Not the other one: UDP servers would have to listen on both loopback addresses.
		return []netip.Addr{c.Gateway4}, nil, true
	case inDomain(name):
		addrs = r.names.load().byName[strings.TrimSuffix(name, "."+Domain)]
		return addrs, nil, len(addrs) > 0
	}
	if typ == dnsmessage.TypePTR {
		ip, ok := reverse(name)
		if !ok {
			return nil, nil, false
		}
		if ip == c.Gateway4 || ip == c.Gateway6 {
			return nil, []string{hostName}, true
		}
		for _, name := range r.names.load().byAddr[ip] {
			names = append(names, name+"."+Domain)
		}
		if len(names) == 0 {
			names = r.hosts.load().byAddr[ip]
		}
		return nil, names, len(names) > 0
	}
	addrs = r.hosts.load().byName[name]
	if len(addrs) == 0 {
		return nil, nil, false
	}
	// The host's own loopback is not the guest's.
	for i, a := range addrs {
		if a.IsLoopback() && name != "localhost" {
			addrs = append([]netip.Addr(nil), addrs...)
			addrs[i] = r.n.gateway(a)
		}
	}
	return addrs, nil, typ == dnsmessage.TypeA || typ == dnsmessage.TypeAAAA
}

// reverse is the address of a name in in-addr.arpa or ip6.arpa.
func reverse(name string) (netip.Addr, bool) {
	if s, ok := strings.CutSuffix(name, ".in-addr.arpa"); ok {
		l := strings.Split(s, ".")
		if len(l) != 4 {
			return netip.Addr{}, false
		}
		ip, err := netip.ParseAddr(l[3] + "." + l[2] + "." + l[1] + "." + l[0])
		return ip, err == nil
	}
	s, ok := strings.CutSuffix(name, ".ip6.arpa")
	if !ok || len(s) != 63 {
		return netip.Addr{}, false
	}
	var b strings.Builder
	for i := 62; i >= 0; i -= 2 {
		b.WriteByte(s[i])
		if i%8 == 0 && i > 0 {
			b.WriteByte(':')
		}
	}
	ip, err := netip.ParseAddr(b.String())
	return ip, err == nil
}

func records(q dnsmessage.Question, addrs []netip.Addr, names []string) (rs []dnsmessage.Resource) {
	h := dnsmessage.ResourceHeader{Name: q.Name, Class: dnsmessage.ClassINET, TTL: answerTTL}
	for _, a := range addrs {
		switch {
		case a.Is4() && q.Type == dnsmessage.TypeA:
			rs = append(rs, dnsmessage.Resource{Header: h, Body: &dnsmessage.AResource{A: a.As4()}})
		case a.Is6() && q.Type == dnsmessage.TypeAAAA:
			rs = append(rs, dnsmessage.Resource{Header: h, Body: &dnsmessage.AAAAResource{AAAA: a.As16()}})
		}
	}
	for _, name := range names {
		if ptr, err := dnsmessage.NewName(name + "."); err == nil {
			rs = append(rs, dnsmessage.Resource{Header: h, Body: &dnsmessage.PTRResource{PTR: ptr}})
		}
	}
	return rs
}

// reply is an answer of our own.
func reply(h dnsmessage.Header, q dnsmessage.Question, code dnsmessage.RCode, answers []dnsmessage.Resource) []byte {
	m := dnsmessage.Message{
		Header: dnsmessage.Header{
			ID: h.ID, Response: true, RecursionDesired: h.RecursionDesired, RecursionAvailable: true, RCode: code,
		},
		Questions: []dnsmessage.Question{q}, Answers: answers,
	}
	b, err := m.Pack()
	switch {
	case err != nil && len(answers) > 0: // of the host's files, with a name that is none
		return reply(h, q, dnsmessage.RCodeServerFailure, nil)
	case err != nil:
		return nil
	}
	return b
}

// search tries a name without a dot in the host's search domains, as the host's own
// programs do; the guest cannot know them, for they change with the host's networks. Rules are
// about the whole names. nil if there is nothing.
func (r *resolver) search(ctx context.Context, conf resolvConf, h dnsmessage.Header, q dnsmessage.Question, stream bool) []byte {
	name := canonical(q.Name)
	if strings.Contains(name, ".") || name == "" || q.Type != dnsmessage.TypeA && q.Type != dnsmessage.TypeAAAA {
		return nil
	}
	for _, domain := range conf.search {
		full, err := dnsmessage.NewName(name + "." + domain + ".")
		if err != nil || !r.n.cfg.Policy.PermitsName(canonical(full)) {
			continue
		}
		fq := dnsmessage.Question{Name: full, Type: q.Type, Class: q.Class}
		m := dnsmessage.Message{Header: dnsmessage.Header{RecursionDesired: true}, Questions: []dnsmessage.Question{fq}}
		query, err := m.Pack()
		if err != nil {
			continue
		}
		answer := exchange(ctx, conf.servers, query, fq, stream)
		var got dnsmessage.Message
		if answer == nil || got.Unpack(answer) != nil || got.RCode != dnsmessage.RCodeSuccess || len(got.Answers) == 0 {
			continue
		}
		r.seen.learn(answer, name, canonical(full))
		alias := dnsmessage.Resource{
			Header: dnsmessage.ResourceHeader{Name: q.Name, Class: dnsmessage.ClassINET, TTL: answerTTL},
			Body:   &dnsmessage.CNAMEResource{CNAME: full},
		}
		return reply(h, q, dnsmessage.RCodeSuccess, append([]dnsmessage.Resource{alias}, got.Answers...))
	}
	return nil
}

// exchange asks servers until one has an answer: the next one a second later if it is
// silent, at once if it has failed. nil if none has.
func exchange(ctx context.Context, servers []string, query []byte, q dnsmessage.Question, stream bool) []byte {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	answers := make(chan []byte, len(servers))
	next, running := 0, 0
	begin := func() {
		server := servers[next]
		next++
		running++
		go func() { answers <- ask(ctx, server, query, q, stream) }()
	}
	if len(servers) > 0 {
		begin()
	}
	timer := time.NewTimer(hedge)
	defer timer.Stop()
	var failed []byte // the best of what failed
	for next < len(servers) || running > 0 {
		var due <-chan time.Time
		if next < len(servers) {
			due = timer.C
		}
		select {
		case <-ctx.Done():
			return failed
		case <-due:
			begin()
			timer.Reset(hedge)
		case a := <-answers:
			running--
			if a != nil && !serverFailed(a) {
				return a
			}
			if a != nil {
				failed = a
			}
			timer.Reset(0)
		}
	}
	return failed
}

// serverFailed tells whether another server may know better.
func serverFailed(answer []byte) bool {
	switch dnsmessage.RCode(answer[3] & 0xf) {
	case dnsmessage.RCodeServerFailure, dnsmessage.RCodeRefused, dnsmessage.RCodeNotImplemented:
		return true
	}
	return false
}

const dnsHeaderLen = 12

// ask asks one server; nil without an answer that is one.
func ask(ctx context.Context, server string, query []byte, q dnsmessage.Question, stream bool) []byte {
	network := "udp"
	if stream {
		network = "tcp"
	}
	var d net.Dialer
	c, err := d.DialContext(ctx, network, server)
	if err != nil {
		return nil
	}
	defer c.Close()
	stop := context.AfterFunc(ctx, func() { _ = c.SetDeadline(time.Unix(1, 0)) })
	defer stop()
	id := uint16(rand.Uint32()) // ChaCha8, seeded by the system
	out := append([]byte(nil), query...)
	binary.BigEndian.PutUint16(out, id)
	if stream {
		out = append(binary.BigEndian.AppendUint16(nil, uint16(len(out))), out...)
	}
	if _, err := c.Write(out); err != nil {
		return nil
	}
	b := chunks.Get().(*[]byte)
	defer chunks.Put(b)
	buf := (*b)[:maxMessage]
	for {
		n, err := readMessage(c, buf, stream)
		if err != nil {
			return nil
		}
		answer := buf[:n]
		// Anything else is a late answer, or somebody's who guesses.
		if n >= dnsHeaderLen && binary.BigEndian.Uint16(answer) == id && answers(answer, q) {
			copy(answer, query[:2])
			return append([]byte(nil), answer...)
		}
		if stream {
			return nil
		}
	}
}

func readMessage(c net.Conn, buf []byte, stream bool) (int, error) {
	if !stream {
		return c.Read(buf)
	}
	var head [2]byte
	if _, err := io.ReadFull(c, head[:]); err != nil {
		return 0, err
	}
	return io.ReadFull(c, buf[:binary.BigEndian.Uint16(head[:])])
}

// answers tells whether a message is an answer to q.
func answers(message []byte, q dnsmessage.Question) bool {
	var p dnsmessage.Parser
	h, err := p.Start(message)
	if err != nil || !h.Response {
		return false
	}
	got, err := p.Question()
	return err == nil && got.Type == q.Type && got.Class == q.Class && strings.EqualFold(got.Name.String(), q.Name.String())
}
