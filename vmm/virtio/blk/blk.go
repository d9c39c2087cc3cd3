// Package blk is the virtio block device (virtio 1.2 §5.2) on raw disk images.
//
// A Device is a slot in the guest: it may be started empty, with a capacity of
// 0, and disks are attached and detached while the guest runs. The driver sees
// that as a change of capacity, announced by a configuration change
// notification; Linux re-reads the capacity then.
//
// One goroutine pops the queue and serves what the host's page cache can answer,
// without a hop to another goroutine. What has to wait for the host's disk (cold
// reads, flushes, discards, writes that the host throttles) goes to a pool of
// workers, so that no request waits behind another one's disk access.
package blk

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/wsl2/wsl2/vmm/virtio"
	"golang.org/x/sys/unix"
)

// Feature bits (virtio 1.2 §5.2.3).
const (
	featureSegMax      = 1 << 2
	featureRO          = 1 << 5
	featureBlkSize     = 1 << 6
	featureFlush       = 1 << 9
	featureTopology    = 1 << 10
	featureConfigWCE   = 1 << 11
	featureDiscard     = 1 << 13
	featureWriteZeroes = 1 << 14
)

const (
	queueSize = 256
	// segMax leaves room for header and status, so that drivers without
	// indirect descriptors can use it, too (§5.2.4).
	segMax = queueSize - 2

	// Bounds of one request: its ranges, and the sectors of each. Zeroes may have to
	// be written, and a request is not interrupted: 128 MiB is a fraction of a second.
	maxDiscardRanges      = 64
	maxDiscardSectors     = 1 << 22 // 2 GiB
	maxWriteZeroesRanges  = 1       // Linux sends no more
	maxWriteZeroesSectors = 1 << 18 // 128 MiB
	// Smaller holes than the host's usual block only zero, they free nothing.
	discardAlignment = 4096 / SectorSize

	defaultWorkers = 16

	// reportInterval is how often at most one kind of host error is reported.
	reportInterval = 30 * time.Second
)

// Errors of Attach and Detach.
var (
	ErrOccupied = errors.New("a disk is attached already")
	ErrNoDisk   = errors.New("no disk is attached")
)

// Config describes a device.
type Config struct {
	// Serial is what the guest reads as the disk's serial number, at most 20
	// bytes: Linux shows it in /sys/block/*/serial.
	Serial string
	// ReadOnly offers VIRTIO_BLK_F_RO for the life of the device. A read-only
	// Disk in a device without it is possible: its writes fail.
	ReadOnly bool
	// Disk is attached from the start; nil for an empty slot. The device owns
	// it from New on.
	Disk *Disk
	// Workers is how many requests wait for the host's disk at a time, 16 if 0.
	Workers int
	// OnError is told of the host's errors, which the guest sees only as I/O
	// errors; they are *IOError. Each kind is reported once in 30 s. It is
	// called from the device's goroutines and must not block. It may be nil.
	OnError func(error)
}

// IOError is a failure of the host's file behind a disk. The guest has been
// told VIRTIO_BLK_S_IOERR.
type IOError struct {
	Path string // disk image
	Op   string // read, write, flush, discard or write zeroes
	Err  error
}

func (e *IOError) Error() string {
	if errors.Is(e.Err, unix.ENOSPC) {
		return fmt.Sprintf("no space left on the host for disk image %s: free some, then restart what failed in the guest", e.Path)
	}
	return fmt.Sprintf("%s disk image %s: %v", e.Op, e.Path, e.Err)
}

func (e *IOError) Unwrap() error { return e.Err }

// Device is a virtio block device. Attach, Detach and Close are safe for
// concurrent use and independent of Start and Stop.
type Device struct {
	cfg Config

	mu            sync.Mutex
	slot          *attachment // nil when empty
	writeThrough  bool        // by the driver's write to writeback
	configChanged func()      // of the running session
	run           *session
	reported      map[string]time.Time // of the attached disk, by operation and error
}

var _ virtio.Device = (*Device)(nil)

// attachment is a disk in a slot. It counts the requests that use the disk.
type attachment struct {
	disk *Disk
	// Guarded by Device.mu.
	inFlight  int
	detaching bool          // takes no requests any more
	closing   bool          // one Detach syncs and closes the image
	idle      chan struct{} // closed when detaching and inFlight is 0
	gone      chan struct{} // closed when the slot is empty again
}

