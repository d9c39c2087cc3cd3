package console

import (
	"bytes"
	"os"
	"os/signal"
	"slices"
	"sync"
	"time"

	"golang.org/x/sys/unix"
	"golang.org/x/term"

	"github.com/wsl2/wsl2/internal/wire"
)

// fileKind is what a standard stream is.
type fileKind int

const (
	kindOther fileKind = iota // a file or a device: carried byte for byte
	kindPipe                  // a pipe or a socket: the same, with a program at its end
	kindNull                  // /dev/null or closed
	kindTerminal
)

func kindOf(f *os.File) fileKind {
	fd := int(f.Fd())
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return kindNull
	}
	switch st.Mode & unix.S_IFMT {
	case unix.S_IFIFO, unix.S_IFSOCK:
		return kindPipe
	case unix.S_IFCHR:
	default:
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
	in  *os.File // where keys are read; nil if there is no keyboard: then its modes stay
	out *os.File
	fd  int // for its size and modes
	// post keeps the output processing: a pipe may end in a program that prints
	// lines on this terminal (wsl2 make | tee log).
	post bool
	// keys keeps ^C, ^\ and ^Z the host's: stdin comes from a pipeline whose other
	// programs they are meant for as well (tar c . | wsl2 less).
	keys bool

	mu        sync.Mutex
	saved     *term.State // what to restore; nil while the modes are the caller's; guarded by mu
	suspended bool        // the modes stay the caller's until resume; guarded by mu
	over      bool        // restored for good; guarded by mu
}

// newTerminal returns the terminal among the streams, nil if there is none.
func newTerminal(std Stdio, kinds [3]fileKind) *terminal {
	t := &terminal{}
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
	t.post = kinds[1] == kindPipe || kinds[2] == kindPipe
	if t.in == nil && kinds[1] == kindTerminal && kinds[0] != kindNull && readable(std.Out) {
		// A pager reads its keys from /dev/tty although its stdin is a pipe or a
		// file. Here they come from the terminal that it prints on.
		t.in, t.keys = std.Out, true
	}
	t.fd = int(t.out.Fd())
	if t.in != nil {
		t.fd = int(t.in.Fd())
	}
	return t
}

func readable(f *os.File) bool {
	flags, err := unix.FcntlInt(f.Fd(), unix.F_GETFL, 0)
	return err == nil && flags&unix.O_ACCMODE == unix.O_RDWR
}

// isForeground tells whether our process group owns the terminal. A terminal
// that is not our controlling one is never taken away.
func (t *terminal) isForeground() bool {
	pgrp, err := unix.IoctlGetInt(t.fd, unix.TIOCGPGRP)
	return err != nil || pgrp == unix.Getpgrp()
}

// raw hands every key to the guest's pty, if that is not so already.
func (t *terminal) raw() {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.saved == nil {
		t.makeRaw()
	}
}

// makeRaw is called with mu held. A job in the background leaves the terminal
// alone: changing its modes would stop it (SIGTTOU).
func (t *terminal) makeRaw() {
	if t.in == nil || t.over || t.suspended || !t.isForeground() {
		return
	}
	state, err := term.MakeRaw(t.fd)
	if err != nil {
		return // a terminal that cannot be raw is used as it is
	}
	if t.saved == nil {
		t.saved = state
	}
	if t.post || t.keys {
		if modes, err := unix.IoctlGetTermios(t.fd, unix.TCGETS); err == nil {
			if t.post {
				modes.Oflag |= unix.OPOST
			}
			if t.keys {
				modes.Lflag |= unix.ISIG
			}
			unix.IoctlSetTermios(t.fd, unix.TCSETS, modes)
		}
	}
}

// cooked tells whether the terminal adds the \r to each \n itself.
func (t *terminal) cooked() bool {
	modes, err := unix.IoctlGetTermios(t.fd, unix.TCGETS)
	return err == nil && modes.Oflag&unix.OPOST != 0 && modes.Oflag&unix.ONLCR != 0
}

// suspend puts the caller's modes back until resume is called.
func (t *terminal) suspend() {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.suspended = true
	if t.saved != nil {
		term.Restore(t.fd, t.saved)
		t.saved = nil
	}
}

// resume takes the terminal again: the shell that continued us has set modes of its own.
func (t *terminal) resume() {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.suspended = false
	t.makeRaw()
}

