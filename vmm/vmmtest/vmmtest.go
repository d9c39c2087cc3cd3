// Package vmmtest gives tests of whole virtual machines a guest: the kernel
// that the repository builds and an initramfs whose /init (package guest) does
// what the test asks for over vsock.
package vmmtest

import (
	"bufio"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/u-root/u-root/pkg/cpio"
)

// Port is the guest's vsock port.
const Port = 1024

// Timeout is how long a test waits for a guest before it fails. A guest boots
// in 2 s on an idle machine under TCG.
const Timeout = 2 * time.Minute

// root returns the directory of go.mod.
func root(t testing.TB) string {
	t.Helper()
	dir, err := os.Getwd()
	if err != nil {
		t.Fatal(err)
	}
	for {
		if _, err := os.Stat(filepath.Join(dir, "go.mod")); err == nil {
			return dir
		}
		if dir == filepath.Dir(dir) {
			t.Fatal("vmmtest: no go.mod above the test's directory")
		}
		dir = filepath.Dir(dir)
	}
}

// Kernel returns the path of the guest kernel. It fails the test if none is
// built.
func Kernel(t testing.TB) string {
	t.Helper()
	p := filepath.Join(root(t), "out", "vmlinux")
	if _, err := os.Stat(p); err != nil {
		t.Fatalf("%v: make kernel", err)
	}
	return p
}

var build struct {
	once  sync.Once
	image []byte
	err   error
}

// Initramfs returns the path of an initramfs with the test guest, made anew for
// each test.
func Initramfs(t testing.TB) string {
	t.Helper()
	dir := t.TempDir()
	build.once.Do(func() {
		exe := filepath.Join(dir, "guest")
		c := exec.Command("go", "build", "-trimpath", "-ldflags=-s -w", "-o", exe, "./vmm/vmmtest/guest")
		c.Dir = root(t)
		c.Env = append(os.Environ(), "CGO_ENABLED=0", "GOOS=linux", "GOARCH=amd64", "GOFLAGS=")
		if out, err := c.CombinedOutput(); err != nil {
			build.err = fmt.Errorf("%v: %w\n%s", c, err, out)
			return
		}
		b, err := os.ReadFile(exe)
		if err != nil {
			build.err = err
			return
		}
		build.image, build.err = Archive(b)
	})
	if build.err != nil {
		t.Fatalf("vmmtest: %v", build.err)
	}
	p := filepath.Join(dir, "initramfs.cpio")
	if err := os.WriteFile(p, build.image, 0o644); err != nil {
		t.Fatal(err)
	}
	return p
}

// Archive returns a cpio archive with init as its /init.
func Archive(init []byte) ([]byte, error) {
	var b strings.Builder
	w := cpio.Newc.Writer(&b)
	err := cpio.WriteRecordsAndDirs(w, []cpio.Record{
		cpio.Directory("dev", 0o755), cpio.Directory("proc", 0o755), cpio.Directory("sys", 0o755),
		cpio.CharDev("dev/console", 0o600, 5, 1),
		cpio.StaticFile("init", string(init), 0o755),
	})
	if err != nil {
		return nil, err
	}
	if err := cpio.WriteTrailer(w); err != nil {
		return nil, err
	}
	return []byte(b.String()), nil
}

// Dial connects to the guest's port through the vsock device's socket at path.
func Dial(t testing.TB, path string) *net.UnixConn {
	t.Helper()
	c, err := net.DialUnix("unix", nil, &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	c.SetDeadline(time.Now().Add(Timeout))
	if _, err := fmt.Fprintf(c, "CONNECT %d\n", Port); err != nil {
		t.Fatal(err)
	}
	// Byte by byte: what follows the line is the test's.
	var line []byte
	for b := make([]byte, 1); len(line) == 0 || line[len(line)-1] != '\n'; line = append(line, b[0]) {
		if _, err := c.Read(b); err != nil {
			t.Fatalf("vmmtest: guest did not accept: %v", err)
		}
	}
	if !strings.HasPrefix(string(line), "OK ") {
		t.Fatalf("vmmtest: the vsock device says %q", line)
	}
	return c
}

// Do has the guest carry out one command and returns its answer's first line.
func Do(t testing.TB, path, format string, a ...any) string {
	t.Helper()
	c := Dial(t, path)
	defer c.Close()
	fmt.Fprintf(c, format+"\n", a...)
	line, err := bufio.NewReader(c).ReadString('\n')
	if err != nil && err != io.EOF {
		t.Fatalf("guest command %q: %v", fmt.Sprintf(format, a...), err)
	}
	return strings.TrimSpace(line)
}

// Console collects what a guest prints and lets a test wait for a line.
type Console struct {
	mu   sync.Mutex
	buf  []byte
	more chan struct{} // closed and replaced by each Write
}

// Write implements io.Writer.
func (c *Console) Write(p []byte) (int, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.buf = append(c.buf, p...)
	if c.more != nil {
		close(c.more)
		c.more = nil
	}
	return len(p), nil
}

func (c *Console) String() string {
	c.mu.Lock()
	defer c.mu.Unlock()
	return string(c.buf)
}

// Wait waits until the guest has printed s.
func (c *Console) Wait(t testing.TB, s string) {
	t.Helper()
	deadline := time.After(Timeout)
	for {
		c.mu.Lock()
		found := strings.Contains(string(c.buf), s)
		if c.more == nil {
			c.more = make(chan struct{})
		}
		more := c.more
		c.mu.Unlock()
		if found {
			return
		}
		select {
		case <-more:
		case <-deadline:
			t.Fatalf("guest did not print %q; it printed:\n%s", s, c.String())
		}
	}
}
