package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"slices"
	"strings"

	"github.com/u-root/u-root/pkg/cpio"
	"golang.org/x/sys/unix"

	"github.com/wsl2/wsl2/scripts/internal/rig/spec"
)

// machine is one rig, prepared but not started.
type machine struct {
	c      *config
	host   *hostOS
	spec   spec.Spec
	gets   map[string]string // path in the rig to path here
	initrd *os.File          // memfd
	disk   *os.File          // unlinked scratch image, nil for none
}

func (m *machine) close() {
	if m.initrd != nil {
		m.initrd.Close()
	}
	if m.disk != nil {
		m.disk.Close()
	}
}

// prepare gathers everything that goes into the rig.
func prepare(c *config, host *hostOS) (_ *machine, err error) {
	m := &machine{c: c, host: host, gets: map[string]string{}}
	defer func() {
		if err != nil {
			m.close()
		}
	}()
	t := newTree()
	if err := m.userland(t); err != nil {
		return nil, err
	}
	if err := m.command(t); err != nil {
		return nil, err
	}
	if err := m.environment(t); err != nil {
		return nil, err
	}
	if err := m.system(t); err != nil {
		return nil, err
	}
	raw, err := json.Marshal(&m.spec)
	if err != nil {
		return nil, err
	}
	t.add(cpio.StaticFile(spec.Path, string(raw), 0o644))

	fd, err := unix.MemfdCreate("rig-initrd", unix.MFD_CLOEXEC)
	if err != nil {
		return nil, fmt.Errorf("memfd: %w", err)
	}
	m.initrd = os.NewFile(uintptr(fd), "rig-initrd")
	if err := t.write(m.initrd); err != nil {
		return nil, fmt.Errorf("initramfs of the rig: %w", err)
	}
	// The content stands twice in memory while the kernel unpacks it, and its
	// tmpfs may fill half of the memory at most.
	if fi, err := m.initrd.Stat(); err != nil {
		return nil, err
	} else if need := fi.Size()>>20*5/2 + 192; need > int64(c.memory) {
		return nil, fmt.Errorf("%d MiB of files need --memory %d at least", fi.Size()>>20, need)
	}
	if c.disk > 0 {
		if m.disk, err = scratch(c.disk); err != nil {
			return nil, err
		}
	}
	return m, nil
}

// userland is --rootfs, --file and --bin.
func (m *machine) userland(t *tree) error {
	if m.c.rootfs != "" {
		fi, err := os.Stat(m.c.rootfs)
		if err != nil {
			return err
		}
		if fi.IsDir() {
			err = t.addPath(m.c.rootfs, "/")
		} else {
			err = t.addTar(m.c.rootfs)
		}
		if err != nil {
			return err
		}
	}
	for _, f := range m.c.files {
		src, dst, err := split(f, func(s string) string { return s })
		if err != nil {
			return err
		}
		if err := t.addPath(src, dst); err != nil {
			return err
		}
	}
	for _, f := range m.c.bins {
		if !strings.Contains(f, "/") {
			p, err := exec.LookPath(f)
			if err != nil {
				return err
			}
			f = p
		}
		src, dst, err := split(f, func(s string) string { return "/rig/bin/" + filepath.Base(s) })
		if err != nil {
			return err
		}
		if err := t.addProgram(src, dst); err != nil {
			return err
		}
	}
	return nil
}

// command stages the program, its directory and its testdata.
func (m *machine) command(t *tree) error {
	cwd, err := os.Getwd()
	if err != nil {
		return err
	}
	m.spec.Dir = cwd
	if m.c.cwd != "" {
		m.spec.Dir = m.c.cwd
	}
	t.add(cpio.Directory(m.spec.Dir, 0o755))
	if fi, err := os.Stat("testdata"); err == nil && fi.IsDir() {
		if err := t.addPath(filepath.Join(cwd, "testdata"), path.Join(m.spec.Dir, "testdata")); err != nil {
			return err
		}
	}
	m.spec.Args = append([]string(nil), m.c.args...)
	prog := m.c.args[0]
	if fi, err := os.Stat(prog); err == nil && fi.Mode().IsRegular() && strings.Contains(prog, "/") {
		abs, err := filepath.Abs(prog)
		if err != nil {
			return err
		}
		if _, ok := t.index[t.resolve(abs)]; !ok {
			if err := t.addProgram(abs, abs); err != nil {
				return err
			}
		}
		m.spec.Args[0] = abs
	}
	// go test reads these files after the program has ended.
	for _, a := range m.spec.Args[1:] {
		k, v, ok := strings.Cut(strings.TrimLeft(a, "-"), "=")
		if !ok || v == "" {
			continue
		}
		switch k {
		case "test.coverprofile", "test.cpuprofile", "test.memprofile", "test.blockprofile", "test.mutexprofile", "test.trace", "test.gocoverdir":
			if !path.IsAbs(v) {
				v = path.Join(cwd, v)
			}
			m.get(v, v)
			dir := v
			if k != "test.gocoverdir" {
				dir = path.Dir(v)
			}
			t.add(cpio.Directory(dir, 0o755))
		}
	}
	for _, g := range m.c.gets {
		from, to, ok := strings.Cut(g, ":")
		if !path.IsAbs(from) {
			from = path.Join(m.spec.Dir, from)
		}
		if !ok {
			to = from
		}
		to, err := filepath.Abs(to)
		if err != nil {
			return err
		}
		m.get(path.Clean(from), to)
	}
	return nil
}

