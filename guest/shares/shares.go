// Package shares mounts directories of the host in a distro, each when it is first used.
//
// A share costs a distro's start no more than a trap: a mount of the kernel's autofs,
// direct, on the share's mount point. Whoever first looks behind it is made to wait by
// the kernel, which writes to the trap's pipe; then the launcher is asked for the
// share (wire.MountShare), and what comes is mounted over the trap: a virtio-fs device, or
// v9fs on a connection. Nobody finds an empty directory, and who does not look pays nothing.
//
// The distro's init itself, the trap's daemon, is not made to wait by the kernel: it
// calls Reach before it looks at a path for somebody.
package shares

import (
	"encoding/binary"
	"errors"
	"fmt"
	"maps"
	"net"
	"os"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/wsl2/wsl2/internal/hostpath"
	"github.com/wsl2/wsl2/internal/wire"
)

// mountTimeout bounds the wait for the launcher's connection. It starts a process for it.
const mountTimeout = 30 * time.Second

// Config of a Mounter.
type Config struct {
	Shares []wire.Share
	// Ask sends the request to the launcher.
	Ask func(*wire.MountShare)
	// Owner is who owns the files of a share in the distro.
	Owner func() (uid, gid uint32, err error)
	Logf  func(format string, args ...any)
}

// Mounter owns the traps of a distro.
type Mounter struct {
	cfg   Config
	set   chan struct{} // closed when the traps are set
	traps []*trap       // immutable once set is closed

	mu      sync.Mutex
	waiting map[wire.SessionID]chan<- arrival // guarded by mu
	asked   map[wire.SessionID]*trap          // that of each trap that was asked for last; guarded by mu
}

// arrival is what the launcher answers: a device, or a connection.
type arrival struct {
	tag  string // of the device
	conn net.Conn
}

// trap is the autofs mount of one share.
type trap struct {
	share wire.Share
	pipe  *os.File // the kernel's requests; read by serve only
	root  int      // the trap's own root, for the answers

	mu      sync.Mutex     // one mounts at a time
	session wire.SessionID // of the MountShare that it was mounted for; guarded by mu
	dev     uint64         // of what is mounted; guarded by mu
}

// Start sets the traps, and tells the distro's tools of the shares (hostpath.SharesFile),
// in the time that a client takes to come with its first session: Reach waits for it.
func Start(cfg Config) *Mounter {
	m := &Mounter{cfg: cfg, set: make(chan struct{}), waiting: map[wire.SessionID]chan<- arrival{}, asked: map[wire.SessionID]*trap{}}
	if len(cfg.Shares) == 0 {
		close(m.set)
	} else {
		go m.setAll()
	}
	return m
}

// setAll logs what does not work: the distro has to start without it.
func (m *Mounter) setAll() {
	defer close(m.set)
	var table hostpath.Table
	for _, s := range m.cfg.Shares {
		table = append(table, hostpath.Share{Host: s.Host, Guest: s.Guest})
		t, err := set(s)
		if err != nil {
			m.cfg.Logf("share %s: %v", s.Guest, err)
			continue
		}
		m.traps = append(m.traps, t)
		go m.serve(t)
	}
	if err := os.WriteFile(hostpath.SharesFile, []byte(table.String()), 0o644); err != nil {
		m.cfg.Logf("%v", err)
	}
}

// Close takes the traps away: who looks behind one of them finds nothing. What is
// mounted stays, and goes with the distro's mount namespace.
func (m *Mounter) Close() {
	<-m.set
	for _, t := range m.traps {
		t.pipe.Close() // ends serve, and the kernel then answers by itself
	}
}

// set mounts a trap.
func set(s wire.Share) (*trap, error) {
	var fds [2]int
	if err := unix.Pipe2(fds[:], unix.O_CLOEXEC); err != nil {
		return nil, fmt.Errorf("make a pipe: %w", err)
	}
	defer unix.Close(fds[1]) // the kernel has its own
	options := fmt.Sprintf("fd=%d,minproto=5,maxproto=5,direct", fds[1])
	err := unix.Mount("wsl2", s.Guest, "autofs", 0, options)
	if err == unix.ENOENT {
		if err = os.MkdirAll(s.Guest, 0o755); err == nil {
			err = unix.Mount("wsl2", s.Guest, "autofs", 0, options)
		}
	}
	if err != nil {
		unix.Close(fds[0])
		return nil, fmt.Errorf("mount autofs: %w", err)
	}
	root, err := unix.Open(s.Guest, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		unix.Close(fds[0])
		unix.Unmount(s.Guest, unix.MNT_DETACH)
		return nil, fmt.Errorf("open it: %w", err)
	}
	unix.SetNonblock(fds[0], true) //nolint:errcheck // it cannot fail on a pipe
	return &trap{share: s, pipe: os.NewFile(uintptr(fds[0]), "autofs"), root: root}, nil
}

