package wire

import (
	"bytes"
	"encoding/binary"
	"errors"
	"io"
	"net"
	"os"
	"reflect"
	"strings"
	"testing"
	"testing/iotest"
	"time"
)

// samples has at least one message of each type, with no field at its zero value.
func samples() []Message {
	id := SessionID{1, 2, 3, 15: 0xff}
	return []Message{
		&Hello{Version: Version, Role: RolePTY, Session: id},
		&Ready{Version: Version, KernelRelease: "6.12.117", BootNanos: 1 << 40, InitNanos: 1<<40 + 7},
		&StartDistro{ID: 7, Name: "debian", Slot: SystemSlot, Hostname: "host", Hosts: "192.0.2.1\tnas\n", Checked: true, ReadOnly: true, User: "me",
			Shares:   []Share{{Host: "/home/me", Guest: "/mnt/host"}, {Host: "/srv", Guest: "/mnt/srv", ReadOnly: true}},
			Timezone: "Etc/UTC", SafeMode: true, Limits: Limits{MemoryBytes: 1 << 40, MilliCPUs: 1500, PIDs: 9},
			OwnNetwork: true, Own4: "10.77.0.3/24", Own6: "fd77::3/64", Certificates: []string{"one", "two"}},
		&StopDistro{ID: 8, Name: "debian", IfIdle: true, GraceMillis: 5000},
		&Import{ID: 9, Slot: 3, Archive: id},
		&Export{ID: 13, Slot: 4, Archive: id},
		&Maintain{ID: 14, Slot: 5, Task: TaskShrink, Bytes: 1 << 32, Archive: id},
		&MountDisk{ID: 15, Slot: 6, Partition: 2, Name: "data", FSType: "ext4", Options: "ro"},
		&ReleaseDisk{ID: 16, Slot: 6},
		&SwapOn{ID: 16, Slot: 6},
		&RemoveRoot{ID: 17},
		&Shutdown{ID: 10, GraceMillis: 1},
		&Reply{ID: 11, Code: CodeRefused, Text: "no", Port: 70000},
		&ImportReady{ID: 12, Port: 1025},
		&DistroExited{Name: "debian", Text: "killed"},
		&DistroIdle{Name: "debian"},
		&Start{Shell: ShellLogin, Argv: []string{"a", "", "b c"}, User: "root", Default: "1000", Cwd: "~", Env: []string{"TERM=xterm"},
			Streams: StreamStdin | StreamPTY, Size: WindowSize{Rows: 24, Cols: 80}, Agent: true},
		&Started{PID: 42, Notice: "no such directory"},
		&Failed{Code: CodeNotFound, Text: "x: not found"},
		&Resize{Size: WindowSize{Rows: 1, Cols: 65535}},
		&Signal{Number: 15},
		&Exited{Status: 3, Signal: 9, StdoutBytes: 1 << 33, StderrBytes: 2, PTYBytes: 3},
		&HostExec{Session: SessionID{1, 2, 15: 3}, Kind: HostAgent, Distro: "debian"},
		&Network{Guest4: "10.77.0.2/24", Gateway4: "10.77.0.1", Guest6: "fd77::2/64", Gateway6: "fd77::1"},
		&WatchPorts{},
		&PortsOpen{Ports: []Port{{Distro: "debian", UDP: true, V4: true, V6: true, Number: 8080}, {Distro: "a", Number: 1}}},
		&DialPort{UDP: true, V6: true, Number: 443},
		&MountShare{Session: SessionID{1, 2, 15: 3}, Guest: "/mnt/host", UID: 1000, GID: 1001, Distro: "debian", Stream: true},
		&RegisterDevice{ID: 17, Device: "4K@0xd0001000:5"},
		&ShareDevice{Tag: "wsl2fs0"},
		&ShareChange{Kind: 3, Mode: 0o100644, Dir: "src", Name: "a b", NewDir: ".", NewName: "c\xff"},
		&ShareRaised{},
		&Serving{UID: 1000, GID: 1001, Groups: []uint32{27, 1 << 31}},
	}
}

