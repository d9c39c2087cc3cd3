//go:build e2e

package main_test

import (
	"context"
	"fmt"
	"strings"
	"testing"

	"github.com/wsl2/wsl2/internal/testsys"
	"github.com/wsl2/wsl2/internal/testsys/waits"
)

// idleSession: of a session that nobody uses, no thread of client, service, VM or the distro's
// init waits for time. (That of Go's runtime is the one that every Go program has.)
func idleSession(ctx context.Context, t *testing.T, h *testsys.Host) {
	x := openTerminal(t, h.Cmd(ctx, "-d", "small", "-e", "sh", "-c", "echo READY; cat"))
	x.expect("READY\r\n")
	engine := "vm"
	if version1() {
		engine = "distro"
	}
	processes := map[string]int{"client": x.cmd.Process.Pid, "service": h.Process("service").PID, engine: h.Process(engine).PID}
	for name, pid := range processes {
		looks := 0
		quiet(ctx, t, name, func() (before, after []waits.Thread) {
			// A timer that was stopped is forgotten when there is something to do, or when it would
			// have run: up to a minute later.
			if looks++; looks%500 == 0 {
				x.send("a")
				x.expect("a")
				h.OK("--list")
			}
			before, err := waits.Threads(pid)
			testsys.Must(t, err)
			after, err = waits.Threads(pid)
			testsys.Must(t, err)
			return before, after
		})
	}
	if !version1() {
		quiet(ctx, t, "init", func() (before, after []waits.Thread) {
			// The first is too soon: init has just started what looks.
			first, second, _ := strings.Cut(h.OK("-d", "small", "-e", "sh", "-c", "pid=1; for i in 1 2 3; do before=$now; now=$("+waits.Script+"); done; echo \"$before\"; echo; echo \"$now\""), "\n\n")
			return waits.Parse(first), waits.Parse(second)
		})
	}
	x.send("\r\x04")
	if status := x.wait(); status != 0 {
		t.Errorf("status %d", status)
	}
}

// quiet waits for a moment, between two looks, at which no thread ran and none waited for time.
func quiet(ctx context.Context, t *testing.T, name string, looks func() (before, after []waits.Thread)) {
	t.Helper()
	for {
		var timed string
		before, after := looks()
		monitors := 0
		for _, thread := range after {
			switch {
			case thread.Monitor():
				monitors++
			case thread.Timed():
				timed += fmt.Sprintf("\n%+v", thread)
			}
		}
		if timed == "" && monitors == 1 && waits.Undisturbed(before, after) {
			return
		}
		if ctx.Err() != nil {
			t.Fatalf("%s: of %d threads, %d are the runtime's monitor, and these wait for time:%s\nbefore: %+v\nafter: %+v", name, len(after), monitors, timed, before, after)
		}
	}
}
