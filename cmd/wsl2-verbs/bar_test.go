package main

import (
	"bytes"
	"io"
	"strings"
	"testing"
	"time"

	"github.com/creack/pty"
)

func TestBar(t *testing.T) {
	master, tty, err := pty.Open()
	if err != nil {
		t.Fatal(err)
	}
	defer master.Close()
	if err := pty.Setsize(master, &pty.Winsize{Rows: 24, Cols: 120}); err != nil {
		t.Fatal(err)
	}
	var shown bytes.Buffer
	expect := func(texts ...string) {
		t.Helper()
		one := make([]byte, 4096)
		for _, text := range texts {
			for !strings.Contains(shown.String(), text) {
				n, err := master.Read(one)
				if shown.Write(one[:n]); err != nil {
					t.Fatalf("%q does not come: %q", text, shown.String())
				}
			}
		}
		shown.Reset()
	}
	b := newBar(tty, "exporting debian")
	b.update("reading", 90<<20, 1000<<20)
	if b.line != nil {
		t.Error("it is shown within the first second")
	}
	b.began = b.began.Add(-2 * time.Second)
	b.update("reading", 250<<20, 1000<<20)
	expect("exporting debian: reading [", "25 % of 1000.0 MiB", " MiB/s, ", "s left")
	b.update("reading", 1000<<20, 1000<<20)
	expect("100 %")
	b.update("writing", 1<<40, 0)
	expect("exporting debian: writing 1.0 TiB", "/s")
	b.finish()
	// What the last line was on is empty, and free for others.
	io.WriteString(tty, "next")
	expect("\x1b[Jnext")
	tty.Close()

	var out bytes.Buffer
	quiet := newBar(&out, "x")
	quiet.update("x", 1, 2)
	quiet.began = time.Unix(1, 0)
	quiet.update("x", 1, 2)
	if quiet.finish(); out.Len() != 0 {
		t.Errorf("not on a terminal: %q", out.String())
	}
}
