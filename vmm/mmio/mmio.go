// Package mmio is the virtio-over-MMIO transport, version 2 (virtio 1.2 §4.2): it
// shows one virtio.Device to the guest as a page of registers.
//
// The driver's side, in the order in which it happens (§3.1.1): reset, ACKNOWLEDGE
// and DRIVER, feature negotiation up to FEATURES_OK, setting up the queues,
// DRIVER_OK. With DRIVER_OK the device starts; with the next reset it stops.
// A driver that breaks the protocol is ignored, or, once nothing sensible can
// follow, told by DEVICE_NEEDS_RESET; it never harms the monitor.
//
// The package knows no accelerator: whoever owns the vCPUs calls Read and Write
// for the exits in the page, gives an interrupt function, and may have the
// kernel signal Kick(i) for a write of i to QueueNotify.
package mmio

import (
	"encoding/binary"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"

	"github.com/wsl2/wsl2/vmm/eventfd"
	"github.com/wsl2/wsl2/vmm/guestmem"
	"github.com/wsl2/wsl2/vmm/virtio"
)

// Size is how much of the address space a device takes: a page, so that pages
// can be mapped or protected one by one. Registers use 0x100 bytes of it, the
// configuration space the rest.
const Size = 0x1000

// Registers (virtio 1.2 §4.2.2), with what the driver does with them.
const (
	regMagicValue        = 0x000 // R
	regVersion           = 0x004 // R
	regDeviceID          = 0x008 // R
	regVendorID          = 0x00c // R
	regDeviceFeatures    = 0x010 // R, the 32 bits that DeviceFeaturesSel selects
	regDeviceFeaturesSel = 0x014 // W
	regDriverFeatures    = 0x020 // W, the 32 bits that DriverFeaturesSel selects
	regDriverFeaturesSel = 0x024 // W
	regQueueSel          = 0x030 // W, selects the queue for the next eight
	regQueueNumMax       = 0x034 // R
	regQueueNum          = 0x038 // W
	regQueueReady        = 0x044 // RW
	RegQueueNotify       = 0x050 // W, the queue's index
	regInterruptStatus   = 0x060 // R
	regInterruptACK      = 0x064 // W
	regStatus            = 0x070 // RW
	regQueueDescLow      = 0x080 // W
	regQueueDescHigh     = 0x084 // W
	regQueueDriverLow    = 0x090 // W
	regQueueDriverHigh   = 0x094 // W
	regQueueDeviceLow    = 0x0a0 // W
	regQueueDeviceHigh   = 0x0a4 // W
	regSHMSel            = 0x0ac // W, no region exists
	regSHMLenLow         = 0x0b0 // R, all ones: no such region
	regSHMBaseHigh       = 0x0bc // R, the last of four
	regConfigGeneration  = 0x0fc // R
	regConfig            = 0x100 // RW, the device's
)

const (
	magicValue = 0x74726976 // "virt"
	version    = 2
	vendorID   = 0x324c5357 // "WSL2"
)

// Device status bits (virtio 1.2 §2.1).
const (
	statusAcknowledge = 1
	statusDriver      = 2
	statusDriverOK    = 4
	statusFeaturesOK  = 8
	statusNeedsReset  = 64
	statusFailed      = 128
)

// Bits of InterruptStatus.
const (
	interruptUsed   = 1 << 0
	interruptConfig = 1 << 1
)

// Config is what a transport needs of its machine.
type Config struct {
	Memory *guestmem.Memory
	// Interrupt raises the device's interrupt, an edge. It must not block on the
	// guest and may be called by any goroutine until Close has returned.
	Interrupt func()
	// Failed is told when the driver broke the protocol beyond repair, or the
	// device could not start. It may be nil.
	Failed func(error)
}

// queue is what the driver wrote about one virtqueue.
type queue struct {
	max, size            uint16
	ready                bool
	desc, driver, device uint64
}

// Transport is a virtio-mmio device. It is safe for concurrent use.
type Transport struct {
	dev    virtio.Device
	cfg    Config
	offers uint64             // immutable
	kicks  []*eventfd.EventFD // immutable, one for each queue

	interruptStatus atomic.Uint32
	generation      atomic.Uint32
	needsReset      atomic.Bool

	// mu makes register accesses one at a time. Device.Start and Stop run under
	// it; what the device calls from its goroutines takes no lock.
	mu                           sync.Mutex
	status                       uint32
	deviceFeatureSel, featureSel uint32
	driverFeatures               uint64
	queueSel                     uint32
	queues                       []queue
	started, closed              bool
}

