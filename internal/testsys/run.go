package testsys

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"syscall"
	"time"
)

// Result is how a command ended.
type Result struct {
	Line           string // the command
	Stdout, Stderr string
	Status         int // as a shell's $?: 128+N if signal N ended it
}

func (r Result) String() string {
	return fmt.Sprintf("%s: status %d\n\tstdout: %s\n\tstderr: %s", r.Line, r.Status, clip(r.Stdout), clip(r.Stderr))
}

func clip(s string) string {
	if len(s) > 2000 {
		return fmt.Sprintf("%q... (%d bytes)", s[:2000], len(s))
	}
	return fmt.Sprintf("%q", s)
}

// Cmd is `wsl2 args...` on this host, not yet started, killed when ctx ends.
func (h *Host) Cmd(ctx context.Context, args ...string) *exec.Cmd {
	argv := append(append(slices.Clone(h.Wrap), h.Exe), args...)
	cmd := exec.CommandContext(ctx, argv[0], argv[1:]...)
	cmd.Env = slices.Clone(h.Env)
	cmd.Dir = "/"
	// A process that keeps the output open must not keep the test.
	cmd.WaitDelay = 10 * time.Second
	return cmd
}

// Run runs `wsl2 args...` with an empty standard input.
func (h *Host) Run(args ...string) Result {
	h.TB.Helper()
	return h.RunIn(nil, args...)
}

// RunIn runs `wsl2 args...` with this standard input (nil: /dev/null). It fails
// the test if the command hangs.
func (h *Host) RunIn(stdin io.Reader, args ...string) Result {
	h.TB.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), Deadline)
	defer cancel()
	cmd := h.Cmd(ctx, args...)
	cmd.Stdin = stdin
	return h.Finish(ctx, cmd)
}

// Shell runs a shell script of this machine; "$0" "$@" in it is `wsl2 args...`.
func (h *Host) Shell(script string, args ...string) Result {
	h.TB.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), Deadline)
	defer cancel()
	cmd := h.Cmd(ctx, args...)
	at := len(h.Wrap)
	cmd.Args = slices.Insert(cmd.Args, at, "sh", "-c", script)
	if at == 0 {
		var err error
		cmd.Path, err = exec.LookPath("sh")
		Must(h.TB, err)
	}
	return h.Finish(ctx, cmd)
}

// Finish runs a command that Cmd made and says how it ended.
func (h *Host) Finish(ctx context.Context, cmd *exec.Cmd) Result {
	h.TB.Helper()
	var stdout, stderr bytes.Buffer
	if cmd.Stdout == nil {
		cmd.Stdout = &stdout
	}
	if cmd.Stderr == nil {
		cmd.Stderr = &stderr
	}
	err := cmd.Run()
	r := Result{Line: line(cmd.Args), Stdout: stdout.String(), Stderr: stderr.String()}
	r.Status = status(cmd.ProcessState)
	var exit *exec.ExitError
	switch {
	case ctx.Err() != nil:
		h.TB.Fatalf("hangs: %v", r)
	case err != nil && !errors.As(err, &exit):
		h.TB.Fatalf("%v: %v", err, r)
	}
	return r
}

// status is a process's exit status as a shell's $?.
func status(p *os.ProcessState) int {
	if p == nil {
		return -1
	}
	if ws := p.Sys().(syscall.WaitStatus); ws.Signaled() {
		return 128 + int(ws.Signal())
	}
	return p.ExitCode()
}

// OK runs `wsl2 args...`, fails the test unless its status is 0, and returns its
// standard output.
func (h *Host) OK(args ...string) string {
	h.TB.Helper()
	r := h.Run(args...)
	h.Want(r, 0)
	return r.Stdout
}

var goTrace = regexp.MustCompile(`(?m)^(goroutine \d+ \[|panic: |SIG[A-Z]+: )`)

// Want fails the test unless the command ended with this status and its standard
// error holds every one of the texts. Texts are compared ignoring case.
func (h *Host) Want(r Result, status int, stderr ...string) {
	h.TB.Helper()
	if r.Status != status {
		h.TB.Fatalf("want status %d: %v", status, r)
	}
	if goTrace.MatchString(r.Stderr) {
		h.TB.Fatalf("a Go stack trace is no message: %v", r)
	}
	for _, want := range stderr {
		if !strings.Contains(strings.ToLower(r.Stderr), strings.ToLower(want)) {
			h.TB.Fatalf("stderr does not say %q: %v", want, r)
		}
	}
}