func (m *machine) get(from, to string) {
	if _, ok := m.gets[from]; !ok {
		m.spec.Get = append(m.spec.Get, from)
	}
	m.gets[from] = to
}

// guestCmdline is what a guest's kernel command line has to hold in the rig.
//
// QEMU's VMRUN does not restore the interrupt shadow that STI leaves (7.2, helper_vmrun
// never reads int_state; the same in later ones). A guest that left between STI and
// HLT, as an idle one may, gets its interrupt before the HLT, whose wake-up that
// undoes: it sleeps until another interrupt comes. With its tick on that is 4 ms later.
const guestCmdline = "nohz=off"

// environment stages the guest's kernel and initramfs and sets the variables.
func (m *machine) environment(t *tree) error {
	vars := []string{
		"PATH=" + defaultPath, "HOME=/root", "USER=root", "LANG=C.UTF-8", "TMPDIR=/tmp",
		"PWD=" + m.spec.Dir, "WSL2_RIG=1", "WSL2_RIG_CMDLINE=" + guestCmdline, "XDG_RUNTIME_DIR=/run", "XDG_CACHE_HOME=/root/.cache",
	}
	for _, kv := range os.Environ() {
		k, _, _ := strings.Cut(kv, "=")
		switch {
		case k == "WSL2_KERNEL" || k == "WSL2_INITRAMFS":
		case strings.HasPrefix(k, "WSL2_"), k == "GODEBUG", k == "GOTRACEBACK", k == "TERM":
			vars = append(vars, kv)
		}
	}
	for _, f := range []struct{ env, file, path string }{
		{"WSL2_KERNEL", "vmlinux", kernelPath},
		{"WSL2_INITRAMFS", "initramfs.cpio", initramfsPath},
	} {
		src, named := os.Getenv(f.env), true
		if src == "" {
			src, named = filepath.Join(m.c.root, "out", f.file), false
		}
		if _, ok := t.index[t.resolve(f.path)]; ok { // --file has put it there
		} else if _, err := os.Stat(src); err == nil {
			if err := t.addPath(src, f.path); err != nil {
				return err
			}
		} else if named {
			return fmt.Errorf("%s: %w", f.env, err)
		} else {
			continue // a test that wants it fails and says so
		}
		vars = append(vars, f.env+"="+f.path)
	}
	m.spec.Env = lastOfEach(append(vars, m.c.env...))
	m.spec.Stdin = !m.c.noStdin
	m.spec.Scratch = m.c.disk > 0
	return nil
}

// lastOfEach drops the earlier ones of variables that are set twice: which of
// them counts differs between C libraries and Go.
func lastOfEach(env []string) []string {
	seen := map[string]bool{}
	var out []string
	for _, kv := range slices.Backward(env) {
		k, _, _ := strings.Cut(kv, "=")
		if !seen[k] {
			seen[k] = true
			out = append(out, kv)
		}
	}
	slices.Reverse(out)
	return out
}

// system adds PID 1 and the modules.
func (m *machine) system(t *tree) error {
	self, err := os.Executable()
	if err != nil {
		return err
	}
	// scripts/rig builds both programs side by side.
	if err := t.addPath(filepath.Join(filepath.Dir(self), "rig-l1"), "/init"); err != nil {
		return err
	}
	t.add(cpio.CharDev("dev/console", 0o600, 5, 1))
	files, err := m.host.modules(append(append([]string(nil), hostModules...), m.c.modules...))
	if err != nil {
		return err
	}
	for _, f := range files {
		to := "/rig/modules/" + filepath.Base(f)
		if err := t.addPath(f, to); err != nil {
			return err
		}
		m.spec.Modules = append(m.spec.Modules, to)
	}
	return nil
}

// scratch makes an empty ext4 image, sparse and already unlinked: it is gone
// with the last process that has it open.
func scratch(size int64) (*os.File, error) {
	f, err := os.CreateTemp("", "rig-disk.")
	if err != nil {
		return nil, err
	}
	defer os.Remove(f.Name())
	if err := f.Truncate(size); err != nil {
		f.Close()
		return nil, fmt.Errorf("scratch disk: %w", err)
	}
	mkfs, err := exec.LookPath("mke2fs")
	if err != nil {
		mkfs = "/usr/sbin/mke2fs" // not in an ordinary user's PATH
	}
	out, err := exec.Command(mkfs, "-q", "-F", "-t", "ext4", "-m", "0", "-E", "lazy_itable_init=1,lazy_journal_init=1", f.Name()).CombinedOutput()
	if err != nil {
		f.Close()
		if errors.Is(err, os.ErrNotExist) {
			return nil, errors.New("scratch disk: mke2fs is missing; install e2fsprogs")
		}
		return nil, fmt.Errorf("scratch disk: mke2fs: %w: %s", err, strings.TrimSpace(string(out)))
	}
	return f, nil
}

// tail keeps the end of a stream that is only wanted when something failed.
type tail struct {
	buf  []byte
	also io.Writer // may be nil
}

const tailSize = 16 << 10

func (t *tail) Write(p []byte) (int, error) {
	if t.also != nil {
		t.also.Write(p)
	}
	t.buf = append(t.buf, p...)
	if n := len(t.buf) - tailSize; n > 0 {
		t.buf = append(t.buf[:0], t.buf[n:]...)
	}
	return len(p), nil
}

// lines returns the last n lines.
func (t *tail) lines(n int) string {
	all := strings.Split(strings.TrimRight(strings.ReplaceAll(string(t.buf), "\r", ""), "\n"), "\n")
	return strings.Join(all[max(0, len(all)-n):], "\n")
}
