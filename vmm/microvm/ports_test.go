package microvm

import (
	"bytes"
	"strings"
	"testing"

	"github.com/wsl2/wsl2/vmm/engine"
	"github.com/wsl2/wsl2/vmm/kvm"
)

func write(p *ports, port uint16, data ...byte) (engine.Exit, bool) {
	return p.access(kvm.IO{Port: port, Size: 1, Write: true, Data: data})
}

func read(p *ports, port uint16, n int) []byte {
	b := make([]byte, n)
	p.access(kvm.IO{Port: port, Size: n, Data: b})
	return b
}

func TestPortsEndTheMachine(t *testing.T) {
	p := newPorts(newScreen(nil))
	for _, c := range []struct {
		port   uint16
		value  byte
		ended  bool
		reason engine.Reason
	}{
		{engine.ExitPort, engine.StatusPowerOff, true, engine.ReasonPowerOff},
		{engine.ExitPort, 1, true, engine.ReasonReset},
		{0x64, 0xfe, true, engine.ReasonReset},
		{0x64, 0xff, false, 0},
		{0xcf9, 6, true, engine.ReasonReset},
		{0xcf9, 2, false, 0},
		{0x80, 6, false, 0},
	} {
		exit, ended := write(p, c.port, c.value)
		if ended != c.ended || exit.Reason != c.reason {
			t.Errorf("%#x to port %#x: %v, %+v", c.value, c.port, ended, exit)
		}
	}
}

func TestPortsRead(t *testing.T) {
	p := newPorts(newScreen(nil))
	for port, want := range map[uint16]string{
		0x40:  "\xff\xff\xff\xff",
		0x71:  "\x00",
		0x64:  "\xff",
		0x3fd: "\x60",
		0x3fa: "\xff",
	} {
		if got := read(p, port, len(want)); string(got) != want {
			t.Errorf("port %#x reads % x", port, got)
		}
	}
}

func TestUARTOutput(t *testing.T) {
	var out bytes.Buffer
	s := newScreen(&out)
	p := newPorts(s)
	write(p, 0x3fb, 0x83)
	write(p, 0x3f8, 'x') // divisor
	write(p, 0x3fb, 0x03)
	if got := read(p, 0x3fb, 1)[0]; got != 0x03 {
		t.Errorf("LCR reads %#x", got)
	}
	write(p, 0x3f8, []byte("one\ntw")...) // rep outsb
	if out.String() != "one\n" {
		t.Errorf("%q", out.String())
	}
	// Other writers do not overtake.
	if _, err := s.Write([]byte("three\n")); err != nil {
		t.Error(err)
	}
	if out.String() != "one\ntwthree\n" {
		t.Errorf("%q", out.String())
	}
	out.Reset()
	for range 3 * maxLine / 2 { // a line without end is not kept for ever
		write(p, 0x3f8, 'a')
	}
	if out.Len() != maxLine {
		t.Errorf("%d bytes came out", out.Len())
	}
	if err := s.flush(); err != nil || out.String() != strings.Repeat("a", 3*maxLine/2) {
		t.Errorf("flush: %d bytes, %v", out.Len(), err)
	}
}

// A machine without a bus full of devices reads as all ones.
func TestBusWithoutDevice(t *testing.T) {
	b := newBus(nil, nil)
	for _, addr := range []uint64{0, busBase - 1, busBase, 0xffffffff, ^uint64(0)} {
		p := []byte{0, 0, 0, 0}
		b.access(kvm.MMIO{Addr: addr, Data: p})
		if string(p) != "\xff\xff\xff\xff" {
			t.Errorf("%#x reads % x", addr, p)
		}
		b.access(kvm.MMIO{Addr: addr, Write: true, Data: p})
	}
}
