package client

import (
	"bytes"
	"fmt"
	"io"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/creack/pty"
	"golang.org/x/sys/unix"

	"github.com/wsl2/wsl2/internal/hostpath"
	"github.com/wsl2/wsl2/internal/wire"
	"github.com/wsl2/wsl2/launcher/internal/fakevm"
)

// signalled prints each signal that comes until SIGTERM does.
func signalled(s *fakevm.Session, _ []string) (uint8, uint8) {
	s.Write(wire.RoleStdout, []byte("waiting\n"))
	for {
		select {
		case sig := <-s.Signals():
			if sig == uint8(unix.SIGTERM) {
				return 0, sig
			}
			s.Write(wire.RoleStdout, fmt.Appendf(nil, "signal %d\n", sig))
		case <-s.HangUp():
			return 0, 1
		}
	}
}

var programs = map[string]fakevm.Program{
	"signalled": signalled,
	// keys prints the keys of the terminal, whatever its stdin is.
	"keys": func(s *fakevm.Session, _ []string) (uint8, uint8) {
		s.Write(wire.RolePTY, []byte("ready\r\n"))
		b := make([]byte, 1)
		for {
			if _, err := s.Terminal().Read(b); err != nil || b[0] == 'q' {
				return 0, 0
			}
			s.Write(wire.RolePTY, fmt.Appendf(nil, "key %q\r\n", b[0]))
		}
	},
	// job prints keys and signals.
	"job": func(s *fakevm.Session, _ []string) (uint8, uint8) {
		s.Write(wire.RolePTY, []byte("ready\r\n"))
		keys := make(chan byte)
		go func() {
			defer close(keys)
			for b := make([]byte, 1); ; {
				if _, err := s.Terminal().Read(b); err != nil || b[0] == 'q' {
					return
				}
				keys <- b[0]
			}
		}()
		for {
			select {
			case key, ok := <-keys:
				if !ok {
					return 0, 0
				}
				s.Write(wire.RolePTY, fmt.Appendf(nil, "key %q\r\n", key))
			case sig := <-s.Signals():
				s.Write(wire.RolePTY, fmt.Appendf(nil, "signal %d\r\n", sig))
			}
		}
	},
	"lines": func(s *fakevm.Session, _ []string) (uint8, uint8) {
		s.Write(wire.RolePTY, []byte("one\r\ntwo\r\n"))
		return 0, 0
	},
}

// openPTY returns both sides of a terminal.
func openPTY(t *testing.T) (master, tty *os.File) {
	t.Helper()
	master, tty, err := pty.Open()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { master.Close(); tty.Close() })
	return master, tty
}

// onTerminal makes tty the command's controlling terminal, by descriptor fd.
func onTerminal(cmd *exec.Cmd, fd int) *exec.Cmd {
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true, Setctty: true, Ctty: fd}
	return cmd
}

// allSignals are those that end a process unless it catches them, but for
// SIGTERM, which ends the test, and those of the Go runtime.
func allSignals() []os.Signal {
	list := []os.Signal{unix.SIGHUP, unix.SIGINT, unix.SIGQUIT, unix.SIGUSR1, unix.SIGUSR2,
		unix.SIGALRM, unix.SIGVTALRM, unix.SIGIO, unix.SIGPWR, unix.SIGXCPU, unix.SIGXFSZ, unix.SIGSTKFLT}
	for n := 35; n <= 64; n++ {
		list = append(list, unix.Signal(n))
	}
	return list
}

