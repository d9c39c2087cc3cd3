package listeners

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// This file asks the kernel for the sockets that there are (sock_diag(7)).

// socket is one that waits for others.
type socket struct {
	Listener
	cookie uint64
}

// Attributes and sizes of sock_diag's messages (linux/inet_diag.h).
const (
	attrV6Only   = 11 // INET_DIAG_SKV6ONLY
	attrCgroupID = 21 // INET_DIAG_CGROUP_ID
	requestSize  = 56 // struct inet_diag_req_v2
	messageSize  = 72 // struct inet_diag_msg
)

const stateClose = 7 // TCP_CLOSE; of a UDP socket: it is not connected

// dumpTimeout bounds the kernel's answer, which it makes while we read it.
const dumpTimeout = 10 * time.Second

// dump returns the sockets that processes serve TCP and UDP on, of the calling thread's network namespace.
func dump(ephemeral portRange) ([]socket, error) {
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.NETLINK_SOCK_DIAG)
	if err != nil {
		return nil, fmt.Errorf("ask for sockets: %w", err)
	}
	defer unix.Close(fd)
	timeout := unix.NsecToTimeval(dumpTimeout.Nanoseconds())
	if err := unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &timeout); err != nil {
		return nil, os.NewSyscallError("setsockopt(SO_RCVTIMEO)", err)
	}
	var all []socket
	for _, family := range []uint8{unix.AF_INET, unix.AF_INET6} {
		for protocol, state := range map[uint8]uint32{unix.IPPROTO_TCP: stateListen, unix.IPPROTO_UDP: stateClose} {
			list, err := dumpOne(fd, family, protocol, state)
			if errors.Is(err, unix.ENOENT) { // the kernel has no such sockets
				continue
			}
			if err != nil {
				return nil, fmt.Errorf("ask for sockets: %w", err)
			}
			for _, s := range list {
				if s.UDP && ephemeral.contains(s.Port) {
					continue
				}
				all = append(all, s)
			}
		}
	}
	return all, nil
}

func dumpOne(fd int, family, protocol uint8, state uint32) ([]socket, error) {
	const size = unix.NLMSG_HDRLEN + requestSize
	b := make([]byte, size)
	binary.NativeEndian.PutUint32(b, size)
	binary.NativeEndian.PutUint16(b[4:], unix.SOCK_DIAG_BY_FAMILY)
	binary.NativeEndian.PutUint16(b[6:], unix.NLM_F_REQUEST|unix.NLM_F_DUMP)
	req := b[unix.NLMSG_HDRLEN:]
	req[0], req[1] = family, protocol
	binary.NativeEndian.PutUint32(req[4:], 1<<state)
	if err := unix.Sendto(fd, b, 0, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}); err != nil {
		return nil, err
	}
	var list []socket
	buf := make([]byte, 32<<10)
	for {
		n, _, err := unix.Recvfrom(fd, buf, 0)
		if err == unix.EINTR {
			continue
		}
		if err != nil {
			return nil, err
		}
		messages, err := syscall.ParseNetlinkMessage(buf[:n])
		if err != nil {
			return nil, err
		}
		for _, m := range messages {
			switch m.Header.Type {
			case unix.NLMSG_DONE:
				return list, nil
			case unix.NLMSG_ERROR:
				if len(m.Data) < 4 {
					return nil, unix.EBADMSG
				}
				return nil, unix.Errno(-int32(binary.NativeEndian.Uint32(m.Data)))
			case unix.SOCK_DIAG_BY_FAMILY:
				if s, ok := parse(m.Data, protocol); ok {
					list = append(list, s)
				}
			}
		}
	}
}

// parse reads a struct inet_diag_msg and its attributes. ok is false for a socket that
// loopback does not lead to.
func parse(b []byte, protocol uint8) (s socket, ok bool) {
	if len(b) < messageSize {
		return s, false
	}
	s.UDP = protocol == unix.IPPROTO_UDP
	s.Port = binary.BigEndian.Uint16(b[4:])
	address := b[8:24]
	s.cookie = uint64(binary.NativeEndian.Uint32(b[44:])) | uint64(binary.NativeEndian.Uint32(b[48:]))<<32
	v6only := false
	for attrs := b[messageSize:]; len(attrs) >= 4; {
		n := int(binary.NativeEndian.Uint16(attrs))
		if n < 4 || n > len(attrs) {
			break
		}
		value := attrs[4:n]
		switch binary.NativeEndian.Uint16(attrs[2:]) {
		case attrV6Only:
			v6only = len(value) > 0 && value[0] != 0
		case attrCgroupID:
			if len(value) == 8 {
				s.Cgroup = binary.NativeEndian.Uint64(value)
			}
		}
		attrs = attrs[min((n+3)&^3, len(attrs)):]
	}
	switch b[0] {
	case unix.AF_INET:
		a := [4]byte(address)
		s.V4 = a == [4]byte{} || a == [4]byte{127, 0, 0, 1}
	case unix.AF_INET6:
		switch a := [16]byte(address); a {
		case [16]byte{}:
			s.V6, s.V4 = true, !v6only
		case [16]byte{15: 1}:
			s.V6 = true
		case [16]byte{10: 0xff, 11: 0xff, 12: 127, 15: 1}: // a mapped 127.0.0.1
			s.V4 = true
		}
	}
	return s, s.Port != 0 && (s.V4 || s.V6)
}
