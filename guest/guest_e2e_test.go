//go:build e2e

// The guest in a real VM (under TCG, so on any host): what no test on the host
// can show. It plays the launcher with the bare wire protocol.
package guest_test

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"context"
	"crypto/rand"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/u-root/u-root/pkg/cpio"

	"github.com/wsl2/wsl2/internal/wire"
	"github.com/wsl2/wsl2/vmm"
	"github.com/wsl2/wsl2/vmm/engine"
	"github.com/wsl2/wsl2/vmm/vmmtest"
)

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// initramfs is what `make initramfs` builds.
func initramfs(t testing.TB) string {
	t.Helper()
	p := filepath.Join(filepath.Dir(vmmtest.Kernel(t)), "initramfs.cpio")
	if _, err := os.Stat(p); err != nil {
		t.Fatalf("%v: make initramfs", err)
	}
	return p
}

// host is a VM and the launcher's side of its control channel.
type host struct {
	t       testing.TB
	m       *vmm.Machine
	path    string
	control net.Conn
	ready   *wire.Ready
	nextID  uint32
	events  []wire.Message // unasked messages that came while a reply was awaited
}

func boot(t testing.TB) *host {
	t.Helper()
	h := &host{t: t, path: filepath.Join(t.TempDir(), "v")}
	l, err := net.Listen("unix", fmt.Sprintf("%s_%d", h.path, wire.PortControl))
	must(t, err)
	defer l.Close()
	console := &vmmtest.Console{}
	h.m, err = vmm.New(vmm.Config{
		Accel: vmm.AccelTCG, Kernel: vmmtest.Kernel(t), Initramfs: initramfs(t),
		MemoryBytes: 512 << 20, CPUs: 2, DiskSlots: 3,
		GuestCID: 3, VsockPath: h.path, ConsoleLog: console, Cmdline: os.Getenv("GUEST_CMDLINE"),
	})
	must(t, err)
	ctx, cancel := context.WithTimeout(t.Context(), vmmtest.Timeout)
	defer cancel()
	must(t, h.m.Start(ctx))
	t.Cleanup(func() {
		h.m.Kill()
		<-h.m.Done()
		if t.Failed() {
			t.Logf("console:\n%s", console)
		}
	})
	l.(*net.UnixListener).SetDeadline(time.Now().Add(vmmtest.Timeout))
	h.control, err = l.Accept()
	must(t, err)
	t.Cleanup(func() { h.control.Close() })
	h.control.SetDeadline(time.Now().Add(vmmtest.Timeout))
	m, err := wire.Read(h.control)
	must(t, err)
	h.ready = m.(*wire.Ready)
	return h
}

// reply waits for the reply to id; events are kept.
func (h *host) reply(id uint32) *wire.Reply {
	h.t.Helper()
	for {
		h.control.SetDeadline(time.Now().Add(vmmtest.Timeout))
		m, err := wire.Read(h.control)
		must(h.t, err)
		if r, ok := m.(*wire.Reply); ok && r.ID == id {
			return r
		}
		h.events = append(h.events, m)
	}
}

// event waits for an unasked message of the type of want.
func event[M wire.Message](h *host) M {
	h.t.Helper()
	for {
		for i, m := range h.events {
			if m, ok := m.(M); ok {
				h.events = append(h.events[:i:i], h.events[i+1:]...)
				return m
			}
		}
		h.control.SetDeadline(time.Now().Add(vmmtest.Timeout))
		m, err := wire.Read(h.control)
		must(h.t, err)
		h.events = append(h.events, m)
	}
}

func (h *host) start(name string, slot int32) *wire.Reply {
	h.t.Helper()
	h.nextID++
	must(h.t, wire.Write(h.control, &wire.StartDistro{ID: h.nextID, Name: name, Slot: slot, Hostname: "box-" + name}))
	return h.reply(h.nextID)
}

func (h *host) stop(name string, idle bool) *wire.Reply {
	h.t.Helper()
	h.nextID++
	must(h.t, wire.Write(h.control, &wire.StopDistro{ID: h.nextID, Name: name, IfIdle: idle, GraceMillis: 2000}))
	return h.reply(h.nextID)
}

