//go:build e2e

package main_test

import (
	"bytes"
	"context"
	"fmt"
	"net"
	"os"
	"os/exec"
	"strings"
	"sync"
	"testing"

	"github.com/creack/pty"

	"github.com/wsl2/wsl2/internal/testsys"
)

// TestPrograms: the programs that people run at a terminal work in a distro, and those
// that run programs at terminals run wsl2.
func TestPrograms(t *testing.T) {
	h := newDebian(t)
	h.Config("[wsl2]", "vmIdleTimeout=-1", "safeMode=true", "[general]", "instanceIdleTimeout=-1") // nothing here needs its systemd
	inside(h, "one", "seq 1000 >/root/lines; printf 'alpha\\nbeta\\n' >/root/text; mkdir -p /root/shown-by-mc")
	ctx, cancel := context.WithTimeout(context.Background(), 3*testsys.Deadline) // of all of them
	defer cancel()
	script := func(t *testing.T, text string, args ...string) *terminal {
		t.Helper()
		h.TB = t
		wsl := h.Cmd(ctx, args...)
		cmd := exec.CommandContext(ctx, "sh", append([]string{"-c", text}, wsl.Args...)...)
		cmd.Env, cmd.Dir = wsl.Env, wsl.Dir
		return openTerminal(t, cmd)
	}
	// full runs a program of the distro, and looks that the terminal is afterwards as it was.
	full := func(t *testing.T, argv ...string) *terminal {
		t.Helper()
		return script(t, `stty -g; "$0" "$@"; echo status $?; stty -g; read end`, append([]string{"-d", "one", "-e"}, argv...)...)
	}
	left := func(x *terminal, status string) {
		x.t.Helper()
		x.expect("status " + status + "\r\n")
		x.send("\r")
		x.wait()
		x.sameModes()
	}

	t.Run("less", func(t *testing.T) {
		x := full(t, "less", "/root/lines")
		x.expect("/root/lines")
		x.send("G")
		x.expect("\n1000\r\n")
		x.send("?^77$\r") // drawn from below
		x.expect("\x1b[7m77")
		testsys.Must(t, pty.Setsize(x.pty, &pty.Winsize{Rows: 12, Cols: 60}))
		x.expect("87\r\n") // it is drawn anew, and has dropped keys that came meanwhile
		x.send("100g")
		x.expect("110\r\n")
		x.send("q")
		left(x, "0")
	})
	t.Run("a pipeline to less", func(t *testing.T) {
		// Of two that read the same terminal, each would get some of the keys.
		x := script(t, `stty -g; "$0" "$@" </dev/null | less; echo status $?; stty -g; read end`, "-d", "one", "-e", "seq", "1000")
		x.expect("\n39\r\n")
		x.send("G")
		x.expect("\n1000\r\n")
		x.send("q")
		left(x, "0")
	})
	t.Run("vim", func(t *testing.T) {
		x := full(t, "vim.tiny", "/root/text")
		x.expect("beta")
		x.send(":s/alpha/gamma/\r")
		x.expect("gamma")
		testsys.Must(t, pty.Setsize(x.pty, &pty.Winsize{Rows: 20, Cols: 70}))
		x.expect("gamma") // likewise
		x.send("ZZ")
		left(x, "0")
		if got := inside(h, "one", "cat /root/text"); got != "gamma\nbeta" {
			t.Errorf("%q", got)
		}
	})
	t.Run("htop", func(t *testing.T) {
		x := full(t, "htop")
		x.expect("Quit")
		testsys.Must(t, pty.Setsize(x.pty, &pty.Winsize{Rows: 30, Cols: 120}))
		x.expect("Quit")
		x.send("q")
		left(x, "0")
	})
	t.Run("mc", func(t *testing.T) {
		x := full(t, "mc", "/root", "/etc")
		x.expect("shown-by-mc")
		x.send("\x0f") // ^O: its subshell's screen
		x.expect("# ")
		x.send("echo below $((6*7))\r")
		x.expect("below 42")
		x.send("\x0f")
		x.expect("shown-by-mc")
		x.send("exit\r") // to the command line
		left(x, "0")
	})

	t.Run("script", func(t *testing.T) {
		h.TB = t
		cmd := exec.CommandContext(ctx, "script", "-qec", h.Exe+" -d one -e sh -c 'test -t 0 && test -t 1 && echo $((6*7)); exit 3'", h.Path("typescript"))
		cmd.Env, cmd.Dir = h.Env, h.Dir
		r := h.Finish(ctx, cmd)
		text, err := os.ReadFile(h.Path("typescript"))
		if r.Status != 3 || err != nil || !strings.Contains(string(text), "42\r\n") {
			t.Errorf("%v, typescript %q, %v", r, text, err)
		}
	})
	t.Run("expect", func(t *testing.T) {
		h.TB = t
		const dialog = `set timeout 300
proc want {what} { expect $what {} timeout {puts "no $what"; exit 50} eof {puts "no $what"; exit 51} }
spawn $env(WSL2) -d one
want "# "
send "stty size; echo a\$((6*7))\r"
want "a42\r\n"
send "exec sh -c 'echo started; exec cat'\r"
want "started\r\n"
send "typed\r"
want "typed\r\ntyped\r\n"
send "\004"
expect eof
exit [lindex [wait] 3]
`
		cmd := exec.CommandContext(ctx, "expect", "-f", h.File("dialog", []byte(dialog)))
		cmd.Env, cmd.Dir = append(h.Env, "WSL2="+h.Exe), h.Dir
		if r := h.Finish(ctx, cmd); r.Status != 0 {
			t.Error(r)
		}
	})

	h.TB = t
	here := sshHere(ctx, h)
	ssh := func(args ...string) *exec.Cmd {
		cmd := exec.CommandContext(ctx, "ssh", append(here, args...)...)
		cmd.Env, cmd.Dir = h.Env, h.Dir
		return cmd
	}
	t.Run("ssh -t host wsl2", func(t *testing.T) {
		h.TB = t
		x := openTerminal(t, ssh("-t", "root@127.0.0.1", h.Exe, "-d", "one"))
		x.expect("# ")
		x.send("stty size; tty\r")
		x.expect("40 100\r\n/dev/pts/")
		testsys.Must(t, pty.Setsize(x.pty, &pty.Winsize{Rows: 21, Cols: 71}))
		x.send("until [ \"$(stty size)\" = '21 71' ]; do :; done; echo resized $?\r")
		x.expect("resized 0\r\n")
		x.send("exit 6\r")
		if status := x.wait(); status != 6 {
			t.Errorf("status %d", status)
		}
	})
	t.Run("ssh host wsl2", func(t *testing.T) {
		h.TB = t
		payload := testsys.PatternBytes(t, 1<<20)
		cmd := ssh("root@127.0.0.1", h.Exe, "-d", "one", "-e", "sh", "-c", "'cat; echo err >&2; exit 5'")
		var out, errs bytes.Buffer
		cmd.Stdin, cmd.Stdout, cmd.Stderr = bytes.NewReader(payload), &out, &errs
		if r := h.Finish(ctx, cmd); r.Status != 5 || !bytes.Equal(out.Bytes(), payload) || errs.String() != "err\n" {
			t.Errorf("%v: %d bytes came back, of %d; stderr %q", r, out.Len(), len(payload), errs.String())
		}
	})

	t.Run("rsync", func(t *testing.T) {
		h.TB = t
		config := h.File("ssh_config", []byte(h.OK("ssh-config")))
		tree, back := h.Path("tree"), h.Path("back")
		testsys.Must(t, os.MkdirAll(tree+"/below", 0o755))
		testsys.Must(t, os.WriteFile(tree+"/below/file", testsys.PatternBytes(t, 1<<20), 0o640))
		testsys.Must(t, os.Symlink("below/file", tree+"/link"))
		rsync := func(from, to string) string {
			t.Helper()
			cmd := exec.CommandContext(ctx, "rsync", "-a", "--delete", "--stats", "-e", "ssh -F "+config+" -o BatchMode=yes", from, to)
			cmd.Env, cmd.Dir = h.Env, h.Dir
			r := h.Finish(ctx, cmd)
			h.Want(r, 0)
			return r.Stdout
		}
		rsync(tree+"/", "one.wsl2:/root/tree/")
		if got := inside(h, "one", "cd /root/tree; stat -c '%a %s' below/file; readlink link"); got != "640 1048576\nbelow/file" {
			t.Errorf("%q", got)
		}
		if stats := rsync(tree+"/", "one.wsl2:/root/tree/"); !strings.Contains(stats, "Number of regular files transferred: 0\n") {
			t.Errorf("what is there was sent again: %s", stats)
		}
		rsync("one.wsl2:/root/tree/", back+"/")
		if out, err := exec.Command("diff", "-r", "--no-dereference", tree, back).CombinedOutput(); err != nil {
			t.Errorf("%v: %s", err, out)
		}
	})
	h.TB = t
}

