package fs

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"os"
	"sync"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/wsl2/wsl2/vmm/virtio"
	"github.com/wsl2/wsl2/vmm/virtio/virtiotest"
)

const (
	requests = 1  // the queue
	opLookup = 1  // FUSE_LOOKUP, a request like most
	opForget = 2  // which has no answer
	answered = 64 // room for one
)

// message is a FUSE request.
func message(opcode uint32, unique uint64, data string) []byte {
	b := make([]byte, inHeader, inHeader+len(data))
	binary.LittleEndian.PutUint32(b, uint32(inHeader+len(data)))
	binary.LittleEndian.PutUint32(b[4:], opcode)
	binary.LittleEndian.PutUint64(b[8:], unique)
	return append(b, data...)
}

// echo answers with the request's number and data.
func echo(request, room []byte) int {
	if len(room) < outHeader {
		return 0
	}
	n := outHeader + copy(room[outHeader:], request[inHeader:])
	binary.LittleEndian.PutUint32(room, uint32(n))
	copy(room[8:16], request[8:16])
	return n
}

// pair is a connection: what a device is attached to, and its server's end.
func pair(t testing.TB) (device *net.UnixConn, server *Conn) {
	t.Helper()
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	f := os.NewFile(uintptr(fds[0]), "socket")
	defer f.Close()
	c, err := net.FileConn(f)
	if err != nil {
		t.Fatal(err)
	}
	return c.(*net.UnixConn), newConn(fds[1])
}

// attach gives d a server.
func attach(t testing.TB, d *Device, handle Handler) (end func()) {
	t.Helper()
	ours, theirs := pair(t)
	if err := d.Attach(ours); err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	wg.Go(func() {
		if Accept(theirs) != nil {
			theirs.Close() // the device was closed at once
			return
		}
		if err := Serve(theirs, handle); err != nil && !errors.Is(err, unix.ECONNRESET) {
			t.Error(err)
		}
	})
	return func() {
		theirs.Close()
		wg.Wait()
	}
}

// do sends a request and returns the answer's error and data.
func do(t *testing.T, g *virtiotest.Guest, m []byte, room int) (errno unix.Errno, data []byte) {
	t.Helper()
	n, b := g.Ring(requests).Do(t, [][]byte{m}, room)
	if n < outHeader || binary.LittleEndian.Uint32(b) != uint32(n) || !bytes.Equal(b[8:16], m[8:16]) {
		t.Fatalf("%d bytes: %x", n, b[:min(n, 64)])
	}
	return unix.Errno(-int32(binary.LittleEndian.Uint32(b[4:]))), b[outHeader:n]
}

func TestRequests(t *testing.T) {
	d := New("tag")
	g := virtiotest.Start(t, d, virtiotest.Options{})
	end := attach(t, d, echo)
	defer end()
	for i := range 300 {
		data := string(bytes.Repeat([]byte{byte(i)}, i*100))
		if errno, got := do(t, g, message(opLookup, uint64(i), data), outHeader+len(data)); errno != 0 || string(got) != data {
			t.Fatalf("request %d: %v, %d bytes, want %d", i, errno, len(got), len(data))
		}
	}
	if n, _ := g.Ring(0).Do(t, [][]byte{message(opForget, 1, "x")}); n != 0 {
		t.Errorf("an answer of %d bytes to FORGET", n)
	}
	var config [44]byte
	d.ReadConfig(0, config[:])
	if string(config[:4]) != "tag\x00" || binary.LittleEndian.Uint32(config[36:]) != 1 {
		t.Errorf("configuration %x", config)
	}
}

// TestOrder: answers come in the server's order, each to its request.
func TestOrder(t *testing.T) {
	d := New("tag")
	g := virtiotest.Start(t, d, virtiotest.Options{})
	release := make(chan struct{})
	end := attach(t, d, func(request, room []byte) int {
		if request[inHeader] == 'a' {
			<-release
		}
		return echo(request, room)
	})
	defer end()
	first := g.Ring(requests).Send(t, [][]byte{message(opLookup, 1, "a")}, answered)
	if _, got := do(t, g, message(opLookup, 2, "b"), answered); string(got) != "b" {
		t.Errorf("%q", got)
	}
	close(release)
	if n, b := first.Wait(t); n != outHeader+1 || b[outHeader] != 'a' {
		t.Errorf("%x", b)
	}
}

