package vhostuser

import (
	"encoding/binary"
	"errors"
	"io"
	"net"
	"os"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/wsl2/wsl2/vmm/eventfd"
	"github.com/wsl2/wsl2/vmm/virtio"
)

// timeout is how long a test waits for an event before it fails.
const timeout = 20 * time.Second

// Where the front end's memory is, in the guest's and in its own addresses.
const (
	memSize   = 2 << 20
	guestBase = 0x10_0000
	userBase  = 0x7f00_0000_0000
)

// frontend plays QEMU: it owns guest memory and drives a Backend by messages.
type frontend struct {
	t     *testing.T
	c     *net.UnixConn
	memfd int
	mem   []byte
	back  *net.UnixConn // the back-end channel, this side's end
	rings []*driverRing
	ended chan error // what Serve returned
}

// serve starts a Backend for dev and returns a front end connected to it. When
// the test ends it checks that nothing is left of either.
func serve(t *testing.T, dev virtio.Device, failed func(error)) *frontend {
	t.Helper()
	before := openFDs(t)
	f := &frontend{t: t, ended: make(chan error, 1)}
	var ours *net.UnixConn
	ours, f.c = socketpair(t)
	f.memfd = memfd(t, memSize, unix.F_SEAL_SHRINK|unix.F_SEAL_GROW)
	var err error
	if f.mem, err = unix.Mmap(f.memfd, 0, memSize, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED); err != nil {
		t.Fatal(err)
	}
	for range dev.QueueSizes() {
		f.rings = append(f.rings, nil)
	}
	b := New(ours, dev, failed)
	go func() { f.ended <- b.Serve() }()
	t.Cleanup(func() {
		f.c.Close()
		b.Close()
		select {
		case <-f.ended:
		case <-time.After(timeout):
			t.Error("Serve did not return")
		}
		for _, r := range f.rings {
			if r != nil {
				r.kick.Close()
				r.call.Close()
			}
		}
		if f.back != nil {
			f.back.Close()
		}
		unix.Munmap(f.mem)
		unix.Close(f.memfd)
		if after := openFDs(t); after != before {
			t.Errorf("%d file descriptors open, %d before the test", after, before)
		}
		maps, err := os.ReadFile("/proc/self/maps")
		if err != nil {
			t.Fatal(err)
		}
		if strings.Contains(string(maps), "memfd:vhostuser-test") {
			t.Error("guest memory is still mapped")
		}
	})
	return f
}

func openFDs(t testing.TB) int {
	t.Helper()
	fds, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	n := 0
	for _, fd := range fds {
		// The runtime opens its own epoll and eventfd at some first use.
		if l, _ := os.Readlink("/proc/self/fd/" + fd.Name()); !strings.Contains(l, "eventpoll") {
			n++
		}
	}
	return n
}

func socketpair(t testing.TB) (a, b *net.UnixConn) {
	t.Helper()
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	return unixConn(t, fds[0]), unixConn(t, fds[1])
}

func unixConn(t testing.TB, fd int) *net.UnixConn {
	t.Helper()
	f := os.NewFile(uintptr(fd), "socket")
	defer f.Close()
	c, err := net.FileConn(f)
	if err != nil {
		t.Fatal(err)
	}
	return c.(*net.UnixConn)
}

func memfd(t testing.TB, size int64, seals int) int {
	t.Helper()
	fd, err := unix.MemfdCreate("vhostuser-test", unix.MFD_CLOEXEC|unix.MFD_ALLOW_SEALING)
	if err != nil {
		t.Fatal(err)
	}
	if err := unix.Ftruncate(fd, size); err != nil {
		t.Fatal(err)
	}
	if _, err := unix.FcntlInt(uintptr(fd), unix.F_ADD_SEALS, seals); err != nil {
		t.Fatal(err)
	}
	return fd
}

// u32s and u64s build payloads.
func u32s(v ...uint32) (b []byte) {
	for _, x := range v {
		b = binary.LittleEndian.AppendUint32(b, x)
	}
	return b
}

func u64s(v ...uint64) (b []byte) {
	for _, x := range v {
		b = binary.LittleEndian.AppendUint64(b, x)
	}
	return b
}

// send writes one request with descriptors, which stay the caller's.
func (f *frontend) send(r request, flags uint32, payload []byte, fds ...int) {
	f.t.Helper()
	b := append(u32s(uint32(r), flags|flagVersion, uint32(len(payload))), payload...)
	var oob []byte
	if len(fds) > 0 {
		oob = unix.UnixRights(fds...)
	}
	if _, _, err := f.c.WriteMsgUnix(b, oob, nil); err != nil {
		f.t.Fatalf("send %v: %v", r, err)
	}
}

