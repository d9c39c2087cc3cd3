// Package testsys runs a built wsl2 as its users run it, for the rings of tests
// that need a machine (build tags e2e and kvm).
//
// A Host is one user's place on this machine: XDG directories of its own, hence
// a service, a VM and disks of its own. When its test ends it is shut down, and
// whatever is then left of it (a process, a socket, a mount) fails the test.
// Nothing here waits for time: every wait is for an event and has a deadline.
package testsys

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"
)

// Deadline bounds every wait. An emulated CPU on a busy machine is slow; what
// takes longer than this hangs. The full counts of `make soak` are ten times as much.
var Deadline = deadline()

func deadline() time.Duration {
	if os.Getenv("WSL2_SOAK") != "" {
		return 50 * time.Minute
	}
	return 5 * time.Minute
}

// Host is one user's wsl2. Its fields may be changed between commands.
type Host struct {
	TB  testing.TB
	Exe string // the wsl2 that is tested
	Dir string // everything of this host lies below; a short path, for sockets
	// Env is the environment of its commands, all of it.
	Env []string
	// Wrap is put in front of every command: setpriv, nsenter...
	Wrap []string

	// grace bounds the wait for processes that are on their way out.
	grace time.Duration
}

// New makes a host without distros and takes it down when the test ends.
func New(tb testing.TB) *Host {
	tb.Helper()
	dir, err := os.MkdirTemp("", "w2.")
	Must(tb, err)
	h := &Host{TB: tb, Exe: Exe(tb), Dir: dir, grace: 20 * time.Second}
	for _, d := range []string{h.Runtime(), h.Data(), h.State(), filepath.Dir(h.ConfigFile()), h.Path("home"), h.Path("cache")} {
		Must(tb, os.MkdirAll(d, 0o700))
	}
	h.Env = []string{
		"PATH=" + os.Getenv("PATH"), "HOME=" + h.Path("home"), "TERM=xterm", "LANG=C.UTF-8",
		"XDG_RUNTIME_DIR=" + h.Path("run"), "XDG_DATA_HOME=" + h.Path("data"),
		"XDG_STATE_HOME=" + h.Path("state"), "XDG_CONFIG_HOME=" + h.Path("config"), "XDG_CACHE_HOME=" + h.Path("cache"),
	}
	tb.Cleanup(h.close)
	return h
}

// Exe finds the wsl2 to test: $WSL2_EXE, or what make built, or (in the rig)
// beside the test binary.
func Exe(tb testing.TB) string {
	tb.Helper()
	candidates := []string{os.Getenv("WSL2_EXE"), filepath.Join(Root(), "out/wsl2")}
	if self, err := os.Executable(); err == nil {
		candidates = append(candidates, filepath.Join(filepath.Dir(self), "wsl2"))
	}
	for _, c := range candidates {
		if st, err := os.Stat(c); c != "" && err == nil && st.Mode().IsRegular() {
			abs, err := filepath.Abs(c)
			Must(tb, err)
			return abs
		}
	}
	tb.Fatalf("no wsl2 to test at any of %q; run: make build", candidates)
	return ""
}

// Root is the repository's root; go test runs a test in its package's directory.
func Root() string {
	dir, err := os.Getwd()
	for err == nil && dir != "/" {
		if _, err := os.Stat(filepath.Join(dir, "go.mod")); err == nil {
			return dir
		}
		dir = filepath.Dir(dir)
	}
	return "."
}

// Path is a path below the host's directory.
func (h *Host) Path(elem ...string) string { return filepath.Join(append([]string{h.Dir}, elem...)...) }

// Runtime, Data and State are wsl2's directories; ConfigFile is its wslconfig.
func (h *Host) Runtime() string    { return h.Path("run/wsl2") }
func (h *Host) Data() string       { return h.Path("data/wsl2") }
func (h *Host) State() string      { return h.Path("state/wsl2") }
func (h *Host) ConfigFile() string { return h.Path("config/wsl2/wslconfig") }

// Config writes the host's wslconfig.
func (h *Host) Config(lines ...string) {
	h.TB.Helper()
	Must(h.TB, os.WriteFile(h.ConfigFile(), []byte(strings.Join(lines, "\n")+"\n"), 0o644))
}

// Setenv sets a variable for the commands to come.
func (h *Host) Setenv(key, value string) {
	h.Env = append(slices.DeleteFunc(h.Env, func(e string) bool { return strings.HasPrefix(e, key+"=") }), key+"="+value)
}

// As makes the host another user's: commands run as uid and gid, without groups.
func (h *Host) As(uid int) {
	h.TB.Helper()
	Must(h.TB, filepath.WalkDir(h.Dir, func(path string, _ fs.DirEntry, err error) error {
		return errors.Join(err, os.Lchown(path, uid, uid))
	}))
	id := fmt.Sprint(uid)
	h.Wrap = append(h.Wrap, "setpriv", "--reuid", id, "--regid", id, "--clear-groups", "--")
}

