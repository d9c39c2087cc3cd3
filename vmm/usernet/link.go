package usernet

import (
	"fmt"
	"os"
	"sync"
	"sync/atomic"
	"syscall"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
	"golang.org/x/time/rate"
	"gvisor.dev/gvisor/pkg/buffer"
	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/header"
	"gvisor.dev/gvisor/pkg/tcpip/stack"

	"github.com/wsl2/wsl2/vmm/virtio/net"
)

// smallFrame is what most frames are smaller than. They are read into one buffer of
// that size, and what is larger into a second one.
const smallFrame = 2 << 10

// maxIovecs is IOV_MAX.
const maxIovecs = 1024

// link is the stack's end of the wire: a stack.LinkEndpoint whose frames are
// records of a socket (vmm/virtio/net).
//
// Sending never blocks: the stack sends with a connection's lock held, and one of its few processors
// would go round in circles until it is free. What the guest does not take at once waits in a queue
// (queue.go). Those who have much to send wait for room there before they give it to the stack.
//
// Who waits is parked by the runtime, never blocked in a system call: what the last frame has
// woken would have to wait for the runtime to find that out, for as long as a millisecond.
type link struct {
	file     *os.File // holds fd
	raw      syscall.RawConn
	fd       int
	mtu      uint32
	mac      tcpip.LinkAddress // ours
	guest    tcpip.LinkAddress
	up, down *rate.Limiter // nil: no limit
	offloads atomic.Bool   // the guest takes frames with work left to do
	over     chan struct{} // closed by shutdown
	end      sync.Once
	out      queue

	mu         sync.RWMutex
	dispatcher stack.NetworkDispatcher // guarded by mu
}

func newLink(fd int, c Config) (*link, error) {
	if err := unix.SetNonblock(fd, true); err != nil {
		return nil, fmt.Errorf("usernet: set up the link: %w", os.NewSyscallError("fcntl", err))
	}
	file := os.NewFile(uintptr(fd), "link")
	raw, err := file.SyscallConn()
	if err != nil {
		return nil, fmt.Errorf("usernet: set up the link: %w", err)
	}
	l := &link{file: file, raw: raw, fd: fd, mtu: uint32(c.MTU), mac: tcpip.LinkAddress(c.GatewayMAC[:]), guest: tcpip.LinkAddress(c.GuestMAC[:]), over: make(chan struct{}), out: newQueue()}
	if n := c.BytesPerSecond; n > 0 {
		// A tenth of a second at once, and at least one frame.
		burst := int(max(min(n/10, 1<<30), net.MaxFrame+net.HeaderLen))
		l.up, l.down = rate.NewLimiter(rate.Limit(n), burst), rate.NewLimiter(rate.Limit(n), burst)
		// No more than passes in the time that a frame may wait, but two of the largest.
		l.out.limit = int(min(maxQueued, max(min(n, maxQueued)*uint64(maxThrottle/time.Second), uint64(2*(net.MaxFrame+stack.PacketBufferStructSize)))))
	}
	return l, nil
}

// maxThrottle bounds how long a frame waits for its turn; the smallest limit lets the largest one pass within it.
const maxThrottle = 2 * time.Second

// throttle waits until a limit lets a frame of n bytes pass, as on a slow wire. It is false for a frame that
// is to be lost: those of many connections would have to wait for minutes, and what holds them with them.
func (l *link) throttle(limit *rate.Limiter, n int) bool {
	if limit == nil {
		return true
	}
	turn := limit.ReserveN(time.Now(), min(n, limit.Burst()))
	wait := turn.Delay()
	switch {
	case wait == 0:
		return true
	case wait > maxThrottle:
		turn.Cancel()
		return false
	}
	timer := time.NewTimer(wait)
	defer timer.Stop()
	select {
	case <-timer.C:
		return true
	case <-l.over:
		return false
	}
}

