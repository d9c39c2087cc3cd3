package kvm

// LongMode is a 64-bit state with flat segments, paging on and interrupts off.
type LongMode struct {
	CR3             uint64 // PML4 with PAE's layout
	GDT             Descriptor
	IDT             Descriptor
	Code, Data, TSS uint16 // selectors of CPL 0 segments that stand in the GDT
	CR4             uint64 // bits besides PAE
}

// Control register bits (Intel SDM vol. 3A §2.2.1, §2.5).
const (
	cr0PE   = 1 << 0
	cr0MP   = 1 << 1
	cr0ET   = 1 << 4
	cr0PG   = 1 << 31
	cr4PAE  = 1 << 5
	eferLME = 1 << 8
	eferLMA = 1 << 10
)

// Apply changes s, which VCPU.Sregs returned, to the state l.
func (l LongMode) Apply(s *Sregs) {
	const (
		typeCode = 0xb // execute, read, accessed
		typeData = 0x3 // read, write, accessed
		typeTSS  = 0xb // busy
	)
	data := Segment{Selector: l.Data, Limit: 0xffffffff, Typ: typeData, Present: 1, S: 1, DB: 1, G: 1}
	s.CS = Segment{Selector: l.Code, Limit: 0xffffffff, Typ: typeCode, Present: 1, S: 1, L: 1, G: 1}
	s.DS, s.ES, s.FS, s.GS, s.SS = data, data, data, data, data
	s.TR = Segment{Selector: l.TSS, Limit: 0xffff, Typ: typeTSS, Present: 1}
	s.GDT, s.IDT = l.GDT, l.IDT
	s.CR0 = cr0PE | cr0MP | cr0ET | cr0PG
	s.CR3 = l.CR3
	s.CR4 = cr4PAE | l.CR4
	s.EFER = eferLME | eferLMA
}
