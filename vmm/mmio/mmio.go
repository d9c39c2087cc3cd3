// Package mmio is the virtio-over-MMIO transport, version 2 (virtio 1.2 §4.2): it
// shows one virtio.Device to the guest as a page of registers.
//
// The driver's side, in the order in which it happens (§3.1.1): reset, ACKNOWLEDGE
// and DRIVER, feature negotiation up to FEATURES_OK, setting up the queues,
// DRIVER_OK. With DRIVER_OK the device starts; with the next reset it stops.
// A driver that breaks the protocol is ignored, or, once nothing sensible can
// follow, told by DEVICE_NEEDS_RESET; it never harms the monitor.
//
// Reading has no side effects, so that the registers are memory: what can be
// read stands in Config.Page at any moment, and a guest that has the page mapped
// (read-only) reads it without an exit. Writes are exits.
//
// The package knows no accelerator: whoever owns the vCPUs calls Write, and Read
// unless the guest has the page, for the accesses in the page, gives an
// interrupt function, and may have the kernel signal Kick(i) for a write of i to
// RegQueueNotify.
package mmio

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"sync"
	"sync/atomic"
	"unsafe"

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
	RegInterruptACK      = 0x064 // W, the bits of InterruptStatus to be cleared
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
	InterruptUsed   = 1 << 0
	interruptConfig = 1 << 1
)

