package listeners

import (
	"encoding/binary"
	"fmt"
	"os"
	"strings"
	"unsafe"

	"golang.org/x/sys/unix"
)

// This file is as much of bpf(2) as three programs of thirty instructions need. A library
// would add two fifths to /init, which every boot loads.

// instruction is struct bpf_insn.
type instruction struct {
	code uint8
	regs uint8 // destination, source << 4
	off  int16
	imm  int32
}

// Registers: r1 to r5 are arguments, r6 to r9 survive calls, r10 is the frame pointer.
const (
	r0 = iota
	r1
	r2
	r3
	r4
	r5
	r6
	r7
	r10 = 10
)

// Helpers (enum bpf_func_id).
const (
	helperMapLookup    = 1
	helperMapUpdate    = 2
	helperMapDelete    = 3
	helperSocketCookie = 46
	helperNetnsCookie  = 122
	helperRingOutput   = 130
)

// program is what the small assembler below makes; jumps go to the label "out" or to those set.
type program struct {
	insns  []instruction
	labels map[string]int
	jumps  map[int]string
}

func (p *program) emit(code uint8, dst, src uint8, off int16, imm int32) {
	p.insns = append(p.insns, instruction{code, dst | src<<4, off, imm})
}

func (p *program) move(dst, src uint8) {
	p.emit(unix.BPF_ALU64|unix.BPF_MOV|unix.BPF_X, dst, src, 0, 0)
}
func (p *program) set(dst uint8, imm int32) {
	p.emit(unix.BPF_ALU64|unix.BPF_MOV|unix.BPF_K, dst, 0, 0, imm)
}
func (p *program) add(dst uint8, imm int32) {
	p.emit(unix.BPF_ALU64|unix.BPF_ADD|unix.BPF_K, dst, 0, 0, imm)
}
func (p *program) load32(dst, src uint8, off int16) {
	p.emit(unix.BPF_LDX|unix.BPF_MEM|unix.BPF_W, dst, src, off, 0)
}
func (p *program) store64(off int16, src uint8) {
	p.emit(unix.BPF_STX|unix.BPF_MEM|unix.BPF_DW, r10, src, off, 0)
}
func (p *program) call(helper int32) { p.emit(unix.BPF_JMP|unix.BPF_CALL, 0, 0, 0, helper) }
func (p *program) exit()             { p.emit(unix.BPF_JMP|unix.BPF_EXIT, 0, 0, 0, 0) }

// set64 sets dst to a constant of 64 bits; as pseudoMapFD to the map of that descriptor.
func (p *program) set64(dst, pseudo uint8, v uint64) {
	p.emit(unix.BPF_LD|unix.BPF_IMM|unix.BPF_DW, dst, pseudo, 0, int32(uint32(v)))
	p.emit(0, 0, 0, 0, int32(uint32(v>>32)))
}

const pseudoMapFD = 1 // BPF_PSEUDO_MAP_FD

// jump goes to label if dst compares (BPF_JEQ...) with imm.
func (p *program) jump(how, dst uint8, imm int32, label string) {
	p.jumps[len(p.insns)] = label
	p.emit(unix.BPF_JMP|how|unix.BPF_K, dst, 0, 0, imm)
}

func (p *program) label(name string) { p.labels[name] = len(p.insns) }

// bytes is the program as the kernel takes it.
func (p *program) bytes() []byte {
	b := make([]byte, 0, 8*len(p.insns))
	for i, x := range p.insns {
		if name, ok := p.jumps[i]; ok {
			to, ok := p.labels[name]
			if !ok {
				panic("BUG: no label " + name)
			}
			x.off = int16(to - i - 1)
		}
		b = append(b, x.code, x.regs)
		b = binary.LittleEndian.AppendUint16(b, uint16(x.off))
		b = binary.LittleEndian.AppendUint32(b, uint32(x.imm))
	}
	return b
}

