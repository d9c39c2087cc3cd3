// Package vhostuser offers a virtio device to a VM monitor in another process
// (QEMU) by the vhost-user protocol, as its back end.
//
// # Roles
//
// The front end, which runs the vCPUs, owns the transport (virtio-mmio), the
// configuration of the rings and the guest's memory. The back end, this
// package, maps that memory and lets the Device serve the rings directly:
// notifications go through eventfds, no data passes through the front end.
// https://qemu-project.gitlab.io/qemu/interop/vhost-user.html is the protocol.
//
// # States
//
// The front end negotiates features, sends the memory table, and describes
// each ring with several messages; SET_VRING_KICK makes a ring started,
// SET_VRING_ENABLE enabled. The Device starts when every started ring has been
// enabled or disabled by name, with those that are enabled; a ring that never
// started is a nil queue (QEMU keeps vsock's event queue to itself). As soon as
// one of its rings is stopped (GET_VRING_BASE) or disabled, the Device stops,
// and starts again with the next ring that is enabled. Requests that the Device
// dropped on Stop are gone: QEMU stops rings only for a driver's reset.
//
// # Trust
//
// A front end runs the guest, so its messages are judged like a guest's: sizes,
// counts, addresses and kinds of descriptors are checked, memory must be sealed
// against shrinking. A front end that breaks the protocol loses its connection.
package vhostuser

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"net"
	"slices"
	"sync"

	"github.com/wsl2/wsl2/vmm/eventfd"
	"github.com/wsl2/wsl2/vmm/virtio"
)

// featureAccessPlatform is VIRTIO_F_ACCESS_PLATFORM (virtio 1.2 §6): the driver
// gives the addresses its platform's DMA interface says. To this side they are
// guest physical all the same. With it a guest can be told to bounce its I/O.
const featureAccessPlatform = 1 << 33

// maxRingSize is the largest split virtqueue (virtio 1.2 §2.7). The protocol has
// no message for a back end's own limit, and QEMU's virtio-mmio gives every ring
// 1024 descriptors: devices take the size from their Queue, not from what they
// asked for.
const maxRingSize = 32768

const ringFeatures = virtio.RingFeatures | featureAccessPlatform | featureProtocol

// Backend is one Device on one connection.
type Backend struct {
	dev    virtio.Device
	conn   *conn
	failed func(error)

	// Owned by Serve's goroutine.
	features uint64 // as negotiated, featureProtocol included
	table    *memTable
	rings    []*ring
	running  bool
	seen     []byte // the configuration space as the front end last read it

	mu       sync.Mutex
	protocol uint64          // protocol features as negotiated; written by Serve's goroutine only
	channel  *backendChannel // nil until the front end made one; guarded by mu
	session  *session        // nil while the device is stopped; guarded by mu
	// reread is closed when the front end has read the configuration, or will
	// not for this session; nil while nobody waits for that. Guarded by mu.
	reread chan struct{}
}

// session is one life of the device.
type session struct {
	b *Backend
	// started: Device.Start has returned. Guarded by Backend.mu.
	started bool
}

// New offers dev on c, which it owns from now on. failed, which may be nil, is
// told when the guest broke the device's protocol beyond repair; it must not
// block. Serve does the work.
func New(c *net.UnixConn, dev virtio.Device, failed func(error)) *Backend {
	b := &Backend{dev: dev, conn: newConn(c), failed: failed}
	for range dev.QueueSizes() {
		b.rings = append(b.rings, &ring{})
	}
	return b
}

