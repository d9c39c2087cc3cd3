package main

import (
	"fmt"
	"strconv"
	"strings"

	"github.com/wsl2/wsl2/scripts/bench/report"
)

// The file that is read and written, on the distro's disk.
const (
	blockFile = "/root/block.data"
	blockSize = 32 << 20
)

// block measures direct I/O in the guest, ours and QEMU's virtio-blk on the same
// image file.
func block(h *host) ([]report.Row, error) {
	type job struct {
		name, mode  string
		unit, depth int64
		count       int64
	}
	jobs := []job{
		{"4 KiB random read, depth 1", "randread", 4 << 10, 1, 200},
		{"4 KiB random write, depth 1", "randwrite", 4 << 10, 1, 200},
		{"4 KiB random read, depth 32", "randread", 4 << 10, 32, 400},
		{"4 KiB random write, depth 32", "randwrite", 4 << 10, 32, 400},
		{"1 MiB sequential read, depth 1", "read", 1 << 20, 1, 32},
		{"1 MiB sequential write, depth 1", "write", 1 << 20, 1, 32},
		{"1 MiB sequential read, depth 32", "read", 1 << 20, 32, 32},
		{"1 MiB sequential write, depth 32", "write", 1 << 20, 32, 32},
	}
	measure := func(r *running) ([]float64, error) {
		size := strconv.Itoa(blockSize)
		if _, err := r.output(guestTool, "block", blockFile, size, "prepare"); err != nil {
			return nil, err
		}
		var all []float64
		for _, j := range jobs {
			args := []string{guestTool, "block", blockFile, size, j.mode, fmt.Sprint(j.unit), fmt.Sprint(j.depth), fmt.Sprint(j.count)}
			var ns float64
			for range 2 { // the first is discarded
				text, err := r.output(args...)
				if err == nil {
					ns, err = strconv.ParseFloat(strings.TrimSpace(text), 64)
				}
				if err != nil {
					return nil, err
				}
			}
			all = append(all, ns)
			logf("%s, %s: %.0f ns", r.name, j.name, ns/float64(j.count))
		}
		return all, r.stop()
	}
	r, err := h.ours()
	if err != nil {
		return nil, err
	}
	ours, err := measure(r)
	if err != nil {
		return nil, err
	}
	if r, err = h.peer(); err != nil {
		return nil, err
	}
	peer, err := measure(r)
	if err != nil {
		return nil, err
	}
	var rows []report.Row
	for i, j := range jobs {
		unit, value := "µs/request", func(ns float64) float64 { return ns / float64(j.count) / 1e3 }
		rows = append(rows, report.Row{Row: j.name, Unit: unit, Ours: value(ours[i]), Peers: map[string]float64{peerQEMU: value(peer[i])},
			Bar: &report.Bar{Peer: peerQEMU, Factor: 1}})
	}
	return rows, nil
}
