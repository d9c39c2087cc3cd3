package main

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strconv"
	"time"

	"golang.org/x/sys/unix"

	"github.com/wsl2/wsl2/scripts/bench/report"
)

// firstWords is what the guest's only program writes to the kernel's log, whence it
// goes to the console (guest/main.go): a virtio console where the monitor has one.
const firstWords = "hi"

// monitor is a VM monitor that boots the kernel and a program that writes one line.
type monitor struct {
	name string
	argv []string
	// runs is how often it is measured; of more than one the first does not count.
	runs int
	// limit is how long, in the rig's time, it may take.
	limit time.Duration
}

// monitors measures monitors alone: from the exec of each to the first line of a
// guest that has a kernel and one program, and what it takes beside the guest's
// memory. Ours is package vmm without launcher, distro or vsock.
func monitors(*host) ([]report.Row, error) {
	mem, cpus := strconv.Itoa(memoryMiB), strconv.Itoa(vCPUs)
	line := " panic=-1 reboot=t quiet noreplace-smp tsc=reliable random.trust_cpu=on " + rigCmdline()
	list := []monitor{
		{"wsl2", []string{monitorPath, kernelPath, barePath, mem, cpus}, 4, 300 * time.Millisecond},
		{peerQEMU, []string{qemuPath, "-M", "microvm,accel=kvm,acpi=off,pic=off,pit=off,rtc=off,isa-serial=off,x-option-roms=off",
			"-cpu", "host", "-m", mem, "-smp", cpus, "-L", "/usr/share/qemu", "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot",
			"-chardev", "stdio,id=console", "-device", "virtio-serial-device,max_ports=1", "-device", "virtconsole,chardev=console",
			"-kernel", kernelPath, "-initrd", barePath, "-append", "console=hvc0" + line}, 4, 500 * time.Millisecond},
		// It takes bzImages only, fills the guest's memory before it starts, and has no
		// console but a serial port, through which the early console prints every line.
		{"gokvm", []string{gokvmPath, "boot", "-k", bzImagePath, "-i", barePath, "-m", mem + "M", "-c", cpus, "-p", "earlyprintk=serial,0x3f8,115200,keep" + line}, 1, 10 * time.Second},
	}
	times := report.Row{Row: "monitor alone: exec to the first line of the guest's program", Unit: "ms", Peers: map[string]float64{}}
	exits := report.Row{Row: "monitor alone: VM exits until then", Unit: "exits", Peers: map[string]float64{}}
	for i, m := range list {
		var ms, ex []float64
		for len(ms) < m.runs {
			f, err := m.measure()
			if err != nil {
				return nil, fmt.Errorf("%s: %w", m.name, err)
			}
			logf("%s: %.2f ms, %.0f exits", m.name, f.ms, f.exits)
			ms, ex = append(ms, f.ms), append(ex, f.exits)
		}
		discard := min(1, m.runs-1)
		if t, e := median(ms[discard:]), median(ex[discard:]); i == 0 {
			times.Ours, exits.Ours = t, e
		} else {
			times.Peers[m.name], exits.Peers[m.name] = t, e
		}
	}
	return []report.Row{times, exits}, nil
}

// measure runs the monitor until the guest's line comes, and ends it.
func (m monitor) measure() (f bootFigures, err error) {
	r, w, err := os.Pipe()
	if err != nil {
		return f, err
	}
	defer r.Close()
	var errs bytes.Buffer
	c := exec.Command(m.argv[0], m.argv[1:]...)
	c.Stdout, c.Stderr = w, &errs
	start := time.Now()
	err = c.Start()
	w.Close()
	if err != nil {
		return f, err
	}
	watchdog := time.AfterFunc(m.limit, func() { c.Process.Kill() })
	var seen []byte
	b := make([]byte, 512)
	for err == nil && !bytes.Contains(seen, []byte(firstWords+"\r\n")) && !bytes.Contains(seen, []byte(firstWords+"\n")) {
		var n int
		n, err = unix.Read(int(r.Fd()), b)
		if seen = append(seen, b[:max(n, 0)]...); n == 0 && err == nil {
			err = errors.New("it ended without a word of the guest's program")
		}
	}
	f.ms = time.Since(start).Seconds() * 1e3
	if err == nil {
		f.exits, err = vmExits(c.Process.Pid)
	}
	if !watchdog.Stop() {
		err = errHang
	}
	c.Process.Kill()
	c.Wait()
	if err != nil && !errors.Is(err, errHang) {
		err = fmt.Errorf("%w: %s %s", err, errs.Bytes(), seen)
	}
	return f, err
}