// recv reads one message from c.
func recv(t *testing.T, c *net.UnixConn) (r request, flags uint32, payload []byte) {
	t.Helper()
	c.SetReadDeadline(time.Now().Add(timeout))
	var h [headerSize]byte
	if _, err := io.ReadFull(c, h[:]); err != nil {
		t.Fatalf("read a header: %v", err)
	}
	payload = make([]byte, binary.LittleEndian.Uint32(h[8:]))
	if _, err := io.ReadFull(c, payload); err != nil {
		t.Fatalf("read a payload: %v", err)
	}
	return request(binary.LittleEndian.Uint32(h[:])), binary.LittleEndian.Uint32(h[4:]), payload
}

// ask sends a request that has a reply and returns that.
func (f *frontend) ask(r request, payload []byte) []byte {
	f.t.Helper()
	f.send(r, 0, payload)
	got, flags, p := recv(f.t, f.c)
	if got != r || flags != flagVersion|flagReply {
		f.t.Fatalf("reply to %v: request %v, flags %#x", r, got, flags)
	}
	return p
}

// do sends a request without a reply of its own and waits until it is done.
func (f *frontend) do(r request, payload []byte, fds ...int) {
	f.t.Helper()
	f.send(r, flagNeedReply, payload, fds...)
	got, flags, p := recv(f.t, f.c)
	if got != r || flags != flagVersion|flagReply || len(p) != 8 {
		f.t.Fatalf("reply to %v: request %v, flags %#x, payload %x", r, got, flags, p)
	}
	if v := binary.LittleEndian.Uint64(p); v != 0 {
		f.t.Fatalf("%v was refused: %v", r, f.wait())
	}
}

// wait returns what Serve returned.
func (f *frontend) wait() error {
	f.t.Helper()
	select {
	case err := <-f.ended:
		f.ended <- err
		return err
	case <-time.After(timeout):
		f.t.Fatal("Serve did not return")
		return nil
	}
}

// negotiate does what QEMU does when it creates the device.
func (f *frontend) negotiate() (features uint64) {
	f.t.Helper()
	features = binary.LittleEndian.Uint64(f.ask(reqGetFeatures, nil))
	proto := binary.LittleEndian.Uint64(f.ask(reqGetProtocolFeatures, nil))
	f.send(reqSetProtocolFeatures, 0, u64s(proto))
	f.do(reqSetOwner, nil)
	ours, theirs := socketpair(f.t)
	f.back = ours
	rc, _ := theirs.SyscallConn()
	rc.Control(func(fd uintptr) { f.do(reqSetBackendReqFD, nil, int(fd)) })
	theirs.Close()
	f.do(reqSetFeatures, u64s(features))
	return features
}

// memory sends the table: two regions of one file, the second 1 MiB higher in
// the guest than it would be in one piece.
func (f *frontend) memory() {
	f.t.Helper()
	const half = memSize / 2
	p := u32s(2, 0)
	p = append(p, u64s(guestBase, half, userBase, 0)...)
	p = append(p, u64s(guestBase+memSize, half, userBase+half, half)...)
	f.do(reqSetMemTable, p, f.memfd, f.memfd)
}

// ringSize is the number of descriptors of every driverRing.
const ringSize = 8

// driverRing is a split virtqueue at off in the front end's memory:
// descriptors, available ring, used ring and one page of buffers.
type driverRing struct {
	off        int
	kick, call *eventfd.EventFD
	next       uint16 // available index
}

func (f *frontend) ring(i int) *driverRing {
	f.t.Helper()
	if f.rings[i] == nil {
		kick, err := eventfd.New()
		if err != nil {
			f.t.Fatal(err)
		}
		call, err := eventfd.New()
		if err != nil {
			f.t.Fatal(err)
		}
		f.rings[i] = &driverRing{off: i * 0x4000, kick: kick, call: call}
	}
	return f.rings[i]
}

const (
	availOff = 0x1000
	usedOff  = 0x2000
	bufOff   = 0x3000
)

// setRing sends all about ring i, and its kick last.
func (f *frontend) setRing(i int, base uint16) {
	f.t.Helper()
	r := f.ring(i)
	user := uint64(userBase + r.off)
	f.do(reqSetVringNum, u32s(uint32(i), ringSize))
	f.do(reqSetVringBase, u32s(uint32(i), uint32(base)))
	f.do(reqSetVringAddr, append(u32s(uint32(i), 0), u64s(user, user+usedOff, user+availOff, 0)...))
	f.do(reqSetVringCall, u64s(uint64(i)), r.call.FD())
	f.do(reqSetVringKick, u64s(uint64(i)), r.kick.FD())
}