// Serve answers the front end until it goes away or Close is called, both of
// which return nil, or until it breaks the protocol. The Device is stopped and
// all memory and descriptors are released when it returns. It is called once.
func (b *Backend) Serve() (err error) {
	defer func() { err = errors.Join(err, b.release()) }()
	for {
		m, err := b.conn.read()
		if err == io.EOF || errors.Is(err, net.ErrClosed) {
			return nil
		}
		if err != nil {
			return err
		}
		reply, err := b.handle(m)
		m.close()
		if err != nil {
			err = fmt.Errorf("vhost-user: %v: %w", m.request, err)
		}
		if reply == nil && m.needReply && b.protocol&protocolReplyAck != 0 {
			status := uint64(0)
			if err != nil {
				status = 1
			}
			reply = m.replyU64(status)
		}
		if reply != nil {
			err = errors.Join(err, b.conn.write(reply))
		}
		if err != nil {
			return err
		}
	}
}

// Close ends Serve. It may be called from any goroutine and more than once.
func (b *Backend) Close() { b.conn.c.Close() }

// release stops the device, then drops everything it used.
func (b *Backend) release() error {
	b.stop()
	for _, r := range b.rings {
		r.close()
	}
	b.mu.Lock()
	if b.channel != nil {
		b.channel.close()
		b.channel = nil
	}
	b.mu.Unlock()
	b.conn.c.Close()
	return b.unmap()
}

func (b *Backend) unmap() error {
	if b.table == nil {
		return nil
	}
	t := b.table
	b.table = nil
	return t.unmap()
}

func (b *Backend) offered() uint64 { return b.dev.Features() | ringFeatures }

func (b *Backend) offeredProtocol() uint64 {
	if b.dev.ID() == virtio.IDEntropy {
		// It has no configuration space (virtio 1.2 §5.4.4), and QEMU complains
		// of one that it has no use for.
		return protocolFeatures &^ protocolConfig
	}
	return protocolFeatures
}

// handle carries out one request. The reply is nil where the request has none
// of its own.
func (b *Backend) handle(m *message) (reply []byte, err error) {
	switch m.request {
	case reqGetFeatures:
		return m.replyU64(b.offered()), nil
	case reqSetFeatures:
		return nil, b.setFeatures(m.u64)
	case reqGetProtocolFeatures:
		return m.replyU64(b.offeredProtocol()), nil
	case reqSetProtocolFeatures:
		if x := m.u64 &^ b.offeredProtocol(); x != 0 {
			return nil, fmt.Errorf("%w: protocol features %#x were not offered", ErrProtocol, x)
		}
		b.mu.Lock()
		b.protocol = m.u64
		b.mu.Unlock()
		return nil, nil
	case reqGetQueueNum:
		return m.replyU64(uint64(len(b.rings))), nil
	case reqSetOwner:
		return nil, nil
	case reqResetOwner, reqResetDevice:
		b.reset()
		return nil, nil
	case reqSetMemTable:
		return nil, b.setMemTable(m)
	case reqSetBackendReqFD:
		return nil, b.setChannel(m.take())
	case reqGetConfig:
		return b.getConfig(m), nil
	case reqSetConfig:
		if m.config.flags != configWritable {
			return nil, fmt.Errorf("%w: write of the configuration with flags %#x", ErrProtocol, m.config.flags)
		}
		b.dev.WriteConfig(m.config.offset, m.config.data)
		return nil, nil
	}
	return b.handleRing(m)
}

