package vhostuser

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"slices"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/wsl2/wsl2/vmm/virtio"
)

func TestEcho(t *testing.T) {
	dev := &echoDevice{queues: 3}
	f := serve(t, dev, nil)
	features := f.negotiate()
	if want := dev.Features() | virtio.RingFeatures | featureProtocol | featureAccessPlatform; features != want {
		t.Errorf("features %#x, want %#x", features, want)
	}
	// The driver here knows neither event index nor indirect tables.
	f.do(reqSetFeatures, u64s(virtio.FeatureVersion1|featureProtocol))
	if n := binary.LittleEndian.Uint64(f.ask(reqGetQueueNum, nil)); n != 3 {
		t.Errorf("%d queues, want 3", n)
	}
	// QEMU's order; ring 2 stays unused, as vsock's event queue does.
	f.memory()
	f.setRing(0, 0)
	f.setRing(1, 0)
	if q, _ := dev.running(); q != nil {
		t.Fatalf("device runs with queues %v before any is enabled", q)
	}
	f.enable(0, 1)
	if q, _ := dev.running(); q != nil {
		t.Fatalf("device runs with queues %v while ring 1 is not yet enabled", q)
	}
	f.enable(1, 1)
	if q, _ := dev.running(); !slices.Equal(q, []int{0, 1}) {
		t.Fatalf("device runs with queues %v, want 0 and 1", q)
	}
	for range 3 * ringSize {
		f.echo(0, "over ring 0")
		f.echo(1, "over ring 1")
	}

	// The calls are exchanged under a running device.
	f.do(reqSetVringCall, u64s(0|vringNoFD))
	f.do(reqSetVringCall, u64s(0), f.ring(0).call.FD())
	f.echo(0, "after the call was exchanged")

	// A new table, as when the guest's memory map changes.
	f.memory()
	f.echo(1, "after the memory table was sent again")

	// Stop as QEMU does, and go on where it ended.
	f.enable(0, 0)
	if q, _ := dev.running(); q != nil {
		t.Fatalf("device runs with queues %v after one was disabled", q)
	}
	f.enable(1, 0)
	for i := range 2 {
		p := f.ask(reqGetVringBase, u32s(uint32(i), 0))
		if got := binary.LittleEndian.Uint32(p[4:]); uint16(got) != f.rings[i].next {
			t.Errorf("base of ring %d = %d, want %d", i, got, f.rings[i].next)
		}
	}
	_, before := dev.running()
	for i := range 2 {
		f.setRing(i, f.rings[i].next)
	}
	f.enable(0, 1)
	f.enable(1, 1)
	if _, n := dev.running(); n != before+1 {
		t.Errorf("device was started %d times to start two rings", n-before)
	}
	f.echo(0, "second life")
	f.echo(1, "second life")

	f.do(reqResetDevice, nil)
	if q, _ := dev.running(); q != nil {
		t.Fatalf("device runs with queues %v after RESET_DEVICE", q)
	}
	f.c.Close()
	if err := f.wait(); err != nil {
		t.Errorf("Serve: %v", err)
	}
}

// Without VHOST_USER_F_PROTOCOL_FEATURES rings are enabled from the start, and
// join a running device one by one.
func TestUnnamedEnable(t *testing.T) {
	dev := &echoDevice{queues: 2}
	f := serve(t, dev, nil)
	f.negotiate()
	f.do(reqSetFeatures, u64s(virtio.FeatureVersion1))
	f.memory()
	f.setRing(0, 0)
	f.echo(0, "alone")
	f.setRing(1, 0)
	f.echo(0, "in company")
	f.echo(1, "in company")
}

