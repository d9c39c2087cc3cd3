package mmio

import (
	"bytes"
	"encoding/binary"
	"errors"
	"strings"
	"sync/atomic"
	"testing"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/wsl2/wsl2/vmm/guestmem"
	"github.com/wsl2/wsl2/vmm/virtio"
)

// fake is a device that records what the transport does to it.
type fake struct {
	features uint64
	sizes    []uint16
	config   []byte
	startErr error

	session       *virtio.Session // nil when stopped
	starts, stops int
}

func (f *fake) ID() virtio.ID        { return virtio.IDEntropy }
func (f *fake) Features() uint64     { return f.features }
func (f *fake) QueueSizes() []uint16 { return f.sizes }

func (f *fake) ReadConfig(off uint32, p []byte) {
	clear(p)
	if int(off) < len(f.config) {
		copy(p, f.config[off:])
	}
}

func (f *fake) WriteConfig(off uint32, p []byte) {
	if int(off) < len(f.config) {
		copy(f.config[off:], p)
	}
}

func (f *fake) Start(s virtio.Session) error {
	f.starts++
	if f.startErr != nil {
		return f.startErr
	}
	f.session = &s
	return nil
}

func (f *fake) Stop() { f.stops++; f.session = nil }

// board is a transport with its surroundings, and the driver's side.
type board struct {
	t          testing.TB
	dev        *fake
	tr         *Transport
	page       []byte // what the guest has mapped
	interrupts atomic.Int32
	failure    error
}

const deviceFeature = 1 << 5

func newBoard(t testing.TB) *board {
	t.Helper()
	mem, err := guestmem.New(guestmem.Region{Start: 0, Bytes: make([]byte, 1<<16)})
	if err != nil {
		t.Fatal(err)
	}
	b := &board{t: t, dev: &fake{features: deviceFeature, sizes: []uint16{8, 16}, config: []byte{1, 2, 3, 4, 5, 6, 7, 8}}}
	b.page = newPage(t)
	b.tr, err = New(b.dev, Config{
		Memory:    mem,
		Page:      b.page,
		Interrupt: func() { b.interrupts.Add(1) },
		Failed:    func(err error) { b.failure = err },
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := b.tr.Close(); err != nil {
			t.Error(err)
		}
	})
	return b
}

// newPage is a machine's page for a device. It is unmapped after what t starts
// from now on has been cleaned up.
func newPage(t testing.TB) []byte {
	t.Helper()
	p, err := unix.Mmap(-1, 0, Size, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := unix.Munmap(p); err != nil {
			t.Error(err)
		}
	})
	return p
}

// read is the guest's, which leaves its page alone.
func (b *board) read(off uint64) uint32 {
	return (*atomic.Uint32)(unsafe.Pointer(&b.page[off])).Load()
}

func (b *board) write(off uint64, v uint32) {
	var p [4]byte
	binary.LittleEndian.PutUint32(p[:], v)
	b.tr.Write(off, p[:])
}

func (b *board) want(what string, off uint64, want uint32) {
	b.t.Helper()
	if got := b.read(off); got != want {
		b.t.Errorf("%s reads %#x, want %#x", what, got, want)
	}
}

func (b *board) acceptFeatures(f uint64) {
	b.write(regStatus, 0)
	b.write(regStatus, statusAcknowledge)
	b.write(regStatus, statusAcknowledge|statusDriver)
	b.write(regDriverFeaturesSel, 0)
	b.write(regDriverFeatures, uint32(f))
	b.write(regDriverFeaturesSel, 1)
	b.write(regDriverFeatures, uint32(f>>32))
	b.write(regStatus, statusAcknowledge|statusDriver|statusFeaturesOK)
}

func (b *board) setUpQueue(i, size uint32) {
	b.write(regQueueSel, i)
	b.write(regQueueNum, size)
	base := 0x1000 * (i + 1)
	b.write(regQueueDescLow, base)
	b.write(regQueueDescHigh, 0)
	b.write(regQueueDriverLow, base+0x400)
	b.write(regQueueDeviceLow, base+0x800)
	b.write(regQueueReady, 1)
}

func (b *board) driverOK() { b.write(regStatus, b.read(regStatus)|statusDriverOK) }

