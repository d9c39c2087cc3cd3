package server

import (
	"bufio"
	"io"
	"net"
	"runtime"
	"strings"
	"testing"
	"time"

	"github.com/wsl2/wsl2/internal/wire"
	"github.com/wsl2/wsl2/launcher/share"
	"github.com/wsl2/wsl2/vmm/virtio/fs"
)

// TestDeviceRefused: a directory that cannot be opened is told at once, and so is a distro that does not take
// the device; it is free again either way.
func TestDeviceRefused(t *testing.T) {
	for _, c := range []struct{ dir, tag, want string }{{"/nosuchdir", "", "no such file"}, {t.TempDir(), "tag", "nobody waits"}} {
		s := share.Spec{Dir: c.dir, Tag: "tag", Socket: t.TempDir() + "/fs", VsockPath: t.TempDir() + "/vsock", Session: wire.SessionID{1}}
		device, guest := attach(t, s.Socket), accept(t, s.VsockPath)
		served := make(chan error, 1)
		go func() { served <- Serve(t.Context(), s, t.Logf) }()
		d := <-device
		defer d.Close()
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
		for limit := time.Now().Add(time.Minute); !d.Free(); runtime.Gosched() { // its end comes over a socket
			if time.Now().After(limit) {
				t.Fatalf("%s: the device's connection has not ended", c.dir)
			}
		}
	}
}

// attach gives the one that connects to a device.
func attach(t *testing.T, path string) <-chan *fs.Device {
	t.Helper()
	l, err := net.ListenUnix("unixpacket", &net.UnixAddr{Name: path, Net: "unixpacket"})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	attached := make(chan *fs.Device, 1)
	go func() {
		c, err := l.AcceptUnix()
		if err != nil {
			return
		}
		d := fs.New("tag")
		d.Attach(c) //nolint:errcheck // who has no use for it may have left
		attached <- d
	}()
	return attached
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
