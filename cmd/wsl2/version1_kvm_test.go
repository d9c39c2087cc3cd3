//go:build kvm

package main_test

import (
	"context"
	"os"
	"path/filepath"
	"testing"

	"github.com/wsl2/wsl2/internal/cgroup"
	"github.com/wsl2/wsl2/internal/testsys"
)

// TestVersion1Limits: limits hold in version 1 as well, started by root or by a user to whom a cgroup is
// delegated, and nothing is left of the cgroups, whatever was killed.
func TestVersion1Limits(t *testing.T) {
	t.Setenv(versionVariable, "1")
	h := testsys.New(t)
	t.Run("root", func(t *testing.T) { limitedDistro(t, h, cgroup.Root) })

	base := filepath.Join(cgroup.Root, filepath.Base(h.Dir))
	h = testsys.New(t)
	testsys.Must(t, os.MkdirAll(base+"/service", 0o755))
	t.Cleanup(func() { cgroup.Remove(context.Background(), base) }) //nolint:errcheck // the machine ends with the test
	for _, p := range []string{"", "/cgroup.procs", "/cgroup.subtree_control", "/service", "/service/cgroup.procs"} {
		testsys.Must(t, os.Chown(base+p, testUser, testUser))
	}
	anotherUser(h)
	h.Wrap = append([]string{"sh", "-c", `echo $$ >"$0" && exec "$@"`, base + "/service/cgroup.procs"}, h.Wrap...)
	t.Run("user", func(t *testing.T) { limitedDistro(t, h, base) })
}

func limitedDistro(t *testing.T, h *testsys.Host, base string) {
	limits(h)
	made := func() []string {
		list, err := filepath.Glob(base + "/wsl2-native-*")
		testsys.Must(t, err)
		return list
	}
	if list := made(); len(list) == 0 {
		t.Error("no cgroup while a distro has limits")
	}
	// What its users have made in there ends and goes too.
	const nested = `{ mkdir -p /sys/fs/cgroup/a/b && chown -R 1:1 /sys/fs/cgroup/a; } 2>/dev/null; echo ready; cat`
	l := h.Start("-d", "one", "-u", "root", "-e", "sh", "-c", nested)
	l.Expect("ready\n")
	init := initOf(h, "one")
	h.Process("service").Kill(t)
	init.End(t)
	l.Stdin.Close()
	l.Wait()
	h.OK("-d", "two", "-e", "true")
	h.OK("--shutdown")
	h.CheckNothingLeft()
	if list := made(); len(list) != 0 {
		t.Errorf("cgroups are left: %v", list)
	}
}
