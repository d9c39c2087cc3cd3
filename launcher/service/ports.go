package service

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"reflect"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/wsl2/wsl2/internal/wire"
	"github.com/wsl2/wsl2/launcher/api"
	"github.com/wsl2/wsl2/launcher/ports"
	"github.com/wsl2/wsl2/launcher/registry"
)

// This file is ports of distros on the host (package ports): what the guest says is open
// becomes a plan, and a process of the VM's makes it so.

// watchDelay keeps what the guest loads to see its listeners off the way of a VM's first command.
const watchDelay = 250 * time.Millisecond

// Bounds of what a guest can make us log, a distro can make us tell, and of that one command is told.
const (
	maxPortWarnings = 100
	maxPortNotices  = 5
)

// settleTimeout bounds the wait of --publish for the process.
const settleTimeout = 30 * time.Second

// portsProcess is *ports.Process, but for tests.
type portsProcess interface {
	Apply(list []ports.Forward, privileged bool) ([]ports.Bound, error)
	Close() error
}

func startPorts(vsockPath string) (portsProcess, error) {
	p, err := ports.Start(vsockPath)
	if err != nil {
		return nil, err
	}
	return p, nil
}

// vmPorts are those of one VM; guarded by Manager.mu.
type vmPorts struct {
	watched bool            // the guest was asked, or is about to be
	open    []wire.Port     // what it says
	plan    []ports.Forward // for the process
	kick    chan struct{}   // holds one token when plan has changed; nil while there is no process
	bound   []ports.Bound   // what the process has made of a plan
	settled bool            // of the last one

	warnings int                        // logged so far
	told     map[string]map[string]bool // notes that a session's user has seen, by distro in lower case
}

// portBook is what the Managers of a user have in common: the rules of `wsl2 ports --publish`,
// and who waits for changes.
type portBook struct {
	mu     sync.Mutex
	file   string        // remembers the rules; "": nobody does
	rules  []ports.Rule  // guarded by mu
	serial uint64        // counts changes; guarded by mu
	next   chan struct{} // closed at the next one; guarded by mu
}

func newPortBook(file string) (*portBook, error) {
	b := &portBook{file: file, serial: 1, next: make(chan struct{})}
	if file == "" {
		return b, nil
	}
	text, err := os.ReadFile(file)
	if err == nil {
		err = json.Unmarshal(text, &b.rules)
	}
	if errors.Is(err, os.ErrNotExist) {
		err = nil
	}
	return b, err
}

// all returns the rules.
func (b *portBook) all() []ports.Rule {
	b.mu.Lock()
	defer b.mu.Unlock()
	return slices.Clone(b.rules)
}

// set adds a rule in place of one for the same port, or takes that away.
func (b *portBook) set(r ports.Rule, publish bool) (had bool, err error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	rules := slices.DeleteFunc(slices.Clone(b.rules), r.Same)
	had = len(rules) < len(b.rules)
	if publish {
		rules = append(rules, r)
	}
	return had, b.saveLocked(rules)
}

// rename lets the rules of a distro be those of another name, or with "" of none: a distro
// that gets the name later must not find its ports published.
func (b *portBook) rename(name, to string) error {
	b.mu.Lock()
	defer b.mu.Unlock()
	rules := []ports.Rule{}
	for _, r := range b.rules {
		if strings.EqualFold(r.Distro, name) {
			r.Distro = to
		}
		if r.Distro != "" {
			rules = append(rules, r)
		}
	}
	if slices.EqualFunc(rules, b.rules, func(x, y ports.Rule) bool { return x.Distro == y.Distro }) {
		return nil
	}
	return b.saveLocked(rules)
}

// saveLocked writes the rules down and takes them over. Preconditions: b.mu is held.
func (b *portBook) saveLocked(rules []ports.Rule) error {
	if b.file != "" {
		text, err := json.MarshalIndent(rules, "", "  ")
		if err == nil {
			err = registry.WriteFile(b.file, text)
		}
		if err != nil {
			return fmt.Errorf("remember what is published: %w", err)
		}
	}
	b.rules = rules
	return nil
}

// changed wakes those who wait.
func (b *portBook) changed() {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.serial++
	close(b.next)
	b.next = make(chan struct{})
}

// state returns the number of changes so far, and what is closed at the next.
func (b *portBook) state() (uint64, <-chan struct{}) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.serial, b.next
}

// policy is that of a VM.
func (m *Manager) policy(v *vm) ports.Policy {
	p := v.settings.Ports
	p.Rules = append(slices.Clone(p.Rules), m.book.all()...)
	return p
}

// watchPorts has the guest tell of its ports, soon. Preconditions: m.mu is held.
func (m *Manager) watchPorts(v *vm) {
	if p := m.policy(v); v.ports.watched || !p.Localhost && len(p.Rules) == 0 {
		return
	}
	v.ports.watched = true
	time.AfterFunc(watchDelay, func() {
		select {
		case <-v.gone:
		default:
			v.machine.WatchPorts() //nolint:errcheck // a guest that does not hear it is about to be killed
		}
	})
}

// portsOpen handles the guest's event.
func (m *Manager) portsOpen(v *vm, list []wire.Port) {
	m.mu.Lock()
	defer m.mu.Unlock()
	v.ports.open = list
	m.planPorts(v)
}

