package wslconf

import (
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"syscall"
	"testing"
	"time"
)

func TestParse(t *testing.T) {
	c, warnings := Parse(`
[automount]
enabled = false
mountFsTab = false   # none of ours
[filesystem]
umask = 077
[network]
hostname = box.example
generateHosts = 0
GenerateResolvConf = FALSE
[user]
default = alice
[boot]
command = "echo a # b; echo \"c\""
systemd = true
initTimeout = 300000
keepAlive = true
protectBinfmt = false
[time]
useWindowsTimezone = false
[interop]
enabled = false
appendWindowsPath = false
[shares]
Host = RO
data = none
src = rw
`)
	if len(warnings) != 0 {
		t.Errorf("warnings: %q", warnings)
	}
	want := Config{Umask: 0o77, Hostname: "box.example", DefaultUser: "alice", Command: `echo a # b; echo "c"`,
		Systemd: true, InitTimeout: 5 * time.Minute, KeepAlive: true,
		Shares: map[string]string{"host": ReadOnly, "data": None}}
	if !reflect.DeepEqual(c, want) {
		t.Errorf("%+v\nwant %+v", c, want)
	}
	if c, warnings := Parse(""); !reflect.DeepEqual(c, Defaults()) || len(warnings) != 0 {
		t.Errorf("nothing: %+v %q", c, warnings)
	}
}

// TestParseWarns: a mistake is told with its line, and the default holds.
func TestParseWarns(t *testing.T) {
	for text, want := range map[string]string{
		"[boot]\nsytemd=true":               "Unknown key 'boot.sytemd' (did you mean 'boot.systemd'?) in /etc/wsl.conf:2",
		"[network]\nsystemd=true":           "did you mean 'boot.systemd'",
		"[boot]\nsystemd=maybe":             "Invalid boolean value 'maybe' for key 'systemd' in /etc/wsl.conf:2",
		"[boot]\ninitTimeout=-1":            "Invalid number of milliseconds '-1'",
		"[boot]\ninitTimeout=99999999999":   "Invalid number of milliseconds",
		"[filesystem]\numask=01000":         "Invalid umask '01000'",
		"[boot]\ncommand=\\q":               `Invalid escape '\q' for key 'command'`,
		"[automount]\nmountFsTab=no":        "Invalid boolean value 'no'",
		"[boot]\nsystemd=false\nsystemd=1":  "Duplicated config key 'boot.systemd'",
		"[boot":                             "Invalid section",
		"[boot]\nsystemd":                   "Expected 'key = value'",
		"[boot]\ncommand=\"open":            `Expected '"' for key 'command'`,
		"[experimental]\nautoMemoryReclaim": "Expected",
	} {
		c, warnings := Parse(text)
		if len(warnings) != 1 || !strings.Contains(warnings[0], want) {
			t.Errorf("%q: %q", text, warnings)
		}
		if !reflect.DeepEqual(c, Defaults()) {
			t.Errorf("%q: %+v", text, c)
		}
	}
}

// TestSharesAreNarrowed: what is not clearly more is less.
func TestSharesAreNarrowed(t *testing.T) {
	c, warnings := Parse("[shares]\nhost=/etc\ndata = ro")
	if want := map[string]string{"host": None, "data": ReadOnly}; !reflect.DeepEqual(c.Shares, want) || len(warnings) != 1 || !strings.Contains(warnings[0], "wsl.conf:2") {
		t.Errorf("%v, warnings %q", c.Shares, warnings)
	}
}

// TestInterop: whether programs of the host may run. What is not clearly a yes is a no.
func TestInterop(t *testing.T) {
	for text, want := range map[string]bool{
		"":                                   true,
		"[interop]\nenabled=false\n":         false,
		"[interop]\nenabled = false # off\n": false,
		"[INTEROP]\nEnabled=FALSE":           false,
		" [ interop ] \r\n enabled = \"false\" \r\n":          false,
		"[interop] # of the host\nenabled=false":              false,
		"[interop]\nenabled=0\n":                              false,
		"[interop]\nenabled=1\n":                              true,
		"[interop]\nenabled=true\n":                           true,
		"[interop]\nenabled=no\n":                             false,
		"[interop]\nenabled=\n":                               false,
		"[interop]\nenabled=\\q\n":                            false,
		"[interop]\nenabled=\"true\n":                         false,
		"[interop]\nenabled=tru\nenabled=true":                false,
		"[interop]\n#enabled=false\n":                         true,
		"[boot]\nenabled=false\n":                             true,
		"enabled=false\n":                                     true,
		"[interop]\nenabled=true\nenabled=false":              true,
		"[interop]\n[boot]\nenabled=false":                    true,
		"[boot]\n[interop]\nother\nenabled=false":             false,
		"[boot]\ncommand=a \\\n  b\n[interop]\nenabled=0":     false,
		"[boot]\ncommand=a # b \\\n[interop]\nenabled=0":      false,
		"[boot]\ncommand=\"a\\\\\"\n[interop]\nenabled=fAlSe": false,
	} {
		if c, _ := Parse(text); c.Interop != want {
			t.Errorf("%q: %v", text, c.Interop)
		}
	}
}

