package pid1

import (
	"os"
	"strings"
	"syscall"
	"testing"

	"github.com/wsl2/wsl2/guest/reaper"
)

// TestNamespaceOf: a pid is that of the process as long as nobody has reaped it. Then it may be another one's, as it is here.
func TestNamespaceOf(t *testing.T) {
	r := reaper.New(nil)
	defer r.Close()
	p, err := r.Start("/bin/sh", []string{"sh", "-c", ":"}, &syscall.ProcAttr{Files: []uintptr{0, 1, 2}})
	if err != nil {
		t.Fatal(err)
	}
	<-p.Exited
	p.PID = os.Getpid()
	if _, err := namespaceOf(p); err == nil || !strings.Contains(err.Error(), "start it again") {
		t.Errorf("a process that has ended: %v", err)
	}

	in, out, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer in.Close()
	p, err = r.Start("/bin/sh", []string{"sh", "-c", "read end"}, &syscall.ProcAttr{Files: []uintptr{in.Fd(), 1, 2}})
	if err != nil {
		t.Fatal(err)
	}
	n, err := namespaceOf(p)
	if err != nil {
		t.Fatalf("a process that runs: %v", err)
	}
	n.Close()
	out.Close()
	<-p.Exited
}