// serve reads frames until the other end closes, and sends what waits meanwhile. A guest's frames are
// handled one after the other; TCP has goroutines of its own.
func (l *link) serve() error {
	var sender sync.WaitGroup
	sender.Go(l.drain)
	defer func() {
		l.shutdown()
		sender.Wait()
		l.out.close()
	}()
	var raw [net.HeaderLen]byte
	iov := [3]unix.Iovec{{Base: &raw[0], Len: net.HeaderLen}}
	msg := unix.Msghdr{Iov: &iov[0], Iovlen: uint64(len(iov))}
	var views [2]*buffer.View
	sizes := [2]int{smallFrame, net.MaxFrame - smallFrame}
	defer func() {
		for _, v := range views {
			if v != nil {
				v.Release()
			}
		}
	}()
	var n uintptr
	var errno unix.Errno
	receive := func(fd uintptr) (done bool) {
		n, _, errno = unix.RawSyscall(unix.SYS_RECVMSG, fd, uintptr(unsafe.Pointer(&msg)), unix.MSG_DONTWAIT)
		return errno != unix.EAGAIN
	}
	for {
		for i := range views {
			if views[i] == nil {
				views[i] = buffer.NewViewSize(sizes[i])
				iov[i+1] = unix.Iovec{Base: views[i].BasePtr(), Len: uint64(sizes[i])}
			}
		}
		if err := l.raw.Read(receive); err != nil {
			return fmt.Errorf("usernet: read a frame: %w", err)
		}
		switch {
		case errno == unix.EINTR:
			continue
		case errno != 0 && errno != unix.ECONNRESET:
			return fmt.Errorf("usernet: read a frame: %w", os.NewSyscallError("recvmsg", errno))
		case errno != 0 || n == 0:
			return nil
		}
		if on, ok := net.Offloads(raw[:min(int(n), len(raw))]); ok {
			l.offloads.Store(on)
			continue
		}
		if n < net.HeaderLen+header.EthernetMinimumSize || msg.Flags&unix.MSG_TRUNC != 0 {
			continue
		}
		if !l.throttle(l.up, int(n)) {
			continue
		}
		var frame buffer.Buffer
		left := int(n) - net.HeaderLen
		for i := 0; left > 0; i++ {
			v := views[i]
			if i > 0 && left < sizes[i]/4 {
				// What waits to be read would hold four times its size.
				v = buffer.NewViewWithData(v.AsSlice()[:left])
			} else {
				views[i] = nil
				if left < sizes[i] {
					v.CapLength(left)
				}
			}
			left -= v.Size()
			if err := frame.Append(v); err != nil {
				return fmt.Errorf("usernet: read a frame: %w", err)
			}
		}
		l.deliver(frame)
	}
}

func (l *link) deliver(frame buffer.Buffer) {
	pkt := stack.NewPacketBuffer(stack.PacketBufferOptions{Payload: frame})
	defer pkt.DecRef()
	if !l.ParseHeader(pkt) {
		return
	}
	eth := header.Ethernet(pkt.LinkHeader().Slice())
	// A card without ARP sends to itself what is for anybody (guest/network).
	if dst := eth.DestinationAddress(); dst != l.mac && dst != l.guest && !header.IsMulticastEthernetAddress(dst) && dst != header.EthernetBroadcastAddress {
		return // of those behind a bridge of the guest's to each other
	}
	l.mu.RLock()
	d := l.dispatcher
	l.mu.RUnlock()
	if d != nil {
		d.DeliverNetworkPacket(eth.Type(), pkt)
	}
}

// shutdown ends serve, and with it what sends.
func (l *link) shutdown() {
	l.end.Do(func() { close(l.over) })
	_ = unix.Shutdown(l.fd, unix.SHUT_RDWR)
}

// close releases the descriptor; nothing sends any more.
func (l *link) close() { l.file.Close() }

