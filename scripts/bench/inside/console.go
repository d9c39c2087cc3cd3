package main

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/creack/pty"
	"golang.org/x/sys/unix"

	"github.com/wsl2/wsl2/internal/testsys/waits"
	"github.com/wsl2/wsl2/scripts/bench/report"
)

const (
	peerTerminal = "terminal of this host"
	peerSSH      = "ssh to this host (dropbear)"

	keystrokes = 50
	bigFile    = 100 << 20 // scaled
	// patience is how long one of these measurements may take, in the rig's time.
	patience = 20 * time.Second
	idleFor  = 5 * time.Second
	// settle is when Go's runtime has given back the memory of the last command.
	settle = 40 * time.Second
)

// terminals are the ways to run a program of busybox on a terminal: in a distro, and
// beside it.
type terminals map[string]func(argv ...string) *exec.Cmd

// console measures what a person at a terminal notices, and what a session costs that
// nobody uses.
func console(h *host) ([]report.Row, error) {
	vm, err := h.ours()
	if err != nil {
		return nil, err
	}
	ssh, err := h.startSSH()
	if err != nil {
		return nil, err
	}
	defer ssh.stop()
	ways := terminals{
		"wsl2": func(argv ...string) *exec.Cmd { return h.wsl2(append([]string{"-d", distroName, "-e"}, argv...)...) },
		peerTerminal: func(argv ...string) *exec.Cmd {
			c := exec.Command(busyboxPath, argv...)
			c.Env = h.env
			return c
		},
		peerSSH: func(argv ...string) *exec.Cmd {
			return ssh.command(append([]string{"-tt"}, append([]string{busyboxPath}, quoted(argv)...)...)...)
		},
	}
	var rows []report.Row
	measure := func(row, unit string, bar *report.Bar, f func(start func(argv ...string) *exec.Cmd) (float64, error)) error {
		r := report.Row{Row: row, Unit: unit, Bar: bar, Peers: map[string]float64{}}
		for name, start := range ways {
			logf("%s: %s", row, name)
			v, err := f(start)
			if err != nil {
				return fmt.Errorf("%s, %s: %w", row, name, err)
			}
			if name == "wsl2" {
				r.Ours = v
			} else {
				r.Peers[name] = v
			}
		}
		rows = append(rows, r)
		return nil
	}
	if err := measure("echo of a keystroke, p50", "µs", nil, echo); err != nil {
		return nil, err
	}
	if err := measure("Ctrl-C under flood until the next output", "ms", &report.Bar{Factor: 50}, interrupt); err != nil {
		return nil, err
	}
	if err := measure("resize of the terminal until the program's next output", "ms", &report.Bar{Factor: 20}, resize); err != nil {
		return nil, err
	}
	make := "yes 0123456789012345678901234567890123456789012345678901234567890 | head -c " + strconv.Itoa(scaled(bigFile)) + " >/tmp/big"
	for _, c := range []*exec.Cmd{ways["wsl2"]("sh", "-c", make), ways[peerTerminal]("sh", "-c", make)} {
		if out, err := c.CombinedOutput(); err != nil {
			return nil, fmt.Errorf("make a file to show: %w: %s", err, out)
		}
	}
	if err := measure("cat of a large file to the terminal", "MB/s", &report.Bar{Peer: peerTerminal, Factor: 0.5, AtLeast: true}, show); err != nil {
		return nil, err
	}
	command, err := h.overhead(ssh)
	if err != nil {
		return nil, err
	}
	idle, err := h.idle(vm)
	if err != nil {
		return nil, err
	}
	return append(append(rows, command), idle...), vm.stop()
}

// quoted makes the words of a line of a shell of words.
func quoted(argv []string) (words []string) {
	for _, a := range argv {
		words = append(words, "'"+strings.ReplaceAll(a, "'", `'\''`)+"'")
	}
	return words
}

// screen is the terminal that a program runs on.
type screen struct {
	*os.File
	cmd      *exec.Cmd
	watchdog *time.Timer
}

func onScreen(c *exec.Cmd) (*screen, error) {
	f, err := pty.StartWithSize(c, &pty.Winsize{Rows: 24, Cols: 80})
	if err != nil {
		return nil, err
	}
	return &screen{f, c, time.AfterFunc(patience, func() { c.Process.Kill() })}, nil
}

// until reads up to and including the text, and returns how many bytes that were.
func (s *screen) until(text string) (n int, err error) {
	b := make([]byte, 64<<10)
	var tail []byte
	for {
		got, err := s.Read(b)
		n += got
		tail = append(tail, b[:got]...)
		if bytes.Contains(tail, []byte(text)) {
			return n, nil
		}
		tail = append(tail[:0], tail[max(0, len(tail)-len(text)):]...)
		if err != nil {
			return n, fmt.Errorf("%q has not come: %w", text, err)
		}
	}
}

// close ends what still runs there.
func (s *screen) close() error {
	s.cmd.Process.Signal(unix.SIGHUP)
	io.Copy(io.Discard, s) //nolint:errcheck // EIO: nobody has it open any more
	s.cmd.Wait()           //nolint:errcheck // SIGHUP
	if !s.watchdog.Stop() {
		return fmt.Errorf("a program on a terminal took more than %v of the rig's time", patience)
	}
	return s.Close()
}