// New makes a transport for dev, which it drives from now on. Close it.
func New(dev virtio.Device, cfg Config) (*Transport, error) {
	t := &Transport{
		dev:    dev,
		cfg:    cfg,
		offers: dev.Features() | virtio.RingFeatures,
	}
	for _, size := range dev.QueueSizes() {
		if size == 0 || size&(size-1) != 0 {
			return nil, errors.Join(fmt.Errorf("mmio: device %d: queue size %d is no power of two", dev.ID(), size), t.Close())
		}
		kick, err := eventfd.New()
		if err != nil {
			return nil, errors.Join(fmt.Errorf("mmio: device %d: %w", dev.ID(), err), t.Close())
		}
		t.kicks = append(t.kicks, kick)
		t.queues = append(t.queues, queue{max: size})
	}
	return t, nil
}

// Kicks returns one eventfd for each queue, to be signalled when the driver
// writes the queue's index to RegQueueNotify. They stay the transport's and are
// valid until Close. A write that reaches Write does the same, more slowly.
func (t *Transport) Kicks() []*eventfd.EventFD { return t.kicks }

// Close stops the device and releases the eventfds. Afterwards the registers
// read as 0 and writes are ignored.
func (t *Transport) Close() error {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.closed {
		return nil
	}
	t.closed = true
	t.resetLocked()
	var errs []error
	for _, k := range t.kicks {
		errs = append(errs, k.Close())
	}
	return errors.Join(errs...)
}

// Read fills p, 1 to 8 bytes, from offset off of the page. Registers answer to
// 32-bit accesses only (§4.2.2.2), others read as 0.
func (t *Transport) Read(off uint64, p []byte) {
	clear(p)
	t.mu.Lock()
	defer t.mu.Unlock()
	switch {
	case t.closed || off >= Size:
	case off >= regConfig:
		t.dev.ReadConfig(uint32(off-regConfig), p)
	case len(p) == 4 && off%4 == 0:
		binary.LittleEndian.PutUint32(p, t.readLocked(off))
	}
}

// Write is the driver's write of p, 1 to 8 bytes, to offset off of the page.
func (t *Transport) Write(off uint64, p []byte) {
	t.mu.Lock()
	defer t.mu.Unlock()
	switch {
	case t.closed || off >= Size:
	case off >= regConfig:
		t.dev.WriteConfig(uint32(off-regConfig), p)
	case len(p) == 4 && off%4 == 0:
		t.writeLocked(off, binary.LittleEndian.Uint32(p))
	}
}

func (t *Transport) readLocked(off uint64) uint32 {
	switch off {
	case regMagicValue:
		return magicValue
	case regVersion:
		return version
	case regDeviceID:
		return uint32(t.dev.ID())
	case regVendorID:
		return vendorID
	case regDeviceFeatures:
		return half(t.offers, t.deviceFeatureSel)
	case regQueueNumMax:
		if q := t.queueLocked(); q != nil {
			return uint32(q.max)
		}
	case regQueueReady:
		if q := t.queueLocked(); q != nil && q.ready {
			return 1
		}
	case regInterruptStatus:
		return t.interruptStatus.Load()
	case regStatus:
		if t.needsReset.Load() {
			return t.status | statusNeedsReset
		}
		return t.status
	case regConfigGeneration:
		return t.generation.Load()
	default:
		if off >= regSHMLenLow && off <= regSHMBaseHigh {
			return 1<<32 - 1
		}
	}
	return 0
}

func (t *Transport) writeLocked(off uint64, v uint32) {
	switch off {
	case regDeviceFeaturesSel:
		t.deviceFeatureSel = v
	case regDriverFeaturesSel:
		t.featureSel = v
	case regDriverFeatures:
		// "The driver MUST NOT accept new feature bits after" FEATURES_OK (§3.1.1).
		if t.featureSel < 2 && t.status&statusFeaturesOK == 0 {
			shift := 32 * t.featureSel
			t.driverFeatures = t.driverFeatures&^(0xffffffff<<shift) | uint64(v)<<shift
		}
	case regQueueSel:
		t.queueSel = v
	case RegQueueNotify:
		if uint64(v) < uint64(len(t.kicks)) {
			// An eventfd's counter is full after 2^64-2 signals.
			_ = t.kicks[v].Signal()
		}
	case regInterruptACK:
		t.interruptStatus.And(^v)
	case regStatus:
		t.setStatusLocked(v)
	default:
		t.writeQueueLocked(off, v)
	}
}