// TestRareSignals: a session that lasts hands on all signals that would end the
// client, and none that is not meant for the program.
func TestRareSignals(t *testing.T) {
	h := newHost(t, fakevm.Hooks{Programs: programs})
	cmd := h.process("signalled")
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	cmd.Stdout = w
	start(t, cmd)
	w.Close()
	expect(t, r, "waiting\n")
	// A SIGCONT that arrives shows that the others are caught; it harms nobody before.
	arrived, tick := make(chan string, 1), time.NewTicker(5*time.Millisecond)
	defer tick.Stop()
	cont := fmt.Sprintf("signal %d\n", unix.SIGCONT)
	go func() { arrived <- expect(t, r, cont) }()
	for waiting := true; waiting; {
		cmd.Process.Signal(unix.SIGCONT)
		select {
		case <-arrived:
			waiting = false
		case <-tick.C:
		}
	}
	for _, sig := range allSignals() {
		cmd.Process.Signal(unix.SIGURG)
		cmd.Process.Signal(unix.SIGWINCH)
		cmd.Process.Signal(unix.SIGPIPE)
		cmd.Process.Signal(sig)
		want := fmt.Sprintf("signal %d\n", sig)
		for {
			switch got := expect(t, r, "\n"); got {
			case cont: // one of those from before
				continue
			case want:
			default:
				t.Fatalf("sent %v: %q, want %q", sig, got, want)
			}
			break
		}
	}
	cmd.Process.Signal(unix.SIGTERM)
	if st := exitStatus(cmd.Wait()); st != 128+15 {
		t.Errorf("status %d", st)
	}
}

// TestSuspend: ^Z of a client gives the terminal back, and resuming takes it again.
func TestSuspend(t *testing.T) {
	h := newHost(t, fakevm.Hooks{Programs: programs})
	master, tty := openPTY(t)
	before := modes(t, tty)
	cmd := onTerminal(h.process("signalled"), 0)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = tty, tty, tty
	start(t, cmd)
	expect(t, master, "waiting\n")
	raw := modes(t, tty)
	if raw == before {
		t.Fatal("the terminal is not raw")
	}
	for range 3 {
		cmd.Process.Signal(unix.SIGTSTP)
		var status unix.WaitStatus
		if _, err := unix.Wait4(cmd.Process.Pid, &status, unix.WUNTRACED, nil); err != nil || !status.Stopped() {
			t.Fatalf("the client has not stopped: %v, %v", status, err)
		}
		if got := modes(t, tty); got != before {
			t.Errorf("modes of the stopped client's terminal %s, before %s", got, before)
		}
		cmd.Process.Signal(unix.SIGCONT)
		expect(t, master, fmt.Sprintf("signal %d", unix.SIGTSTP))
		expect(t, master, fmt.Sprintf("signal %d", unix.SIGCONT))
		if got := modes(t, tty); got != raw {
			t.Errorf("modes after resuming %s, want %s", got, raw)
		}
	}
	master.Close() // hangs up
	cmd.Wait()
}

// shellJob runs script with a shell, on the terminal that is returned; "$0" "$@" is the client
// with its program. The terminal's modes are those before it started.
func shellJob(t *testing.T, h *host, shell, script, program string) (cmd *exec.Cmd, master, tty *os.File, before string) {
	t.Helper()
	master, tty = openPTY(t)
	before = modes(t, tty)
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	c := h.process(program)
	cmd = onTerminal(exec.Command(shell, append([]string{"-c", script, self}, c.Args[1:]...)...), 0)
	cmd.Env = c.Env
	cmd.Stdin, cmd.Stdout, cmd.Stderr = tty, tty, tty
	start(t, cmd)
	return cmd, master, tty, before
}

// typeLine types a line again and again until it has been answered: nothing tells when a shell
// has handed over the terminal.
func typeLine(t *testing.T, master *os.File, line, answer string) {
	t.Helper()
	answered, tick, late := make(chan struct{}), time.NewTicker(20*time.Millisecond), time.After(time.Minute)
	defer tick.Stop()
	go func() {
		defer close(answered)
		expect(t, master, answer)
	}()
	for {
		select {
		case <-answered:
			return
		case <-tick.C:
			io.WriteString(master, line)
		case <-late:
			t.Fatalf("%q was typed for a minute and never answered by %q", line, answer)
		}
	}
}

