package distro

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/wsl2/wsl2/internal/wslconf"
)

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func read(t *testing.T, path string) string {
	t.Helper()
	b, err := os.ReadFile(path)
	must(t, err)
	return string(b)
}

func TestEtc(t *testing.T) {
	root := t.TempDir()
	in := func(path string) string { return filepath.Join(root, path) }
	for path, content := range map[string]string{
		"etc/hosts": "127.0.0.1 old", "etc/resolv.conf": "nameserver 192.0.2.1", "etc/timezone": "Etc/UTC\n",
		"usr/share/zoneinfo/Europe/Berlin": "TZif2", "mnt/wsl/resolv.conf": "# shared",
	} {
		must(t, os.MkdirAll(filepath.Dir(in(path)), 0o755))
		must(t, os.WriteFile(in(path), []byte(content), 0o644))
	}
	conf := wslconf.Defaults()
	must(t, etc(root, conf, ResolvConf, "box.example", "192.0.2.1\tnas\n", "Europe/Berlin"))
	if h := read(t, in("etc/hosts")); !strings.Contains(h, "\n127.0.1.1\tbox.example\tbox\n") || !strings.HasPrefix(h, "# Written by wsl2") || !strings.HasSuffix(h, "\n# The host's:\n192.0.2.1\tnas\n") {
		t.Errorf("hosts: %q", h)
	}
	if h := read(t, in("etc/hostname")); h != "box.example\n" {
		t.Errorf("hostname: %q", h)
	}
	if z := read(t, in("etc/timezone")); z != "Europe/Berlin\n" {
		t.Errorf("timezone: %q", z)
	}
	for link, want := range map[string]string{"etc/localtime": "/usr/share/zoneinfo/Europe/Berlin", "etc/resolv.conf": "/mnt/wsl/resolv.conf"} {
		if to, err := os.Readlink(in(link)); to != want {
			t.Errorf("%s: %q, %v", link, to, err)
		}
	}

	// A second start changes nothing, nor do zones that the distro does not know.
	before, err := os.Stat(in("etc/hosts"))
	must(t, err)
	must(t, os.Remove(in("etc/localtime")))
	must(t, os.Symlink("../usr/share/zoneinfo/Europe/Berlin", in("etc/localtime")))
	for _, zone := range []string{"Europe/Berlin", "No/Such", "../../../etc/hosts", "Europe", ""} {
		must(t, etc(root, conf, ResolvConf, "box.example", "192.0.2.1\tnas\n", zone))
	}
	if after, err := os.Stat(in("etc/hosts")); err != nil || !os.SameFile(before, after) {
		t.Errorf("hosts was written again: %v", err)
	}
	if to, err := os.Readlink(in("etc/localtime")); to != "../usr/share/zoneinfo/Europe/Berlin" {
		t.Errorf("localtime: %q, %v", to, err)
	}

	// What the distro keeps is kept; so is a link to another program's file.
	for _, f := range []string{"etc/hosts", "etc/resolv.conf", "etc/localtime", "etc/hostname"} {
		must(t, os.Remove(in(f)))
	}
	must(t, os.WriteFile(in("etc/hosts"), []byte("mine"), 0o644))
	must(t, os.Symlink("elsewhere", in("etc/hostname")))
	must(t, etc(root, wslconf.Config{}, ResolvConf, "other", "", "Europe/Berlin"))
	if h := read(t, in("etc/hosts")); h != "mine" {
		t.Errorf("hosts: %q", h)
	}
	for _, f := range []string{"etc/resolv.conf", "etc/localtime", "etc/elsewhere"} {
		if exists(in(f)) {
			t.Errorf("%s was made", f)
		}
	}

	// No etc at all: an error, and nothing else.
	if err := etc(t.TempDir(), conf, ResolvConf, "a", "", ""); err == nil || !strings.Contains(err.Error(), "etc/hosts") {
		t.Errorf("without /etc: %v", err)
	}
}

func TestMountsAtStart(t *testing.T) {
	for text, want := range map[string]bool{
		"":                           false,
		"# /dev/vdb /data ext4":      false,
		"LABEL=root / ext4 defaults": false,
		"/swapfile none swap sw 0 0": false,
		"tmpfs /srv tmpfs noauto":    false,
		"tmpfs /srv tmpfs user,noauto,size=1m 0 0": false,
		"tmpfs /srv tmpfs noautofs":                true,
		"LABEL=root / ext4\ntmpfs /srv tmpfs\n":    true,
		"tmpfs /srv":                               false,
	} {
		if got := mountsAtStart(text); got != want {
			t.Errorf("%q: %v", text, got)
		}
	}
}

func TestSaysReady(t *testing.T) {
	for message, want := range map[string]bool{
		"READY=1": true, "STATUS=up\nREADY=1\n": true, "READY=1\nSTATUS=Startup finished": true,
		"": false, "READY=0": false, "STATUS=READY=1": false, "READY=10": false,
	} {
		if got := saysReady(message); got != want {
			t.Errorf("%q: %v", message, got)
		}
	}
}

// FuzzMountsAtStart: comments and what is said to be left alone make no difference,
// whatever stands before them.
func FuzzMountsAtStart(f *testing.F) {
	f.Add("LABEL=root / ext4\ntmpfs /srv tmpfs defaults,noauto\n")
	f.Fuzz(func(t *testing.T, text string) {
		want := mountsAtStart(text)
		for _, more := range []string{"\n# tmpfs /srv tmpfs\n", "\ntmpfs /srv tmpfs noauto\n", "\nx / y\n", "\nshort line\n"} {
			if got := mountsAtStart(text + more); got != want {
				t.Errorf("%q: %v, with %q: %v", text, want, more, got)
			}
		}
		if !mountsAtStart(text + "\ntmpfs /srv tmpfs\n") {
			t.Errorf("%q hides a line behind it", text)
		}
	})
}