func (f *frontend) enable(i int, on uint32) {
	f.t.Helper()
	f.do(reqSetVringEnable, u32s(uint32(i), on))
}

// echo sends word through ring i of an echoDevice and checks what comes back.
// ring i must not use the event index: the driver reads flags only.
func (f *frontend) echo(i int, word string) {
	f.t.Helper()
	r := f.rings[i]
	m := f.mem[r.off:]
	gpa := uint64(guestBase + r.off + bufOff)
	copy(m[bufOff:], word)
	clear(m[bufOff+0x800 : bufOff+0xfff])
	desc := func(k int, addr uint64, n int, flags, next uint16) {
		b := append(u64s(addr), u32s(uint32(n))...)
		b = binary.LittleEndian.AppendUint16(b, flags)
		copy(m[16*k:], binary.LittleEndian.AppendUint16(b, next))
	}
	desc(0, gpa, len(word), 1, 1)
	desc(1, gpa+0x800, 0x400, 2, 0)
	binary.LittleEndian.PutUint16(m[availOff+4+2*(int(r.next)%ringSize):], 0)
	r.next++
	binary.LittleEndian.PutUint16(m[availOff+2:], r.next)
	r.kick.Signal()
	done := make(chan error, 1)
	go func() { done <- r.call.Wait() }()
	select {
	case err := <-done:
		if err != nil {
			f.t.Fatal(err)
		}
	case <-time.After(timeout):
		f.t.Fatalf("ring %d: no interrupt", i)
	}
	if got := binary.LittleEndian.Uint16(m[usedOff+2:]); got != r.next {
		f.t.Fatalf("ring %d: used index %d, want %d", i, got, r.next)
	}
	if got := string(m[bufOff+0x800 : bufOff+0x800+len(word)]); got != word {
		f.t.Fatalf("ring %d: got %q, want %q", i, got, word)
	}
}

// echoDevice copies each chain's readable bytes to its writable ones. Its
// queues are of ringSize; its configuration space is 8 bytes.
type echoDevice struct {
	queues   int
	startErr error

	mu      sync.Mutex
	config  [8]byte
	session *virtio.Session // nil while stopped
	starts  int
	wg      sync.WaitGroup
}

func (d *echoDevice) ID() virtio.ID { return virtio.IDBlock }

func (d *echoDevice) Features() uint64 { return 1 << 3 }

func (d *echoDevice) QueueSizes() []uint16 {
	s := make([]uint16, d.queues)
	for i := range s {
		s[i] = ringSize
	}
	return s
}

func (d *echoDevice) ReadConfig(off uint32, p []byte) {
	d.mu.Lock()
	defer d.mu.Unlock()
	clear(p)
	if off < uint32(len(d.config)) {
		copy(p, d.config[off:])
	}
}

func (d *echoDevice) WriteConfig(off uint32, p []byte) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if off < uint32(len(d.config)) {
		copy(d.config[off:], p)
	}
}

// set changes the configuration from the host's side.
func (d *echoDevice) set(v uint64) {
	d.mu.Lock()
	s := d.session
	binary.LittleEndian.PutUint64(d.config[:], v)
	d.mu.Unlock()
	if s != nil {
		s.ConfigChanged()
	}
}

// queuesOf tells which queues the device was started with; nil if it is stopped.
func (d *echoDevice) running() (queues []int, starts int) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.session != nil {
		for i, q := range d.session.Queues {
			if q != nil {
				queues = append(queues, i)
			}
		}
	}
	return queues, d.starts
}

func (d *echoDevice) Start(s virtio.Session) error {
	if d.startErr != nil {
		return d.startErr
	}
	d.mu.Lock()
	d.session = &s
	d.starts++
	d.mu.Unlock()
	for _, q := range s.Queues {
		if q == nil {
			continue
		}
		d.wg.Go(func() {
			var c virtio.Chain
			for {
				ok, err := q.Pop(&c)
				if err != nil {
					s.Failed(err)
					return
				}
				if ok {
					n := 0
					if len(c.Readable) > 0 && len(c.Writable) > 0 {
						n = copy(c.Writable[0], c.Readable[0])
					}
					q.Push(c.Head, uint32(n))
					q.Notify()
					continue
				}
				if err := q.Wait(); err != nil {
					if !errors.Is(err, os.ErrClosed) {
						s.Failed(err)
					}
					return
				}
			}
		})
	}
	return nil
}

func (d *echoDevice) Stop() {
	d.mu.Lock()
	s := d.session
	d.session = nil
	d.mu.Unlock()
	if s == nil {
		return
	}
	for _, q := range s.Queues {
		if q != nil {
			q.Close()
		}
	}
	d.wg.Wait()
}
