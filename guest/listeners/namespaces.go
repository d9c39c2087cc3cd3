package listeners

import (
	"fmt"
	"sync"

	"github.com/wsl2/wsl2/guest/netns"
)

// Namespaces are the network namespaces whose sockets count: our own, and those of distros that have one.
// It is safe for concurrent use.
type Namespaces struct {
	mu     sync.Mutex
	others map[uint64]*netns.Namespace // by their cookies; guarded by mu
	told   int                         // the programs' map of cookies, 0 without; guarded by mu
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
	if s.others == nil {
		s.others = map[uint64]*netns.Namespace{}
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

// dump returns the sockets that processes serve TCP and UDP on.
func (s *Namespaces) dump(ephemeral portRange) ([]socket, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	all, err := dump(ephemeral)
	if err != nil {
		return nil, err
	}
	for cookie, n := range s.others {
		err := n.Do(func() error {
			list, err := dump(ephemeral)
			all = append(all, list...)
			return err
		})
		if err != nil {
			return nil, fmt.Errorf("network namespace %d: %w", cookie, err)
		}
	}
	return all, nil
}
