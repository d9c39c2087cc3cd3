package sshproxy

import (
	"bytes"
	"errors"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/crypto/ssh"
	"golang.org/x/sys/unix"
)

const limit = 60 * time.Second

// dial connects an SSH client, as user, to a proxy whose wsl2 is a shell script.
func dial(t *testing.T, user, script string) *ssh.Client {
	t.Helper()
	dir := t.TempDir()
	wsl2 := dir + "/wsl2"
	if err := os.WriteFile(wsl2, []byte("#!/bin/sh\n"+script), 0o755); err != nil {
		t.Fatal(err)
	}
	key, err := HostKey(dir + "/ssh/host_key")
	if err != nil {
		t.Fatal(err)
	}
	l, err := net.Listen("unix", dir+"/s")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	done := make(chan error, 1)
	go func() {
		c, err := l.Accept()
		if err == nil {
			err = Serve(c, Config{Wsl2: wsl2, Self: "/proc/self/exe", Distro: "debian", HostKey: key, Logf: t.Logf})
		}
		done <- err
	}()
	c, err := net.Dial("unix", dir+"/s")
	if err != nil {
		t.Fatal(err)
	}
	c.SetDeadline(time.Now().Add(limit))
	conn, channels, requests, err := ssh.NewClientConn(c, "debian.wsl2", &ssh.ClientConfig{User: user, HostKeyCallback: ssh.FixedHostKey(key.PublicKey())})
	if err != nil {
		t.Fatal(err)
	}
	client := ssh.NewClient(conn, channels, requests)
	t.Cleanup(func() {
		client.Close()
		if err := <-done; err != nil {
			t.Errorf("Serve: %v", err)
		}
	})
	return client
}

