package vsock

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/wsl2/wsl2/vmm/virtio"
)

// Virtqueues (virtio 1.2 §5.10.2).
const (
	queueRX = iota
	queueTX
	queueEvent // never used: it would tell of a transport reset, after a migration
)

const (
	// queueSize: Linux fills the rx queue with 4 KiB buffers, so 128 of them hold
	// more than one connection's credit (256 KiB).
	queueSize      = 128
	eventQueueSize = 16 // Linux offers 8
)

// defaultMaxConns bounds the memory a guest can make us hold (see bufAlloc).
const defaultMaxConns = 4096

// maxPath is the longest name of a unix socket (sun_path, with its NUL).
const maxPath = 107

// Config describes a device.
type Config struct {
	// GuestCID is the guest's context ID, 3 to 0xfffffffe.
	GuestCID uint64
	// Path is the unix socket that New creates, for the owner alone (0600). The
	// caller keeps its directory private: the sockets Path_PORT are looked up there.
	Path string
	// MaxConns bounds the connections of all states together; 4096 if 0.
	MaxConns int
}

// Device is a virtio-vsock device. Close it after the transport's last Stop.
type Device struct {
	cfg Config

	mu       sync.Mutex
	listener int      // bound to cfg.Path, listening only while started; -1 if none
	session  *session // nil if not started
	closed   bool

	// nextPort is where the search for a free host port goes on. It survives
	// sessions so that ports are not reused early. Owned by the running session.
	nextPort uint32

	answerTimeout, txDelay time.Duration // the constants, but in tests
}

var _ virtio.Device = (*Device)(nil)

// New creates the device and its socket. Until the driver is up, connecting to
// the socket is refused (ECONNREFUSED).
func New(cfg Config) (*Device, error) {
	if cfg.GuestCID <= hostCID || cfg.GuestCID >= 0xffffffff {
		return nil, fmt.Errorf("vsock: guest CID %d is reserved; use 3 to %d", cfg.GuestCID, uint32(0xfffffffe))
	}
	if n, most := len(cfg.Path), maxPath-len("_4294967295"); n == 0 || n > most {
		return nil, fmt.Errorf("vsock: socket path %q has %d bytes; it must have 1 to %d", cfg.Path, n, most)
	}
	if cfg.MaxConns < 0 {
		return nil, fmt.Errorf("vsock: MaxConns is %d", cfg.MaxConns)
	}
	if cfg.MaxConns == 0 {
		cfg.MaxConns = defaultMaxConns
	}
	fd, err := bind(cfg.Path)
	if err != nil {
		return nil, err
	}
	return &Device{cfg: cfg, listener: fd, nextPort: firstHostPort, answerTimeout: answerTimeout, txDelay: txDelay}, nil
}

// bind makes a socket at path that does not listen yet.
func bind(path string) (int, error) {
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		return -1, os.NewSyscallError("socket", err)
	}
	// The mode of the unbound socket is that of the file: no moment with more.
	if err := unix.Fchmod(fd, 0o600); err != nil {
		unix.Close(fd)
		return -1, os.NewSyscallError("fchmod", err)
	}
	err = unix.Bind(fd, &unix.SockaddrUnix{Name: path})
	if errors.Is(err, unix.EADDRINUSE) && stale(path) {
		if err = os.Remove(path); err == nil {
			err = unix.Bind(fd, &unix.SockaddrUnix{Name: path})
		}
	}
	if err != nil {
		unix.Close(fd)
		return -1, fmt.Errorf("vsock: bind %s: %w", path, err)
	}
	return fd, nil
}

// stale reports whether path is a socket that a dead process left behind.
func stale(path string) bool {
	fi, err := os.Lstat(path)
	if err != nil || fi.Mode().Type() != os.ModeSocket {
		return false
	}
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		return false
	}
	defer unix.Close(fd)
	return errors.Is(unix.Connect(fd, &unix.SockaddrUnix{Name: path}), unix.ECONNREFUSED)
}

// ID implements virtio.Device.
func (d *Device) ID() virtio.ID { return virtio.IDVsock }

// Features implements virtio.Device. Without VIRTIO_VSOCK_F_SEQPACKET the
// device carries streams only (virtio 1.2 §5.10.3).
func (d *Device) Features() uint64 { return 0 }

// QueueSizes implements virtio.Device: rx, tx, event.
func (d *Device) QueueSizes() []uint16 { return []uint16{queueSize, queueSize, eventQueueSize} }

