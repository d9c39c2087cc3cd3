package main

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/wsl2/wsl2/internal/wire"
)

// guestCID is QEMU's guest's.
const guestCID = 3

// qemu is the peer: QEMU's microvm on KVM, with virtio-blk and vhost-vsock, and
// in place of wsl2 a program that does nothing but wait for it.
type qemu struct {
	cmd     *exec.Cmd
	errs    bytes.Buffer
	started time.Time
	control socket
	net     wire.Network
	ready   wire.Ready
	port    uint32 // the distro's session port
	id      uint32
}

// peerNet4 and peerNet6 are the networks of QEMU's own NAT, its defaults.
const peerNet4, peerNet6 = "10.0.2.0/24", "fec0::/64"

func qemuArgs(disk string, net card, more ...string) []string {
	args := []string{
		"-M", "microvm,accel=kvm,acpi=off,pic=off,pit=off,rtc=off,isa-serial=off,x-option-roms=off",
		"-cpu", "host", "-m", strconv.Itoa(memoryMiB), "-smp", strconv.Itoa(vCPUs),
		"-L", "/usr/share/qemu", "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot",
		"-kernel", kernelPath, "-initrd", initramfsPath,
		// Package vmm's line without what is about its own devices.
		"-append", "panic=-1 reboot=t quiet noreplace-smp retain_initrd spec_rstack_overflow=off tsc=reliable " + rigCmdline(),
		"-device", "isa-debug-exit,iobase=0xf4,iosize=1",
		"-device", fmt.Sprintf("vhost-vsock-device,guest-cid=%d", guestCID),
	}
	args = append(args, net.args...) // as ours has one
	if disk != "" {
		args = append(args, "-drive", "if=none,id=disk,format=raw,cache=writeback,discard=unmap,file="+disk, "-device", "virtio-blk-device,drive=disk")
	}
	return append(args, more...)
}

// startQEMU runs QEMU and returns when its guest's first distro serves: from the
// disk, or the system distro if there is none.
func startQEMU(disk string, net card, more ...string) (q *qemu, err error) {
	l, err := unix.Socket(unix.AF_VSOCK, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("vsock: %w", err)
	}
	defer unix.Close(l)
	if err := errors.Join(unix.Bind(l, &unix.SockaddrVM{CID: unix.VMADDR_CID_ANY, Port: wire.PortControl}), unix.Listen(l, 1)); err != nil {
		return nil, fmt.Errorf("listen on vsock port %d: %w", wire.PortControl, err)
	}
	// A QEMU that dies would leave accept waiting.
	if err := setTimeouts(l); err != nil {
		return nil, err
	}
	q = &qemu{control: -1, net: net.network, cmd: exec.Command(qemuPath, qemuArgs(disk, net, more...)...)}
	q.cmd.Stdout, q.cmd.Stderr = &q.errs, &q.errs
	q.started = time.Now()
	if err := q.cmd.Start(); err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			q.kill()
			err = fmt.Errorf("%s: %w: %s", peerQEMU, err, bytes.TrimSpace(q.errs.Bytes()))
		}
	}()
	c, _, err := unix.Accept(l)
	if err == unix.EAGAIN {
		err = errHang
	}
	if err != nil {
		return q, fmt.Errorf("no connection from its guest: %w", err)
	}
	q.control = socket(c)
	if err := setTimeouts(c); err != nil {
		return q, err
	}
	m, err := wire.Read(q.control)
	if err != nil {
		return q, err
	}
	ready, ok := m.(*wire.Ready)
	if !ok {
		return q, fmt.Errorf("%v in place of Ready", m.Type())
	}
	q.ready = *ready
	slot := int32(0)
	if disk == "" {
		slot = wire.SystemSlot
	}
	q.port, err = q.startDistro(slot)
	return q, err
}

func (q *qemu) startDistro(slot int32) (port uint32, err error) {
	q.id++
	var b []byte
	if q.id == 1 { // what the service says first
		b, err = wire.Append(b, &q.net)
	}
	if err == nil {
		b, err = wire.Append(b, &wire.StartDistro{ID: q.id, Name: distroName, Slot: slot, Hostname: "bench"})
	}
	if err == nil {
		_, err = q.control.Write(b)
	}
	if err != nil {
		return 0, err
	}
	for {
		m, err := wire.Read(q.control)
		if err != nil {
			return 0, err
		}
		if r, ok := m.(*wire.Reply); ok {
			if r.Code != wire.CodeOK {
				return 0, errors.New(r.Text)
			}
			return r.Port, nil
		}
	}
}

func (q *qemu) dial() (socket, error) { return dialVsock(guestCID, q.port) }

// output runs a program in the guest and returns what it prints.
func (q *qemu) output(argv ...string) (string, error) {
	s, err := startSession(q.dial, false, argv...)
	if err != nil {
		return "", err
	}
	defer s.close()
	out, err := io.ReadAll(s.stdout)
	if err == nil {
		err = s.wait()
	}
	if err != nil {
		err = fmt.Errorf("%s: %s: %w", peerQEMU, strings.Join(argv, " "), err)
	}
	return string(out), err
}

// stop powers the guest off, with its disk clean, and waits for QEMU's end.
func (q *qemu) stop() error {
	q.id++
	if err := wire.Write(q.control, &wire.Shutdown{ID: q.id, GraceMillis: 1000}); err != nil {
		return err
	}
	watchdog := time.AfterFunc(hangs, func() { q.cmd.Process.Kill() })
	q.cmd.Wait() // isa-debug-exit makes the status 1
	watchdog.Stop()
	return q.control.Close()
}

func (q *qemu) kill() {
	q.cmd.Process.Kill()
	q.cmd.Wait()
	if q.control >= 0 {
		q.control.Close()
	}
}

// vmExits reads how often the VM of a process has left its guest, from KVM's
// debugfs. The rig adds one for each interrupt (scripts/internal/rig/l1). Of several VMs, as a probe's that is being released, the busiest counts.
func vmExits(pid int) (exits float64, err error) {
	var found []string
	for tid := range threads(pid) { // named after the thread that made the VM
		of, _ := filepath.Glob(fmt.Sprintf("/sys/kernel/debug/kvm/%d-*/exits", tid))
		found = append(found, of...)
	}
	if len(found) == 0 {
		return 0, fmt.Errorf("KVM keeps no statistics of a VM of pid %d", pid)
	}
	for _, f := range found {
		text, err := os.ReadFile(f)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return 0, err
		}
		n, err := strconv.ParseFloat(strings.TrimSpace(string(text)), 64)
		if err != nil {
			return 0, err
		}
		exits = max(exits, n)
	}
	return exits, nil
}
