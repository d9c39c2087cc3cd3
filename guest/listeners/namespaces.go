package listeners

import (
	"sync"

	"github.com/wsl2/wsl2/guest/netns"
)

// Namespaces are the network namespaces whose sockets count: our own, and those of distros that have one.
// It is safe for concurrent use.
type Namespaces struct {
	logf func(format string, args ...any) // immutable

	mu     sync.Mutex
	others map[uint64]*netns.Namespace // by their cookies; guarded by mu
	silent map[uint64]bool             // those that could not be asked, which is logged once; guarded by mu
	told   int                         // the programs' map of cookies, 0 without; guarded by mu
}

// NewNamespaces returns our own alone, and logs what is wrong with others.
func NewNamespaces(logf func(format string, args ...any)) *Namespaces {
	return &Namespaces{logf: logf, others: map[uint64]*netns.Namespace{}, silent: map[uint64]bool{}}
}

// Add makes one count, until Remove. Nothing listens there yet.
func (s *Namespaces) Add(n *netns.Namespace) (err error) {
	var cookie uint64
	err = n.Do(func() error { cookie, err = netns.Cookie(); return err })
	if err != nil {
		return err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.told != 0 {
		if err := insert(s.told, cookie); err != nil {
			return err
		}
	}
	s.others[cookie] = n
	return nil
}

// Remove undoes Add.
func (s *Namespaces) Remove(n *netns.Namespace) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for cookie, other := range s.others {
		if other != n {
			continue
		}
		delete(s.others, cookie)
		delete(s.silent, cookie)
		if s.told != 0 {
			remove(s.told, cookie) //nolint:errcheck // no other namespace ever has that cookie
		}
	}
}

// tell has the programs know the namespaces, by a map of theirs; 0 for no longer.
func (s *Namespaces) tell(mapFD int) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.told = mapFD
	if mapFD == 0 {
		return nil
	}
	own, err := netns.Cookie()
	if err == nil {
		err = insert(mapFD, own)
	}
	for cookie := range s.others {
		if err == nil {
			err = insert(mapFD, cookie)
		}
	}
	return err
}

// dump returns the sockets that processes serve TCP and UDP on. It is not complete if a distro's namespace could not be
// asked: what is wrong there is no reason to say nothing of the others.
func (s *Namespaces) dump(ephemeral portRange) (all []socket, complete bool, err error) {
	add := func() error {
		list, err := dump(ephemeral)
		all = append(all, list...)
		return err
	}
	if err := add(); err != nil {
		return nil, false, err
	}
	return all, s.each(add), nil
}

// each calls f in the namespace of every distro, and tells whether nothing failed. The kernel's answers may take long:
// starts and ends of distros, which wait for mu, do not wait for them.
func (s *Namespaces) each(f func() error) (complete bool) {
	held, complete := s.hold()
	for cookie, n := range held {
		err := n.Do(f)
		n.Close()
		if err != nil {
			complete = false
			s.mu.Lock()
			s.failed(cookie, err)
			s.mu.Unlock()
		}
	}
	return complete
}

// hold returns the distros' namespaces, to be closed by the caller, and whether it could do so with all.
func (s *Namespaces) hold() (held map[uint64]*netns.Namespace, all bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	held = make(map[uint64]*netns.Namespace, len(s.others))
	for cookie, n := range s.others {
		if h, err := n.Dup(); err == nil {
			held[cookie] = h
		} else {
			s.failed(cookie, err)
		}
	}
	return held, len(held) == len(s.others)
}

// failed logs, once, that a namespace could not be asked. mu is held.
func (s *Namespaces) failed(cookie uint64, err error) {
	if s.others[cookie] != nil && !s.silent[cookie] { // else it has ended meanwhile
		s.silent[cookie] = true
		s.logf("ports of a distro with a network of its own may not appear on the host (network namespace %d): %v", cookie, err)
	}
}
