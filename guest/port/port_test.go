package port

import (
	"bytes"
	"io"
	"net"
	"path/filepath"
	"testing"
	"time"
)

// dial returns both ends of an accepted connection.
func dial(t *testing.T) (client *net.UnixConn, server net.Conn) {
	t.Helper()
	addr := &net.UnixAddr{Name: filepath.Join(t.TempDir(), "s"), Net: "unix"}
	l, err := net.ListenUnix("unix", addr)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	if client, err = net.DialUnix("unix", nil, addr); err != nil {
		t.Fatal(err)
	}
	if server, err = (monitor{l}).Accept(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { client.Close(); server.Close() })
	deadline := time.Now().Add(time.Minute)
	client.SetDeadline(deadline)
	server.SetDeadline(deadline)
	return client, server
}

// TestAccept: the line is taken in whatever pieces it comes, and nothing behind it.
func TestAccept(t *testing.T) {
	for _, pieces := range [][]string{{"CONNECT 0\nhello"}, {"C", "ONNECT 42949", "67295", "\nhel", "lo"}} {
		client, server := dial(t)
		go func() {
			for _, p := range pieces {
				client.Write([]byte(p))
			}
			client.CloseWrite()
		}()
		got, err := io.ReadAll(server)
		if err != nil || string(got) != "hello" {
			t.Errorf("%q: %q, %v", pieces, got, err)
		}
		server.Close()
		if ok, _ := io.ReadAll(client); string(ok) != "OK 0\n" {
			t.Errorf("%q is answered with %q", pieces, ok)
		}
	}
}

// TestAcceptGone: what is read of who has gone does not depend on when it was accepted.
func TestAcceptGone(t *testing.T) {
	client, server := dial(t)
	client.Write([]byte("CONNECT 0\nhello"))
	client.Close()
	if got, err := io.ReadAll(server); err != nil || string(got) != "hello" {
		t.Errorf("%q, %v", got, err)
	}
}

func FuzzAccept(f *testing.F) {
	f.Add([]byte("CONNECT 0\nrest"))
	f.Add([]byte("CONNECT \n"))
	f.Add([]byte("CONNECT 99999999999999"))
	f.Fuzz(func(t *testing.T, b []byte) {
		client, server := dial(t)
		client.Write(b)
		client.CloseWrite()
		got, err := io.ReadAll(server)
		line, rest, found := bytes.Cut(b, []byte("\n"))
		if err == nil && len(got) > 0 && (!found || !bytes.HasPrefix(line, []byte("CONNECT ")) || !bytes.Equal(got, rest)) {
			t.Errorf("%q came behind the line of %q", got, b)
		}
	})
}
