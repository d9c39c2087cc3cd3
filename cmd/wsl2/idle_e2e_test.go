//go:build e2e

package main_test

import (
	"context"
	"fmt"
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
		quiet(ctx, t, name, func() []waits.Thread {
			// A timer that was stopped is forgotten when there is something to do, or when it would
			// have run: up to a minute later.
			if looks++; looks%500 == 0 {
				x.send("a")
				x.expect("a")
				h.OK("--list")
			}
			threads, err := waits.Threads(pid)
			testsys.Must(t, err)
			return threads
		})
	}
	if !version1() {
		quiet(ctx, t, "init", func() []waits.Thread {
			// Once is too soon: init has just started what looks.
			return waits.Parse(h.OK("-d", "small", "-e", "sh", "-c", "pid=1; for i in $(seq 3); do now=$("+waits.Script+"); done; echo \"$now\""))
		})
	}
	x.send("\r\x04")
	if status := x.wait(); status != 0 {
		t.Errorf("status %d", status)
	}
}

// quiet waits until none of the threads waits for time.
func quiet(ctx context.Context, t *testing.T, name string, threads func() []waits.Thread) {
	t.Helper()
	for {
		var timed string
		monitors, all := 0, threads()
		for _, thread := range all {
			switch {
			case thread.Monitor():
				monitors++
			case thread.Timed():
				timed += fmt.Sprintf("\n%+v", thread)
			}
		}
		if timed == "" && monitors == 1 {
			return
		}
		if ctx.Err() != nil {
			t.Fatalf("%s: of %d threads, %d are the runtime's monitor, and these wait for time:%s", name, len(all), monitors, timed)
		}
	}
}
