package main

import (
	"io"
	"os"
	"os/exec"
	"strings"
	"testing"

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

// TestCompletion lets the shells that are here read their scripts.
func TestCompletion(t *testing.T) {
	for _, shell := range []string{"bash", "zsh", "fish"} {
		script, err := verbApp(t, "completion", shell)
		if err != nil || !strings.Contains(script, "terminate") || !strings.Contains(script, "wsl2 --list --quiet") {
			t.Errorf("%s: %v\n%s", shell, err, script)
		}
	}
	if _, err := verbApp(t, "completion", "tcsh"); err == nil {
		t.Error("tcsh has a script")
	}
	script, _ := verbApp(t, "completion", "bash")
	for line, want := range map[string]string{
		"wsl2 --term":       "--terminate\n",
		"wsl2 --accel t":    "tcg\n",
		"wsl2 -d b":         "beta\n",
		"wsl2 --list --qu":  "--quiet\n",
		"wsl2 completion f": "fish\n",
	} {
		program := script + `
wsl2() { printf 'alpha\nbeta\n'; }
COMP_WORDS=(` + line + `); COMP_CWORD=$((${#COMP_WORDS[@]}-1)); _wsl2; printf '%s\n' "${COMPREPLY[@]}"`
		out, err := exec.Command("bash", "-c", program).CombinedOutput()
		if err != nil || string(out) != want {
			t.Errorf("%q completes to %q, %v; want %q", line, out, err, want)
		}
	}
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
