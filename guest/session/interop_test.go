package session

import (
	"io"
	"net"
	"os"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/wsl2/wsl2/internal/wire"
)

// ask connects to a socket for host programs, as a process of the distro does.
func ask(t *testing.T, path string) *net.UnixConn {
	t.Helper()
	c, err := net.DialUnix("unix", nil, &net.UnixAddr{Name: path, Net: "unix"})
	must(t, err)
	t.Cleanup(func() { c.Close() })
	c.SetDeadline(time.Now().Add(limit))
	c.Write([]byte{AskProgram})
	return c
}

// take receives one connection.
func take(t *testing.T, c *net.UnixConn) (wire.Role, *os.File) {
	t.Helper()
	b, oob := make([]byte, 2), make([]byte, 64)
	n, oobn, _, _, err := c.ReadMsgUnix(b, oob)
	must(t, err)
	messages, err := unix.ParseSocketControlMessage(oob[:oobn])
	must(t, err)
	if n != 1 || len(messages) != 1 {
		t.Fatalf("%d bytes, %d control messages", n, len(messages))
	}
	fds, err := unix.ParseUnixRights(&messages[0])
	must(t, err)
	f := os.NewFile(uintptr(fds[0]), "connection")
	t.Cleanup(func() { f.Close() })
	return wire.Role(b[0]), f
}

// interopOf starts a session that stays, and returns the path in its $WSL_INTEROP.
func interopOf(t *testing.T, r *rig) (*client, string) {
	t.Helper()
	c := r.open(sh("echo $WSL_INTEROP; exec cat"))
	c.started()
	b := make([]byte, 0, 128)
	for !strings.HasSuffix(string(b), "\n") {
		b = append(b, c.exactly(c.stdout, 1)...)
	}
	return c, strings.TrimSpace(string(b))
}

// TestHostExec: a process that asks gets the connections that the launcher opens,
// bytes and all, and sessions do not mix.
func TestHostExec(t *testing.T) {
	r := newRig(t)
	first, path1 := interopOf(t, r)
	second, path2 := interopOf(t, r)
	if path1 == path2 {
		t.Fatalf("two sessions share %s", path1)
	}
	for _, s := range []struct {
		c    *client
		path string
	}{{second, path2}, {first, path1}, {first, path1}} {
		process := ask(t, s.path)
		m, ok := s.c.next().(*wire.HostExec)
		if !ok || m.Session == (wire.SessionID{}) || m.Distro != "" {
			t.Fatalf("%+v", m)
		}
		for _, role := range []wire.Role{wire.RoleHost, wire.RoleStdout, wire.RolePTY} {
			host := r.dial(role, m.Session)
			got, f := take(t, process)
			if got != role {
				t.Fatalf("role %d, want %d", got, role)
			}
			io.WriteString(host, "to the guest")
			if text := read(t, f, 12); text != "to the guest" {
				t.Fatalf("%q", text)
			}
			io.WriteString(f, "to the host")
			if text := read(t, host, 11); text != "to the host" {
				t.Fatalf("%q", text)
			}
			f.Close()
			if _, err := host.Read(make([]byte, 1)); err != io.EOF {
				t.Fatalf("init keeps the connection open: %v", err)
			}
		}
	}
	first.stdin.Close()
	first.exited()
	if _, err := first.control.Read(make([]byte, 1)); err != io.EOF {
		t.Fatal(err)
	}
	// Its socket goes with the session: a process of it may be left.
	for deadline := time.Now().Add(limit); ; {
		if _, err := os.Stat(path1); os.IsNotExist(err) {
			break
		}
		if time.Now().After(deadline) {
			t.Fatalf("%s is still there", path1)
		}
	}
}

// TestHostExecStandIn: without a session, and after the session's end, it is the
// service that is asked.
func TestHostExecStandIn(t *testing.T) {
	r := newRig(t)
	c, path := interopOf(t, r)
	ask(t, strings.TrimSuffix(path, path[strings.LastIndexByte(path, '/')+1:])+"init")
	<-r.standIn

	process := ask(t, path)
	m := c.next().(*wire.HostExec)
	c.control.Close() // the client dies before it has opened anything
	if id := <-r.standIn; id != m.Session {
		t.Fatalf("the service is asked for %x, want %x", id, m.Session)
	}
	r.dial(wire.RoleHost, m.Session)
	if role, _ := take(t, process); role != wire.RoleHost {
		t.Errorf("role %d", role)
	}
	// Whoever has ended is not waited for.
	process.Close()
	for {
		late := r.dial(wire.RoleHost, m.Session)
		// Until init has noticed, the connection is taken; then it is refused.
		if msg, err := wire.Read(late); err == nil {
			if f, ok := msg.(*wire.Failed); !ok || f.Code != wire.CodeRefused {
				t.Fatalf("%+v", msg)
			}
			return
		}
	}
}

