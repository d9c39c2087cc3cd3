// Package config holds what the launcher is told from outside: where its files
// live (the XDG base directories) and what the user wrote into wslconfig.
package config

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"syscall"
)

// Paths says where the launcher keeps its files. It is immutable.
type Paths struct {
	// Data holds registry.json and the distros' disks.
	Data string
	// ConfigFile is the user's wslconfig; it need not exist.
	ConfigFile string
	// Runtime holds sockets and locks. It belongs to the user, mode 0700.
	Runtime string
	// State holds logs.
	State string
	// Cache holds what can be fetched or built again.
	Cache string
	// VM is the ID of a distro that has a VM of its own, "" for the VM that distros share.
	VM string
}

// ForVM returns the paths of a distro's own VM.
func (p Paths) ForVM(id string) Paths {
	p.VM = id
	return p
}

// vmFile is a file of the VM's.
func (p Paths) vmFile(dir, name string) string {
	if p.VM != "" {
		name += "-" + p.VM[:min(len(p.VM), 8)] // short: there are sockets among them; 40 random bits
	}
	return filepath.Join(dir, name)
}

// Registry is the path of the registry of distros.
func (p Paths) Registry() string { return filepath.Join(p.Data, "registry.json") }

// Distros is the directory of the distros' directories.
func (p Paths) Distros() string { return filepath.Join(p.Data, "distros") }

// ServiceSocket is where the service listens.
func (p Paths) ServiceSocket() string { return filepath.Join(p.Runtime, "service.sock") }

// StartLock is held (flock) by a client while it starts the service.
func (p Paths) StartLock() string { return filepath.Join(p.Runtime, "start.lock") }

// ServiceLock is held (flock) by the service for its whole life.
func (p Paths) ServiceLock() string { return filepath.Join(p.Runtime, "service.lock") }

// VMLock is held (flock) by the VM process for its whole life, which may be
// longer than the service's: whoever holds it may open the distros' disks.
func (p Paths) VMLock() string { return p.vmFile(p.Runtime, "vm.lock") }

// KVMVerdict remembers that this host's KVM can run a guest (kvm.ProbeOnce). The
// directory does not outlive the host's boot, and neither does the verdict.
func (p Paths) KVMVerdict() string { return filepath.Join(p.Runtime, "kvm") }

// SharedDisks remembers what --mount has attached. It does not outlive the host's
// boot either.
func (p Paths) SharedDisks() string { return filepath.Join(p.Runtime, "disks.json") }

// PortRules remembers what `wsl2 ports --publish` has published.
func (p Paths) PortRules() string { return filepath.Join(p.Data, "ports.json") }

// HostMounts is where distros are mounted on the host, each in a directory of its name.
func (p Paths) HostMounts() string { return filepath.Join(p.Runtime, "fs") }

// VsockPath is the VM's vsock socket; the guest's connections to host port P
// reach VsockPath_P.
func (p Paths) VsockPath() string { return p.vmFile(p.Runtime, "vsock") }

// Names are the distros of the VM by their addresses, as hosts(5).
func (p Paths) Names() string { return p.vmFile(p.Runtime, "names") }

// NativeSocket is where a distro of version 1 listens.
func (p Paths) NativeSocket() string { return p.vmFile(p.Runtime, "native") }

// ServiceLog is the service's log; ConsoleLog the last VM's kernel log.
func (p Paths) ServiceLog() string { return filepath.Join(p.State, "service.log") }

// ConsoleLog is what the kernel of the last VM printed.
func (p Paths) ConsoleLog() string { return p.vmFile(p.State, "console.log") }

// Swap is the file of the VM's swap while the VM starts: then it has no name any more.
// file is the one that the user wants, "" for none.
func (p Paths) Swap(file string) string {
	if file == "" {
		return p.vmFile(p.State, "swap")
	}
	return p.vmFile(filepath.Dir(file), filepath.Base(file))
}

// maxLog is the size from which the service's log is set aside at the service's
// start; one old log is kept.
const maxLog = 1 << 20

// OpenServiceLog opens the service's log for appending.
func (p Paths) OpenServiceLog() (*os.File, error) {
	path := p.ServiceLog()
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		return nil, err
	}
	if st, err := os.Stat(path); err == nil && st.Size() > maxLog {
		os.Rename(path, path+".1")
	}
	return os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_APPEND, 0o600)
}

// maxSocketPath is the longest path sockaddr_un takes, less its NUL.
const maxSocketPath = 107

// XDG returns one of the user's base directories (XDG Base Directory Specification
// 0.8): the variable's, else the one under HOME.
func XDG(getenv func(string) string, variable, under string) (string, error) {
	// "All paths set in these environment variables must be absolute. If an
	// implementation encounters a relative path [...] it should consider
	// the path invalid and ignore it."
	if v := getenv(variable); filepath.IsAbs(v) {
		return v, nil
	}
	home := getenv("HOME")
	if !filepath.IsAbs(home) {
		return "", fmt.Errorf("neither %s nor HOME is set to an absolute path; set one of them", variable)
	}
	return filepath.Join(home, under), nil
}