// send gives a frame to the guest. wait is false for EAGAIN instead of a wait for room.
func (l *link) send(pkt *stack.PacketBuffer, wait bool) (errno unix.Errno) {
	var h net.Header
	if gso := pkt.GSOOptions; gso.Type != stack.GSONone {
		h.HdrLen = uint16(pkt.HeaderSize())
		if gso.NeedsCsum {
			h.Flags = net.NeedsCsum
			h.CsumStart = header.EthernetMinimumSize + gso.L3HdrLen
			h.CsumOffset = gso.CsumOffset
		}
		if pkt.Data().Size() > int(gso.MSS) {
			h.GSOSize = gso.MSS
			h.GSO = net.GSOTCPv4
			if gso.Type == stack.GSOTCPv6 {
				h.GSO = net.GSOTCPv6
			}
		}
	}
	var raw [net.HeaderLen]byte
	h.Put(&raw)
	// Frames are few pieces: headers, and the segments that a TCP packet is made of.
	var few [16]unix.Iovec
	iov := append(few[:0], unix.Iovec{Base: &raw[0], Len: net.HeaderLen})
	for _, b := range pkt.AsSlices() {
		if len(b) > 0 {
			iov = append(iov, unix.Iovec{Base: unsafe.SliceData(b), Len: uint64(len(b))})
		}
	}
	if len(iov) > maxIovecs {
		// Many small writes of the host's peer, put together; the kernel would take it never.
		rest := iov[maxIovecs-1:]
		size := 0
		for _, v := range rest {
			size += int(v.Len)
		}
		b := make([]byte, 0, size)
		for _, v := range rest {
			b = append(b, unsafe.Slice(v.Base, v.Len)...)
		}
		iov = append(iov[:maxIovecs-1], unix.Iovec{Base: unsafe.SliceData(b), Len: uint64(size)})
	}
	msg := unix.Msghdr{Iov: &iov[0], Iovlen: uint64(len(iov))}
	send := func(fd uintptr) (done bool) {
		for {
			_, _, errno = unix.RawSyscall(unix.SYS_SENDMSG, fd, uintptr(unsafe.Pointer(&msg)), unix.MSG_NOSIGNAL|unix.MSG_DONTWAIT)
			if errno != unix.EINTR {
				return errno != unix.EAGAIN
			}
		}
	}
	// First without a word to the runtime, as there usually is room.
	if send(uintptr(l.fd)) || !wait {
		return errno
	}
	if err := l.raw.Write(send); err != nil {
		return unix.EPIPE
	}
	return errno
}

// maxSegment is the most of a stream that one frame holds.
const maxSegment = 65535 - header.IPv6MinimumSize - header.TCPHeaderMaximumSize

// GSOMaxSize implements stack.GSOEndpoint. The stack's TCP takes off what headers could need at most.
func (l *link) GSOMaxSize() uint32 { return maxSegment + header.TCPTotalHeaderMaximumSize + 1 }

// SupportedGSO implements stack.GSOEndpoint.
func (l *link) SupportedGSO() stack.SupportedGSO {
	if l.offloads.Load() {
		return stack.HostGSOSupported
	}
	return stack.GSONotSupported
}

// Capabilities implements stack.NetworkLinkEndpoint. The guest's checksums are not
// looked at: they protect nothing between its memory and ours.
func (l *link) Capabilities() stack.LinkEndpointCapabilities {
	return stack.CapabilityRXChecksumOffload | stack.CapabilityResolutionRequired
}

// Attach implements stack.NetworkLinkEndpoint.
func (l *link) Attach(d stack.NetworkDispatcher) {
	l.mu.Lock()
	l.dispatcher = d
	l.mu.Unlock()
}

// IsAttached implements stack.NetworkLinkEndpoint.
func (l *link) IsAttached() bool {
	l.mu.RLock()
	defer l.mu.RUnlock()
	return l.dispatcher != nil
}

// AddHeader implements stack.NetworkLinkEndpoint.
func (l *link) AddHeader(pkt *stack.PacketBuffer) {
	header.Ethernet(pkt.LinkHeader().Push(header.EthernetMinimumSize)).Encode(&header.EthernetFields{
		SrcAddr: l.mac, DstAddr: pkt.EgressRoute.RemoteLinkAddress, Type: pkt.NetworkProtocolNumber,
	})
}

// ParseHeader implements stack.NetworkLinkEndpoint.
func (l *link) ParseHeader(pkt *stack.PacketBuffer) bool {
	_, ok := pkt.LinkHeader().Consume(header.EthernetMinimumSize)
	return ok
}

// The rest of stack.LinkEndpoint has nothing to decide or to do here.

func (l *link) MTU() uint32                             { return l.mtu }
func (l *link) SetMTU(uint32)                           {}
func (l *link) MaxHeaderLength() uint16                 { return header.EthernetMinimumSize }
func (l *link) LinkAddress() tcpip.LinkAddress          { return l.mac }
func (l *link) SetLinkAddress(tcpip.LinkAddress)        {}
func (l *link) Wait()                                   {}
func (l *link) ARPHardwareType() header.ARPHardwareType { return header.ARPHardwareEther }
func (l *link) Close()                                  {}
func (l *link) SetOnCloseAction(func())                 {}
