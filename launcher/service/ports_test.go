package service

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/wsl2/wsl2/internal/wire"
	"github.com/wsl2/wsl2/launcher/ports"
)

// memPorts is a process that forwards whatever it is told, until it is broken.
type memPorts struct {
	plans  chan []ports.Forward
	broken chan struct{}
	closed chan struct{}
}

func (p *memPorts) Apply(list []ports.Forward, _ bool) ([]ports.Bound, error) {
	select {
	case <-p.broken:
		return nil, errors.New("killed")
	default:
	}
	p.plans <- list
	var bound []ports.Bound
	for _, f := range list {
		b := ports.Bound{Distro: f.Distro, Proto: "tcp", Port: f.Port, Published: len(f.Rules) > 0}
		if f.Port < 1024 {
			b.Note = "privileged"
		}
		bound = append(bound, b)
	}
	return bound, nil
}

func (p *memPorts) Close() error { close(p.closed); return nil }

// bound are the ports that a list would show.
func bound(m *Manager) []uint16 {
	list, settled := m.boundPorts()
	if !settled {
		return nil
	}
	all := []uint16{}
	for _, b := range list {
		all = append(all, b.Port)
	}
	return all
}

// TestPorts: what the guest says becomes the host's while its distro runs, and a process that
// dies is started anew for the next change.
func TestPorts(t *testing.T) {
	inBubble(t, func(t *testing.T, s *setup) {
		var started []*memPorts
		s.m.startPorts = func(string) (portsProcess, error) {
			p := &memPorts{plans: make(chan []ports.Forward, 100), broken: make(chan struct{}), closed: make(chan struct{})}
			started = append(started, p)
			return p, nil
		}
		expect := func(what string, want ...uint16) {
			t.Helper()
			synctest.Wait()
			if got := bound(s.m); !slices.Equal(got, want) {
				t.Fatalf("%s: %v, want %v", what, got, want)
			}
		}
		s.open(t, debian, nil)
		watched := func() int {
			v := s.machine(0)
			v.mu.Lock()
			defer v.mu.Unlock()
			return v.watched
		}
		if n := watched(); n != 0 {
			t.Fatalf("the first command's guest is asked at once")
		}
		time.Sleep(2 * watchDelay)
		synctest.Wait()
		if n := watched(); n != 1 || len(started) != 0 {
			t.Fatalf("asked %d times, %d processes before there is a port", n, len(started))
		}
		open := func(list ...wire.Port) { s.machine(0).req.PortsOpen(list) }
		port := func(distro string, n uint16) wire.Port { return wire.Port{Distro: distro, V4: true, Number: n} }
		open(port("debian", 8080), port("alpine", 80))
		expect("the first port", 8080)
		// A distro that starts later had its listeners told of already.
		s.open(t, DistroSpec{Name: "alpine", Disk: "/d/alpine"}, nil)
		expect("another distro's start", 80, 8080)
		if n := watched(); n != 1 {
			t.Errorf("asked %d times", n)
		}
		open(port("debian", 8080), port("debian", 8081), port("alpine", 80))
		expect("one more", 80, 8080, 8081)
		// What is not as it should be is told once, to who uses the distro.
		for _, want := range [][]string{{"port 80/tcp of alpine: privileged"}, nil} {
			if got := append(s.m.portNotices("debian"), s.m.portNotices("Alpine")...); !slices.Equal(got, want) {
				t.Errorf("notices %q, want %q", got, want)
			}
		}
		if err := s.m.Terminate(t.Context(), "alpine"); err != nil {
			t.Fatal(err)
		}
		expect("the end of a distro", 8080, 8081)
		close(started[0].broken)
		open(port("debian", 8080))
		expect("a process that has died")
		<-started[0].closed
		open(port("debian", 8082))
		expect("another process", 8082)
		s.m.Shutdown(false)
		expect("the end of the VM")
		if len(started) != 2 {
			t.Errorf("%d processes", len(started))
		}
		<-started[1].closed
	})
}

