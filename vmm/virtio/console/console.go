// Package console is the virtio console device (virtio 1.2 §5.3) with one port
// and output only: it carries the guest kernel's log from hvc0.
//
// Linux sends console output in pieces of 16 bytes and spins until each is
// returned, so the device does nothing but copy.
package console

import (
	"fmt"
	"io"

	"github.com/wsl2/wsl2/vmm/virtio"
)

const (
	transmitQueue = 1 // 0 is receiveq
	queueSize     = 64

	// maxBytes is how much of one chain is copied; the rest is dropped. Drivers
	// send a page at most.
	maxBytes = 64 << 10
)

// Device is a virtio console device.
type Device struct {
	w      io.Writer
	server virtio.Server // of transmitq
}

var _ virtio.Device = (*Device)(nil)

// New returns a device that writes what the guest prints to w, which must not
// block. The bytes are the guest's own: w must not pass them to a terminal
// (vmm/logtail cleans them). Errors of w are ignored.
func New(w io.Writer) *Device { return &Device{w: w} }

// ID returns virtio.IDConsole.
func (d *Device) ID() virtio.ID { return virtio.IDConsole }

// Features returns 0: one port of unknown size.
func (d *Device) Features() uint64 { return 0 }

// QueueSizes returns receiveq, which stays idle, and transmitq.
func (d *Device) QueueSizes() []uint16 { return []uint16{queueSize, queueSize} }

// ReadConfig fills p with zeroes: without features no field is valid (§5.3.4).
func (d *Device) ReadConfig(_ uint32, p []byte) { clear(p) }

// WriteConfig does nothing.
func (d *Device) WriteConfig(uint32, []byte) {}

// Start serves transmitq.
func (d *Device) Start(s virtio.Session) error {
	if err := d.server.Start(s, transmitQueue, d.transmit()); err != nil {
		return fmt.Errorf("console: %w", err)
	}
	return nil
}

// Stop ends the session.
func (d *Device) Stop() { d.server.Stop() }

// transmit returns the handler of transmitq. It copies before it writes, so that
// w never sees bytes that change.
func (d *Device) transmit() virtio.Handler {
	buf := make([]byte, 4096)
	return func(c *virtio.Chain) (uint32, error) {
		for _, b := range virtio.Cut(c.Readable, maxBytes) {
			for len(b) > 0 {
				n := copy(buf, b)
				_, _ = d.w.Write(buf[:n])
				b = b[n:]
			}
		}
		return 0, nil
	}
}
