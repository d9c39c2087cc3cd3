package vhostuser

import (
	"encoding/binary"
	"fmt"
	"os"
	"sync"

	"golang.org/x/sys/unix"

	"github.com/wsl2/wsl2/vmm/eventfd"
	"github.com/wsl2/wsl2/vmm/guestmem"
	"github.com/wsl2/wsl2/vmm/virtio"
)

// enableState is what SET_VRING_ENABLE last said of a ring.
type enableState uint8

const (
	enableUnsaid enableState = iota
	enableYes
	enableNo
)

// ring is one virtqueue as the front end configures it, piece by piece. It is
// owned by Serve's goroutine; of its parts only the doorbells are touched by
// the device's.
type ring struct {
	num    uint16
	addr   vringAddr
	placed bool // addr is set
	base   uint16
	kick   *eventfd.EventFD // nil: stopped
	enable enableState
	call   doorbell
	err    doorbell

	queue *virtio.Queue // while the device serves it
}

// ready: everything is said that the ring needs, except whether it is enabled.
func (r *ring) ready() bool { return r.kick != nil && r.num != 0 && r.placed }

// newQueue builds the virtqueue where the front end put it.
func (r *ring) newQueue(t *memTable, features uint64) (*virtio.Queue, error) {
	var at [3]guestmem.Addr
	for i, user := range []uint64{r.addr.desc, r.addr.avail, r.addr.used} {
		a, err := t.translate(user)
		if err != nil {
			return nil, err
		}
		at[i] = a
	}
	// The first word of the used ring: flags | idx<<16.
	used, err := t.memory.Uint32(at[2])
	if err != nil {
		return nil, err
	}
	return virtio.NewQueue(virtio.QueueConfig{
		Memory: t.memory, Size: r.num,
		Desc: at[0], Driver: at[1], Device: at[2],
		Features:  features,
		NextAvail: r.base, NextUsed: uint16(used.Load() >> 16),
		Kick: r.kick, Interrupt: r.call.ring,
	})
}

// stop forgets the kick, which is what makes a ring stopped. The device has
// let go of the ring before.
func (r *ring) stop() {
	if r.kick != nil {
		r.kick.Close()
		r.kick = nil
	}
}

func (r *ring) close() {
	r.stop()
	r.call.close()
	r.err.close()
}

// doorbell is an eventfd of the front end's that this side signals. The front
// end may exchange it while the device runs. It is safe for concurrent use.
type doorbell struct {
	mu  sync.Mutex
	set bool
	fd  int
}

// ring signals the eventfd, if there is one. It does not block: an eventfd whose
// count is at its limit is signalled already.
func (d *doorbell) ring() {
	var one [8]byte
	binary.NativeEndian.PutUint64(one[:], 1)
	d.mu.Lock()
	if d.set {
		_, _ = unix.Write(d.fd, one[:])
	}
	d.mu.Unlock()
}

// replace takes ownership of fd, an eventfd.
func (d *doorbell) replace(fd int) error {
	if err := checkEventFD(fd); err != nil {
		unix.Close(fd)
		return err
	}
	if err := unix.SetNonblock(fd, true); err != nil {
		unix.Close(fd)
		return os.NewSyscallError("fcntl", err)
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.set {
		unix.Close(d.fd)
	}
	d.fd, d.set = fd, true
	return nil
}

func (d *doorbell) close() {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.set {
		unix.Close(d.fd)
		d.set = false
	}
}

// checkEventFD refuses whatever could block or block for ever where an eventfd
// is expected (a file on a hung file system, say): an eventfd lives on the
// anonymous inode, the only kind of file without a type.
func checkEventFD(fd int) error {
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return os.NewSyscallError("fstat", err)
	}
	if st.Mode&unix.S_IFMT != 0 {
		return fmt.Errorf("%w: a doorbell is not an eventfd", ErrProtocol)
	}
	return nil
}