// Write prints what comes from the guest's pty, which has put a \r before each
// \n. Where our terminal does the same, those are taken out again.
func (t *terminal) Write(p []byte) (int, error) {
	if !t.cooked() {
		return t.out.Write(p)
	}
	if _, err := t.out.Write(bytes.ReplaceAll(p, []byte("\r\n"), []byte("\n"))); err != nil {
		return 0, err
	}
	return len(p), nil
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

// await waits until there is something to read that is ours: to read in the background, or
// to be in a read when a shell puts us there, stops the whole command (SIGTTIN). It returns
// false when the session is over.
//
// bash tells nobody that it brings a running job to the foreground. The first line that is
// typed there shows it, and makes the terminal raw.
func (t *terminal) await() bool {
	edges := -1 // an epoll instance, made when it is needed
	defer func() {
		if edges >= 0 {
			unix.Close(edges)
		}
	}()
	for {
		if _, err := unix.Poll([]unix.PollFd{{Fd: int32(t.fd), Events: unix.POLLIN}}, -1); err == unix.EINTR {
			continue
		}
		if t.isForeground() {
			break
		}
		// What has been typed is somebody else's. Wait until more is.
		if edges < 0 {
			var err error
			if edges, err = unix.EpollCreate1(unix.EPOLL_CLOEXEC); err != nil {
				break // the read stops us, as it does any program
			}
			if err := unix.EpollCtl(edges, unix.EPOLL_CTL_ADD, t.fd, &unix.EpollEvent{Events: unix.EPOLLIN | unix.EPOLLET}); err != nil {
				break
			}
		}
		unix.EpollWait(edges, make([]unix.EpollEvent, 1), -1)
	}
	t.raw()
	t.mu.Lock()
	defer t.mu.Unlock()
	return !t.over
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

// jobControl are the signals that stop us and let us go on.
var jobControl = []os.Signal{unix.SIGTSTP, unix.SIGCONT}

// rest are the other signals whose default is to end a process and that the Go
// runtime leaves to us. To catch one costs some 20 µs, all of them as much as a short
// command: that is left to sessions that last.
func rest() []os.Signal {
	list := []os.Signal{unix.SIGALRM, unix.SIGVTALRM, unix.SIGIO, unix.SIGPWR, unix.SIGXCPU, unix.SIGXFSZ, unix.SIGSTKFLT}
	const rtMin, rtMax = 35, 64 // those below are libc's own (signal(7))
	for n := rtMin; n <= rtMax; n++ {
		list = append(list, unix.Signal(n))
	}
	return list
}

// lasting is the age at which a session is no short command any more.
const lasting = 50 * time.Millisecond

// watchSignals forwards signals to the program, follows the terminal's size, and
// keeps SIGPIPE from ending us: a closed stdout is the program's to notice.
func (s *Session) watchSignals() (stop func()) {
	ch := make(chan os.Signal, 16)
	notify := func(list ...os.Signal) {
		// nohup(1) stays in force, and so does a shell without job control.
		list = slices.DeleteFunc(slices.Clone(list), signal.Ignored)
		if len(list) > 0 {
			signal.Notify(ch, list...)
		}
	}
	signal.Notify(ch, unix.SIGPIPE)
	notify(forwarded...)
	if s.tty != nil {
		signal.Notify(ch, unix.SIGWINCH)
		notify(jobControl...)
	}
	late := time.AfterFunc(lasting, func() {
		notify(rest()...)
		notify(jobControl...) // last: what shows that the others are caught
	})
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
	return func() { late.Stop(); close(done) }
}

func (s *Session) onSignal(sig unix.Signal) {
	switch sig {
	case unix.SIGPIPE:
	case unix.SIGWINCH:
		s.tty.raw() // a shell may have brought us to the foreground
		s.send(&wire.Resize{Size: s.tty.size()})
	case unix.SIGTSTP:
		s.stop()
	case unix.SIGCONT:
		if s.tty != nil {
			s.tty.resume()
			s.send(&wire.Resize{Size: s.tty.size()})
		}
		s.send(&wire.Signal{Number: uint8(sig)})
	case unix.SIGHUP, unix.SIGTERM:
		if s.tty != nil && s.tty.in != nil && !s.tty.keys {
			// An interactive shell ignores SIGTERM; its terminal goes away.
			s.end(statusSignal + int(sig))
			return
		}
		fallthrough
	default:
		s.send(&wire.Signal{Number: uint8(sig)})
	}
}

// stop stops the program and then us, with the terminal as our caller left it.
// The shell lets us go on with SIGCONT.
func (s *Session) stop() {
	s.send(&wire.Signal{Number: uint8(unix.SIGTSTP)})
	if s.tty != nil {
		s.tty.suspend()
	}
	unix.Kill(unix.Getpid(), unix.SIGSTOP)
}
