package sshproxy

import (
	"io"
	"net"
	"os"

	"github.com/pkg/sftp"
)

// SFTP serves the SFTP protocol on the standard streams, inside the distro.
func SFTP() error {
	s, err := sftp.NewServer(struct {
		io.Reader
		io.WriteCloser
	}{os.Stdin, os.Stdout})
	if err != nil {
		return err
	}
	if err := s.Serve(); err != io.EOF {
		return err
	}
	return nil
}

// DialPort connects, inside the distro, to a port, says so with one byte, and
// carries the standard streams.
func DialPort(host, port string) error {
	c, err := net.Dial("tcp", net.JoinHostPort(host, port))
	if err != nil {
		return err
	}
	defer c.Close()
	if _, err := os.Stdout.Write([]byte{'+'}); err != nil {
		return err
	}
	go func() {
		io.Copy(c, os.Stdin)
		c.(*net.TCPConn).CloseWrite()
	}()
	_, err = io.Copy(os.Stdout, c)
	return err
}