func TestIdentity(t *testing.T) {
	b := newBoard(t)
	b.want("MagicValue", regMagicValue, magicValue)
	b.want("Version", regVersion, 2)
	b.want("DeviceID", regDeviceID, uint32(virtio.IDEntropy))
	b.want("Status", regStatus, 0)
	b.want("DeviceFeatures 0", regDeviceFeatures, deviceFeature|virtio.FeatureIndirectDesc|virtio.FeatureEventIdx)
	b.write(regDeviceFeaturesSel, 1)
	b.want("DeviceFeatures 1", regDeviceFeatures, virtio.FeatureVersion1>>32)
	b.write(regDeviceFeaturesSel, 2)
	b.want("DeviceFeatures 2", regDeviceFeatures, 0)
	b.want("QueueNumMax of 0", regQueueNumMax, 8)
	b.write(regQueueSel, 1)
	b.want("QueueNumMax of 1", regQueueNumMax, 16)
	for _, none := range []uint32{2, 1 << 31} {
		b.write(regQueueSel, none)
		b.want("QueueNumMax of none", regQueueNumMax, 0)
		b.write(regQueueReady, 1)
		b.want("QueueReady of none", regQueueReady, 0)
	}
	b.want("SHMLenLow", regSHMLenLow, 1<<32-1)
	b.want("SHMBaseHigh", regSHMBaseHigh, 1<<32-1)
	b.want("a write-only register", RegQueueNotify, 0)
	b.want("a register that is none", 0x0e0, 0)
}

func TestLife(t *testing.T) {
	b := newBoard(t)
	const agreed = deviceFeature | virtio.FeatureVersion1
	for life := 1; life <= 2; life++ {
		b.acceptFeatures(agreed)
		b.want("Status", regStatus, statusAcknowledge|statusDriver|statusFeaturesOK)
		b.setUpQueue(1, 16)
		if b.dev.session != nil {
			t.Fatal("started before DRIVER_OK")
		}
		b.driverOK()
		s := b.dev.session
		if s == nil || b.dev.starts != life {
			t.Fatalf("not started by DRIVER_OK; %v", b.failure)
		}
		if s.Features != agreed || len(s.Queues) != 2 || s.Queues[0] != nil || s.Queues[1] == nil || s.Queues[1].Size() != 16 {
			t.Fatalf("session %+v", s)
		}
		// DRIVER_OK again is no second start; the queues are settled.
		b.driverOK()
		b.write(regQueueReady, 0)
		b.want("QueueReady", regQueueReady, 1)
		if b.dev.starts != life {
			t.Fatal("started twice")
		}
		b.write(regStatus, 0)
		b.want("Status after reset", regStatus, 0)
		b.write(regQueueSel, 1)
		b.want("QueueReady after reset", regQueueReady, 0)
		if b.dev.session != nil || b.dev.stops != life {
			t.Fatal("not stopped by reset")
		}
	}
	b.write(regStatus, 0)
	if b.dev.stops != 2 {
		t.Error("stopped without having been started")
	}
	if b.failure != nil {
		t.Error(b.failure)
	}
}

func TestFeatureNegotiation(t *testing.T) {
	for name, c := range map[string]struct {
		features uint64
		ok       bool
	}{
		"all that is offered":  {deviceFeature | virtio.RingFeatures, true},
		"the least":            {virtio.FeatureVersion1, true},
		"without VERSION_1":    {deviceFeature, false},
		"more than is offered": {virtio.FeatureVersion1 | 1<<6, false},
		"packed ring":          {virtio.FeatureVersion1 | 1<<34, false},
	} {
		b := newBoard(t)
		b.acceptFeatures(c.features)
		if got := b.read(regStatus)&statusFeaturesOK != 0; got != c.ok {
			t.Errorf("%s: FEATURES_OK is %v", name, got)
		}
		// After FEATURES_OK features are settled; without it there is no start.
		b.write(regDriverFeaturesSel, 0)
		b.write(regDriverFeatures, 0)
		b.driverOK()
		if started := b.dev.session != nil; started != c.ok {
			t.Errorf("%s: started is %v", name, started)
		}
		if c.ok && b.dev.session.Features != c.features {
			t.Errorf("%s: session has %#x", name, b.dev.session.Features)
		}
		if !c.ok && b.read(regStatus)&statusNeedsReset == 0 {
			t.Errorf("%s: the driver is not told that it needs a reset", name)
		}
	}
}

