package listeners

import "golang.org/x/sys/unix"

// What the programs say of a socket: a record of two uint64, its cookie and one of these.
const (
	socketClosed = 0
	socketOpened = 1
	recordSize   = 16
)

// Offsets in the programs' contexts (struct bpf_sock_ops, struct bpf_sock).
const (
	opsOp        = 0
	sockProtocol = 12
	sockSrcPort  = 44
)

const stateListen = 10 // TCP_LISTEN

// maps are the descriptors of what programs share with us.
type kernelMaps struct {
	ring int
	// namespaces holds the cookies of the network namespaces that count.
	namespaces int
	// told holds the cookies of the sockets that were told of: of those that are closed the
	// others, clients' that never had a port of their own, are nobody's business. What state a socket is in by
	// then says nothing: a listener may have been shut down before.
	told int
}

func newProgram() *program {
	p := &program{labels: map[string]int{}, jumps: map[int]string{}}
	p.move(r6, r1)
	return p
}

// counts leaves the program unless the socket's network namespace counts.
func (p *program) counts(m kernelMaps) {
	p.move(r1, r6)
	p.call(helperNetnsCookie)
	p.store64(-24, r0)
	p.set64(r1, pseudoMapFD, uint64(m.namespaces))
	p.move(r2, r10)
	p.add(r2, -24)
	p.call(helperMapLookup)
	p.jump(unix.BPF_JEQ, r0, 0, "out")
}

// record makes the record in the frame, at r10-16.
func (p *program) record(what int32) {
	p.move(r1, r6)
	p.call(helperSocketCookie)
	p.store64(-16, r0)
	p.set(r1, what)
	p.store64(-8, r1)
}

// finish sends the record, and lets the socket do what it was about to.
func (p *program) finish(m kernelMaps) *program {
	p.set64(r1, pseudoMapFD, uint64(m.ring))
	p.move(r2, r10)
	p.add(r2, -16)
	p.set(r3, recordSize)
	p.set(r4, unix.BPF_RB_FORCE_WAKEUP)
	p.call(helperRingOutput)
	p.label("out")
	p.set(r0, 1)
	p.exit()
	return p
}

// tcpListen runs when a TCP socket has begun to listen (BPF_SOCK_OPS_TCP_LISTEN_CB).
func tcpListen(m kernelMaps) *program {
	p := newProgram()
	p.load32(r2, r6, opsOp)
	p.jump(unix.BPF_JNE, r2, unix.BPF_SOCK_OPS_TCP_LISTEN_CB, "out")
	p.counts(m)
	return p.tell(m)
}

// udpBind runs when a socket was given a port by bind(2). Ports of the range that the
// kernel chooses from are those of clients, and not told.
func udpBind(m kernelMaps, ephemeral portRange) *program {
	p := newProgram()
	p.load32(r2, r6, sockProtocol)
	p.jump(unix.BPF_JNE, r2, unix.IPPROTO_UDP, "out")
	p.load32(r2, r6, sockSrcPort)
	p.jump(unix.BPF_JLT, r2, int32(ephemeral.first), "served")
	p.jump(unix.BPF_JLE, r2, int32(ephemeral.last), "out")
	p.label("served")
	p.counts(m)
	return p.tell(m)
}

// tell remembers the socket, and sends the record that it has been opened.
func (p *program) tell(m kernelMaps) *program {
	p.record(socketOpened)
	p.set64(r1, pseudoMapFD, uint64(m.told))
	p.move(r2, r10)
	p.add(r2, -16)
	p.move(r3, r10)
	p.add(r3, -8)
	p.set(r4, unix.BPF_ANY)
	p.call(helperMapUpdate)
	p.jump(unix.BPF_JNE, r0, 0, "out") // full: its end could not be told
	return p.finish(m)
}

// release runs when the last descriptor of a socket is closed.
func release(m kernelMaps) *program {
	p := newProgram()
	p.record(socketClosed)
	p.set64(r1, pseudoMapFD, uint64(m.told))
	p.move(r2, r10)
	p.add(r2, -16)
	p.call(helperMapDelete)
	p.jump(unix.BPF_JNE, r0, 0, "out") // it was not there
	return p.finish(m)
}