// What the kernel writes, and how it is answered (include/uapi/linux/auto_fs.h):
// struct autofs_v5_packet, in one write each.
const (
	packetSize    = 304
	packetType    = 4
	packetToken   = 8
	missingDirect = 5 // autofs_ptype_missing_direct

	iocReady = 0x9360 // AUTOFS_IOC_READY
	iocFail  = 0x9361 // AUTOFS_IOC_FAIL
)

// serve answers the kernel until the trap's pipe is closed.
func (m *Mounter) serve(t *trap) {
	defer unix.Close(t.root)
	packet := make([]byte, packetSize)
	for {
		n, err := t.pipe.Read(packet)
		if err != nil {
			if !errors.Is(err, os.ErrClosed) {
				m.cfg.Logf("share %s: %v", t.share.Guest, err)
			}
			return
		}
		if n < packetToken+4 || binary.NativeEndian.Uint32(packet[packetType:]) != missingDirect {
			continue // expiry is never asked for
		}
		answer := uint(iocReady)
		if err := m.mount(t); err != nil {
			m.cfg.Logf("share %s: %v", t.share.Guest, err)
			answer = iocFail
		}
		token := int(binary.NativeEndian.Uint32(packet[packetToken:]))
		if err := unix.IoctlSetInt(t.root, answer, token); err != nil {
			m.cfg.Logf("share %s: answer autofs: %v", t.share.Guest, err)
		}
	}
}

// Reach mounts the share that path lies in, if it lies in one and is not mounted. When
// it returns the traps are set.
func (m *Mounter) Reach(path string) {
	<-m.set
	for _, t := range m.traps {
		if rest, ok := strings.CutPrefix(path, t.share.Guest); ok && (rest == "" || rest[0] == '/') {
			if err := m.mount(t); err != nil {
				m.cfg.Logf("share %s: %v", t.share.Guest, err)
			}
		}
	}
}

// mount makes sure that the share is mounted.
func (m *Mounter) mount(t *trap) error {
	t.mu.Lock()
	defer t.mu.Unlock()
	var st unix.Statfs_t
	switch err := unix.Statfs(t.share.Guest, &st); {
	case err == unix.EIO, err == unix.ENOTCONN: // its server has ended: it would stay so
		unix.Unmount(t.share.Guest, unix.MNT_DETACH) //nolint:errcheck // the mount below tells
	case err != nil:
		return err
	case st.Type != unix.AUTOFS_SUPER_MAGIC:
		return nil
	}
	uid, gid, err := m.cfg.Owner()
	if err != nil {
		return err
	}
	ask := &wire.MountShare{Guest: t.share.Guest, UID: uid, GID: gid, Stream: !hasVirtioFS()}
	came, err := m.ask(t, ask)
	if err == nil && came.tag != "" {
		if err = attach("virtiofs", came.tag, nil, t.share.Guest, t.share.ReadOnly); err == nil {
			if err = t.mounted(ask.Session); err == nil {
				readAhead(t.dev)
			}
			return err
		}
		m.cfg.Logf("share %s: mount %s as virtiofs: %v; it will be 9P", t.share.Guest, came.tag, err)
		ask = &wire.MountShare{Guest: t.share.Guest, UID: uid, GID: gid, Stream: true}
		came, err = m.ask(t, ask)
	}
	if err != nil {
		return err
	}
	if came.conn == nil {
		return fmt.Errorf("the host could not open %s; the service's log there says why", t.share.Host)
	}
	defer came.conn.Close() // the mount has a descriptor of its own
	fd, err := descriptor(came.conn)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	// access=user: the guest's kernel checks users by owner and mode, and tells them apart, which package
	// replay needs. cache=none: what the host changes is seen, and appending is the server's work. With
	// cache=mmap v9fs keeps O_APPEND to itself, and writers lose what others append meanwhile; the
	// price is that shared mappings cannot be written. locktimeout: how often v9fs asks for a lock that a program of the host holds.
	options := strings.Split(fmt.Sprintf("trans=fd,rfdno=%d,wfdno=%d,version=9p2000.L,msize=%d,access=user,cache=none,locktimeout=1,dfltuid=%d,dfltgid=%d",
		fd, fd, msize, uid, gid), ",")
	if err := attach("9p", "wsl2", options, t.share.Guest, t.share.ReadOnly); err != nil {
		return fmt.Errorf("mount %s: %w", t.share.Host, err)
	}
	return t.mounted(ask.Session)
}