// ReadConfig implements virtio.Device: guest_cid, le64 (virtio 1.2 §5.10.4).
func (d *Device) ReadConfig(off uint32, p []byte) {
	var cfg [8]byte
	binary.LittleEndian.PutUint64(cfg[:], d.cfg.GuestCID)
	clear(p)
	if off < uint32(len(cfg)) {
		copy(p, cfg[off:])
	}
}

// WriteConfig implements virtio.Device; all is read-only.
func (d *Device) WriteConfig(uint32, []byte) {}

// Start implements virtio.Device. The event queue is optional: under vhost-user
// it stays with the front end.
func (d *Device) Start(vs virtio.Session) error {
	if len(vs.Queues) <= queueTX || vs.Queues[queueRX] == nil || vs.Queues[queueTX] == nil {
		return errors.New("vsock: the driver enabled no rx or no tx queue")
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.closed {
		return fmt.Errorf("vsock: start: %w", net.ErrClosed)
	}
	if d.session != nil {
		return errors.New("vsock: started twice")
	}
	if d.listener < 0 {
		// An earlier session's file is ours to replace.
		if err := os.Remove(d.cfg.Path); err != nil && !errors.Is(err, os.ErrNotExist) {
			return fmt.Errorf("vsock: %w", err)
		}
		fd, err := bind(d.cfg.Path)
		if err != nil {
			return err
		}
		d.listener = fd
	}
	s, err := newSession(d, vs)
	if err != nil {
		return err
	}
	if err := unix.Listen(d.listener, unix.SOMAXCONN); err != nil {
		s.release()
		return os.NewSyscallError("listen", err)
	}
	d.session = s
	go s.run()
	return nil
}

// Stop implements virtio.Device: it closes every host connection.
func (d *Device) Stop() {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.stopLocked()
}

func (d *Device) stopLocked() {
	if d.session == nil {
		return
	}
	d.session.stop()
	d.session.release()
	d.session = nil
	// Closing is the only way to refuse connections again; the next Start binds anew.
	unix.Close(d.listener)
	d.listener = -1
}

// Close stops the device for good and removes its socket.
func (d *Device) Close() error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.closed {
		return nil
	}
	d.closed = true
	d.stopLocked()
	if d.listener >= 0 {
		unix.Close(d.listener)
		d.listener = -1
	}
	if err := os.Remove(d.cfg.Path); err != nil && !errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("vsock: %w", err)
	}
	return nil
}

// Dial connects to a port of the guest. It returns once the guest accepted.
func (d *Device) Dial(ctx context.Context, port uint32) (net.Conn, error) {
	return Dial(ctx, d.cfg.Path, port)
}

// ErrRefused is wrapped by Dial's error if nobody in the guest accepts.
var ErrRefused = errors.New("connection refused by the guest")

// Dial connects to a port of the guest whose device has its socket at path. It
// returns once the guest accepted. The context bounds only Dial itself.
func Dial(ctx context.Context, path string, port uint32) (net.Conn, error) {
	var nd net.Dialer
	c, err := nd.DialContext(ctx, "unix", path)
	if err != nil {
		return nil, fmt.Errorf("vsock: connect to guest port %d: %w", port, err)
	}
	stop := context.AfterFunc(ctx, func() { c.Close() })
	err = handshake(c, port)
	if !stop() {
		c.Close()
		err = context.Cause(ctx)
	}
	if err != nil {
		c.Close()
		return nil, fmt.Errorf("vsock: connect to guest port %d through %s: %w", port, filepath.Base(path), err)
	}
	return c, nil
}

func handshake(c net.Conn, port uint32) error {
	if _, err := c.Write(appendConnect(nil, port)); err != nil {
		return fmt.Errorf("%w (%w)", ErrRefused, err)
	}
	// One byte at a time: what follows the line belongs to the caller.
	var line []byte
	var b [1]byte
	for len(line) < maxLine {
		if _, err := c.Read(b[:]); err != nil {
			return fmt.Errorf("%w (%w)", ErrRefused, err)
		}
		if b[0] != '\n' {
			line = append(line, b[0])
			continue
		}
		n, ok := strings.CutPrefix(string(line), "OK ")
		if _, err := strconv.ParseUint(n, 10, 32); !ok || err != nil {
			break
		}
		return nil
	}
	return fmt.Errorf("answer %q is not \"OK PORT\"", line)
}
