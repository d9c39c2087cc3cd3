package client

import (
	"os"
	"os/signal"
	"sync"

	"golang.org/x/sys/unix"
	"golang.org/x/term"

	"github.com/wsl2/wsl2/internal/wire"
)

// fileKind is what a standard stream is.
type fileKind int

const (
	kindOther fileKind = iota // pipe, file, socket: carried byte for byte
	kindNull                  // /dev/null or closed
	kindTerminal
)

func kindOf(f *os.File) fileKind {
	fd := int(f.Fd())
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return kindNull
	}
	if st.Mode&unix.S_IFMT != unix.S_IFCHR {
		return kindOther
	}
	if st.Rdev == unix.Mkdev(1, 3) {
		return kindNull
	}
	if term.IsTerminal(fd) {
		return kindTerminal
	}
	return kindOther
}

// terminal is the caller's terminal: where input and output of the session's
// pty go, and the modes that have to be put back.
type terminal struct {
	in  *os.File // nil if stdin is not the terminal: then its modes stay
	out *os.File
	fd  int // for its size and modes
	// post keeps the output processing: streams that do not go through the
	// guest's pty still print lines here.
	post bool

	mu         sync.Mutex
	saved      *term.State // what to restore; nil while the modes are the caller's; guarded by mu
	over       bool        // restored for good; guarded by mu
	foreground sync.Cond   // signalled when it may have become ours
}

// newTerminal returns the terminal among the streams, nil if there is none.
func newTerminal(std Stdio, kinds [3]fileKind) *terminal {
	t := &terminal{}
	t.foreground.L = &t.mu
	if kinds[0] == kindTerminal {
		t.in, t.out = std.In, std.In
	}
	if kinds[2] == kindTerminal {
		t.out = std.Err
	}
	if kinds[1] == kindTerminal {
		t.out = std.Out
	}
	if t.out == nil {
		return nil
	}
	t.post = kinds[1] != kindTerminal || kinds[2] != kindTerminal
	t.fd = int(t.out.Fd())
	if t.in != nil {
		t.fd = int(t.in.Fd())
	}
	return t
}

// isForeground tells whether our process group owns the terminal. A terminal
// that is not our controlling one is never taken away.
func (t *terminal) isForeground() bool {
	pgrp, err := unix.IoctlGetInt(t.fd, unix.TIOCGPGRP)
	return err != nil || pgrp == unix.Getpgrp()
}

// raw hands every key to the guest's pty. A job in the background leaves the
// terminal alone: changing its modes would stop it (SIGTTOU).
func (t *terminal) raw() {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.in == nil || t.over || !t.isForeground() {
		return
	}
	state, err := term.MakeRaw(t.fd)
	if err != nil {
		return // a terminal that cannot be raw is used as it is
	}
	if t.saved == nil {
		t.saved = state
	}
	if t.post {
		if modes, err := unix.IoctlGetTermios(t.fd, unix.TCGETS); err == nil {
			modes.Oflag |= unix.OPOST
			unix.IoctlSetTermios(t.fd, unix.TCSETS, modes)
		}
	}
	t.foreground.Broadcast()
}

// restore puts the caller's modes back, for good.
func (t *terminal) restore() {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.over = true
	if t.saved != nil {
		term.Restore(t.fd, t.saved)
		t.saved = nil
	}
}

// awaitForeground waits until the terminal may be read: a read from the
// background would stop the whole command (SIGTTIN).
func (t *terminal) awaitForeground() {
	t.mu.Lock()
	defer t.mu.Unlock()
	for t.saved == nil && !t.over && !t.isForeground() {
		t.foreground.Wait()
	}
}

func (t *terminal) size() wire.WindowSize {
	w, h, err := term.GetSize(t.fd)
	if err != nil {
		return wire.WindowSize{}
	}
	return wire.WindowSize{Rows: uint16(h), Cols: uint16(w)}
}

// forwarded are the signals that a program expects from its caller. SIGURG is
// the Go runtime's own.
var forwarded = []os.Signal{unix.SIGHUP, unix.SIGINT, unix.SIGQUIT, unix.SIGTERM, unix.SIGUSR1, unix.SIGUSR2}

// watchSignals forwards signals to the program, follows the terminal's size, and
// keeps SIGPIPE from ending us: a closed stdout is the program's to notice.
func (s *session) watchSignals() (stop func()) {
	ch := make(chan os.Signal, 16)
	list := []os.Signal{unix.SIGPIPE}
	for _, sig := range forwarded {
		if !signal.Ignored(sig) { // nohup(1) stays in force
			list = append(list, sig)
		}
	}
	if s.tty != nil {
		list = append(list, unix.SIGWINCH, unix.SIGCONT)
	}
	signal.Notify(ch, list...)
	done := make(chan struct{})
	go func() {
		for {
			select {
			case sig := <-ch:
				s.onSignal(sig.(unix.Signal))
			case <-done:
				return
			}
		}
	}()
	// The signals stay caught: one that comes between the session's end and the
	// process's must not replace the exit status.
	return func() { close(done) }
}

func (s *session) onSignal(sig unix.Signal) {
	switch sig {
	case unix.SIGPIPE:
	case unix.SIGWINCH:
		s.send(&wire.Resize{Size: s.tty.size()})
	case unix.SIGCONT:
		s.tty.raw() // the shell that continued us has set its own modes
		s.send(&wire.Resize{Size: s.tty.size()})
	case unix.SIGHUP, unix.SIGTERM:
		if s.tty != nil && s.tty.in != nil {
			// An interactive shell ignores SIGTERM; its terminal goes away.
			s.end(statusSignal + int(sig))
			return
		}
		fallthrough
	default:
		s.send(&wire.Signal{Number: uint8(sig)})
	}
}
