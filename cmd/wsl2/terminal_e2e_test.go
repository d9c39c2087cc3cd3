//go:build e2e

package main_test

import (
	"bytes"
	"context"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/creack/pty"
	"golang.org/x/sys/unix"

	"github.com/wsl2/wsl2/internal/testsys"
)

// terminal is a command on a pseudo-terminal, driven as expect(1) does. Reads are
// bounded by the command's context: when it is killed they end.
type terminal struct {
	t    *testing.T
	cmd  *exec.Cmd
	pty  *os.File
	seen bytes.Buffer // what was printed since the last match
	all  bytes.Buffer
}

func openTerminal(t *testing.T, cmd *exec.Cmd) *terminal {
	t.Helper()
	p, err := pty.StartWithSize(cmd, &pty.Winsize{Rows: 40, Cols: 100})
	testsys.Must(t, err)
	t.Cleanup(func() { p.Close() })
	return &terminal{t: t, cmd: cmd, pty: p}
}

// expect waits until text is printed.
func (x *terminal) expect(text string) {
	x.t.Helper()
	b := make([]byte, 4096)
	for {
		if i := bytes.Index(x.seen.Bytes(), []byte(text)); i >= 0 {
			x.seen.Next(i + len(text))
			return
		}
		n, err := x.pty.Read(b)
		x.seen.Write(b[:n])
		x.all.Write(b[:n])
		if err != nil {
			x.t.Fatalf("waiting for %q: %v; the terminal shows\n%s", text, err, x.all.String())
		}
	}
}

func (x *terminal) send(text string) {
	x.t.Helper()
	_, err := x.pty.Write([]byte(text))
	testsys.Must(x.t, err)
}

// wait reads to the end and returns the exit status.
func (x *terminal) wait() int {
	x.t.Helper()
	b := make([]byte, 4096)
	for {
		n, err := x.pty.Read(b)
		x.all.Write(b[:n])
		if err != nil {
			break // EIO: the other side is closed
		}
	}
	x.cmd.Wait()
	return x.cmd.ProcessState.ExitCode()
}

// raw tells whether keys are handed on as they are typed.
func (x *terminal) raw() bool {
	x.t.Helper()
	modes, err := unix.IoctlGetTermios(int(x.pty.Fd()), unix.TCGETS)
	testsys.Must(x.t, err)
	return modes.Lflag&unix.ICANON == 0
}

// sameModes fails the test unless `stty -g` printed the same twice.
func (x *terminal) sameModes() {
	x.t.Helper()
	var modes []string
	for _, l := range strings.Fields(x.all.String()) {
		if strings.Count(l, ":") > 20 {
			modes = append(modes, l)
		}
	}
	if len(modes) != 2 || modes[0] != modes[1] {
		x.t.Errorf("terminal modes %q", modes)
	}
}

// TestTerminal is a person at a shell: prompt, echo, size, ^C, ^D, exit.
func TestTerminal(t *testing.T) {
	h := newHost(t)
	ctx, cancel := context.WithTimeout(context.Background(), testsys.Deadline)
	defer cancel()

	x := openTerminal(t, h.Cmd(ctx))
	x.expect("wsl2: / is not shared with the distro")
	x.expect("# ")
	x.send("echo hello $((6*7))\r")
	x.expect("hello 42\r\n")
	x.send("tty; stty size\r")
	x.expect("/dev/pts/")
	x.expect("40 100\r\n")
	testsys.Must(t, pty.Setsize(x.pty, &pty.Winsize{Rows: 24, Cols: 132}))
	// The resize travels behind the terminal's bytes: the guest says when it came.
	x.send("until [ \"$(stty size)\" = '24 132' ]; do :; done; echo resized $?\r")
	x.expect("resized 0\r\n")
	x.send("sh -c 'echo started; exec sleep 100000'\r")
	x.expect("started\r\n") // before, the shell's line editor would take the ^C
	x.send("\x03")
	x.expect("# ")
	x.send("echo status $?\r")
	x.expect("status 130\r\n")
	x.send("sh -c 'echo started; exec cat'\r")
	x.expect("started\r\n")
	x.send("line\r")
	x.expect("line\r\nline\r\n")
	x.send("\x1a") // ^Z, and on again
	x.expect("# ")
	x.send("jobs\r")
	x.expect("Stopped")
	x.expect("exec cat")
	x.send("fg\r")
	x.expect("exec cat") // the shell says what it continues
	x.send("again\r")
	x.expect("again\r\nagain\r\n")
	x.send("\x1c") // ^\
	x.expect("# ")
	x.send("echo status $?\r")
	x.expect("status 131\r\n")
	x.send("sh -c 'echo started; exec cat'\r")
	x.expect("started\r\n")
	x.send("line\r")
	x.expect("line\r\nline\r\n")
	x.send("\x04")
	x.expect("# ")
	x.send("echo $0 $TERM; exit 7\r")
	x.expect("-sh xterm\r\n")
	if status := x.wait(); status != 7 {
		t.Errorf("status %d, want 7; the terminal shows\n%s", status, x.all.String())
	}
	if n := strings.Count(x.all.String(), "is not shared"); n != 1 {
		t.Errorf("that the directory is not shared is said %d times", n)
	}

	t.Run("the terminal is as it was", func(t *testing.T) {
		cmd := h.Cmd(ctx)
		shell := exec.CommandContext(ctx, "sh", "-c", `stty -g; "$0" -d small; echo status $?; stty -g; read end`, h.Exe)
		shell.Env, shell.Dir = cmd.Env, cmd.Dir
		x := openTerminal(t, shell)
		x.expect("# ")
		x.send("exit 3\r")
		x.expect("status 3\r\n")
		x.send("\r")
		x.wait()
		x.sameModes()
	})

	t.Run("only some streams are the terminal", func(t *testing.T) {
		cmd := h.Cmd(ctx, "-d", "small", "-e", "sh", "-c", `for fd in 0 1 2; do test -t $fd; echo $?; done`)
		var out bytes.Buffer
		cmd.Stdout = &out
		x := openTerminal(t, cmd)
		if status := x.wait(); status != 0 || out.String() != "0\n1\n0\n" {
			t.Errorf("status %d, stdin, stdout, stderr are terminals: %q", status, out.String())
		}
	})

	t.Run("megabytes through the terminal", func(t *testing.T) {
		x := openTerminal(t, h.Cmd(ctx, "-d", "small", "-e", "sh", "-c", "seq 1 200000"))
		if status := x.wait(); status != 0 || !strings.HasSuffix(x.all.String(), "\r\n199999\r\n200000\r\n") {
			t.Errorf("status %d, %d bytes", status, x.all.Len())
		}
	})

	t.Run("a terminal that closes hangs up", func(t *testing.T) {
		x := openTerminal(t, h.Cmd(ctx, "-d", "small", "-e", "sh", "-c", `trap 'echo hup >/run/closed; exit' HUP; echo ready; while :; do sleep 100000 & wait $!; done`))
		x.expect("ready\r\n")
		x.pty.Close()
		x.cmd.Wait()
		h.OK("-d", "small", "-e", "sh", "-c", "while ! [ -s /run/closed ]; do :; done")
	})

	t.Run("an idle session", func(t *testing.T) { idleSession(ctx, t, h) })
}

