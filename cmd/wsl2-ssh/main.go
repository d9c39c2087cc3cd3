// Command wsl2-ssh is the SSH server of `wsl2 ssh-proxy`. It is an executable of
// its own so that no other command pays for the start-up of its cryptography.
package main

import (
	"errors"
	"fmt"
	"net"
	"os"
	"time"

	"github.com/wsl2/wsl2/launcher/sshproxy"
)

func main() {
	if err := run(os.Args[1:]); err != nil {
		fmt.Fprintf(os.Stderr, "wsl2-ssh: %v\n", err)
		os.Exit(125)
	}
}

// run has the forms that others call: `wsl2 ssh-proxy` the first, and the first
// one the others, inside the distro.
func run(args []string) error {
	switch {
	case len(args) == 4 && args[0] == "serve": // WSL2 KEY DISTRO
		key, err := sshproxy.HostKey(args[2])
		if err != nil {
			return err
		}
		self, err := os.Executable()
		if err != nil {
			return err
		}
		return sshproxy.Serve(stdio{}, sshproxy.Config{Wsl2: args[1], Self: self, Distro: args[3], HostKey: key,
			Logf: func(format string, a ...any) { fmt.Fprintf(os.Stderr, "wsl2-ssh: "+format+"\n", a...) }})
	case len(args) == 1 && args[0] == "sftp-server":
		return sshproxy.SFTP()
	case len(args) == 3 && args[0] == "dial":
		return sshproxy.DialPort(args[1], args[2])
	}
	return errors.New("this is a part of `wsl2 ssh-proxy`; see `wsl2 ssh-config`")
}

// stdio is the standard streams as a connection.
type stdio struct{}

func (stdio) Read(p []byte) (int, error)       { return os.Stdin.Read(p) }
func (stdio) Write(p []byte) (int, error)      { return os.Stdout.Write(p) }
func (stdio) Close() error                     { return errors.Join(os.Stdin.Close(), os.Stdout.Close()) }
func (stdio) LocalAddr() net.Addr              { return &net.UnixAddr{Name: "stdin", Net: "unix"} }
func (stdio) RemoteAddr() net.Addr             { return &net.UnixAddr{Name: "stdout", Net: "unix"} }
func (stdio) SetDeadline(time.Time) error      { return nil }
func (stdio) SetReadDeadline(time.Time) error  { return nil }
func (stdio) SetWriteDeadline(time.Time) error { return nil }
