//go:build e2e

package main_test

import (
	"archive/tar"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/wsl2/wsl2/internal/testsys"
)

// disks are the distros' disks by name, as --list tells.
func disks(h *testsys.Host) map[string]string {
	h.TB.Helper()
	var l struct {
		Distros []struct{ Name, Disk string }
	}
	testsys.Must(h.TB, json.Unmarshal([]byte(h.OK("--list", "--json")), &l))
	m := map[string]string{}
	for _, d := range l.Distros {
		m[d.Name] = d.Disk
	}
	return m
}

// TestExportFormats: what is exported is what is imported again, in each format
// and through a pipe.
func TestExportFormats(t *testing.T) {
	h := testsys.New(t)
	h.Config("[wsl2]", "defaultVhdSize=2GB")
	big := testsys.PatternBytes(t, 2<<20+17)
	h.Import("origin", append(testsys.Busybox(t),
		testsys.Entry{Name: "srv/big", Content: big, UID: 1000, GID: 50, Mode: 0o640},
		testsys.Entry{Name: "srv/hard", Type: tar.TypeLink, Link: "srv/big"},
		testsys.Entry{Name: "srv/setuid", Content: []byte("x"), Mode: 0o4755},
		testsys.Entry{Name: "srv/null", Type: tar.TypeChar, Major: 1, Minor: 3, Mode: 0o666},
		testsys.Entry{Name: "srv/fifo", Type: tar.TypeFifo},
		testsys.Entry{Name: "srv/räksmörgås \n", Content: []byte("odd name")},
		testsys.Entry{Name: "srv/huge-owner", UID: 3000000, GID: 4000000},
	)...)
	const look = `find / -xdev ! -path '/proc*' ! -path '/lost+found*' ! -path /tmp ! -path '/run*' ! -path '/dev*' ! -path '/sys*' ! -path '/mnt/*' -exec stat -c '%n %F %a %u %g %h %Y %t %T' {} + | sort | sha256sum; sha256sum </srv/big; cat /srv/r*`
	want := inside(h, "origin", look)
	check := func(name string) {
		t.Helper()
		if got := inside(h, name, look); got != want {
			t.Errorf("%s holds\n%s\nwant\n%s", name, got, want)
		}
		h.OK("--unregister", name)
	}
	for _, format := range []string{"tar", "tar.gz", "tar.xz", "tar.zst"} {
		path := h.Path("out." + format)
		h.OK("--export", "origin", path)
		if format == "tar.gz" { // the host's tar reads it as well
			r := h.Shell(`tar -tvzf "$2" | grep -c 'srv/hard link to srv/big'`, "--export", path)
			if strings.TrimSpace(r.Stdout) != "1" {
				t.Errorf("the host's tar: %v", r)
			}
		}
		h.OK("--import", "copy", path)
		check("copy")
		testsys.Must(t, os.Remove(path))
	}
	h.Want(h.Shell(`"$0" --export origin - | "$0" --import copy -`), 0)
	check("copy")
	for format, import_ := range map[string][]string{"vhdx": {"--import", "copy", "--vhd"}, "raw": {"--import-in-place", "copy"}} {
		path := h.Path("out." + format)
		h.OK("--export", "origin", path, "--format", format)
		h.OK(append(import_, path)...)
		check("copy")
	}
	h.Refused(h.Run("--export", "origin", h.Path("no/such/dir/x.tar")), "no such file")
	h.Refused(h.Run("--export", "nosuch", h.Path("x.tar")), "nosuch")
	h.Refused(h.Run("--export", "origin", h.Path("x"), "--format", "zip"), "tar.zst")
	h.Want(h.Shell(`"$0" --export origin - >/dev/full`), 125, "no space left")
	if _, err := os.Stat(h.Path("x.tar")); err == nil {
		t.Error("an export that failed left its file")
	}
	h.OK("--shutdown")
	h.Fsck(false)
}

