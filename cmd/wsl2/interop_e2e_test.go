//go:build e2e

package main_test

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/creack/pty"
	"golang.org/x/sys/unix"

	"github.com/wsl2/wsl2/internal/testsys"
)

// TestTools is what every distro finds in it: /init under its other names.
func TestTools(t *testing.T) {
	h := newHost(t)
	shell := func(script string) string {
		t.Helper()
		return h.OK("-d", "small", "-e", "sh", "-c", script)
	}
	for _, name := range []string{"wslpath", "wslinfo", "host-exec", "wsl2"} {
		if out := shell("readlink -f $(which " + name + ")"); out != "/init\n" {
			t.Errorf("%s is %q", name, out)
		}
	}
	if r := h.Run("-d", "small", "-e", "sh", "-c", "echo x >/init"); r.Status == 0 {
		t.Error("/init can be written")
	}
	if out := shell("wslinfo --version"); !strings.HasPrefix(h.OK("--version"), "wsl2 "+strings.TrimSpace(out)+"\n") {
		t.Errorf("wslinfo --version: %q", out)
	}
	if out := shell("wslinfo -n --networking-mode"); out != "nat" && out != "none" {
		t.Errorf("networking mode %q", out)
	}
	h.Want(h.Run("-d", "small", "-e", "wslpath", "-w", "/etc"), 1, "wslpath: /etc: Invalid argument")
	// The shares' table is the contract with whoever mounts them.
	shell(`printf '/home/me\t/srv\n' >/run/wsl2/shares`)
	if out := shell("cd /srv && touch f && wslpath -w /srv/f; wslpath -u /home/me/x/; wslpath -aw f; wslpath f"); out != "/home/me/f\n/srv/x/\n/home/me/f\nf\n" {
		t.Errorf("wslpath: %q", out)
	}
	// A file of the user's is never replaced.
	shell("rm /bin/wslpath; echo mine >/bin/wslpath; sync")
	h.OK("--shutdown")
	if out := shell("cat /bin/wslpath"); out != "mine\n" {
		t.Errorf("/bin/wslpath holds %q", out)
	}
}

