// Command l1 is PID 1 of the rig's machine, a stock Debian kernel with a real
// /dev/kvm: it mounts what a program expects, loads the modules, runs one
// command, reports how it ended and powers the machine off.
package main

import (
	"archive/tar"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/wsl2/wsl2/scripts/internal/rig/spec"
)

func main() {
	st := run()
	if err := report(st); err != nil {
		fmt.Fprintln(os.Stderr, "rig: l1: no status sent:", err)
	}
	unix.Sync()
	unix.Reboot(unix.LINUX_REBOOT_CMD_POWER_OFF)
	// A PID 1 that returned would be a kernel panic: the same end, noisier.
}

// run does everything up to the command's end.
func run() spec.Status {
	fail := func(err error) spec.Status { return spec.Status{Error: err.Error()} }
	if err := mounts(); err != nil {
		return fail(err)
	}
	raw, err := os.ReadFile(spec.Path)
	if err != nil {
		return fail(err)
	}
	var s spec.Spec
	if err := json.Unmarshal(raw, &s); err != nil {
		return fail(fmt.Errorf("%s: %w", spec.Path, err))
	}
	for _, m := range s.Modules {
		if err := loadModule(m); err != nil {
			return fail(err)
		}
	}
	if err := exitAfterInjection(); err != nil {
		return fail(err)
	}
	if s.Scratch {
		if err := os.MkdirAll("/scratch", 0o1777); err != nil {
			return fail(err)
		}
		if err := unix.Mount("/dev/vda", "/scratch", "ext4", 0, "discard"); err != nil {
			return fail(fmt.Errorf("mount /dev/vda on /scratch: %w", err))
		}
		if err := os.Chmod("/scratch", 0o1777); err != nil {
			return fail(err)
		}
	}
	if err := loopback(); err != nil {
		return fail(fmt.Errorf("bring up lo: %w", err))
	}
	// systemd's limits, which every program of a stock Debian has; the kernel's own are 1024 and 4096.
	if err := unix.Setrlimit(unix.RLIMIT_NOFILE, &unix.Rlimit{Cur: 1024, Max: 524288}); err != nil {
		return fail(fmt.Errorf("limit of open files: %w", err))
	}
	st := command(&s)
	if s.Scratch {
		// Best effort: a file system that is busy still is journalled.
		unix.Unmount("/scratch", unix.MNT_DETACH)
	}
	if len(s.Get) > 0 && st.Error == "" {
		if err := sendFiles(s.Get); err != nil {
			return fail(fmt.Errorf("send back files: %w", err))
		}
	}
	return st
}

func mounts() error {
	// The initramfs is the bottom of the mount tree, and pivot_root(2), which
	// container code calls, refuses to leave that. A mount of it on itself can be left.
	if err := os.MkdirAll("/.root", 0o755); err != nil {
		return err
	}
	if err := unix.Mount("/", "/.root", "", unix.MS_BIND, ""); err != nil {
		return fmt.Errorf("bind the root: %w", err)
	}
	if err := unix.Chdir("/.root"); err != nil {
		return err
	}
	if err := unix.Mount(".", "/", "", unix.MS_MOVE, ""); err != nil {
		return fmt.Errorf("move the root: %w", err)
	}
	if err := unix.Chroot("."); err != nil {
		return err
	}
	for _, d := range []string{"/proc", "/sys", "/dev", "/tmp", "/run", "/root", "/etc"} {
		if err := os.MkdirAll(d, 0o755); err != nil {
			return err
		}
	}
	for _, m := range []struct {
		kind, dir, data string
		flags           uintptr
	}{
		{"proc", "/proc", "", unix.MS_NOSUID | unix.MS_NODEV | unix.MS_NOEXEC},
		{"sysfs", "/sys", "", unix.MS_NOSUID | unix.MS_NODEV | unix.MS_NOEXEC},
		{"devtmpfs", "/dev", "mode=755", unix.MS_NOSUID},
		{"devpts", "/dev/pts", "mode=620,ptmxmode=666", unix.MS_NOSUID | unix.MS_NOEXEC},
		{"tmpfs", "/dev/shm", "mode=1777", unix.MS_NOSUID | unix.MS_NODEV},
		{"tmpfs", "/tmp", "mode=1777", unix.MS_NOSUID | unix.MS_NODEV},
		{"tmpfs", "/run", "mode=755", unix.MS_NOSUID | unix.MS_NODEV},
		{"cgroup2", "/sys/fs/cgroup", "", unix.MS_NOSUID | unix.MS_NODEV | unix.MS_NOEXEC},
	} {
		// /tmp may hold files that were put there: they live in the root file system.
		if m.dir == "/tmp" && !empty(m.dir) {
			if err := os.Chmod(m.dir, 0o1777); err != nil {
				return err
			}
			continue
		}
		if err := os.MkdirAll(m.dir, 0o755); err != nil {
			return err
		}
		err := unix.Mount(m.kind, m.dir, m.kind, m.flags, m.data)
		if err != nil && !(m.kind == "devtmpfs" && err == unix.EBUSY) {
			return fmt.Errorf("mount %s on %s: %w", m.kind, m.dir, err)
		}
	}
	for link, target := range map[string]string{
		"/dev/fd": "/proc/self/fd", "/dev/stdin": "/proc/self/fd/0",
		"/dev/stdout": "/proc/self/fd/1", "/dev/stderr": "/proc/self/fd/2",
	} {
		if err := os.Symlink(target, link); err != nil && !errors.Is(err, fs.ErrExist) {
			return err
		}
	}
	return unix.Sethostname([]byte("rig"))
}

