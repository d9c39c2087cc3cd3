package ports

import (
	"fmt"
	"net"
	"os"
	"slices"
	"testing"
	"time"
)

// TestMain: the process that Start starts is this one's executable.
func TestMain(m *testing.M) {
	if len(os.Args) > 1 && os.Args[1] == Role {
		if err := Main(); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		return
	}
	os.Exit(m.Run())
}

// TestProcess: it forwards what it is told, rules and all, and nothing once it is closed.
func TestProcess(t *testing.T) {
	g := newGuest(t)
	p, err := Start(g.path)
	must(t, err)
	port := freePort(t)
	list := []Forward{{Distro: "a", Session: 7, Port: port, V4: true, Loopback: true, Rules: []Rule{rule(t, fmt.Sprintf("a:%d:%d", port, port+1), "::1", "10.0.0.0/8")}}}
	for range 2 { // the second time nothing changes
		bound, err := p.Apply(list, false)
		if err != nil || len(bound) != 1 || !slices.Equal(bound[0].Host, []string{at("::1", port+1), at("127.0.0.1", port)}) {
			t.Fatalf("%+v, %v", bound, err)
		}
	}
	echoes(t, "tcp", at("127.0.0.1", port))
	echoes(t, "tcp", at("::1", port+1))
	standing := dial(t, "tcp", at("127.0.0.1", port))
	standing.Write([]byte("x"))
	_, err = standing.Read(make([]byte, 1))
	must(t, err)
	p.Close()
	refused(t, at("127.0.0.1", port))
	if _, err := standing.Read(make([]byte, 1)); err == nil {
		t.Error("a connection outlives the process")
	}
	if _, err := p.Apply(list, false); err == nil {
		t.Error("a process that has ended answers")
	}
}

// TestServiceDies: without the service the process ends by itself.
func TestServiceDies(t *testing.T) {
	g := newGuest(t)
	p, err := Start(g.path)
	must(t, err)
	_, err = p.Apply(nil, false)
	must(t, err)
	must(t, p.conn.(*net.UnixConn).CloseWrite())
	ended := make(chan error, 1)
	go func() { ended <- p.p.Wait() }()
	select {
	case err := <-ended:
		must(t, err)
	case <-time.After(deadline):
		t.Error("it runs on")
		p.p.Kill()
		<-ended
	}
}