// TestForeground: a client in the background leaves the terminal to the shell, and has it when
// the shell brings it to the foreground: dash continues it then (SIGCONT), bash does not.
func TestForeground(t *testing.T) {
	for _, shell := range []string{"dash", "bash"} {
		t.Run(shell, func(t *testing.T) {
			h := newHost(t, fakevm.Hooks{Programs: programs})
			cmd, master, tty, before := shellJob(t, h, shell, `set -m; "$0" "$@" & read line; echo "line $line"; fg; echo "status $?"`, "keys")
			expect(t, master, "ready\r\n")
			io.WriteString(master, "mine\r")
			expect(t, master, "line mine\r\n")
			typeLine(t, master, "j\r", "key 'j'")
			if modes(t, tty) == before {
				t.Error("the terminal is not raw")
			}
			io.WriteString(master, "q")
			expect(t, master, "status 0\r\n")
			if err := cmd.Wait(); err != nil {
				t.Error(err)
			}
			if got := modes(t, tty); got != before {
				t.Errorf("modes afterwards %s, before %s", got, before)
			}
		})
	}
}

// TestShellJob: a shell's job that was stopped goes on in the background, where the terminal is
// not its own but nothing stops it, and then in the foreground.
func TestShellJob(t *testing.T) {
	for _, shell := range []string{"dash", "bash"} {
		t.Run(shell, func(t *testing.T) {
			h := newHost(t, fakevm.Hooks{Programs: programs})
			cmd, master, tty, before := shellJob(t, h, shell, `set -m; "$0" "$@"; echo "stopped $?"; read line; bg; read line; kill -USR1 %1; read line; fg; echo "status $?"`, "job")
			sameModes := func(when string) {
				t.Helper()
				if got := modes(t, tty); got != before {
					t.Errorf("modes %s %s, before %s", when, got, before)
				}
			}
			expect(t, master, "ready\r\n")
			job, err := unix.IoctlGetInt(int(master.Fd()), unix.TIOCGPGRP)
			if err != nil {
				t.Fatal(err)
			}
			raw := modes(t, tty)
			if err := unix.Kill(-job, unix.SIGTSTP); err != nil {
				t.Fatal(err)
			}
			expect(t, master, fmt.Sprintf("stopped %d\r\n", 128+unix.SIGSTOP))
			sameModes("of the stopped client's terminal")
			io.WriteString(master, "background\r")
			expect(t, master, fmt.Sprintf("signal %d\r\n", unix.SIGCONT))
			io.WriteString(master, "signal\r")
			expect(t, master, fmt.Sprintf("signal %d\r\n", unix.SIGUSR1))
			sameModes("with the client in the background")
			io.WriteString(master, "foreground\r")
			typeLine(t, master, "j\r", "key 'j'")
			if got := modes(t, tty); got != raw {
				t.Errorf("modes in the foreground %s, want %s", got, raw)
			}
			io.WriteString(master, "q")
			expect(t, master, "status 0\r\n")
			if err := cmd.Wait(); err != nil {
				t.Error(err)
			}
			sameModes("afterwards")
		})
	}
}

// TestKeysBesideAPipe: a pager whose stdin is a pipe gets the terminal's keys,
// and ^C stays a signal for all of the pipeline.
func TestKeysBesideAPipe(t *testing.T) {
	h := newHost(t, fakevm.Hooks{Programs: programs})
	master, tty := openPTY(t)
	before := modes(t, tty)
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	defer w.Close()
	cmd := onTerminal(h.process("keys"), 1)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = r, tty, tty
	start(t, cmd)
	expect(t, master, "ready\r\n")
	if m, err := unix.IoctlGetTermios(int(tty.Fd()), unix.TCGETS); err != nil || m.Lflag&unix.ICANON != 0 || m.Lflag&unix.ISIG == 0 {
		t.Errorf("terminal modes %+v, %v: want no lines, and signals", m, err)
	}
	io.WriteString(master, "j")
	expect(t, master, "key 'j'\r\n")
	io.WriteString(master, "\rq")
	expect(t, master, "key '\\r'\r\n")
	if st := exitStatus(cmd.Wait()); st != 0 {
		t.Errorf("status %d", st)
	}
	if got := modes(t, tty); got != before {
		t.Errorf("modes afterwards %s, before %s", got, before)
	}
}