func TestCleanHostname(t *testing.T) {
	for name, want := range map[string]string{
		"box": "box", "Box-1.example.org": "Box-1.example.org", "my box_1": "mybox1", "-.box.-": "box", "a..b": "a.b", "a.-b": "a.-b",
		"": "localhost", "...": "localhost", "käse": "kse", "a\nb": "ab",
		strings.Repeat("a", 63) + "-b": strings.Repeat("a", 63), strings.Repeat("b", 100): strings.Repeat("b", 64),
	} {
		if got := CleanHostname(name); got != want {
			t.Errorf("%q: %q, want %q", name, got, want)
		}
	}
}

func TestRead(t *testing.T) {
	root := t.TempDir()
	if c, warnings := Read(root); !reflect.DeepEqual(c, Defaults()) || len(warnings) != 0 {
		t.Errorf("no file: %+v %q", c, warnings)
	}
	file := filepath.Join(root, Path)
	if err := os.Mkdir(filepath.Dir(file), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(file, []byte("[user]\ndefault=alice"), 0o644); err != nil {
		t.Fatal(err)
	}
	if c, warnings := Read(root); c.DefaultUser != "alice" || len(warnings) != 0 {
		t.Errorf("%+v %q", c, warnings)
	}
	// What cannot be read neither holds us up nor turns programs of the host on.
	for what, make := range map[string]func() error{
		"a FIFO":      func() error { return syscall.Mkfifo(file, 0o644) },
		"a directory": func() error { return os.Mkdir(file, 0o755) },
		"too large":   func() error { return os.WriteFile(file, []byte(strings.Repeat("#\n", maxFile)), 0o644) },
	} {
		if err := os.Remove(file); err != nil {
			t.Fatal(err)
		}
		if err := make(); err != nil {
			t.Fatal(err)
		}
		if c, warnings := Read(root); c.Interop || len(warnings) != 1 {
			t.Errorf("%s: %+v %q", what, c, warnings)
		}
	}
}

// TestDocumented: the page of settings names every key that is not warned of, and
// what may be meant is what there is.
func TestDocumented(t *testing.T) {
	page, err := os.ReadFile("../../docs/settings.md")
	if err != nil {
		t.Fatal(err)
	}
	text := strings.ToLower(string(page))
	for name := range keys {
		if !strings.Contains(text, "| "+name+" |") {
			t.Errorf("docs/settings.md has no row for %s", name)
		}
	}
	for name := range elsewhere {
		if !strings.Contains(text, name) {
			t.Errorf("docs/settings.md lacks %s", name)
		}
	}
	for _, name := range names {
		if _, ok := keys[strings.ToLower(name)]; !ok {
			t.Errorf("no key %s", name)
		}
	}
	if len(names) != len(keys) {
		t.Errorf("%d keys, of which %d may be meant", len(keys), len(names))
	}
}

// FuzzParse: the file may hold anything; what comes out is usable.
func FuzzParse(f *testing.F) {
	f.Add("[interop]\nenabled=false\n")
	f.Add("[network]\nhostname=-a..b_\n[filesystem]\numask=0x1ff\n[boot]\ninitTimeout=07\n")
	f.Fuzz(func(t *testing.T, text string) {
		c, warnings := Parse(text)
		if c.Umask < 0 || c.Umask > 0o777 || c.InitTimeout < 0 || len(c.Hostname) > maxHostname {
			t.Errorf("%+v", c)
		}
		if c.Hostname != "" && CleanHostname(c.Hostname) != c.Hostname {
			t.Errorf("host name %q", c.Hostname)
		}
		for _, w := range warnings {
			if !strings.Contains(w, " in "+Path+":") {
				t.Errorf("warning %q", w)
			}
		}
	})
}