func empty(dir string) bool {
	e, err := os.ReadDir(dir)
	return err == nil && len(e) == 0
}

func loadModule(path string) error {
	f, err := os.Open(path)
	if err != nil {
		return fmt.Errorf("load module: %w", err)
	}
	defer f.Close()
	if err := unix.FinitModule(int(f.Fd()), "", 0); err != nil && err != unix.EEXIST {
		return fmt.Errorf("load module %s: %w", filepath.Base(path), err)
	}
	return nil
}

// loopback brings up lo: tests listen on 127.0.0.1.
func loopback() error {
	s, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(s)
	r, err := unix.NewIfreq("lo")
	if err != nil {
		return err
	}
	if err := unix.IoctlIfreq(s, unix.SIOCGIFFLAGS, r); err != nil {
		return err
	}
	r.SetUint16(r.Uint16() | unix.IFF_UP)
	return unix.IoctlIfreq(s, unix.SIOCSIFFLAGS, r)
}

// openPort opens the virtio-serial port of that name, by sysfs: there is no udev.
// PID 1 waits for no event here: ports stand in the device's configuration and
// virtio_console is built in, but the host's "port added" messages are handled
// by a kernel work item, so the directory is watched until the port is there.
func openPort(name string, flags int) (*os.File, error) {
	const class = "/sys/class/virtio-ports"
	w, err := unix.InotifyInit1(unix.IN_CLOEXEC)
	if err != nil {
		return nil, err
	}
	defer unix.Close(w)
	if _, err := unix.InotifyAddWatch(w, "/dev", unix.IN_CREATE); err != nil {
		return nil, err
	}
	for {
		entries, err := os.ReadDir(class)
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return nil, err
		}
		for _, e := range entries {
			n, err := os.ReadFile(filepath.Join(class, e.Name(), "name"))
			if err != nil || strings.TrimSpace(string(n)) != name {
				continue
			}
			fd, err := unix.Open("/dev/"+e.Name(), flags|unix.O_CLOEXEC, 0)
			if err == unix.ENOENT {
				break // named in sysfs, the node follows
			}
			if err != nil {
				return nil, fmt.Errorf("port %s: %w", name, err)
			}
			return os.NewFile(uintptr(fd), name), nil
		}
		var ev [4096]byte
		if _, err := unix.Read(w, ev[:]); err != nil && err != unix.EINTR {
			return nil, err
		}
	}
}

