// Package rng is the virtio entropy device (virtio 1.2 §5.4) on getrandom(2).
package rng

import (
	"errors"
	"fmt"

	"github.com/wsl2/wsl2/vmm/virtio"
	"golang.org/x/sys/unix"
)

const (
	queueSize = 8 // Linux has one request in flight
	// maxBytes bounds what one request gets; Linux asks for 64 bytes or less.
	// A driver must cope with less than it asked for (§5.4.6.1).
	maxBytes = 64 << 10
)

// Device is a virtio entropy device.
type Device struct {
	server virtio.Server
}

var _ virtio.Device = (*Device)(nil)

// New returns a device.
func New() *Device { return &Device{} }

// ID returns virtio.IDEntropy.
func (d *Device) ID() virtio.ID { return virtio.IDEntropy }

// Features returns 0: the device type has none.
func (d *Device) Features() uint64 { return 0 }

// QueueSizes returns one request queue.
func (d *Device) QueueSizes() []uint16 { return []uint16{queueSize} }

// ReadConfig fills p with zeroes: there is no configuration space.
func (d *Device) ReadConfig(_ uint32, p []byte) { clear(p) }

// WriteConfig does nothing.
func (d *Device) WriteConfig(uint32, []byte) {}

// Start serves the request queue.
func (d *Device) Start(s virtio.Session) error {
	if err := d.server.Start(s, 0, fill); err != nil {
		return fmt.Errorf("rng: %w", err)
	}
	return nil
}

// Stop ends the session.
func (d *Device) Stop() { d.server.Stop() }

// fill writes random bytes straight into the guest's buffers.
func fill(c *virtio.Chain) (written uint32, err error) {
	if len(c.Writable) == 0 {
		return 0, fmt.Errorf("%w: entropy request without a writable buffer", virtio.ErrProtocol)
	}
	for _, b := range virtio.Cut(c.Writable, maxBytes) {
		for len(b) > 0 {
			n, err := unix.Getrandom(b, 0)
			if errors.Is(err, unix.EINTR) {
				continue
			}
			if err != nil {
				return written, fmt.Errorf("getrandom: %w", err)
			}
			b, written = b[n:], written+uint32(n)
		}
	}
	return written, nil
}
