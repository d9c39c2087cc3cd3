//go:build e2e

package main_test

import (
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"github.com/wsl2/wsl2/internal/testsys"
)

// TestInstalled: what `make install` puts somewhere finds all its parts there.
func TestInstalled(t *testing.T) {
	h := testsys.New(t)
	root := h.Path("root")
	make := exec.Command("make", "-C", "../..", "install", "DESTDIR="+root, "PREFIX=/usr")
	if out, err := make.CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	h.Exe = filepath.Join(root, "usr/bin/wsl2")
	if out := h.OK("--system", "-e", "echo", "hello"); out != "hello\n" {
		t.Errorf("%q", out)
	}
	h.OK("--list", "--online") // by wsl2-verbs and wsl2-fetch
	for _, file := range []string{"man/man1/wsl2.1", "bash-completion/completions/wsl2", "zsh/site-functions/_wsl2", "fish/vendor_completions.d/wsl2.fish"} {
		if st, err := os.Stat(filepath.Join(root, "usr/share", file)); err != nil || st.Size() == 0 {
			t.Errorf("%s: %v", file, err)
		}
	}
}
