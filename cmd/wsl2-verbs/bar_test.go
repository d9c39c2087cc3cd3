package main

import (
	"bytes"
	"strings"
	"testing"
	"time"
)

func TestBar(t *testing.T) {
	var out bytes.Buffer
	now := time.Unix(1000, 0)
	b := &bar{w: &out, title: "exporting debian", term: true, now: func() time.Time { return now }}
	b.update("reading", 0, 1000<<20)
	now = now.Add(900 * time.Millisecond)
	b.update("reading", 90<<20, 1000<<20)
	if out.Len() != 0 {
		t.Errorf("within the first second: %q", out.String())
	}
	now = now.Add(1100 * time.Millisecond)
	b.update("reading", 250<<20, 1000<<20)
	want := "\r\x1b[Kexporting debian: reading [######..................] 25 % of 1000 MiB, 125 MiB/s, 6s left"
	if out.String() != want {
		t.Errorf("%q\nwant %q", out.String(), want)
	}
	b.update("reading", 260<<20, 1000<<20) // too soon
	if out.String() != want {
		t.Errorf("drawn again at once: %q", out.String())
	}
	now = now.Add(time.Second)
	b.update("writing", 1<<40, 0)
	if !strings.Contains(out.String(), "writing 1.0 TiB") {
		t.Errorf("%q", out.String())
	}
	out.Reset()
	if b.finish(); out.String() != "\r\x1b[K" {
		t.Errorf("%q", out.String())
	}
	quiet := newBar(&out, "x")
	quiet.began = time.Unix(1, 0)
	out.Reset()
	quiet.update("x", 1, 2)
	if quiet.finish(); out.Len() != 0 {
		t.Errorf("not on a terminal: %q", out.String())
	}
}

func TestBytesText(t *testing.T) {
	for n, want := range map[int64]string{0: "0 B", 1023: "1023 B", 1536: "1.5 KiB", 100 << 20: "100 MiB", 5 << 40: "5.0 TiB", 5000 << 40: "5000 TiB"} {
		if got := bytesText(n); got != want {
			t.Errorf("%d: %q, want %q", n, got, want)
		}
	}
}
