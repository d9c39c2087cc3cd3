//go:build e2e

package main_test

import (
	"context"
	"errors"
	"io"
	"os"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/wsl2/wsl2/internal/testsys"
)

// TestSessions holds what one command's standard streams, exit status, user and
// directory are. All run in one VM.
func TestSessions(t *testing.T) {
	h := newHost(t)
	shell := func(script string) testsys.Result { return h.Run("-d", "small", "-e", "sh", "-c", script) }

	statuses := []struct {
		name   string
		args   []string
		status int
		stdout string // exactly
		stderr string // part of it
	}{
		{"output", []string{"-e", "echo", "a", "", "b c"}, 0, "a  b c\n", ""},
		{"shell", []string{"--", "echo -n $((6*7))"}, 0, "42", ""},
		{"words", []string{"--", "sh", "-c", "exit 3"}, 3, "", ""},
		{"default distro", []string{"echo $WSL_DISTRO_NAME"}, 0, "small\n", ""},
		{"no shell", []string{"-d", "small", "-e", "echo", "$HOME"}, 0, "$HOME\n", ""},
		{"stderr apart", []string{"-e", "sh", "-c", "echo out; echo err >&2; exit 3"}, 3, "out\n", "err\n"},
		{"status 255", []string{"-e", "sh", "-c", "exit 255"}, 255, "", ""},
		{"false", []string{"-e", "false"}, 1, "", ""},
		{"SIGKILL", []string{"-e", "sh", "-c", "kill -9 $$"}, 128 + 9, "", ""},
		{"SIGTERM", []string{"-e", "sh", "-c", "kill $$"}, 128 + 15, "", ""},
		{"not found", []string{"-e", "nosuchcommand"}, 127, "", "nosuchcommand"},
		{"not found in the shell", []string{"--", "nosuchcommand"}, 127, "", "nosuchcommand"},
		{"path not found", []string{"-e", "/no/such/command"}, 127, "", "/no/such/command"},
		{"not executable", []string{"-e", "/etc/passwd"}, 126, "", "/etc/passwd"},
		{"a directory", []string{"-e", "/etc"}, 126, "", "/etc"},
		{"unknown distro", []string{"-d", "nosuchdistro", "-e", "true"}, 125, "", "nosuchdistro"},
		{"unknown user", []string{"-u", "nosuchuser", "-e", "true"}, 125, "", "nosuchuser"},
		{"user without a shell", []string{"-u", "broken", "--", "true"}, 127, "", "/no/such/shell"},
		{"unknown option", []string{"--nosuchoption"}, 125, "", "nosuchoption"},
		{"user", []string{"-u", "alice", "-e", "sh", "-c", "id -un; id -gn; id -Gn; pwd; echo $HOME $USER $LOGNAME $SHELL"}, 0,
			"alice\nalice\nalice staff\n/home/alice\n/home/alice alice alice /bin/sh\n", ""},
		{"user by number", []string{"-u", "1000", "-e", "id", "-un"}, 0, "alice\n", ""},
		{"directory", []string{"--cd", "/srv", "-e", "pwd"}, 0, "/srv\n", ""},
		{"home directory", []string{"--cd", "~", "-u", "alice", "-e", "pwd"}, 0, "/home/alice\n", ""},
		{"system distro", []string{"--system", "--", "uname", "-s"}, 0, "Linux\n", ""},
		{"system status", []string{"--system", "-e", "sh", "-c", "exit 4"}, 4, "", ""},
	}
	for _, c := range statuses {
		t.Run(c.name, func(t *testing.T) {
			h.TB = t
			r := h.Run(c.args...)
			h.Want(r, c.status, c.stderr)
			if r.Stdout != c.stdout {
				t.Fatalf("want stdout %q: %v", c.stdout, r)
			}
			if c.status == 0 && c.stderr == "" && r.Stderr != "" && !strings.HasPrefix(r.Stderr, "wsl2: ") {
				t.Fatalf("unexpected stderr: %v", r)
			}
		})
	}

	// Each needs more than one command line.
	for _, c := range []struct {
		name string
		run  func(t *testing.T)
	}{
		{"directory that is not there", func(t *testing.T) {
			r := h.Run("-d", "small", "--cd", "/no/such/dir", "-e", "pwd")
			// As in WSL, that is a warning: the program runs in the user's home.
			h.Want(r, 0, "/no/such/dir", "no such file or directory", "/root")
			if r.Stdout != "/root\n" {
				t.Fatal(r)
			}
		}},
		{"megabytes both ways", func(t *testing.T) {
			const n = 8 << 20
			want, _ := testsys.SHA256(t, testsys.Pattern(n))
			r := h.RunIn(testsys.Pattern(n), "-d", "small", "-e", "cat")
			h.Want(r, 0)
			if got, size := testsys.SHA256(t, strings.NewReader(r.Stdout)); got != want {
				t.Fatalf("%d bytes came back as %d others", n, size)
			}
		}},
		{"megabytes on stderr too", func(t *testing.T) {
			r := shell("head -c 3000000 /dev/zero & head -c 2000000 /dev/zero >&2; wait")
			h.Want(r, 0)
			if len(r.Stdout) != 3000000 || len(r.Stderr) < 2000000 {
				t.Fatalf("stdout %d, stderr %d bytes", len(r.Stdout), len(r.Stderr))
			}
		}},
		{"output of a command that exits at once is complete", func(t *testing.T) {
			for range 10 {
				if r := shell("seq 1 3000; exit 5"); r.Status != 5 || !strings.HasSuffix(r.Stdout, "\n3000\n") || len(r.Stdout) != 13893 {
					t.Fatalf("%d bytes: %v", len(r.Stdout), r)
				}
			}
		}},
		{"end of file on stdin", func(t *testing.T) {
			r := h.RunIn(strings.NewReader("one\ntwo\n"), "-d", "small", "-e", "wc", "-l")
			h.Want(r, 0)
			if strings.TrimSpace(r.Stdout) != "2" {
				t.Fatal(r)
			}
		}},
		{"closed stdin", func(t *testing.T) {
			r := h.Shell(`exec "$0" "$@" <&-`, "-d", "small", "-e", "cat")
			h.Want(r, 0)
		}},
		{"closed stdout and stderr", func(t *testing.T) {
			r := h.Shell(`"$0" "$@" >&- 2>&-; echo $?`, "-d", "small", "-e", "sh", "-c", "echo lost; exit 9")
			if strings.TrimSpace(r.Stdout) != "9" && strings.TrimSpace(r.Stdout) != "1" {
				t.Fatal(r)
			}
		}},
		{"standard streams are /dev/null", func(t *testing.T) {
			r := h.Shell(`"$0" "$@" </dev/null >/dev/null 2>/dev/null; echo $?`, "-d", "small", "-e", "sh", "-c", "cat; echo lost; exit 8")
			if r.Stdout != "8\n" {
				t.Fatal(r)
			}
		}},
		{"standard streams are a socket", func(t *testing.T) {
			fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
			testsys.Must(t, err)
			ours, theirs := os.NewFile(uintptr(fds[0]), "ours"), os.NewFile(uintptr(fds[1]), "theirs")
			defer ours.Close()
			ctx, cancel := context.WithTimeout(context.Background(), testsys.Deadline)
			defer cancel()
			cmd := h.Cmd(ctx, "-d", "small", "-e", "sh", "-c", "cat; echo end; exit 5")
			cmd.Stdin, cmd.Stdout = theirs, theirs
			testsys.Must(t, cmd.Start())
			theirs.Close()
			_, err = ours.WriteString("through a socket\n")
			testsys.Must(t, errors.Join(err, unix.Shutdown(fds[0], unix.SHUT_WR)))
			out, err := io.ReadAll(ours)
			cmd.Wait()
			if status := cmd.ProcessState.ExitCode(); err != nil || status != 5 || string(out) != "through a socket\nend\n" {
				t.Fatalf("status %d, %q, %v", status, out, err)
			}
		}},
		{"reader goes away", func(t *testing.T) {
			r := h.Shell(`"$0" "$@" | head -n 1`, "-d", "small", "-e", "yes")
			h.Want(r, 0)
			if r.Stdout != "y\n" {
				t.Fatal(r)
			}
			// The program in the guest ends too.
			h.Want(shell("while pidof yes >/dev/null; do :; done"), 0)
		}},
		{"writer stays", func(t *testing.T) { // the command ends although stdin does not
			l := h.Start("-d", "small", "-e", "true")
			h.Want(l.Wait(), 0)
		}},
		{"background child keeps nobody", func(t *testing.T) {
			r := shell("sleep 100000 & echo here")
			h.Want(r, 0)
			if r.Stdout != "here\n" {
				t.Fatal(r)
			}
			h.Want(shell("until pidof sleep; do :; done; killall sleep"), 0) // it may not be one yet
		}},
		{"signals of the caller reach the program", func(t *testing.T) {
			l := h.Start("-d", "small", "-e", "sh", "-c", `trap 'echo term; exit 6' TERM; echo ready; while :; do sleep 100000 & wait $!; done`)
			l.Expect("ready\n")
			testsys.Must(t, l.Cmd.Process.Signal(syscall.SIGTERM))
			r := l.Wait()
			h.Want(r, 6)
			if r.Stdout != "term\n" {
				t.Fatal(r)
			}
		}},
		{"a killed client ends its session", func(t *testing.T) {
			l := h.Start("-d", "small", "-e", "sh", "-c", `trap 'echo hup >/run/hup; exit' HUP; echo ready; while :; do sleep 100000 & wait $!; done`)
			l.Expect("ready\n")
			l.Kill()
			h.Want(shell("while ! [ -s /run/hup ]; do :; done"), 0)
		}},
		{"environment", func(t *testing.T) {
			h.Setenv("SECRET", "of the host")
			r := shell("env")
			h.Want(r, 0)
			if strings.Contains(r.Stdout, "SECRET") || !strings.Contains(r.Stdout, "\nWSL_DISTRO_NAME=small\n") && !strings.HasPrefix(r.Stdout, "WSL_DISTRO_NAME=small\n") {
				t.Fatal(r)
			}
		}},
		{"many arguments", func(t *testing.T) {
			args := []string{"-d", "small", "-e", "sh", "-c", `echo $#`, "sh"}
			for range 5000 {
				args = append(args, "an argument")
			}
			if got := h.OK(args...); got != "5000\n" {
				t.Fatalf("%q", got)
			}
		}},
		{"argument bytes", func(t *testing.T) {
			odd := "a\n\"'\\$`\t\xff\xfe é"
			if got := h.OK("-d", "small", "-e", "printf", "%s", odd); got != odd {
				t.Fatalf("%q", got)
			}
		}},
	} {
		t.Run(c.name, func(t *testing.T) {
			h.TB = t
			c.run(t)
		})
	}
	h.TB = t
}
