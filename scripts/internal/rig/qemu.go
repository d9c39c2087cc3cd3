package main

import (
	"archive/tar"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/wsl2/wsl2/scripts/internal/rig/spec"
)

// grace is how long a command that was told to end may take before the whole
// rig is ended: Go's stacks of a large program are printed within it, under TCG.
const grace = 15 * time.Second

// port is one virtio-serial port: our end of its socket, and QEMU's.
type port struct {
	name        string
	ours, qemus *os.File
}

func newPort(name string) (*port, error) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	return &port{name, os.NewFile(uintptr(fds[0]), name), os.NewFile(uintptr(fds[1]), name)}, nil
}

// arguments is QEMU's command line; files are its descriptors from 3 on.
func (m *machine) arguments(ports []*port, serial *os.File) (args []string, files []*os.File) {
	fd := func(f *os.File) int {
		files = append(files, f)
		return 2 + len(files)
	}
	cmdline := []string{"console=ttyS0", "panic=-1", "quiet", "random.trust_cpu=on", "tsc=reliable", "no_timer_check"}
	args = []string{
		"-M", "q35,usb=off,vmport=off,smbus=off,sata=off", "-cpu", "EPYC,+svm,+npt,-cx16", // cx16: see ARCHITECTURE.md, the rig avoids
		"-m", fmt.Sprint(m.c.memory), "-smp", fmt.Sprint(m.c.cpus),
		"-nodefaults", "-no-user-config", "-display", "none", "-no-reboot",
		"-kernel", m.host.kernel(), "-initrd", fmt.Sprintf("/dev/fd/%d", fd(m.initrd)),
	}
	// One thread: with one for each CPU, kernels that patch their own code on one
	// CPU while another runs it have died at the patched instruction.
	args = append(args, "-accel", "tcg,thread=single")
	if m.c.icount {
		args = append(args, "-icount", "shift=0,sleep=off", "-seed", "42", "-rtc", "base=2026-01-01,clock=vm")
		cmdline = append(cmdline, "nokaslr", "norandmaps")
	} else {
		args = append(args, "-device", "virtio-rng-pci")
	}
	args = append(args, "-chardev", fmt.Sprintf("socket,id=console,fd=%d", fd(serial)), "-serial", "chardev:console",
		"-device", "virtio-serial-pci,max_ports=8")
	for _, p := range ports {
		args = append(args, "-chardev", fmt.Sprintf("socket,id=%s,fd=%d", p.name, fd(p.qemus)),
			"-device", fmt.Sprintf("virtserialport,chardev=%s,name=%s", p.name, p.name))
	}
	if m.disk != nil {
		args = append(args, "-blockdev", fmt.Sprintf("driver=file,node-name=scratch,filename=/dev/fd/%d,locking=off,discard=unmap,cache.direct=off,cache.no-flush=on", fd(m.disk)),
			"-device", "virtio-blk-pci,drive=scratch")
	}
	if m.c.append != "" {
		cmdline = append(cmdline, m.c.append)
	}
	args = append(args, "-append", strings.Join(cmdline, " "))
	return append(args, m.c.qemuArgs...), files
}

// run runs the machine and returns the exit status for rig's own.
func (m *machine) run(deadline <-chan time.Time, signals <-chan os.Signal) (int, error) {
	names := []string{spec.PortStdout, spec.PortStderr, spec.PortStatus, spec.PortControl}
	if m.spec.Stdin {
		names = append(names, spec.PortStdin)
	}
	if len(m.spec.Get) > 0 {
		names = append(names, spec.PortFiles)
	}
	var ports []*port
	byName := map[string]*port{}
	defer func() {
		for _, p := range ports {
			p.ours.Close()
			p.qemus.Close()
		}
	}()
	for _, n := range append(names, "console") {
		p, err := newPort(n)
		if err != nil {
			return exitRig, err
		}
		ports = append(ports, p)
		byName[n] = p
	}
	args, files := m.arguments(ports[:len(ports)-1], byName["console"].qemus)
	qemu := exec.Command(m.c.qemu, args...)
	complaints := &tail{}
	qemu.Stderr = complaints
	qemu.ExtraFiles = files
	// A signal for the terminal's group is for rig, which passes it into the
	// machine; and QEMU must not outlive rig, whatever becomes of that.
	qemu.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGKILL}
	runtime.LockOSThread() // Pdeathsig is about the thread that forked
	if err := qemu.Start(); err != nil {
		if errors.Is(err, exec.ErrNotFound) {
			return exitRig, fmt.Errorf("%s is missing; install qemu-system-x86", m.c.qemu)
		}
		return exitRig, err
	}
	for _, p := range ports {
		p.qemus.Close()
	}

	console := &tail{}
	if m.c.console {
		console.also = os.Stderr
	}
	var status tail
	var filesErr error
	var outputs sync.WaitGroup
	pump := func(name string, to io.Writer) {
		outputs.Add(1)
		go func() {
			defer outputs.Done()
			io.Copy(struct{ io.Writer }{to}, struct{ io.Reader }{byName[name].ours})
		}()
	}
	// An output that nobody reads any more must not stop the machine.
	pump(spec.PortStdout, &sink{w: os.Stdout})
	pump(spec.PortStderr, &sink{w: os.Stderr})
	pump(spec.PortStatus, &status)
	pump("console", console)
	if p := byName[spec.PortFiles]; p != nil {
		outputs.Add(1)
		go func() {
			defer outputs.Done()
			filesErr = m.receive(p.ours)
			io.Copy(io.Discard, p.ours)
		}()
	}
	if p := byName[spec.PortStdin]; p != nil {
		go func() { // ends with rig: a read of stdin cannot be called off
			io.Copy(struct{ io.Writer }{p.ours}, struct{ io.Reader }{os.Stdin})
			unix.Shutdown(int(p.ours.Fd()), unix.SHUT_WR)
		}()
	}
	ended := make(chan error, 1)
	go func() {
		outputs.Wait()
		ended <- qemu.Wait()
	}()

	timedOut := false
	var interrupted os.Signal
	var last <-chan time.Time
	tell := func(sig syscall.Signal) {
		byName[spec.PortControl].ours.Write([]byte{byte(sig)})
		if last == nil {
			last = time.After(grace)
		}
	}
	var qemuErr error
