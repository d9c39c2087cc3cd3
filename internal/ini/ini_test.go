package ini

import (
	"fmt"
	"strings"
	"testing"
)

func TestParse(t *testing.T) {
	text := "\ufeff# comment\n; another\n[ Boot ]\r\nsystemd = true\n  COMMAND=\"echo \\\"a # b\\\"\\n\" \n[user]\ndefault=alice\ndefault=bob\nno value\n[broken\nx=\\q\nlong = one \\\n  two\nempty=\n" +
		"inline = 4GB   # of the VM \\\nhash=\" a # b \" # c\nquotes=echo \"a b\" '#\nopen=\"a\n[net] # here\nescaped=\\\"#\n"
	entries, problems := Parse(text)
	got := fmt.Sprint(entries, problems)
	want := `[{Boot systemd true 4} {Boot COMMAND echo "a # b"` + "\n" + ` 5} {user default alice 7} {user long one two 12} {user empty  14} {user inline 4GB 15} {user hash  a # b  16} {user quotes echo a b ' 17} {net escaped " 20}]` +
		`[{Duplicated config key 'user.default' 8 } {Expected 'key = value', found 'no value' 9 } {Invalid section '[broken' 10 } {Invalid escape '\q' for key 'x' 11 user.x} {Expected '"' for key 'open' 18 user.open}]`
	if got != strings.ReplaceAll(want, "][", " ] [") && got != strings.ReplaceAll(want, "][", "] [") {
		t.Errorf("%s\nwant %s", got, want)
	}
	if entries[1].Name() != "boot.command" {
		t.Error(entries[1].Name())
	}
}

func TestUnknown(t *testing.T) {
	known := []string{"boot.systemd", "boot.command", "network.hostname", "user.default"}
	for _, c := range []struct{ section, key, want string }{
		{"boot", "sytemd", "boot.systemd"},
		{"Boot", "SystemD_", "boot.systemd"},
		{"network", "systemd", "boot.systemd"},
		{"user", "defualt", "user.default"},
		{"", "hostname", "network.hostname"},
		{"interop", "something", ""},
		{strings.Repeat("x", 200), "y", ""},
	} {
		got := Unknown(Entry{Section: c.section, Key: c.key}, known)
		_, hint, found := strings.Cut(got, "did you mean '")
		if found != (c.want != "") || found && !strings.HasPrefix(hint, c.want+"'") {
			t.Errorf("%s.%s: %q", c.section, c.key, got)
		}
	}
}

func FuzzParse(f *testing.F) {
	f.Add("[a]\nb = \"c\\n\"\\\nd\n")
	f.Add("[")
	f.Add("\\")
	f.Add("\\\n\n\\\n")
	f.Fuzz(func(t *testing.T, text string) {
		entries, problems := Parse(text)
		lines := strings.Count(text, "\n") + 1
		for _, e := range entries {
			if e.Line < 1 || e.Line > lines {
				t.Errorf("%+v in a text of %d lines", e, lines)
			}
			Unknown(e, []string{"wsl2.memory"})
		}
		if len(entries)+len(problems) > lines {
			t.Errorf("%d entries and problems in %d lines", len(entries)+len(problems), lines)
		}
	})
}
