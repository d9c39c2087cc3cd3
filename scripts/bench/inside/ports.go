package main

import (
	"encoding/json"
	"fmt"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// forwarded is our VM, reached by TCP: servers in the distro at the host's localhost.
func (h *host) forwarded(r *running) *running {
	f := *r
	f.scheme = "tcp:"
	f.dial = func(port uint32) (socket, error) {
		if err := h.awaitPort(port); err != nil {
			return -1, err
		}
		return dialLocalhost(port)
	}
	return &f
}

func dialLocalhost(port uint32) (socket, error) {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return -1, err
	}
	if err = setTimeouts(fd); err == nil {
		err = unix.Connect(fd, &unix.SockaddrInet4{Port: int(port), Addr: [4]byte{127, 0, 0, 1}})
	}
	if err != nil {
		unix.Close(fd)
		return -1, fmt.Errorf("connect to port %d of localhost: %w", port, err)
	}
	return socket(fd), nil
}

// awaitPort returns when the host listens for a port of the distro.
func (h *host) awaitPort(port uint32) error {
	c := h.wsl2("ports", "--follow", "--json")
	out, err := c.StdoutPipe()
	if err != nil {
		return err
	}
	if err := c.Start(); err != nil {
		return err
	}
	watchdog := time.AfterFunc(hangs, func() { c.Process.Kill() })
	defer func() {
		watchdog.Stop()
		c.Process.Kill()
		c.Wait()
	}()
	for lists := json.NewDecoder(out); ; {
		var list struct{ Ports []struct{ Host []string } }
		if err := lists.Decode(&list); err != nil {
			return fmt.Errorf("port %d does not appear on localhost: %w", port, err)
		}
		for _, p := range list.Ports {
			if strings.HasSuffix(strings.Join(p.Host, " "), fmt.Sprint(":", port)) {
				return nil
			}
		}
	}
}
