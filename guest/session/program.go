package session

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"

	"github.com/wsl2/wsl2/guest/users"
	"github.com/wsl2/wsl2/internal/wire"
	"github.com/wsl2/wsl2/internal/wslconf"
)

// failure is an error that the client is told with a code.
type failure struct {
	code wire.Code
	text string
}

func (f *failure) Error() string { return f.text }

func failf(code wire.Code, format string, args ...any) error {
	return &failure{code, fmt.Sprintf(format, args...)}
}

// toFailed is the one place where an error becomes a code on the wire.
func toFailed(err error) *wire.Failed {
	var f *failure
	if errors.As(err, &f) {
		return &wire.Failed{Code: f.code, Text: f.text}
	}
	return &wire.Failed{Code: wire.CodeInternal, Text: err.Error()}
}

// defaultPath is the search path before anything else sets it (wsl.md §1.6).
const defaultPath = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin:/usr/games:/usr/local/games"

// program is what Start comes to, before it is executed.
type program struct {
	name string   // as the user gave it: searched in PATH if it has no slash
	argv []string // argv[0] included
	env  []string
	path string // PATH of env
	user *users.User
	dirs []string // working directories, the wanted one first
	// reach is called before a path is looked at (Shares).
	reach func(path string)
	// notices are for the user's stderr.
	notices []string
}

// newProgram works out what to run. All of its errors are failures.
func newProgram(cfg *Config, m *wire.Start) (*program, error) {
	root := cfg.Root
	if root == "" {
		root = "/"
	}
	p := &program{}
	who := m.User
	if who == "" {
		var reason error
		if who, reason = users.Default(root, cfg.DefaultUser, m.Default); reason != nil {
			p.notices = append(p.notices, fmt.Sprintf("the default user of %s cannot be used: %v", wslconf.Path, reason))
		}
	}
	user, err := users.Lookup(root, who)
	switch {
	case errors.Is(err, users.ErrUnknown):
		return nil, failf(wire.CodeUnknownUser, "user %q is not in the distro's /etc/passwd; create it there (useradd) or choose another with -u", who)
	case err != nil:
		return nil, failf(wire.CodeInternal, "look up user %q: %v", who, err)
	}
	p.user, p.reach = user, func(string) {}
	if cfg.Shares != nil {
		p.reach = cfg.Shares.Reach
	}
	env := baseEnv(cfg, root, user, m.Streams&wire.StreamPTY != 0)
	if cfg.Prepare != nil {
		more, notice := cfg.Prepare(user)
		if notice != "" {
			p.notices = append(p.notices, notice)
		}
		for _, kv := range more {
			env.set(kv)
		}
	}
	for _, kv := range m.Env {
		k, _, ok := strings.Cut(kv, "=")
		if !ok || k == "" || strings.IndexByte(kv, 0) >= 0 {
			return nil, failf(wire.CodeRefused, "environment entry %q is not NAME=VALUE", kv)
		}
		env.set(kv)
	}
	p.env = env.list
	p.path = env.get("PATH")
	for _, a := range m.Argv {
		if strings.IndexByte(a, 0) >= 0 {
			return nil, failf(wire.CodeRefused, "argument %q contains a NUL byte", a)
		}
	}
	switch m.Shell {
	case wire.ShellNone:
		if len(m.Argv) == 0 || m.Argv[0] == "" {
			return nil, failf(wire.CodeRefused, "no program given")
		}
		p.name, p.argv = m.Argv[0], m.Argv
	case wire.ShellStandard, wire.ShellLogin:
		if len(m.Argv) > 1 {
			return nil, failf(wire.CodeRefused, "a shell takes one command string, got %d", len(m.Argv))
		}
		p.name = user.Shell
		argv0 := user.Shell
		if m.Shell == wire.ShellLogin {
			argv0 = "-" + filepath.Base(user.Shell)
		}
		p.argv = []string{argv0}
		if len(m.Argv) == 1 {
			p.argv = append(p.argv, "-c", m.Argv[0])
		}
	}
	p.dirs = append(p.dirs, user.Home, "/")
	if m.Cwd != "" && m.Cwd != "~" {
		p.dirs = append([]string{m.Cwd}, p.dirs...)
	}
	return p, nil
}

// groups are the user's as initgroups(3) sets them, with the primary one.
func (p *program) groups() []uint32 {
	return append([]uint32{p.user.GID}, p.user.Groups...)
}

// environment is an ordered list of K=V in which later settings win.
type environment struct{ list []string }

func (e *environment) set(kv string) {
	key := kv[:strings.IndexByte(kv, '=')+1]
	for i, have := range e.list {
		if strings.HasPrefix(have, key) {
			e.list[i] = kv
			return
		}
	}
	e.list = append(e.list, kv)
}

func (e *environment) get(key string) string {
	for _, kv := range e.list {
		if v, ok := strings.CutPrefix(kv, key+"="); ok {
			return v
		}
	}
	return ""
}

// baseEnv is the clean environment that a session starts with (wsl.md §1.6);
// nothing of init's own is in it.
func baseEnv(cfg *Config, root string, u *users.User, terminal bool) *environment {
	e := &environment{make([]string, 0, 16)}
	e.list = append(e.list,
		"HOSTTYPE=x86_64",
		"LANG="+locale(root),
		"PATH="+defaultPath,
		"NAME="+cfg.Hostname,
		"WSL_DISTRO_NAME="+cfg.Distro,
		"HOME="+u.Home,
		"USER="+u.Name,
		"LOGNAME="+u.Name,
		"SHELL="+u.Shell,
	)
	if terminal {
		e.list = append(e.list, "TERM=xterm-256color")
	}
	return e
}

