package main

import (
	"bytes"
	"context"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/creack/pty"

	"github.com/wsl2/wsl2/cmd/internal/cmdline"
	"github.com/wsl2/wsl2/launcher/api"
)

// verbApp runs a verb that asks no service.
func verbApp(t *testing.T, args ...string) (string, error) {
	t.Helper()
	inv, err := cmdline.Parse(args)
	if err != nil {
		return "", err
	}
	var out strings.Builder
	a := &app{ctx: t.Context(), in: os.Stdin, out: &out, err: io.Discard}
	err = runVerb(a, inv)
	return out.String(), err
}

func TestHelp(t *testing.T) {
	help, err := verbApp(t, "--help")
	if err != nil {
		t.Fatal(err)
	}
	for _, v := range cmdline.Verbs {
		if strings.Contains(help, "\n  "+v.Long) == v.Hidden && len(v.Also) == 0 {
			t.Errorf("%s: hidden %v", v.Long, v.Hidden)
		}
		for _, o := range v.Options {
			if !strings.Contains(help, "--"+o.Long) {
				t.Errorf("%s of %s is not in the help", o.Long, v.Long)
			}
		}
	}
	for _, l := range strings.Split(help, "\n") {
		if len(l) > 80 {
			t.Errorf("a line of %d characters: %s", len(l), l)
		}
	}
	one, err := verbApp(t, "--list", "--help")
	if err != nil || !strings.Contains(one, "wsl2 --list") || !strings.Contains(one, "--verbose") {
		t.Errorf("--list --help: %v\n%s", err, one)
	}
	version, err := verbApp(t, "--version")
	if err != nil || version != "wsl2 "+api.Version+"\n" {
		t.Errorf("--version: %q, %v", version, err)
	}
}

// TestCompletion lets each shell complete lines by its script.
func TestCompletion(t *testing.T) {
	// What stands for wsl2 has two distros.
	const distros = "wsl2() { printf 'alpha\\nbeta\\n'; }\n"
	shells := map[string]func(t *testing.T, script, line string) string{
		"bash": func(t *testing.T, script, line string) string {
			return output(t, "bash", "--norc", "-c", script+distros+
				`COMP_WORDS=(`+line+`); COMP_CWORD=$((${#COMP_WORDS[@]}-1)); _wsl2; printf '%s\n' "${COMPREPLY[@]}"`)
		},
		"zsh": typed,
		"fish": func(t *testing.T, script, line string) string {
			out := output(t, "fish", "--no-config", "-c", script+"function wsl2; printf 'alpha\\nbeta\\n'; end; complete -C '"+line+"'")
			word, _, _ := strings.Cut(strings.TrimSpace(out), "\t") // its help
			return word
		},
	}
	for shell, complete := range shells {
		script, err := verbApp(t, "completion", shell)
		if err != nil {
			t.Fatal(err)
		}
		for line, want := range map[string]string{
			"wsl2 --term":                      "--terminate",
			"wsl2 --accel t":                   "tcg",
			"wsl2 -d b":                        "beta",
			"wsl2 --list --ver":                "--verbose",
			"wsl2 completion f":                "fish",
			"wsl2 --manage a":                  "alpha",
			"wsl2 ps b":                        "beta",
			"wsl2 ps --j":                      "--json",
			"wsl2 --export alpha f --format v": "vhdx",
		} {
			t.Run(shell+" "+line, func(t *testing.T) {
				if got := strings.TrimSpace(complete(t, script, line)); got != want {
					t.Errorf("%q, want %q", got, want)
				}
			})
		}
	}
	if _, err := verbApp(t, "completion", "tcsh"); err == nil {
		t.Error("tcsh has a script")
	}
}

// output runs a program, with a home of its own, and returns what it prints.
func output(t *testing.T, program string, args ...string) string {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), program, args...)
	cmd.Env = append(os.Environ(), "HOME="+t.TempDir())
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("%s (scripts/deps test installs it): %v: %s", program, err, out)
	}
	return string(out)
}

// typed has zsh complete a line that is typed at its prompt: its functions for completion
// work nowhere else. What it completed is what the command gets, its last word.
func typed(t *testing.T, script, line string) string {
	t.Helper()
	dir := t.TempDir()
	rc := "PS1='ready> '; autoload -Uz compinit; compinit -u -D\n" + script +
		"wsl2() { if [[ $* == '--list --quiet' ]]; then printf 'alpha\\nbeta\\n'; else print -r -- \"<${@[-1]}>\"; fi; }\n"
	if err := os.WriteFile(filepath.Join(dir, ".zshrc"), []byte(rc), 0o600); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, "zsh", "-i")
	cmd.Env = append(os.Environ(), "ZDOTDIR="+dir, "TERM=dumb")
	f, err := pty.Start(cmd)
	if err != nil {
		t.Fatalf("zsh (scripts/deps test installs it): %v", err)
	}
	defer cmd.Wait() //nolint:errcheck // killed
	defer f.Close()
	defer cmd.Process.Kill() //nolint:errcheck // it may have ended
	var seen []byte
	until := func(text string) {
		t.Helper()
		one := make([]byte, 1)
		for !bytes.HasSuffix(seen, []byte(text)) {
			if _, err := f.Read(one); err != nil {
				t.Fatalf("%q does not come: %v: %q", text, err, seen)
			}
			seen = append(seen, one[0])
		}
	}
	until("ready> ")
	io.WriteString(f, line+"\t\r") //nolint:errcheck // the read tells
	until(">\r\n")
	return string(seen[bytes.LastIndexByte(seen, '<')+1 : len(seen)-len(">\r\n")])
}

func TestListOptionsExclude(t *testing.T) {
	if _, err := verbApp(t, "--list", "--quiet", "--verbose"); err == nil {
		t.Error("--quiet --verbose")
	}
	if _, err := verbApp(t, "--list", "--all", "--running"); err == nil {
		t.Error("--all --running")
	}
}

func TestBytesText(t *testing.T) {
	for n, want := range map[int64]string{0: "0 B", 1023: "1023 B", 1536: "1.5 KiB", 100 << 20: "100 MiB", 5 << 40: "5.0 TiB", 5000 << 40: "5000 TiB"} {
		if got := bytesText(n); got != want {
			t.Errorf("%d: %q, want %q", n, got, want)
		}
	}
}
