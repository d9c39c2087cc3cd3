package main

import (
	"strings"
	"testing"
)

// TestPortsRefuses: what asks no service.
func TestPortsRefuses(t *testing.T) {
	for want, args := range map[string][]string{
		"exclude each other":    {"ports", "--publish", "a:1", "--unpublish", "a:1"},
		"--address goes with":   {"ports", "--address", "127.0.0.1"},
		"--allow goes with":     {"ports", "--unpublish", "a:1", "--allow", "::1"},
		"--follow only lists":   {"ports", "--follow", "--publish", "a:1"},
		"want DISTRO:PORT":      {"ports", "--publish", "debian"},
		`"0" is no port`:        {"ports", "--unpublish", "debian:0"},
		"no address to listen":  {"ports", "--publish", "a:1", "--address", "x"},
		"no address or network": {"ports", "--publish", "a:1", "--allow", "10.0.0.0/8,x"},
		"line argument: more":   {"ports", "more"},
	} {
		if _, err := verbApp(t, args...); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%q: %v, want %q", args, err, want)
		}
	}
}

func TestTable(t *testing.T) {
	var b strings.Builder
	if err := table(&b, [][]string{{"A", "LONG", ""}, {"longer", "x", "a note that is long"}, {"y", "z", ""}}); err != nil {
		t.Fatal(err)
	}
	if want := "A       LONG\nlonger  x     a note that is long\ny       z\n"; b.String() != want {
		t.Errorf("%q, want %q", b.String(), want)
	}
}
