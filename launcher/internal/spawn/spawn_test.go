package spawn

import (
	"fmt"
	"io"
	"os"
	"strings"
	"syscall"
	"testing"
)

func start(t *testing.T, script string, files ...*os.File) (p *Process, output func() string) {
	t.Helper()
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer w.Close()
	t.Cleanup(func() { r.Close() })
	p, err = Start(Command{
		Path: "/bin/sh", Args: []string{"-c", script}, Env: []string{"A=b"}, Dir: "/",
		Output: w, Files: files, Attr: &syscall.SysProcAttr{Setpgid: true},
	})
	if err != nil {
		t.Fatal(err)
	}
	return p, func() string {
		b, err := io.ReadAll(r)
		if err != nil {
			t.Error(err)
		}
		return string(b)
	}
}

func TestStart(t *testing.T) {
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	p, output := start(t, `cat; echo $A; pwd; echo three >&3; echo err >&2; exit 7`, w)
	w.Close()
	if got := output(); got != "b\n/\nerr\n" {
		t.Errorf("output %q", got)
	}
	if b, err := io.ReadAll(r); err != nil || string(b) != "three\n" {
		t.Errorf("descriptor 3: %q, %v", b, err)
	}
	if err := p.Wait(); err == nil || err.Error() != "exit status 7" {
		t.Error(err)
	}
	p.Kill() // nobody, by now
}

func TestKill(t *testing.T) {
	p, output := start(t, "echo ready; read never <&3; echo over", pipe(t))
	p.Kill()
	if err := p.Wait(); err == nil || !strings.HasPrefix(err.Error(), "signal: killed") {
		t.Error(err)
	}
	if got := output(); strings.Contains(got, "over") {
		t.Errorf("%q", got)
	}
}

// pipe is the reading end of a pipe that nobody writes to.
func pipe(t *testing.T) *os.File {
	t.Helper()
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { r.Close(); w.Close() })
	return r
}

func TestErrors(t *testing.T) {
	_, err := Start(Command{Path: "/nonexistent", Output: os.Stderr})
	if !os.IsNotExist(err) || !strings.Contains(err.Error(), "/nonexistent") {
		t.Error(err)
	}
}

func TestTimerSlack(t *testing.T) {
	p, output := start(t, "exec cat /proc/self/timerslack_ns /proc/$PPID/timerslack_ns")
	if err := p.Wait(); err != nil {
		t.Fatal(err)
	}
	var child, parent int64
	if _, err := fmt.Sscan(output(), &child, &parent); err != nil {
		t.Fatal(err)
	}
	if child != slack.Nanoseconds() || parent >= child {
		t.Errorf("slack of the child %d ns, of ours %d", child, parent)
	}
}
