// Package balloon is the virtio memory balloon device (virtio 1.2 §5.5): free
// page reporting gives memory that the guest does not use back to the host by
// itself, and a target size takes more on demand.
package balloon

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"sync"
	"sync/atomic"
	"unsafe"

	"github.com/wsl2/wsl2/vmm/guestmem"
	"github.com/wsl2/wsl2/vmm/virtio"
	"golang.org/x/sys/unix"
)

// Feature bits (virtio 1.2 §5.5.3).
const (
	featureDeflateOnOOM  = 1 << 2
	featurePageReporting = 1 << 5
)

// PageSize is the unit of the balloon, whatever the guest's own pages are.
const PageSize = 4096

const (
	queueSize = 128
	// maxPFNs is how many page numbers of one chain are looked at; Linux sends 256.
	maxPFNs = 4096

	queueInflate = 0
	queueDeflate = 1
	// The specification numbers reporting_vq 4 whatever was negotiated; Linux and
	// QEMU leave out the queues before it that were not. Without statistics and
	// hinting that makes it 2. A driver enables one of the two.
	queueReportingLinux = 2
	queueReportingSpec  = 4
	queues              = 5
)

// Device is a virtio balloon device.
type Device struct {
	released atomic.Uint64
	noRemove atomic.Bool // guest memory is not a shared mapping of a file

	mu            sync.Mutex
	target        uint32 // num_pages
	actual        uint32 // as the driver says
	configChanged func() // of the running session
	running       []*virtio.Queue
	wg            sync.WaitGroup
}

var _ virtio.Device = (*Device)(nil)

// New returns a device with a target of 0.
func New() *Device { return &Device{} }

// SetTarget asks the driver to give away n bytes of memory, in whole pages; it
// follows in its own time, see Actual.
func (d *Device) SetTarget(n uint64) {
	d.mu.Lock()
	d.target = uint32(min(n/PageSize, 1<<32-1))
	changed := d.configChanged
	d.mu.Unlock()
	if changed != nil {
		changed()
	}
}

// Actual returns how many bytes are in the balloon, as the driver says.
func (d *Device) Actual() uint64 {
	d.mu.Lock()
	defer d.mu.Unlock()
	return uint64(d.actual) * PageSize
}

// Released returns how many bytes were given back to the host since New, by
// balloon and reporting; what the guest took again is not subtracted.
func (d *Device) Released() uint64 { return d.released.Load() }

// ID returns virtio.IDBalloon.
func (d *Device) ID() virtio.ID { return virtio.IDBalloon }

// Features returns the offered VIRTIO_BALLOON_F_* bits.
func (d *Device) Features() uint64 { return featureDeflateOnOOM | featurePageReporting }

// QueueSizes returns inflateq, deflateq and the two places of reporting_vq.
func (d *Device) QueueSizes() []uint16 {
	return []uint16{queueSize, queueSize, queueSize, queueSize, queueSize}
}

// Fields of struct virtio_balloon_config (virtio 1.2 §5.5.4).
const (
	configNumPages = 0 // le32
	configActual   = 4 // le32, written by the driver
	configSize     = 8
)

// ReadConfig fills p from struct virtio_balloon_config.
func (d *Device) ReadConfig(off uint32, p []byte) {
	var c [configSize]byte
	d.mu.Lock()
	binary.LittleEndian.PutUint32(c[configNumPages:], d.target)
	binary.LittleEndian.PutUint32(c[configActual:], d.actual)
	d.mu.Unlock()
	clear(p)
	if off < configSize {
		copy(p, c[off:])
	}
}

// WriteConfig takes the driver's count of the pages in the balloon.
func (d *Device) WriteConfig(off uint32, p []byte) {
	if off != configActual || len(p) != 4 {
		return
	}
	d.mu.Lock()
	d.actual = binary.LittleEndian.Uint32(p)
	d.mu.Unlock()
}