// TestManage changes a distro in every way there is; its files stay.
func TestManage(t *testing.T) {
	h := newHost(t)
	inside(h, "small", "mkdir /root/keep && echo precious >/root/keep/file && chown -R alice /root/keep")
	megabytes := func(name string) int {
		t.Helper()
		n, err := strconv.Atoi(inside(h, name, "df -m / | tail -1 | awk '{print $2}'"))
		testsys.Must(t, err)
		return n
	}
	precious := func(name string) {
		t.Helper()
		if got := inside(h, name, "cat /root/keep/file; stat -c %U /root/keep/file"); got != "precious\nalice" {
			t.Fatalf("%s: %q", name, got)
		}
	}

	h.OK("--manage", "small", "--resize", "9GB")
	if n := megabytes("small"); n < 8500 || n > 9216 {
		t.Errorf("%d MB after --resize 9GB", n)
	}
	h.OK("--manage", "small", "--resize", "1GB")
	if n := megabytes("small"); n < 800 || n > 1024 {
		t.Errorf("%d MB after --resize 1GB", n)
	}
	precious("small")
	h.Refused(h.Run("--manage", "small", "--resize", "65MB"), "larger")
	h.Refused(h.Run("--manage", "small", "--resize", "much"), "much")
	h.Refused(h.Run("--manage", "small"), "--manage")
	h.Refused(h.Run("--manage", "small", "--compact", "--repair"), "exclude")
	h.Refused(h.Run("--manage", "nosuch", "--compact"), "nosuch")
	precious("small")

	// What the host's file is filled with for nothing, --compact gives back.
	disk := disks(h)["small"]
	h.OK("--terminate", "small")
	f, err := os.OpenFile(disk, os.O_RDWR, 0)
	testsys.Must(t, err)
	testsys.Must(t, unix.Fallocate(int(f.Fd()), 0, 0, 1<<30))
	f.Close()
	used := func() int64 {
		var st unix.Stat_t
		testsys.Must(t, unix.Stat(disk, &st))
		return st.Blocks * 512
	}
	before := used()
	h.OK("--manage", "small", "--compact")
	if after := used(); before < 1<<30 || after > 200<<20 {
		t.Errorf("%d bytes on the host before --compact, %d after", before, after)
	}

	h.OK("--manage", "small", "--clone", "copy")
	inside(h, "small", "echo changed >/root/changed")
	precious("copy")
	if got := inside(h, "copy", "ls /root"); got != "keep" {
		t.Errorf("the clone sees the original's changes: %q", got)
	}
	dir := h.Path("data/elsewhere")
	h.OK("--manage", "copy", "--move", dir)
	if d := disks(h)["copy"]; filepath.Dir(d) != dir {
		t.Errorf("moved to %s", d)
	}
	precious("copy")
	h.OK("--manage", "copy", "--rename", "renamed")
	h.Refused(h.Run("-d", "copy", "-e", "true"), "copy")
	precious("renamed")

	h.OK("--manage", "renamed", "--set-default-user", "alice")
	if got := strings.TrimSpace(h.OK("-d", "renamed", "-e", "id", "-un")); got != "alice" {
		t.Errorf("default user %q", got)
	}
	h.Refused(h.Run("--manage", "renamed", "--set-default-user", "nobodyatall"), "nobodyatall")
	if got := strings.TrimSpace(h.OK("-d", "renamed", "-e", "id", "-un")); got != "alice" {
		t.Errorf("default user %q after a wrong one", got)
	}

	// In use: nothing is stopped for it.
	l := h.Start("-d", "renamed", "-e", "sh", "-c", "echo ready; cat")
	l.Expect("ready\n")
	for _, verb := range [][]string{{"--compact"}, {"--move", h.Path("data/third")}, {"--rename", "x"}, {"--clone", "x"}, {"--resize", "2GB"}} {
		h.Refused(h.Run(append([]string{"--manage", "renamed"}, verb...)...), "renamed", "--terminate")
	}
	h.Refused(h.Run("--export", "renamed", h.Path("x.tar")), "--terminate")
	l.Stdin.Close()
	h.Want(l.Wait(), 0)

	// A damaged file system is repaired, from inside the VM.
	h.OK("--terminate", "renamed")
	damage, err := os.OpenFile(disks(h)["renamed"], os.O_RDWR, 0)
	testsys.Must(t, err)
	_, err = damage.WriteAt([]byte{0xff, 0xff}, 1024+0x0c) // s_free_blocks_count_lo: the superblock's checksum is wrong
	testsys.Must(t, err)
	damage.Close()
	h.Want(h.Run("-d", "renamed", "-e", "true"), 125, "is being checked", "cannot be mounted", "--manage renamed --repair")
	if out := h.OK("--manage", "renamed", "--repair"); !strings.Contains(out, "MODIFIED") {
		t.Errorf("--repair: %q", out)
	}
	precious("renamed")
	h.OK("-d", "renamed", "-e", "true")
	h.OK("--shutdown")
	h.Fsck(false)

	h.Refused(h.Run("--uninstall"), "--yes")
	h.OK("--uninstall", "--yes")
	for _, left := range []string{h.Data(), h.State(), h.Path("cache/wsl2")} {
		if _, err := os.Stat(left); err == nil {
			t.Errorf("left %s", left)
		}
	}
}