func TestFailures(t *testing.T) {
	boom := errors.New("boom")
	for name, breakIt := range map[string]func(*board){
		"device start": func(b *board) { b.dev.startErr = boom },
		"queue too large": func(b *board) {
			b.setUpQueue(0, 16)
		},
		"queue size 0":          func(b *board) { b.setUpQueue(0, 0) },
		"queue size no power 2": func(b *board) { b.setUpQueue(0, 7) },
		"queue outside memory": func(b *board) {
			b.setUpQueue(0, 8)
			b.write(regQueueReady, 0)
			b.write(regQueueDeviceHigh, 0xffffffff)
			b.write(regQueueReady, 1)
		},
	} {
		b := newBoard(t)
		b.acceptFeatures(virtio.FeatureVersion1)
		breakIt(b)
		b.driverOK()
		if b.dev.session != nil {
			t.Errorf("%s: started", name)
		}
		b.want(name+": Status", regStatus, statusAcknowledge|statusDriver|statusFeaturesOK|statusDriverOK|statusNeedsReset)
		b.want(name+": InterruptStatus", regInterruptStatus, interruptConfig)
		if b.failure == nil || b.interrupts.Load() != 1 {
			t.Errorf("%s: failure %v, %d interrupts", name, b.failure, b.interrupts.Load())
		}
		if name == "device start" && !errors.Is(b.failure, boom) {
			t.Errorf("%s: cause lost: %v", name, b.failure)
		}
		// A reset makes the device whole again.
		b.dev.startErr = nil
		b.acceptFeatures(virtio.FeatureVersion1)
		b.driverOK()
		if b.dev.session == nil {
			t.Errorf("%s: no start after reset", name)
		}
	}
}

func TestFailedWhileRunning(t *testing.T) {
	b := newBoard(t)
	b.acceptFeatures(virtio.FeatureVersion1)
	b.driverOK()
	b.dev.session.Failed(errors.New("bad descriptor"))
	b.dev.session.Failed(errors.New("and another")) // one report is enough
	if b.read(regStatus)&statusNeedsReset == 0 || b.interrupts.Load() != 1 {
		t.Errorf("status %#x, %d interrupts", b.read(regStatus), b.interrupts.Load())
	}
	if b.failure == nil || !strings.Contains(b.failure.Error(), "bad descriptor") {
		t.Errorf("failure %v", b.failure)
	}
	b.write(regStatus, 0)
	b.want("Status after reset", regStatus, 0)
	b.want("InterruptStatus after reset", regInterruptStatus, 0)
}

// Interrupts carry their reason, which stands in InterruptStatus before the line
// is raised and until the driver acknowledges it.
func TestInterrupts(t *testing.T) {
	b := newBoard(t)
	b.acceptFeatures(virtio.FeatureVersion1)
	b.driverOK()
	var seen uint32
	b.tr.cfg.Interrupt = func() { seen = b.read(regInterruptStatus) }
	generation := b.read(regConfigGeneration)
	b.dev.config[0] = 0xcc
	b.dev.session.ConfigChanged()
	if seen != interruptConfig {
		t.Errorf("the line was raised with reason %#x", seen)
	}
	if b.read(regConfigGeneration) == generation {
		t.Error("ConfigGeneration did not change")
	}
	b.want("config", regConfig, 0x040302cc)
	b.tr.interrupt(InterruptUsed)
	b.want("InterruptStatus", regInterruptStatus, interruptConfig|InterruptUsed)
	b.write(RegInterruptACK, interruptConfig)
	b.want("InterruptStatus", regInterruptStatus, InterruptUsed)
	b.write(RegInterruptACK, 0xffffffff)
	b.want("InterruptStatus", regInterruptStatus, 0)
}

func TestQueueNotify(t *testing.T) {
	b := newBoard(t)
	b.write(RegQueueNotify, 2) // there is none
	b.write(RegQueueNotify, 0xffffffff)
	b.write(RegQueueNotify, 1)
	kicks, err := b.tr.Kicks()
	if err != nil {
		t.Fatal(err)
	}
	if err := kicks[1].Wait(); err != nil {
		t.Fatal(err)
	}
}

func TestConfigSpace(t *testing.T) {
	b := newBoard(t)
	b.want("config", regConfig, 0x04030201)
	b.want("end of config", regConfig+8, 0)
	b.tr.Write(regConfig+1, []byte{0xaa})
	b.want("config", regConfig, 0x0403aa01)
}

// A device that is not started has no way to tell of a change: the driver finds
// it when it begins anew, or is told when the device starts.
func TestConfigChangedWhileStopped(t *testing.T) {
	b := newBoard(t)
	b.dev.config[0] = 0x11
	b.write(regStatus, 0)
	b.want("config", regConfig, 0x04030211)
	b.acceptFeatures(virtio.FeatureVersion1)
	generation := b.read(regConfigGeneration)
	b.dev.config[0] = 0x22
	b.driverOK()
	b.want("config", regConfig, 0x04030222)
	b.want("InterruptStatus", regInterruptStatus, interruptConfig)
	if b.interrupts.Load() != 1 || b.read(regConfigGeneration) == generation {
		t.Errorf("%d interrupts, generation %d after %d", b.interrupts.Load(), b.read(regConfigGeneration), generation)
	}
}

