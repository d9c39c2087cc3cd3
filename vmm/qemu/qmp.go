package qemu

import (
	"encoding/json"
	"fmt"
	"io"
	"net"
)

// monitor reads QEMU's machine protocol (QMP): it tells when the vCPUs run, and
// why the machine ended.
type monitor struct {
	c       *net.UnixConn
	running chan struct{} // closed when the vCPUs run
	// shutdown is the reason of the SHUTDOWN event (ShutdownCause in
	// qapi/run-state.json), empty if there was none. Set before serve returns.
	shutdown string
	// refused is QEMU's error to a command. Set before serve returns.
	refused error
}

func newMonitor(c *net.UnixConn) *monitor { return &monitor{c: c, running: make(chan struct{})} }

// qmpMessage is the union of what the monitor sends.
type qmpMessage struct {
	Return *struct {
		Running bool `json:"running"`
	} `json:"return"`
	Error *struct {
		Class string `json:"class"`
		Desc  string `json:"desc"`
	} `json:"error"`
	Event string `json:"event"`
	Data  struct {
		Reason string `json:"reason"`
	} `json:"data"`
}

// serve asks for the machine's state, which QEMU answers from its main loop,
// once everything is set up, and then listens until QEMU closes the connection.
func (m *monitor) serve() {
	// QEMU ended before it read this: its own words are on stderr.
	_, _ = io.WriteString(m.c, `{"execute":"qmp_capabilities"}{"execute":"query-status"}`)
	up := false
	setUp := func() {
		if !up {
			up = true
			close(m.running)
		}
	}
	d := json.NewDecoder(m.c)
	for {
		var msg qmpMessage
		if err := d.Decode(&msg); err != nil {
			return
		}
		switch {
		case msg.Error != nil:
			m.refused = fmt.Errorf("QEMU's monitor: %s", msg.Error.Desc)
			m.c.Close()
			return
		case msg.Event == "SHUTDOWN":
			m.shutdown = msg.Data.Reason
		case msg.Event == "RESUME", msg.Return != nil && msg.Return.Running:
			setUp()
		}
	}
}
