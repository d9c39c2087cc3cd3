package main

import (
	"archive/tar"
	"bytes"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// host is a user's wsl2 with one distro.
type host struct {
	dir  string
	env  []string
	disk string // the distro's
	uid  uint32 // the user
}

const distroName = "bench"

// guestTool is guestPath inside the distro.
const guestTool = "/bin/guest"

// newHost makes the host for a topic, with its distro.
func newHost(topic string) (*host, error) {
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
	disk := "1GB"
	if *full { // the archive of a root, and the root
		disk = "4GB"
	}
	config := fmt.Sprintf("[wsl2]\nmemory=%dMB\nprocessors=%d\nkernelCommandLine=%s\ndefaultVhdSize=%s\nvmIdleTimeout=-1\n[general]\ninstanceIdleTimeout=-1\n", memoryMiB, vCPUs, rigCmdline(), disk)
	if topic == "files" {
		config += filesShares
	}
	for _, p := range []string{".config/wsl2/wslconfig"} {
		if err := os.WriteFile(filepath.Join(h.dir, p), []byte(config), 0o600); err != nil {
			return nil, err
		}
	}
	var programs []string
	switch topic {
	case "monitors": // without a distro
		return h, nil
	case "files":
		programs = filesPrograms
	case "version1":
		programs = version1Programs
		if err := h.ordinaryUser(); err != nil {
			return nil, err
		}
	}
	root, err := distroTar(programs...)
	if err != nil {
		return nil, err
	}
	archive := filepath.Join(h.dir, "root.tar")
	if err := os.WriteFile(archive, root, 0o644); err != nil {
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
	return h, h.stop()
}

// distroTar is a distro of a static busybox, the benchmark's own program, and programs of the
// rig with their libraries.
func distroTar(programs ...string) ([]byte, error) {
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
	files := map[string]string{"bin/busybox": busyboxPath, "bin/guest": guestPath}
	for _, p := range programs {
		files["bin/"+filepath.Base(p)] = p
		libraries, err := librariesOf(p)
		errs = append(errs, err)
		for _, l := range libraries {
			files[l[1:]] = l
		}
	}
	for to, from := range files {
		content, err := os.ReadFile(from)
		errs = append(errs, err, add(to, tar.TypeReg, "", 0o755, content))
	}
	for _, applet := range []string{"sh", "echo", "true", "cat", "dmesg", "rm", "tar", "sync", "mkdir", "yes", "head", "sleep", "umount"} {
		errs = append(errs, add("bin/"+applet, tar.TypeSymlink, "busybox", 0o777, nil))
	}
	errs = append(errs,
		add("etc/passwd", tar.TypeReg, "", 0o644, []byte("root:x:0:0:root:/root:/bin/sh\n")),
		add("etc/group", tar.TypeReg, "", 0o644, []byte("root:x:0:\n")),
		w.Close())
	return b.Bytes(), errors.Join(errs...)
}

// librariesOf are the interpreter and the libraries of a dynamic program.
func librariesOf(program string) (paths []string, err error) {
	const interpreter = "/lib64/ld-linux-x86-64.so.2"
	out, err := exec.Command(interpreter, "--list", program).Output()
	if err != nil {
		return nil, fmt.Errorf("libraries of %s: %w", program, err)
	}
	for _, word := range strings.Fields(string(out)) {
		if strings.HasPrefix(word, "/") {
			paths = append(paths, word)
		}
	}
	return append(paths, interpreter), nil
}

// rigCmdline is what every guest's kernel command line has to hold in the rig.
func rigCmdline() string { return os.Getenv("WSL2_RIG_CMDLINE") }

// wsl2 is a command of the user.
func (h *host) wsl2(args ...string) *exec.Cmd {
	c := exec.Command(wsl2Path, args...)
	c.Env, c.Dir = h.env, "/"
	if h.uid != 0 {
		c.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: h.uid, Gid: h.uid}}
	}
	return c
}

// output runs a command in the distro and returns what it prints.
func (h *host) output(args ...string) (string, error) {
	return h.run(append([]string{"-d", distroName, "-e"}, args...)...)
}

// hangs is how long, in the rig's time, anything may take before it is given up:
// a few times what it should. The rig is slow while a guest spins (a PAUSE leaves
// the translated code), so that one ms more here is a third of a second outside.
const hangs = time.Second

var errHang = fmt.Errorf("nothing came for %v of the rig's time", hangs)

// run runs a command of the user and returns what it prints.
func (h *host) run(args ...string) (string, error) {
	var out, errs bytes.Buffer
	c := h.wsl2(args...)
	c.Stdout, c.Stderr = &out, &errs
	if err := supervise(c); err != nil {
		return "", fmt.Errorf("wsl2 %s: %w: %s", strings.Join(args, " "), err, bytes.TrimSpace(errs.Bytes()))
	}
	return out.String(), nil
}

// supervise runs c, but not for longer than hangs.
func supervise(c *exec.Cmd) error { return superviseFor(hangs, c) }

func superviseFor(limit time.Duration, c *exec.Cmd) error {
	if err := c.Start(); err != nil {
		return err
	}
	watchdog := time.AfterFunc(limit, func() { c.Process.Kill() })
	err := c.Wait()
	if !watchdog.Stop() {
		return errHang
	}
	return err
}

// stop stops the VM and waits until no process of wsl2 is left.
func (h *host) stop() error {
	if _, err := h.run("--shutdown"); err != nil {
		return err
	}
	for deadline := time.Now().Add(hangs); time.Now().Before(deadline); time.Sleep(5 * time.Millisecond) {
		if len(processes("")) == 0 {
			return nil
		}
	}
	return fmt.Errorf("%w: processes are left: %v", errHang, processes(""))
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
