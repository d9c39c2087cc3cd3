package console

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/creack/pty"
	"golang.org/x/sys/unix"

	"github.com/wsl2/wsl2/internal/wire"
)

// TestPanicRestores: a mistake of ours leaves the terminal as it was.
func TestPanicRestores(t *testing.T) {
	master, tty, err := pty.Open()
	if err != nil {
		t.Fatal(err)
	}
	defer master.Close()
	defer tty.Close()
	modes := func(t *testing.T, f *os.File) string {
		t.Helper()
		m, err := unix.IoctlGetTermios(int(f.Fd()), unix.TCGETS)
		if err != nil {
			t.Fatal(err)
		}
		return fmt.Sprint(*m)
	}
	before := modes(t, tty)
	s := &Session{tty: newTerminal(Stdio{In: tty, Out: tty, Err: tty}, [3]fileKind{kindTerminal, kindTerminal, kindTerminal})}
	s.tty.raw()
	if modes(t, tty) == before {
		t.Fatal("the terminal is not raw")
	}
	func() {
		defer func() {
			if v := recover(); v != "boom" {
				t.Errorf("recovered %v", v)
			}
		}()
		s.restoring(func() { panic("boom") })
	}()
	if got := modes(t, tty); got != before {
		t.Errorf("modes after a panic %s, before %s", got, before)
	}
}

// full is a connection whose peer does not read.
type full struct {
	Conn
	limit  time.Time
	closed bool
}

func (f *full) SetWriteDeadline(t time.Time) error { f.limit = t; return nil }
func (f *full) Close() error                       { f.closed = true; return nil }

func (f *full) Write([]byte) (int, error) {
	if f.limit.IsZero() {
		return 0, errors.New("would wait for ever")
	}
	return 0, os.ErrDeadlineExceeded
}

// TestSendToNobody: a peer that does not read holds no signal up for ever.
func TestSendToNobody(t *testing.T) {
	c := &full{}
	s := &Session{control: c}
	s.send(&wire.Signal{Number: uint8(unix.SIGTERM)})
	if !c.closed || !c.limit.IsZero() {
		t.Errorf("closed: %v; deadline left behind: %v", c.closed, c.limit)
	}
}

// TestOutputFails: what is told of an output that fails, whatever it fails with.
func TestOutputFails(t *testing.T) {
	for _, want := range []error{io.ErrShortWrite, &fs.PathError{Op: "write", Path: "/dev/stdout", Err: unix.ENOSPC}} {
		o := newOutput(&full{}, io.Discard, "stdout", wire.RoleStdout)
		o.fail(want)
		if _, err := o.await(1); !errors.Is(err, want) || strings.Contains(err.Error(), "%!") {
			t.Errorf("%v", err)
		}
	}
}

// TestFailedStatus: env(1)'s statuses.
func TestFailedStatus(t *testing.T) {
	for code, want := range map[wire.Code]int{wire.CodeNotFound: 127, wire.CodeNotExecutable: 126, wire.CodeUnknownUser: 125, wire.CodeInternal: 125} {
		if st := failedStatus(code); st != want {
			t.Errorf("code %d: status %d, want %d", code, st, want)
		}
	}
}
