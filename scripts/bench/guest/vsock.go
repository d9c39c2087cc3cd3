package main

import (
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

const buffer = 256 << 10

// serve answers one connection after another on a vsock port, or a TCP port "tcp:PORT", for
// ever. It tells when it listens.
func serve(mode, port string) error {
	port, tcp := strings.CutPrefix(port, "tcp:")
	n, err := strconv.ParseUint(port, 10, 32)
	if err != nil {
		return err
	}
	family, address := unix.AF_VSOCK, unix.Sockaddr(&unix.SockaddrVM{CID: unix.VMADDR_CID_ANY, Port: uint32(n)})
	if tcp {
		family, address = unix.AF_INET, &unix.SockaddrInet4{Port: int(n)}
	}
	l, err := unix.Socket(family, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("socket: %w", err)
	}
	if err := unix.Bind(l, address); err != nil {
		return fmt.Errorf("bind: %w", err)
	}
	if err := unix.Listen(l, 8); err != nil {
		return fmt.Errorf("listen: %w", err)
	}
	if _, err := os.Stdout.WriteString("listening\n"); err != nil {
		return err
	}
	b := make([]byte, buffer)
	for {
		c, _, err := unix.Accept(l)
		if err != nil {
			return fmt.Errorf("accept: %w", err)
		}
		answer(mode, c, b)
		unix.Close(c)
	}
}

// answer serves one connection until it ends; that it ends is no error.
func answer(mode string, c int, b []byte) {
	if mode == "source" {
		if _, err := unix.Read(c, b[:1]); err != nil {
			return
		}
		for writeAll(c, b) == nil {
		}
		return
	}
	for {
		n, err := unix.Read(c, b)
		if err != nil {
			return
		}
		if n == 0 { // all has arrived: say so
			_ = writeAll(c, b[:1])
			return
		}
		if mode == "echo" && writeAll(c, b[:n]) != nil {
			return
		}
	}
}

func writeAll(fd int, b []byte) error {
	for len(b) > 0 {
		n, err := unix.Write(fd, b)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil {
			return err
		}
		b = b[n:]
	}
	return nil
}

func copyStdin() error {
	b := make([]byte, buffer)
	for {
		n, err := unix.Read(0, b)
		if n <= 0 || err != nil {
			return err
		}
		if err := writeAll(1, b[:n]); err != nil {
			return err
		}
	}
}