func newSession(t *testing.T, c *ssh.Client) *ssh.Session {
	t.Helper()
	s, err := c.NewSession()
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// TestCommand: each channel is one wsl2, whose arguments, streams and status are
// what was asked.
func TestCommand(t *testing.T) {
	c := dial(t, "alice", `echo "$# $1 $2 $3 $4 $5 $6 $7 [$8] $LANG $WSLENV"; cat; echo err >&2; exit 7`)
	s := newSession(t, c)
	var out, errOut bytes.Buffer
	s.Stdin, s.Stdout, s.Stderr = strings.NewReader("input"), &out, &errOut
	t.Setenv("WSLENV", "X")
	if err := s.Setenv("LANG", "de_DE.UTF-8"); err != nil {
		t.Fatal(err)
	}
	var exit *ssh.ExitError
	if err := s.Run("a 'b  c' $d"); !errors.As(err, &exit) || exit.ExitStatus() != 7 {
		t.Errorf("%v", err)
	}
	if want := "8 -d debian -u alice --cd ~ -- [a 'b  c' $d] de_DE.UTF-8 X:LANG/u\ninput"; out.String() != want {
		t.Errorf("%q, want %q", out.String(), want)
	}
	if errOut.String() != "err\n" {
		t.Errorf("stderr %q", errOut.String())
	}
	for _, script := range []string{"exit 0", "kill -9 $$"} {
		err := newSession(t, dial(t, DefaultUser, script)).Run("x")
		if script == "exit 0" && err != nil || script != "exit 0" && (!errors.As(err, &exit) || exit.ExitStatus() != 137) {
			t.Errorf("%s: %v", script, err)
		}
	}
}

// TestShell: the default user's login shell, on a terminal of the asked size.
func TestShell(t *testing.T) {
	c := dial(t, DefaultUser, `echo "$* $TERM"; trap 'stty size' WINCH; stty size; while ! read line; do :; done; echo "got $line"; exit 3`)
	s := newSession(t, c)
	if err := s.RequestPty("xterm-test", 11, 22, ssh.TerminalModes{}); err != nil {
		t.Fatal(err)
	}
	in, _ := s.StdinPipe()
	out, _ := s.StdoutPipe()
	if err := s.Shell(); err != nil {
		t.Fatal(err)
	}
	expect := func(text string) {
		t.Helper()
		var all []byte
		b := make([]byte, 1)
		for !strings.HasSuffix(string(all), text) {
			if _, err := out.Read(b); err != nil {
				t.Fatalf("waiting for %q: %v after %q", text, err, all)
			}
			all = append(all, b...)
		}
	}
	expect("-d debian --cd ~ xterm-test\r\n11 22\r\n")
	if err := s.WindowChange(33, 44); err != nil {
		t.Fatal(err)
	}
	expect("33 44\r\n") // what is typed may overtake a request
	io.WriteString(in, "hello\r")
	expect("got hello\r\n")
	var exit *ssh.ExitError
	if err := s.Wait(); !errors.As(err, &exit) || exit.ExitStatus() != 3 {
		t.Errorf("%v", err)
	}
}

// TestRefuses what is not served.
func TestRefuses(t *testing.T) {
	c := dial(t, DefaultUser, `echo no such helper >&2; exit 1`)
	if err := newSession(t, c).RequestSubsystem("netconf"); err == nil {
		t.Error("subsystem netconf")
	}
	if _, _, err := c.OpenChannel("x11", nil); err == nil {
		t.Error("channel x11")
	}
	if conn, err := c.Dial("tcp", "127.0.0.1:1"); err == nil {
		conn.Close()
		t.Error("a port, although there is no helper")
	}
	s := newSession(t, c)
	if err := s.Start("x"); err != nil {
		t.Fatal(err)
	}
	if err := s.RequestSubsystem("sftp"); err == nil {
		t.Error("a second program on one channel")
	}
	s.Wait()
}

// TestForwardEnds: what carries a port's connection ends when the client closes it, or goes,
// whatever the server in the distro does.
func TestForwardEnds(t *testing.T) {
	for _, c := range []struct {
		name, server string
		established  bool // else the client goes while the connection is being made
	}{
		{"a server that sends for ever", "printf +; while :; do echo more || exit; done", true},
		{"a server that is silent", "printf +; exec sleep 100000", true},
		{"a server that does not answer", "exec sleep 100000", false},
	} {
		t.Run(c.name, func(t *testing.T) {
			fifo := filepath.Join(t.TempDir(), "alive") // is open for writing as long as wsl2 lives
			if err := unix.Mkfifo(fifo, 0o600); err != nil {
				t.Fatal(err)
			}
			client := dial(t, DefaultUser, `case "$*" in *dial*) exec 9>`+fifo+`; echo >&9; `+c.server+`;; esac`)
			dialled := make(chan net.Conn, 1)
			go func() {
				conn, err := client.Dial("tcp", "127.0.0.1:1")
				if (err == nil) != c.established {
					t.Errorf("the connection: %v", err)
				}
				dialled <- conn
			}()
			alive, err := os.Open(fifo)
			if err != nil {
				t.Fatal(err)
			}
			defer alive.Close()
			if _, err := io.ReadFull(alive, make([]byte, 1)); err != nil {
				t.Fatal(err)
			}
			if c.established {
				if conn := <-dialled; conn != nil {
					conn.Close()
				}
			} else {
				client.Close()
			}
			alive.SetReadDeadline(time.Now().Add(limit))
			if _, err := alive.Read(make([]byte, 1)); err != io.EOF {
				t.Errorf("wsl2 still runs: %v", err)
			}
			if !c.established {
				<-dialled
			}
		})
	}
}

// TestHelperAgain: a distro that has been started anew has lost the helper, and gets it again.
// What failed once is tried again as well.
func TestHelperAgain(t *testing.T) {
	dir := t.TempDir()
	helper, broken := dir+"/helper", dir+"/broken"
	c := dial(t, DefaultUser, `case "$*" in
*dial*) test -e `+helper+` || exit 127; printf +; cat;;
*) cat >/dev/null; test -e `+broken+` && exit 1; touch `+helper+`;;
esac`)
	connect := func() error {
		conn, err := c.Dial("tcp", "127.0.0.1:1")
		if err == nil {
			err = conn.Close()
		}
		return err
	}
	if err := os.WriteFile(broken, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := connect(); err == nil || !strings.Contains(err.Error(), Helper) {
		t.Errorf("without a helper: %v", err)
	}
	os.Remove(broken)
	for range 2 {
		if err := connect(); err != nil {
			t.Error(err)
		}
		if err := os.Remove(helper); err != nil {
			t.Error(err)
		}
	}
}

// TestHostKey: however many ask at once, there is one key, and ssh(1) knows it.
func TestHostKey(t *testing.T) {
	path := filepath.Join(t.TempDir(), "a/host_key")
	keys := make([]string, 8)
	var wg sync.WaitGroup
	for i := range keys {
		wg.Go(func() {
			key, err := HostKey(path)
			if err != nil {
				t.Error(err)
				return
			}
			keys[i] = string(ssh.MarshalAuthorizedKey(key.PublicKey()))
		})
	}
	wg.Wait()
	known, err := os.ReadFile(KnownHosts(path))
	if err != nil {
		t.Fatal(err)
	}
	for _, k := range keys {
		if "*.wsl2 "+k != string(known) {
			t.Errorf("%q, known is %q", k, known)
		}
	}
	if st, err := os.Stat(path); err != nil || st.Mode().Perm() != 0o600 {
		t.Errorf("%v, %v", st.Mode(), err)
	}
	os.WriteFile(path, []byte("no key"), 0o600)
	if _, err := HostKey(path); err == nil || !strings.Contains(err.Error(), "remove the file") {
		t.Errorf("%v", err)
	}
}
