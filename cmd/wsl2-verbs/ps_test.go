package main

import (
	"os"
	"path/filepath"
	"testing"
)

func TestProcessesOf(t *testing.T) {
	proc := t.TempDir()
	for pid, p := range map[string][3]string{
		"1":    {"pid:[1]", "Name:\tinit\nUid:\t0\t0\t0\t0\nNSpid:\t1\n", "/sbin/init\x00"},
		"500":  {"pid:[7]", "Name:\texe\nUid:\t700000\t0\t0\t0\nNSpid:\t500\t1\n", "wsl2-distro\x000\x00"},
		"9001": {"pid:[7]", "Name:\tsleep\nUid:\t701000\t0\t0\t0\nNSpid:\t9001\t12\n", "sleep\x00\x1b[2J\x00\x00"},
		"9000": {"pid:[7]", "Name:\tgone\nUid:\t700000\t0\t0\t0\nNSpid:\t9000\t13\n", ""},
		// A container in the distro: its own first process, that one's child, and what it has left to the distro.
		"9100": {"pid:[8]", "Name:\tsh\nPPid:\t9001\nUid:\t700000\t0\t0\t0\nNSpid:\t9100\t20\t1\n", "sh\x00"},
		"9101": {"pid:[8]", "Name:\tcat\nPPid:\t9100\nUid:\t700000\t0\t0\t0\nNSpid:\t9101\t21\t2\n", "cat\x00"},
		// One of the host's, as deep as the distro's.
		"9200": {"pid:[9]", "Name:\tother\nPPid:\t1\nUid:\t0\t0\t0\t0\nNSpid:\t9200\t1\n", "other\x00"},
		"self": {"pid:[7]", "", ""},
	} {
		dir := filepath.Join(proc, pid)
		for _, err := range []error{
			os.MkdirAll(filepath.Join(dir, "ns"), 0o755), os.Symlink(p[0], filepath.Join(dir, "ns/pid")),
			os.WriteFile(filepath.Join(dir, "status"), []byte(p[1]), 0o644), os.WriteFile(filepath.Join(dir, "cmdline"), []byte(p[2]), 0o644),
		} {
			if err != nil {
				t.Fatal(err)
			}
		}
	}
	got, err := processesOf(proc, 500)
	want := []process{{Host: 500, PID: 1, UID: 700000, Command: "wsl2-distro 0"}, {Host: 9001, PID: 12, UID: 701000, Command: "sleep ?[2J"}, {Host: 9000, PID: 13, UID: 700000, Command: "[gone]"},
		{Host: 9100, PID: 20, UID: 700000, Command: "sh"}, {Host: 9101, PID: 21, UID: 700000, Command: "cat"}}
	if err != nil || len(got) != len(want) {
		t.Fatalf("%+v, %v", got, err)
	}
	for i := range want {
		if got[i] != want[i] {
			t.Errorf("%+v, want %+v", got[i], want[i])
		}
	}
	if _, err := processesOf(proc, 4); err == nil {
		t.Error("an init that is not there has processes")
	}
}
