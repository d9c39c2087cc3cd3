//go:build e2e

package main_test

import (
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/wsl2/wsl2/internal/testsys"
)

// TestKilled kills one of the three processes with SIGKILL at one of the moments
// of its life. Whatever was promised before (a sync that returned) holds, the
// next command works, and the disk is clean.
func TestKilled(t *testing.T) {
	for _, c := range []struct {
		victim string // testsys.Process.Role, or "client"
		moment string
	}{
		{"vm", "booting"}, {"vm", "idle"}, {"vm", "writing"}, {"vm", "importing"},
		{"service", "booting"}, {"service", "idle"}, {"service", "writing"}, {"service", "importing"},
		{"client", "booting"}, {"client", "writing"}, {"client", "importing"},
	} {
		t.Run(c.victim+" "+c.moment, func(t *testing.T) {
			h := newHost(t)
			disks := len(h.Disks())
			promised := 0 // numbers that the guest has synced
			live := enter(h, c.moment, &promised)

			var vm []testsys.Process
			for _, p := range h.Processes() {
				if r := p.Role(); r == "vm" || r == "qemu" {
					vm = append(vm, p)
				}
			}
			if c.victim == "client" {
				live.Kill()
			} else {
				h.Process(c.victim).Kill(t)
				if live != nil {
					live.Stdin.Close()
					h.Refused(live.Wait())
				}
				// Without its service, or without its VMM, a machine ends by itself.
				for _, p := range vm {
					p.End(t)
				}
				h.Fsck(true)
			}

			h.OK("-d", "small", "-e", "sh", "-c", "echo next >/root/next && sync")
			if promised > 0 {
				got := strings.TrimSpace(h.OK("-d", "small", "-e", "cat", fmt.Sprintf("/root/f%d", promised%50)))
				if n, err := strconv.Atoi(got); err != nil || n < promised {
					t.Errorf("file %d holds %q after the crash, synced was %d", promised%50, got, promised)
				}
			}
			if s := states(h); len(s) != 1 || s["small"] != "Running" {
				t.Errorf("distros: %v", s)
			}
			h.OK("--shutdown")
			if n := len(h.Disks()); n != disks {
				t.Errorf("%d disks, before %d: %v", n, disks, h.Files())
			}
			h.Fsck(false)
			if got := h.OK("-d", "small", "-e", "cat", "/root/next"); got != "next\n" {
				t.Errorf("after the shutdown: %q", got)
			}
		})
	}
}

// enter brings a host to a moment and returns the command that is then running,
// nil if none.
func enter(h *testsys.Host, moment string, promised *int) *testsys.Live {
	h.TB.Helper()
	switch moment {
	case "booting":
		var live *testsys.Live
		testsys.WaitCreated(h.TB, h.Runtime(), "vsock", func() {
			live = h.Start("-d", "small", "-e", "true")
		})
		return live
	case "idle":
		h.OK("-d", "small", "-e", "true")
		return nil
	case "writing":
		live := h.Start("-d", "small", "-e", "sh", "-c", "i=0; while :; do i=$((i+1)); echo $i >/root/f$((i%50)); sync; echo synced $i; done")
		*promised = 60
		live.Expect(fmt.Sprintf("synced %d\n", *promised))
		return live
	case "importing":
		fifo := h.Path("fifo.tar")
		testsys.Must(h.TB, unix.Mkfifo(fifo, 0o600))
		live := h.Start("--import", "never", fifo)
		w, err := os.OpenFile(fifo, os.O_WRONLY, 0)
		testsys.Must(h.TB, err)
		h.TB.Cleanup(func() { w.Close() })
		archive := testsys.Tar(h.TB, append(testsys.Busybox(h.TB), testsys.Entry{Name: "srv/big", Content: testsys.PatternBytes(h.TB, 8<<20)})...)
		// Most of it is more than the buffers on the way hold: it is being unpacked.
		_, err = w.Write(archive[:len(archive)-1<<20])
		testsys.Must(h.TB, err)
		return live
	}
	h.TB.Fatalf("no moment %q", moment)
	return nil
}

// TestStaleSocket: what a crash leaves in the runtime directory is in nobody's way.
func TestStaleSocket(t *testing.T) {
	h := newHost(t)
	h.OK("-d", "small", "-e", "true")
	for _, role := range []string{"service", "vm"} {
		h.Process(role).Kill(t)
	}
	entries, err := os.ReadDir(h.Runtime())
	testsys.Must(t, err)
	sockets := 0
	for _, e := range entries {
		if e.Type()&os.ModeSocket != 0 {
			sockets++
		}
	}
	if sockets == 0 {
		t.Fatalf("no socket was left to be stale: %v", entries)
	}
	h.OK("-d", "small", "-e", "true")
	h.OK("--shutdown")

	// A socket that somebody listens on who is no service, and a plain file.
	sock := filepath.Join(h.Runtime(), "service.sock")
	os.Remove(sock)
	testsys.Must(t, os.WriteFile(sock, nil, 0o600))
	h.OK("-d", "small", "-e", "true")
	h.OK("--shutdown")
	os.Remove(sock)
	l, err := net.Listen("unix", sock)
	testsys.Must(t, err)
	defer l.Close()
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			io.WriteString(c, "SSH-2.0-what are you doing here\r\n")
			c.Close()
		}
	}()
	h.Refused(h.Run("-d", "small", "-e", "true"), "service")
}

// TestPanic: a guest kernel that panics ends every session with its last words.
func TestPanic(t *testing.T) {
	h := newHost(t)
	l := h.Start("-d", "small", "-e", "sh", "-c", "echo kept >/root/kept; sync; echo ready; cat")
	l.Expect("ready\n")
	vm := h.Process("vm")
	r := h.Run("-d", "small", "-e", "sh", "-c", "echo c >/proc/sysrq-trigger")
	h.Refused(r, "sysrq triggered crash")
	l.Stdin.Close()
	h.Refused(l.Wait(), "panic")
	vm.End(t)
	h.Fsck(true)
	if got := h.OK("-d", "small", "-e", "cat", "/root/kept"); got != "kept\n" {
		t.Errorf("after the panic: %q", got)
	}
	h.OK("--shutdown")
	h.Fsck(false)
}
