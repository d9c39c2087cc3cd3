package vmm

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"time"

	"github.com/wsl2/wsl2/vmm/virtio/fs"
)

// FS is a file system device that was given out.
type FS struct {
	// Tag is what the guest mounts: mount -t virtiofs TAG.
	Tag string
	// Device is what the guest has to register first (Config.LateSlots), as
	// virtio_mmio.device= takes it; empty if it knows the device.
	Device string
	// Socket is where the server connects (fs.Dial, fs.Serve), once, within serverWait.
	Socket string
}

// serverWait is how long a device is kept for a server that was to come.
const serverWait = 30 * time.Second

// ErrNoFS says that all file system devices are in use.
var ErrNoFS = errors.New("no file system device is free")

// fsSlot is one file system device.
type fsSlot struct {
	dev   *fs.Device
	place int  // among all devices
	wait  bool // for its server; guarded by Machine.mu
}

func newFSSlots(devices []*fs.Device, first int) (list []*fsSlot) {
	for i, d := range devices {
		list = append(list, &fsSlot{dev: d, place: first + i})
	}
	return list
}

// AttachFS gives out a file system device. It is free again when the guest has unmounted
// the file system, or its server has gone and the guest has not mounted it.
func (m *Machine) AttachFS(ctx context.Context) (FS, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.state != stateRunning {
		return FS{}, ErrNotRunning
	}
	for i, s := range m.fs {
		if s.wait || !s.dev.Free() {
			continue
		}
		path := fmt.Sprintf("%s_fs%d", m.cfg.VsockPath, i)
		os.Remove(path) // left by a VM that was killed
		l, err := net.ListenUnix("unixpacket", &net.UnixAddr{Name: path, Net: "unixpacket"})
		if err != nil {
			return FS{}, fmt.Errorf("vmm: %w", err)
		}
		s.wait = true
		go m.awaitServer(s, l)
		return FS{Tag: s.dev.Tag(), Device: m.engine.Place(s.place), Socket: path}, nil
	}
	return FS{}, fmt.Errorf("vmm: %w", ErrNoFS)
}

// awaitServer takes the one connection of a device's server. It ends with serverWait at the latest.
func (m *Machine) awaitServer(s *fsSlot, l *net.UnixListener) {
	stop := make(chan struct{})
	go func() { // the machine's end is sooner
		select {
		case <-m.done:
			l.Close()
		case <-stop:
		}
	}()
	l.SetDeadline(time.Now().Add(serverWait)) //nolint:errcheck // it cannot fail on a listener
	conn, err := l.AcceptUnix()
	close(stop)
	l.Close()
	m.mu.Lock()
	defer m.mu.Unlock()
	s.wait = false
	if err == nil && (m.state != stateRunning || s.dev.Attach(conn) != nil) {
		conn.Close()
	}
}
