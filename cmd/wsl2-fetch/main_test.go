package main

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/wsl2/wsl2/images"
	"github.com/wsl2/wsl2/images/oci"
)

// run runs the program's work with these arguments: what it writes and tells.
func run(t *testing.T, work func(f *fetcher) error) (out string, events []images.FetchEvent, err error) {
	t.Helper()
	outR, outW, perr := os.Pipe()
	if perr != nil {
		t.Fatal(perr)
	}
	stdout := os.Stdout
	os.Stdout = outW
	text := make(chan string)
	go func() { b, _ := io.ReadAll(outR); text <- string(b) }()
	var told strings.Builder
	err = work(&fetcher{events: json.NewEncoder(&told)})
	os.Stdout = stdout
	outW.Close()
	out = <-text
	for s := bufio.NewScanner(strings.NewReader(told.String())); s.Scan(); {
		var e images.FetchEvent
		if err := json.Unmarshal(s.Bytes(), &e); err != nil {
			t.Fatal(err)
		}
		events = append(events, e)
	}
	return out, events, err
}

// A registry that is not there is told from one that has no such image.
func TestUnreachable(t *testing.T) {
	t.Setenv("DOCKER_CONFIG", t.TempDir())
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	gone := l.Addr().String()
	l.Close()
	if _, err := oci.Resolve(context.Background(), gone+"/some/image"); !unreachable(err) {
		t.Error(err)
	}
	s := httptest.NewServer(http.NotFoundHandler())
	defer s.Close()
	if _, err := oci.Resolve(context.Background(), strings.TrimPrefix(s.URL, "http://")+"/some/image"); err == nil || unreachable(err) {
		t.Error(err)
	}
}

func TestBootstrap(t *testing.T) {
	bin := t.TempDir()
	t.Setenv("PATH", bin)
	why := errors.New("no route to the registry")
	if _, _, err := run(t, func(f *fetcher) error { return f.bootstrap(context.Background(), why) }); !errors.Is(err, why) || !strings.Contains(err.Error(), "mmdebstrap") {
		t.Error(err)
	}
	script := func(text string) {
		if err := os.WriteFile(filepath.Join(bin, "mmdebstrap"), []byte("#!/bin/sh\n"+text), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	script("echo an archive")
	out, events, err := run(t, func(f *fetcher) error { return f.bootstrap(context.Background(), why) })
	if err != nil || out != "an archive\n" || len(events) != 1 || events[0].Name != "debian" || !strings.Contains(events[0].Notice, why.Error()) {
		t.Errorf("%q %+v %v", out, events, err)
	}
	script("echo no mirror answers >&2; exit 1")
	if _, _, err := run(t, func(f *fetcher) error { return f.bootstrap(context.Background(), why) }); err == nil || !strings.Contains(err.Error(), "no mirror answers") {
		t.Error(err)
	}
}

func TestRun(t *testing.T) {
	file := filepath.Join(t.TempDir(), "f.wsl")
	if err := os.WriteFile(file, []byte("contents"), 0o600); err != nil {
		t.Fatal(err)
	}
	const sum = "d1b2a59fbea7e20077af9f91b27e95e865061b270be03ff539ab3b73587882e8"
	for _, c := range []struct {
		args      []string
		out, says string
	}{
		{[]string{"url", "file://" + file, "", t.TempDir()}, "contents", ""},
		{[]string{"url", "file://" + file, sum, t.TempDir()}, "contents", ""},
		{[]string{"url", "file://" + file, strings.Repeat("0", 64), t.TempDir()}, "", "SHA-256"},
		{[]string{"url", "file://" + file, "short", t.TempDir()}, "", "SHA-256"},
		{[]string{"url", "https://127.0.0.1:1/x", "", t.TempDir()}, "", "--sha256"},
		{[]string{"get", "x", "file:///no/such/list", t.TempDir()}, "", "/no/such/list"},
		{[]string{"nonsense"}, "", "not by hand"},
		{nil, "", "not by hand"},
	} {
		out, _, err := run(t, func(f *fetcher) error { return f.run(context.Background(), c.args) })
		if out != c.out || (err == nil) != (c.says == "") || err != nil && !strings.Contains(err.Error(), c.says) {
			t.Errorf("%q: %q, %v", c.args, out, err)
		}
	}
}