// TestServerDies: what is in flight fails, and what comes after it, until the guest
// has unmounted; then the device is free.
func TestServerDies(t *testing.T) {
	d := New("tag")
	g := virtiotest.Start(t, d, virtiotest.Options{})
	got := make(chan struct{})
	end := attach(t, d, func(request, room []byte) int {
		if request[4] == opLookup {
			close(got)
			<-t.Context().Done()
		}
		return echo(request, room)
	})
	if errno, _ := do(t, g, message(opInit, 1, ""), answered); errno != 0 {
		t.Fatal(errno)
	}
	first := g.Ring(requests).Send(t, [][]byte{message(opLookup, 2, "a")}, answered)
	<-got
	d.mu.Lock()
	conn := d.server.conn
	d.mu.Unlock()
	conn.Close()
	if n, b := first.Wait(t); n != outHeader || int32(binary.LittleEndian.Uint32(b[4:])) != -int32(unix.ENOTCONN) {
		t.Errorf("in flight: %x", b[:n])
	}
	if errno, _ := do(t, g, message(opLookup, 3, "a"), answered); errno != unix.ENOTCONN {
		t.Errorf("afterwards: %v", errno)
	}
	if d.Free() {
		t.Error("a device that is mounted is free")
	}
	a, b := pair(t)
	if err := d.Attach(a); err != ErrBusy {
		t.Error(err)
	}
	a.Close()
	do(t, g, message(opDestroy, 4, ""), answered)
	if !d.Free() {
		t.Error("after an unmount it is not free")
	}
	b.Close()
	t.Cleanup(end) // when the test's context has ended
}

// TestDestroy: an unmount gives the server up, and the next mount has another.
func TestDestroy(t *testing.T) {
	d := New("tag")
	g := virtiotest.Start(t, d, virtiotest.Options{})
	for range 3 {
		end := attach(t, d, echo)
		do(t, g, message(opInit, 1, ""), answered)
		do(t, g, message(opDestroy, 2, ""), answered)
		end() // returns: Serve has ended
	}
	if !d.Free() {
		t.Error("it is not free")
	}
}

// TestRefused: a device whose mount failed is free again.
func TestRefused(t *testing.T) {
	d := New("tag")
	g := virtiotest.Start(t, d, virtiotest.Options{})
	for i, handle := range []Handler{
		func(request, room []byte) int { // the server refuses it
			n := echo(request, room)
			binary.LittleEndian.PutUint32(room[4:], ^uint32(unix.EIO)+1)
			return n
		},
		func([]byte, []byte) int { d.Close(); return 0 }, // or dies over it
		echo,
	} {
		end := attach(t, d, handle)
		errno, _ := do(t, g, message(opInit, uint64(i), ""), answered)
		if refused := i < 2; (errno != 0) != refused || d.Free() != refused {
			t.Errorf("server %d: %v, free %v", i, errno, d.Free())
		}
		end()
	}
}

// TestStop: a reset takes the server's requests back while it works on them.
func TestStop(t *testing.T) {
	d := New("tag")
	d.Stop() // harmless before Start
	for range 20 {
		g := virtiotest.Start(t, d, virtiotest.Options{})
		got, release := make(chan struct{}), make(chan struct{})
		end := attach(t, d, func(request, room []byte) int {
			close(got)
			<-release
			return echo(request, room)
		})
		g.Ring(requests).Send(t, [][]byte{message(opLookup, 1, "a")}, answered)
		<-got
		g.Stop()
		close(release)
		end()
		if !d.Free() {
			t.Fatal("it is not free")
		}
	}
}

