// Package serve is the server in a distro that system tests need. A test's binary becomes it
// there, so that nothing has to be built for it.
package serve

import (
	"fmt"
	"io"
	"net"
	"os"
	"strings"

	"golang.org/x/sys/unix"
)

// Main serves one port for each argument MODE,NETWORK,ADDRESS (echo,tcp4,0.0.0.0:80) until its
// standard input ends. It says "ready" when all are open.
//
//	echo   sends back what it gets, and ends when its peer has
//	reset  resets the connection when the first byte has come
//	shut   echoes; its listener is shut down before it is closed, at the end
func Main(args []string) {
	var shut []*net.TCPListener
	for _, arg := range args {
		l, err := serve(arg)
		if err != nil {
			fmt.Println(err)
			os.Exit(1)
		}
		if strings.HasPrefix(arg, "shut,") {
			shut = append(shut, l)
		}
	}
	fmt.Println("ready")
	io.Copy(io.Discard, os.Stdin)
	for _, l := range shut {
		c, err := l.SyscallConn()
		if err == nil {
			c.Control(func(fd uintptr) { unix.Shutdown(int(fd), unix.SHUT_RDWR) })
		}
	}
}

// serve returns the listener of a TCP port.
func serve(arg string) (*net.TCPListener, error) {
	words := strings.SplitN(arg, ",", 3)
	if len(words) != 3 {
		return nil, fmt.Errorf("%q is not MODE,NETWORK,ADDRESS", arg)
	}
	mode, network, address := words[0], words[1], words[2]
	if strings.HasPrefix(network, "udp") {
		c, err := net.ListenPacket(network, address)
		if err != nil {
			return nil, err
		}
		go func() {
			buf := make([]byte, 1<<16)
			for {
				n, from, err := c.ReadFrom(buf)
				if err != nil {
					return
				}
				c.WriteTo(buf[:n], from)
			}
		}()
		return nil, nil
	}
	l, err := net.Listen(network, address)
	if err != nil {
		return nil, err
	}
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			go handle(c.(*net.TCPConn), mode)
		}
	}()
	return l.(*net.TCPListener), nil
}

func handle(c *net.TCPConn, mode string) {
	defer c.Close()
	if mode == "reset" {
		io.ReadFull(c, make([]byte, 1))
		c.SetLinger(0)
		return
	}
	io.Copy(c, c)
}