// TestPublishRules: rules hold at once and outlive the service.
func TestPublishRules(t *testing.T) {
	file := filepath.Join(t.TempDir(), "data", "ports.json")
	book, err := newPortBook(file)
	if err != nil {
		t.Fatal(err)
	}
	inBubble(t, func(t *testing.T, s *setup) {
		s.settings.Ports = ports.Policy{} // not even loopback
		s.m.book, _ = newPortBook(file)
		s.m.startPorts = func(string) (portsProcess, error) {
			return &memPorts{plans: make(chan []ports.Forward, 100), broken: make(chan struct{}), closed: make(chan struct{})}, nil
		}
		s.open(t, debian, nil)
		time.Sleep(2 * watchDelay)
		synctest.Wait()
		v := s.machine(0)
		v.mu.Lock()
		watched := v.watched
		v.mu.Unlock()
		if watched != 0 {
			t.Error("the guest is asked although nothing is forwarded")
		}
		for _, r := range []ports.Rule{{Distro: "debian", Port: 80, HostPort: 8080}, {Distro: "debian", Port: 81, HostPort: 81}} {
			if had, err := s.m.book.set(r, true); had || err != nil {
				t.Fatalf("%v, %v", had, err)
			}
		}
		s.m.replanPorts()
		time.Sleep(2 * watchDelay)
		synctest.Wait()
		v.req.PortsOpen([]wire.Port{{Distro: "debian", V4: true, Number: 80}, {Distro: "debian", V4: true, Number: 82}})
		synctest.Wait()
		if got := bound(s.m); !slices.Equal(got, []uint16{80}) {
			t.Errorf("%v", got)
		}
		if had, err := s.m.book.set(ports.Rule{Distro: "DEBIAN", Port: 80}, false); !had || err != nil {
			t.Errorf("%v, %v", had, err)
		}
		s.m.replanPorts()
		synctest.Wait()
		if got := bound(s.m); len(got) != 0 {
			t.Errorf("%v", got)
		}
	})
	if book, err = newPortBook(file); err != nil || !reflect.DeepEqual(book.all(), []ports.Rule{{Distro: "debian", Port: 81, HostPort: 81}}) {
		t.Errorf("%+v, %v", book.all(), err)
	}
	for _, step := range []struct{ from, to, left string }{{"alpine", "x", "debian:81"}, {"Debian", "new", "new:81"}, {"new", "", ""}} {
		if err := book.rename(step.from, step.to); err != nil {
			t.Fatal(err)
		}
		again, err := newPortBook(file)
		if err != nil {
			t.Fatal(err)
		}
		var left []string
		for _, r := range again.all() {
			left = append(left, r.String())
		}
		if got := strings.Join(left, " "); got != step.left {
			t.Errorf("%s renamed to %q: %q, want %q", step.from, step.to, got, step.left)
		}
	}
	if err := os.WriteFile(file, []byte("{"), 0o600); err != nil {
		t.Fatal(err)
	}
	if book, err = newPortBook(file); err == nil || book == nil {
		t.Errorf("a damaged file: %v, %v", book, err)
	}
}

// TestPortNotices: a distro with much to be told of is told a few things at once, and keeps no other from its own.
func TestPortNotices(t *testing.T) {
	inBubble(t, func(t *testing.T, s *setup) {
		s.open(t, debian, nil)
		p := &s.m.vm.ports
		for n := range 2 * maxPortWarnings {
			p.bound = append(p.bound, ports.Bound{Distro: "debian", Proto: "tcp", Port: uint16(n + 1), Note: "privileged"})
		}
		p.bound = append(p.bound, ports.Bound{Distro: "alpine", Proto: "tcp", Port: 80, Note: "privileged"})
		got := s.m.portNotices("Debian")
		if want := fmt.Sprintf("and %d more: wsl2 ports", maxPortWarnings-maxPortNotices); len(got) != maxPortNotices+1 || got[maxPortNotices] != want {
			t.Errorf("%q, want %d and %q", got, maxPortNotices, want)
		}
		if got := s.m.portNotices("debian"); len(got) != 0 {
			t.Errorf("told again: %q", got)
		}
		if got := s.m.portNotices("alpine"); len(got) != 1 {
			t.Errorf("the other distro: %q", got)
		}
	})
}