func (h *host) dial(port uint32, hello *wire.Hello) *net.UnixConn {
	h.t.Helper()
	c, err := net.Dial("unix", h.path)
	must(h.t, err)
	h.t.Cleanup(func() { c.Close() })
	c.SetDeadline(time.Now().Add(vmmtest.Timeout))
	b, err := wire.Append(fmt.Appendf(nil, "CONNECT %d\n", port), hello)
	must(h.t, err)
	_, err = c.Write(b)
	must(h.t, err)
	line := make([]byte, 1)
	for answer := ""; !strings.HasSuffix(answer, "\n"); answer += string(line) {
		if _, err := io.ReadFull(c, line); err != nil {
			h.t.Fatalf("connect to port %d: %v after %q", port, err, answer)
		}
	}
	return c.(*net.UnixConn)
}

// client is the launcher's side of one session.
type client struct {
	t                                   testing.TB
	control, stdin, stdout, stderr, pty *net.UnixConn
}

func (h *host) open(port uint32, m *wire.Start) *client {
	h.t.Helper()
	var id wire.SessionID
	rand.Read(id[:])
	c := &client{t: h.t}
	c.control = h.dial(port, &wire.Hello{Version: wire.Version, Role: wire.RoleControl, Session: id})
	must(h.t, wire.Write(c.control, m))
	for _, s := range []struct {
		bit  wire.Streams
		role wire.Role
		conn **net.UnixConn
	}{
		{wire.StreamStdin, wire.RoleStdin, &c.stdin}, {wire.StreamStdout, wire.RoleStdout, &c.stdout},
		{wire.StreamStderr, wire.RoleStderr, &c.stderr}, {wire.StreamPTY, wire.RolePTY, &c.pty},
	} {
		if m.Streams&s.bit != 0 {
			*s.conn = h.dial(port, &wire.Hello{Version: wire.Version, Role: s.role, Session: id})
		}
	}
	return c
}

func (c *client) next() wire.Message {
	c.t.Helper()
	m, err := wire.Read(c.control)
	must(c.t, err)
	return m
}

// until reads from the terminal up to and including text.
func (c *client) until(text string) string {
	c.t.Helper()
	c.pty.SetDeadline(time.Now().Add(20 * time.Second))
	var got []byte
	b := make([]byte, 1)
	for !bytes.HasSuffix(got, []byte(text)) {
		if _, err := io.ReadFull(c.pty, b); err != nil {
			c.t.Fatalf("%v after %q", err, got)
		}
		got = append(got, b...)
	}
	return string(got)
}

// run executes a command to its end and returns what it wrote.
func (h *host) run(port uint32, argv ...string) (out string, exit *wire.Exited) {
	h.t.Helper()
	c := h.open(port, &wire.Start{Argv: argv, Streams: wire.StreamStdout | wire.StreamStderr})
	var stderr string
	var wg sync.WaitGroup
	wg.Go(func() { b, _ := io.ReadAll(c.stdout); out = string(b) })
	wg.Go(func() { b, _ := io.ReadAll(c.stderr); stderr = string(b) })
	m := c.next()
	if _, ok := m.(*wire.Started); !ok {
		h.t.Fatalf("%q: %+v", argv, m)
	}
	exit = c.next().(*wire.Exited)
	wg.Wait()
	if uint64(len(out)) != exit.StdoutBytes || uint64(len(stderr)) != exit.StderrBytes {
		h.t.Errorf("%q: %d and %d bytes came, %+v", argv, len(out), len(stderr), exit)
	}
	if stderr != "" {
		h.t.Logf("%q: stderr: %s", argv, stderr)
	}
	return out, exit
}

func (h *host) ok(r *wire.Reply) *wire.Reply {
	h.t.Helper()
	if r.Code != wire.CodeOK {
		h.t.Fatalf("%+v", r)
	}
	return r
}

// shutdown powers the VM off and checks that it was meant.
func (h *host) shutdown() {
	h.t.Helper()
	must(h.t, wire.Write(h.control, &wire.Shutdown{ID: 1 << 30, GraceMillis: 2000}))
	h.ended()
}

func (h *host) ended() {
	h.t.Helper()
	ctx, cancel := context.WithTimeout(h.t.Context(), vmmtest.Timeout)
	defer cancel()
	exit, err := h.m.Wait(ctx)
	if err != nil || exit.Reason != engine.ReasonPowerOff {
		h.t.Errorf("the VM ended with %+v, %v", exit, err)
	}
}