func frame(t testing.TB, m Message) []byte {
	t.Helper()
	b, err := Append(nil, m)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// raw builds a frame without the encoder's checks.
func raw(typ Type, body ...byte) []byte {
	b := binary.LittleEndian.AppendUint32(nil, uint32(len(body)+1))
	return append(append(b, byte(typ)), body...)
}

func TestEveryTypeHasASample(t *testing.T) {
	have := map[Type]bool{}
	for _, m := range samples() {
		have[m.Type()] = true
		v := reflect.ValueOf(m).Elem()
		for i := range v.NumField() {
			if v.Field(i).IsZero() {
				t.Errorf("%v.%s is zero: a sample proves nothing about it", m.Type(), v.Type().Field(i).Name)
			}
		}
	}
	for i := range 256 {
		typ := Type(i)
		m := newMessage(typ)
		named := !strings.HasPrefix(typ.String(), "Type(")
		if (m != nil) != named || (m != nil) != have[typ] {
			t.Errorf("type %d: message %v, named %v, sample %v", i, m != nil, named, have[typ])
		}
		if m != nil && m.Type() != typ {
			t.Errorf("newMessage(%v) has type %v", typ, m.Type())
		}
	}
}

func TestRoundTrip(t *testing.T) {
	for _, want := range samples() {
		t.Run(want.Type().String(), func(t *testing.T) {
			b := frame(t, want)
			const rest = "raw bytes"
			for name, r := range map[string]io.Reader{
				"whole":   strings.NewReader(string(b) + rest),
				"by byte": iotest.OneByteReader(strings.NewReader(string(b) + rest)),
			} {
				got, err := Read(r)
				if err != nil {
					t.Fatalf("%s: %v", name, err)
				}
				if !reflect.DeepEqual(got, want) {
					t.Errorf("%s: got %+v, want %+v", name, got, want)
				}
				if left, _ := io.ReadAll(r); string(left) != rest {
					t.Errorf("%s: Read left %q, want %q", name, left, rest)
				}
			}
			// Every shorter frame is refused, cut in the stream or in the body.
			for n := 1; n < len(b); n++ {
				if _, err := Read(bytes.NewReader(b[:n])); !errors.Is(err, io.ErrUnexpectedEOF) {
					t.Fatalf("stream cut after %d of %d bytes: %v", n, len(b), err)
				}
			}
			for n := headerSize; n < len(b); n++ {
				cut := bytes.Clone(b[:n])
				binary.LittleEndian.PutUint32(cut, uint32(n-4))
				if _, err := Read(bytes.NewReader(cut)); !errors.Is(err, ErrMalformed) {
					t.Fatalf("body cut to %d of %d bytes: %v", n, len(b), err)
				}
			}
			long := append(bytes.Clone(b), 0)
			binary.LittleEndian.PutUint32(long, uint32(len(long)-4))
			if _, err := Read(bytes.NewReader(long)); !errors.Is(err, ErrMalformed) || !strings.Contains(err.Error(), "trailing") {
				t.Errorf("trailing byte: %v", err)
			}
		})
	}
}

func TestReadRefuses(t *testing.T) {
	huge := binary.LittleEndian.AppendUint32(nil, MaxFrame+1)
	start := func(at int, v byte) []byte {
		b := frame(t, &Start{Argv: []string{"x"}})
		b[headerSize+at] = v
		return b
	}
	for name, c := range map[string]struct {
		frame []byte
		want  error
		text  string
	}{
		"closed":            {nil, io.EOF, "EOF"},
		"length 0":          {[]byte{0, 0, 0, 0, 1}, ErrMalformed, "length 0"},
		"too large":         {append(huge, byte(TypeStart)), ErrTooLarge, "at most 4194304"},
		"unknown type":      {raw(200, 1, 2), ErrUnknownType, "200 (2 bytes)"},
		"role 0":            {raw(TypeHello, append([]byte{Version, 0, 0, 0, 0}, make([]byte, 16)...)...), ErrMalformed, "role 0"},
		"role 99":           {raw(TypeHello, append([]byte{Version, 0, 0, 0, 99}, make([]byte, 16)...)...), ErrMalformed, "role 99"},
		"shell 9":           {start(0, 9), ErrMalformed, "shell mode 9"},
		"argv count":        {start(4, 0xff), ErrMalformed, "truncated"},
		"argument length":   {start(8, 0xff), ErrMalformed, "truncated"},
		"boolean 2":         {raw(TypeStopDistro, 0, 0, 0, 0, 0, 0, 0, 0, 2, 0, 0, 0, 0), ErrMalformed, "boolean"},
		"4 GiB of a string": {raw(TypeDistroIdle, 0xff, 0xff, 0xff, 0xff), ErrMalformed, "truncated"},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := Read(bytes.NewReader(c.frame))
			if !errors.Is(err, c.want) || !strings.Contains(err.Error(), c.text) {
				t.Errorf("got %v, want %v with %q", err, c.want, c.text)
			}
		})
	}
}

func TestVersionError(t *testing.T) {
	for _, c := range []struct {
		m          Message
		guestReads bool
		text       string
	}{
		{&Hello{Version: Version + 1, Role: RoleControl}, true, "the VM is older"},
		{&Hello{Version: Version - 1, Role: RoleControl}, true, "the launcher is older"},
		{&Ready{Version: Version + 1}, false, "the launcher is older"},
		{&Ready{Version: Version - 1}, false, "the VM is older"},
	} {
		// What follows the version may have another shape in another version.
		b := append(frame(t, c.m), "more"...)
		binary.LittleEndian.PutUint32(b, uint32(len(b)-4))
		_, err := Read(bytes.NewReader(b))
		var v *VersionError
		if !errors.As(err, &v) || v.GuestReads != c.guestReads || v.Ours != Version {
			t.Errorf("%+v: %#v", c.m, err)
			continue
		}
		if !strings.Contains(err.Error(), c.text) || !strings.Contains(err.Error(), "--shutdown") {
			t.Errorf("%+v: %q does not say %q and what to do", c.m, err, c.text)
		}
	}
}

