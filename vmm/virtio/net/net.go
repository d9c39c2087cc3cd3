// Package net is the virtio network device (virtio 1.2 §5.1): one card with one
// pair of queues, whose frames go to a network in another process and come from it.
//
// # The link
//
// A Link is a socket of records (SOCK_SEQPACKET). A record is a frame behind a
// Header, which says what of its checksum and segmentation is left to do (virtio 1.2
// §5.1.6); so a record holds up to 64 KiB of a TCP stream. The one record that is no
// frame comes from the device, first, and again after each reset of the driver: Features.
//
// Nobody is called before the guest has sent a frame, and again after the other end
// has gone: a network that dies takes its connections along, and not the machine.
//
// # Concurrency
//
// One goroutine per session, from Start to Stop, moves frames both ways, straight
// between the guest's memory and the socket. It never blocks but in wait: if the link
// takes no more, the guest's frames stay in its queue, and the other way round.
package net

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/wsl2/wsl2/vmm/virtio"
)

// Feature bits (virtio 1.2 §5.1.3).
const (
	featureCsum      = 1 << 0 // frames with partial checksums, guest → device
	featureGuestCsum = 1 << 1 // the same, device → guest
	featureMTU       = 1 << 3
	featureMAC       = 1 << 5
	featureGuestTSO4 = 1 << 7 // segments larger than the MTU, device → guest
	featureGuestTSO6 = 1 << 8
	featureHostTSO4  = 1 << 11 // the same, guest → device
	featureHostTSO6  = 1 << 12
	featureMrgRxbuf  = 1 << 15 // a frame may fill several rx buffers
	featureStatus    = 1 << 16

	offered = featureCsum | featureGuestCsum | featureMTU | featureMAC | featureGuestTSO4 | featureGuestTSO6 |
		featureHostTSO4 | featureHostTSO6 | featureMrgRxbuf | featureStatus
	// offloads are those that a link needs all of, to send more than plain frames.
	offloads = featureGuestCsum | featureGuestTSO4 | featureGuestTSO6 | featureMrgRxbuf
)

// Virtqueues (virtio 1.2 §5.1.2). There is no control queue: the card takes all
// frames, and there is nobody else on its wire.
const (
	queueRX = iota
	queueTX
)

// Queue sizes. Linux fills the rx queue when the card is turned on, which is on the way of a
// cold start; of its buffers, 1.5 to 4 KiB each, 128 hold several of the largest frames.
const (
	rxSize = 128
	txSize = 256
)

// MTU bounds: what IPv6 needs at least, and what IPv4's length field can say.
const (
	minMTU = 1280
	maxMTU = 65535
)

// reopenInterval is how long a link that could not be opened stays closed.
const reopenInterval = time.Second

// Config describes a device.
type Config struct {
	MAC [6]byte
	MTU uint16
	// Open returns a new Link's socket, which the device owns. It is called when the
	// guest sends its first frame, from the session's goroutine.
	Open func() (*os.File, error)
	// OnError (optional) is told that Open failed, or that the link ended by itself. It must
	// not block.
	OnError func(error)
}

// Device is a virtio network device. Close it after the transport's last Stop.
type Device struct {
	cfg Config

	mu      sync.Mutex
	session *session
	link    int       // -1 while there is none; owned by the session while one runs
	retry   time.Time // no Open before; owned like link

	reopen time.Duration // reopenInterval, but in tests
}

var _ virtio.Device = (*Device)(nil)

// New returns a device whose link is not open yet.
func New(cfg Config) (*Device, error) {
	if cfg.Open == nil {
		return nil, errors.New("net: a device needs a link")
	}
	if cfg.MTU < minMTU || cfg.MTU > maxMTU {
		return nil, fmt.Errorf("net: an MTU of %d; a card has %d to %d", cfg.MTU, minMTU, maxMTU)
	}
	return &Device{cfg: cfg, link: -1, reopen: reopenInterval}, nil
}

// ID implements virtio.Device.
func (d *Device) ID() virtio.ID { return virtio.IDNet }

// Features implements virtio.Device.
func (d *Device) Features() uint64 { return offered }

// QueueSizes implements virtio.Device: rx, tx.
func (d *Device) QueueSizes() []uint16 { return []uint16{rxSize, txSize} }

// MAC returns the card's address, MTU the largest packet; front ends of vhost-user hold
// the configuration space themselves.
func (d *Device) MAC() [6]byte { return d.cfg.MAC }

// MTU returns the size of the largest packet.
func (d *Device) MTU() uint16 { return d.cfg.MTU }

// ReadConfig implements virtio.Device: struct virtio_net_config (virtio 1.2 §5.1.4).
func (d *Device) ReadConfig(off uint32, p []byte) {
	var c [12]byte
	copy(c[:], d.cfg.MAC[:])
	const linkUp = 1
	binary.LittleEndian.PutUint16(c[6:], linkUp) // status
	binary.LittleEndian.PutUint16(c[8:], 1)      // max_virtqueue_pairs
	binary.LittleEndian.PutUint16(c[10:], d.cfg.MTU)
	clear(p)
	if off < uint32(len(c)) {
		copy(p, c[off:])
	}
}

// WriteConfig implements virtio.Device; all is read-only.
func (d *Device) WriteConfig(uint32, []byte) {}

// Start implements virtio.Device. A driver that enabled one queue alone gets nothing
// moved: front ends of vhost-user start queues one by one.
func (d *Device) Start(vs virtio.Session) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.session != nil {
		return errors.New("net: started twice")
	}
	if len(vs.Queues) <= queueTX || vs.Queues[queueRX] == nil || vs.Queues[queueTX] == nil {
		return nil
	}
	s, err := newSession(d, vs)
	if err != nil {
		return err
	}
	d.session = s
	go s.run()
	return nil
}

// Stop implements virtio.Device. The link stays open for the next session.
func (d *Device) Stop() {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.session != nil {
		d.session.stop()
		d.session = nil
	}
}

// Close closes the link. The device is stopped.
func (d *Device) Close() error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.link < 0 {
		return nil
	}
	fd := d.link
	d.link = -1
	return os.NewSyscallError("close", unix.Close(fd))
}

// report tells the owner about the link's end.
func (d *Device) report(err error) {
	if d.cfg.OnError != nil {
		d.cfg.OnError(fmt.Errorf("net: %w", err))
	}
}
