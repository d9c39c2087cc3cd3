// Package kmsg writes to the kernel log and reads from it. The guest has no
// other log: what PID 1 has to say appears on the VM's console, between the
// kernel's own lines, and in dmesg.
package kmsg

import (
	"bytes"
	"fmt"
	"os"
	"strings"
	"sync"

	"golang.org/x/sys/unix"
)

// Path of the device; a test replaces nothing here, it reads the real log.
const path = "/dev/kmsg"

// maxRecord is what the kernel accepts in one write (PRINTKRB_RECORD_MAX is
// 1024 on current kernels); longer lines are cut.
const maxRecord = 900

// Logger writes one record per call, prefixed with its name. The zero value is
// not usable; a Logger without a device drops what it is given, because a guest
// without a log must still serve.
type Logger struct {
	prefix string
	mu     sync.Mutex
	f      *os.File // guarded by mu; nil until the first record
	broken bool     // guarded by mu; the device cannot be opened
	stderr bool     // immutable
}

// New returns a Logger that prefixes each record with "name: ".
func New(name string) *Logger { return &Logger{prefix: name + ": "} }

// ToStderr returns a Logger for where the kernel's log is the host's: it writes lines to the
// standard error, which is read by who started the process.
func ToStderr(name string) *Logger { return &Logger{prefix: name + ": ", stderr: true} }

// Printf logs at level "info".
func (l *Logger) Printf(format string, args ...any) { l.log(6, format, args...) }

// Errorf logs at level "error": shown on the console even with "quiet".
func (l *Logger) Errorf(format string, args ...any) { l.log(3, format, args...) }

func (l *Logger) log(level int, format string, args ...any) {
	text := strings.ReplaceAll(fmt.Sprintf(format, args...), "\n", " ")
	record := fmt.Appendf(nil, "<%d>%s%s", level, l.prefix, text)
	record = record[:min(len(record), maxRecord)]
	if l.stderr {
		os.Stderr.Write(append(record[len("<6>"):], '\n')) //nolint:errcheck // there is nowhere left to report it
		return
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.f == nil && !l.broken {
		f, err := os.OpenFile(path, os.O_WRONLY|unix.O_CLOEXEC, 0)
		l.f, l.broken = f, err != nil
	}
	if l.f != nil {
		l.f.Write(append(record, '\n')) //nolint:errcheck // there is nowhere left to report it
	}
}

// Tail reads what the kernel logs from now on.
type Tail struct{ fd int }

// NewTail returns a Tail positioned behind the last record. The caller closes it.
func NewTail() (*Tail, error) {
	fd, err := unix.Open(path, unix.O_RDONLY|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("open %s: %w", path, err)
	}
	if _, err := unix.Seek(fd, 0, unix.SEEK_END); err != nil {
		unix.Close(fd)
		return nil, fmt.Errorf("seek %s: %w", path, err)
	}
	return &Tail{fd}, nil
}

// Lines returns the texts logged since the last call that contain one of words,
// at most max of them (the last ones). It does not wait for more.
func (t *Tail) Lines(max int, words ...string) []string {
	var lines []string
	buf := make([]byte, 8192)
	for {
		n, err := unix.Read(t.fd, buf)
		if err == unix.EPIPE { // records were overwritten before we read them
			continue
		}
		if err != nil || n <= 0 {
			return lines
		}
		text, ok := recordText(buf[:n])
		if !ok {
			continue
		}
		for _, w := range words {
			if strings.Contains(text, w) {
				lines = append(lines, text)
				break
			}
		}
		if len(lines) > max {
			lines = lines[1:]
		}
	}
}

// recordText returns the text of a record "prefix,seq,usec,flags;text\n k=v\n".
func recordText(record []byte) (string, bool) {
	_, text, ok := bytes.Cut(record, []byte{';'})
	if !ok {
		return "", false
	}
	text, _, _ = bytes.Cut(text, []byte{'\n'})
	return string(text), true
}

// Close releases the device.
func (t *Tail) Close() { unix.Close(t.fd) }
