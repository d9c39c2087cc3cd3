package main

import (
	"io"
	"time"
)

// running is a VM whose distro serves: ours, or the peer's.
type running struct {
	name   string
	scheme string // of ports, for guestTool: "" is vsock
	// output runs a program in the distro and returns what it prints.
	output func(argv ...string) (string, error)
	// dial connects to a port of the guest.
	dial func(port uint32) (socket, error)
	// spawn starts a program that stays, and returns when it has printed a line.
	spawn func(argv ...string) (stop func(), err error)
	// stop ends the VM.
	stop func() error
	pid  func() int // the peer's process
}

// ours starts wsl2's VM and distro.
func (h *host) ours() (*running, error) {
	r := &running{name: "wsl2", output: h.output, dial: h.dialGuest, stop: h.stop}
	r.spawn = func(argv ...string) (func(), error) {
		c := h.wsl2(append([]string{"-d", distroName, "-e"}, argv...)...)
		out, err := c.StdoutPipe()
		if err == nil {
			err = c.Start()
		}
		if err != nil {
			return nil, err
		}
		stop := func() { c.Process.Kill(); c.Wait() }
		if err := firstLine(out); err != nil {
			stop()
			return nil, err
		}
		return stop, nil
	}
	_, err := h.output("true")
	return r, err
}

// peer starts QEMU with the distro's disk, and more devices.
func (h *host) peer(devices ...string) (*running, error) {
	q, err := startQEMU(h.disk, devices...)
	if err != nil {
		return nil, err
	}
	r := &running{name: peerQEMU, output: q.output}
	r.stop = func() error { q.kill(); return nil }
	r.pid = func() int { return q.cmd.Process.Pid }
	r.dial = func(port uint32) (socket, error) { return dialVsock(guestCID, port) }
	r.spawn = func(argv ...string) (func(), error) {
		s, err := startSession(q.dial, false, argv...)
		if err != nil {
			return nil, err
		}
		if err := firstLine(s.stdout); err != nil {
			s.close()
			return nil, err
		}
		return s.close, nil
	}
	return r, nil
}

// firstLine waits until something can be read.
func firstLine(r io.Reader) error {
	got := make(chan error, 1)
	go func() {
		_, err := r.Read(make([]byte, 64))
		got <- err
	}()
	select {
	case err := <-got:
		return err
	case <-time.After(hangs):
		return errHang
	}
}
