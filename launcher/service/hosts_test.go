package service

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func TestHostEntries(t *testing.T) {
	path := filepath.Join(t.TempDir(), "hosts")
	write := func(text string) {
		t.Helper()
		if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	if got := hostEntries(path, "box"); got != "" {
		t.Errorf("of no file: %q", got)
	}
	write(`127.0.0.1	localhost localhost.localdomain dev.example
127.0.1.1	box.example.org	box
::1 ip6-localhost ip6-loopback localhost6
  192.0.2.7   nas   NAS.example # the cellar
#192.0.2.8 gone
192.0.2.9
not-an-address name
2001:db8::1%eth0 scoped
fe00::0 ip6-localnet
192.0.2.10 last`)
	const want = "127.0.0.1\tdev.example\n192.0.2.7\tnas NAS.example\n2001:db8::1%eth0\tscoped\n192.0.2.10\tlast\n"
	if got := hostEntries(path, "box.example.org"); got != want {
		t.Errorf("%q\nwant %q", got, want)
	}
	// Of a long one, whole lines.
	line := "192.0.2.1\tblocked.example\n"
	write(strings.Repeat(line, 1+maxHosts/len(line)))
	if got := hostEntries(path, "box"); got != strings.Repeat(line, maxHosts/len(line)) {
		t.Errorf("%d bytes, want %d", len(got), maxHosts/len(line)*len(line))
	}
}

func FuzzHosts(f *testing.F) {
	f.Add("127.0.0.1 localhost a # b\n::1 ip6-x\n", "box.example")
	f.Fuzz(func(t *testing.T, text, hostname string) {
		once := parseHosts(text, hostname)
		if twice := parseHosts(once, hostname); twice != once {
			t.Errorf("%q, read again %q", once, twice)
		}
	})
}
