package guestconn

import (
	"errors"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/wsl2/wsl2/internal/wire"
)

// TestDialDoesNotWait: who listens and never accepts makes nobody wait.
func TestDialDoesNotWait(t *testing.T) {
	path := t.TempDir() + "/vsock"
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fd)
	if err := unix.Bind(fd, &unix.SockaddrUnix{Name: path}); err != nil {
		t.Fatal(err)
	}
	if err := unix.Listen(fd, 1); err != nil {
		t.Fatal(err)
	}
	for range 10 {
		c, err := Dial(path, 1, wire.Hello{Version: wire.Version, Role: wire.RoleShare}, nil)
		if errors.Is(err, unix.EAGAIN) {
			return
		}
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
	}
	t.Error("more connections than there is room for")
}
