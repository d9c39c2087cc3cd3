package qemu

import "encoding/binary"

// QEMU's microvm has 8 virtio-mmio transports, or 24 with a second I/O APIC,
// which it describes only by ACPI. Our kernel has no ACPI, so this machine has an
// MP table (MultiProcessor Specification 1.4), in the place of that of vmm/boot,
// whose machine has no I/O APIC at all.
//
// Linux allocates interrupts at boot for the first I/O APIC of the table only
// (setup_IO_APIC_irqs), which must therefore be the second one of the board, with
// the transports; its pin p becomes Linux's IRQ p. The other serves the timer
// alone: it is given as the input of the 8259, which Linux takes for it
// (check_timer).
const (
	mpTableAddr   = 0x9f000
	mpPointerAddr = 0x9fc00

	ioapicTransports = 0xfec10000 // IO_APIC_SECONDARY_ADDRESS
	ioapicISA        = 0xfec00000
	localAPIC        = 0xfee00000

	// I/O APIC ids, behind those of all local APICs.
	ioapicTransportsID = 0xf0
	ioapicISAID        = 0xf1

	timerPin = 2 // of ioapicISA
)

// Entry types, interrupt types and flags of the table (MP Specification §4.3).
const (
	mpProcessor = 0
	mpBus       = 1
	mpIOAPIC    = 2
	mpInterrupt = 3
	mpLocal     = 4

	mpINT    = 0
	mpNMI    = 1
	mpExtINT = 3

	mpConforms  = 0
	mpEdgeHigh  = 0x1<<2 | 0x1
	mpLevelHigh = 0x3<<2 | 0x1

	busISA = 0
	busPCI = 1 // a bus whose interrupts are level-triggered and not ISA's

	mpAllAPICs = 0xff
)

// mpTable returns the configuration table for a machine with so many CPUs whose
// transports use the given pins.
func mpTable(cpus int, pins []int) []byte {
	le := binary.LittleEndian
	t := make([]byte, 44, 2<<10)
	count := 0
	entry := func(b ...byte) {
		t = append(t, b...)
		count++
	}
	for i := range cpus {
		flags := byte(1) // enabled
		if i == 0 {
			flags |= 2 // boot processor
		}
		e := make([]byte, 20)
		e[0], e[1], e[2], e[3] = mpProcessor, byte(i), 0x14, flags
		le.PutUint32(e[8:], 1<<9|1) // an APIC, an FPU; Linux asks CPUID
		entry(e...)
	}
	entry(append([]byte{mpBus, busISA}, "ISA   "...)...)
	entry(append([]byte{mpBus, busPCI}, "PCI   "...)...)
	ioapic := func(id byte, addr uint32) {
		entry(le.AppendUint32([]byte{mpIOAPIC, id, 0x20, 1}, addr)...)
	}
	ioapic(ioapicTransportsID, ioapicTransports)
	ioapic(ioapicISAID, ioapicISA)
	// IRQ 0 exists by this entry, which is not an ISA one; nothing ever comes
	// from that pin. The next one but last has Linux add the pin of the timer.
	entry(mpInterrupt, mpINT, mpEdgeHigh, 0, busPCI, 0, ioapicTransportsID, 0)
	for _, p := range pins {
		entry(mpInterrupt, mpINT, mpLevelHigh, 0, busPCI, byte(p<<2), ioapicTransportsID, byte(p))
	}
	entry(mpInterrupt, mpExtINT, mpConforms, 0, busISA, 0, ioapicISAID, timerPin)
	entry(mpLocal, mpExtINT, mpConforms, 0, busISA, 0, 0, 0)
	entry(mpLocal, mpNMI, mpConforms, 0, busISA, 0, mpAllAPICs, 1)

	copy(t, "PCMP")
	le.PutUint16(t[4:], uint16(len(t)))
	t[6] = 4 // revision 1.4
	copy(t[8:], "WSL2    QEMU        ")
	le.PutUint16(t[34:], uint16(count))
	le.PutUint32(t[36:], localAPIC)
	t[7] = checksum(t)
	return t
}

// putMPTable writes the table and the floating pointer structure that leads to
// it into the guest's lowest memory.
func putMPTable(low []byte, cpus int) {
	clear(low[mpTableAddr:conventional])
	copy(low[mpTableAddr:mpPointerAddr], mpTable(cpus, transports))
	p := low[mpPointerAddr:][:16]
	copy(p, "_MP_")
	binary.LittleEndian.PutUint32(p[4:], mpTableAddr)
	p[8], p[9] = 1, 4 // length in 16 bytes, revision 1.4
	p[10] = checksum(p)
}

// checksum makes all bytes of b sum up to 0.
func checksum(b []byte) (sum byte) {
	for _, x := range b {
		sum -= x
	}
	return sum
}