// sshHere starts an SSH server for root of this machine and returns ssh's options for it.
// It takes keys from root's home, in whose place it finds the host's.
func sshHere(ctx context.Context, h *testsys.Host) []string {
	h.TB.Helper()
	testsys.Must(h.TB, os.Mkdir(h.Path("home/.ssh"), 0o700))
	for _, argv := range [][]string{
		{"dropbearkey", "-t", "ed25519", "-f", h.Path("host")},
		{"ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", h.Path("key")},
		{"cp", h.Path("key.pub"), h.Path("home/.ssh/authorized_keys")},
	} {
		if out, err := exec.CommandContext(ctx, argv[0], argv[1:]...).CombinedOutput(); err != nil {
			h.TB.Fatalf("%q: %v: %s", argv, err, out)
		}
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	testsys.Must(h.TB, err)
	var servers sync.WaitGroup
	servers.Go(func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return // closed
			}
			f, err := c.(*net.TCPConn).File()
			c.Close()
			if err != nil {
				h.TB.Error(err)
				continue
			}
			cmd := exec.CommandContext(ctx, "unshare", "--mount", "--propagation", "private", "sh", "-c",
				`mount --bind "$0" ~root && exec dropbear -i -e -s -r "$1"`, h.Path("home"), h.Path("host"))
			cmd.Env, cmd.Stdin, cmd.Stdout = h.Env, f, f
			servers.Go(func() {
				cmd.Run() //nolint:errcheck // what it serves has its own status
				f.Close()
			})
		}
	})
	h.TB.Cleanup(func() {
		l.Close()
		servers.Wait()
	})
	return []string{"-F", "/dev/null", "-q", "-i", h.Path("key"), "-p", fmt.Sprint(l.Addr().(*net.TCPAddr).Port),
		"-o", "StrictHostKeyChecking=no", "-o", "UserKnownHostsFile=/dev/null"}
}
