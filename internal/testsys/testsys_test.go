package testsys

import (
	"bytes"
	"fmt"
	"net"
	"os"
	"strings"
	"testing"
	"time"
)

// recorder is a test that may fail without failing the test that watches it.
type recorder struct {
	testing.TB
	cleanups []func()
	failures []string
}

func (r *recorder) Helper()                   {}
func (r *recorder) Cleanup(f func())          { r.cleanups = append(r.cleanups, f) }
func (r *recorder) Failed() bool              { return len(r.failures) > 0 }
func (r *recorder) Logf(string, ...any)       {}
func (r *recorder) Errorf(f string, a ...any) { r.failures = append(r.failures, fmt.Sprintf(f, a...)) }

// fake is a host whose wsl2 is a shell script.
func fake(t *testing.T, tb testing.TB, script string) *Host {
	t.Helper()
	exe := t.TempDir() + "/wsl2"
	Must(t, os.WriteFile(exe, []byte("#!/bin/sh\n"+script), 0o755))
	t.Setenv("WSL2_EXE", exe)
	h := New(tb)
	h.grace = 100 * time.Millisecond
	return h
}

func TestLeftoversFail(t *testing.T) {
	rec := &recorder{TB: t}
	h := fake(t, rec, `case $1 in --shutdown) ;; *) sleep 1000 </dev/null >/dev/null 2>&1 & ;; esac`)
	h.Want(h.Run(), 0)
	left := h.Processes()
	if len(left) != 1 || left[0].Argv[0] != "sleep" {
		t.Fatalf("processes %v", left)
	}
	l, err := net.Listen("unix", h.Path("run/left.sock"))
	Must(t, err)
	defer l.Close()
	for i := len(rec.cleanups) - 1; i >= 0; i-- {
		rec.cleanups[i]()
	}
	said := strings.Join(rec.failures, "\n")
	if !strings.Contains(said, "left running") || !strings.Contains(said, "socket left") {
		t.Errorf("failures: %s", said)
	}
}

func TestRunAndRefused(t *testing.T) {
	h := fake(t, t, `case $1 in
--shutdown) ;;
cat) cat; echo err >&2; exit 3 ;;
signal) kill -TERM $$ ;;
bad) echo "wsl2: it is BAD" >&2; exit 125 ;;
live) echo ready; cat ;;
esac`)
	r := h.RunIn(strings.NewReader("in"), "cat")
	h.Want(r, 3, "ERR")
	if r.Stdout != "in" || r.Line != "wsl2 cat" {
		t.Error(r)
	}
	h.Want(h.Run("signal"), 128+15)
	h.Refused(h.Run("bad"), "it is bad")
	h.Want(h.Shell(`"$0" "$@" | tr a-z A-Z`, "cat"), 0)
	l := h.Start("live")
	l.Expect("ready\n")
	fmt.Fprint(l.Stdin, "more")
	l.Stdin.Close()
	if r := l.Wait(); r.Stdout != "more" || r.Status != 0 {
		t.Error(r)
	}
}

func TestCopySparse(t *testing.T) {
	dir := t.TempDir()
	f, err := os.Create(dir + "/a")
	Must(t, err)
	defer f.Close()
	for _, at := range []int64{0, 5 << 20, 9<<20 - 3} {
		_, err := f.WriteAt([]byte("abc"), at)
		Must(t, err)
	}
	Must(t, f.Truncate(64<<20))
	Must(t, copySparse(dir+"/a", dir+"/b"))
	a, err := os.ReadFile(dir + "/a")
	Must(t, err)
	b, err := os.ReadFile(dir + "/b")
	Must(t, err)
	if !bytes.Equal(a, b) {
		t.Error("the copy differs")
	}
}

func TestPattern(t *testing.T) {
	want := PatternBytes(t, 10001)
	r := Pattern(10001)
	var got []byte
	for n := 1; len(got) < len(want); n += 7 { // whatever the sizes of the reads
		b := make([]byte, n)
		n, _ := r.Read(b)
		got = append(got, b[:n]...)
	}
	if !bytes.Equal(got, want) {
		t.Error("the pattern depends on how it is read")
	}
}

func TestWaitCreated(t *testing.T) {
	dir := t.TempDir()
	WaitCreated(t, dir, "it", func() {
		go func() {
			os.WriteFile(dir+"/other", nil, 0o600)
			os.WriteFile(dir+"/it", nil, 0o600)
		}()
	})
}
