package main

import (
	"archive/tar"
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// host is a user's wsl2 with one distro.
type host struct {
	dir  string
	env  []string
	disk string // the distro's
}

const distroName = "bench"

// guestTool is guestPath inside the distro.
const guestTool = "/bin/guest"

func newHost() (*host, error) {
	h := &host{dir: "/bench.host"}
	for _, m := range []struct{ kind, dir string }{{"debugfs", "/sys/kernel/debug"}, {"tracefs", "/sys/kernel/tracing"}} {
		if err := unix.Mount(m.kind, m.dir, m.kind, 0, ""); err != nil && !errors.Is(err, unix.EBUSY) {
			return nil, fmt.Errorf("mount %s: %w", m.kind, err)
		}
	}
	h.env = []string{"HOME=" + h.dir, "PATH=/rig/bin:/usr/sbin:/usr/bin:/sbin:/bin", "LANG=C.UTF-8", "XDG_RUNTIME_DIR=" + h.dir + "/run",
		"WSL2_KERNEL=" + kernelPath, "WSL2_INITRAMFS=" + initramfsPath}
	for _, d := range []string{"run", ".config/wsl2"} {
		if err := os.MkdirAll(filepath.Join(h.dir, d), 0o700); err != nil {
			return nil, err
		}
	}
	config := fmt.Sprintf("[wsl2]\nmemory=%dMB\nprocessors=%d\ndefaultVhdSize=1GB\nvmIdleTimeout=-1\n[general]\ninstanceIdleTimeout=-1\n", memoryMiB, vCPUs)
	for _, p := range []string{".config/wsl2/wslconfig"} {
		if err := os.WriteFile(filepath.Join(h.dir, p), []byte(config), 0o600); err != nil {
			return nil, err
		}
	}
	root, err := distroTar()
	if err != nil {
		return nil, err
	}
	archive := filepath.Join(h.dir, "root.tar")
	if err := os.WriteFile(archive, root, 0o600); err != nil {
		return nil, err
	}
	logf("importing the distro")
	if _, err := h.run("--import", distroName, archive); err != nil {
		return nil, fmt.Errorf("%w\n%s", err, h.logs())
	}
	disks, err := filepath.Glob(filepath.Join(h.dir, ".local/share/wsl2/distros/*/*"))
	if err != nil || len(disks) != 1 {
		return nil, fmt.Errorf("the import left %d files of a distro: %v", len(disks), disks)
	}
	h.disk = disks[0]
	return h, h.shutdown()
}

// distroTar is a distro of a static busybox and the benchmark's own program.
func distroTar() ([]byte, error) {
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	add := func(name string, typ byte, link string, mode int64, content []byte) error {
		err := w.WriteHeader(&tar.Header{Name: name, Typeflag: typ, Linkname: link, Mode: mode, Size: int64(len(content))})
		if err == nil {
			_, err = w.Write(content)
		}
		return err
	}
	var errs []error
	for _, d := range []string{"bin", "etc", "dev", "proc", "sys", "run", "tmp", "root", "var"} {
		errs = append(errs, add(d+"/", tar.TypeDir, "", 0o755, nil))
	}
	for to, from := range map[string]string{"bin/busybox": busyboxPath, "bin/guest": guestPath} {
		content, err := os.ReadFile(from)
		errs = append(errs, err, add(to, tar.TypeReg, "", 0o755, content))
	}
	for _, applet := range []string{"sh", "echo", "true", "cat", "dmesg", "rm"} {
		errs = append(errs, add("bin/"+applet, tar.TypeSymlink, "busybox", 0o777, nil))
	}
	errs = append(errs,
		add("etc/passwd", tar.TypeReg, "", 0o644, []byte("root:x:0:0:root:/root:/bin/sh\n")),
		add("etc/group", tar.TypeReg, "", 0o644, []byte("root:x:0:\n")),
		w.Close())
	return b.Bytes(), errors.Join(errs...)
}

// wsl2 is a command of the user.
func (h *host) wsl2(args ...string) *exec.Cmd {
	c := exec.Command(wsl2Path, args...)
	c.Env, c.Dir = h.env, "/"
	return c
}

// output runs a command in the distro and returns what it prints.
func (h *host) output(args ...string) (string, error) {
	return h.run(append([]string{"-d", distroName, "-e"}, args...)...)
}

// hangs is how long, in the rig's time, nothing that is measured can take.
const hangs = 2 * time.Second

// run runs a command of the user and returns what it prints.
func (h *host) run(args ...string) (string, error) {
	c := h.wsl2(args...)
	var out, errs bytes.Buffer
	c.Stdout, c.Stderr = &out, &errs
	if err := c.Start(); err != nil {
		return "", err
	}
	state := ""
	watchdog := time.AfterFunc(hangs, func() {
		state = h.diagnose()
		c.Process.Kill()
	})
	err := c.Wait()
	if !watchdog.Stop() {
		err = fmt.Errorf("hangs\n%s", state)
	}
	if err != nil {
		return "", fmt.Errorf("wsl2 %s: %w: %s", strings.Join(args, " "), err, bytes.TrimSpace(errs.Bytes()))
	}
	return out.String(), nil
}

// shutdown stops the VM and waits until no process of wsl2 is left.
func (h *host) shutdown() error {
	if _, err := h.run("--shutdown"); err != nil {
		return err
	}
	for deadline := time.Now().Add(time.Minute); time.Now().Before(deadline); time.Sleep(5 * time.Millisecond) {
		if len(processes("")) == 0 {
			return nil
		}
	}
	return fmt.Errorf("after wsl2 --shutdown processes are left: %v", processes(""))
}

// processes are the pids of wsl2's processes of a role ("service" or "vm"; "": all).
func processes(role string) (pids []int) {
	found, _ := filepath.Glob("/proc/[0-9]*")
	for _, p := range found {
		exe, err := os.Readlink(p + "/exe")
		if err != nil || exe != wsl2Path {
			continue
		}
		line, err := os.ReadFile(p + "/cmdline")
		args := strings.Split(string(line), "\x00")
		if err != nil || role != "" && (len(args) < 2 || args[1] != role) {
			continue
		}
		if pid, err := strconv.Atoi(filepath.Base(p)); err == nil {
			pids = append(pids, pid)
		}
	}
	return pids
}

// vsockPath is the VM's vsock socket.
func (h *host) vsockPath() string { return filepath.Join(h.dir, "run/wsl2/vsock") }

// logs are the ends of the service's and the kernel's logs, for failures.
func (h *host) logs() string {
	var all []string
	for _, name := range []string{"service.log", "console.log"} {
		text, err := os.ReadFile(filepath.Join(h.dir, ".local/state/wsl2", name))
		if err != nil || len(text) == 0 {
			continue
		}
		lines := strings.Split(strings.TrimSpace(string(text)), "\n")
		all = append(all, name+":")
		all = append(all, lines[max(0, len(lines)-20):]...)
	}
	return strings.Join(all, "\n")
}

// diagnose tells what the processes of a wsl2 that hangs are doing.
func (h *host) diagnose() string {
	var b strings.Builder
	for _, pid := range processes("vm") {
		dumpRAM(pid)
		before, _ := vmExits(pid)
		events, err := traced([]string{"kvm/kvm_exit", "kvm/kvm_inj_virq", "kvm/kvm_set_irq"}, func() error { time.Sleep(20 * time.Millisecond); return nil })
		after, _ := vmExits(pid)
		fmt.Fprintf(&b, "vm %d: %.0f exits, %.0f of them in 20 ms; %v\n", pid, after, after-before, err)
		for i, e := range events {
			if i < 60 {
				fmt.Fprintln(&b, e)
			}
		}
	}
	for _, pid := range processes("") {
		for tid := range threads(pid) {
			dir := fmt.Sprintf("/proc/%d/task/%d/", pid, tid)
			comm, _ := os.ReadFile(dir + "comm")
			stack, _ := os.ReadFile(dir + "stack")
			stat, _ := os.ReadFile(dir + "stat")
			fmt.Fprintf(&b, "%d/%d %s: %s\n%s", pid, tid, bytes.TrimSpace(comm), stat, stack)
		}
		unix.Kill(pid, unix.SIGQUIT)
	}
	time.Sleep(time.Second)
	log, _ := os.ReadFile(filepath.Join(h.dir, ".local/state/wsl2/service.log"))
	console, _ := os.ReadFile(filepath.Join(h.dir, ".local/state/wsl2/console.log"))
	mine, _ := os.ReadFile(filepath.Join(h.dir, "stderr"))
	fmt.Fprintf(&b, "service.log:\n%s\nconsole.log:\n%s\nstderr:\n%s", log, console, mine)
	return b.String()
}

func dumpRAM(pid int) {
	maps, _ := os.ReadFile(fmt.Sprintf("/proc/%d/maps", pid))
	for line := range strings.Lines(string(maps)) {
		var lo, hi uint64
		fmt.Sscanf(line, "%x-%x", &lo, &hi)
		if hi-lo < memoryMiB<<20 || hi-lo > memoryMiB<<21 {
			continue
		}
		fmt.Fprintf(os.Stderr, "RAM %s", line)
		f, _ := os.Open(fmt.Sprintf("/proc/%d/mem", pid))
		out, _ := os.Create("/bench.ram")
		io.Copy(out, io.NewSectionReader(f, int64(lo), int64(hi-lo)))
		out.Close()
		return
	}
}