// echo is the time from a key to its echo by the terminal that the program has.
func echo(start func(argv ...string) *exec.Cmd) (float64, error) {
	s, err := onScreen(start("sh", "-c", "echo READY; exec cat"))
	if err != nil {
		return 0, err
	}
	if _, err := s.until("READY"); err != nil {
		return 0, errors.Join(err, s.close())
	}
	var µs []float64
	for i := range keystrokes {
		key := string(rune('a' + i%26))
		began := time.Now()
		s.WriteString(key)
		if _, err := s.until(key); err != nil {
			return 0, errors.Join(err, s.close())
		}
		µs = append(µs, time.Since(began).Seconds()*1e6)
	}
	return percentile(µs[5:], 0.5), s.close()
}

// interrupt is the time from Ctrl-C, while `yes` floods the terminal, to the output of
// what runs next.
func interrupt(start func(argv ...string) *exec.Cmd) (float64, error) {
	s, err := onScreen(start("sh", "-c", "trap : INT; yes; echo NEXT"))
	if err != nil {
		return 0, err
	}
	b := make([]byte, 64<<10)
	for flood := 0; flood < 1<<20; {
		n, err := s.Read(b)
		if err != nil {
			return 0, errors.Join(err, s.close())
		}
		flood += n
	}
	began := time.Now()
	s.WriteString("\x03")
	if _, err := s.until("NEXT"); err != nil {
		return 0, errors.Join(err, s.close())
	}
	return time.Since(began).Seconds() * 1e3, s.close()
}

// resize is the time from a new size of the terminal to the output of a program that
// waits for it.
func resize(start func(argv ...string) *exec.Cmd) (float64, error) {
	s, err := onScreen(start("sh", "-c", "trap 'echo NEXT; kill $!; exit' WINCH; sleep 1000 & echo READY; wait"))
	if err != nil {
		return 0, err
	}
	if _, err := s.until("READY"); err != nil {
		return 0, errors.Join(err, s.close())
	}
	began := time.Now()
	if err := pty.Setsize(s.File, &pty.Winsize{Rows: 30, Cols: 100}); err != nil {
		return 0, errors.Join(err, s.close())
	}
	if _, err := s.until("NEXT"); err != nil {
		return 0, errors.Join(err, s.close())
	}
	return time.Since(began).Seconds() * 1e3, s.close()
}

// show is the rate of a large file through the terminal.
func show(start func(argv ...string) *exec.Cmd) (float64, error) {
	s, err := onScreen(start("sh", "-c", "cat /tmp/big; echo NEXT"))
	if err != nil {
		return 0, err
	}
	b := make([]byte, 1)
	if _, err := s.Read(b); err != nil {
		return 0, errors.Join(err, s.close())
	}
	began := time.Now()
	n, err := s.until("NEXT")
	if err != nil {
		return 0, errors.Join(err, s.close())
	}
	took := time.Since(began).Seconds()
	if n < scaled(bigFile) {
		return 0, errors.Join(fmt.Errorf("%d bytes came, not %d", n, scaled(bigFile)), s.close())
	}
	return float64(n) / took / 1e6, s.close()
}

// overhead is a warm command beside the same by ssh.
func (h *host) overhead(ssh *sshServer) (report.Row, error) {
	ours, err := repeat(func() error { return supervise(h.wsl2("-d", distroName, "--", "true")) })
	if err != nil {
		return report.Row{}, err
	}
	peer, err := repeat(func() error { return supervise(ssh.command(busyboxPath, "true")) })
	return report.Row{Row: "warm command, p50", Unit: "ms", Ours: percentile(ours, 0.5), Peers: map[string]float64{peerSSH: percentile(peer, 0.5)}}, err
}

// idle counts how often threads of ours are woken while a program on a terminal waits. The
// vCPU's thread and the guest's kernel are not counted: guests in the rig keep their tick.
func (h *host) idle(vm *running) ([]report.Row, error) {
	// The program counts for itself, in files: a look from outside would be a session of its own.
	const count = "pid=1; " + waits.Script + " >/tmp/%s; "
	// Its word comes late: that one must not be what wakes the client in those 5 s.
	script := fmt.Sprintf("echo READY; sleep %d; "+count+"sleep %d; "+count+"sleep 1; echo NEXT; exec cat", int(settle.Seconds()), "before", int(idleFor.Seconds()), "after")
	s, err := onScreen(h.wsl2("-d", distroName, "-e", "sh", "-c", script))
	if err != nil {
		return nil, err
	}
	defer s.close()
	s.watchdog.Reset(settle + idleFor + patience)
	if _, err := s.until("READY"); err != nil {
		return nil, err
	}
	host := func() (all []waits.Thread, err error) {
		for _, pid := range append(processes("service"), s.cmd.Process.Pid) {
			threads, terr := waits.Threads(pid)
			all, err = append(all, threads...), errors.Join(err, terr)
		}
		return all, err
	}
	time.Sleep(settle)
	before, err := host()
	if err != nil {
		return nil, err
	}
	time.Sleep(idleFor)
	after, err := host()
	if err != nil {
		return nil, err
	}
	if _, err := s.until("NEXT"); err != nil {
		return nil, err
	}
	var guest [2][]waits.Thread
	for i, name := range []string{"before", "after"} {
		text, err := vm.output("cat", "/tmp/"+name)
		if err != nil {
			return nil, err
		}
		guest[i] = waits.Parse(text)
	}
	ours, err := wakeups(before, after, 2)
	if err != nil {
		return nil, err
	}
	init, err := wakeups(guest[0], guest[1], 1)
	return []report.Row{
		{Row: "idle session: wake-ups of client and service in 5 s", Unit: "", Ours: ours, Bar: &report.Bar{}},
		{Row: "idle session: wake-ups of the distro's init in 5 s", Unit: "", Ours: init, Bar: &report.Bar{}},
	}, err
}

