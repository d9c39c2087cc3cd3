package service

import (
	"testing"

	"github.com/wsl2/wsl2/internal/hostpath"
	"github.com/wsl2/wsl2/internal/wire"
	"github.com/wsl2/wsl2/launcher/api"
	"github.com/wsl2/wsl2/launcher/config"
	"github.com/wsl2/wsl2/launcher/share"
)

// TestMountShare: a distro gets what is shared with it, and nothing else, however
// often it asks.
func TestMountShare(t *testing.T) {
	s := newSetup(t)
	s.settings = config.Defaults(config.Host{MemoryBytes: 8 << 30, CPUs: 2, Home: "/home/me"})
	served, end := make(chan share.Spec, maxShareServers+1), make(chan struct{})
	s.m.serveShare = func(spec share.Spec) error {
		served <- spec
		<-end
		return nil
	}
	lease, session, err := s.m.Open(t.Context(), debian, api.VMOptions{}, func(error) {})
	if err != nil {
		t.Fatal(err)
	}
	defer lease.Release()
	defer close(end)
	if len(session.Shares) != 1 || session.Shares[0] != (hostpath.Share{Host: "/home/me", Guest: "/mnt/host"}) {
		t.Errorf("the client is told of %+v", session.Shares)
	}
	ask := func(distro, guest string) {
		s.machine(0).req.MountShare(&wire.MountShare{Session: wire.SessionID{7}, Guest: guest, UID: 1000, GID: 1001, Distro: distro})
	}
	ask("alpine", "/mnt/host")
	ask("debian", "/mnt/other")
	ask("debian", "/mnt/host/..")
	ask("Debian", "/mnt/host")
	want := share.Spec{VsockPath: s.machine(0).Info().VsockPath, Port: lease.d.port, Session: wire.SessionID{7}, Dir: "/home/me", UID: 1000, GID: 1001}
	if got := <-served; got != want {
		t.Errorf("%+v, want %+v", got, want)
	}
	for range maxShareServers + 5 {
		ask("debian", "/mnt/host")
	}
	for range maxShareServers - 1 {
		<-served
	}
	s.m.mu.Lock()
	n := lease.d.shareServers
	s.m.mu.Unlock()
	if n != maxShareServers || len(served) != 0 {
		t.Errorf("%d servers and %d more, want %d", n, len(served), maxShareServers)
	}
}

// TestShareDevice: a share is a device if the VM has one, and neither the guest nor wslconfig wants a connection.
func TestShareDevice(t *testing.T) {
	s := newSetup(t)
	s.settings = config.Defaults(config.Host{MemoryBytes: 8 << 30, CPUs: 2, Home: "/home/me"})
	served, end := make(chan share.Spec, 10), make(chan struct{})
	s.m.serveShare = func(spec share.Spec) error {
		served <- spec
		<-end
		return nil
	}
	lease, _, err := s.m.Open(t.Context(), debian, api.VMOptions{}, func(error) {})
	if err != nil {
		t.Fatal(err)
	}
	defer lease.Release()
	defer close(end)
	for _, c := range []struct{ devices, stream, configured, want bool }{
		{true, false, false, true},
		{false, false, false, false},
		{true, true, false, false},
		{true, false, true, false},
	} {
		s.machine(0).mu.Lock()
		s.machine(0).devices = c.devices
		s.machine(0).mu.Unlock()
		s.m.mu.Lock()
		lease.d.shares[0].Stream = c.configured
		s.m.mu.Unlock()
		s.machine(0).req.MountShare(&wire.MountShare{Guest: "/mnt/host", Distro: "debian", Stream: c.stream})
		if spec := <-served; (spec.Tag == "tag") != c.want || (spec.Socket == "/socket") != c.want {
			t.Errorf("%+v: %+v", c, spec)
		}
	}
}