// MountNamespace gives the host's commands a mount namespace of their own, in
// which the shell script setup (for example mounts, with $DIR the host's
// directory) has run. The namespace ends with the test.
func (h *Host) MountNamespace(setup string) {
	h.TB.Helper()
	holder := exec.Command("unshare", "--mount", "--propagation", "private", "sh", "-ec", setup+"\necho ready\nread end")
	holder.Env = append(os.Environ(), "DIR="+h.Dir)
	in, err := holder.StdinPipe()
	Must(h.TB, err)
	out, err := holder.StdoutPipe()
	Must(h.TB, err)
	var stderr bytes.Buffer
	holder.Stderr = &stderr
	Must(h.TB, holder.Start())
	line := make([]byte, len("ready\n"))
	if _, err := io.ReadFull(out, line); err != nil {
		holder.Wait()
		h.TB.Fatalf("mount namespace: %v: %s", err, stderr.String())
	}
	h.Wrap = append([]string{"nsenter", "--mount=/proc/" + fmt.Sprint(holder.Process.Pid) + "/ns/mnt", "--"}, h.Wrap...)
	// Added after New's cleanup, so it would run before it: the host has to be
	// shut down inside its namespace.
	h.TB.Cleanup(func() {
		h.close()
		in.Close()
		holder.Wait()
	})
}

// InNamespace runs a shell script where the host's commands run.
func (h *Host) InNamespace(script string) {
	h.TB.Helper()
	cmd := exec.Command("sh", "-ec", script)
	if i := slices.Index(h.Wrap, "--"); i >= 0 && h.Wrap[0] == "nsenter" {
		cmd = exec.Command(h.Wrap[0], append(slices.Clone(h.Wrap[1:i+1]), "sh", "-ec", script)...)
	}
	cmd.Env = append(os.Environ(), "DIR="+h.Dir)
	if out, err := cmd.CombinedOutput(); err != nil {
		h.TB.Fatalf("%s: %v: %s", script, err, out)
	}
}

// close shuts the host down and fails the test if anything of it is left.
func (h *Host) close() {
	if h.Dir == "" {
		return
	}
	h.TB.Helper()
	dir := h.Dir
	if len(h.Processes()) > 0 {
		if r := h.Run("--shutdown"); r.Status != 0 {
			h.TB.Errorf("%v", r)
		}
	}
	if h.TB.Failed() {
		h.logs()
	}
	h.CheckNothingLeft()
	for _, p := range h.Processes() {
		syscall.Kill(p.PID, syscall.SIGKILL)
	}
	h.Dir = ""
	if err := os.RemoveAll(dir); err != nil {
		h.TB.Errorf("removing %s: %v", dir, err)
	}
}

// CheckNothingLeft fails the test unless every process, socket and mount of this
// host goes away. Processes that are on their way out are waited for.
func (h *Host) CheckNothingLeft() {
	h.TB.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), h.grace)
	defer cancel()
	for _, p := range h.Processes() {
		if err := p.Wait(ctx); err != nil {
			h.TB.Errorf("left running: %v", p)
		}
	}
	filepath.WalkDir(h.Dir, func(path string, d fs.DirEntry, err error) error {
		if err == nil && d.Type()&fs.ModeSocket != 0 {
			h.TB.Errorf("socket left: %s", path)
		}
		return nil
	})
	mounts, err := os.ReadFile("/proc/self/mountinfo")
	Must(h.TB, err)
	for line := range strings.Lines(string(mounts)) {
		if strings.Contains(line, h.Dir) {
			h.TB.Errorf("mount left: %s", line)
		}
	}
}

// logs shows what the service and the guest's kernel said last.
func (h *Host) logs() {
	for _, name := range []string{"service.log", "console.log"} {
		text, err := os.ReadFile(filepath.Join(h.State(), name))
		if err != nil {
			continue
		}
		lines := strings.Split(strings.TrimSpace(string(text)), "\n")
		h.TB.Logf("%s:\n\t%s", name, strings.Join(lines[max(0, len(lines)-30):], "\n\t"))
	}
	for _, p := range h.Processes() {
		h.TB.Logf("runs: %v", p)
	}
}

// Files lists what lies under the host's data directory, for comparing.
func (h *Host) Files() []string {
	h.TB.Helper()
	var list []string
	filepath.WalkDir(h.Data(), func(path string, d fs.DirEntry, err error) error {
		if err == nil && !d.IsDir() {
			rel, _ := filepath.Rel(h.Data(), path)
			list = append(list, rel)
		}
		return nil
	})
	return list
}

// Must fails the test on an error of the test's own doing.
func Must(tb testing.TB, err error) {
	tb.Helper()
	if err != nil {
		tb.Fatal(err)
	}
}
