//go:build e2e

package native

import (
	"context"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/wsl2/wsl2/internal/nsinit"
	"github.com/wsl2/wsl2/internal/testsys"
)

// TestStartCutOff: a start whose context ends leaves no process, whatever it has come to.
func TestStartCutOff(t *testing.T) {
	dir := t.TempDir()
	testsys.Must(t, os.Chmod(dir, 0o700))
	root := filepath.Join(dir, "rootfs")
	testsys.Must(t, MakeRoot(root))
	s := Spec{Init: initProgram(t), Role: nsinit.Remove, Root: root, Name: "test", Socket: filepath.Join(dir, "socket"), Logf: t.Logf}
	start := func(ctx context.Context) (time.Duration, error) {
		began := time.Now()
		p, err := Start(ctx, s)
		took := time.Since(began)
		if err == nil {
			p.Close()
			<-p.Ended()
		}
		return took, err
	}
	whole, err := start(t.Context())
	testsys.Must(t, err)
	const starts = 200
	for i := range starts {
		ctx, cancel := context.WithTimeout(t.Context(), whole*time.Duration(i)/starts)
		start(ctx)
		cancel()
		if pid, err := unix.Wait4(-1, nil, unix.WNOHANG, nil); err != unix.ECHILD {
			t.Fatalf("cut off after %d/%d of %v: a child is left: %d, %v", i, starts, whole, pid, err)
		}
	}
}

// TestByHand: who starts /init in its namespaces is told what it is for, and no descriptor of his is written to.
func TestByHand(t *testing.T) {
	file, err := os.CreateTemp(t.TempDir(), "")
	testsys.Must(t, err)
	defer file.Close()
	for _, args := range [][]string{nil, {"distro"}, {"none", "/", "name"}} {
		cmd := exec.Command(initProgram(t), args...)
		cmd.Args[0] = nsinit.Argv0
		cmd.ExtraFiles = []*os.File{file, file, file, file}
		out, err := cmd.CombinedOutput()
		if cmd.ProcessState.ExitCode() != 1 || !strings.Contains(string(out), "not by hand") {
			t.Errorf("%q: %v, %q", args, err, out)
		}
	}
	if st, err := file.Stat(); err != nil || st.Size() != 0 {
		t.Errorf("written: %v, %v", st, err)
	}
}

func initProgram(t *testing.T) string {
	return filepath.Join(filepath.Dir(testsys.Exe(t)), "wsl2-init")
}