func TestConfig(t *testing.T) {
	dev := &echoDevice{queues: 1}
	f := serve(t, dev, nil)
	dev.set(7)
	f.negotiate()
	read := func() uint64 {
		t.Helper()
		p := f.ask(reqGetConfig, append(u32s(0, 60, 0), make([]byte, 60)...))
		if len(p) != configHeader+60 {
			t.Fatalf("configuration of %d bytes", len(p)-configHeader)
		}
		return binary.LittleEndian.Uint64(p[configHeader:])
	}
	changed := func() {
		t.Helper()
		r, flags, p := recv(t, f.back)
		if r != backendConfigChange || flags != flagVersion || len(p) != 0 {
			t.Fatalf("back-end request %d, flags %#x, %d bytes", r, flags, len(p))
		}
	}
	if v := read(); v != 7 {
		t.Errorf("configuration = %d, want 7", v)
	}
	// A change that nobody could be told of, for the device is not running.
	dev.set(8)
	f.memory()
	f.setRing(0, 0)
	f.enable(0, 1)
	changed()
	if v := read(); v != 8 {
		t.Errorf("configuration = %d, want 8", v)
	}
	// While it runs, the device's side waits until the front end has the new value.
	done := make(chan struct{})
	go func() {
		dev.set(9)
		close(done)
	}()
	changed()
	select {
	case <-done:
		t.Error("ConfigChanged returned before the front end read the configuration")
	default:
	}
	if v := read(); v != 9 {
		t.Errorf("configuration = %d, want 9", v)
	}
	<-done
	f.do(reqSetConfig, append(u32s(0, 8, 0), u64s(10)...))
	if v := read(); v != 10 {
		t.Errorf("configuration = %d, want 10", v)
	}
	// A front end that stops the device instead lets the device's side go.
	done = make(chan struct{})
	go func() {
		dev.set(11)
		close(done)
	}()
	changed()
	f.enable(0, 0)
	<-done
	// And so does one that dies.
	f.enable(0, 1)
	changed()
	done = make(chan struct{})
	go func() {
		dev.set(12)
		close(done)
	}()
	changed()
	f.c.Close()
	<-done
}

// A front end that never reads its channel does not hold up a device that starts.
func TestConfigChannelFull(t *testing.T) {
	dev := &echoDevice{queues: 1}
	f := serve(t, dev, nil)
	f.negotiate()
	f.memory()
	f.setRing(0, 0)
	f.ask(reqGetConfig, append(u32s(0, 60, 0), make([]byte, 60)...))
	for i := range uint64(2000) {
		dev.set(i + 1)
		f.enable(0, 1)
		f.enable(0, 0)
	}
}

func TestDeviceFailed(t *testing.T) {
	failed := make(chan error, 1)
	dev := &echoDevice{queues: 1}
	f := serve(t, dev, func(err error) { failed <- err })
	f.negotiate()
	f.do(reqSetFeatures, u64s(virtio.FeatureVersion1|featureProtocol))
	f.memory()
	f.setRing(0, 0)
	errFD := f.ring(0).call // any eventfd of ours
	f.do(reqSetVringErr, u64s(0), errFD.FD())
	f.enable(0, 1)
	// A head beyond the descriptor table.
	r := f.rings[0]
	binary.LittleEndian.PutUint16(f.mem[r.off+availOff+4:], 99)
	binary.LittleEndian.PutUint16(f.mem[r.off+availOff+2:], 1)
	r.kick.Signal()
	select {
	case err := <-failed:
		if !errors.Is(err, virtio.ErrProtocol) {
			t.Errorf("failed with %v", err)
		}
	case <-time.After(timeout):
		t.Fatal("nobody was told")
	}
	if err := errFD.Wait(); err != nil {
		t.Fatal(err)
	}
}

func TestStartError(t *testing.T) {
	boom := errors.New("boom")
	dev := &echoDevice{queues: 1, startErr: boom}
	f := serve(t, dev, nil)
	f.negotiate()
	f.memory()
	f.setRing(0, 0)
	f.send(reqSetVringEnable, flagNeedReply, u32s(0, 1))
	if _, _, p := recv(t, f.c); binary.LittleEndian.Uint64(p) == 0 {
		t.Error("acknowledged")
	}
	if err := f.wait(); !errors.Is(err, boom) {
		t.Errorf("Serve: %v", err)
	}
}

