package fs

import (
	"errors"
	"fmt"
	"net"
	"os"
	"sync"

	"golang.org/x/sys/unix"
)

const (
	// inlineSize is the largest message in a packet, and the most room for an answer in one.
	inlineSize = 8 << 10
	// slots is how many larger ones can be in flight. Each is room for a request, and behind it for its answer; the
	// first that is free is taken, so that the memory of most is never touched.
	slots      = 16
	slotSize   = 2 * MaxMessage
	memorySize = slots * slotSize
)

// Conn is one end of the connection between a device and its server. Reads and writes keep their threads, which
// the kernel wakes as soon as there is something: the runtime's poller would have to be woken first.
type Conn struct {
	f *os.File

	mu     sync.RWMutex // held shared by those who use memory
	memory []byte       // of both ends; nil without it
}

// Dial connects a server to a device's socket.
func Dial(path string) (*Conn, error) {
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, os.NewSyscallError("socket", err)
	}
	if err := unix.Connect(fd, &unix.SockaddrUnix{Name: path}); err != nil {
		unix.Close(fd)
		return nil, &os.PathError{Op: "connect", Path: path, Err: err}
	}
	return newConn(fd), nil
}

func newConn(fd int) *Conn { return &Conn{f: os.NewFile(uintptr(fd), "file system device")} }

// blocking takes a connection off the runtime's poller.
func blocking(c *net.UnixConn) (*Conn, error) {
	defer c.Close()
	raw, err := c.SyscallConn()
	if err != nil {
		return nil, err
	}
	fd := -1
	cerr := raw.Control(func(own uintptr) {
		if fd, err = unix.FcntlInt(own, unix.F_DUPFD_CLOEXEC, 0); err == nil {
			err = unix.SetNonblock(fd, false)
		}
	})
	if err := errors.Join(cerr, err); err != nil {
		if fd >= 0 {
			unix.Close(fd)
		}
		return nil, err
	}
	return newConn(fd), nil
}

// read reads a packet, io.EOF at the end.
func (c *Conn) read(b []byte) (int, error) { return c.f.Read(b) }

// write sends a packet.
func (c *Conn) write(b []byte) error {
	_, err := c.f.Write(b)
	return err
}

// Close ends the connection, and what waits at either end. It may be called more than once.
func (c *Conn) Close() error {
	if raw, err := c.f.SyscallConn(); err == nil {
		raw.Control(func(fd uintptr) { unix.Shutdown(int(fd), unix.SHUT_RDWR) }) //nolint:errcheck // it may have ended
	}
	return c.f.Close()
}

// share makes the memory and gives it to the server: the device's first packet.
func (c *Conn) share() error {
	fd, err := unix.MemfdCreate("wsl2-fs", unix.MFD_CLOEXEC|unix.MFD_ALLOW_SEALING)
	if err != nil {
		return os.NewSyscallError("memfd_create", err)
	}
	defer unix.Close(fd)
	if err := unix.Ftruncate(fd, memorySize); err != nil {
		return os.NewSyscallError("ftruncate", err)
	}
	// Neither end can make the other one fault.
	if _, err := unix.FcntlInt(uintptr(fd), unix.F_ADD_SEALS, unix.F_SEAL_SHRINK|unix.F_SEAL_GROW|unix.F_SEAL_SEAL); err != nil {
		return os.NewSyscallError("fcntl", err)
	}
	if err := c.mapMemory(fd); err != nil {
		return err
	}
	return c.control(func(own int) error {
		return unix.Sendmsg(own, []byte{attached}, unix.UnixRights(fd), nil, unix.MSG_NOSIGNAL|unix.MSG_DONTWAIT)
	})
}

// accept is the server's side of share.
func (c *Conn) accept() error {
	b, oob := make([]byte, 2), make([]byte, unix.CmsgSpace(4))
	var n, oobn int
	err := c.control(func(own int) (err error) {
		for err = unix.EINTR; err == unix.EINTR; {
			n, oobn, _, _, err = unix.Recvmsg(own, b, oob, unix.MSG_CMSG_CLOEXEC)
		}
		return err
	})
	if err != nil {
		return err
	}
	if n != 1 || b[0] != attached {
		return fmt.Errorf("it says %x", b[:n])
	}
	messages, err := unix.ParseSocketControlMessage(oob[:oobn])
	if err != nil || len(messages) != 1 {
		return fmt.Errorf("%d messages with its memory, %v", len(messages), err)
	}
	fds, err := unix.ParseUnixRights(&messages[0])
	if err != nil || len(fds) != 1 {
		return fmt.Errorf("%d descriptors for its memory, %v", len(fds), err)
	}
	defer unix.Close(fds[0])
	var st unix.Stat_t
	if err := unix.Fstat(fds[0], &st); err != nil || st.Size != memorySize {
		return fmt.Errorf("its memory has %d bytes, %v", st.Size, err)
	}
	const fixed = unix.F_SEAL_SHRINK | unix.F_SEAL_GROW
	if seals, err := unix.FcntlInt(uintptr(fds[0]), unix.F_GET_SEALS, 0); err != nil || seals&fixed != fixed {
		return fmt.Errorf("its memory may change its size: seals %#x, %v", seals, err)
	}
	return c.mapMemory(fds[0])
}

// control calls what with the descriptor, which stays open meanwhile.
func (c *Conn) control(what func(fd int) error) error {
	raw, err := c.f.SyscallConn()
	if err != nil {
		return err
	}
	cerr := raw.Control(func(fd uintptr) { err = what(int(fd)) })
	return errors.Join(cerr, err)
}

func (c *Conn) mapMemory(fd int) (err error) {
	c.memory, err = unix.Mmap(fd, 0, memorySize, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	return os.NewSyscallError("mmap", err)
}

// unmap waits for those who use the memory.
func (c *Conn) unmap() {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.memory != nil {
		unix.Munmap(c.memory) //nolint:errcheck // it is mapped
		c.memory = nil
	}
}

// request and answer are the places in a slot. Preconditions: there is memory, and the sizes are MaxMessage at most.
func (c *Conn) request(slot, n int) []byte { return c.memory[slot*slotSize:][:n] }
func (c *Conn) answer(slot, n int) []byte  { return c.memory[slot*slotSize+MaxMessage:][:n] }