// TestKilledVerbs: kill -9 of the service, the client and the VM in the middle of
// a verb leaves the old state or the new one, and nothing else.
func TestKilledVerbs(t *testing.T) {
	h := newHost(t)
	inside(h, "small", "head -c 30000000 /dev/urandom >/root/big; sha256sum /root/big >/root/sum")
	moved := 0
	for _, c := range []struct{ victim, verb string }{
		{"service", "clone"}, {"client", "clone"},
		{"service", "move"}, {"client", "move"},
		{"service", "shrink"}, {"client", "shrink"}, {"vm", "shrink"},
		{"service", "grow"}, {"client", "grow"},
		{"service", "export"}, {"client", "export"}, {"vm", "export"},
		{"service", "compact"}, {"client", "compact"}, {"vm", "compact"},
	} {
		t.Run(c.verb+" "+c.victim, func(t *testing.T) {
			h.TB = t
			args := []string{"--manage", "small", "--clone", "copy"}
			noted := ".change-small*"
			switch c.verb {
			case "clone":
				noted = ".change-copy*"
			case "move":
				moved++
				args = []string{"--manage", "small", "--move", h.Path(fmt.Sprintf("data/wsl2/moved%d", moved))}
			case "shrink":
				args = []string{"--manage", "small", "--resize", fmt.Sprintf("%dMB", 2000-moved)}
			case "grow":
				args, noted = []string{"--manage", "small", "--resize", "16GB"}, ""
			case "export":
				args, noted = []string{"--export", "small", h.Path("data/wsl2/out.tar.zst")}, ""
			case "compact":
				args, noted = []string{"--manage", "small", "--compact"}, ""
			}
			moved++
			var l *testsys.Live
			start := func() { l = h.Start(args...) }
			if noted != "" {
				testsys.WaitCreated(t, filepath.Join(h.Data(), "distros"), noted, start)
			} else {
				start()
				for states(h)["small"] == "Stopped" && !l.Ended() { // until it is locked
				}
			}
			if c.victim == "client" {
				l.Kill()
				for states(h)["small"] != "Stopped" { // the service takes it back
				}
			} else {
				for _, p := range h.Processes() {
					if r := p.Role(); r == c.victim || c.victim == "vm" && r == "qemu" {
						p.Kill(t)
					}
				}
				l.Wait()
			}
			got := disks(h) // the next command: the service cleans up
			if len(got) != 1 && !(len(got) == 2 && got["copy"] != "") {
				t.Fatalf("distros %v", got)
			}
			known := map[string]bool{"registry.json": true}
			for name, disk := range got {
				if out := inside(h, name, "sha256sum -c /root/sum"); out != "/root/big: OK" {
					t.Errorf("%s: %q", name, out)
				}
				rel, _ := filepath.Rel(h.Data(), disk)
				known[rel] = true
			}
			for _, f := range h.Files() {
				if !known[f] && f != "out.tar.zst" { // an export that was complete
					t.Errorf("left %s; the distros are %v", f, got)
				}
			}
			h.OK("--terminate", "small")
			if got["copy"] != "" {
				h.OK("--unregister", "copy")
			}
		})
	}
	h.TB = t
	h.OK("--shutdown")
	h.Fsck(false)
}