// wakeups counts how often threads of so many processes were woken, but for Go's own monitor
// of each: that is every minute, in any Go program, and so in some runs and not in others.
func wakeups(before, after []waits.Thread, processes int) (n float64, err error) {
	was, monitors := map[int]int{}, map[int]bool{}
	for _, t := range before {
		was[t.TID] = t.Wakeups
		if t.Monitor() {
			monitors[t.TID] = true
		}
	}
	if len(monitors) != processes {
		return 0, fmt.Errorf("%d of %d threads of %d processes are Go's monitor: %+v", len(monitors), len(before), processes, before)
	}
	for _, t := range after {
		if woken := t.Wakeups - was[t.TID]; woken > 0 && !monitors[t.TID] {
			logf("woken %d times: %+v", woken, t)
			n += float64(woken)
		}
	}
	return n, nil
}

// sshServer is a dropbear of this host, for root.
type sshServer struct {
	cmd    *exec.Cmd
	client []string // the command line of ssh so far
	env    []string
}

const sshPort = "2222"

// startSSH starts a server on loopback with keys of its own.
func (h *host) startSSH() (*sshServer, error) {
	dir := filepath.Join(h.dir, "ssh")
	key := filepath.Join(dir, "key")
	for _, d := range []string{dir, "/root/.ssh"} {
		if err := os.MkdirAll(d, 0o700); err != nil {
			return nil, err
		}
	}
	for name, text := range map[string]string{"passwd": "root:x:0:0:root:/root:/bin/sh\n", "group": "root:x:0:\n", "shells": "/bin/sh\n"} {
		if err := os.WriteFile("/etc/"+name, []byte(text), 0o644); err != nil {
			return nil, err
		}
	}
	if err := os.MkdirAll("/bin", 0o755); err != nil {
		return nil, err
	}
	if err := os.Symlink(busyboxPath, "/bin/sh"); err != nil && !errors.Is(err, os.ErrExist) {
		return nil, err
	}
	for _, argv := range [][]string{
		{busyboxPath, "ifconfig", "lo", "127.0.0.1", "up"},
		{"/rig/bin/dropbearkey", "-t", "ed25519", "-f", filepath.Join(dir, "host")},
		{"/rig/bin/ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", key},
		{busyboxPath, "cp", key + ".pub", "/root/.ssh/authorized_keys"},
	} {
		if out, err := exec.Command(argv[0], argv[1:]...).CombinedOutput(); err != nil {
			return nil, fmt.Errorf("%s: %w: %s", argv[0], err, out)
		}
	}
	s := &sshServer{env: h.env, client: []string{"-F", "/dev/null", "-q", "-i", key, "-p", sshPort, "-o", "StrictHostKeyChecking=no", "-o", "UserKnownHostsFile=/dev/null", "root@127.0.0.1"}}
	s.cmd = exec.Command("/rig/bin/dropbear", "-F", "-E", "-s", "-r", filepath.Join(dir, "host"), "-p", "127.0.0.1:"+sshPort)
	log, err := s.cmd.StderrPipe()
	if err != nil {
		return nil, err
	}
	if err := s.cmd.Start(); err != nil {
		return nil, err
	}
	if err := firstLine(log); err != nil { // "Not backgrounding": it listens
		s.stop()
		return nil, fmt.Errorf("dropbear: %w", err)
	}
	go io.Copy(io.Discard, log) //nolint:errcheck // its end
	if out, err := s.command(busyboxPath, "true").CombinedOutput(); err != nil {
		s.stop()
		return nil, fmt.Errorf("ssh to this host: %w: %s", err, out)
	}
	return s, nil
}

// command runs a command by ssh.
func (s *sshServer) command(args ...string) *exec.Cmd {
	options, words := []string{}, args
	for len(words) > 0 && strings.HasPrefix(words[0], "-") {
		options, words = append(options, words[0]), words[1:]
	}
	c := exec.Command("/rig/bin/ssh", append(append(options, s.client...), words...)...)
	c.Env = s.env
	return c
}

func (s *sshServer) stop() {
	s.cmd.Process.Kill()
	s.cmd.Wait() //nolint:errcheck // killed
}
