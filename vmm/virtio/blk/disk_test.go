package blk

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// TestMain lets the test binary be the other process that wants the image:
// BLK_TEST_OPEN=MODE:PATH opens it and says on stdout how that went; with
// BLK_TEST_HOLD it keeps it open until stdin ends.
func TestMain(m *testing.M) {
	spec, ok := os.LookupEnv("BLK_TEST_OPEN")
	if !ok {
		os.Exit(m.Run())
	}
	mode, path, _ := strings.Cut(spec, ":")
	_, err := Open(path, mode == "ro")
	switch {
	case errors.Is(err, ErrInUse):
		fmt.Println("in use")
	case err != nil:
		fmt.Println(err)
	default:
		fmt.Println("open")
	}
	if os.Getenv("BLK_TEST_HOLD") != "" {
		_, _ = os.Stdin.Read(make([]byte, 1))
	}
	os.Exit(0)
}

func openElsewhere(t *testing.T, mode, path string) string {
	t.Helper()
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), "BLK_TEST_OPEN="+mode+":"+path, "GORACE=atexit_sleep_ms=0")
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("other process: %v: %s", err, out)
	}
	return strings.TrimSpace(string(out))
}

func TestLockBetweenProcesses(t *testing.T) {
	path, disk := image(t, 1<<20)
	for _, mode := range []string{"rw", "ro"} {
		if got := openElsewhere(t, mode, path); got != "in use" {
			t.Errorf("%s while it is open rw: %s", mode, got)
		}
	}
	if err := disk.Close(); err != nil {
		t.Fatal(err)
	}
	if got := openElsewhere(t, "rw", path); got != "open" {
		t.Errorf("after close: %s", got)
	}
	ro, err := Open(path, true)
	if err != nil {
		t.Fatal(err)
	}
	defer ro.Close()
	if got := openElsewhere(t, "ro", path); got != "open" {
		t.Errorf("ro while it is open ro: %s", got)
	}
	if got := openElsewhere(t, "rw", path); got != "in use" {
		t.Errorf("rw while it is open ro: %s", got)
	}
}

// The lock dies with the process that holds it, however that ends.
func TestLockOfKilledProcess(t *testing.T) {
	path, disk := image(t, 1<<20)
	if err := disk.Close(); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), "BLK_TEST_OPEN=rw:"+path, "BLK_TEST_HOLD=1")
	stdin, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	defer stdin.Close()
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	var line [5]byte
	if _, err := stdout.Read(line[:]); err != nil || string(line[:]) != "open\n" {
		t.Fatalf("other process: %q, %v", line, err)
	}
	if _, err := Open(path, false); !errors.Is(err, ErrInUse) || !strings.Contains(err.Error(), path) {
		t.Errorf("while the other holds it: %v", err)
	}
	if err := cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	_ = cmd.Wait()
	disk, err = Open(path, false)
	if err != nil {
		t.Fatalf("after its death: %v", err)
	}
	if err := disk.Close(); err != nil {
		t.Error(err)
	}
}

func TestOpenRefuses(t *testing.T) {
	dir := t.TempDir()
	write := func(name string, n int) string {
		p := filepath.Join(dir, name)
		if err := os.WriteFile(p, make([]byte, n), 0o600); err != nil {
			t.Fatal(err)
		}
		return p
	}
	fifo := filepath.Join(dir, "fifo")
	if err := unix.Mkfifo(fifo, 0o600); err != nil {
		t.Fatal(err)
	}
	for _, tc := range []struct{ name, path, want string }{
		{"missing", filepath.Join(dir, "none"), "no such file"},
		{"directory", dir, "is a directory"},
		{"fifo", fifo, "neither a regular file nor a block device"},
		{"character device", "/dev/null", "neither a regular file nor a block device"},
		{"empty", write("empty", 0), "has 0 bytes"},
		{"odd size", write("odd", 1000), "has 1000 bytes"},
	} {
		if _, err := Open(tc.path, false); err == nil || !strings.Contains(err.Error(), tc.want) || !strings.Contains(err.Error(), tc.path) {
			t.Errorf("%s: %v", tc.name, err)
		}
	}
	// Nothing stays open or locked after a refusal.
	odd := filepath.Join(dir, "odd")
	if err := os.Truncate(odd, 1024); err != nil {
		t.Fatal(err)
	}
	d, err := Open(odd, false)
	if err != nil {
		t.Fatal(err)
	}
	if d.Size() != 1024 || d.Path() != odd || d.ReadOnly() {
		t.Errorf("size %d, path %s, read-only %v", d.Size(), d.Path(), d.ReadOnly())
	}
	if err := d.Close(); err != nil {
		t.Error(err)
	}
}