// Each case is one message, sent after a device is set up and running.
func TestRefused(t *testing.T) {
	pipe := func(t *testing.T) int {
		r, w, err := os.Pipe()
		if err != nil {
			t.Fatal(err)
		}
		w.Close()
		t.Cleanup(func() { r.Close() })
		return int(r.Fd())
	}
	region := func(guest, size, user, off uint64) []byte {
		return append(u32s(1, 0), u64s(guest, size, user, off)...)
	}
	for _, tc := range []struct {
		name    string
		request request
		flags   uint32
		payload []byte
		fds     func(t *testing.T, f *frontend) []int
	}{
		{name: "unknown request", request: 99},
		{name: "SET_LOG_BASE, not negotiated", request: 6, payload: u64s(0, 0)},
		{name: "version 2", request: reqGetFeatures, flags: 3},
		{name: "a reply", request: reqGetFeatures, flags: flagReply},
		{name: "huge payload", request: reqSetFeatures, payload: make([]byte, maxPayload+1)},
		{name: "short u64", request: reqSetFeatures, payload: make([]byte, 4)},
		{name: "features not offered", request: reqSetFeatures, payload: u64s(1 << 60)},
		{name: "legacy driver", request: reqSetFeatures, payload: u64s(featureProtocol)},
		{name: "protocol features not offered", request: reqSetProtocolFeatures, payload: u64s(1 << 1)},
		{name: "unasked descriptors", request: reqSetOwner, fds: func(t *testing.T, f *frontend) []int { return []int{f.memfd, f.memfd} }},
		{name: "too many descriptors", request: reqSetOwner, fds: func(t *testing.T, f *frontend) []int { return slices.Repeat([]int{f.memfd}, maxRegions+5) }},
		{name: "table without descriptors", request: reqSetMemTable, payload: region(0, 4096, 0, 0)},
		{name: "table of no regions", request: reqSetMemTable, payload: u32s(0, 0)},
		{name: "table of 9 regions", request: reqSetMemTable, payload: u32s(9, 0)},
		{name: "table too short", request: reqSetMemTable, payload: append(u32s(2, 0), u64s(0, 4096, 0, 0)...), fds: func(t *testing.T, f *frontend) []int { return []int{f.memfd, f.memfd} }},
		{name: "empty region", request: reqSetMemTable, payload: region(0, 0, 0, 0), fds: memfdOf},
		{name: "region wraps around", request: reqSetMemTable, payload: region(1<<64-4096, 8192, 0, 0), fds: memfdOf},
		{name: "user address wraps around", request: reqSetMemTable, payload: region(0, 8192, 1<<64-4096, 0), fds: memfdOf},
		{name: "region behind its file", request: reqSetMemTable, payload: region(0, memSize, 0, 4096), fds: memfdOf},
		{name: "file offset wraps around", request: reqSetMemTable, payload: region(0, 4096, 0, 1<<64-4096), fds: memfdOf},
		{name: "regions overlap", request: reqSetMemTable, payload: append(u32s(2, 0), u64s(0, 8192, 0, 0, 4096, 8192, 1<<30, 0)...), fds: func(t *testing.T, f *frontend) []int { return []int{f.memfd, f.memfd} }},
		{name: "memory that can shrink", request: reqSetMemTable, payload: region(0, 4096, 0, 0), fds: func(t *testing.T, f *frontend) []int {
			fd := memfd(t, 4096, 0)
			t.Cleanup(func() { unix.Close(fd) })
			return []int{fd}
		}},
		{name: "memory that is a pipe", request: reqSetMemTable, payload: region(0, 4096, 0, 0), fds: func(t *testing.T, f *frontend) []int { return []int{pipe(t)} }},
		{name: "ring 1 of 1", request: reqSetVringNum, payload: u32s(1, 8)},
		{name: "size of a running ring", request: reqSetVringNum, payload: u32s(0, 8)},
		{name: "address of a running ring", request: reqSetVringAddr, payload: append(u32s(0, 0), u64s(0, 0, 0, 0)...)},
		{name: "call without a descriptor", request: reqSetVringCall, payload: u64s(0)},
		{name: "call with one too many", request: reqSetVringCall, payload: u64s(vringNoFD), fds: memfdOf},
		{name: "call that is a pipe", request: reqSetVringCall, payload: u64s(0), fds: func(t *testing.T, f *frontend) []int { return []int{pipe(t)} }},
		{name: "unknown bits beside a ring", request: reqSetVringCall, payload: u64s(1 << 40)},
		{name: "enable = 2", request: reqSetVringEnable, payload: u32s(0, 2)},
		{name: "channel that is a file", request: reqSetBackendReqFD, fds: memfdOf},
		{name: "configuration of 0 bytes", request: reqGetConfig, payload: u32s(0, 0, 0)},
		{name: "configuration beyond its end", request: reqGetConfig, payload: append(u32s(250, 8, 0), make([]byte, 8)...)},
		{name: "configuration wraps around", request: reqGetConfig, payload: append(u32s(0xffffffff, 8, 0), make([]byte, 8)...)},
		{name: "configuration longer than said", request: reqSetConfig, payload: append(u32s(0, 4, 0), make([]byte, 8)...)},
		{name: "configuration of a migration", request: reqSetConfig, payload: append(u32s(0, 8, 1), make([]byte, 8)...)},
	} {
		t.Run(tc.name, func(t *testing.T) {
			dev := &echoDevice{queues: 1}
			f := serve(t, dev, nil)
			f.negotiate()
			f.memory()
			f.setRing(0, 0)
			f.enable(0, 1)
			var fds []int
			if tc.fds != nil {
				fds = tc.fds(t, f)
			}
			f.send(tc.request, tc.flags, tc.payload, fds...)
			if err := f.wait(); !errors.Is(err, ErrProtocol) {
				t.Errorf("Serve: %v, want a protocol error", err)
			}
			if q, _ := dev.running(); q != nil {
				t.Error("the device still runs")
			}
		})
	}
}