// TestHostPrograms runs programs of the host from the guest.
func TestHostPrograms(t *testing.T) {
	h := newHost(t)
	shell := func(script string) testsys.Result {
		t.Helper()
		return h.Run("-d", "small", "-e", "sh", "-c", script)
	}
	marker := h.File("of the host", []byte("host file\n"))
	ctx, cancel := context.WithTimeout(context.Background(), testsys.Deadline)
	defer cancel()
	for _, c := range []struct {
		name, script   string
		status         int
		stdout, stderr string
	}{
		{"output", fmt.Sprintf("host-exec cat '%s'", marker), 0, "host file\n", ""},
		{"status and stderr", `host-exec sh -c 'echo err >&2; exit 9'`, 9, "", "err\n"},
		{"a signal", `host-exec sh -c 'kill -9 $$'; exit $?`, 137, "", ""},
		{"stdin to its end", "seq 1 50000 | host-exec tail -n 1", 0, "50000\n", ""},
		{"in a pipeline", "echo abc | host-exec tr a-z A-Z | cat", 0, "ABC\n", ""},
		{"/dev/null", "host-exec cat </dev/null; echo $?", 0, "0\n", ""},
		{"closed streams", "host-exec sh -c 'echo lost; exit 4' <&- >&- 2>&-; echo $?", 0, "4\n", ""},
		{"arguments", `host-exec printf '[%s]' a '' 'b c' '*' "it's"`, 0, "[a][][b c][*][it's]", ""},
		{"not found", "host-exec nosuchprogram; echo $?", 0, "127\n", "nosuchprogram"},
		{"not executable", "host-exec /etc/passwd; echo $?", 0, "126\n", "permission denied"},
		{"a link", "ln -sf /init /tmp/expr && /tmp/expr 6 '*' 7", 0, "42\n", ""},
		{"as a user", "su alice -c 'host-exec echo fine'", 0, "fine\n", ""},
		{"WSLENV", `export A=1 B=2 WSLENV=A/w:B/u; host-exec sh -c 'echo "$A,$B,$WSL_DISTRO_NAME"'`, 0, "1,,\n", ""},
		{"foreign", "printf 'MZ etc' >/tmp/x.exe; chmod +x /tmp/x.exe; /tmp/x.exe; echo $?", 0, "126\n", "only the host can run"},
		{"wsl2 itself", "wsl2 -d small -e echo nested", 0, "nested\n", ""},
		{"many at once", `for i in $(seq 20); do host-exec echo line & done | wc -l; wait`, 0, "20\n", ""},
	} {
		t.Run(c.name, func(t *testing.T) {
			h.TB = t
			r := shell(c.script)
			h.Want(r, c.status, c.stderr)
			if r.Stdout != c.stdout {
				t.Fatalf("want %q: %v", c.stdout, r)
			}
		})
	}
	h.TB = t

	t.Run("a child of the calling wsl2", func(t *testing.T) {
		l := h.Start("-d", "small", "-e", "host-exec", "sh", "-c", "echo $PPID; cat")
		line := make([]byte, 0, 16)
		for !strings.HasSuffix(string(line), "\n") {
			b := make([]byte, 1)
			_, err := l.Stdout.Read(b)
			testsys.Must(t, err)
			line = append(line, b...)
		}
		if got := strings.TrimSpace(string(line)); got != fmt.Sprint(l.Cmd.Process.Pid) {
			t.Errorf("its parent is %s, want %d", got, l.Cmd.Process.Pid)
		}
		l.Stdin.Close()
		h.Want(l.Wait(), 0)
	})

	t.Run("signals", func(t *testing.T) {
		l := h.Start("-d", "small", "-e", "host-exec", "sh", "-c", `trap 'echo term; kill -9 $!; exit 6' TERM; sleep 1000 & echo ready; while :; do wait $!; done`)
		l.Expect("ready\n")
		testsys.Must(t, l.Cmd.Process.Signal(unix.SIGTERM))
		if r := l.Wait(); r.Status != 6 || r.Stdout != "term\n" {
			t.Fatal(r)
		}
	})

	t.Run("terminal", func(t *testing.T) {
		x := openTerminal(t, h.Cmd(ctx, "-d", "small"))
		x.expect("# ")
		x.send("host-exec sh -c 'test -t 0 && test -t 1 && stty size; echo $TERM; read line; echo got $line; exec cat'\r")
		x.expect("40 100\r\nxterm\r\n")
		x.send("typed\r")
		x.expect("got typed\r\n")
		x.send("again\r") // a shell that is about to execute cat would miss the interrupt
		x.expect("again\r\nagain\r\n")
		testsys.Must(t, pty.Setsize(x.pty, &pty.Winsize{Rows: 20, Cols: 50}))
		x.send("\x03")
		x.expect("# ")
		x.send("echo status $?; host-exec stty size; stty -a | grep -c ' icanon'\r")
		x.expect("status 130\r\n20 50\r\n1\r\n") // the guest's terminal is as it was
		x.send("exit 5\r")
		if status := x.wait(); status != 5 {
			t.Errorf("status %d", status)
		}
	})

	t.Run("the host's handler of a foreign program", func(t *testing.T) {
		h.TB = t
		program, formats := h.Path("home/x.exe"), h.Path("formats")
		testsys.Must(t, os.WriteFile(program, []byte("MZ etc"), 0o755))
		// It is the host's kernel that is asked, and says so as long as it has no handler.
		h.Want(h.Run("-d", "small", "-e", "/mnt/host/x.exe"), 126, "exec format error")
		if !ownFormats(t) {
			t.Log("before Linux 6.7 a handler holds for all of the host: none is registered")
			return
		}
		testsys.Must(t, os.Mkdir(formats, 0o755))
		r := h.Shell(`exec unshare --user --map-root-user --mount sh -ec 'mount -t binfmt_misc none "$0"; echo :host:M::MZ::/bin/echo: >"$0/register"; exec "$@"' `+formats+` "$0" "$@"`,
			"-d", "small", "-e", "/mnt/host/x.exe", "a", "", "b c")
		h.Want(r, 0)
		if want := program + " a  b c\n"; r.Stdout != want {
			t.Errorf("want %q: %v", want, r)
		}
	})

	t.Run("after the client has gone", func(t *testing.T) {
		sent := h.Path("sent")
		testsys.WaitCreated(t, filepath.Dir(sent), "sent", func() {
			h.Want(shell(fmt.Sprintf(`(while [ -e /proc/$PPID/fd/0 ] && ! [ -e /run/go ]; do :; done; host-exec sh -c 'echo $PPID >%s.tmp; mv %s.tmp %s') </dev/null >/dev/null 2>&1 &`, sent, sent, sent)), 0)
			h.Want(shell("touch /run/go"), 0)
		})
		text, err := os.ReadFile(sent)
		testsys.Must(t, err)
		if got, want := strings.TrimSpace(string(text)), fmt.Sprint(h.Process("service").PID); got != want {
			t.Errorf("its parent is %s, want the service, %s", got, want)
		}
	})

	t.Run("only what the host allows", func(t *testing.T) {
		h.TB = t
		h.Config("[interop]", "hostPrograms=echo")
		h.Want(shell("LD_PRELOAD=/x WSLENV=LD_PRELOAD host-exec echo fine"), 0)
		h.Want(shell("host-exec id"), 126, "hostPrograms")
		h.Want(shell("host-exec /bin/echo no"), 126, "hostPrograms")
		h.Config("[interop]", "enabled=false")
		h.Want(shell("host-exec echo no"), 126, "not allowed")
		h.Config()
		h.Want(shell("host-exec id -u"), 0)
	})

	t.Run("turned off in the distro", func(t *testing.T) {
		h.TB = t
		h.Want(shell("printf '[interop]\\nenabled=false\\n' >/etc/wsl.conf; sync"), 0)
		h.OK("--terminate", "small")
		r := shell("echo $WSL_INTEROP; host-exec true; exit $?")
		h.Want(r, 125, "turned off")
		if r.Stdout != "\n" {
			t.Error(r)
		}
	})
	h.TB = t
}