wait:
	for {
		select {
		case qemuErr = <-ended:
			break wait
		case <-deadline:
			timedOut = true
			tell(syscall.SIGQUIT)
		case s := <-signals:
			if interrupted != nil { // asked twice: at once
				qemu.Process.Kill()
			}
			interrupted = s
			tell(s.(syscall.Signal))
		case <-last:
			qemu.Process.Kill()
		}
	}

	var st spec.Status
	if err := json.Unmarshal(status.buf, &st); err != nil {
		st = spec.Status{}
	}
	known := st.Exited != nil || st.Signal != nil || st.Error != ""
	switch {
	case timedOut:
		err := fmt.Errorf("%s had not ended after %v (--timeout)", m.spec.Args[0], m.c.timeout)
		if !known {
			err = fmt.Errorf("%w; the rig's console:\n%s", err, console.lines(25))
		}
		return exitTimeout, err
	case interrupted != nil && !known:
		return 128 + int(interrupted.(syscall.Signal)), fmt.Errorf("ended by %v", interrupted)
	case !known:
		text := "the rig ended without the command's status"
		if qemuErr != nil {
			text = fmt.Sprintf("QEMU: %v", qemuErr)
		}
		if s := complaints.lines(10); s != "" {
			text += "\n" + s
		}
		if s := console.lines(25); s != "" {
			text += "\nthe rig's console:\n" + s
		}
		return exitRig, errors.New(text)
	case st.NotFound:
		return exitNotFound, fmt.Errorf("in the rig: %s", st.Error)
	case st.Error != "":
		return exitNotRun, fmt.Errorf("in the rig: %s", st.Error)
	case filesErr != nil:
		return exitRig, fmt.Errorf("bring back files: %w", filesErr)
	case st.Signal != nil:
		return 128 + *st.Signal, fmt.Errorf("%s was killed by signal %d (%v)", m.spec.Args[0], *st.Signal, syscall.Signal(*st.Signal))
	}
	return *st.Exited, nil
}

// sink goes on reading when its writer fails.
type sink struct {
	w      io.Writer
	failed bool
}

func (s *sink) Write(p []byte) (int, error) {
	if !s.failed {
		if _, err := s.w.Write(p); err != nil {
			s.failed = true
		}
	}
	return len(p), nil
}

// receive stores the files that the command left behind.
func (m *machine) receive(r io.Reader) error {
	tr := tar.NewReader(r)
	for {
		h, err := tr.Next()
		if err == io.EOF {
			return nil
		}
		if err != nil {
			return err
		}
		to, ok := m.destination(path.Clean(h.Name))
		if !ok {
			return fmt.Errorf("the rig sent %s, which nobody asked for", h.Name)
		}
		if err := os.MkdirAll(filepath.Dir(to), 0o755); err != nil {
			return err
		}
		f, err := os.OpenFile(to, os.O_CREATE|os.O_WRONLY|os.O_TRUNC, os.FileMode(h.Mode).Perm())
		if err != nil {
			return err
		}
		_, err = io.Copy(f, tr)
		if e := f.Close(); err == nil {
			err = e
		}
		if err != nil {
			return err
		}
	}
}

// destination maps a path in the rig to one here.
func (m *machine) destination(name string) (string, bool) {
	for from, to := range m.gets {
		if name == from {
			return to, true
		}
		if rest, ok := strings.CutPrefix(name, from+"/"); ok {
			return filepath.Join(to, filepath.FromSlash(rest)), true
		}
	}
	return "", false
}
