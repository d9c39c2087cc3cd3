package main

import (
	"errors"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
)

// fetcher is a wsl2-fetch that does what a script says.
func fetcher(t *testing.T, script string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "wsl2-fetch")
	if err := os.WriteFile(path, []byte("#!/bin/sh\n"+script), 0o755); err != nil {
		t.Fatal(err)
	}
	return path
}

func TestFetch(t *testing.T) {
	for _, c := range []struct{ name, script, out, says string }{
		{"good", `echo '{"name":"small","total":7}' >&3; echo '{"done":3,"total":7}' >&3; echo archive`, "archive\n", ""},
		{"fails at once", `echo '{"error":"no such image"}' >&3; exit 1`, "", "no such image"},
		{"fails in the middle", `echo '{"name":"small"}' >&3; echo half; echo '{"error":"the network is gone"}' >&3; exit 1`, "half\n", "the network is gone"},
		{"dies", `echo '{"name":"small"}' >&3; echo half; echo oops >&2; kill -9 $$`, "half\n", "oops"},
		{"a notice first", `echo '{"notice":"slow today"}' >&3; echo '{"name":"small"}' >&3; echo archive`, "archive\n", ""},
		{"says nothing", `echo archive`, "archive\n", ""},
		{"nonsense", `echo nonsense >&3; echo archive`, "archive\n", "wsl2-fetch"},
	} {
		t.Run(c.name, func(t *testing.T) {
			notices := ""
			f, err := startFetch(t.Context(), fetcher(t, c.script), nil, func(s string) { notices += s }, func(int64, int64) {})
			if err != nil {
				t.Fatal(err)
			}
			out, err := io.ReadAll(f)
			if string(out) != c.out || (err == nil) != (c.says == "") || err != nil && !strings.Contains(err.Error(), c.says) {
				t.Errorf("%q, %v", out, err)
			}
			cerr := f.Close()
			if (cerr == nil) != (c.says == "") {
				t.Errorf("Close: %v", cerr)
			}
			if strings.Contains(c.script, `"small"`) && f.Name != "small" || strings.Contains(c.script, "notice") && notices != "slow today" {
				t.Errorf("name %q, notices %q", f.Name, notices)
			}
		})
	}
	if _, err := startFetch(t.Context(), "/no/such/program", nil, nil, nil); !errors.Is(err, os.ErrNotExist) {
		t.Error(err)
	}
}

// Close ends a program that would go on.
func TestFetchClosed(t *testing.T) {
	f, err := startFetch(t.Context(), fetcher(t, `echo '{"name":"small"}' >&3; echo $$; exec sleep 100000`), nil, func(string) {}, nil)
	if err != nil {
		t.Fatal(err)
	}
	pid := make([]byte, 16)
	n, err := f.Read(pid)
	if err != nil {
		t.Fatal(err)
	}
	if f.Close() == nil {
		t.Error("it was not ended")
	}
	if err := exec.Command("kill", "-0", strings.TrimSpace(string(pid[:n]))).Run(); err == nil {
		t.Error("it lives:", syscall.ESRCH)
	}
}
