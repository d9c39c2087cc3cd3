package usernet

import (
	"context"
	"encoding/binary"
	"errors"
	"testing"

	"golang.org/x/sys/unix"
	"gvisor.dev/gvisor/pkg/buffer"
	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/header"
	"gvisor.dev/gvisor/pkg/tcpip/stack"

	"github.com/wsl2/wsl2/vmm/virtio/net"
)

// numbered sends a frame that says which one it is.
func numbered(t *testing.T, l *link, i int) tcpip.Error {
	t.Helper()
	data := binary.BigEndian.AppendUint32(make([]byte, 0, 8<<10), uint32(i))[:8<<10]
	pkt := stack.NewPacketBuffer(stack.PacketBufferOptions{ReserveHeaderBytes: header.EthernetMinimumSize, Payload: buffer.MakeWithData(data)})
	defer pkt.DecRef()
	pkt.EgressRoute.RemoteLinkAddress = l.guest
	l.AddHeader(pkt)
	return l.write(pkt)
}

// fill sends numbered frames to a guest that takes none until one is dropped, and tells how many were not.
func fill(t *testing.T, l *link) (sent int) {
	t.Helper()
	for i := range 2 * maxQueued / (8 << 10) {
		switch err := numbered(t, l, i).(type) {
		case nil:
		case *tcpip.ErrNoBufferSpace:
			return i
		default:
			t.Fatal(err)
		}
	}
	t.Fatal("the queue is never full")
	return 0
}

// TestQueue: a guest that takes nothing holds nobody up and a bounded number of frames, which it gets in their
// order when it goes on; then there is room.
func TestQueue(t *testing.T) {
	l, far := newWire(t)
	served := make(chan error)
	go func() { served <- l.serve() }()
	sent := fill(t, l)
	l.out.mu.Lock()
	size := l.out.size
	l.out.mu.Unlock()
	if size > maxQueued {
		t.Errorf("%d bytes wait", size)
	}
	ctx, cancel := context.WithCancelCause(t.Context())
	enough := errors.New("enough")
	room := make(chan error)
	go func() { room <- l.room(ctx) }()
	eventually(t, "it waits", func() bool { return len(l.out.turn) > 0 })
	cancel(enough)
	if err := <-room; err != enough {
		t.Errorf("room in a full queue: %v", err)
	}
	go func() { room <- l.room(t.Context()) }()
	frame := make([]byte, 1<<16)
	for i := range sent {
		n, err := unix.Read(far, frame)
		if err != nil || n < net.HeaderLen+header.EthernetMinimumSize+4 {
			t.Fatalf("frame %d of %d: %d bytes, %v", i, sent, n, err)
		}
		if got := binary.BigEndian.Uint32(frame[net.HeaderLen+header.EthernetMinimumSize:]); int(got) != i {
			t.Fatalf("frame %d came as number %d", got, i)
		}
	}
	if err := <-room; err != nil {
		t.Error(err)
	}
	if err := numbered(t, l, sent); err != nil {
		t.Errorf("after the last one was taken: %v", err)
	}
	l.shutdown()
	if err := <-served; err != nil {
		t.Error(err)
	}
	l.close()
}

// TestQueueShutdown: the end of the link ends the wait for the guest, and what waits is let go.
func TestQueueShutdown(t *testing.T) {
	l, _ := newWire(t)
	served := make(chan error)
	go func() { served <- l.serve() }()
	fill(t, l)
	l.shutdown()
	if err := <-served; err != nil {
		t.Error(err)
	}
	if l.out.first() != nil || l.out.size != 0 {
		t.Errorf("%d bytes still wait", l.out.size)
	}
	if _, ok := numbered(t, l, 0).(*tcpip.ErrClosedForSend); !ok {
		t.Error("it goes on after the end")
	}
	l.close()
}
