package relay

import (
	"bytes"
	"io"
	"os"
	"testing"

	"golang.org/x/sys/unix"
)

// client takes what a relay sends.
type client struct {
	bytes.Buffer
	ended bool
}

func (c *client) Read([]byte) (int, error) { return 0, io.EOF }
func (c *client) Close() error             { return nil }
func (c *client) CloseWrite() error        { c.ended = true; return nil }

// TestTerminalClosedByAll: a program that closes its terminal before it ends is not
// hung up, and may open it again.
func TestTerminalClosedByAll(t *testing.T) {
	fd, err := unix.Open("/dev/ptmx", unix.O_RDWR|unix.O_NOCTTY|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
	if err != nil {
		t.Fatal(err)
	}
	master := os.NewFile(uintptr(fd), "ptmx")
	if err := unix.IoctlSetPointerInt(fd, unix.TIOCSPTLCK, 0); err != nil {
		t.Fatal(err)
	}
	open := func() *os.File {
		t.Helper()
		tty, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), unix.TIOCGPTPEER, unix.O_RDWR|unix.O_NOCTTY|unix.O_CLOEXEC)
		if errno != 0 {
			t.Fatal(errno)
		}
		return os.NewFile(tty, "tty")
	}
	to := &client{}
	o := NewOutput(master, to, false)
	tty := open()
	io.WriteString(tty, "one\n")
	tty.Close()
	go o.Run()
	for range 1000 { // a relay that takes this for the end ends somewhere in between
		tty = open()
		io.WriteString(tty, "more\n")
		tty.Close()
	}
	o.Finish()
	<-o.Done
	if want := "one\r\n" + string(bytes.Repeat([]byte("more\r\n"), 1000)); to.String() != want || o.Bytes != uint64(len(want)) || !to.ended {
		t.Errorf("%d bytes came, %d were counted, want %d; ended: %v", to.Len(), o.Bytes, len(want), to.ended)
	}
}