// TestLinesOnce: whatever the other streams are, each line that the guest's pty
// ends comes out ended once.
func TestLinesOnce(t *testing.T) {
	h := newHost(t, fakevm.Hooks{Programs: programs})
	null, err := os.OpenFile(os.DevNull, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer null.Close()
	for _, c := range []struct {
		name        string
		in, pipeErr bool // stdin is the terminal; stderr is a pipe
	}{{"all", true, false}, {"stdout", false, false}, {"stderr is a pipe", true, true}} {
		master, tty := openPTY(t)
		cmd := onTerminal(h.process("lines"), 1)
		cmd.Stdin, cmd.Stdout, cmd.Stderr = null, tty, null
		if c.in {
			cmd.Stdin = tty
		}
		var stderr bytes.Buffer
		if c.pipeErr {
			cmd.Stderr = &stderr
		}
		start(t, cmd)
		if got := expect(t, master, "two\r\n"); got != "one\r\ntwo\r\n" {
			t.Errorf("%s: %q", c.name, got)
		}
		if st := exitStatus(cmd.Wait()); st != 0 || stderr.Len() > 0 {
			t.Errorf("%s: status %d, %q", c.name, st, stderr.String())
		}
	}
}

// TestVMDiesUnderATerminal: the terminal is restored when the VM is killed, and
// when the service is.
func TestVMDiesUnderATerminal(t *testing.T) {
	for _, victim := range []string{"VM", "service"} {
		h := newHost(t, fakevm.Hooks{})
		master, tty := openPTY(t)
		before := modes(t, tty)
		cmd := onTerminal(h.process("shell"), 0)
		var stderr strings.Builder
		cmd.Stdin, cmd.Stdout, cmd.Stderr = tty, tty, &stderr
		start(t, cmd)
		expect(t, master, "$ ")
		if victim == "VM" {
			h.fleet.VMs()[0].Kill()
		} else {
			h.stop()
		}
		if st := exitStatus(cmd.Wait()); st != StatusFailed || stderr.Len() == 0 {
			t.Errorf("%s: status %d, %q", victim, st, stderr.String())
		}
		if got := modes(t, tty); got != before {
			t.Errorf("%s: modes afterwards %s, before %s", victim, got, before)
		}
	}
}

// TestGuestDir: a relative directory is the caller's, if the distro can see it.
func TestGuestDir(t *testing.T) {
	dir := t.TempDir()
	if err := os.Mkdir(dir+"/sub", 0o755); err != nil {
		t.Fatal(err)
	}
	t.Chdir(dir)
	shares := hostpath.Table{{Host: dir, Guest: "/mnt/host"}}
	for in, want := range map[string]string{".": "/mnt/host", "sub": "/mnt/host/sub", "sub/..": "/mnt/host"} {
		if got, err := guestDir(in, shares); err != nil || got != want {
			t.Errorf("%s: %q, %v; want %q", in, got, err, want)
		}
	}
	for in, want := range map[string]string{"..": "shared", "nosuch": "no such file"} {
		if got, err := guestDir(in, shares); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %q, %v; want %q", in, got, err, want)
		}
	}
}

// TestCarried: only a program in a directory for temporary files is one that the
// distro cannot have.
func TestCarried(t *testing.T) {
	dir := t.TempDir()
	for name, mode := range map[string]os.FileMode{"prog": 0o755, "data": 0o644} {
		if err := os.WriteFile(dir+"/"+name, nil, mode); err != nil {
			t.Fatal(err)
		}
	}
	env := map[string]string{"TMPDIR": dir + "/"}
	for _, c := range []struct {
		shell wire.Shell
		argv  []string
		want  bool
	}{
		{wire.ShellNone, []string{dir + "/prog", "a"}, true},
		{wire.ShellStandard, []string{dir + "/prog -test.v=true"}, true},
		{wire.ShellStandard, []string{dir + "/prog"}, true},
		{wire.ShellNone, []string{dir + "/data"}, false},
		{wire.ShellNone, []string{dir + "/nosuch"}, false},
		{wire.ShellNone, []string{dir}, false},
		{wire.ShellNone, []string{"/bin/sh"}, false},
		{wire.ShellNone, []string{"prog"}, false},
		{wire.ShellNone, []string{""}, false},
		{wire.ShellLogin, nil, false},
	} {
		got := carried(&RunSpec{Shell: c.shell, Argv: c.argv}, func(name string) string { return env[name] })
		if c.want && got != dir+"/prog" || !c.want && got != "" {
			t.Errorf("%q: %q", c.argv, got)
		}
	}
}
