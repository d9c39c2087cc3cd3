package listeners

import (
	"fmt"
	"net"
	"os/exec"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/wsl2/wsl2/guest/netns"
	"github.com/wsl2/wsl2/internal/testsys/namespace"
)

// TestNamespaces: what listens in another namespace counts while that is one of those that do, beside what
// listens at the same port in ours.
func TestNamespaces(t *testing.T) {
	if !namespace.Inside(t, unix.CLONE_NEWNET) {
		return
	}
	cmd := exec.Command("sleep", "infinity")
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: unix.CLONE_NEWNET, Pdeathsig: unix.SIGKILL}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	defer cmd.Wait()         //nolint:errcheck // it is killed
	defer cmd.Process.Kill() //nolint:errcheck // it runs
	other, err := netns.Of(cmd.Process.Pid)
	if err != nil {
		t.Fatal(err)
	}
	listen := func() error {
		l, err := net.Listen("tcp4", "0.0.0.0:80")
		if err == nil {
			t.Cleanup(func() { l.Close() })
		}
		return err
	}
	if err := listen(); err != nil {
		t.Fatal(err)
	}
	if err := other.Do(listen); err != nil {
		t.Fatal(err)
	}
	var log []string
	s := NewNamespaces(func(format string, args ...any) { log = append(log, fmt.Sprintf(format, args...)) })
	count := func(want int) {
		t.Helper()
		list, complete, err := s.dump(portRange{32768, 60999})
		cookies := map[uint64]bool{}
		for _, l := range list {
			if l.Port == 80 && l.V4 {
				cookies[l.cookie] = true
			}
		}
		if err != nil || !complete || len(cookies) != want {
			t.Errorf("%+v, complete %v, %v; want %d of port 80", list, complete, err, want)
		}
	}
	count(1)
	if err := s.Add(other); err != nil {
		t.Fatal(err)
	}
	count(2)
	// A distro may end while the kernel is slow to answer.
	s.each(func() error { s.Remove(other); return nil })
	count(1)
	if len(log) > 0 {
		t.Errorf("logged: %q", log)
	}

	// One that cannot be asked keeps nobody else's ports from being told, and is logged once.
	if err := s.Add(other); err != nil {
		t.Fatal(err)
	}
	other.Close()
	for range 2 {
		if list, complete, err := s.dump(portRange{32768, 60999}); err != nil || complete || len(list) != 1 {
			t.Errorf("%+v, complete %v, %v; want the one of ours", list, complete, err)
		}
	}
	if len(log) != 1 || !strings.Contains(log[0], "may not appear") {
		t.Errorf("logged: %q", log)
	}
	s.Remove(other)
	count(1)
}
