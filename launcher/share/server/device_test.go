package server

import (
	"bufio"
	"errors"
	"io"
	"net"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/wsl2/wsl2/internal/wire"
	"github.com/wsl2/wsl2/launcher/share"
)

// TestDeviceRefused: a directory that cannot be opened is told at once, and so is a distro that does not take
// the device; it is free again either way.
func TestDeviceRefused(t *testing.T) {
	for _, c := range []struct{ dir, tag, want string }{{"/nosuchdir", "", "no such file"}, {t.TempDir(), "tag", "nobody waits"}} {
		s := share.Spec{Dir: c.dir, Tag: "tag", Socket: t.TempDir() + "/fs", VsockPath: t.TempDir() + "/vsock", Session: wire.SessionID{1}}
		device, guest := accept(t, s.Socket), accept(t, s.VsockPath)
		served := make(chan error, 1)
		go func() { served <- Serve(t.Context(), s, t.Logf) }()
		d := <-device
		defer d.Close()
		io.WriteString(d, "A") //nolint:errcheck // who has no use for it has left
		g := <-guest
		r := bufio.NewReader(g)
		if line, err := r.ReadString('\n'); err != nil || line != "CONNECT 0\n" {
			t.Fatalf("%q, %v", line, err)
		}
		io.WriteString(g, "OK 1\n") //nolint:errcheck // the answers tell
		hello, err := wire.Read(r)
		if h, ok := hello.(*wire.Hello); err != nil || !ok || h.Role != wire.RoleShareDevice || h.Session != s.Session {
			t.Fatalf("%+v, %v", hello, err)
		}
		m, err := wire.Read(r)
		if named, ok := m.(*wire.ShareDevice); err != nil || !ok || named.Tag != c.tag {
			t.Fatalf("%+v, %v", m, err)
		}
		if c.tag != "" {
			wire.Write(g, &wire.Failed{Code: wire.CodeRefused, Text: "nobody waits for this share"}) //nolint:errcheck // likewise
		}
		g.Close()
		if err := <-served; err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: %v, want %q", c.dir, err, c.want)
		}
		d.SetReadDeadline(time.Now().Add(time.Minute)) //nolint:errcheck // it cannot fail on a socket
		if _, err := d.Read(make([]byte, 1)); err == nil || errors.Is(err, os.ErrDeadlineExceeded) {
			t.Errorf("%s: the device's connection has not ended: %v", c.dir, err)
		}
	}
}

// accept takes one connection.
func accept(t *testing.T, path string) <-chan net.Conn {
	t.Helper()
	l, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	came := make(chan net.Conn, 10) // more than come
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			came <- c
		}
	}()
	return came
}
