// Package virtio holds what every virtio 1.2 device and every transport share:
// the Device interface, split virtqueues and the feature bits.
//
// A device never knows its transport (virtio-mmio in vmm/mmio, vhost-user in
// vmm/vhostuser) and a transport never knows its accelerator. The transport
// negotiates features, builds one Queue per virtqueue the driver enabled and
// hands all of them to Device.Start when the driver sets DRIVER_OK; it calls
// Device.Stop on reset. Devices run on goroutines of their own, woken by the
// queue's kick eventfd.
package virtio

import (
	"github.com/wsl2/wsl2/vmm/guestmem"
)

// ID is a virtio device type (virtio 1.2 §5).
type ID uint32

// Device types used here.
const (
	IDNet     ID = 1
	IDBlock   ID = 2
	IDConsole ID = 3
	IDEntropy ID = 4
	IDVsock   ID = 19
	IDFS      ID = 26
)

// Feature bits that belong to the ring or the transport, not to a device
// (virtio 1.2 §6). Transports offer them; Device.Features must not.
const (
	FeatureIndirectDesc = 1 << 28 // VIRTIO_F_INDIRECT_DESC
	FeatureEventIdx     = 1 << 29 // VIRTIO_F_EVENT_IDX
	FeatureVersion1     = 1 << 32 // VIRTIO_F_VERSION_1

	// RingFeatures are those that Queue implements.
	RingFeatures uint64 = FeatureIndirectDesc | FeatureEventIdx | FeatureVersion1
)

// MaxConfig is the most bytes that a device configuration space has here, as in
// the vhost-user protocol (VHOST_USER_MAX_CONFIG_SIZE).
const MaxConfig = 256

// Device is a virtio device without its transport.
//
// The transport calls Start and Stop in alternation, from one goroutine at a
// time; the other methods at any moment, from any goroutine.
type Device interface {
	// ID returns the device type. It never changes.
	ID() ID
	// Features returns the device-specific feature bits offered (0..23, 50..63).
	Features() uint64
	// QueueSizes returns the largest size of each virtqueue (powers of two); its
	// length is the number of virtqueues.
	QueueSizes() []uint16
	// ReadConfig fills p from the device configuration space, which has at most
	// MaxConfig bytes, at off; bytes past its end read as 0.
	ReadConfig(off uint32, p []byte)
	// WriteConfig stores p at off; writes to read-only fields are ignored.
	WriteConfig(off uint32, p []byte)
	// Start begins to serve the queues. On an error the device needs a reset.
	Start(Session) error
	// Stop ends what Start began. It returns only when nothing of the device
	// touches guest memory or the session's queues any more. It is harmless on
	// a device that is not started.
	Stop()
}

// Session is one life of a device, from DRIVER_OK to reset.
type Session struct {
	// Features are the bits that both sides agreed on, ring bits included.
	Features uint64
	// Memory is the guest's memory; devices usually need only the queues.
	Memory *guestmem.Memory
	// Queues has one entry per virtqueue; nil where the driver enabled none.
	Queues []*Queue
	// ConfigChanged tells the driver that the configuration space changed
	// (virtio 1.2 §2.5). It calls Device.ReadConfig and never blocks on the guest.
	// A call may cross with Stop and arrive once more after it, to no effect.
	ConfigChanged func()
	// Failed tells the transport that the guest broke the protocol beyond
	// repair: it sets DEVICE_NEEDS_RESET (virtio 1.2 §2.1). The device has
	// stopped serving the queue concerned. It may be called from the device's
	// own goroutines and does not call Stop.
	Failed func(error)
}