func TestSystemDistro(t *testing.T) {
	h := boot(t)
	if h.ready.KernelRelease == "" || h.ready.BootNanos == 0 || h.ready.InitNanos < h.ready.BootNanos {
		t.Errorf("%+v", h.ready)
	}
	t.Logf("main at %d µs, Ready %d µs later", h.ready.BootNanos/1000, (h.ready.InitNanos-h.ready.BootNanos)/1000)
	port := h.ok(h.start("system", wire.SystemSlot)).Port
	if again := h.ok(h.start("system", wire.SystemSlot)).Port; again != port {
		t.Errorf("second start: port %d, first %d", again, port)
	}
	if out, exit := h.run(port, "uname", "-n"); out != "box-system\n" || exit.Status != 0 {
		t.Errorf("uname: %q %+v", out, exit)
	}
	if out, exit := h.run(port, "sh", "-c", "echo $WSL_DISTRO_NAME; exit 3"); out != "system\n" || exit.Status != 3 {
		t.Errorf("sh: %q %+v", out, exit)
	}
	// Its namespaces are its own, and it sees nothing of the VM's root.
	out, _ := h.run(port, "sh", "-c", "ls /; cat /proc/self/cgroup; cat /proc/mounts; cat /proc/1/cmdline; ls /sys/fs/cgroup; ls /dev; ps")
	t.Log(out)
	for _, want := range []string{"\n0::/\n", "wsl2-distro", "cgroup.procs", "proc /proc proc", "devpts /dev/pts devpts"} {
		if !strings.Contains(out, want) {
			t.Errorf("lacks %q", want)
		}
	}
	for _, not := range []string{"system.tar.gz", "devtmpfs", "vda", "/distro"} {
		if strings.Contains(out, not) {
			t.Errorf("shows %q", not)
		}
	}
	event[*wire.DistroIdle](h)
	c := h.open(port, &wire.Start{Shell: wire.ShellLogin, Streams: wire.StreamPTY, Size: wire.WindowSize{Rows: 24, Cols: 80}})
	if m, ok := c.next().(*wire.Started); !ok {
		t.Fatalf("%+v", m)
	}
	if r := h.stop("system", true); r.Code != wire.CodeBusy {
		t.Errorf("stop if idle with a shell: %+v", r)
	}
	h.events = nil // commands before the shell left word of their ends
	prompt := c.until("$ ")
	io.WriteString(c.pty, "tty\r")
	prompt += c.until("/dev/pts/0\r\n$ ")
	io.WriteString(c.pty, "exit\r")
	all, err := io.ReadAll(c.pty)
	if err != nil {
		t.Fatalf("login shell: %v after %q %q", err, prompt, all)
	}
	if e := c.next().(*wire.Exited); e.Status != 0 || e.PTYBytes != uint64(len(prompt)+len(all)) {
		t.Errorf("login shell: %+v %q %q", e, prompt, all)
	}
	event[*wire.DistroIdle](h)
	io.Copy(io.Discard, c.control)
	h.ok(h.stop("system", true))
	if r := h.stop("system", false); r.Code != wire.CodeUnknownDistro {
		t.Errorf("second stop: %+v", r)
	}
	port = h.ok(h.start("system", wire.SystemSlot)).Port
	// The init's death from inside is told, and a stop with processes ends them.
	if _, exit := h.run(port, "sh", "-c", "kill -15 1; kill -2 1; kill -9 1; echo alive"); exit.Status != 0 {
		t.Errorf("the distro's init does not survive kill: %+v", exit)
	}
	c = h.open(port, &wire.Start{Argv: []string{"sleep", "1000"}})
	c.next()
	// A stop that must happen is not lost behind one that is refused.
	for _, m := range []*wire.StopDistro{{ID: 1000, Name: "system", IfIdle: true}, {ID: 1001, Name: "system", GraceMillis: 2000}} {
		must(t, wire.Write(h.control, m))
	}
	h.ok(h.reply(1001))
	if e, ok := c.next().(*wire.Exited); !ok || e.Signal != 15 {
		t.Errorf("session of a stopped distro: %+v", e)
	}
	h.shutdown()
}

