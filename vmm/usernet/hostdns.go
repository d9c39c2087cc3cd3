package usernet

import (
	"io/fs"
	"net"
	"net/netip"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/net/dns/dnsmessage"

	"github.com/wsl2/wsl2/vmm/usernet/policy"
)

// This file is what the host knows of names: its files, and what the guest was told.

// maxServers is what resolv.conf(5) allows (MAXNS).
const maxServers = 3

// maxConfFile bounds the host's files.
const maxConfFile = 1 << 20

// resolvConf is what of resolv.conf(5) counts here.
type resolvConf struct {
	servers []string // HOST:PORT
	search  []string
}

func parseResolvConf(text string, port uint16) resolvConf {
	at := strconv.Itoa(int(port))
	var c resolvConf
	for line := range strings.Lines(text) {
		f := strings.Fields(line)
		if len(f) < 2 {
			continue
		}
		switch f[0] {
		case "nameserver":
			// Link-local servers have a zone.
			if a, err := netip.ParseAddr(f[1]); err == nil && len(c.servers) < maxServers {
				c.servers = append(c.servers, net.JoinHostPort(a.String(), at))
			}
		case "search", "domain":
			c.search = nil
			for _, d := range f[1:] {
				if d = strings.ToLower(strings.Trim(d, ".")); d != "" {
					c.search = append(c.search, d)
				}
			}
		}
	}
	if len(c.servers) == 0 { // as resolv.conf(5) says
		c.servers = []string{net.JoinHostPort("127.0.0.1", at)}
	}
	return c
}

// hosts is hosts(5).
type hosts struct {
	byName map[string][]netip.Addr
	byAddr map[netip.Addr][]string
}

func parseHosts(text string) hosts {
	h := hosts{byName: map[string][]netip.Addr{}, byAddr: map[netip.Addr][]string{}}
	for line := range strings.Lines(text) {
		line, _, _ = strings.Cut(line, "#")
		f := strings.Fields(line)
		if len(f) < 2 {
			continue
		}
		a, err := netip.ParseAddr(f[0])
		if err != nil || a.Zone() != "" {
			continue
		}
		a = a.Unmap()
		for _, name := range f[1:] {
			name = strings.ToLower(strings.TrimSuffix(name, "."))
			h.byName[name] = append(h.byName[name], a)
			h.byAddr[a] = append(h.byAddr[a], name)
		}
	}
	return h
}

// watchedFile is a file's contents, parsed again when the file is another one. Whoever
// asks looks: a few microseconds, and no moment at which the old contents are still used.
type watchedFile[T any] struct {
	path string

	mu    sync.Mutex
	known bool
	id    fileID
	value T
}

type fileID struct {
	dev, ino uint64
	size     int64
	mtime    time.Time
}

// identify tells a file from the one that was there before.
func identify(st fs.FileInfo) fileID {
	id := fileID{size: st.Size(), mtime: st.ModTime()}
	if s, ok := st.Sys().(*syscall.Stat_t); ok {
		id.dev, id.ino = uint64(s.Dev), s.Ino
	}
	return id
}

func (w *watchedFile[T]) load(parse func(string) T) T {
	w.mu.Lock()
	defer w.mu.Unlock()
	var id fileID
	var text []byte
	if st, err := os.Stat(w.path); err == nil && st.Size() <= maxConfFile {
		id = identify(st)
		if w.known && id == w.id {
			return w.value
		}
		text, _ = os.ReadFile(w.path)
	}
	w.known, w.id, w.value = true, id, parse(string(text))
	return w.value
}

type resolvFile struct {
	watchedFile[resolvConf]
	port uint16
}

func (f *resolvFile) load() resolvConf {
	return f.watchedFile.load(func(text string) resolvConf { return parseResolvConf(text, f.port) })
}

type hostsFile struct{ watchedFile[hosts] }

func (f *hostsFile) load() hosts { return f.watchedFile.load(parseHosts) }

// maxSeen bounds how many addresses are remembered by name.
const maxSeen = 16 << 10

// maxNames bounds how many names an address is remembered by, of each kind.
const maxNames = 64

// seen are the names by which the guest was told addresses: what rules about names go
// by. An address stays known; a connection may come long after the answer.
type seen struct {
	on bool // there are rules; immutable

	mu    sync.Mutex
	names map[netip.Addr]policy.Names
}

func (s *seen) of(ip netip.Addr) policy.Names {
	s.mu.Lock()
	defer s.mu.Unlock()
	n := s.names[ip]
	return policy.Names{Asked: slices.Clone(n.Asked), Aliases: slices.Clone(n.Aliases)}
}

func (s *seen) add(addrs []netip.Addr, names policy.Names) {
	if !s.on {
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.names == nil || len(s.names) >= maxSeen {
		s.names = map[netip.Addr]policy.Names{}
	}
	for _, a := range addrs {
		known := s.names[a]
		s.names[a] = policy.Names{Asked: merge(known.Asked, names.Asked), Aliases: merge(known.Aliases, names.Aliases)}
	}
}

func merge(list, more []string) []string {
	for _, name := range more {
		if len(list) < maxNames && !slices.Contains(list, name) {
			list = append(list, name)
		}
	}
	return list
}

// learn adds what a server answered to who asked for these names.
func (s *seen) learn(answer []byte, asked ...string) {
	if !s.on {
		return
	}
	var m dnsmessage.Message
	if m.Unpack(answer) != nil {
		return
	}
	var addrs []netip.Addr
	var aliases []string
	for _, r := range m.Answers {
		switch b := r.Body.(type) {
		case *dnsmessage.AResource:
			addrs = append(addrs, netip.AddrFrom4(b.A))
		case *dnsmessage.AAAAResource:
			addrs = append(addrs, netip.AddrFrom16(b.AAAA))
		case *dnsmessage.CNAMEResource:
			aliases = merge(aliases, []string{canonical(b.CNAME)})
		}
	}
	s.add(addrs, policy.Names{Asked: asked, Aliases: aliases})
}