func TestAppendRefusesTooLarge(t *testing.T) {
	fits := &DistroIdle{Name: strings.Repeat("x", MaxFrame-1-4)}
	b := frame(t, fits)
	got, err := Read(bytes.NewReader(b))
	if err != nil || !reflect.DeepEqual(got, fits) {
		t.Fatalf("largest frame: %v", err)
	}
	b, err = Append([]byte("before"), &DistroIdle{Name: fits.Name + "x"})
	if !errors.Is(err, ErrTooLarge) || string(b) != "before" {
		t.Errorf("got %q, %v", b, err)
	}
}

// TestReadAllocatesAsBytesArrive: a header that promises the largest frame and
// then nothing must not cost its size.
func TestReadAllocatesAsBytesArrive(t *testing.T) {
	head := append(binary.LittleEndian.AppendUint32(nil, MaxFrame), byte(TypeStart))
	got := testing.Benchmark(func(b *testing.B) {
		b.ReportAllocs()
		for b.Loop() {
			if _, err := Read(bytes.NewReader(head)); !errors.Is(err, io.ErrUnexpectedEOF) {
				b.Fatal(err)
			}
		}
	})
	if n := got.AllocedBytesPerOp(); n > 2*readChunk {
		t.Errorf("%d bytes allocated for a header", n)
	}
}

type countingWriter struct{ calls int }

func (w *countingWriter) Write(p []byte) (int, error) { w.calls++; return len(p), nil }

type failingWriter struct{ err error }

func (w failingWriter) Write([]byte) (int, error) { return 0, w.err }

func TestWriteIsOneCall(t *testing.T) {
	for _, m := range samples() {
		var w countingWriter
		if err := Write(&w, m); err != nil || w.calls != 1 {
			t.Errorf("%v: %d calls, %v", m.Type(), w.calls, err)
		}
		boom := errors.New("boom")
		if err := Write(failingWriter{boom}, m); !errors.Is(err, boom) {
			t.Errorf("%v: %v does not wrap the writer's error", m.Type(), err)
		}
	}
}

// FuzzRead: whatever Read accepts encodes to the very bytes it read, texts apart.
func FuzzRead(f *testing.F) {
	for _, m := range samples() {
		f.Add(frame(f, m))
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		r := bytes.NewReader(b)
		m, err := Read(r)
		if err != nil {
			return
		}
		used := b[:len(b)-r.Len()]
		again, err := Append(nil, m)
		if err != nil {
			t.Fatal(err)
		}
		switch m.(type) {
		case *Ready, *Reply, *DistroExited, *Started, *Failed:
			// Texts for people are changed by the first reading, not by a second.
			if m2, err := Read(bytes.NewReader(again)); err != nil || !reflect.DeepEqual(m, m2) {
				t.Fatalf("read %+v, then %+v, %v", m, m2, err)
			}
		default:
			if !bytes.Equal(again, used) {
				t.Fatalf("read %x\nwrote %x", used, again)
			}
		}
	})
}

func BenchmarkStart(b *testing.B) {
	m := &Start{Argv: []string{"true"}, Env: []string{"TERM=xterm", "LANG=C"}, Streams: StreamStdout | StreamStderr}
	b.ReportAllocs()
	var buf []byte
	for b.Loop() {
		buf, _ = Append(buf[:0], m)
		if _, err := Read(bytes.NewReader(buf)); err != nil {
			b.Fatal(err)
		}
	}
}

// TestWithin: a peer that does not read is given up, and one that does is left without a
// deadline, which would wake an idle process.
func TestWithin(t *testing.T) {
	ours, theirs := net.Pipe()
	defer ours.Close()
	c := &deadlines{Conn: ours}
	if err := Write(Within(c, time.Millisecond), &DistroIdle{Name: "a"}); !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("nobody reads: %v", err)
	}
	read := make(chan error, 1)
	go func() {
		_, err := Read(theirs)
		read <- err
	}()
	if err := errors.Join(Write(Within(c, time.Minute), &DistroIdle{Name: "a"}), <-read); err != nil {
		t.Error(err)
	}
	if !c.last.IsZero() {
		t.Errorf("a deadline is left: %v", c.last)
	}
}

// deadlines remembers the last one that was set.
type deadlines struct {
	net.Conn
	last time.Time
}

func (d *deadlines) SetWriteDeadline(t time.Time) error {
	d.last = t
	return d.Conn.SetWriteDeadline(t)
}

// What a hostile guest says ends on a terminal.
func TestTextIsPlain(t *testing.T) {
	read := func(text string) string {
		m, err := Read(bytes.NewReader(frame(t, &Failed{Text: text})))
		if err != nil {
			t.Fatal(err)
		}
		return m.(*Failed).Text
	}
	if got, want := read("a\x1b]0;evil\x07\r\u009bé\xff\n\tb"), "a?]0;evil???é?\n\tb"; got != want {
		t.Errorf("got %q, want %q", got, want)
	}
	long := read(strings.Repeat("é", maxText))
	if len(long) > maxText || !strings.HasSuffix(long, ellipsis) || read(long) != long {
		t.Errorf("%d bytes, ends with %q", len(long), long[len(long)-8:])
	}
}
