package service

import (
	"context"
	"errors"
	"log/slog"
	"strings"
	"testing"

	"github.com/wsl2/wsl2/launcher/api"
	"github.com/wsl2/wsl2/launcher/hostmount"
)

// TestHostMount: a mount holds its distro while it lasts, and ends with it, with whoever unmounts it, and
// with the service.
func TestHostMount(t *testing.T) {
	s := newSetup(t)
	unmount := make(chan struct{})
	svc := &Service{m: s.m, log: slog.New(slog.DiscardHandler), mounts: hostMounts{byName: map[string]*hostMount{},
		run: func(ctx context.Context, spec hostmount.Spec, mounted func()) error {
			if spec.VsockPath == "" || spec.Port == 0 || spec.User != "me" || spec.Dir != "/run/fs/debian" {
				t.Errorf("%+v", spec)
			}
			mounted()
			select {
			case <-ctx.Done():
			case <-unmount:
			}
			return nil
		}}}
	for name, end := range map[string]func(){
		"terminate": func() { s.m.Terminate(t.Context(), "Debian") },
		"unmount":   func() { unmount <- struct{}{} },
		"service":   func() { svc.mounts.wait("") },
		"wait":      func() { svc.mounts.wait("DEBIAN") },
	} {
		t.Run(name, func(t *testing.T) {
			h := svc.newMount("/run/fs/debian", debian.key())
			go svc.serveMount(h, s.m, debian, hostmount.Spec{User: "me", Dir: h.dir}, api.VMOptions{}, func(string) {})
			if <-h.up; h.err != nil {
				t.Fatal(h.err)
			}
			if got := s.m.States()[debian.key()]; got.Sessions != 1 {
				t.Errorf("%d sessions, want the mount's", got.Sessions)
			}
			svc.mounts.wait("other") // has nothing to wait for
			end()
			<-h.gone
			if got := s.m.States()[debian.key()]; got.Sessions != 0 {
				t.Errorf("%d sessions are left", got.Sessions)
			}
			if len(svc.mounts.byName) != 0 {
				t.Error("it is still known")
			}
		})
	}
	svc.mounts.run = func(context.Context, hostmount.Spec, func()) error { return errors.New("no /dev/fuse") }
	h := svc.newMount("/run/fs/debian", debian.key())
	svc.serveMount(h, s.m, debian, hostmount.Spec{}, api.VMOptions{}, func(string) {})
	if h.err == nil || !strings.Contains(h.err.Error(), "no /dev/fuse") || !strings.Contains(h.err.Error(), "wsl2 cp") {
		t.Errorf("a mount that fails: %v", h.err)
	}
	s.m.Refuse()
	h = svc.newMount("/run/fs/debian", debian.key())
	svc.serveMount(h, s.m, debian, hostmount.Spec{}, api.VMOptions{}, func(string) {})
	if !errors.Is(h.err, errClosing) {
		t.Errorf("a service that ends: %v", h.err)
	}
}
