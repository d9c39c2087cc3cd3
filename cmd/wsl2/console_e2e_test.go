//go:build e2e

package main_test

import (
	"bytes"
	"context"
	"crypto/sha256"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"

	"github.com/creack/pty"
	"golang.org/x/sys/unix"

	"github.com/wsl2/wsl2/internal/testsys"
)

// Kinds of standard streams.
var streamKinds = []string{"tty", "pipe", "file", "closed"}

// TestStreamMatrix runs one program with each of the 64 combinations of standard
// streams. What it reads and writes must arrive byte for byte, on a terminal with
// the line ends that a terminal makes.
func TestStreamMatrix(t *testing.T) {
	h := newHost(t)
	h.OK("-d", "small", "-e", "true")
	for _, in := range streamKinds {
		for _, out := range streamKinds {
			for _, err := range streamKinds {
				t.Run(in+","+out+","+err, func(t *testing.T) {
					h.TB = t
					streamCase(h, in, out, err)
				})
			}
		}
	}
	h.TB = t
}

func streamCase(h *testsys.Host, in, out, err string) {
	t := h.TB
	t.Helper()
	payload := bytes.Repeat(testsys.PatternBytes(t, 777), 97) // longer than a pipe's buffer
	if out == "tty" {
		payload = append(testsys.PatternBytes(t, 300), "\n\x00\t\xff\r\nlast\n"...)
	}
	script := `cat; printf 'err\n' >&2; exit 7`
	if in == "tty" {
		script = `echo ready >/dev/tty; ` + script
		payload = []byte("typed line\n")
	}
	master, tty, perr := pty.Open()
	testsys.Must(t, perr)
	defer master.Close()

	ctx, cancel := context.WithTimeout(context.Background(), testsys.Deadline)
	defer cancel()
	wsl := h.Cmd(ctx, "-d", "small", "-e", "sh", "-c", script)
	redirect := ""
	for i, kind := range []string{in, out, err} {
		if kind == "closed" {
			redirect += fmt.Sprintf(" %d>&-", i)
		}
	}
	cmd := exec.CommandContext(ctx, "sh", append([]string{"-c", `exec "$0" "$@"` + redirect}, wsl.Args...)...)
	cmd.Env, cmd.Dir, cmd.WaitDelay = wsl.Env, wsl.Dir, wsl.WaitDelay

	switch in {
	case "tty":
		cmd.Stdin = tty
	case "pipe":
		cmd.Stdin = bytes.NewReader(payload)
	case "file":
		f, ferr := os.Open(h.File("stdin", payload))
		testsys.Must(t, ferr)
		defer f.Close()
		cmd.Stdin = f
	}
	var piped [3]bytes.Buffer
	var files [3]string
	for i, x := range []struct {
		kind string
		to   *io.Writer
	}{1: {out, &cmd.Stdout}, 2: {err, &cmd.Stderr}} {
		switch x.kind {
		case "tty":
			*x.to = tty
		case "pipe":
			*x.to = &piped[i]
		case "file":
			f, ferr := os.Create(h.Path(fmt.Sprintf("stream%d", i)))
			testsys.Must(t, ferr)
			defer f.Close()
			files[i] = f.Name()
			*x.to = f
		}
	}
	for fd, kind := range []string{in, out, err} {
		if kind == "tty" {
			cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true, Setctty: true, Ctty: fd}
			break
		}
	}
	testsys.Must(t, cmd.Start())
	tty.Close()
	screen := make(chan string, 1)
	go func() {
		var all bytes.Buffer
		b := make([]byte, 4096)
		typed := in != "tty"
		for {
			n, rerr := master.Read(b)
			all.Write(b[:n])
			if !typed && bytes.Contains(all.Bytes(), []byte("ready\r\n")) {
				typed = true
				io.WriteString(master, "typed line\n\x04")
			}
			if rerr != nil { // EIO: nobody holds the terminal any more
				screen <- all.String()
				return
			}
		}
	}()
	cmd.Wait()
	if status := cmd.ProcessState.ExitCode(); status != 7 {
		t.Fatalf("status %d; stderr %q", status, piped[2].String())
	}
	wantScreen, wantOut := "", string(payload)
	if in == "closed" {
		wantOut = ""
	}
	if in == "tty" {
		wantScreen = "ready\r\ntyped line\r\n"
	}
	lines := func(s string) string { return strings.ReplaceAll(s, "\n", "\r\n") }
	if out == "tty" {
		wantScreen += lines(wantOut)
	}
	if err == "tty" {
		wantScreen += "err\r\n"
	}
	if got := <-screen; got != wantScreen {
		t.Errorf("the terminal shows %q, want %q", got, wantScreen)
	}
	got := func(i int, kind string) string {
		if kind == "file" {
			text, ferr := os.ReadFile(files[i])
			testsys.Must(t, ferr)
			return string(text)
		}
		return piped[i].String()
	}
	if out == "pipe" || out == "file" {
		if got := got(1, out); got != wantOut {
			t.Errorf("stdout: %d bytes, want %d; they differ", len(got), len(wantOut))
		}
	}
	if err == "pipe" || err == "file" {
		if got := got(2, err); got != "err\n" {
			t.Errorf("stderr: %q", got)
		}
	}
}