// command runs the command and waits for its end and for all of its output.
func command(s *spec.Spec) spec.Status {
	fail := func(err error) spec.Status {
		return spec.Status{Error: err.Error(), NotFound: errors.Is(err, fs.ErrNotExist) || errors.Is(err, exec.ErrNotFound)}
	}
	if err := os.MkdirAll(s.Dir, 0o755); err != nil {
		return fail(err)
	}
	os.Clearenv()
	for _, kv := range s.Env {
		if k, v, ok := strings.Cut(kv, "="); ok {
			os.Setenv(k, v)
		}
	}
	path, err := exec.LookPath(s.Args[0])
	if err != nil {
		return fail(err)
	}

	var outputs sync.WaitGroup
	var child [3]*os.File
	defer func() {
		for _, f := range child {
			if f != nil {
				f.Close()
			}
		}
	}()
	// The command gets pipes, not the ports themselves: it may reopen /dev/stdout,
	// and a port can be open once only.
	for i, name := range []string{1: spec.PortStdout, 2: spec.PortStderr} {
		if i == 0 {
			continue
		}
		port, err := openPort(name, unix.O_WRONLY)
		if err != nil {
			return fail(err)
		}
		r, w, err := os.Pipe()
		if err != nil {
			return fail(err)
		}
		child[i] = w
		outputs.Add(1)
		go func() {
			defer outputs.Done()
			buf := make([]byte, 32<<10)
			if _, err := io.CopyBuffer(struct{ io.Writer }{port}, struct{ io.Reader }{r}, buf); err != nil {
				fmt.Fprintln(os.Stderr, "rig: l1:", name, err)
			}
			r.Close()
			port.Close()
		}()
	}
	if s.Stdin {
		port, err := openPort(spec.PortStdin, unix.O_RDONLY)
		if err != nil {
			return fail(err)
		}
		r, w, err := os.Pipe()
		if err != nil {
			return fail(err)
		}
		child[0] = r
		go func() { // ends with the machine, or with the host's end of input
			io.Copy(struct{ io.Writer }{w}, struct{ io.Reader }{port})
			w.Close()
			port.Close()
		}()
	} else if child[0], err = os.Open(os.DevNull); err != nil {
		return fail(err)
	}

	p, err := os.StartProcess(path, s.Args, &os.ProcAttr{
		Dir: s.Dir, Env: s.Env, Files: child[:],
		Sys: &syscall.SysProcAttr{Setsid: true},
	})
	if err != nil {
		return fail(err)
	}
	for i, f := range child {
		f.Close()
		child[i] = nil
	}
	go signals(p.Pid)

	ws, err := reap(p.Pid)
	if err != nil {
		return fail(err)
	}
	// What the command left behind holds its pipes and its disk: end it, all of it.
	unix.Kill(-1, unix.SIGKILL)
	outputs.Wait()
	for {
		if _, err := unix.Wait4(-1, nil, 0, nil); err == unix.ECHILD {
			break
		}
	}
	switch {
	case ws.Signaled():
		n := int(ws.Signal())
		return spec.Status{Signal: &n}
	default:
		n := ws.ExitStatus()
		return spec.Status{Exited: &n}
	}
}

// reap waits for pid and collects whatever orphan ends before it.
func reap(pid int) (unix.WaitStatus, error) {
	for {
		var ws unix.WaitStatus
		got, err := unix.Wait4(-1, &ws, 0, nil)
		switch {
		case err == unix.EINTR:
		case err != nil:
			return 0, fmt.Errorf("wait: %w", err)
		case got == pid:
			return ws, nil
		}
	}
}

// signals passes the host's signals to the command and its children.
func signals(pid int) {
	port, err := openPort(spec.PortControl, unix.O_RDONLY)
	if err != nil {
		fmt.Fprintln(os.Stderr, "rig: l1:", err)
		return
	}
	var b [1]byte
	for {
		if n, err := port.Read(b[:]); n != 1 || err != nil {
			return
		}
		unix.Kill(-pid, unix.Signal(b[0]))
	}
}

func report(st spec.Status) error {
	port, err := openPort(spec.PortStatus, unix.O_WRONLY)
	if err != nil {
		return err
	}
	raw, err := json.Marshal(st)
	if err != nil {
		return err
	}
	_, err = port.Write(append(raw, '\n'))
	return err
}

// sendFiles writes the files as a tar archive; what does not exist is left out.
func sendFiles(paths []string) error {
	port, err := openPort(spec.PortFiles, unix.O_WRONLY)
	if err != nil {
		return err
	}
	defer port.Close()
	tw := tar.NewWriter(struct{ io.Writer }{port})
	for _, root := range paths {
		err := filepath.WalkDir(root, func(p string, d fs.DirEntry, err error) error {
			if errors.Is(err, fs.ErrNotExist) && p == root {
				return nil
			}
			if err != nil {
				return err
			}
			if !d.Type().IsRegular() {
				return nil
			}
			return addFile(tw, p)
		})
		if err != nil {
			return err
		}
	}
	return tw.Close()
}

func addFile(tw *tar.Writer, path string) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	fi, err := f.Stat()
	if err != nil {
		return err
	}
	if err := tw.WriteHeader(&tar.Header{Name: path, Mode: int64(fi.Mode().Perm()), Size: fi.Size(), Typeflag: tar.TypeReg}); err != nil {
		return err
	}
	_, err = io.CopyN(tw, f, fi.Size())
	return err
}
