package console

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
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

// attended, in the environment, makes this program a session whose program never answers; "no" is Session.Aside.
const attended = "CONSOLE_TEST_ATTENDED"

func TestMain(m *testing.M) {
	if v := os.Getenv(attended); v != "" {
		s := &Session{Peer: silent{}, Stdio: Stdio{os.Stdin, os.Stdout, os.Stderr}, Aside: v == "no"}
		s.Run(wire.Start{}, nil)
	}
	os.Exit(m.Run())
}

// silent is a peer, and each of its connections; it says on stderr that it is waited for.
type silent struct {
	Peer
	Conn
}

func (silent) Open(wire.Role, *wire.Start) (Conn, error) { return silent{}, nil }
func (silent) SetReadDeadline(time.Time) error           { return nil }
func (silent) SetWriteDeadline(time.Time) error          { return nil }

func (silent) Read([]byte) (int, error) {
	os.Stderr.WriteString("r")
	for {
		time.Sleep(time.Hour)
	}
}

func (silent) Write([]byte) (int, error) {
	os.Exit(9)
	return 0, nil
}

// TestAside: a signal is for the program, but for one that is none of the user's it is for us.
func TestAside(t *testing.T) {
	for v, want := range map[string]string{"yes": "exit status 9", "no": "signal: terminated"} {
		cmd := exec.Command(os.Args[0])
		cmd.Env = append(os.Environ(), attended+"="+v)
		stderr, err := cmd.StderrPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		timer := time.AfterFunc(time.Minute, func() { cmd.Process.Kill() })
		stderr.Read(make([]byte, 1))
		cmd.Process.Signal(unix.SIGTERM)
		if err := cmd.Wait(); fmt.Sprint(err) != want {
			t.Errorf("attended: %s: %v, want %s", v, err, want)
		}
		timer.Stop()
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