// TestBounds: what is no request is a mistake of the driver's.
func TestBounds(t *testing.T) {
	for _, c := range []struct {
		request []byte
		room    []int
	}{
		{make([]byte, inHeader-1), []int{answered}},
		{nil, []int{answered}},
		{message(opLookup, 1, "a"), []int{outHeader - 1}},
		{make([]byte, MaxMessage+1), []int{answered}},
		{message(opInit, 1, string(make([]byte, inlineSize))), nil},
		{message(opDestroy, 1, ""), nil},
	} {
		d := New("tag")
		g := virtiotest.Start(t, d, virtiotest.Options{})
		end := attach(t, d, echo)
		var readable [][]byte
		if c.request != nil {
			readable = [][]byte{c.request}
		}
		g.Ring(requests).Send(t, readable, c.room...)
		if err := g.WaitFailed(t); !errors.Is(err, virtio.ErrProtocol) {
			t.Errorf("%d bytes, room %v: %v", len(c.request), c.room, err)
		}
		g.Stop()
		d.Close()
		end()
	}
}

// TestBadServer: a server that answers what it was not asked is given up.
func TestBadServer(t *testing.T) {
	answer := func(tag, length uint32, message int) []byte {
		b := binary.LittleEndian.AppendUint32(nil, tag)
		return append(binary.LittleEndian.AppendUint32(b, length), make([]byte, message)...)
	}
	for name, packet := range map[string][]byte{
		"a tag that is not in flight": answer(9, outHeader, outHeader),
		"no header":                   {1, 0, 0, 0},
		"too short":                   answer(1, outHeader-1, outHeader-1),
		"empty":                       answer(1, 0, 0),
		"shorter than it says":        answer(1, answered, outHeader),
		"longer than it says":         answer(1, outHeader, answered),
		"longer than its room":        answer(1, 200, 200),
		"longer than all":             answer(1, ^uint32(0), outHeader),
	} {
		for _, room := range []int{answered, MaxMessage} { // in the packet, and in a slot
			if room == MaxMessage && (len(packet) > answerHeader || name == "empty") && name != "too short" && name != "longer than all" && name != "a tag that is not in flight" {
				continue // what is in the packet does not matter then
			}
			t.Run(fmt.Sprint(name, " ", room), func(t *testing.T) {
				d := New("tag")
				g := virtiotest.Start(t, d, virtiotest.Options{})
				ours, theirs := pair(t)
				if err := d.Attach(ours); err != nil {
					t.Fatal(err)
				}
				if err := Accept(theirs); err != nil {
					t.Fatal(err)
				}
				defer theirs.unmap()
				defer theirs.Close()
				first := g.Ring(requests).Send(t, [][]byte{message(opLookup, 7, "a")}, room)
				if _, err := theirs.read(make([]byte, 1<<10)); err != nil {
					t.Fatal(err)
				}
				if err := theirs.write(packet); err != nil {
					t.Fatal(err)
				}
				if n, b := first.Wait(t); n != outHeader || int32(binary.LittleEndian.Uint32(b[4:])) != -int32(unix.ENOTCONN) {
					t.Errorf("%x", b[:n])
				}
			})
		}
	}
}

// FuzzServe: packets of any bytes end the server or are answered.
func FuzzServe(f *testing.F) {
	packet := func(m []byte, room, slot uint32) []byte {
		b := binary.LittleEndian.AppendUint32([]byte{1, 0, 0, 0}, room)
		b = binary.LittleEndian.AppendUint32(binary.LittleEndian.AppendUint32(b, slot), uint32(len(m)))
		if slot != noSlot {
			return b
		}
		return append(b, m...)
	}
	f.Add(packet(message(opLookup, 1, "name\x00"), answered, noSlot), packet(message(opForget, 2, "x"), 0, noSlot))
	f.Add(packet(message(opSetlkw, 1, ""), answered, noSlot), packet(message(opSetlkw, 1, ""), answered, slots-1))
	f.Add(packet(message(opInit, 1, ""), MaxMessage+1, 1), packet(message(opInit, 1, ""), MaxMessage, slots))
	f.Add([]byte{1, 0, 0, 0}, []byte{})
	f.Fuzz(func(t *testing.T, first, second []byte) {
		ours, theirs := pair(t)
		device, err := blocking(ours)
		if err != nil {
			t.Fatal(err)
		}
		if err := device.share(); err != nil {
			t.Fatal(err)
		}
		defer device.unmap()
		if err := Accept(theirs); err != nil {
			t.Fatal(err)
		}
		done := make(chan struct{})
		go func() {
			defer close(done)
			b := make([]byte, answerHeader+inlineSize)
			for {
				if _, err := device.read(b); err != nil { // until Serve closes
					return
				}
			}
		}()
		go func() {
			for _, b := range [][]byte{first, second} {
				device.write(b) //nolint:errcheck // Serve may have closed
			}
			device.control(func(fd int) error { return unix.Shutdown(fd, unix.SHUT_WR) }) //nolint:errcheck // likewise
		}()
		Serve(theirs, func(request, room []byte) int { //nolint:errcheck // any error is one
			if len(request) < inHeader {
				t.Errorf("a request of %d bytes", len(request))
			}
			return echo(request, room)
		})
		<-done
		device.Close()
	})
}