// Refused fails the test unless wsl2 itself failed (status 125), with one
// message, and standard error holds every one of the texts.
func (h *Host) Refused(r Result, stderr ...string) {
	h.TB.Helper()
	h.Want(r, 125, stderr...)
	messages := 0
	for line := range strings.Lines(r.Stderr) {
		// The notice of a VM's start, that it is an emulated one, comes besides.
		if strings.HasPrefix(line, "wsl2: ") && !strings.Contains(line, "using QEMU TCG") {
			messages++
		}
	}
	if messages != 1 {
		h.TB.Fatalf("%d messages, want one: %v", messages, r)
	}
}

// Live is a command that runs.
type Live struct {
	h      *Host
	Cmd    *exec.Cmd
	Stdin  io.WriteCloser
	Stdout io.Reader
	Stderr *bytes.Buffer
	cancel context.CancelFunc
	done   chan struct{}
}

// alive is a reader that puts a deadline off with every read.
type alive struct {
	io.Reader
	deadline *time.Timer
}

func (a alive) Read(p []byte) (int, error) {
	n, err := a.Reader.Read(p)
	a.deadline.Reset(Deadline)
	return n, err
}

// Start starts `wsl2 args...` with pipes as its standard streams. It is killed
// when the test ends, if it still runs then, and when none of its output was
// read for Deadline.
func (h *Host) Start(args ...string) *Live {
	h.TB.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	l := &Live{h: h, Cmd: h.Cmd(ctx, args...), Stderr: new(bytes.Buffer), cancel: cancel, done: make(chan struct{})}
	var err error
	l.Stdin, err = l.Cmd.StdinPipe()
	Must(h.TB, err)
	// Not StdoutPipe: Wait closes that one before all is read.
	r, w, err := os.Pipe()
	Must(h.TB, err)
	deadline := time.AfterFunc(Deadline, cancel)
	l.Stdout, l.Cmd.Stdout, l.Cmd.Stderr = alive{r, deadline}, w, l.Stderr
	err = l.Cmd.Start()
	w.Close()
	Must(h.TB, err)
	context.AfterFunc(ctx, func() { r.SetDeadline(time.Now()) })
	go func() {
		l.Cmd.Wait()
		close(l.done)
	}()
	h.TB.Cleanup(func() {
		cancel()
		deadline.Stop()
		<-l.done
		r.Close()
	})
	return l
}

// Expect reads the command's output up to and including text.
func (l *Live) Expect(text string) {
	l.h.TB.Helper()
	var seen []byte
	b := make([]byte, 1)
	for !bytes.HasSuffix(seen, []byte(text)) {
		if _, err := l.Stdout.Read(b); err != nil {
			l.cancel()
			<-l.done
			l.h.TB.Fatalf("%s: waiting for %q: %v; stdout %q, stderr %q", line(l.Cmd.Args), text, err, seen, l.Stderr)
		}
		seen = append(seen, b[0])
	}
}

// Kill kills the client itself (not what is put in front of it: setpriv and
// nsenter become it).
func (l *Live) Kill() {
	l.Cmd.Process.Kill()
	<-l.done
}

// Ended tells whether it has ended.
func (l *Live) Ended() bool {
	select {
	case <-l.done:
		return true
	default:
		return false
	}
}

// Wait waits for the command's end.
func (l *Live) Wait() Result {
	l.h.TB.Helper()
	rest, _ := io.ReadAll(l.Stdout)
	<-l.done
	r := Result{Line: line(l.Cmd.Args), Stdout: string(rest), Stderr: l.Stderr.String(), Status: status(l.Cmd.ProcessState)}
	if l.Cmd.Process != nil && r.Status == 128+int(syscall.SIGKILL) {
		l.h.TB.Fatalf("hangs, or was killed: %v", r)
	}
	return r
}

// line is a command line for people: wsl2 and what follows.
func line(argv []string) string {
	for i, a := range argv {
		if filepath.Base(a) == "wsl2" {
			return strings.Join(append([]string{"wsl2"}, argv[i+1:]...), " ")
		}
	}
	return strings.Join(argv, " ")
}
