package main

import (
	"fmt"
	"os"
	"os/exec"
	"time"

	"github.com/wsl2/wsl2/scripts/bench/report"
)

// warmRuns is how often each command runs, after one that does not count.
const warmRuns = 50

// warm measures a command in a distro that runs already.
func warm(h *host) ([]report.Row, error) {
	vm, err := h.ours()
	if err != nil {
		return nil, err
	}
	null, err := os.OpenFile(os.DevNull, os.O_RDWR, 0)
	if err != nil {
		return nil, err
	}
	defer null.Close()
	// As from a script: no terminal, and stdout a pipe for the second.
	ours, err := repeat(func() error {
		c := h.wsl2("-d", distroName, "--", "true")
		c.Stdin, c.Stdout, c.Stderr = null, null, null
		return supervise(c)
	})
	if err != nil {
		return nil, fmt.Errorf("wsl2 -- true: %w", err)
	}
	withOutput, err := repeat(func() error { _, err := h.firstByte([]string{"-d", distroName, "-e", guestTool, "hello"}); return err })
	if err != nil {
		return nil, err
	}
	local, err := repeat(func() error {
		c := exec.Command(guestPath, "hello")
		c.Stdin, c.Stdout, c.Stderr = null, null, null
		return c.Run()
	})
	if err != nil {
		return nil, err
	}
	localOutput, err := repeat(func() error {
		out, err := exec.Command(guestPath, "hello").Output()
		if err == nil && len(out) == 0 {
			err = fmt.Errorf("no output")
		}
		return err
	})
	if err != nil {
		return nil, err
	}
	if err := vm.stop(); err != nil {
		return nil, err
	}
	peer, err := h.peer()
	if err != nil {
		return nil, err
	}
	defer peer.stop()
	session, err := repeat(func() error { _, err := peer.output("true"); return err })
	if err != nil {
		return nil, err
	}
	const localName, sessionName = "fork+exec of a static Go program", "session in qemu-microvm, no client process"
	bar := &report.Bar{Peer: localName, Factor: 3}
	return []report.Row{
		{Row: "warm command, p50", Unit: "ms", Ours: percentile(ours, 0.5), Bar: bar,
			Peers: map[string]float64{localName: percentile(local, 0.5), sessionName: percentile(session, 0.5)}},
		{Row: "warm command, p99", Unit: "ms", Ours: percentile(ours, 0.99), Bar: bar,
			Peers: map[string]float64{localName: percentile(local, 0.99), sessionName: percentile(session, 0.99)}},
		{Row: "warm static Go program with output, p50", Unit: "ms", Ours: percentile(withOutput, 0.5),
			Peers: map[string]float64{localName: percentile(localOutput, 0.5)}},
	}, nil
}

// repeat runs f and returns the ms that each run but the first took.
func repeat(f func() error) (ms []float64, err error) {
	for range warmRuns + 1 {
		start := time.Now()
		if err := f(); err != nil {
			return nil, err
		}
		ms = append(ms, time.Since(start).Seconds()*1e3)
	}
	return ms[1:], nil
}
