package main

import (
	"fmt"
	"io"
	"os"
	"strings"
	"sync"
	"time"

	"golang.org/x/term"
)

// bar shows how far a long piece of work is, on a line that is drawn over: what
// is done, a bar, the rate and the time left. Not on a terminal, and in the first second, it
// is quiet. It may be used by several goroutines.
//
// It is our own because the libraries for this compile regular expressions at each
// start or link an HTTP server, for what these lines do.
type bar struct {
	w     io.Writer
	title string
	term  bool
	now   func() time.Time // time.Now, but for tests

	mu    sync.Mutex
	what  string // the step under way; this and what follows guarded by mu
	began time.Time
	drawn time.Time
	shown bool
}

func newBar(w io.Writer, title string) *bar {
	b := &bar{w: w, title: title, now: time.Now}
	if f, ok := w.(*os.File); ok {
		b.term = term.IsTerminal(int(f.Fd()))
	}
	return b
}

const (
	barEvery = 100 * time.Millisecond
	// barQuiet is what may pass without a word.
	barQuiet = time.Second
	barWidth = 24
)

// update draws the bar for a step, done of total bytes (0: not known).
func (b *bar) update(what string, done, total int64) {
	if !b.term {
		return
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	now := b.now()
	if what != b.what || b.began.IsZero() {
		b.what, b.began = what, now
	}
	if now.Sub(b.began) < barQuiet && !b.shown || now.Sub(b.drawn) < barEvery {
		return
	}
	b.drawn, b.shown = now, true
	fmt.Fprintf(b.w, "\r\x1b[K%s: %s", b.title, progressText(what, done, total, now.Sub(b.began)))
}

// progressText is what a bar's line says.
func progressText(what string, done, total int64, elapsed time.Duration) string {
	rate := float64(done) / max(elapsed.Seconds(), 0.001)
	text := fmt.Sprintf("%s %s, %s/s", what, bytesText(done), bytesText(int64(rate)))
	if total <= 0 {
		return text
	}
	done = min(done, total)
	n := int(done * barWidth / total)
	text = fmt.Sprintf("%s [%s%s] %d %% of %s, %s/s", what, strings.Repeat("#", n), strings.Repeat(".", barWidth-n), done*100/total, bytesText(total), bytesText(int64(rate)))
	if rate > 0 {
		left := time.Duration(float64(total-done) / rate * float64(time.Second)).Round(time.Second)
		text += fmt.Sprintf(", %v left", left)
	}
	return text
}

// bytesText is a size for people, in WSL's units (1024).
func bytesText(n int64) string {
	units := []string{"B", "KiB", "MiB", "GiB", "TiB"}
	f, i := float64(n), 0
	for f >= 1024 && i < len(units)-1 {
		f, i = f/1024, i+1
	}
	if i == 0 || f >= 100 {
		return fmt.Sprintf("%.0f %s", f, units[i])
	}
	return fmt.Sprintf("%.1f %s", f, units[i])
}

// finish takes the bar away.
func (b *bar) finish() {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.shown {
		fmt.Fprint(b.w, "\r\x1b[K")
		b.shown = false
	}
}