// Start serves the queues.
func (d *Device) Start(s virtio.Session) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.configChanged != nil {
		return errors.New("balloon: started twice")
	}
	d.configChanged = s.ConfigChanged
	handlers := [queues]func(*virtio.Chain) (uint32, error){
		queueInflate: func(c *virtio.Chain) (uint32, error) { return 0, d.inflate(s.Memory, c) },
		// A page that the guest takes back is there as soon as it is touched.
		queueDeflate: func(*virtio.Chain) (uint32, error) { return 0, nil },
	}
	if s.Features&featurePageReporting != 0 {
		report := func(c *virtio.Chain) (uint32, error) { return 0, d.report(c) }
		handlers[queueReportingLinux], handlers[queueReportingSpec] = report, report
	}
	for i, q := range s.Queues {
		if q == nil || i >= queues || handlers[i] == nil {
			continue
		}
		d.running = append(d.running, q)
		d.wg.Go(func() {
			if err := q.Serve(handlers[i]); err != nil {
				s.Failed(fmt.Errorf("balloon: %w", err))
			}
		})
	}
	return nil
}

// Stop ends the session.
func (d *Device) Stop() {
	d.mu.Lock()
	running := d.running
	d.running, d.configChanged, d.actual = nil, nil, 0
	d.mu.Unlock()
	for _, q := range running {
		q.Close()
	}
	d.wg.Wait()
}

// inflate releases the pages whose numbers (le32, in units of 4 KiB) the chain
// holds. Runs of pages, in either direction, are released at once.
func (d *Device) inflate(m *guestmem.Memory, c *virtio.Chain) error {
	var raw [4 * 256]byte
	in := virtio.Cut(c.Readable, 4*maxPFNs)
	if n := virtio.Len(in); n%4 != 0 {
		return fmt.Errorf("%w: %d bytes of page numbers", virtio.ErrProtocol, n)
	}
	var first, end uint64 // the run
	flush := func() error {
		if first == end {
			return nil
		}
		b, err := m.Bytes(guestmem.Addr(first*PageSize), (end-first)*PageSize)
		if err != nil {
			return fmt.Errorf("%w: page %#x in the balloon: %w", virtio.ErrProtocol, first, err)
		}
		return d.release(b)
	}
	for len(in) > 0 {
		n := virtio.Gather(raw[:], in)
		in = virtio.Drop(in, n)
		for b := raw[:n]; len(b) > 0; b = b[4:] {
			switch pfn := uint64(binary.LittleEndian.Uint32(b)); pfn {
			case end:
				end++
			case first - 1:
				first--
			default:
				if err := flush(); err != nil {
					return err
				}
				first, end = pfn, pfn+1
			}
		}
	}
	return flush()
}

// report releases the chain's buffers, which are free pages of the guest. It
// takes them back by touching them, once the chain is returned.
func (d *Device) report(c *virtio.Chain) error {
	for _, b := range c.Writable {
		if err := d.release(b); err != nil {
			return err
		}
	}
	return nil
}

var hostPage = uintptr(os.Getpagesize())

// release gives the whole host pages within b back; they read as zeroes then.
func (d *Device) release(b []byte) error {
	start := uintptr(unsafe.Pointer(unsafe.SliceData(b)))
	skip := -start & (hostPage - 1)
	if uintptr(len(b)) < skip+hostPage {
		return nil
	}
	b = b[skip:]
	b = b[:uintptr(len(b))&^(hostPage-1)]
	// A file's pages (memfd) are freed only by MADV_REMOVE, which private memory
	// refuses; MADV_DONTNEED would drop no more than our view of them.
	if !d.noRemove.Load() {
		switch err := unix.Madvise(b, unix.MADV_REMOVE); {
		case err == nil:
			d.released.Add(uint64(len(b)))
			return nil
		case errors.Is(err, unix.EINVAL), errors.Is(err, unix.EACCES), errors.Is(err, unix.EOPNOTSUPP):
			d.noRemove.Store(true)
		default:
			return os.NewSyscallError("madvise(MADV_REMOVE)", err)
		}
	}
	if err := unix.Madvise(b, unix.MADV_DONTNEED); err != nil {
		return os.NewSyscallError("madvise(MADV_DONTNEED)", err)
	}
	d.released.Add(uint64(len(b)))
	return nil
}
