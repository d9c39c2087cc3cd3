//go:build kvm

package main_test

import (
	"fmt"
	"testing"

	"github.com/wsl2/wsl2/internal/testsys"
)

// TestKVMPorts: a port of a distro on the host, under load: much at once, and many at once.
func TestKVMPorts(t *testing.T) {
	h := newKVMHost(t)
	installServer(h)
	port := hostPorts(t, 1)[0]
	events := followPorts(h)
	l := serving(h, fmt.Sprintf("echo,tcp4,0.0.0.0:%d", port))
	events.until("the port", func(p portList) bool { return p.has(port) })
	echo(t, connect(t, "tcp", "127.0.0.1", port), testsys.PatternBytes(t, int64(count(40<<20))))
	many(t, port, count(3000))
	l.Stdin.Close()
	h.Want(l.Wait(), 0)
	events.until("no port", func(p portList) bool { return len(p.Ports) == 0 })
	closedPort(t, "127.0.0.1", port)
}