func memfdOf(_ *testing.T, f *frontend) []int { return []int{f.memfd} }

// The same for rings that are not running.
func TestRefusedRing(t *testing.T) {
	addr := func(desc, used, avail uint64) []byte { return append(u32s(0, 0), u64s(desc, used, avail, 0)...) }
	for _, tc := range []struct {
		name    string
		request request
		payload []byte
	}{
		{"no descriptors", reqSetVringNum, u32s(0, 0)},
		{"too many descriptors", reqSetVringNum, u32s(0, 2*maxRingSize)},
		{"base beyond 16 bits", reqSetVringBase, u32s(0, 1<<16)},
		{"dirty logging", reqSetVringAddr, append(u32s(0, 1), u64s(userBase, userBase, userBase, 0)...)},
		{"no kick", reqSetVringKick, u64s(vringNoFD)},
		{"outside memory", reqSetVringAddr, addr(userBase, userBase+memSize, userBase+availOff)},
		{"guest addresses", reqSetVringAddr, addr(guestBase, guestBase+usedOff, guestBase+availOff)},
		{"across the end of a region", reqSetVringAddr, addr(userBase+memSize-16, userBase+usedOff, userBase+availOff)},
		{"unaligned", reqSetVringAddr, addr(userBase+1, userBase+usedOff, userBase+availOff)},
		{"unaligned used ring", reqSetVringAddr, addr(userBase, userBase+usedOff+2, userBase+availOff)},
		{"not a power of two", reqSetVringNum, u32s(0, 7)},
	} {
		t.Run(tc.name, func(t *testing.T) {
			f := serve(t, &echoDevice{queues: 1}, nil)
			f.negotiate()
			f.memory()
			r := f.ring(0)
			f.do(reqSetVringNum, u32s(0, ringSize))
			f.do(reqSetVringAddr, addr(userBase, userBase+usedOff, userBase+availOff))
			f.enable(0, 1)
			f.send(tc.request, 0, tc.payload)
			// Rings are judged when they start; what came before may have ended it.
			b := append(u32s(uint32(reqSetVringKick), flagVersion, 8), u64s(0)...)
			f.c.WriteMsgUnix(b, unix.UnixRights(r.kick.FD()), nil)
			if err := f.wait(); err == nil {
				t.Error("accepted")
			}
		})
	}
}

// A front end that dies in the middle of a message.
func TestTruncated(t *testing.T) {
	whole := append(u32s(uint32(reqSetFeatures), flagVersion, 8), u64s(0)...)
	for n := range len(whole) {
		t.Run(fmt.Sprint(n), func(t *testing.T) {
			f := serve(t, &echoDevice{queues: 1}, nil)
			f.c.Write(whole[:n])
			f.c.Close()
			err := f.wait()
			if n == 0 && err != nil || n > 0 && !errors.Is(err, ErrProtocol) {
				t.Errorf("Serve: %v", err)
			}
		})
	}
}

// A front end that is killed has answers unread: it went away like any other.
func TestKilled(t *testing.T) {
	f := serve(t, &echoDevice{queues: 1}, nil)
	f.send(reqGetFeatures, flagVersion, nil)
	rc, err := f.c.SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	// The answer is waited for, but not read.
	err = rc.Read(func(fd uintptr) bool {
		var b [1]byte
		n, _, err := unix.Recvfrom(int(fd), b[:], unix.MSG_PEEK|unix.MSG_DONTWAIT)
		return n > 0 || err != unix.EAGAIN
	})
	if err != nil {
		t.Fatal(err)
	}
	f.c.Close()
	if err := f.wait(); err != nil {
		t.Errorf("Serve: %v", err)
	}
}
