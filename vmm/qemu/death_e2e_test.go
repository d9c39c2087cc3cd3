//go:build e2e

package qemu

import (
	"bufio"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/wsl2/wsl2/vmm/engine"
	"github.com/wsl2/wsl2/vmm/virtio/blk"
)

func pid(t *testing.T, m engine.Engine) int {
	t.Helper()
	q := m.(*machine)
	q.mu.Lock()
	defer q.mu.Unlock()
	if q.process == nil {
		t.Fatal("QEMU does not run")
	}
	return q.process.Pid
}

// QEMU killed by somebody else is a failure with a reason, not a hang.
func TestKilledFromOutside(t *testing.T) {
	m, console := bootGuest(t, "quiet vmmtest=hang", newDisk(t, blk.Config{}))
	console.Wait(t, "guest: hang")
	if err := unix.Kill(pid(t, m), unix.SIGKILL); err != nil {
		t.Fatal(err)
	}
	if e := m.Wait(); e.Reason != engine.ReasonFailed || !strings.Contains(e.Detail, "killed") {
		t.Errorf("ended by %v (%s)", e.Reason, e.Detail)
	}
}

const parentEnv = "QEMU_TEST_PARENT"

// The process that runs a machine is killed: QEMU must not outlive it.
func TestDiesWithItsParent(t *testing.T) {
	if os.Getenv(parentEnv) != "" {
		m, console := bootGuest(t, "quiet vmmtest=hang")
		console.Wait(t, "guest: hang")
		fmt.Printf("\nqemu %d\n", pid(t, m))
		for {
			_ = unix.Pause() // select{} alone would be a deadlock to the runtime
		}
	}
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	parent := exec.Command(exe, "-test.run=^TestDiesWithItsParent$")
	parent.Env = append(os.Environ(), parentEnv+"=1")
	parent.Stderr = os.Stderr
	out, err := parent.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := parent.Start(); err != nil {
		t.Fatal(err)
	}
	defer parent.Process.Kill()
	child := 0
	for s := bufio.NewScanner(out); child == 0 && s.Scan(); {
		fmt.Sscanf(s.Text(), "qemu %d", &child)
	}
	if child == 0 {
		t.Fatalf("no QEMU: %v", parent.Wait())
	}
	fd, err := unix.PidfdOpen(child, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fd)
	parent.Process.Kill()
	parent.Wait()
	n, err := unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, int((10 * time.Second).Milliseconds()))
	if n != 1 {
		unix.Kill(child, unix.SIGKILL)
		t.Errorf("QEMU outlived its parent (%v)", err)
	}
}