// TestMakeRun is what somebody does first: `make run`, without a terminal and
// then with one. The cache (kernel, Go's build) stays the developer's.
func TestMakeRun(t *testing.T) {
	h := testsys.New(t)
	h.Env = slices.DeleteFunc(h.Env, func(e string) bool {
		return strings.HasPrefix(e, "HOME=") || strings.HasPrefix(e, "XDG_CACHE_HOME=")
	})
	for _, name := range []string{"HOME", "XDG_CACHE_HOME", "GOPATH", "GOCACHE", "GOMODCACHE", "GOPROXY", "GOFLAGS"} {
		if v, ok := os.LookupEnv(name); ok {
			h.Setenv(name, v)
		}
	}
	root, err := filepath.Abs(testsys.Root())
	testsys.Must(t, err)
	h.Exe = filepath.Join(root, "out/wsl2")
	ctx, cancel := context.WithTimeout(context.Background(), 15*time.Minute)
	defer cancel()
	makeRun := func() *exec.Cmd {
		cmd := exec.CommandContext(ctx, "make", "run")
		cmd.Dir, cmd.Env = root, h.Env
		cmd.Cancel = func() error { return cmd.Process.Signal(syscall.SIGTERM) }
		return cmd
	}

	r := h.Finish(ctx, makeRun())
	h.Want(r, 0)
	for _, want := range []string{"Linux ", "x86_64", "PRETTY_NAME=\"Debian GNU/Linux", "ID=debian"} {
		if !strings.Contains(r.Stdout, want) {
			t.Errorf("make run does not print %q: %v", want, r)
		}
	}

	x := openTerminal(t, makeRun())
	x.expect(":~# ")
	x.send("cat /etc/debian_version; id -un; uname -s; echo $((20+22))\r")
	x.expect("root\r\nLinux\r\n42\r\n")
	x.send("exit\r")
	if status := x.wait(); status != 0 {
		t.Errorf("status %d; the terminal shows\n%s", status, x.all.String())
	}

	// What makes it a real Debian: packages, owners, modes, its own tools.
	debian := func(script string) string {
		t.Helper()
		return h.OK("-d", "debian", "-e", "bash", "-c", script)
	}
	if out := debian("stat -c '%U:%G %a' /etc/shadow /usr/bin/passwd /tmp; dpkg --audit; dpkg -l | grep -c ^ii"); !strings.HasPrefix(out, "root:shadow 640\nroot:root 4755\nroot:root 1777\n") {
		t.Errorf("owners and modes: %q", out)
	}
	out := debian("useradd -m bob && su - bob -c 'id -un; pwd' && userdel -r bob 2>/dev/null; apt-config dump >/dev/null && echo fine")
	if out != "bob\n/home/bob\nfine\n" {
		t.Errorf("useradd, su, apt: %q", out)
	}
	h.OK("--shutdown")
	h.Fsck(false)
}