// New returns a device, empty unless cfg.Disk is set.
func New(cfg Config) (*Device, error) {
	if len(cfg.Serial) > idSize {
		return nil, fmt.Errorf("blk: serial %q is longer than %d bytes", cfg.Serial, idSize)
	}
	if cfg.Workers <= 0 {
		cfg.Workers = defaultWorkers
	}
	d := &Device{cfg: cfg, reported: map[string]time.Time{}}
	if cfg.Disk != nil {
		d.slot = newAttachment(cfg.Disk)
	}
	return d, nil
}

func newAttachment(disk *Disk) *attachment {
	return &attachment{disk: disk, idle: make(chan struct{}), gone: make(chan struct{})}
}

// Attach puts disk into the empty slot and tells the driver. The device owns
// disk from then on; on an error (ErrOccupied) it stays the caller's.
func (d *Device) Attach(disk *Disk) error {
	d.mu.Lock()
	if d.slot != nil {
		d.mu.Unlock()
		return fmt.Errorf("blk: attach %s: %w: %s", disk.path, ErrOccupied, d.slot.disk.path)
	}
	d.slot = newAttachment(disk)
	clear(d.reported) // of the disk before
	changed := d.configChanged
	d.mu.Unlock()
	if changed != nil {
		changed()
	}
	return nil
}

// Detach takes the disk out of the slot: the capacity becomes 0, further
// requests fail, those in flight are waited for, then the image is synced,
// closed and unlocked. The guest should have unmounted it before.
// It returns ErrNoDisk if there is none. If ctx ends first, the slot stays
// occupied and closed to requests; another Detach goes on with it.
func (d *Device) Detach(ctx context.Context) error {
	d.mu.Lock()
	a := d.slot
	if a == nil {
		d.mu.Unlock()
		return ErrNoDisk
	}
	var changed func()
	if !a.detaching {
		a.detaching = true
		changed = d.configChanged
		if a.inFlight == 0 {
			close(a.idle)
		}
	}
	d.mu.Unlock()
	if changed != nil {
		changed()
	}

	select {
	case <-a.idle:
	case <-ctx.Done():
		return fmt.Errorf("blk: detach %s: requests are still in flight: %w", a.disk.path, ctx.Err())
	}
	d.mu.Lock()
	other := a.closing
	a.closing = true
	d.mu.Unlock()
	if other {
		select {
		case <-a.gone:
			return ErrNoDisk
		case <-ctx.Done():
			return fmt.Errorf("blk: detach %s: still being synced: %w", a.disk.path, ctx.Err())
		}
	}
	// Without the lock: a sync may take long, and the guest reads the
	// configuration meanwhile. The slot stays occupied until the lock is released.
	var err error
	if !a.disk.readOnly {
		if e := a.disk.sync(); e != nil {
			err = &IOError{Path: a.disk.path, Op: "flush", Err: e}
		}
	}
	err = errors.Join(err, a.disk.Close())
	d.mu.Lock()
	d.slot = nil
	close(a.gone)
	d.mu.Unlock()
	return err
}

// Close detaches the disk, if there is one. It is for a device that is stopped,
// and harmless if repeated.
func (d *Device) Close() error {
	if err := d.Detach(context.Background()); !errors.Is(err, ErrNoDisk) {
		return err
	}
	return nil
}

// acquire returns the disk for one request, or nil, and whether writes must be
// stable before they complete. release follows.
func (d *Device) acquire() (a *attachment, writeThrough bool) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.slot == nil || d.slot.detaching {
		return nil, false
	}
	d.slot.inFlight++
	return d.slot, d.writeThrough
}

func (d *Device) release(a *attachment) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if a.inFlight--; a.inFlight == 0 && a.detaching {
		close(a.idle)
	}
}

// report tells the owner about a failure of the host, unless it just did.
func (d *Device) report(disk *Disk, op string, err error) {
	if d.cfg.OnError == nil {
		return
	}
	now := time.Now()
	kind := op + ": " + err.Error()
	d.mu.Lock()
	last, seen := d.reported[kind]
	due := !seen || now.Sub(last) >= reportInterval
	if due {
		d.reported[kind] = now
	}
	d.mu.Unlock()
	if due {
		d.cfg.OnError(&IOError{Path: disk.path, Op: op, Err: err})
	}
}

