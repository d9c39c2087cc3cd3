package main

import (
	"os"
	"testing"
)

// TestParsePlace: which side a path is on.
func TestParsePlace(t *testing.T) {
	dir, err := os.Getwd()
	if err != nil {
		t.Fatal(err)
	}
	for arg, want := range map[string]place{
		"debian:/etc/hosts": {"debian", "/etc/hosts"},
		"debian:/":          {"debian", "/"},
		"debian:/a:b":       {"debian", "/a:b"},
		"/etc/a:b":          {"", "/etc/a:b"},
		"./a:b":             {"", dir + "/a:b"},
		"a/b:/c":            {"", dir + "/a/b:/c"},
		"file":              {"", dir + "/file"},
		"dir/":              {"", dir + "/dir/"},
		":/x":               {"", dir + "/:/x"},
	} {
		if got, err := parsePlace(arg); err != nil || got != want {
			t.Errorf("%s: %+v, %v; want %+v", arg, got, err, want)
		}
	}
	for _, arg := range []string{"debian:", "debian:etc/hosts"} {
		if got, err := parsePlace(arg); err == nil {
			t.Errorf("%s: %+v", arg, got)
		}
	}
}