// systemTar is the system distro's root, for want of any other at hand; cut to
// what an import needs to be tested.
func systemTar(t testing.TB) []byte {
	t.Helper()
	f, err := os.Open(initramfs(t))
	must(t, err)
	defer f.Close()
	records, err := cpio.ReadAllRecords(cpio.Newc.Reader(f))
	must(t, err)
	for _, r := range records {
		if r.Name == "system.tar.gz" {
			z, err := gzip.NewReader(io.NewSectionReader(r.ReaderAt, 0, int64(r.FileSize)))
			must(t, err)
			b, err := io.ReadAll(z)
			must(t, err)
			return b
		}
	}
	t.Fatal("no system distro in the initramfs")
	return nil
}

// disk makes a fresh sparse ext4 image.
func disk(t testing.TB, mib int) string {
	t.Helper()
	p := filepath.Join(t.TempDir(), "disk.img")
	out, err := exec.Command("mke2fs", "-q", "-t", "ext4", "-m", "0", "-E", "lazy_itable_init=1,lazy_journal_init=1", p, fmt.Sprintf("%dM", mib)).CombinedOutput()
	if err != nil {
		t.Fatalf("mke2fs: %v %s", err, out)
	}
	return p
}

func fsck(t testing.TB, path string) {
	t.Helper()
	if out, err := exec.Command("e2fsck", "-fn", path).CombinedOutput(); err != nil {
		t.Errorf("e2fsck: %v\n%s", err, out)
	}
}

func (h *host) attach(path string) int32 {
	h.t.Helper()
	slot, err := h.m.AttachDisk(h.t.Context(), vmm.Disk{Path: path})
	must(h.t, err)
	return int32(slot)
}

func (h *host) detach(slot int32) {
	h.t.Helper()
	must(h.t, h.m.DetachDisk(h.t.Context(), int(slot)))
}

// importTar imports archive into slot; closing says how the archive's connection ends.
func (h *host) importTar(slot int32, archive []byte) *wire.Reply {
	h.t.Helper()
	h.nextID++
	id := h.nextID
	m := &wire.Import{ID: id, Slot: slot}
	rand.Read(m.Archive[:])
	must(h.t, wire.Write(h.control, m))
	ready := event[*wire.ImportReady](h)
	if ready.ID != id {
		h.t.Fatalf("%+v", ready)
	}
	c := h.dial(ready.Port, &wire.Hello{Version: wire.Version, Role: wire.RoleArchive, Session: m.Archive})
	if _, err := c.Write(archive); err == nil {
		c.CloseWrite()
	}
	return h.reply(id)
}

// refusedImport asks for an import that does not come to its archive.
func (h *host) refusedImport(slot int32) *wire.Reply {
	h.t.Helper()
	h.nextID++
	must(h.t, wire.Write(h.control, &wire.Import{ID: h.nextID, Slot: slot}))
	return h.reply(h.nextID)
}

func TestImportAndRun(t *testing.T) {
	h := boot(t)
	path := disk(t, 256)
	slot := h.attach(path)
	h.ok(h.importTar(slot, systemTar(t)))
	if r := h.refusedImport(slot); r.Code != wire.CodeRefused || !strings.Contains(r.Text, "not empty") {
		t.Errorf("import over a distro: %+v", r)
	}
	h.detach(slot)
	fsck(t, path)

	for round := range 3 {
		slot = h.attach(path)
		port := h.ok(h.start("mine", slot)).Port
		out, exit := h.run(port, "sh", "-c", fmt.Sprintf("cat /round; echo -n %d >>/round; uname -n; grep ' / ' /proc/mounts", round))
		if exit.Status != 0 && round > 0 {
			t.Errorf("%+v", exit)
		}
		if want := "012"[:round] + "box-mine\n"; !strings.Contains(out, want) || !strings.Contains(out, "ext4 rw,noatime") {
			t.Errorf("round %d: %q", round, out)
		}
		if round == 0 { // a disk in use is not used twice
			if r := h.start("again", slot); r.Code != wire.CodeBusy {
				t.Errorf("a second distro from the same disk: %+v", r)
			}
			if r := h.refusedImport(slot); r.Code != wire.CodeBusy {
				t.Errorf("import to a running distro's disk: %+v", r)
			}
		}
		if round == 1 { // a second distro beside it, from another disk
			other := disk(t, 128)
			s2 := h.attach(other)
			h.ok(h.importTar(s2, systemTar(t)))
			p2 := h.ok(h.start("other", s2)).Port
			if out, _ := h.run(p2, "ls", "/"); !strings.Contains(out, "bin\n") || strings.Contains(out, "round") {
				t.Errorf("one distro sees the other's root: %q", out)
			}
			h.ok(h.stop("other", false))
			h.detach(s2)
			fsck(t, other)
		}
		h.ok(h.stop("mine", false))
		h.detach(slot)
		fsck(t, path)
	}
	h.shutdown()
}