// TestFloods: 100 MB go through a program and come back the same while it floods
// its stderr.
func TestFloods(t *testing.T) {
	h := newHost(t)
	n := int64(count(100 << 20))
	ctx, cancel := context.WithTimeout(context.Background(), testsys.Deadline)
	defer cancel()
	cmd := h.Cmd(ctx, "-d", "small", "-e", "sh", "-c", `yes flood >&2 & cat; kill $!`)
	sent, came := sha256.New(), sha256.New()
	cmd.Stdin = io.TeeReader(io.LimitReader(testsys.Pattern(n), n), sent)
	cmd.Stdout = came
	var flood counter
	cmd.Stderr = &flood
	testsys.Must(t, cmd.Run())
	if !bytes.Equal(sent.Sum(nil), came.Sum(nil)) {
		t.Errorf("stdout differs from stdin")
	}
	if flood == 0 {
		t.Error("stderr was not flooded")
	}
}

type counter int64

func (c *counter) Write(p []byte) (int, error) { *c += counter(len(p)); return len(p), nil }

// TestShortCommands runs 10,000 commands, a few at a time: each has exactly its
// output and status.
func TestShortCommands(t *testing.T) {
	h := newHost(t)
	h.OK("-d", "small", "-e", "true")
	const workers = 4
	next := make(chan int)
	var wg sync.WaitGroup
	for range workers {
		wg.Go(func() {
			for i := range next {
				ctx, cancel := context.WithTimeout(context.Background(), testsys.Deadline)
				cmd := h.Cmd(ctx, "-d", "small", "-e", "sh", "-c", `read a; echo "out $a"; echo "err $a" >&2; exit $((a % 256))`)
				var out, err bytes.Buffer
				cmd.Stdin, cmd.Stdout, cmd.Stderr = strings.NewReader(fmt.Sprintln(i)), &out, &err
				cmd.Run()
				cancel()
				if st := cmd.ProcessState.ExitCode(); st != i%256 || out.String() != fmt.Sprintf("out %d\n", i) || err.String() != fmt.Sprintf("err %d\n", i) {
					t.Errorf("command %d: status %d, stdout %q, stderr %q", i, st, out.String(), err.String())
				}
			}
		})
	}
	for i := range count(10_000) {
		next <- i
	}
	close(next)
	wg.Wait()
}

