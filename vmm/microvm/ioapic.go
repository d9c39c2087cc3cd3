package microvm

import (
	"encoding/binary"
	"sync"
)

// The I/O APIC (82093AA data sheet §3): two windows in its page, an index and
// the register it selects.
const (
	ioapicAddr = 0xfec00000
	ioapicSize = 0x1000

	ioapicSelect = 0x00
	ioapicWindow = 0x10

	ioapicRegID       = 0x00
	ioapicRegVersion  = 0x01
	ioapicRegArbiter  = 0x02
	ioapicRegRedirect = 0x10 // two registers for each pin

	ioapicVersion = 0x11 // of the 82093AA

	ioapicIDMask = 0xf << 24
)

// A pin's redirection entry (§3.2.4).
const (
	redirVector      = 0xff
	redirDelivery    = 0x7 << 8 // as bits 8 to 10 of a message's data
	redirLogical     = 1 << 11
	redirReadOnly    = 1<<12 | 1<<14 // delivery status, remote IRR: nothing is ever under way
	redirMasked      = 1 << 16
	redirDestination = 56 // the upper 8 bits
)

// Messages to local APICs (Intel SDM vol. 3A §11.11).
const (
	msiAddr         = 0xfee00000
	msiDestination  = 12
	msiLogical      = 1 << 2
	msiDataAsserted = 1 << 14
)

// ioapic is the machine's I/O APIC. It differs from the in-kernel one in what
// costs boot time and latency: it has no more pins than the machine has devices,
// and a pin that is raised is at once a message to a local APIC. Every input is
// an edge, whatever the guest makes of it: virtio-mmio devices only pulse. An edge
// at a masked pin is delivered when the pin is unmasked. It is safe for
// concurrent use.
type ioapic struct {
	// send delivers a message. A message that no local APIC takes is the guest's
	// own fault and is lost.
	send func(addr uint64, data uint32)

	mu       sync.Mutex
	selected uint32
	id       uint32
	pins     []pin
}

type pin struct {
	redirection uint64
	pending     bool // an edge came while it was masked
}

func newIOAPIC(pins int, send func(addr uint64, data uint32)) *ioapic {
	a := &ioapic{send: send, pins: make([]pin, pins)}
	for i := range a.pins {
		a.pins[i].redirection = redirMasked
	}
	return a
}

// raise is an edge at a pin.
func (a *ioapic) raise(n int) {
	a.mu.Lock()
	p := &a.pins[n]
	r := p.redirection
	p.pending = r&redirMasked != 0
	a.mu.Unlock()
	if r&redirMasked == 0 {
		a.deliver(r)
	}
}

func (a *ioapic) deliver(r uint64) {
	addr := uint64(msiAddr) | r>>redirDestination<<msiDestination
	if r&redirLogical != 0 {
		addr |= msiLogical
	}
	a.send(addr, uint32(r&(redirVector|redirDelivery))|msiDataAsserted)
}

// read fills p, 1 to 8 bytes, from offset off of the page. Registers answer to
// 32-bit accesses only, others read as 0.
func (a *ioapic) read(off uint64, p []byte) {
	clear(p)
	if len(p) != 4 {
		return
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	switch off {
	case ioapicSelect:
		binary.LittleEndian.PutUint32(p, a.selected)
	case ioapicWindow:
		binary.LittleEndian.PutUint32(p, a.registerLocked())
	}
}

func (a *ioapic) registerLocked() uint32 {
	switch a.selected {
	case ioapicRegID, ioapicRegArbiter:
		return a.id
	case ioapicRegVersion:
		return ioapicVersion | uint32(len(a.pins)-1)<<16
	}
	p, shift := a.pinLocked()
	if p == nil {
		return 0
	}
	return uint32(p.redirection >> shift)
}

// pinLocked is the pin whose redirection entry is selected, and where in the
// entry the selected half begins. It is nil if there is none.
func (a *ioapic) pinLocked() (p *pin, shift int) {
	n := uint64(a.selected-ioapicRegRedirect) / 2
	if a.selected < ioapicRegRedirect || n >= uint64(len(a.pins)) {
		return nil, 0
	}
	return &a.pins[n], int(a.selected%2) * 32
}

// write is the guest's write of p, 1 to 8 bytes, to offset off of the page.
func (a *ioapic) write(off uint64, p []byte) {
	if len(p) != 4 {
		return
	}
	v := binary.LittleEndian.Uint32(p)
	a.mu.Lock()
	r, due := a.writeLocked(off, v)
	a.mu.Unlock()
	if due {
		a.deliver(r)
	}
}

// writeLocked returns a redirection entry whose pin has an edge to deliver.
func (a *ioapic) writeLocked(off uint64, v uint32) (r uint64, due bool) {
	switch {
	case off == ioapicSelect:
		a.selected = v & 0xff
	case off != ioapicWindow:
	case a.selected == ioapicRegID:
		a.id = v & ioapicIDMask
	default:
		p, shift := a.pinLocked()
		if p == nil {
			break
		}
		p.redirection = p.redirection&^(0xffffffff<<shift) | uint64(v)<<shift
		p.redirection &^= redirReadOnly
		due = p.pending && p.redirection&redirMasked == 0
		if due {
			p.pending = false
		}
		return p.redirection, due
	}
	return 0, false
}
