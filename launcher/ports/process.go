package ports

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/signal"
	"time"

	"golang.org/x/sys/unix"

	"github.com/wsl2/wsl2/launcher/internal/spawn"
)

// FDControl is the descriptor of the socket to the service.
const FDControl = 3

// Role is the verb of the process.
const Role = "port-forwarder"

// request is what the service says: all that is to be; the answer is a list of Bound. Both
// are values of JSON, one after the other.
type request struct {
	VsockPath  string
	Privileged bool
	Forwards   []Forward
}

// Main is the process: it forwards what the service says until that ends.
func Main() error {
	signal.Ignore(unix.SIGHUP, unix.SIGINT) // ^C in the terminal whose command started the service
	conn, err := net.FileConn(os.NewFile(FDControl, "control"))
	if err != nil {
		return fmt.Errorf("`wsl2 %s` is run by the service of wsl2, not by hand (%w)", Role, err)
	}
	in, out := json.NewDecoder(conn), json.NewEncoder(conn)
	var f *Forwarder
	for {
		var r request
		if err := in.Decode(&r); err != nil {
			if errors.Is(err, io.EOF) {
				return nil // connections end with the process
			}
			return err
		}
		if f == nil {
			f = NewForwarder(r.VsockPath)
		}
		if err := out.Encode(f.Apply(r.Forwards, r.Privileged)); err != nil {
			return err
		}
	}
}

// applyTimeout bounds the process's answer: it has nothing to wait for.
const applyTimeout = time.Minute

// Process is the service's side of it.
type Process struct {
	vsockPath string
	conn      net.Conn
	in        *json.Decoder
	out       *json.Encoder
	p         *spawn.Process
}

// Start starts the process for the VM with this vsock socket. It needs Close. What it has to
// say goes to our stderr, the service's log.
func Start(vsockPath string) (*Process, error) {
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, os.NewSyscallError("socketpair", err)
	}
	ours, theirs := os.NewFile(uintptr(pair[0]), "control"), os.NewFile(uintptr(pair[1]), "control")
	defer theirs.Close()
	conn, err := net.FileConn(ours)
	ours.Close()
	if err != nil {
		return nil, err
	}
	p, err := spawn.Start(spawn.Command{Path: "/proc/self/exe", Args: []string{Role}, Dir: "/", Output: os.Stderr, Files: []*os.File{theirs}})
	if err != nil {
		conn.Close()
		return nil, err
	}
	return &Process{vsockPath: vsockPath, conn: conn, in: json.NewDecoder(conn), out: json.NewEncoder(conn), p: p}, nil
}

// Apply is Forwarder.Apply in the process.
func (p *Process) Apply(list []Forward, privileged bool) ([]Bound, error) {
	p.conn.SetDeadline(time.Now().Add(applyTimeout))
	defer p.conn.SetDeadline(time.Time{}) // see wire.Within
	var bound []Bound
	err := p.out.Encode(request{p.vsockPath, privileged, list})
	if err == nil {
		err = p.in.Decode(&bound)
	}
	if err != nil {
		return nil, fmt.Errorf("the process that forwards ports does not answer: %w", err)
	}
	return bound, nil
}

// Close ends the process, and with it every connection.
func (p *Process) Close() error {
	p.conn.Close()
	p.p.Kill()
	return p.p.Wait()
}
