package main

import (
	"fmt"
	"os"
	"strings"

	"github.com/wsl2/wsl2/scripts/bench/report"
)

// memory measures what a VMM costs beyond the guest's RAM, idle.
func memory(h *host) ([]report.Row, error) {
	// Some commands first: what they leave behind counts.
	some := func(r *running) error {
		for range 10 {
			if _, err := r.output("true"); err != nil {
				return err
			}
		}
		return nil
	}
	r, err := h.ours()
	if err == nil {
		err = some(r)
	}
	if err != nil {
		return nil, err
	}
	vm, service := processes("vm"), processes("service")
	if len(vm) != 1 || len(service) != 1 {
		return nil, fmt.Errorf("processes: vm %v, service %v", vm, service)
	}
	ours, err := usage(vm[0])
	if err != nil {
		return nil, err
	}
	svc, err := usage(service[0])
	if err != nil {
		return nil, err
	}
	if err := r.stop(); err != nil {
		return nil, err
	}
	p, err := h.peer()
	if err != nil {
		return nil, err
	}
	defer p.stop()
	if err := some(p); err != nil {
		return nil, err
	}
	peer, err := usage(p.pid())
	if err != nil {
		return nil, err
	}
	return []report.Row{
		{Row: "VMM private memory beyond guest RAM", Unit: "MB", Ours: ours.private, Peers: map[string]float64{peerQEMU: peer.private}, Bar: &report.Bar{Factor: 16}},
		{Row: "VMM resident memory beyond guest RAM, shared files included", Unit: "MB", Ours: ours.resident, Peers: map[string]float64{peerQEMU: peer.resident}},
		{Row: "service, private memory", Unit: "MB", Ours: svc.private},
		{Row: "VMM and service, private memory", Unit: "MB", Ours: ours.private + svc.private, Peers: map[string]float64{peerQEMU: peer.private}},
	}, nil
}

// megabytes of a process, guest RAM excluded.
type megabytes struct{ private, resident float64 }

// usage reads /proc/PID/smaps (proc(5)). Mappings of the size of the guest's RAM
// are that.
func usage(pid int) (m megabytes, err error) {
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/smaps", pid))
	if err != nil {
		return m, err
	}
	skip, guest := false, 0
	for line := range strings.Lines(string(text)) {
		var lo, hi uint64
		var kb float64
		var key string
		if n, _ := fmt.Sscanf(line, "%x-%x ", &lo, &hi); n == 2 {
			if skip = hi-lo >= memoryMiB<<20 && resident(line); skip {
				guest++
			}
			continue
		}
		if n, _ := fmt.Sscanf(line, "%s %g kB", &key, &kb); n != 2 || skip {
			continue
		}
		switch key {
		case "Private_Clean:", "Private_Dirty:":
			m.private += kb / 1024
		case "Rss:":
			m.resident += kb / 1024
		}
	}
	if guest > 1 {
		return m, fmt.Errorf("pid %d has %d mappings as large as the guest's RAM", pid, guest)
	}
	return m, nil
}

// resident tells whether a line of smaps is of a mapping that can be used: Go
// reserves large address ranges without access.
func resident(line string) bool {
	f := strings.Fields(line)
	return len(f) > 1 && strings.HasPrefix(f[1], "rw")
}