// ID returns virtio.IDBlock.
func (d *Device) ID() virtio.ID { return virtio.IDBlock }

// Features returns the offered VIRTIO_BLK_F_* bits.
func (d *Device) Features() uint64 {
	f := uint64(featureSegMax | featureBlkSize | featureFlush | featureTopology | featureConfigWCE)
	if d.cfg.ReadOnly {
		return f | featureRO
	}
	return f | featureDiscard | featureWriteZeroes
}

// QueueSizes returns one request queue.
func (d *Device) QueueSizes() []uint16 { return []uint16{queueSize} }

// Fields of struct virtio_blk_config (virtio 1.2 §5.2.4).
const (
	configCapacity          = 0  // le64, sectors
	configSegMax            = 12 // le32
	configBlkSize           = 20 // le32
	configPhysicalBlockExp  = 24 // u8
	configMinIOSize         = 26 // le16, logical blocks
	configOptIOSize         = 28 // le32, logical blocks
	configWriteback         = 32 // u8
	configNumQueues         = 34 // le16
	configMaxDiscard        = 36 // le32, sectors
	configMaxDiscardSeg     = 40 // le32
	configDiscardAlignment  = 44 // le32, sectors
	configMaxWriteZeroes    = 48 // le32, sectors
	configMaxWriteZeroesSeg = 52 // le32
	configMayUnmap          = 56 // u8
	configSize              = 60
)

// ReadConfig fills p from struct virtio_blk_config.
func (d *Device) ReadConfig(off uint32, p []byte) {
	var c [configSize]byte
	le := binary.LittleEndian
	d.mu.Lock()
	if a := d.slot; a != nil && !a.detaching {
		le.PutUint64(c[configCapacity:], uint64(a.disk.size)/SectorSize)
	}
	if !d.writeThrough {
		c[configWriteback] = 1
	}
	d.mu.Unlock()
	le.PutUint32(c[configSegMax:], segMax)
	le.PutUint32(c[configBlkSize:], SectorSize)
	// 4 KiB is what the host's file systems and page cache work in; a hint only.
	c[configPhysicalBlockExp] = 3
	le.PutUint16(c[configMinIOSize:], 4096/SectorSize)
	le.PutUint32(c[configOptIOSize:], 0)
	le.PutUint16(c[configNumQueues:], 1)
	if !d.cfg.ReadOnly {
		le.PutUint32(c[configMaxDiscard:], maxDiscardSectors)
		le.PutUint32(c[configMaxDiscardSeg:], maxDiscardRanges)
		le.PutUint32(c[configDiscardAlignment:], discardAlignment)
		le.PutUint32(c[configMaxWriteZeroes:], maxWriteZeroesSectors)
		le.PutUint32(c[configMaxWriteZeroesSeg:], maxWriteZeroesRanges)
		c[configMayUnmap] = 1
	}
	clear(p)
	if off < configSize {
		copy(p, c[off:])
	}
}

// WriteConfig takes the driver's choice of the cache mode; all else is read-only.
func (d *Device) WriteConfig(off uint32, p []byte) {
	if off != configWriteback || len(p) != 1 {
		return
	}
	d.mu.Lock()
	d.writeThrough = p[0] == 0
	d.mu.Unlock()
}

// Start serves the request queue.
func (d *Device) Start(s virtio.Session) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.run != nil {
		return errors.New("blk: started twice")
	}
	d.configChanged = s.ConfigChanged
	// Without a cache the driver can flush, every write must be stable (§5.2.5.2).
	if s.Features&(featureFlush|featureConfigWCE) == 0 {
		d.writeThrough = true
	}
	if len(s.Queues) == 0 || s.Queues[0] == nil {
		return nil
	}
	d.run = startSession(d, s)
	return nil
}

// Stop ends the session; requests that are being carried out are completed first,
// those that wait their turn are dropped.
func (d *Device) Stop() {
	d.mu.Lock()
	run := d.run
	d.run, d.configChanged = nil, nil
	d.mu.Unlock()
	if run != nil {
		run.stop()
	}
	d.mu.Lock()
	d.writeThrough = false // §5.2.5.1: reset leaves the cache in writeback mode
	d.mu.Unlock()
}
