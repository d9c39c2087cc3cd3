package logtail

import (
	"bytes"
	"errors"
	"fmt"
	"strings"
	"sync"
	"testing"
	"unicode"
	"unicode/utf8"
)

func TestTail(t *testing.T) {
	b := New(1<<10, nil)
	if got := b.Tail(5); got != "" {
		t.Errorf("empty: %q", got)
	}
	fmt.Fprint(b, "one\ntwo\r\nthree\n\nfour")
	for n, want := range []string{"", "four", "\nfour", "three\n\nfour", "two\nthree\n\nfour", "one\ntwo\nthree\n\nfour", "one\ntwo\nthree\n\nfour"} {
		if got := b.Tail(n); got != want {
			t.Errorf("Tail(%d) = %q, want %q", n, got, want)
		}
	}
	fmt.Fprint(b, " and a half\n\n\n")
	if got := b.Tail(1); got != "four and a half" {
		t.Errorf("Tail(1) = %q", got)
	}
}

func TestRing(t *testing.T) {
	for size := 1; size < 40; size++ {
		for step := 1; step < 60; step++ {
			b := New(size, nil)
			var all strings.Builder
			for i := range 30 {
				p := fmt.Sprintf("%0*d\n", step, i)
				all.WriteString(p)
				if n, err := b.Write([]byte(p)); n != len(p) || err != nil {
					t.Fatal(n, err)
				}
			}
			end := all.String()[max(0, all.Len()-size):]
			want := strings.TrimRight(end, "\n")
			if _, rest, ok := strings.Cut(want, "\n"); ok {
				want = rest
			}
			if got := b.Tail(1000); got != want {
				t.Fatalf("size %d, lines of %d: %q, want %q", size, step, got, want)
			}
		}
	}
}

func TestCleaning(t *testing.T) {
	for _, tc := range []struct{ in, want string }{
		{"plain\ttext ~", "plain\ttext ~"},
		{"\x1b[1;31mred\x1b[0m", "red"},
		{"\x1b]0;title\x07after", "after"},
		{"\x1b]0;title\x1b\\after", "after"},
		{"\x1b]52;c;ZXZpbA==\x1b\x1b\\after", "after"},
		{"\x1bPdcs\x1b\\a\x1b_apc\x1b\\b\x1b^pm\x1b\\c\x1bXsos\x1b\\d", "abcd"},
		{"\x1b]0;never ended\nnext line", "\nnext line"},
		{"\x1b[12\nnext line", "\nnext line"},
		{"\x1b(Bx\x1b7y\x1bcz", "xyz"},
		{"\x1b\x1b[2Jx", "x"},
		{"a\x00\x07\x08\x0b\x0c\x0e\x7fb\rc", "abc"},
		{"ünïcödé 日本 ✓", "ünïcödé 日本 ✓"},
		{"c1 \u009b31m csi", "c1 31m csi"},
		{"bidi \u202egpj.exe", "bidi gpj.exe"},
		{"zero\u200bwidth", "zerowidth"},
		{"bad \xff\xfe\xc3( \x80\xbf end", "bad (  end"},
		{"bad \xe6\x97\nend", "bad \nend"},
		{"\x9b31mraw c1", "31mraw c1"},
	} {
		whole, bytewise := New(1<<10, nil), New(1<<10, nil)
		fmt.Fprint(whole, tc.in)
		for i := range len(tc.in) {
			fmt.Fprint(bytewise, tc.in[i:i+1])
		}
		if got := whole.Tail(100); strings.TrimSpace(got) != strings.TrimSpace(tc.want) {
			t.Errorf("%q became %q, want %q", tc.in, got, tc.want)
		}
		if a, b := whole.Tail(100), bytewise.Tail(100); a != b {
			t.Errorf("%q: %q at once, %q byte by byte", tc.in, a, b)
		}
	}
}

func TestCutInsideACharacter(t *testing.T) {
	b := New(5, nil)
	fmt.Fprint(b, "日本語") // the ring keeps the last 5 of 9 bytes
	if got := b.Tail(1); got != "語" {
		t.Errorf("%q", got)
	}
}

type failing struct {
	bytes.Buffer
	left int
}

func (f *failing) Write(p []byte) (int, error) {
	if f.left == 0 {
		return 0, errors.New("boom")
	}
	f.left--
	return f.Buffer.Write(p)
}

func TestTee(t *testing.T) {
	tee := &failing{left: 2}
	b := New(8, tee)
	for range 5 {
		fmt.Fprint(b, "\x1b[31mlonger than the ring\n")
	}
	if got := tee.String(); got != "longer than the ring\nlonger than the ring\n" {
		t.Errorf("%q", got)
	}
	if got := b.Tail(1); got != "he ring" {
		t.Errorf("%q", got)
	}
}

func TestConcurrentUse(t *testing.T) {
	b := New(100, nil)
	var wg sync.WaitGroup
	for range 4 {
		wg.Add(2)
		go func() {
			defer wg.Done()
			for range 500 {
				fmt.Fprintln(b, "0123456789")
			}
		}()
		go func() {
			defer wg.Done()
			for range 500 {
				for line := range strings.SplitSeq(b.Tail(3), "\n") {
					if line != "" && line != "0123456789" {
						t.Errorf("torn line %q", line)
					}
				}
			}
		}()
	}
	wg.Wait()
}

// FuzzBuffer: nothing but printable characters, tabs and newlines comes out,
// however the bytes are split.
func FuzzBuffer(f *testing.F) {
	f.Add([]byte("\x1b[31mred\x1b]0;t\x07\xe6\x97\xa5\xff\n"), uint8(3))
	f.Fuzz(func(t *testing.T, p []byte, step uint8) {
		whole, pieces := New(1<<16, nil), New(1<<16, nil)
		_, _ = whole.Write(p)
		for rest := p; len(rest) > 0; {
			n := min(len(rest), int(step)+1)
			_, _ = pieces.Write(rest[:n])
			rest = rest[n:]
		}
		got := whole.Tail(1 << 16)
		if got != pieces.Tail(1<<16) {
			t.Fatalf("%q split into pieces of %d differs", p, int(step)+1)
		}
		if !utf8.ValidString(got) {
			t.Fatalf("%q is not UTF-8", got)
		}
		for _, r := range got {
			if r != '\n' && r != '\t' && !unicode.IsPrint(r) {
				t.Fatalf("%q passed", r)
			}
		}
	})
}
