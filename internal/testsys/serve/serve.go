// Package serve is the server in a distro that system tests need. A test's binary becomes it
// there, so that nothing has to be built for it.
package serve

import (
	"fmt"
	"io"
	"net"
	"os"
	"strings"
)

// Main serves one port for each argument MODE,NETWORK,ADDRESS (echo,tcp4,0.0.0.0:80) until its
// standard input ends. It says "ready" when all are open.
//
//	echo   sends back what it gets, and ends when its peer has
//	reset  resets the connection when the first byte has come
func Main(args []string) {
	for _, arg := range args {
		if err := serve(arg); err != nil {
			fmt.Println(err)
			os.Exit(1)
		}
	}
	fmt.Println("ready")
	io.Copy(io.Discard, os.Stdin)
}

func serve(arg string) error {
	words := strings.SplitN(arg, ",", 3)
	if len(words) != 3 {
		return fmt.Errorf("%q is not MODE,NETWORK,ADDRESS", arg)
	}
	mode, network, address := words[0], words[1], words[2]
	if strings.HasPrefix(network, "udp") {
		c, err := net.ListenPacket(network, address)
		if err != nil {
			return err
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
		return nil
	}
	l, err := net.Listen(network, address)
	if err != nil {
		return err
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
	return nil
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
