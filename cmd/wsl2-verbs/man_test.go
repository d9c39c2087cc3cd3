package main

import (
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/wsl2/wsl2/cmd/internal/cmdline"
)

// TestManPage: the page has all that the help has, and no line that troff would take
// for a request.
func TestManPage(t *testing.T) {
	page, err := verbApp(t, "man")
	if err != nil {
		t.Fatal(err)
	}
	plain := strings.NewReplacer(`\-`, "-", `\fB`, "", `\fI`, "", `\fR`, "", `\e`, `\`).Replace(page)
	for _, o := range cmdline.RunOptions {
		if !strings.Contains(plain, "\n"+strings.TrimSpace(strings.Join(o.Names, ", ")+" "+o.Value)+"\n") {
			t.Errorf("%s is not there", o.Long)
		}
	}
	for _, v := range cmdline.Verbs {
		tag := strings.TrimSpace(strings.Join(append([]string{v.Long}, v.Also...), ", ") + " " + v.Args)
		_, about, there := strings.Cut(plain, "\n.TP\n"+tag+"\n")
		if there == v.Hidden {
			t.Errorf("%s: hidden %v, there %v", v.Long, v.Hidden, there)
		}
		for _, o := range v.Options {
			if !strings.Contains(about, "--"+o.Long) {
				t.Errorf("%s of %s is not there", o.Long, v.Long)
			}
		}
	}
	requests := []string{"TH", "SH", "TP", "RS", "RE", "B", "br", "nf", "fi", "PP"}
	for _, m := range regexp.MustCompile(`(?m)^[.'](\S*)`).FindAllStringSubmatch(page, -1) {
		if !slices.Contains(requests, m[1]) {
			t.Errorf("request %q", m[0])
		}
	}
	if strings.Count(page, "\n.RS\n") != strings.Count(page, "\n.RE\n") {
		t.Error("a verb's options do not end")
	}

	home := t.TempDir()
	t.Setenv("XDG_DATA_HOME", home)
	if _, err := verbApp(t, "man", "--install"); err != nil {
		t.Fatal(err)
	}
	if text, err := os.ReadFile(filepath.Join(home, "man/man1/wsl2.1")); err != nil || string(text) != page {
		t.Errorf("installed: %v", err)
	}
}

func TestRoff(t *testing.T) {
	for in, want := range map[string]string{".x\n'y": `\&.x` + "\n" + `\&'y`, `a-b\n`: `a\-b\en`} {
		if got := roff(in); got != want {
			t.Errorf("%q becomes %q, want %q", in, got, want)
		}
	}
}