// FuzzRequest: requests of any bytes are answered, or are the driver's mistake.
func FuzzRequest(f *testing.F) {
	f.Add(message(opInit, 1, "data"), uint16(answered), true)
	f.Add(message(opDestroy, 2, ""), uint16(answered), true)
	f.Add(message(opForget, 3, "x"), uint16(0), false)
	f.Add([]byte{1}, uint16(3), false)
	f.Fuzz(func(t *testing.T, request []byte, room uint16, serve bool) {
		d := New("tag")
		g := virtiotest.Start(t, d, virtiotest.Options{MemoryBytes: 4 << 20, QueueSize: 8})
		if serve {
			end := attach(t, d, echo)
			defer end()
			defer d.Close()
		}
		if len(request) == 0 {
			return
		}
		var writable []int
		if room > 0 {
			writable = []int{int(room)}
		}
		bad := len(request) < inHeader || room > 0 && room < outHeader
		r := g.Ring(requests).Send(t, [][]byte{request}, writable...)
		if bad {
			if err := g.WaitFailed(t); !errors.Is(err, virtio.ErrProtocol) {
				t.Error(err)
			}
			return
		}
		if n, b := r.Wait(t); n > int(room) || n >= outHeader && !bytes.Equal(b[8:16], request[8:16]) {
			t.Errorf("%d bytes in room for %d: %x", n, room, b)
		}
		g.Stop()
	})
}

// TestSlots: what a server has of large requests is bounded by the slots, and requests that wait for others' are
// served, as they are when a reset or the server's end takes the slots away.
func TestSlots(t *testing.T) {
	d := New("tag")
	g := virtiotest.Start(t, d, virtiotest.Options{MemoryBytes: 64 << 20})
	started, release := make(chan int, 5*slots), make(chan struct{})
	end := attach(t, d, func(request, room []byte) int {
		d.mu.Lock()
		n := len(d.server.calls)
		d.mu.Unlock()
		started <- n
		<-release
		return echo(request, room)
	})
	defer end()
	var sent []*virtiotest.Request
	data := func(i int) []byte { return bytes.Repeat([]byte{byte(i)}, inlineSize+i) }
	for i := range slots + 10 {
		sent = append(sent, g.Ring(requests).Send(t, [][]byte{message(opLookup, uint64(i), string(data(i)))}, 2*inlineSize))
	}
	for i := range sent {
		if n := <-started; n > slots {
			t.Errorf("%d requests at once, want %d at most", n, slots)
		}
		if i == slots-1 {
			close(release)
		}
	}
	for i, r := range sent {
		if n, b := r.Wait(t); n < outHeader || !bytes.Equal(b[outHeader:n], data(i)) {
			t.Errorf("request %d: %d bytes", i, n)
		}
	}
	if n, _ := g.Ring(0).Do(t, [][]byte{message(opForget, 1, string(data(1)))}); n != 0 { // large, and without room
		t.Errorf("an answer of %d bytes to FORGET", n)
	}
	for i := range 2 * slots { // no slot is lost
		if errno, got := do(t, g, message(opLookup, 1, string(data(i))), 2*inlineSize); errno != 0 || !bytes.Equal(got, data(i)) {
			t.Fatalf("%v, %d bytes", errno, len(got))
		}
	}
}