// TestPeerBugs are bugs of other launchers, as their users filed them.
func TestPeerBugs(t *testing.T) {
	h := newHost(t)
	ctx, cancel := context.WithTimeout(context.Background(), testsys.Deadline)
	defer cancel()
	onTTY := func(t *testing.T, script string, args ...string) *terminal {
		t.Helper()
		wsl := h.Cmd(ctx, args...)
		cmd := exec.CommandContext(ctx, "sh", append([]string{"-c", script}, wsl.Args...)...)
		cmd.Env, cmd.Dir = wsl.Env, wsl.Dir
		return openTerminal(t, cmd)
	}
	for _, c := range []struct {
		name string
		run  func(t *testing.T)
	}{
		{"virtme-ng 426, libkrun 131, muvm 123: no terminal at all", func(t *testing.T) {
			cmd := h.Cmd(ctx, "-d", "small", "-e", "sh", "-c", "echo $(tty); exit 5")
			cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
			r := h.Finish(ctx, cmd)
			if r.Status != 5 || r.Stdout != "not a tty\n" {
				t.Fatal(r)
			}
		}},
		{"virtme 33: stdin is /dev/null or closed", func(t *testing.T) {
			for _, redirect := range []string{"</dev/null", "<&-"} {
				r := h.Shell(`exec "$0" "$@" `+redirect, "-d", "small", "-e", "sh", "-c", "cat; echo foo")
				if r.Status != 0 || r.Stdout != "foo\n" {
					t.Fatal(r)
				}
			}
		}},
		{"virtme-ng 115, 368: stderr redirected from a terminal", func(t *testing.T) {
			x := onTTY(t, `"$0" "$@" 2>`+h.Path("log")+`; echo status $?`, "-d", "small", "-e", "sh", "-c", "echo out; echo err >&2; exit 3")
			x.expect("out\r\n")
			x.expect("status 3\r\n")
			if text, err := os.ReadFile(h.Path("log")); err != nil || string(text) != "err\n" {
				t.Fatalf("%q, %v", text, err)
			}
		}},
		{"virtme-ng 8: /dev/stdout can be opened", func(t *testing.T) {
			r := h.Run("-d", "small", "-u", "alice", "-e", "sh", "-c", "echo one >/dev/stdout; echo two >/dev/stderr; echo three >/proc/self/fd/1")
			if r.Status != 0 || r.Stdout != "one\nthree\n" || r.Stderr != "two\n" {
				t.Fatal(r)
			}
		}},
		{"libkrun 261: ends though its stdin is a pipe that stays open", func(t *testing.T) {
			r := h.Shell(`(echo hello; sleep 100000 & echo $! >`+h.Path("pid")+`; wait) | { "$0" "$@"; echo $?; kill $(cat `+h.Path("pid")+`); }`,
				"-d", "small", "-e", "head", "-n", "1")
			if r.Stdout != "hello\n0\n" {
				t.Fatal(r)
			}
		}},
		{"multipass 667, 2079: output beyond a pipe's buffer", func(t *testing.T) {
			for _, n := range []int{4096, 4097, 65536, 65537, 1 << 20} {
				r := h.Shell(`"$0" "$@" | wc -c`, "-d", "small", "-e", "sh", "-c", fmt.Sprintf("head -c %d /dev/zero | tr '\\0' a", n))
				if strings.TrimSpace(r.Stdout) != fmt.Sprint(n) {
					t.Fatal(r)
				}
			}
		}},
		{"apptainer 3294: a pipeline to a pager is not stopped", func(t *testing.T) {
			x := onTTY(t, `set -m; "$0" "$@" | cat; echo status $?`, "-d", "small", "-e", "seq", "3")
			x.expect("1\r\n2\r\n3\r\n")
			x.expect("status 0\r\n")
		}},
		{"crun 1623: a terminal that nobody reads keeps nobody else", func(t *testing.T) {
			x := onTTY(t, `"$0" "$@"`, "-d", "small", "-e", "yes")
			x.expect("y\r\n")
			h.OK("-d", "small", "-e", "true") // while nobody reads
			testsys.Must(t, x.cmd.Process.Signal(unix.SIGKILL))
			x.pty.Close()
			x.cmd.Wait()
			h.OK("-d", "small", "-e", "sh", "-c", "while pidof yes >/dev/null; do :; done")
		}},
		{"cloud-hypervisor 3092, 4522, muvm 119: resizing", func(t *testing.T) {
			x := onTTY(t, `"$0" "$@"`, "-d", "small", "-e", "sh", "-c", `trap 'stty size; exit' WINCH; echo ready; while :; do sleep 100000 & wait $!; done`)
			x.expect("ready\r\n")
			testsys.Must(t, pty.Setsize(x.pty, &pty.Winsize{Rows: 17, Cols: 71}))
			x.expect("17 71\r\n")
			h.OK("-d", "small", "-e", "sh", "-c", "killall sleep 2>/dev/null; :")
		}},
		{"cloud-hypervisor 510, 4248: the terminal after the VM or the service is killed", func(t *testing.T) {
			engine := "vm"
			if version1() {
				engine = "distro"
			}
			for _, role := range []string{engine, "service"} {
				x := onTTY(t, `stty -g; "$0" "$@"; echo status $?; stty -g; read end`, "-d", "small")
				x.expect("# ")
				vm := h.Process(engine)
				h.Process(role).Kill(t)
				x.expect("status 125\r\n")
				x.send("\r")
				x.wait()
				x.sameModes()
				vm.End(t)
			}
		}},
		{"runc 3368: SIGURG is the runtime's own", func(t *testing.T) {
			// Both may be pending at once, and a shell runs the traps by number: a third signal says the end.
			l := h.Start("-d", "small", "-e", "sh", "-c", `status=4; trap 'status=5' URG; trap 'echo usr1' USR1; trap 'exit $status' USR2; echo ready; while :; do sleep 100000 & wait $!; done`)
			l.Expect("ready\n")
			testsys.Must(t, l.Cmd.Process.Signal(unix.SIGURG))
			testsys.Must(t, l.Cmd.Process.Signal(unix.SIGUSR1))
			l.Expect("usr1\n")
			testsys.Must(t, l.Cmd.Process.Signal(unix.SIGUSR2))
			if r := l.Wait(); r.Status != 4 {
				t.Fatal(r)
			}
		}},
		{"a signal reaches every process of a pipeline", func(t *testing.T) {
			l := h.Start("-d", "small", "-e", "sh", "-c", `exec 3>&1; trap 'shell=too' TERM
				half() { trap "echo $1 >&3; exit" TERM; $2; while :; do sleep 100000 & wait $!; done; }
				ready() { read line; echo ready >&3; }
				half left 'echo ready' | half right ready
				echo shell $shell; exit 6`)
			l.Expect("ready\n")
			testsys.Must(t, l.Cmd.Process.Signal(unix.SIGTERM))
			r := l.Wait()
			for _, want := range []string{"left\n", "right\n", "shell too\n"} {
				if r.Status != 6 || !strings.Contains(r.Stdout, want) {
					t.Errorf("%v: no %q", r, want)
				}
			}
		}},
		{"virtme-ng 49: the terminal after timeout(1)", func(t *testing.T) {
			for _, option := range []string{"", "--foreground"} { // without it the program is in the background, and the modes stay
				pid := h.Path("timeout.pid")
				x := onTTY(t, `stty -g; sh -c 'echo $$ >`+pid+`; exec timeout `+option+` 100000 "$0" "$@"' "$0" "$@"; echo status $?; stty -g; read end`,
					"-d", "small", "-e", "sh", "-c", "echo READY; exec tail -f /dev/null")
				x.expect("READY\r\n")
				if raw := x.raw(); raw != (option != "") {
					t.Errorf("timeout %s: the terminal is raw: %t", option, raw)
				}
				text, err := os.ReadFile(pid)
				testsys.Must(t, err)
				n, err := strconv.Atoi(strings.TrimSpace(string(text)))
				testsys.Must(t, err)
				testsys.Must(t, unix.Kill(n, unix.SIGALRM)) // its time is over
				x.expect("status 124\r\n")
				x.send("\r")
				x.wait()
				x.sameModes()
			}
		}},
		{"timeout(1) ends the program", func(t *testing.T) {
			r := h.Shell(`timeout 1 "$0" "$@"; echo $?`, "-d", "small", "-e", "tail", "-f", "/dev/null")
			if r.Stdout != "124\n" {
				t.Fatal(r)
			}
			h.OK("-d", "small", "-e", "sh", "-c", "while pidof tail >/dev/null; do :; done")
		}},
		{"OpenShell 936: ^C under a flood, and the terminal stays usable", func(t *testing.T) {
			x := onTTY(t, `"$0" "$@"`, "-d", "small")
			x.expect("# ")
			x.send("yes\r")
			x.expect("y\r\ny\r\ny\r\n")
			x.send("\x03")
			x.expect("# ")
			x.send("echo status $?; exit 9\r")
			x.expect("status 130\r\n")
			if status := x.wait(); status != 9 {
				t.Fatalf("status %d", status)
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

// TestIdentity is who a program runs as and what it may use.
func TestIdentity(t *testing.T) {
	h := newHost(t)
	out := h.OK("-d", "small", "-u", "alice", "--", "id; umask; ulimit -n; ulimit -Hn; echo $HOME $LOGNAME; pwd; env | cut -d= -f1 | sort | tr '\\n' ' '")
	files := unix.Rlimit{Cur: 10240, Max: 1 << 20}
	if version1() { // not more than the host's
		var has unix.Rlimit
		testsys.Must(t, unix.Getrlimit(unix.RLIMIT_NOFILE, &has))
		files = unix.Rlimit{Cur: min(files.Cur, has.Max), Max: min(files.Max, has.Max)}
	}
	want := fmt.Sprintf("uid=1000(alice) gid=1000(alice) groups=50(staff),1000(alice)\n0022\n%d\n%d\n/home/alice alice\n/home/alice\n", files.Cur, files.Max)
	if !strings.HasPrefix(out, want) {
		t.Errorf("%q, want %q...", out, want)
	}
	h.Setenv("A", "1")
	h.Setenv("B", "two words")
	h.Setenv("WSLENV", "A/u:B:NOT/w:P/p")
	h.Setenv("NOT", "x")
	h.Setenv("P", "/host/path")
	if out := h.OK("-d", "small", "-e", "sh", "-c", `echo "$A,$B,$NOT,$P,$WSLENV"`); out != "1,two words,,,A/u:B:NOT/w:P/p\n" {
		t.Errorf("WSLENV: %q", out)
	}
	for dir, why := range map[string]string{".": "it is not shared", "./nosuch": "no such file", "/nosuch": "no such file"} {
		r := h.Run("-d", "small", "--cd", dir, "-e", "pwd")
		h.Want(r, 0, "cannot change to directory "+dir, why, "; started in ")
		if r.Stdout != "/root\n" {
			t.Error(r)
		}
	}
}

// TestTmux drives wsl2 in tmux, whose screen is what a user sees.
func TestTmux(t *testing.T) {
	h := newHost(t)
	h.OK("-d", "small", "-e", "true")
	sock := filepath.Join(t.TempDir(), "tmux")
	tmux := func(args ...string) string {
		t.Helper()
		cmd := exec.Command("tmux", append([]string{"-S", sock, "-f", "/dev/null"}, args...)...)
		cmd.Env = h.Env
		out, err := cmd.CombinedOutput()
		if err != nil {
			t.Fatalf("tmux %q: %v: %s", args, err, out)
		}
		return string(out)
	}
	tmux("new-session", "-d", "-x", "90", "-y", "30", h.Exe+" -d small; echo left $?; read end")
	defer tmux("kill-server")
	// Each step ends with a word that the guest computes, which tmux is told to wait for.
	await := func(keys string, done func(screen string) bool) {
		t.Helper()
		tmux("send-keys", "-l", keys)
		tmux("send-keys", "Enter")
		deadline, cancel := context.WithTimeout(context.Background(), testsys.Deadline)
		defer cancel()
		for deadline.Err() == nil {
			if done(tmux("capture-pane", "-p")) {
				return
			}
		}
		t.Fatalf("after %q:\n%s", keys, tmux("capture-pane", "-p"))
	}
	step := func(keys, until string) {
		t.Helper()
		await(keys, func(screen string) bool { return strings.Contains(screen, until) })
	}
	// At its prompt the shell asks where the cursor is: vi would take the answer for a key.
	prompted := func(keys, until string) {
		t.Helper()
		await(keys, func(screen string) bool {
			_, rest, found := strings.Cut(screen, until)
			return found && strings.Contains(rest, "#") // without the space: tmux leaves out those at ends
		})
	}
	step("stty size; echo a$((40+2))", "30 90\na42")
	tmux("resize-window", "-x", "70", "-y", "20")
	prompted(`until [ "$(stty size)" = "20 70" ]; do :; done; echo b$((40+2))`, "b42")
	// vi draws a full screen, takes keys and leaves the shell's lines as they were.
	step("printf 'alpha\\nbeta\\n' >/tmp/f; vi /tmp/f", "/tmp/f 1/2")
	step(":s/alpha/gamma/", "gamma")
	step(":wq", "# ")
	step("cat /tmp/f; echo c$((40+2))", "gamma\nbeta\nc42")
	step("exit 6", "left 6")
}

// TestGoTest is go test -exec: the test's program is the host's, its run the distro's.
func TestGoTest(t *testing.T) {
	h := newHost(t)
	dir := h.Path("module")
	testsys.Must(t, os.Mkdir(dir, 0o755))
	for name, text := range map[string]string{
		"go.mod": "module example.org/inside\n\ngo 1.26\n",
		"inside_test.go": `package inside

import (
	"os"
	"testing"
)

func TestInside(t *testing.T) {
	text, err := os.ReadFile("/etc/os-release")
	t.Logf("%s%v", text, err)
}

func TestFails(t *testing.T) { t.Error("as it should") }
`} {
		testsys.Must(t, os.WriteFile(filepath.Join(dir, name), []byte(text), 0o644))
	}
	goTest := func(args ...string) testsys.Result {
		t.Helper()
		ctx, cancel := context.WithTimeout(context.Background(), testsys.Deadline)
		defer cancel()
		cmd := exec.CommandContext(ctx, "go", append([]string{"test", "-vet=off", "-count=1", "-exec", h.Exe + " -d small"}, args...)...)
		cmd.Dir, cmd.Env = dir, append(os.Environ(), "CGO_ENABLED=0")
		for _, kv := range h.Env { // but for HOME, where Go's caches are
			if strings.HasPrefix(kv, "XDG_") && !strings.HasPrefix(kv, "XDG_CACHE") {
				cmd.Env = append(cmd.Env, kv)
			}
		}
		return h.Finish(ctx, cmd)
	}
	r := goTest("-v", "-run", "TestInside")
	h.Want(r, 0)
	if !strings.Contains(r.Stdout, "ID=small") || !strings.Contains(r.Stdout, "\nok ") {
		t.Error(r)
	}
	if r := goTest(); r.Status != 1 || !strings.Contains(r.Stdout, "as it should") {
		t.Error(r)
	}
	if out := h.OK("-d", "small", "-e", "ls", "/tmp"); strings.Contains(out, "go-build") {
		t.Errorf("left in the distro: %s", out)
	}
}