// Read is what the guest sees by itself, at any width and place.
func TestRead(t *testing.T) {
	b := newBoard(t)
	for _, off := range []uint64{regMagicValue, regMagicValue + 1, regDeviceFeatures, regConfig + 6, Size - 1} {
		for n := 1; n <= 8; n++ {
			p := bytes.Repeat([]byte{0xee}, n)
			b.tr.Read(off, p)
			want := make([]byte, n)
			copy(want, b.page[off:])
			if !bytes.Equal(p, want) {
				t.Errorf("%d bytes at %#x: % x, want % x", n, off, p, want)
			}
		}
	}
}

// A transport without a machine's page has its own.
func TestOwnPage(t *testing.T) {
	tr, err := New(&fake{sizes: []uint16{8}}, Config{})
	if err != nil {
		t.Fatal(err)
	}
	defer tr.Close()
	p := make([]byte, 4)
	if tr.Read(regMagicValue, p); string(p) != "virt" {
		t.Errorf("MagicValue reads %q", p)
	}
	for _, page := range [][]byte{newPage(t)[:Size/2], make([]byte, 2*Size)[1:][:Size], make([]byte, 2*Size)[2:][:Size]} {
		if tr, err := New(&fake{sizes: []uint16{8}}, Config{Page: page}); err == nil {
			t.Errorf("a page of %d bytes at %p accepted", len(page), page)
			tr.Close()
		}
	}
}

// Registers answer to aligned 32-bit writes; others must be harmless.
func TestOddWrites(t *testing.T) {
	b := newBoard(t)
	for _, n := range []int{1, 2, 3, 8} {
		b.tr.Write(regStatus, []byte{1, 0, 0, 0, 0, 0, 0, 0}[:n])
	}
	b.write(regStatus+1, 1)
	b.want("Status", regStatus, 0)
}

func TestClosed(t *testing.T) {
	b := newBoard(t)
	b.acceptFeatures(virtio.FeatureVersion1)
	b.driverOK()
	session := b.dev.session
	if err := b.tr.Close(); err != nil {
		t.Fatal(err)
	}
	if b.dev.stops != 1 {
		t.Error("Close does not stop the device")
	}
	before := bytes.Clone(b.page)
	p := make([]byte, 4)
	if b.tr.Read(regMagicValue, p); !bytes.Equal(p, make([]byte, 4)) {
		t.Errorf("MagicValue of a closed device reads % x", p)
	}
	b.write(regStatus, statusDriverOK)
	b.write(RegQueueNotify, 0)
	session.ConfigChanged() // it may come late
	if !bytes.Equal(b.page, before) {
		t.Error("a closed device writes to the machine's page")
	}
}

func TestNewRefusesQueueSize(t *testing.T) {
	for _, size := range []uint16{0, 3, 1<<15 + 1} {
		if tr, err := New(&fake{sizes: []uint16{8, size}}, Config{}); err == nil {
			t.Errorf("queue size %d accepted", size)
			tr.Close()
		}
	}
}

// FuzzMMIO is a driver that writes and reads at random: nothing it does may
// panic, and a device never starts except after a complete negotiation.
func FuzzMMIO(f *testing.F) {
	// A whole initialisation as a seed: pairs of register and value.
	seed := []byte{}
	add := func(off uint64, v uint32) {
		seed = binary.LittleEndian.AppendUint16(seed, uint16(off))
		seed = binary.LittleEndian.AppendUint32(seed, v)
	}
	for _, w := range [][2]uint32{
		{regStatus, 0}, {regStatus, 1}, {regStatus, 3},
		{regDriverFeaturesSel, 1}, {regDriverFeatures, 1}, {regStatus, 11},
		{regQueueSel, 0}, {regQueueNum, 8}, {regQueueDescLow, 0x1000}, {regQueueDriverLow, 0x2000}, {regQueueDeviceLow, 0x3000},
		{regQueueReady, 1}, {regStatus, 15}, {RegQueueNotify, 0}, {RegInterruptACK, 1}, {regConfig, 7}, {regStatus, 0},
	} {
		add(uint64(w[0]), w[1])
	}
	f.Add(seed)
	f.Add(seed[:13*6])
	f.Fuzz(func(t *testing.T, p []byte) {
		b := newBoard(t)
		for ; len(p) >= 6; p = p[6:] {
			off, v := uint64(binary.LittleEndian.Uint16(p)), p[2:6]
			n := 4
			if off&0x8000 != 0 { // now and then another width
				n = 1 + int(v[3]%4)
			}
			off &= 0x1fff
			b.tr.Write(off, v[:n])
			b.tr.Read(off, make([]byte, n))
			if s := b.dev.session; s != nil && (s.Features&virtio.FeatureVersion1 == 0 || s.Features&^b.tr.offers != 0) {
				t.Fatalf("started with features %#x", s.Features)
			}
		}
	})
}
