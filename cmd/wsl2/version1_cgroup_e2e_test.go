//go:build e2e

package main_test

import (
	"context"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/wsl2/wsl2/internal/cgroup"
	"github.com/wsl2/wsl2/internal/testsys"
)

// TestVersion1Cgroups: each distro has a cgroup of its own, started by root or by a user to whom one is delegated, and
// nothing is left of it, whoever has made others in it. Limits are TestVersion1Limits.
func TestVersion1Cgroups(t *testing.T) {
	// Where the host may have cgroups of version 1, or of version 2, which are not mounted onto themselves.
	const mount = "mount -t tmpfs none " + cgroup.Root + " && mount -t cgroup2 none " + cgroup.Root
	for _, user := range []bool{false, true} {
		t.Run(map[bool]string{false: "root", true: "user"}[user], func(t *testing.T) {
			all, err := os.MkdirTemp("", "cgroup")
			testsys.Must(t, err)
			testsys.Must(t, unix.Mount("none", all, "cgroup2", 0, ""))
			base := all
			t.Cleanup(func() { // when nothing runs any more
				if user {
					testsys.Must(t, cgroup.Remove(context.Background(), base))
				}
				testsys.Must(t, unix.Unmount(all, 0))
				testsys.Must(t, os.Remove(all))
			})
			testsys.Must(t, os.Chmod(all, 0o755))
			h := testsys.New(t)
			archive := h.File("small.tar", testsys.Tar(t, testsys.Busybox(t)...))
			if user {
				base = filepath.Join(all, filepath.Base(all))
				testsys.Must(t, os.MkdirAll(base+"/service", 0o755))
				for _, p := range []string{"", "/cgroup.procs", "/cgroup.subtree_control", "/service", "/service/cgroup.procs"} {
					testsys.Must(t, os.Chown(base+p, testUser, testUser))
				}
				anotherUser(h)
				h.InNamespace(mount)
				h.Wrap = append([]string{"sh", "-c", `echo $$ >"$0" && exec "$@"`, base + "/service/cgroup.procs"}, h.Wrap...)
			} else {
				h.MountNamespace(mount)
			}
			h.OK("--set-default-version", "1")
			h.OK("--import", "one", archive)
			h.OK("--manage", "one", "--clone", "two")
			nested := `sleep 100000 & echo ready; cat`
			if user { // whose distro has cgroups of its own users', and some to which the host has no path that is short enough
				nested = `n=$(printf %0203d 0); cd /sys/fs/cgroup && for i in $(seq 20); do mkdir $n && cd $n || exit; done
					cd /sys/fs/cgroup && mkdir -p a/b/c && chown -R 1:1 a && sh -c 'echo $$ >a/b/c/cgroup.procs; exec sleep 100000' & echo ready; cat`
			}
			for _, victim := range []string{"service", "distro", "none"} {
				var ends []func()
				for _, name := range []string{"one", "two"} {
					l := h.Start("-d", name, "-u", "root", "-e", "sh", "-c", nested)
					l.Expect("ready\n")
					init := initOf(h, name)
					ends = append(ends, func() { init.End(t); l.Stdin.Close(); l.Wait() })
				}
				made := cgroups(t, h)
				for i, path := range made {
					made[i] = strings.Replace(path, cgroup.Root, all, 1)
					_, err := os.Stat(made[i])
					testsys.Must(t, err)
				}
				if len(made) != 2 || !strings.HasPrefix(made[0], base+"/") {
					t.Errorf("cgroups of two distros: %v", made)
				}
				switch victim {
				case "service":
					h.Process("service").Kill(t)
				case "distro":
					initOf(h, "one").Kill(t)
					fallthrough
				default:
					h.OK("--shutdown", "--force")
				}
				for _, end := range ends {
					end()
				}
				h.OK("-d", "one", "-e", "true") // a service that sweeps
				h.OK("--shutdown")
				h.CheckNothingLeft()
				for _, path := range append(made, cgroups(t, h)...) {
					if _, err := os.Stat(path); !errors.Is(err, os.ErrNotExist) {
						t.Errorf("after the end of %s a cgroup is left: %s, %v", victim, path, err)
					}
				}
			}
			// What cannot be removed keeps no distro out of a cgroup of its own.
			where := func(args ...string) {
				t.Helper()
				out, err := exec.Command("nsenter", append([]string{"--mount", "--target", strconv.Itoa(h.Process("service").PID)}, args...)...).CombinedOutput()
				if err != nil {
					t.Fatalf("%q: %v, %s", args, err, out)
				}
			}
			l := h.Start("-d", "one", "-e", "sh", "-c", "echo ready; cat")
			l.Expect("ready\n")
			stuck := cgroups(t, h)
			where("mount", "-t", "tmpfs", "none", stuck[0]+"/distro")
			h.OK("--shutdown", "--force")
			l.Wait()
			l = h.Start("-d", "one", "-e", "sh", "-c", "echo ready; cat")
			l.Expect("ready\n")
			if made := cgroups(t, h); len(made) != 2 || !slices.Contains(made, stuck[0]+"-2") {
				t.Errorf("with %v left the cgroups are %v", stuck, made)
			}
			where("umount", stuck[0]+"/distro")
			h.OK("--shutdown", "--force")
			l.Wait()
			h.OK("-d", "two", "-e", "true") // a service that sweeps
			h.OK("--shutdown")
			h.CheckNothingLeft()
			if made := cgroups(t, h); len(made) != 0 {
				t.Errorf("left: %v", made)
			}
		})
	}
}

// cgroups are those of the distros that run, and of those that have left one.
func cgroups(t *testing.T, h *testsys.Host) (paths []string) {
	t.Helper()
	links, err := filepath.Glob(filepath.Join(h.Runtime(), "native-*.cgroup"))
	testsys.Must(t, err)
	for _, link := range links {
		path, err := os.Readlink(link)
		testsys.Must(t, err)
		paths = append(paths, path)
	}
	return paths
}
