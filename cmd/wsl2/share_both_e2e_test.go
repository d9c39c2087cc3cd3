//go:build e2e

package main_test

import (
	"context"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/wsl2/wsl2/internal/testsys"
)

// tool builds a program of the tests where the distro finds it.
func tool(t *testing.T, home, name string) {
	t.Helper()
	build := exec.Command("go", "build", "-o", filepath.Join(home, name), "./internal/testsys/"+name)
	build.Dir, build.Env = testsys.Root(), append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
}

// lockWaits: who waits for a lock of the other side's gets it when it is free, however long that takes, and can be ended meanwhile.
func lockWaits(t *testing.T, h *testsys.Host, guest, host string) {
	t.Helper()
	f, err := os.OpenFile(host+"/locked", os.O_RDWR|os.O_CREATE, 0o644)
	testsys.Must(t, err)
	defer f.Close()
	set := map[string]func(take, wait bool) error{
		"flock": func(take, wait bool) error {
			how := unix.LOCK_UN
			if take {
				how = unix.LOCK_EX
			}
			if !wait {
				how |= unix.LOCK_NB
			}
			return unix.Flock(int(f.Fd()), how)
		},
		"fcntl": func(take, wait bool) error {
			how, l := unix.F_OFD_SETLK, unix.Flock_t{Type: unix.F_UNLCK, Start: 15, Len: 1}
			if take {
				l.Type = unix.F_WRLCK
			}
			if wait {
				how = unix.F_OFD_SETLKW
			}
			return unix.FcntlFlock(f.Fd(), how, &l)
		},
	}
	for kind, lock := range set {
		testsys.Must(t, lock(true, false))
		live := h.Start("-d", "small", "-e", "/mnt/host/lock", kind+"-wait", guest+"/locked")
		live.Expect("waiting\n")
		began := time.Now()
		killed := h.Start("-d", "small", "-e", "sh", "-c", "/mnt/host/lock "+kind+"-wait "+guest+"/locked & p=$!; read x; kill $p; wait $p; echo ended $?")
		killed.Expect("waiting\n")
		io.WriteString(killed.Stdin, "now\n")
		killed.Expect("ended 143\n")
		killed.Wait()
		time.Sleep(time.Until(began.Add(1500 * time.Millisecond))) // longer than a request for a lock takes in one piece
		testsys.Must(t, lock(false, false))
		live.Expect("locked\n")
		if err := lock(true, false); err != unix.EAGAIN {
			t.Errorf("%s of %s, which the guest has locked: %v", kind, guest, err)
		}
		got := make(chan error, 1)
		go func() {
			err := lock(true, true)
			for err == unix.EINTR { // the runtime's own signals
				err = lock(true, true)
			}
			got <- err
		}()
		live.Stdin.Close()
		live.Wait()
		select {
		case err := <-got:
			if err != nil {
				t.Errorf("%s: the host waits: %v", kind, err)
			}
		case <-time.After(testsys.Deadline):
			t.Fatalf("%s of %s: the host does not get what the guest has given back", kind, guest)
		}
		testsys.Must(t, lock(false, false))
	}
}

// manyAtOnce: eight processes of the guest do random operations on a share, beside one of the host's, and each
// finds what it would alone; the share's servers hold nothing afterwards.
func manyAtOnce(t *testing.T, h *testsys.Host, guest, host string) {
	t.Helper()
	held := func() (descriptors []string) {
		for _, p := range h.Processes() {
			if p.Role() == "share" {
				links, err := filepath.Glob(fmt.Sprintf("/proc/%d/fd/*", p.PID))
				testsys.Must(t, err)
				for _, link := range links {
					if to, err := os.Readlink(link); err == nil { // else it was closed meanwhile
						descriptors = append(descriptors, to)
					}
				}
			}
		}
		return descriptors
	}
	forget := func() []string {
		h.OK("-d", "small", "-u", "root", "-e", "sh", "-c", "sync; echo 3 >/proc/sys/vm/drop_caches")
		return held()
	}
	before := forget()
	ctx, cancel := context.WithTimeout(context.Background(), testsys.Deadline*time.Duration(count(10)))
	defer cancel()
	ended := make(chan struct{})
	beside := make(chan error, 1)
	go func() {
		for {
			cmd := exec.CommandContext(ctx, h.Path("home", "posix"), "-test.run=^TestModel$")
			cmd.Env = append(os.Environ(), "WSL2_POSIX_DIR="+host, "WSL2_POSIX_LOCAL="+h.Dir, "WSL2_POSIX_STEPS=1000")
			if out, err := cmd.CombinedOutput(); err != nil {
				beside <- fmt.Errorf("%w: %s", err, out)
				return
			}
			select {
			case <-ended:
				beside <- nil
				return
			default:
			}
		}
	}()
	r := h.Start("-d", "small", "-e", "sh", "-c", fmt.Sprintf(`for i in 1 2 3 4 5 6 7 8; do
		(WSL2_POSIX_DIR=%s WSL2_POSIX_STEPS=%d /mnt/host/posix -test.run='^TestModel$' >/tmp/model$i 2>&1 && echo $i is done || cat /tmp/model$i) &
	done; wait`, guest, count(500))).Wait()
	close(ended)
	if strings.Count(r.Stdout, "is done\n") != 8 {
		t.Errorf("in the guest: %s", r.Stdout)
	}
	if err := <-beside; err != nil {
		t.Errorf("on the host: %v", err)
	}
	for after := forget(); len(after) > len(before)+8; after = forget() { // what the kernel forgets the servers hear of a moment later
		if ctx.Err() != nil {
			t.Errorf("the share's servers have these descriptors open:\n%s\nand had:\n%s", strings.Join(after, "\n"), strings.Join(before, "\n"))
			break
		}
	}
}