func tarOf(t testing.TB, headers ...*tar.Header) []byte {
	t.Helper()
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for _, hd := range headers {
		must(t, w.WriteHeader(hd))
		_, err := w.Write(make([]byte, hd.Size))
		must(t, err)
	}
	must(t, w.Close())
	return b.Bytes()
}

func TestImportRefuses(t *testing.T) {
	h := boot(t)
	system := systemTar(t)
	for name, c := range map[string]struct {
		archive []byte
		code    wire.Code
		text    string
	}{
		"not a tar": {bytes.Repeat([]byte("no tar "), 1000), wire.CodeArchive, "not a tar"},
		"empty":     {nil, wire.CodeArchive, "holds nothing"},
		"truncated": {system[:len(system)/2], wire.CodeArchive, "cut off"},
		"dot dot":   {tarOf(t, &tar.Header{Name: "../../etc/passwd", Size: 3, Mode: 0o644}), wire.CodeArchive, "refused"},
		"no shell":  {tarOf(t, &tar.Header{Name: "etc/", Typeflag: tar.TypeDir, Mode: 0o755}), wire.CodeNoShell, "no shell"},
		"no etc":    {tarOf(t, &tar.Header{Name: "bin/sh", Mode: 0o755}), wire.CodeNoShell, "/etc"},
		"disk full": {tarOf(t, &tar.Header{Name: "big", Size: 64 << 20, Mode: 0o644}), wire.CodeNoSpace, "no space"},
	} {
		t.Run(name, func(t *testing.T) {
			path := disk(t, 16)
			slot := h.attach(path)
			if r := h.importTar(slot, c.archive); r.Code != c.code || !strings.Contains(r.Text, c.text) {
				t.Errorf("%+v, want code %d with %q", r, c.code, c.text)
			}
			h.detach(slot)
			fsck(t, path)
		})
	}
	t.Run("empty slot", func(t *testing.T) {
		if r := h.start("nothing", 2); r.Code != wire.CodeDisk || !strings.Contains(r.Text, "no disk is attached") {
			t.Errorf("%+v", r)
		}
	})
	t.Run("no such slot", func(t *testing.T) {
		if r := h.start("nothing", 20); r.Code != wire.CodeDisk || !strings.Contains(r.Text, "no such disk slot") {
			t.Errorf("%+v", r)
		}
		if r := h.start("nothing", 99); r.Code != wire.CodeRefused {
			t.Errorf("%+v", r)
		}
	})
	t.Run("not ext4", func(t *testing.T) {
		path := filepath.Join(t.TempDir(), "zeros")
		must(t, os.WriteFile(path, make([]byte, 1<<20), 0o600))
		slot := h.attach(path)
		if r := h.start("nothing", slot); r.Code != wire.CodeDisk || !strings.Contains(r.Text, "the kernel says") {
			t.Errorf("%+v", r)
		}
		h.detach(slot)
	})
	h.shutdown()
}

// TestServiceDies: the VM stops cleanly when its control channel ends.
func TestServiceDies(t *testing.T) {
	h := boot(t)
	path := disk(t, 128)
	slot := h.attach(path)
	h.ok(h.importTar(slot, systemTar(t)))
	port := h.ok(h.start("mine", slot)).Port
	h.run(port, "sh", "-c", "echo x >/file")
	h.control.Close()
	h.ended()
	fsck(t, path)
}

// TestBrokenControl: a frame that makes no sense ends the VM as the channel's end does.
func TestBrokenControl(t *testing.T) {
	h := boot(t)
	io.WriteString(h.control, "\xff\xff\xff\xff\xff")
	h.ended()
}