// attach mounts a file system. The mount is read-only, not the file system: changes of the host's are replayed
// in it. It is so from the first on: a later remount would not reach the namespaces that this one propagates to.
func attach(kind, source string, options []string, target string, readOnly bool) error {
	fs, err := unix.Fsopen(kind, unix.FSOPEN_CLOEXEC)
	if err != nil {
		return fmt.Errorf("fsopen %s: %w", kind, err)
	}
	defer unix.Close(fs)
	for _, option := range append([]string{"source=" + source}, options...) {
		key, value, _ := strings.Cut(option, "=")
		if err := unix.FsconfigSetString(fs, key, value); err != nil {
			return fmt.Errorf("option %s: %w", option, err)
		}
	}
	if err := unix.FsconfigCreate(fs); err != nil {
		return fmt.Errorf("fsconfig create: %w", err)
	}
	attributes := unix.MOUNT_ATTR_NOSUID | unix.MOUNT_ATTR_NODEV
	if readOnly {
		attributes |= unix.MOUNT_ATTR_RDONLY
	}
	mount, err := unix.Fsmount(fs, unix.FSMOUNT_CLOEXEC, attributes)
	if err != nil {
		return fmt.Errorf("fsmount: %w", err)
	}
	defer unix.Close(mount)
	if err := unix.MoveMount(mount, "", unix.AT_FDCWD, target, unix.MOVE_MOUNT_F_EMPTY_PATH|unix.MOVE_MOUNT_T_SYMLINKS); err != nil {
		return fmt.Errorf("move_mount to %s: %w", target, err)
	}
	return nil
}

// readAhead has the kernel read 512 KiB ahead of who reads a file of the device from its start to its end, instead of 128:
// a request costs more than what it brings. Where it cannot be set, /sys being the distro's, reading is slower.
func readAhead(dev uint64) {
	os.WriteFile(fmt.Sprintf("/sys/class/bdi/%d:%d/read_ahead_kb", unix.Major(dev), unix.Minor(dev)), []byte("512"), 0) //nolint:errcheck // see above
}

// mounted ends a mount. Preconditions: mu is held.
func (t *trap) mounted(session wire.SessionID) error {
	var st unix.Stat_t
	if err := unix.Stat(t.share.Guest, &st); err != nil {
		return fmt.Errorf("stat %s: %w", t.share.Guest, err)
	}
	t.session, t.dev = session, st.Dev
	return nil
}

// msize is the largest frame that v9fs' trans=fd can have.
const msize = 1 << 20

func descriptor(c net.Conn) (fd int, err error) {
	raw, ok := c.(syscall.Conn)
	if !ok {
		return -1, fmt.Errorf("a connection of type %T has no descriptor", c)
	}
	rc, err := raw.SyscallConn()
	if err != nil {
		return -1, err
	}
	cerr := rc.Control(func(n uintptr) { fd, err = unix.FcntlInt(n, unix.F_DUPFD_CLOEXEC, 0) })
	return fd, errors.Join(cerr, err)
}

// hasVirtioFS tells whether the kernel has it: one of the user's may not.
func hasVirtioFS() bool {
	list, err := os.ReadFile("/proc/filesystems")
	return err == nil && strings.Contains(string(list), "\tvirtiofs\n")
}

// ask asks for the share of a trap and waits for it.
func (m *Mounter) ask(t *trap, ask *wire.MountShare) (arrival, error) {
	// Not crypto/rand: its self-tests would cost every start of /init.
	if _, err := unix.Getrandom(ask.Session[:], 0); err != nil {
		return arrival{}, err
	}
	came := make(chan arrival, 1)
	m.mu.Lock()
	m.waiting[ask.Session] = came
	maps.DeleteFunc(m.asked, func(_ wire.SessionID, other *trap) bool { return other == t })
	m.asked[ask.Session] = t
	m.mu.Unlock()
	m.cfg.Ask(ask)
	timer := time.NewTimer(mountTimeout)
	defer timer.Stop()
	select {
	case c := <-came:
		return c, nil
	case <-timer.C:
	}
	m.mu.Lock()
	delete(m.waiting, ask.Session)
	m.mu.Unlock()
	select {
	case c := <-came: // at the last moment
		return c, nil
	default:
		return arrival{}, fmt.Errorf("the host has not opened it within %v; the service's log there says why", mountTimeout)
	}
}

// Deliver hands over the connection of a MountShare; false if nobody waits for it.
func (m *Mounter) Deliver(c net.Conn, id wire.SessionID) bool {
	return m.deliver(arrival{conn: c}, id)
}

// DeliverDevice is Deliver for a virtio-fs device.
func (m *Mounter) DeliverDevice(tag string, id wire.SessionID) bool {
	return m.deliver(arrival{tag: tag}, id)
}

func (m *Mounter) deliver(a arrival, id wire.SessionID) bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	came := m.waiting[id]
	if came == nil {
		return false
	}
	delete(m.waiting, id)
	came <- a // has room for one
	return true
}
