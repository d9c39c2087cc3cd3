package virtio_test

import (
	"testing"

	"golang.org/x/sys/unix"

	"github.com/wsl2/wsl2/vmm/virtio"
	"github.com/wsl2/wsl2/vmm/virtio/virtiotest"
)

// idle is a device that leaves its queue to the test.
type idle struct{}

func (idle) ID() virtio.ID              { return virtio.IDEntropy }
func (idle) Features() uint64           { return 0 }
func (idle) QueueSizes() []uint16       { return []uint16{8} }
func (idle) ReadConfig(uint32, []byte)  {}
func (idle) WriteConfig(uint32, []byte) {}
func (idle) Start(virtio.Session) error { return nil }
func (idle) Stop()                      {}

// kicked reports whether the eventfd was signalled since the last call.
func kicked(t *testing.T, fd int) bool {
	t.Helper()
	var b [8]byte
	_, err := unix.Read(fd, b[:])
	if err != nil && err != unix.EAGAIN {
		t.Fatal(err)
	}
	return err == nil
}

func TestArm(t *testing.T) {
	for name, features := range map[string]uint64{
		"event index": virtio.RingFeatures,
		"flags":       virtio.RingFeatures &^ virtio.FeatureEventIdx,
	} {
		t.Run(name, func(t *testing.T) {
			g := virtiotest.Start(t, idle{}, virtiotest.Options{Features: features})
			r := g.Ring(0)
			q := r.Queue
			if q.Arm() {
				t.Fatal("Arm of an empty queue reports a chain")
			}
			kicked(t, q.KickFD())
			r.Send(t, nil, 16)
			if !kicked(t, q.KickFD()) {
				t.Fatal("no kick although the queue was armed")
			}
			q.Disarm()
			r.Send(t, nil, 16)
			if kicked(t, q.KickFD()) {
				t.Fatal("a kick although the queue was disarmed")
			}
			if !q.Arm() {
				t.Fatal("Arm does not see the chains")
			}
			var c virtio.Chain
			for range 2 {
				if ok, err := q.Pop(&c); !ok || err != nil {
					t.Fatalf("Pop: %v, %v", ok, err)
				}
				q.Push(c.Head, 0)
			}
			if q.Arm() {
				t.Fatal("Arm of a drained queue reports a chain")
			}
			// A driver error must not let the device sleep for ever.
			r.SetAvailIdx(1000)
			if !q.Arm() {
				t.Fatal("Arm hides a broken index")
			}
			if _, err := q.Pop(&c); err == nil {
				t.Fatal("Pop accepted a broken index")
			}
			if !q.Arm() {
				t.Fatal("Arm of a broken queue reports nothing to do")
			}
		})
	}
}
