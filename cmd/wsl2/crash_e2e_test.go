//go:build e2e

package main_test

import (
	"context"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"github.com/wsl2/wsl2/internal/testsys"
)

// TestKilled kills one of the three processes with SIGKILL at one of the moments
// of its life. Whatever was promised before (a sync that returned) holds, the
// next command works, and the disk is clean.
func TestKilled(t *testing.T) {
	for _, c := range []struct {
		victim string // testsys.Process.Role, or "client"
		moment string
	}{
		{"vm", "booting"}, {"vm", "idle"}, {"vm", "writing"}, {"vm", "importing"}, {"vm", "installing"},
		{"service", "booting"}, {"service", "idle"}, {"service", "writing"}, {"service", "importing"}, {"service", "installing"},
		{"client", "booting"}, {"client", "writing"}, {"client", "importing"}, {"client", "installing"},
	} {
		t.Run(c.victim+" "+c.moment, func(t *testing.T) {
			killed(newHost(t), c.victim, c.moment)
		})
	}
}

// TestStaleSocket: what a crash leaves in the runtime directory is in nobody's way.
func TestStaleSocket(t *testing.T) {
	h := newHost(t)
	h.OK("-d", "small", "-e", "true")
	for _, role := range []string{"service", "vm"} {
		h.Process(role).Kill(t)
	}
	entries, err := os.ReadDir(h.Runtime())
	testsys.Must(t, err)
	sockets := 0
	for _, e := range entries {
		if e.Type()&os.ModeSocket != 0 {
			sockets++
		}
	}
	if sockets == 0 {
		t.Fatalf("no socket was left to be stale: %v", entries)
	}
	h.OK("-d", "small", "-e", "true")
	h.OK("--shutdown")

	// A socket that somebody listens on who is no service, and a plain file.
	sock := filepath.Join(h.Runtime(), "service.sock")
	os.Remove(sock)
	testsys.Must(t, os.WriteFile(sock, nil, 0o600))
	h.OK("-d", "small", "-e", "true")
	h.OK("--shutdown")
	os.Remove(sock)
	l, err := net.Listen("unix", sock)
	testsys.Must(t, err)
	defer l.Close()
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			io.WriteString(c, "SSH-2.0-what are you doing here\r\n")
			c.Close()
		}
	}()
	h.Refused(h.Run("-d", "small", "-e", "true"), "service")
}

// TestPanic: a guest kernel that panics ends every session with its last words, and a terminal
// is as it was.
func TestPanic(t *testing.T) {
	h := newHost(t)
	ctx, cancel := context.WithTimeout(context.Background(), testsys.Deadline)
	defer cancel()
	wsl := h.Cmd(ctx, "-d", "small")
	shell := exec.CommandContext(ctx, "sh", append([]string{"-c", `stty -g; "$0" "$@"; echo status $?; stty -g; read end`}, wsl.Args...)...)
	shell.Env, shell.Dir = wsl.Env, wsl.Dir
	x := openTerminal(t, shell)
	x.expect("# ")
	if !x.raw() {
		t.Error("the terminal of a session is not raw")
	}
	guestPanics(h)
	x.expect("panic")
	x.expect("status 125\r\n")
	x.send("\r")
	x.wait()
	x.sameModes()
}
