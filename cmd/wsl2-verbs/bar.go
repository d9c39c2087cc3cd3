package main

import (
	"io"
	"os"
	"sync"
	"time"

	"github.com/vbauerster/mpb/v8"
	"github.com/vbauerster/mpb/v8/decor"
	"golang.org/x/term"
)

// bar shows how far a long piece of work is: what is done, the rate and the time
// left. Not on a terminal, and in the first second, it is quiet. It may be used by several
// goroutines.
type bar struct {
	w     io.Writer
	title string
	term  bool

	mu    sync.Mutex
	what  string // the step under way; this and what follows guarded by mu
	began time.Time
	shown bool          // a step has been
	lines *mpb.Progress // nil unless this step is
	line  *mpb.Bar
}

func newBar(w io.Writer, title string) *bar {
	b := &bar{w: w, title: title}
	if f, ok := w.(*os.File); ok {
		b.term = term.IsTerminal(int(f.Fd()))
	}
	return b
}

// barQuiet is what may pass without a word.
const barQuiet = time.Second

// update draws the bar for a step, done of total bytes (0: not known).
func (b *bar) update(what string, done, total int64) {
	if !b.term {
		return
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	if what != b.what || b.began.IsZero() {
		b.clear()
		b.what, b.began = what, time.Now()
	}
	if b.line == nil {
		if !b.shown && time.Since(b.began) < barQuiet {
			return
		}
		b.draw(total > 0)
	}
	if total > 0 {
		b.line.SetTotal(total, false)
	}
	b.line.SetCurrent(done)
}

// draw begins to show the step. Preconditions: b.mu is held.
func (b *bar) draw(totalKnown bool) {
	b.lines, b.shown = mpb.New(mpb.WithOutput(b.w)), true
	step := decor.Name(b.title + ": " + b.what)
	speed := decor.NewAverageSpeed(decor.SizeB1024(0), ", % .1f", b.began)
	// Made without a total it does not think that it is complete: then it would stay.
	if !totalKnown {
		b.line = b.lines.New(0, mpb.NopStyle(), mpb.PrependDecorators(step, decor.CurrentKibiByte(" % .1f"), speed))
		return
	}
	b.line = b.lines.New(0, mpb.BarStyle(), mpb.PrependDecorators(step),
		mpb.AppendDecorators(decor.Percentage(), decor.TotalKibiByte(" of % .1f"), speed, decor.Name(", "),
			decor.NewAverageETA(decor.ET_STYLE_GO, b.began, nil), decor.Name(" left")))
}

// clear takes the step's line away. Preconditions: b.mu is held.
func (b *bar) clear() {
	if b.line != nil {
		b.line.Abort(true)
		b.lines.Wait()
		b.line, b.lines = nil, nil
	}
}

// finish takes the bar away.
func (b *bar) finish() {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.clear()
}