func bpf(cmd int, attr unsafe.Pointer, size uintptr) (int, error) {
	fd, _, errno := unix.Syscall(unix.SYS_BPF, uintptr(cmd), uintptr(attr), size)
	if errno != 0 {
		return -1, errno
	}
	return int(fd), nil
}

// newMap makes a map of the kernel's and returns its descriptor.
func newMap(kind, keySize, valueSize, entries, flags uint32) (int, error) {
	attr := struct{ kind, keySize, valueSize, entries, flags uint32 }{kind, keySize, valueSize, entries, flags}
	fd, err := bpf(unix.BPF_MAP_CREATE, unsafe.Pointer(&attr), unsafe.Sizeof(attr))
	if err != nil {
		return -1, os.NewSyscallError("bpf(BPF_MAP_CREATE)", err)
	}
	return fd, nil
}

// insert adds a key of 8 bytes to a map.
func insert(mapFD int, key uint64) error {
	value := uint64(1)
	attr := struct {
		fd         uint32
		_          uint32
		key, value unsafe.Pointer
		flags      uint64
	}{fd: uint32(mapFD), key: unsafe.Pointer(&key), value: unsafe.Pointer(&value)}
	_, err := bpf(unix.BPF_MAP_UPDATE_ELEM, unsafe.Pointer(&attr), unsafe.Sizeof(attr))
	return os.NewSyscallError("bpf(BPF_MAP_UPDATE_ELEM)", err)
}

// remove takes a key out of a map.
func remove(mapFD int, key uint64) error {
	attr := struct {
		fd  uint32
		_   uint32
		key unsafe.Pointer
	}{fd: uint32(mapFD), key: unsafe.Pointer(&key)}
	_, err := bpf(unix.BPF_MAP_DELETE_ELEM, unsafe.Pointer(&attr), unsafe.Sizeof(attr))
	return os.NewSyscallError("bpf(BPF_MAP_DELETE_ELEM)", err)
}

// load has the kernel check and translate a program. What its verifier says is in the error.
func load(name string, kind, attach uint32, p *program) (int, error) {
	code := p.bytes()
	license := [1]byte{}
	attr := struct {
		kind, count     uint32
		code, license   unsafe.Pointer
		logLevel, logSz uint32
		log             unsafe.Pointer
		_, _            uint32
		name            [16]byte
		ifindex, attach uint32
	}{kind: kind, count: uint32(len(p.insns)), code: unsafe.Pointer(&code[0]), license: unsafe.Pointer(&license[0]), attach: attach}
	copy(attr.name[:15], name)
	fd, err := bpf(unix.BPF_PROG_LOAD, unsafe.Pointer(&attr), unsafe.Sizeof(attr))
	if err != nil {
		log := make([]byte, 64<<10)
		attr.logLevel, attr.logSz, attr.log = 1, uint32(len(log)), unsafe.Pointer(&log[0])
		if again, err := bpf(unix.BPF_PROG_LOAD, unsafe.Pointer(&attr), unsafe.Sizeof(attr)); err == nil {
			unix.Close(again)
		}
		return -1, fmt.Errorf("load the BPF program %s: %w: %s", name, err, lastLines(unix.ByteSliceToString(log)))
	}
	return fd, nil
}

// lastLines are the verifier's reason, which follows what it has looked at.
func lastLines(log string) string {
	lines := strings.Split(strings.TrimSpace(log), "\n")
	return strings.Join(lines[max(0, len(lines)-3):], "; ")
}

// link attaches a program to a cgroup and all below it, beside those of others, until the
// descriptor is closed.
func link(prog, cgroup int, attach uint32) (int, error) {
	attr := struct{ prog, target, attach, flags uint32 }{uint32(prog), uint32(cgroup), attach, 0}
	fd, err := bpf(unix.BPF_LINK_CREATE, unsafe.Pointer(&attr), unsafe.Sizeof(attr))
	if err != nil {
		return -1, os.NewSyscallError("bpf(BPF_LINK_CREATE)", err)
	}
	return fd, nil
}
