package microvm

import (
	"sync/atomic"

	"github.com/wsl2/wsl2/vmm/engine"
	"github.com/wsl2/wsl2/vmm/kvm"
)

// I/O ports that answer. All others read as all ones, as on a bus without
// devices, and ignore writes.
const (
	portI8042Command = 0x64 // W: 0xfe pulses the reset line
	portCMOSData     = 0x71 // R: 0; all ones would mean "update in progress" for ever
	portUART         = 0x3f8
	portUARTEnd      = portUART + 7
	portReset        = 0xcf9 // W: bit 2 resets

	i8042PulseReset = 0xfe
	resetCPU        = 1 << 2
)

// Registers of the 16550 UART, by offset, as far as a kernel uses them that only
// prints.
const (
	uartData       = 0 // W; divisor, low byte, if DLAB is set
	uartLCR        = 3 // RW, line control
	uartLSR        = 5 // R, line status
	uartLCRDLAB    = 1 << 7
	uartLSRCanSend = 1<<5 | 1<<6 // transmitter empty, holding register empty
)

// ports is the machine's I/O port space. It is safe for concurrent use.
type ports struct {
	screen *screen
	lcr    atomic.Uint32
}

func newPorts(s *screen) *ports { return &ports{screen: s} }

// access serves one exit. ended is true if the guest thereby ended the machine.
func (p *ports) access(io kvm.IO) (exit engine.Exit, ended bool) {
	if !io.Write {
		p.read(io)
		return engine.Exit{}, false
	}
	for i := 0; i < len(io.Data); i += io.Size {
		v := io.Data[i]
		switch io.Port {
		case engine.ExitPort:
			if v == engine.StatusPowerOff {
				return engine.Exit{Reason: engine.ReasonPowerOff}, true
			}
			return engine.Exit{Reason: engine.ReasonReset, Detail: "the guest gave up"}, true
		case portI8042Command:
			if v == i8042PulseReset {
				return engine.Exit{Reason: engine.ReasonReset, Detail: "reset by keyboard controller"}, true
			}
		case portReset:
			if v&resetCPU != 0 {
				return engine.Exit{Reason: engine.ReasonReset, Detail: "reset by port 0xcf9"}, true
			}
		case portUART + uartData:
			if p.lcr.Load()&uartLCRDLAB == 0 {
				p.screen.putByte(v)
			}
		case portUART + uartLCR:
			p.lcr.Store(uint32(v))
		}
	}
	return engine.Exit{}, false
}

func (p *ports) read(io kvm.IO) {
	v := byte(0xff)
	switch io.Port {
	case portCMOSData:
		v = 0
	case portUART + uartLSR:
		v = uartLSRCanSend
	case portUART + uartLCR:
		v = byte(p.lcr.Load())
	}
	for i := range io.Data {
		io.Data[i] = v
	}
}
