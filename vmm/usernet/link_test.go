package usernet

import (
	"bytes"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	"golang.org/x/time/rate"
	"gvisor.dev/gvisor/pkg/buffer"
	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/header"
	"gvisor.dev/gvisor/pkg/tcpip/stack"

	"github.com/wsl2/wsl2/vmm/virtio/net"
)

// newWire is a link and the other end of its socket.
func newWire(t *testing.T) (l *link, far int) {
	pair := socketpair(t)
	t.Cleanup(func() { unix.Close(pair[1]) })
	timeout := unix.NsecToTimeval(deadline.Nanoseconds())
	if err := unix.SetsockoptTimeval(pair[1], unix.SOL_SOCKET, unix.SO_RCVTIMEO, &timeout); err != nil {
		t.Fatal(err)
	}
	l, err := newLink(pair[0], testConfig())
	if err != nil {
		t.Fatal(err)
	}
	return l, pair[1]
}

// TestLinkManyPieces: a packet of more pieces than the kernel takes at once is one frame even so.
func TestLinkManyPieces(t *testing.T) {
	l, far := newWire(t)
	defer l.close()
	want := random(5000)
	var data buffer.Buffer
	for _, b := range want {
		if err := data.Append(buffer.NewViewWithData([]byte{b})); err != nil {
			t.Fatal(err)
		}
	}
	pkt := stack.NewPacketBuffer(stack.PacketBufferOptions{ReserveHeaderBytes: header.EthernetMinimumSize, Payload: data})
	defer pkt.DecRef()
	pkt.EgressRoute.RemoteLinkAddress = l.guest
	l.AddHeader(pkt)
	if err := l.write(pkt); err != nil {
		t.Fatal(err)
	}
	got := make([]byte, 1<<16)
	n, err := unix.Read(far, got)
	if err != nil || !bytes.Equal(got[net.HeaderLen+header.EthernetMinimumSize:n], want) {
		t.Errorf("%d bytes came, %v", n, err)
	}
}

// TestThrottle: a frame whose turn is far away is lost at once, and the end of the link ends the wait.
func TestThrottle(t *testing.T) {
	l, _ := newWire(t)
	defer l.close()
	limit := rate.NewLimiter(1000, 1000)
	if !l.throttle(limit, 1000) {
		t.Error("the first one is lost")
	}
	for range 3 {
		limit.ReserveN(time.Now(), 1000)
	}
	if l.throttle(limit, 1000) {
		t.Error("one waited for seconds")
	}
	limit = rate.NewLimiter(rate.Every(maxThrottle), 1)
	limit.AllowN(time.Now(), 1)
	l.shutdown()
	if l.throttle(limit, 1) {
		t.Error("it goes on after the end")
	}
}

// frames keeps what a link delivers.
type frames chan buffer.Buffer

func (f frames) DeliverNetworkPacket(_ tcpip.NetworkProtocolNumber, pkt *stack.PacketBuffer) {
	f <- pkt.ToBuffer()
}
func (f frames) DeliverLinkPacket(tcpip.NetworkProtocolNumber, *stack.PacketBuffer) {}

// TestLinkFrameMemory: what is kept of a frame is not many times its size.
func TestLinkFrameMemory(t *testing.T) {
	l, far := newWire(t)
	got := make(frames, 1)
	l.Attach(got)
	served := make(chan error)
	go func() { served <- l.serve() }()
	for _, size := range []int{smallFrame + 100, 8 << 10, 40 << 10, net.MaxFrame} {
		frame := make([]byte, net.HeaderLen+size)
		copy(frame[net.HeaderLen:], string(l.mac))
		copy(frame[net.HeaderLen+header.EthernetMinimumSize:], random(size-header.EthernetMinimumSize))
		if _, err := unix.Write(far, frame); err != nil {
			t.Fatal(err)
		}
		b := <-got
		held := 0
		views := b.AsViewList()
		for v := views.Front(); v != nil; v = v.Next() {
			held += v.Capacity()
		}
		if held > 4*size || !bytes.Equal(b.Flatten(), frame[net.HeaderLen:]) {
			t.Errorf("a frame of %d bytes holds %d, or is another one", size, held)
		}
		b.Release()
	}
	l.shutdown()
	if err := <-served; err != nil {
		t.Error(err)
	}
	l.close()
}
