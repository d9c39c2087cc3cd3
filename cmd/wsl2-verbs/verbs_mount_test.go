package main

import (
	"strings"
	"testing"
)

// TestMountName: WSL's name, within what a directory's may be.
func TestMountName(t *testing.T) {
	for _, c := range []struct {
		path      string
		partition uint32
		want      string
	}{
		{"/dev/sdb", 0, "devsdb"},
		{"/dev/sdb", 3, "devsdbp3"},
		{"/home/ä b/Disk_1.img", 0, "homebDisk1img"},
		{"/" + strings.Repeat("x", 300) + "end", 12, strings.Repeat("x", maxMountName-3) + "endp12"},
	} {
		if got := mountName(c.path, c.partition); got != c.want {
			t.Errorf("%s, %d: %q, want %q", c.path, c.partition, got, c.want)
		}
	}
}

// TestMountRefuses: what asks no service.
func TestMountRefuses(t *testing.T) {
	for want, args := range map[string][]string{
		"--partition 0":  {"--mount", "/d", "--partition", "0"},
		"--partition x":  {"--mount", "/d", "--partition", "x"},
		"--bare and":     {"--mount", "/d", "--bare", "--partition", "1"},
		`--name "a/b"`:   {"--mount", "/d", "--name", "a/b"},
		`--name ".."`:    {"--mount", "/d", "--name", ".."},
		"--mount needs":  {"--mount"},
		"line argument:": {"--unmount", "/a", "/b"},
	} {
		if _, err := verbApp(t, args...); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%q: %v, want %q", args, err, want)
		}
	}
}
