package service

import (
	"bufio"
	"context"
	"errors"
	"net"
	"strings"
	"testing"
	"testing/synctest"

	"github.com/wsl2/wsl2/internal/wire"
)

// newControl is a control channel and the guest's end of it. Nothing is buffered
// in between.
func newControl(t *testing.T) (*control, net.Conn) {
	ours, theirs := net.Pipe()
	c := &control{conn: ours, pending: map[uint32]*exchange{}, lost: make(chan struct{})}
	go c.read(bufio.NewReader(ours))
	t.Cleanup(func() { theirs.Close(); <-c.lost })
	return c, theirs
}

// A guest that does not read cannot hold up the end of its VM.
func TestControlGuestDoesNotRead(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c, _ := newControl(t)
		if err := c.StopDistro(context.Background(), wire.StopDistro{Name: "x"}); !errors.Is(err, errControlLost) {
			t.Error(err)
		}
		if err := c.Shutdown(stopGrace); !errors.Is(err, errControlLost) {
			t.Error(err)
		}
		<-c.lost
	})
}

// A guest that says again and again that it waits for an archive stops nothing.
func TestControlReadyOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c, guest := newControl(t)
		go func() {
			m, err := wire.Read(guest)
			if err != nil {
				return
			}
			id := m.(*wire.Import).ID
			for range 3 {
				wire.Write(guest, &wire.ImportReady{ID: id, Port: 7})
			}
			wire.Write(guest, &wire.Reply{ID: id})
		}()
		calls := make(chan uint32, 1) // a second would block
		if _, err := c.Import(context.Background(), wire.Import{}, func(port uint32) { calls <- port }); err != nil || <-calls != 7 {
			t.Error(err)
		}
	})
}

// A message that is too large is its sender's error, and not the end of the VM; what goes before it is still to be sent.
func TestControlTooLarge(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c, guest := newControl(t)
		first := &wire.Network{}
		c.first = first
		if _, _, err := c.StartDistro(context.Background(), wire.StartDistro{Certificates: []string{strings.Repeat("x", wire.MaxFrame)}}); !errors.Is(err, wire.ErrTooLarge) {
			t.Error(err)
		}
		go func() {
			if m, err := wire.Read(guest); err != nil || m.Type() != first.Type() {
				t.Errorf("%v, %v before the request", m, err)
			}
			if m, err := wire.Read(guest); err == nil {
				wire.Write(guest, &wire.Reply{ID: m.(*wire.StopDistro).ID})
			}
		}()
		if err := c.StopDistro(context.Background(), wire.StopDistro{Name: "x"}); err != nil {
			t.Error(err)
		}
	})
}
