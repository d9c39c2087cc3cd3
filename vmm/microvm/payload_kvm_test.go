//go:build kvm

package microvm_test

import (
	"context"
	"encoding/binary"
	"errors"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
	"time"

	"github.com/wsl2/wsl2/vmm/engine"
	"github.com/wsl2/wsl2/vmm/microvm"
	"github.com/wsl2/wsl2/vmm/virtio"
	"github.com/wsl2/wsl2/vmm/virtio/rng"
)

// These tests run guests of a few instructions, packed as an ELF file whose
// 64-bit entry point is at 16 MiB.

const payloadBase = 16 << 20

func payload(t testing.TB, code ...byte) *os.File {
	t.Helper()
	const headers = 64 + 56
	b := make([]byte, headers, headers+len(code))
	le := binary.LittleEndian
	copy(b, "\x7fELF\x02\x01\x01")
	le.PutUint16(b[16:], 2)
	le.PutUint16(b[18:], 62)
	le.PutUint64(b[24:], payloadBase)
	le.PutUint64(b[32:], 64)
	le.PutUint16(b[54:], 56)
	le.PutUint16(b[56:], 1)
	ph := b[64:]
	le.PutUint32(ph, 1)
	le.PutUint64(ph[8:], headers)
	le.PutUint64(ph[24:], payloadBase)
	le.PutUint64(ph[32:], uint64(len(code)))
	le.PutUint64(ph[40:], 4096)
	b = append(b, code...)
	f, err := os.Create(filepath.Join(t.TempDir(), "payload"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	if _, err := f.Write(b); err != nil {
		t.Fatal(err)
	}
	return f
}

func payloadSpec(t testing.TB, code ...byte) engine.Spec {
	return engine.Spec{Kernel: payload(t, code...), MemoryBytes: 64 << 20, CPUs: 1}
}

// deadline is when a guest is killed that has not ended: not as any test wants it.
const deadline = 5 * time.Minute

// start runs spec; the machine does not outlive the test, nor the deadline.
func start(t testing.TB, spec engine.Spec) engine.Engine {
	t.Helper()
	m := microvm.New(spec)
	if err := m.Start(context.Background()); err != nil {
		t.Fatal(err)
	}
	hangs := time.AfterFunc(deadline, m.Kill)
	t.Cleanup(func() { hangs.Stop(); m.Kill(); m.Wait() })
	return m
}

// Machine code, and how to put it together.
func out(port uint16, v byte) []byte {
	return []byte{0x66, 0xba, byte(port), byte(port >> 8), 0xb0, v, 0xee} // mov $port, %dx; mov $v, %al; out %al, (%dx)
}

func cat(parts ...[]byte) (b []byte) {
	for _, p := range parts {
		b = append(b, p...)
	}
	return b
}

var (
	powerOff = out(engine.ExitPort, engine.StatusPowerOff)
	spin     = []byte{0xeb, 0xfe} // jmp .
)

func TestEnds(t *testing.T) {
	for name, c := range map[string]struct {
		code   []byte
		reason engine.Reason
		detail string
	}{
		"power off":    {powerOff, engine.ReasonPowerOff, ""},
		"i8042 reset":  {cat(out(0x64, 0xaa), out(0x64, 0xfe)), engine.ReasonReset, "keyboard controller"},
		"port 0xcf9":   {cat(out(0xcf9, 0x02), out(0xcf9, 0x06)), engine.ReasonReset, "0xcf9"},
		"triple fault": {[]byte{0x0f, 0x0b}, engine.ReasonReset, "triple fault"}, // ud2, no IDT
		"code outside memory": {
			[]byte{0xb8, 0x00, 0x00, 0x00, 0xd8, 0xff, 0xe0}, // mov $0xd8000000, %eax; jmp *%rax
			engine.ReasonFailed, "RIP=0xd8000000",
		},
		// Ports and addresses without a device read as all ones.
		"nothing there": {cat(
			[]byte{0xe5, 0x40, 0x83, 0xf8, 0xff, 0x75, 0x1f},             // in $0x40, %eax; cmp $-1, %eax; jne bad
			[]byte{0xa1, 0, 0, 0, 0xd8, 0, 0, 0, 0},                      // movabs 0xd8000000, %eax
			[]byte{0x83, 0xf8, 0xff, 0x75, 0x11},                         // cmp $-1, %eax; jne bad
			[]byte{0xe4, 0x71, 0x84, 0xc0, 0x75, 0x0b},                   // in $0x71, %al; test %al, %al; jne bad
			[]byte{0xe4, 0x64, 0x3c, 0xff, 0x75, 0x05, 0x30, 0xc0, 0xe6}, // in $0x64, %al; cmp $-1, %al; jne bad; xor %al, %al
			[]byte{engine.ExitPort, 0xf4},                                // out %al, $0xf4
			[]byte{0xb0, 0x01, 0xe6, engine.ExitPort},                    // bad: mov $1, %al; out %al, $0xf4
		), engine.ReasonPowerOff, ""},
	} {
		t.Run(name, func(t *testing.T) {
			exit := start(t, payloadSpec(t, c.code...)).Wait()
			if exit.Reason != c.reason || !strings.Contains(exit.Detail, c.detail) || c.detail == "" && exit.Detail != "" {
				t.Errorf("%+v", exit)
			}
		})
	}
}

// What goes to the UART comes out, the divisor does not, and an unfinished line
// is not lost.
func TestUART(t *testing.T) {
	s := &screen{}
	spec := payloadSpec(t, cat(
		out(0x3fb, 0x80), out(0x3f8, 'x'), out(0x3f9, 'x'), out(0x3fb, 0x03),
		out(0x3f8, 'h'), out(0x3f8, 'i'), out(0x3f8, '\n'), out(0x3f8, '!'),
		powerOff)...)
	spec.Console = s
	start(t, spec).Wait()
	if s.String() != "hi\n!" {
		t.Errorf("%q", s)
	}
}

func TestKill(t *testing.T) {
	for _, cpus := range []int{1, 3, 64} {
		spec := payloadSpec(t, spin...)
		spec.CPUs = cpus
		m := start(t, spec)
		m.Kill()
		m.Kill()
		for range 2 {
			if exit := m.Wait(); exit != (engine.Exit{Reason: engine.ReasonKilled}) {
				t.Errorf("%d vCPUs: %+v", cpus, exit)
			}
		}
		m.Kill()
	}
}

func TestKillBeforeStart(t *testing.T) {
	m := microvm.New(payloadSpec(t, spin...))
	m.Kill()
	if err := m.Start(context.Background()); err == nil {
		t.Error("a killed machine was started")
	}
}

// A machine that ended by itself stays ended as it was.
func TestKillAfterEnd(t *testing.T) {
	m := start(t, payloadSpec(t, powerOff...))
	m.Wait()
	m.Kill()
	if exit := m.Wait(); exit.Reason != engine.ReasonPowerOff {
		t.Errorf("%+v", exit)
	}
	if err := m.Start(context.Background()); err == nil {
		t.Error("started twice")
	}
}

// RAM goes on above the hole below 4 GiB.
func TestMemoryAboveHole(t *testing.T) {
	spec := payloadSpec(t, cat(
		// The page tables end at 4 GiB: give the PDPT an entry for the fifth GiB.
		[]byte{0xc7, 0x04, 0x25, 0x20, 0xa0, 0x00, 0x00, 0x83, 0x00, 0x00, 0x00}, // movl $0x83, 0xa020
		[]byte{0xc7, 0x04, 0x25, 0x24, 0xa0, 0x00, 0x00, 0x01, 0x00, 0x00, 0x00}, // movl $1, 0xa024: 1 GiB page at 4 GiB
		[]byte{0x48, 0xb8, 0, 0, 0, 0, 1, 0, 0, 0},                               // movabs $0x100000000, %rax
		[]byte{0xc6, 0x00, 0x00},                  // movb $0, (%rax)
		[]byte{0x8a, 0x00, 0xe6, engine.ExitPort}, // mov (%rax), %al; out
	)...)
	spec.MemoryBytes = 3<<30 + 64<<20
	if exit := start(t, spec).Wait(); exit.Reason != engine.ReasonPowerOff {
		t.Errorf("%+v", exit)
	}
}

func TestStartErrors(t *testing.T) {
	good := payloadSpec(t, powerOff...)
	before := held(t)
	for name, c := range map[string]struct {
		change func(*engine.Spec)
		want   string
	}{
		"no vCPU":          {func(s *engine.Spec) { s.CPUs = 0 }, "1 to 64"},
		"1000 vCPUs":       {func(s *engine.Spec) { s.CPUs = 1000 }, "1 to 64"},
		"no memory":        {func(s *engine.Spec) { s.MemoryBytes = 0 }, "2 MiB"},
		"odd memory":       {func(s *engine.Spec) { s.MemoryBytes = 64<<20 + 4096 }, "2 MiB"},
		"a TB of memory":   {func(s *engine.Spec) { s.MemoryBytes = 1 << 40 }, "1024 GiB"},
		"too little":       {func(s *engine.Spec) { s.MemoryBytes = 16 << 20 }, "at least"},
		"no kernel":        {func(s *engine.Spec) { s.Kernel = nil }, "not a Linux kernel"},
		"too many devices": {func(s *engine.Spec) { s.Devices = make([]virtio.Device, 33) }, "33 devices"},
		"long command line": {func(s *engine.Spec) {
			s.Cmdline = strings.Repeat("x", 2000)
			s.Devices = []virtio.Device{rng.New(), rng.New()}
		}, "command line"},
	} {
		spec := good
		c.change(&spec)
		if err := microvm.New(spec).Start(context.Background()); err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: %v", name, err)
		}
	}
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	if err := microvm.New(good).Start(ctx); !errors.Is(err, context.Canceled) {
		t.Errorf("cancelled: %v", err)
	}
	if after := held(t); after.fds != before.fds || after.mappings > before.mappings+8 {
		t.Errorf("before %+v, after %+v", before, after)
	}
}

// holdings is what a process holds.
type holdings struct {
	fds, threads, mappings, goroutines int
	files                              []string
}

func held(t testing.TB) (h holdings) {
	t.Helper()
	fds, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	threads, err := os.ReadDir("/proc/self/task")
	if err != nil {
		t.Fatal(err)
	}
	maps, err := os.ReadFile("/proc/self/maps")
	if err != nil {
		t.Fatal(err)
	}
	for _, fd := range fds {
		if l, err := os.Readlink("/proc/self/fd/" + fd.Name()); err == nil && strings.Contains(l, "kvm") {
			h.files = append(h.files, l)
		}
	}
	h.fds, h.threads, h.mappings, h.goroutines = len(fds), len(threads), strings.Count(string(maps), "\n"), runtime.NumGoroutine()
	return h
}

// Machines that end, are killed or fail leave nothing behind.
func TestNoLeaks(t *testing.T) {
	kernels := []*os.File{payload(t, powerOff...), payload(t, spin...), payload(t, 0x0f, 0x0b)}
	cycle := func(i int) {
		k := kernels[i%len(kernels)]
		m := microvm.New(engine.Spec{Kernel: k, MemoryBytes: 64 << 20, CPUs: 2, Devices: []virtio.Device{rng.New()}, Console: &screen{}})
		if err := m.Start(context.Background()); err != nil {
			t.Fatal(err)
		}
		if i%len(kernels) == 1 {
			m.Kill()
		}
		m.Wait()
	}
	for i := range 6 {
		cycle(i)
	}
	before := held(t)
	for i := range 60 {
		cycle(i)
	}
	after := held(t)
	if after.fds != before.fds || len(after.files) != 0 {
		t.Errorf("before %+v, after %+v", before, after)
	}
	// The last machine's goroutines return a moment after Wait has; the Go runtime
	// keeps a few idle threads, and maps memory as it likes. A leak is 60.
	if after.goroutines > before.goroutines+4 || after.threads > before.threads+4 || after.mappings > before.mappings+8 {
		t.Errorf("before %+v, after %+v", before, after)
	}
}