// Config is what a transport needs of its machine.
type Config struct {
	Memory *guestmem.Memory
	// Page is Size bytes of zeroes, page-aligned, for what the driver reads. It
	// stays the machine's, which lets nobody else write it and keeps it until
	// Close has returned. Without it the transport takes memory of its own.
	Page []byte
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

// page is the registers and the configuration space as the driver reads them.
type page [Size / 4]atomic.Uint32

// Transport is a virtio-mmio device. It is safe for concurrent use.
type Transport struct {
	dev        virtio.Device
	cfg        Config
	offers     uint64 // immutable
	page       *page  // not to be touched once closed
	needsReset atomic.Bool

	// mu makes register writes one at a time. Device.Start and Stop run under it;
	// what the device calls from its goroutines does not take it.
	mu             sync.Mutex
	kicks          []*eventfd.EventFD // one for each queue, or none until a driver comes
	status         uint32
	featureSel     uint32
	driverFeatures uint64
	queueSel       uint32
	queues         []queue
	started        bool

	// configMu is for publishing the configuration space. It is taken under mu,
	// or alone; Device.ReadConfig runs under it.
	configMu sync.Mutex
	config   [virtio.MaxConfig]byte // as published
	closed   bool                   // guarded by either mutex, set under both
}

// New makes a transport for dev, which it drives from now on. Close it.
func New(dev virtio.Device, cfg Config) (*Transport, error) {
	t := &Transport{
		dev:    dev,
		cfg:    cfg,
		offers: dev.Features() | virtio.RingFeatures,
	}
	switch {
	case cfg.Page == nil:
		t.page = new(page)
	case len(cfg.Page) != Size || uintptr(unsafe.Pointer(&cfg.Page[0]))%Size != 0:
		return nil, fmt.Errorf("mmio: device %d: the page for its registers is none", dev.ID())
	default:
		t.page = (*page)(unsafe.Pointer(&cfg.Page[0]))
	}
	for _, size := range dev.QueueSizes() {
		if size == 0 || size&(size-1) != 0 {
			return nil, errors.Join(fmt.Errorf("mmio: device %d: queue size %d is no power of two", dev.ID(), size), t.Close())
		}
		t.queues = append(t.queues, queue{max: size})
	}
	t.reg(regMagicValue).Store(magicValue)
	t.reg(regVersion).Store(version)
	t.reg(regDeviceID).Store(uint32(dev.ID()))
	t.reg(regVendorID).Store(vendorID)
	for off := uint64(regSHMLenLow); off <= regSHMBaseHigh; off += 4 {
		t.reg(off).Store(1<<32 - 1)
	}
	t.mu.Lock()
	t.resetLocked()
	t.mu.Unlock()
	return t, nil
}

// reg returns the word that the driver reads at off.
func (t *Transport) reg(off uint64) *atomic.Uint32 { return &t.page[off/4] }

// Kicks returns one eventfd for each queue, to be signalled when the driver
// writes the queue's index to RegQueueNotify. They stay the transport's and are
// valid until Close. A write that reaches Write does the same, more slowly. They are made
// when they are first asked for, or when a driver starts the device: most places for disks and
// file systems stay empty, and each eventfd is a part of a start.
func (t *Transport) Kicks() ([]*eventfd.EventFD, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.kicksLocked()
}

func (t *Transport) kicksLocked() ([]*eventfd.EventFD, error) {
	if t.closed {
		return nil, os.ErrClosed
	}
	for len(t.kicks) < len(t.queues) {
		kick, err := eventfd.New()
		if err != nil {
			return nil, fmt.Errorf("mmio: device %d: %w", t.dev.ID(), err)
		}
		t.kicks = append(t.kicks, kick)
	}
	return t.kicks, nil
}

// Close stops the device and releases the eventfds. Afterwards the registers
// read as 0 and writes are ignored.
func (t *Transport) Close() error {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.closed {
		return nil
	}
	t.stopLocked()
	t.configMu.Lock()
	t.closed = true
	t.configMu.Unlock()
	var errs []error
	for _, k := range t.kicks {
		errs = append(errs, k.Close())
	}
	return errors.Join(errs...)
}

// Read fills p, 1 to 8 bytes, from offset off of the page, as the guest does
// that has the page mapped.
func (t *Transport) Read(off uint64, p []byte) {
	clear(p)
	t.mu.Lock()
	defer t.mu.Unlock()
	for i := range p {
		if at := off + uint64(i); !t.closed && at < Size {
			p[i] = byte(t.reg(at).Load() >> (8 * (at % 4)))
		}
	}
}

// Write is the driver's write of p, 1 to 8 bytes, to offset off of the page.
// Registers take 32-bit accesses only (§4.2.2.2).
func (t *Transport) Write(off uint64, p []byte) {
	t.mu.Lock()
	defer t.mu.Unlock()
	switch {
	case t.closed || off >= Size:
	case off >= regConfig:
		t.dev.WriteConfig(uint32(off-regConfig), p)
		t.publishConfig()
	case len(p) == 4 && off%4 == 0:
		t.writeLocked(off, binary.LittleEndian.Uint32(p))
	}
}

func (t *Transport) writeLocked(off uint64, v uint32) {
	switch off {
	case regDeviceFeaturesSel:
		t.reg(regDeviceFeatures).Store(half(t.offers, v))
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
		t.publishQueueLocked()
	case RegQueueNotify:
		if kicks, err := t.kicksLocked(); err != nil {
			t.fail(err)
		} else if uint64(v) < uint64(len(kicks)) {
			// An eventfd's counter is full after 2^64-2 signals.
			_ = kicks[v].Signal()
		}
	case RegInterruptACK:
		t.reg(regInterruptStatus).And(^v)
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
		t.publishQueueLocked()
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

// publishQueueLocked shows the selected queue.
func (t *Transport) publishQueueLocked() {
	var most, ready uint32
	if q := t.queueLocked(); q != nil {
		most = uint32(q.max)
		if q.ready {
			ready = 1
		}
	}
	t.reg(regQueueNumMax).Store(most)
	t.reg(regQueueReady).Store(ready)
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
	t.reg(regStatus).Or(added)
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
	kicks, err := t.kicksLocked()
	if err != nil {
		t.fail(err)
		return
	}
	s := virtio.Session{
		Features:      t.driverFeatures,
		Memory:        t.cfg.Memory,
		Queues:        make([]*virtio.Queue, len(t.queues)),
		ConfigChanged: t.configChanged,
		Failed:        t.fail,
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
		s.Queues[i], err = virtio.NewQueue(virtio.QueueConfig{
			Memory:    t.cfg.Memory,
			Size:      q.size,
			Desc:      guestmem.Addr(q.desc),
			Driver:    guestmem.Addr(q.driver),
			Device:    guestmem.Addr(q.device),
			Features:  t.driverFeatures,
			Kick:      kicks[i],
			Interrupt: func() { t.interrupt(InterruptUsed) },
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
	// A device that is not started has nobody to tell of a change.
	if t.publishConfig() {
		t.interrupt(interruptConfig)
	}
}

// resetLocked brings everything back to its state at power-on (§4.2.3.1). When
// it returns the device has stopped.
func (t *Transport) resetLocked() {
	t.stopLocked()
	t.status, t.driverFeatures = 0, 0
	t.featureSel, t.queueSel = 0, 0
	for i := range t.queues {
		t.queues[i] = queue{max: t.queues[i].max}
	}
	t.needsReset.Store(false)
	t.reg(regDeviceFeatures).Store(half(t.offers, 0))
	t.publishQueueLocked()
	t.publishConfig()
	t.reg(regInterruptStatus).Store(0)
	t.reg(regStatus).Store(0)
}

func (t *Transport) stopLocked() {
	if t.started {
		t.dev.Stop()
		t.started = false
	}
}

// publishConfig shows the device's configuration space as it is now, and reports
// whether that is another one than before.
func (t *Transport) publishConfig() (changed bool) {
	t.configMu.Lock()
	defer t.configMu.Unlock()
	return t.publishConfigLocked()
}

func (t *Transport) publishConfigLocked() (changed bool) {
	if t.closed {
		return false
	}
	before := t.config
	t.dev.ReadConfig(0, t.config[:])
	if t.config == before {
		return false
	}
	// A driver that reads several words compares the generation before and after
	// (§2.5.2): no mixture lies between two of the same, but for a driver that
	// gets through all of its reads while a few words are stored here; and that
	// one learns by the interrupt that it has to read again.
	t.reg(regConfigGeneration).Add(1)
	for i := 0; i < len(t.config); i += 4 {
		t.reg(regConfig + uint64(i)).Store(binary.LittleEndian.Uint32(t.config[i:]))
	}
	t.reg(regConfigGeneration).Add(1)
	return true
}

// configChanged is Session.ConfigChanged.
func (t *Transport) configChanged() {
	t.configMu.Lock()
	defer t.configMu.Unlock()
	if t.closed {
		return
	}
	t.publishConfigLocked()
	t.interrupt(interruptConfig)
}

// fail sets DEVICE_NEEDS_RESET and tells driver and monitor. It takes no lock.
func (t *Transport) fail(err error) {
	if t.needsReset.Swap(true) {
		return
	}
	t.reg(regStatus).Or(statusNeedsReset)
	t.interrupt(interruptConfig)
	if t.cfg.Failed != nil {
		t.cfg.Failed(fmt.Errorf("mmio: virtio device %d: %w", t.dev.ID(), err))
	}
}

// interrupt notes the reason before it raises the line: the driver looks for it
// as soon as it is interrupted.
func (t *Transport) interrupt(reason uint32) {
	t.reg(regInterruptStatus).Or(reason)
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