// locale returns LANG of /etc/default/locale (Debian) or /etc/locale.conf
// (systemd's locale.conf(5)), else C.UTF-8, which every libc has.
func locale(root string) string {
	for _, name := range []string{"etc/default/locale", "etc/locale.conf"} {
		text, err := readSmall(filepath.Join(root, name))
		if err != nil {
			continue
		}
		for line := range strings.Lines(text) {
			if v, ok := strings.CutPrefix(strings.TrimSpace(line), "LANG="); ok {
				v = strings.Trim(v, `"'`)
				if v != "" && strings.IndexByte(v, 0) < 0 {
					return v
				}
			}
		}
	}
	return "C.UTF-8"
}

// readSmall returns the first 4 KiB of a file of the distro, which may be
// anything (O_NONBLOCK: also a FIFO).
func readSmall(path string) (string, error) {
	fd, err := syscall.Open(path, syscall.O_RDONLY|syscall.O_NONBLOCK|syscall.O_CLOEXEC, 0)
	if err != nil {
		return "", err
	}
	defer syscall.Close(fd)
	buf := make([]byte, 4096)
	n, err := syscall.Read(fd, buf)
	return string(buf[:max(n, 0)]), err
}

// starter forks and executes; reaper.Reaper.Start bound to the session's files.
type starter func(path string, argv []string, dir string) error

// exec runs the program through start, as execvp(3) would: search, the shell
// for scripts without #!, and a working directory that falls back to the home
// and then to /. notice is for the user's stderr.
//
// The kernel reports a directory that may not be entered and a program that
// may not be run with the same error. The next directory tells them apart.
func (p *program) exec(start starter) (notice string, err error) {
	var why error
	for i, dir := range p.dirs {
		p.reach(dir)
		if reason := checkDir(dir); reason != nil {
			if why == nil {
				why = reason
			}
			continue
		}
		err = p.execIn(dir, start)
		if i+1 < len(p.dirs) && errors.Is(err, syscall.EACCES) {
			if why == nil {
				why = syscall.EACCES
			}
			continue
		}
		if err == nil && why != nil && p.dirs[0] != dir {
			notice = fmt.Sprintf("cannot change to directory %s: %v; started in %s", p.dirs[0], why, dir)
		}
		return notice, p.explain(err)
	}
	return "", p.explain(err)
}

func checkDir(dir string) error {
	if !filepath.IsAbs(dir) {
		return errors.New("not an absolute path")
	}
	var st syscall.Stat_t
	if err := syscall.Stat(dir, &st); err != nil {
		return err
	}
	if st.Mode&syscall.S_IFMT != syscall.S_IFDIR {
		return syscall.ENOTDIR
	}
	return nil
}

// execIn searches the program as execvp(3) does and starts it in dir. Errors
// are the kernel's: ENOENT only if no file was found, errMissingLoader if
// the file is there but what it needs to run is not.
func (p *program) execIn(dir string, start starter) error {
	if strings.ContainsRune(p.name, '/') {
		return p.execFile(absIn(dir, p.name), p.name, dir, start)
	}
	var denied error
	for _, d := range filepath.SplitList(p.path) {
		name := filepath.Join(d, p.name)
		if d == "" || d == "." {
			name = "./" + p.name
		}
		err := p.execFile(absIn(dir, name), name, dir, start)
		switch {
		case err == nil:
			return nil
		case errors.Is(err, syscall.ENOENT), errors.Is(err, syscall.ENOTDIR):
		case errors.Is(err, syscall.EACCES):
			denied = err
		default:
			return err
		}
	}
	if denied != nil {
		return denied
	}
	return syscall.ENOENT
}

var errMissingLoader = errors.New("its interpreter or loader is not there")

// execFile starts one candidate. file is where init finds it, name what exec is given.
func (p *program) execFile(file, name, dir string, start starter) error {
	p.reach(file)
	var st syscall.Stat_t
	if err := syscall.Stat(file, &st); err != nil {
		return err
	}
	// Spares a fork for what no user may execute.
	if st.Mode&syscall.S_IFMT != syscall.S_IFREG || st.Mode&0o111 == 0 {
		return syscall.EACCES
	}
	err := start(name, p.argv, dir)
	if errors.Is(err, syscall.ENOEXEC) {
		err = start(users.DefaultShell, append([]string{users.DefaultShell, name}, p.argv[1:]...), dir)
	}
	if errors.Is(err, syscall.ENOENT) {
		return errMissingLoader
	}
	return err
}

func absIn(dir, name string) string {
	if filepath.IsAbs(name) {
		return name
	}
	return filepath.Join(dir, name)
}

// explain gives exec's error the code that becomes 127 or 126.
func (p *program) explain(err error) error {
	switch {
	case err == nil:
		return nil
	case errors.Is(err, syscall.ENOENT), errors.Is(err, syscall.ENOTDIR):
		if strings.ContainsRune(p.name, '/') {
			return failf(wire.CodeNotFound, "%s: no such file in the distro", p.name)
		}
		return failf(wire.CodeNotFound, "%s: command not found in the distro (PATH=%s)", p.name, p.path)
	case errors.Is(err, errMissingLoader):
		return failf(wire.CodeNotFound, "%s: cannot run: %v (see `file %s`)", p.name, err, p.name)
	case errors.Is(err, syscall.E2BIG):
		return failf(wire.CodeNotExecutable, "%s: arguments and environment are larger than the kernel accepts", p.name)
	case errors.Is(err, syscall.EAGAIN), errors.Is(err, syscall.ENOMEM), errors.Is(err, os.ErrDeadlineExceeded):
		return failf(wire.CodeInternal, "%s: cannot start a process: %v; the distro is out of memory or at a process limit", p.name, err)
	}
	return failf(wire.CodeNotExecutable, "%s: cannot execute: %v", p.name, err)
}