// FromEnv derives the paths from the environment (XDG Base Directory
// Specification 0.8) and makes the runtime directory. getenv is os.Getenv; uid
// the user who runs the launcher.
func FromEnv(getenv func(string) string, uid int) (Paths, error) {
	dir := func(variable, under string) (string, error) {
		base, err := XDG(getenv, variable, under)
		return filepath.Join(base, "wsl2"), err
	}
	var p Paths
	var errs [4]error
	p.Data, errs[0] = dir("XDG_DATA_HOME", ".local/share")
	p.State, errs[1] = dir("XDG_STATE_HOME", ".local/state")
	p.Cache, errs[2] = dir("XDG_CACHE_HOME", ".cache")
	p.ConfigFile, errs[3] = dir("XDG_CONFIG_HOME", ".config")
	if err := errors.Join(errs[:]...); err != nil {
		return Paths{}, err
	}
	p.ConfigFile = filepath.Join(p.ConfigFile, "wslconfig")

	var err error
	p.Runtime, err = runtimeDir(getenv("XDG_RUNTIME_DIR"), uid, "/tmp")
	if err != nil {
		return Paths{}, err
	}
	if s := p.ForVM("12345678").VsockPath() + "_4294967295"; len(s) > maxSocketPath {
		return Paths{}, fmt.Errorf("runtime directory %s is too long for a unix socket; set XDG_RUNTIME_DIR to a shorter path", p.Runtime)
	}
	return p, nil
}

// runtimeDir returns a directory that only uid can enter: xdg/wsl2 if xdg is
// the user's (after su or sudo it may be someone else's), else tmp/wsl2-UID.
func runtimeDir(xdg string, uid int, tmp string) (string, error) {
	if filepath.IsAbs(xdg) {
		if st, err := os.Stat(xdg); err == nil && st.IsDir() && owner(st) == uid {
			dir := filepath.Join(xdg, "wsl2")
			return dir, privateDir(dir, uid)
		}
	}
	dir := filepath.Join(tmp, "wsl2-"+strconv.Itoa(uid))
	return dir, privateDir(dir, uid)
}

// privateDir makes dir with mode 0700 or checks that what is there is such a
// directory of uid's. In a directory like /tmp anyone may have made it first.
func privateDir(dir string, uid int) error {
	st, err := os.Lstat(dir)
	if errors.Is(err, fs.ErrNotExist) {
		if err := os.Mkdir(dir, 0o700); err != nil && !errors.Is(err, fs.ErrExist) {
			return fmt.Errorf("runtime directory: %w", err)
		}
		st, err = os.Lstat(dir)
	}
	if err != nil {
		return fmt.Errorf("runtime directory: %w", err)
	}
	if !st.IsDir() || owner(st) != uid {
		return fmt.Errorf("runtime directory %s is not a directory of yours (it belongs to uid %d); remove it, or set XDG_RUNTIME_DIR to a directory of your own", dir, owner(st))
	}
	if st.Mode().Perm() != 0o700 {
		if err := os.Chmod(dir, 0o700); err != nil {
			return fmt.Errorf("runtime directory: %w", err)
		}
	}
	return nil
}

func owner(st fs.FileInfo) int {
	if s, ok := st.Sys().(*syscall.Stat_t); ok {
		return int(s.Uid)
	}
	return -1
}

// RemoveAll deletes what the launcher keeps, but for the user's own settings. No
// service may run. Directories with something of somebody else's in them stay; the cache
// is all the launcher's.
func (p Paths) RemoveAll() error {
	var errs []error
	remove := func(paths ...string) {
		for _, path := range paths {
			if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) && !errors.Is(err, syscall.ENOTEMPTY) {
				errs = append(errs, err)
			}
		}
	}
	remove(p.Registry(), p.PortRules(), p.Distros(), p.Data)
	own := []string{p.VMLock(), p.VsockPath(), p.NativeSocket(), p.ConsoleLog(), p.Swap("")} // and those of VMs of single distros
	for _, path := range own {
		files, _ := filepath.Glob(path + "-*")
		remove(files...)
	}
	for _, log := range []string{p.ServiceLog(), p.ConsoleLog()} {
		remove(log, log+".1")
	}
	remove(p.Swap(""), p.State)
	errs = append(errs, os.RemoveAll(p.Cache))
	remove(p.ServiceSocket(), p.StartLock(), p.ServiceLock(), p.VMLock(), p.KVMVerdict(), p.SharedDisks(), p.VsockPath(), p.HostMounts(), p.Runtime)
	return errors.Join(errs...)
}