// planPorts brings the host into line with guest, distros and rules. Preconditions: m.mu is held.
func (m *Manager) planPorts(v *vm) {
	if v == nil || v.machine == nil || m.vm != v { // not up yet, or gone
		return
	}
	sessions := map[string]uint32{}
	for _, d := range m.distros {
		if d.vm == v && d.state == api.StateRunning {
			sessions[d.spec.Name] = d.port
		}
	}
	plan := ports.Plan(v.ports.open, sessions, m.policy(v))
	if len(plan) == len(v.ports.plan) && (len(plan) == 0 || reflect.DeepEqual(plan, v.ports.plan)) {
		return
	}
	v.ports.plan, v.ports.settled = plan, false
	if v.ports.kick == nil {
		v.ports.kick = make(chan struct{}, 1)
		m.wg.Go(func() { m.forwardPorts(v, v.ports.kick) })
	}
	select {
	case v.ports.kick <- struct{}{}:
	default: // it has yet to look
	}
}

// forwardPorts runs the process and hands it plans until the VM ends.
func (m *Manager) forwardPorts(v *vm, kick <-chan struct{}) {
	err := m.runPorts(v, kick)
	m.mu.Lock()
	defer m.mu.Unlock()
	if err != nil {
		m.log.Warn("ports are not forwarded until others open", "err", err)
	}
	v.ports.kick, v.ports.plan, v.ports.bound, v.ports.settled = nil, nil, nil, true
	m.book.changed()
}

func (m *Manager) runPorts(v *vm, kick <-chan struct{}) error {
	p, err := m.startPorts(v.machine.Info().VsockPath)
	if err != nil {
		return err
	}
	defer p.Close() //nolint:errcheck // it is killed
	for {
		select {
		case <-kick:
		case <-v.gone:
			return nil
		}
		m.mu.Lock()
		plan := v.ports.plan
		m.mu.Unlock()
		bound, err := p.Apply(plan, v.settings.Ports.Privileged)
		if err != nil {
			return err
		}
		m.mu.Lock()
		for _, b := range bound {
			if b.Note != "" && v.ports.warnings < maxPortWarnings && !slices.ContainsFunc(v.ports.bound, func(o ports.Bound) bool { return reflect.DeepEqual(o, b) }) {
				v.ports.warnings++
				m.log.Warn("port", "distro", b.Distro, "proto", b.Proto, "port", b.Port, "note", b.Note)
			}
		}
		v.ports.bound, v.ports.settled = bound, len(kick) == 0
		m.mu.Unlock()
		m.book.changed()
	}
}

// boundPorts returns what is forwarded, and whether that is all that is to be.
func (m *Manager) boundPorts() (list []ports.Bound, settled bool) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.vm == nil || m.vm.ports.kick == nil {
		return nil, true
	}
	return m.vm.ports.bound, m.vm.ports.settled
}

// portNotices tells, once, what is not as it should be with the ports of a distro.
func (m *Manager) portNotices(distro string) (notices []string) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.vm == nil {
		return nil
	}
	p := &m.vm.ports
	key, more := strings.ToLower(distro), 0
	told := p.told[key]
	for _, b := range p.bound {
		text := fmt.Sprintf("port %d/%s of %s: %s", b.Port, b.Proto, b.Distro, b.Note)
		if b.Note == "" || !strings.EqualFold(b.Distro, distro) || told[text] || len(told) >= maxPortWarnings {
			continue
		}
		if p.told == nil {
			p.told = map[string]map[string]bool{}
		}
		if told == nil {
			told = map[string]bool{}
			p.told[key] = told
		}
		told[text] = true
		if len(notices) == maxPortNotices {
			more++
			continue
		}
		notices = append(notices, text)
	}
	if more > 0 {
		notices = append(notices, fmt.Sprintf("and %d more: wsl2 ports", more))
	}
	return notices
}

// replanPorts applies rules that have changed.
func (m *Manager) replanPorts() {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.vm == nil || m.vm.machine == nil {
		return
	}
	if len(m.distros) > 0 {
		m.watchPorts(m.vm)
	}
	m.planPorts(m.vm)
}

// ports handles `wsl2 ports`.
func (s *Service) ports(p *peer, reg *registry.Registry, c api.Call) (any, error) {
	if r := c.Publish; r != nil {
		d, err := reg.Get(r.Distro)
		if err != nil && !c.Unpublish {
			return nil, notFound(r.Distro)
		}
		if err == nil {
			r.Distro = d.Name
		}
		had, err := s.m.book.set(*r, !c.Unpublish)
		if err != nil {
			return nil, err
		}
		if c.Unpublish && !had {
			return nil, api.Errorf(api.CodeFailed, "`wsl2 ports --json` lists the rules; those of wslconfig are taken away there", "%v is not published", r)
		}
		s.each((*Manager).replanPorts)
	}
	gone, _, end := p.watch()
	defer end()
	ctx := gone
	if c.After == 0 {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(gone, settleTimeout)
		defer cancel()
	}
	for {
		serial, changed := s.m.book.state()
		result, settled := s.listPorts()
		if result.Serial = serial; settled && serial != c.After {
			return result, nil
		}
		select {
		case <-changed:
		case <-s.stop:
			return result, nil
		case <-ctx.Done():
			if gone.Err() != nil {
				return nil, errClientGone
			}
			return result, nil
		}
	}
}

func (s *Service) listPorts() (result api.Ports, settled bool) {
	result = api.Ports{Ports: []ports.Bound{}, Rules: append([]ports.Rule{}, s.m.book.all()...)}
	settled = true
	for _, m := range s.managers() {
		list, all := m.boundPorts()
		result.Ports = append(result.Ports, list...)
		settled = settled && all
	}
	slices.SortStableFunc(result.Ports, func(a, b ports.Bound) int { return strings.Compare(a.Distro, b.Distro) })
	return result, settled
}