// writeQueueLocked sets up the selected queue. A queue in use cannot be changed
// (§4.2.2.2), and is given up only by a reset: VIRTIO_F_RING_RESET is not offered.
func (t *Transport) writeQueueLocked(off uint64, v uint32) {
	q := t.queueLocked()
	if q == nil || t.started {
		return
	}
	if off == regQueueReady {
		q.ready = v&1 != 0
		return
	}
	if q.ready {
		return
	}
	switch off {
	case regQueueNum:
		q.size = uint16(min(v, 1<<16-1)) // NewQueue judges it
	case regQueueDescLow:
		setLow(&q.desc, v)
	case regQueueDescHigh:
		setHigh(&q.desc, v)
	case regQueueDriverLow:
		setLow(&q.driver, v)
	case regQueueDriverHigh:
		setHigh(&q.driver, v)
	case regQueueDeviceLow:
		setLow(&q.device, v)
	case regQueueDeviceHigh:
		setHigh(&q.device, v)
	}
}

func (t *Transport) queueLocked() *queue {
	if uint64(t.queueSel) < uint64(len(t.queues)) {
		return &t.queues[t.queueSel]
	}
	return nil
}

// setStatusLocked is the status state machine (§2.1, §3.1.1). The driver adds
// bits; only 0, a reset, takes any away.
func (t *Transport) setStatusLocked(v uint32) {
	if v == 0 {
		t.resetLocked()
		return
	}
	added := v &^ t.status & (statusAcknowledge | statusDriver | statusDriverOK | statusFeaturesOK | statusFailed)
	if added&statusFeaturesOK != 0 && !t.featuresOKLocked() {
		added &^= statusFeaturesOK // the driver reads it back and gives up
	}
	t.status |= added
	if added&statusDriverOK != 0 {
		t.startLocked()
	}
}

func (t *Transport) featuresOKLocked() bool {
	return t.driverFeatures&^t.offers == 0 && t.driverFeatures&virtio.FeatureVersion1 != 0
}

func (t *Transport) startLocked() {
	if t.status&statusFeaturesOK == 0 {
		t.fail(errors.New("the driver set DRIVER_OK without FEATURES_OK"))
		return
	}
	s := virtio.Session{
		Features: t.driverFeatures,
		Memory:   t.cfg.Memory,
		Queues:   make([]*virtio.Queue, len(t.queues)),
		ConfigChanged: func() {
			t.generation.Add(1)
			t.interrupt(interruptConfig)
		},
		Failed: t.fail,
	}
	for i := range t.queues {
		q := &t.queues[i]
		if !q.ready {
			continue
		}
		if q.size > q.max {
			t.fail(fmt.Errorf("queue %d: size %d, at most %d is offered", i, q.size, q.max))
			return
		}
		var err error
		s.Queues[i], err = virtio.NewQueue(virtio.QueueConfig{
			Memory:    t.cfg.Memory,
			Size:      q.size,
			Desc:      guestmem.Addr(q.desc),
			Driver:    guestmem.Addr(q.driver),
			Device:    guestmem.Addr(q.device),
			Features:  t.driverFeatures,
			Kick:      t.kicks[i],
			Interrupt: func() { t.interrupt(interruptUsed) },
		})
		if err != nil {
			t.fail(fmt.Errorf("queue %d: %w", i, err))
			return
		}
	}
	if err := t.dev.Start(s); err != nil {
		t.fail(err)
		return
	}
	t.started = true
}

// resetLocked brings everything back to its state at power-on (§4.2.3.1). When
// it returns the device has stopped.
func (t *Transport) resetLocked() {
	if t.started {
		t.dev.Stop()
		t.started = false
	}
	t.status, t.driverFeatures = 0, 0
	t.deviceFeatureSel, t.featureSel, t.queueSel = 0, 0, 0
	for i := range t.queues {
		t.queues[i] = queue{max: t.queues[i].max}
	}
	t.needsReset.Store(false)
	t.interruptStatus.Store(0)
}

// fail sets DEVICE_NEEDS_RESET and tells driver and monitor. It takes no lock.
func (t *Transport) fail(err error) {
	if t.needsReset.Swap(true) {
		return
	}
	t.interrupt(interruptConfig)
	if t.cfg.Failed != nil {
		t.cfg.Failed(fmt.Errorf("mmio: virtio device %d: %w", t.dev.ID(), err))
	}
}

// interrupt notes the reason before it raises the line: the driver looks for it
// as soon as it is interrupted.
func (t *Transport) interrupt(reason uint32) {
	t.interruptStatus.Or(reason)
	t.cfg.Interrupt()
}

// half returns the low (0) or high (1) 32 bits of v.
func half(v uint64, sel uint32) uint32 {
	if sel > 1 {
		return 0
	}
	return uint32(v >> (32 * sel))
}

func setLow(p *uint64, v uint32)  { *p = *p&^0xffffffff | uint64(v) }
func setHigh(p *uint64, v uint32) { *p = *p&0xffffffff | uint64(v)<<32 }