// ownFormats tells whether a user namespace has binfmt_misc formats of its own.
func ownFormats(t *testing.T) bool {
	t.Helper()
	var u unix.Utsname
	testsys.Must(t, unix.Uname(&u))
	var major, minor int
	_, err := fmt.Sscanf(unix.ByteSliceToString(u.Release[:]), "%d.%d", &major, &minor)
	testsys.Must(t, err)
	return major > 6 || major == 6 && minor >= 7
}

// TestAgent uses the host's SSH agent, and its browser, from the guest.
func TestAgent(t *testing.T) {
	h := newHost(t)
	key, agent := h.Path("key"), h.Path("agent")
	sh := func(script string) string {
		t.Helper()
		cmd := exec.Command("sh", "-ec", script)
		cmd.Env = append(h.Env, "SSH_AUTH_SOCK="+agent)
		out, err := cmd.CombinedOutput()
		if err != nil {
			t.Fatalf("%s: %v: %s", script, err, out)
		}
		return string(out)
	}
	sh("ssh-keygen -q -t ed25519 -N '' -C mine -f " + key)
	daemon := exec.Command("ssh-agent", "-D", "-a", agent)
	daemon.Env = h.Env
	testsys.WaitCreated(t, h.Dir, "agent", func() { testsys.Must(t, daemon.Start()) })
	defer func() {
		daemon.Process.Kill()
		daemon.Wait()
		os.Remove(agent)
	}()
	sh("ssh-add -q " + key)
	want := sh("ssh-add -L")

	h.Setenv("SSH_AUTH_SOCK", agent)
	// The small distro has no ssh-add: it gets the host's, with its libraries.
	r := h.Shell(`f=$(command -v ssh-add); tar -chf - $f $(ldd $f | grep -o '/[^ ]*') | "$0" "$@"`, "-d", "small", "-e", "tar", "-xf", "-", "-C", "/")
	h.Want(r, 0)
	if got := h.OK("-d", "small", "-e", "ssh-add", "-L"); got != want {
		t.Errorf("ssh-add -L: %q, want %q", got, want)
	}
	if got := h.OK("-d", "small", "-u", "alice", "-e", "ssh-add", "-L"); got != want {
		t.Errorf("ssh-add -L of alice: %q, want %q", got, want)
	}
	// The keys of root's session are not alice's to use.
	// (It is told so, or killed by SIGPIPE, as the connection is closed on it.)
	if r := h.Run("-d", "small", "-e", "sh", "-c", `su alice -c "SSH_AUTH_SOCK=$SSH_AUTH_SOCK ssh-add -L"`); r.Status == 0 || r.Stdout != "" {
		t.Errorf("alice used root's agent: %v", r)
	}
	h.Config("[interop]", "sshAgent=false")
	h.Want(h.Run("-d", "small", "-e", "ssh-add", "-L"), 1, "agent")
	h.Config()

	// A page is opened by the host's xdg-open.
	bin := h.Path("bin")
	testsys.Must(t, os.Mkdir(bin, 0o755))
	testsys.Must(t, os.WriteFile(bin+"/xdg-open", []byte("#!/bin/sh\necho opened $1\n"), 0o755))
	h.Setenv("PATH", bin+":"+os.Getenv("PATH"))
	for _, opener := range []string{"xdg-open", "$BROWSER"} {
		if got := h.OK("-d", "small", "-e", "sh", "-c", opener+" https://example.org/?a=1"); got != "opened https://example.org/?a=1\n" {
			t.Errorf("%s: %q", opener, got)
		}
	}
}