// handleRing carries out the requests that are about one ring.
func (b *Backend) handleRing(m *message) (reply []byte, err error) {
	index := m.ring
	if m.request == reqSetVringAddr {
		index = m.addr.index
	}
	if index >= uint32(len(b.rings)) {
		return nil, fmt.Errorf("%w: ring %d of %d", ErrProtocol, index, len(b.rings))
	}
	r := b.rings[index]
	switch m.request {
	case reqSetVringNum, reqSetVringAddr, reqSetVringBase, reqSetVringKick:
		// The front end may say these of a stopped ring only.
		if r.queue != nil {
			return nil, fmt.Errorf("%w: ring %d is running", ErrProtocol, index)
		}
	}
	switch m.request {
	case reqSetVringNum:
		if m.num == 0 || m.num > maxRingSize {
			return nil, fmt.Errorf("%w: ring %d of %d descriptors, at most %d", ErrProtocol, index, m.num, maxRingSize)
		}
		r.num = uint16(m.num)
	case reqSetVringAddr:
		if m.addr.flags != 0 {
			return nil, fmt.Errorf("%w: ring %d asks for dirty logging, which was not offered", ErrProtocol, index)
		}
		r.addr, r.placed = m.addr, true
	case reqSetVringBase:
		if m.num > 0xffff {
			return nil, fmt.Errorf("%w: ring %d begins at %d", ErrProtocol, index, m.num)
		}
		r.base = uint16(m.num)
	case reqSetVringKick:
		if m.noFD {
			return nil, fmt.Errorf("%w: ring %d has no kick; polling is not offered", ErrProtocol, index)
		}
		if err := checkEventFD(m.fds[0]); err != nil {
			return nil, err
		}
		r.stop()
		if r.kick, err = eventfd.FromFD(m.take()); err != nil {
			return nil, err
		}
		return nil, b.start()
	case reqSetVringCall:
		return nil, setDoorbell(&r.call, m)
	case reqSetVringErr:
		return nil, setDoorbell(&r.err, m)
	case reqSetVringEnable:
		switch m.num {
		case 0:
			if r.queue != nil {
				b.stop()
			}
			r.enable = enableNo
		case 1:
			r.enable = enableYes
			return nil, b.start()
		default:
			return nil, fmt.Errorf("%w: ring %d: enable = %d", ErrProtocol, index, m.num)
		}
	case reqGetVringBase:
		if r.queue != nil {
			b.stop()
		}
		r.stop()
		if r.enable == enableNo {
			// Said of the life that ends: the next one waits to be told again, or
			// a device would start with the first ring enabled, alone.
			r.enable = enableUnsaid
		}
		return m.replyVring(uint32(r.base)), nil
	}
	return nil, nil
}

func setDoorbell(d *doorbell, m *message) error {
	if m.noFD {
		d.close()
		return nil
	}
	return d.replace(m.take())
}

func (b *Backend) setFeatures(f uint64) error {
	if x := f &^ b.offered(); x != 0 {
		return fmt.Errorf("%w: features %#x were not offered", ErrProtocol, x)
	}
	if f == b.features {
		return nil
	}
	b.stop()
	b.features = f
	return b.start()
}

func (b *Backend) setMemTable(m *message) error {
	t, err := mapTable(m.regions, m.fds)
	if err != nil {
		return err
	}
	b.stop()
	err = b.unmap()
	b.table = t
	return errors.Join(err, b.start())
}

