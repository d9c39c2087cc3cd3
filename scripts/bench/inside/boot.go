package main

import (
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"time"

	"golang.org/x/sys/unix"

	"github.com/wsl2/wsl2/launcher/api"
	"github.com/wsl2/wsl2/scripts/bench/report"
)

// boots is how often each boot is measured; the first is discarded.
const boots = 6

// boot measures from nothing to the first byte that a program in the guest prints.
func boot(h *host) ([]report.Row, error) {
	type variant struct {
		name string
		argv []string
		disk string // the peer's
	}
	variants := []variant{
		{"cold boot to first output", []string{"-d", distroName, "--", "echo", "hi"}, h.disk},
		{"cold boot to first output, system distro", []string{"--system", "--", "echo", "hi"}, ""},
	}
	var rows []report.Row
	var details []report.Row
	for i, v := range variants {
		var ours, peer, oursKernel, peerKernel, oursExits, peerExits []float64
		for n := range boots {
			b, err := h.coldBoot(v.argv)
			if err != nil {
				return nil, fmt.Errorf("wsl2 %v: %w", v.argv, err)
			}
			logf("%s: wsl2 %.2f ms, %.0f exits", v.name, b.ms, b.exits)
			if err := h.stop(); err != nil {
				return nil, err
			}
			p, err := peerBoot(v.disk)
			if err != nil {
				return nil, err
			}
			logf("%s: %s %.2f ms, %.0f exits", v.name, peerQEMU, p.ms, p.exits)
			if n > 0 {
				ours, peer = append(ours, b.ms), append(peer, p.ms)
				oursKernel, peerKernel = append(oursKernel, b.kernel), append(peerKernel, p.kernel)
				oursExits, peerExits = append(oursExits, b.exits), append(peerExits, p.exits)
			}
		}
		rows = append(rows, report.Row{Row: v.name, Unit: "ms", Ours: median(ours), Peers: map[string]float64{peerQEMU: median(peer)},
			Bar: &report.Bar{Peer: peerQEMU, Factor: 0.5}})
		if i == 0 {
			details = []report.Row{
				{Row: "guest kernel time to /init", Unit: "ms", Ours: median(oursKernel), Peers: map[string]float64{peerQEMU: median(peerKernel)}},
				{Row: "VM exits until first output", Unit: "exits", Ours: median(oursExits), Peers: map[string]float64{peerQEMU: median(peerExits)}},
			}
		}
	}
	rows = append(rows, details...)
	phases, err := h.phases(variants[0].argv)
	if err != nil {
		return nil, err
	}
	return append(rows, phases...), nil
}

type bootFigures struct{ ms, kernel, exits float64 }

// coldBoot runs a command while nothing of wsl2 runs and takes the time to the
// first byte on its stdout. The VM runs on.
func (h *host) coldBoot(argv []string) (bootFigures, error) {
	ms, err := h.firstByte(argv)
	if err != nil {
		return bootFigures{}, err
	}
	vm := processes("vm")
	if len(vm) != 1 {
		return bootFigures{}, fmt.Errorf("%d VMs run after the boot", len(vm))
	}
	exits, err := vmExits(vm[0])
	if err != nil {
		return bootFigures{}, err
	}
	text, err := h.run("--status", "--json")
	if err != nil {
		return bootFigures{}, err
	}
	var status struct{ VM api.VM }
	if err := json.Unmarshal([]byte(text), &status); err != nil {
		return bootFigures{}, fmt.Errorf("wsl2 --status --json: %w", err)
	}
	return bootFigures{ms: ms, kernel: float64(status.VM.KernelMicros) / 1e3, exits: exits}, nil
}

// firstByte runs wsl2 and returns the milliseconds from before its exec to its
// first byte of output.
func (h *host) firstByte(argv []string) (float64, error) { return h.firstByteOf(h.wsl2(argv...)) }

// firstByteOf is firstByte for any command.
func (h *host) firstByteOf(c *exec.Cmd) (float64, error) {
	var p [2]int
	if err := unix.Pipe2(p[:], unix.O_CLOEXEC); err != nil {
		return 0, err
	}
	defer unix.Close(p[0])
	out := os.NewFile(uintptr(p[1]), "stdout")
	c.Stdout = out
	errs, err := os.Create(filepath.Join(h.dir, "stderr"))
	if err != nil {
		return 0, err
	}
	defer errs.Close()
	c.Stderr = errs
	start := time.Now()
	if err := c.Start(); err != nil {
		return 0, err
	}
	out.Close()
	var b [64]byte
	watchdog := time.AfterFunc(hangs, func() { c.Process.Kill() })
	n, err := unix.Read(p[0], b[:])
	took := time.Since(start)
	werr := c.Wait()
	if !watchdog.Stop() {
		return 0, errHang
	}
	if werr != nil || err != nil || n < 1 {
		text, _ := os.ReadFile(errs.Name())
		return 0, fmt.Errorf("%d bytes, %v, %v: %s", n, err, werr, text)
	}
	return took.Seconds() * 1e3, nil
}

func peerBoot(disk string) (f bootFigures, err error) {
	q, err := startQEMU(disk, slirpNet())
	if err != nil {
		return f, err
	}
	s, err := startSession(q.dial, false, "echo", "hi")
	if err != nil {
		q.kill()
		return f, err
	}
	var b [64]byte
	_, err = s.stdout.Read(b[:])
	f.ms = time.Since(q.started).Seconds() * 1e3
	f.kernel = float64(q.ready.BootNanos) / 1e6
	if err == nil {
		err = s.wait()
	}
	s.close()
	if err == nil {
		f.exits, err = vmExits(q.cmd.Process.Pid)
	}
	if err != nil {
		q.kill()
		return f, fmt.Errorf("%s: %w", peerQEMU, err)
	}
	return f, q.stop()
}

func median(v []float64) float64 {
	v = slices.Clone(v)
	slices.Sort(v)
	if len(v)%2 == 0 {
		return (v[len(v)/2-1] + v[len(v)/2]) / 2
	}
	return v[len(v)/2]
}

func percentile(v []float64, p float64) float64 {
	v = slices.Clone(v)
	slices.Sort(v)
	return v[min(int(p*float64(len(v))), len(v)-1)]
}
