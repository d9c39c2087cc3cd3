//go:build e2e

package main_test

import (
	"bytes"
	"context"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/creack/pty"

	"github.com/wsl2/wsl2/internal/testsys"
)

// TestSSH reaches a distro that has no SSH server and no network with OpenSSH's
// own programs, by nothing but what `wsl2 ssh-config` prints.
func TestSSH(t *testing.T) {
	h := newHost(t)
	config := h.File("ssh_config", []byte(h.OK("ssh-config")))
	ctx, cancel := context.WithTimeout(context.Background(), testsys.Deadline)
	defer cancel()
	command := func(name string, args ...string) *exec.Cmd {
		cmd := exec.CommandContext(ctx, name, append([]string{"-F", config, "-o", "BatchMode=yes"}, args...)...)
		cmd.Env, cmd.Dir = h.Env, h.Dir
		return cmd
	}
	run := func(t *testing.T, cmd *exec.Cmd, status int) string {
		t.Helper()
		r := h.Finish(ctx, cmd)
		if r.Status != status {
			t.Fatalf("want status %d: %v", status, r)
		}
		return r.Stdout
	}
	for _, c := range []struct {
		name, script string
		args         []string
		status       int
		stdout       string
	}{
		{"a command", "id -un; echo err >&2; exit 7", nil, 7, "root\n"},
		{"the shell's words", `echo "a  b" $((6*7)) | tr a-z A-Z`, nil, 0, "A  B 42\n"},
		{"a user", "id -un; pwd", []string{"-l", "alice"}, 0, "alice\n/home/alice\n"},
		{"the environment", "echo $LANG,$CHOSEN", []string{"-o", "SetEnv=LANG=de_DE.UTF-8 CHOSEN=yes"}, 0, "de_DE.UTF-8,yes\n"},
		{"a signal's status", "kill -9 $$", nil, 137, ""},
	} {
		t.Run(c.name, func(t *testing.T) {
			if got := run(t, command("ssh", append(c.args, "small.wsl2", c.script)...), c.status); got != c.stdout {
				t.Errorf("%q, want %q", got, c.stdout)
			}
		})
	}

	t.Run("bytes both ways", func(t *testing.T) {
		payload := testsys.PatternBytes(t, 3<<20)
		cmd := command("ssh", "small.wsl2", "cat")
		var out bytes.Buffer
		cmd.Stdin, cmd.Stdout = bytes.NewReader(payload), &out
		run(t, cmd, 0)
		if !bytes.Equal(out.Bytes(), payload) {
			t.Errorf("%d bytes came back, of %d", out.Len(), len(payload))
		}
	})

	t.Run("a terminal", func(t *testing.T) {
		x := openTerminal(t, command("ssh", "small.wsl2"))
		x.expect("# ")
		x.send("tty; stty size; echo $TERM $0\r")
		x.expect("/dev/pts/")
		x.expect("40 100\r\nxterm -sh\r\n")
		testsys.Must(t, pty.Setsize(x.pty, &pty.Winsize{Rows: 22, Cols: 77}))
		x.send("until [ \"$(stty size)\" = '22 77' ]; do :; done; echo resized $?\r")
		x.expect("resized 0\r\n")
		x.send("exit 4\r")
		if status := x.wait(); status != 4 {
			t.Errorf("status %d", status)
		}
	})

	t.Run("scp and sftp", func(t *testing.T) {
		payload := testsys.PatternBytes(t, 1<<20)
		file := h.File("file", payload)
		run(t, command("scp", "-q", file, "alice@small.wsl2:there"), 0)
		if got := h.OK("-d", "small", "-e", "stat", "-c", "%U %s", "/home/alice/there"); got != "alice 1048576\n" {
			t.Errorf("the copy is %q", got)
		}
		run(t, command("scp", "-q", "small.wsl2:/home/alice/there", file+".back"), 0)
		if back, err := os.ReadFile(file + ".back"); err != nil || !bytes.Equal(back, payload) {
			t.Errorf("%d bytes came back: %v", len(back), err)
		}
		cmd := command("sftp", "-q", "-b", "-", "small.wsl2")
		cmd.Stdin = strings.NewReader("mkdir /srv/d\nrename /home/alice/there /srv/d/moved\nchmod 640 /srv/d/moved\nsymlink /srv/d /srv/l\nls -1 /srv/l/\n")
		if got := run(t, cmd, 0); !strings.Contains(got, "moved\n") {
			t.Errorf("sftp: %q", got)
		}
		if got := h.OK("-d", "small", "-e", "stat", "-c", "%a", "/srv/d/moved"); got != "640\n" {
			t.Errorf("mode %q", got)
		}
	})

	t.Run("a port of the distro", func(t *testing.T) {
		server := h.Start("-d", "small", "-e", "sh", "-c", "nc -l -p 7777 -e cat & echo $!; wait")
		server.Expect("\n")
		h.OK("-d", "small", "-e", "sh", "-c", "until cat /proc/net/tcp* | grep -q ':1E61 .* 0A '; do :; done")
		cmd := command("ssh", "-W", "127.0.0.1:7777", "small.wsl2")
		cmd.Stdin = strings.NewReader("through the tunnel\n")
		if got := run(t, cmd, 0); got != "through the tunnel\n" {
			t.Errorf("%q", got)
		}
		h.Want(server.Wait(), 0)
		r := h.Finish(ctx, command("ssh", "-W", "127.0.0.1:7778", "small.wsl2"))
		if r.Status != 255 || !strings.Contains(r.Stderr, "7778") {
			t.Error(r)
		}
	})

	t.Run("an editor's server", func(t *testing.T) {
		editorServer(ctx, t, h, config)
	})

	t.Run("keys are this user's alone", func(t *testing.T) {
		st, err := os.Stat(filepath.Join(h.Data(), "ssh/host_key"))
		if err != nil || st.Mode().Perm() != 0o600 {
			t.Errorf("%v, %v", st, err)
		}
		// Another key at the same name is noticed.
		testsys.Must(t, os.Remove(filepath.Join(h.Data(), "ssh/host_key")))
		run(t, command("ssh", "small.wsl2", "true"), 0)
		r := h.Finish(ctx, command("ssh", "nosuchdistro.wsl2", "true"))
		if r.Status != 125 || !strings.Contains(r.Stderr, "nosuchdistro") {
			t.Error(r)
		}
	})
}