func (b *Backend) setChannel(fd int) error {
	c, err := newBackendChannel(fd)
	if err != nil {
		return err
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.channel != nil {
		b.channel.close()
	}
	b.channel = c
	return nil
}

func (b *Backend) getConfig(m *message) []byte {
	// Whoever waits by now has made its change before the configuration is read.
	b.mu.Lock()
	reread := b.reread
	b.reread = nil
	b.mu.Unlock()
	data := make([]byte, len(m.config.data))
	b.dev.ReadConfig(m.config.offset, data)
	if m.config.offset == 0 {
		b.seen = data
	}
	if reread != nil {
		// QEMU holds its global lock until it has the reply: no vCPU reads the
		// old copy any more.
		close(reread)
	}
	return m.replyConfig(data)
}

// start starts the device if everything is said that it needs, and does
// nothing otherwise: a later message will.
func (b *Backend) start() error {
	if b.table == nil {
		return nil
	}
	named := b.features&featureProtocol != 0 // else every started ring is enabled
	var use []*ring
	for _, r := range b.rings {
		switch {
		case !r.ready():
		case !named || r.enable == enableYes:
			use = append(use, r)
		case r.enable == enableUnsaid:
			return nil
		}
	}
	if len(use) == 0 {
		return nil
	}
	if b.running && !slices.ContainsFunc(use, func(r *ring) bool { return r.queue == nil }) {
		return nil
	}
	// Where a ring joins those that run already, all begin anew.
	b.stop()
	if b.features&virtio.FeatureVersion1 == 0 {
		return fmt.Errorf("%w: the driver did not accept VIRTIO_F_VERSION_1; legacy devices are not offered (QEMU: -global virtio-mmio.force-legacy=false)", ErrProtocol)
	}
	features := b.features &^ featureProtocol
	life := &session{b: b}
	s := virtio.Session{
		Features: features, Memory: b.table.memory, Queues: make([]*virtio.Queue, len(b.rings)),
		ConfigChanged: life.configChanged, Failed: b.deviceFailed,
	}
	for i, r := range b.rings {
		if !r.ready() || named && r.enable != enableYes {
			continue
		}
		q, err := r.newQueue(b.table, features)
		if err != nil {
			b.detachQueues()
			return fmt.Errorf("ring %d: %w", i, err)
		}
		r.queue, s.Queues[i] = q, q
	}
	b.mu.Lock()
	b.session = life
	b.mu.Unlock()
	if err := b.dev.Start(s); err != nil {
		b.endSession()
		b.detachQueues()
		return fmt.Errorf("start the device: %w", err)
	}
	b.running = true
	b.mu.Lock()
	life.started = true
	b.mu.Unlock()
	b.announceConfig()
	return nil
}

// endSession lets nobody wait for the front end any more.
func (b *Backend) endSession() {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.session = nil
	if b.reread != nil {
		close(b.reread)
		b.reread = nil
	}
}

// stop stops the device and notes where its rings would go on.
func (b *Backend) stop() {
	if !b.running {
		return
	}
	b.running = false
	b.endSession()
	b.dev.Stop()
	b.detachQueues()
}

func (b *Backend) detachQueues() {
	for _, r := range b.rings {
		if r.queue != nil {
			r.base, _ = r.queue.Indices()
			r.queue = nil
		}
	}
}

// reset returns the rings to the state before the first message about them;
// the descriptors and addresses stay, as QEMU announces some of them only once.
func (b *Backend) reset() {
	b.stop()
	for _, r := range b.rings {
		r.stop()
		r.base, r.enable = 0, enableUnsaid
	}
}

// announceConfig makes up for a change of the configuration space that happened
// while the device was not running and so had nobody to tell: QEMU reads a
// block device's configuration once and hands the guest that copy.
func (b *Backend) announceConfig() {
	if len(b.seen) == 0 {
		return
	}
	now := make([]byte, len(b.seen))
	b.dev.ReadConfig(0, now)
	if !bytes.Equal(now, b.seen) {
		b.mu.Lock()
		b.sendConfigChange()
		b.mu.Unlock()
	}
}

// sendConfigChange tells the front end to read the configuration space again.
// b.mu is held.
func (b *Backend) sendConfigChange() {
	if b.channel != nil {
		// A front end that closed its end is going away: Serve will see it.
		_ = b.channel.configChanged()
	}
}

// configChanged is Session.ConfigChanged. It waits until the front end has read
// the new configuration: QEMU answers the guest from a copy, and what is told
// to the guest by another way afterwards must not meet the old one. It waits
// for the front end's main loop only, not for the guest, and not beyond the
// session; nor within Device.Start, which keeps Serve from answering.
func (l *session) configChanged() {
	b := l.b
	b.mu.Lock()
	if b.session != l || b.channel == nil {
		b.mu.Unlock()
		return // the next start announces the change
	}
	b.sendConfigChange()
	if !l.started || b.protocol&protocolConfig == 0 {
		b.mu.Unlock()
		return
	}
	if b.reread == nil {
		b.reread = make(chan struct{})
	}
	reread := b.reread
	b.mu.Unlock()
	<-reread
}

// deviceFailed signals the rings' error doorbells, the nearest that vhost-user
// has to DEVICE_NEEDS_RESET.
func (b *Backend) deviceFailed(err error) {
	for _, r := range b.rings {
		r.err.ring()
	}
	if b.failed != nil {
		b.failed(err)
	}
}