// TestHostExecLate: who asks while the session ends is answered by the service, and it is asked once.
func TestHostExecLate(t *testing.T) {
	r := newRig(t)
	i := r.srv.interop
	for range 100 {
		fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
		must(t, err)
		f := os.NewFile(uintptr(fds[0]), "control")
		c, err := net.FileConn(f)
		f.Close()
		must(t, err)
		x := &session{srv: r.srv, control: c.(*net.UnixConn)}
		s, err := i.take()
		must(t, err)
		s.owner.Store(x)
		late, err := net.DialUnix("unix", nil, &net.UnixAddr{Name: s.path, Net: "unix"})
		must(t, err)
		// Init has come to know the first once it has cut off the second.
		other, err := net.Dial("unix", s.path)
		must(t, err)
		other.SetDeadline(time.Now().Add(limit))
		other.Write([]byte("?"))
		other.Read(make([]byte, 1))
		other.Close()
		i.release(s, x) // which reads no more, though nobody has closed it yet
		late.Write([]byte{AskProgram})
		select {
		case <-r.standIn:
		case <-time.After(limit):
			t.Fatal("a process that asked is lost")
		}
		late.Close()
		c.Close()
		unix.Close(fds[1])
	}
	id, err := i.wait(&hostGuest{})
	must(t, err)
	defer i.forget(id)
	i.orphan(id)
	i.orphan(id)
	if n := len(r.standIn); n != 1 {
		t.Errorf("the service is asked %d times", n)
	}
}

// TestAgent: the session's socket is its SSH agent's too, for those who may use it.
func TestAgent(t *testing.T) {
	r := newRig(t)
	m := sh("echo $SSH_AUTH_SOCK; exec cat")
	m.Agent = true
	c := r.open(m)
	c.started()
	b := make([]byte, 0, 128)
	for !strings.HasSuffix(string(b), "\n") {
		b = append(b, c.exactly(c.stdout, 1)...)
	}
	process, err := net.DialUnix("unix", nil, &net.UnixAddr{Name: strings.TrimSpace(string(b)), Net: "unix"})
	must(t, err)
	defer process.Close()
	process.SetDeadline(time.Now().Add(limit))
	const request = "\x00\x00\x00\x01\x0b" // SSH_AGENTC_REQUEST_IDENTITIES
	io.WriteString(process, request)
	ask, ok := c.next().(*wire.HostExec)
	if !ok || ask.Kind != wire.HostAgent {
		t.Fatalf("%+v", ask)
	}
	host := r.dial(wire.RoleHost, ask.Session)
	if got := read(t, host, len(request)); got != request {
		t.Fatalf("%q", got)
	}
	io.WriteString(host, "answer")
	if got := read(t, process, 6); got != "answer" {
		t.Fatalf("%q", got)
	}
	host.Close()
	if _, err := process.Read(make([]byte, 1)); err != io.EOF {
		t.Errorf("the agent has gone: %v", err)
	}

	// A session whose client has none, and what is neither.
	m = sh("echo $SSH_AUTH_SOCK")
	c = r.open(m)
	c.started()
	if got := c.exactly(c.stdout, c.exited().StdoutBytes); got != "\n" {
		t.Errorf("SSH_AUTH_SOCK=%q", got)
	}
	_, path := interopOf(t, r)
	other, err := net.DialUnix("unix", nil, &net.UnixAddr{Name: path, Net: "unix"})
	must(t, err)
	defer other.Close()
	other.SetDeadline(time.Now().Add(limit))
	io.WriteString(other, "GET / HTTP/1.1")
	if _, err := io.ReadAll(other); err != nil && !strings.Contains(err.Error(), "reset") {
		t.Errorf("not cut off: %v", err)
	}
}
