//go:build e2e

package main

import (
	"bytes"
	"crypto/sha256"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// The test program is this test binary, run again inside the rig by `rig`.
const role = "RIG_TEST_ROLE"

func TestMain(m *testing.M) {
	switch os.Getenv(role) {
	case "":
		os.Exit(m.Run())
	case "kvm":
		f, err := os.OpenFile("/dev/kvm", os.O_RDWR, 0)
		if err == nil {
			err = createVM(f)
		}
		if err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		fmt.Println("VM created")
		fmt.Fprintln(os.Stderr, "on stderr")
	case "injection":
		if err := countWakeUps(); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
	case "flood":
		flood(os.Stdout, 24<<20)
	case "scratch":
		f, err := os.Create("/scratch/f")
		if err == nil {
			err = f.Truncate(3 << 30)
		}
		if err == nil {
			err = os.WriteFile("/tmp/result", []byte("kept"), 0o600)
		}
		if err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
	case "hang":
		fmt.Println("hanging")
		for {
			_ = unix.Pause() // select{} alone would be a deadlock to the runtime
		}
	case "orphan": // leaves a child that holds stdout
		self, _ := os.Executable()
		c := exec.Command(self)
		c.Env = append(os.Environ(), role+"=hang")
		c.Stdout = os.Stdout
		if err := c.Start(); err != nil {
			os.Exit(1)
		}
		os.Exit(5)
	}
	if s := os.Getenv("RIG_TEST_EXIT"); s != "" {
		var n int
		fmt.Sscan(s, &n)
		os.Exit(n)
	}
}

func flood(w *os.File, n int) {
	b := make([]byte, 1<<20)
	for i := range b {
		b[i] = byte(i*7 + i>>8)
	}
	for ; n > 0; n -= len(b) {
		w.Write(b)
	}
}

type result struct {
	stdout, stderr []byte
	code           int
}

func rig(t *testing.T, options []string, command ...string) result {
	t.Helper()
	args := append(options, "--")
	if len(command) == 0 {
		self, err := os.Executable()
		must(t, err)
		command = []string{self}
	}
	c := exec.Command("../../rig", append(args, command...)...)
	var out, errs bytes.Buffer
	c.Stdout, c.Stderr = &out, &errs
	err := c.Run()
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		t.Fatal(err)
	}
	return result{out.Bytes(), errs.Bytes(), c.ProcessState.ExitCode()}
}

func as(r string, more ...string) []string { return append([]string{"--env", role + "=" + r}, more...) }

func TestRigHasKVM(t *testing.T) {
	r := rig(t, as("kvm"))
	if r.code != 0 || string(r.stdout) != "VM created\n" || string(r.stderr) != "on stderr\n" {
		t.Errorf("exit status %d\nstdout: %s\nstderr: %s", r.code, r.stdout, r.stderr)
	}
}

func TestRigExitStatus(t *testing.T) {
	if r := rig(t, as("kvm", "--env", "RIG_TEST_EXIT=3")); r.code != 3 {
		t.Errorf("exit 3: %d\n%s", r.code, r.stderr)
	}
	if r := rig(t, []string{"--bin", "sh"}, "sh", "-c", "kill -KILL $$"); r.code != 137 || !strings.Contains(string(r.stderr), "signal 9") {
		t.Errorf("signal 9: %d\n%s", r.code, r.stderr)
	}
	if r := rig(t, nil, "no-such-command"); r.code != 127 {
		t.Errorf("no such command: %d\n%s", r.code, r.stderr)
	}
	if r := rig(t, []string{"--qemu-arg", "-no-such-option"}, "x"); r.code != 125 || !strings.Contains(string(r.stderr), "no-such-option") {
		t.Errorf("QEMU failed: %d\n%s", r.code, r.stderr)
	}
	if r := rig(t, []string{"--qemu", "/nonexistent/qemu"}, "x"); r.code != 125 {
		t.Errorf("no QEMU: %d\n%s", r.code, r.stderr)
	}
}

func TestRigLosesNoOutput(t *testing.T) {
	r := rig(t, as("flood"))
	f, err := os.CreateTemp(t.TempDir(), "")
	must(t, err)
	flood(f, 24<<20)
	want, err := os.ReadFile(f.Name())
	must(t, err)
	if r.code != 0 || sha256.Sum256(r.stdout) != sha256.Sum256(want) {
		t.Errorf("exit status %d, %d bytes of %d, or other ones\n%s", r.code, len(r.stdout), len(want), r.stderr)
	}
}

func TestRigEndsOrphans(t *testing.T) {
	if r := rig(t, as("orphan")); r.code != 5 {
		t.Errorf("exit status %d\n%s", r.code, r.stderr)
	}
}

func TestRigDiskAndFiles(t *testing.T) {
	to := filepath.Join(t.TempDir(), "result")
	r := rig(t, as("scratch", "--disk", "4G", "--get", "/tmp/result:"+to))
	if r.code != 0 {
		t.Fatalf("exit status %d\n%s", r.code, r.stderr)
	}
	if b, err := os.ReadFile(to); err != nil || string(b) != "kept" {
		t.Errorf("brought back %q, %v", b, err)
	}
}

func TestRigTimeout(t *testing.T) {
	r := rig(t, as("hang", "--timeout", "30s"))
	if r.code != 124 || !strings.Contains(string(r.stderr), "--timeout") || !strings.Contains(string(r.stderr), "SIGQUIT") {
		t.Errorf("exit status %d\n%s", r.code, r.stderr)
	}
}

func TestRigCountsInstructions(t *testing.T) {
	r := rig(t, as("kvm", "--icount"))
	if r.code != 0 || string(r.stdout) != "VM created\n" {
		t.Errorf("exit status %d\n%s", r.code, r.stderr)
	}
}
