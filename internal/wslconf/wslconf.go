// Package wslconf reads a distro's /etc/wsl.conf (wsl.md §2.1). The file is the distro's
// own, so it may hold anything; what makes no sense is a warning and the default holds,
// but for programs of the host: who writes about them at all wants less, not more.
package wslconf

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/wsl2/wsl2/internal/ini"
)

// Path is where a distro keeps it.
const Path = "/etc/wsl.conf"

// maxFile bounds what is read.
const maxFile = 64 << 10

// Config is what the file says, defaults filled in.
type Config struct {
	DefaultUser string // "" leaves it to the registry
	Umask       int    // of sessions

	Command       string        // of root's shell, at each start
	Systemd       bool          // runs as PID 1
	InitTimeout   time.Duration // what systemd gets to come up, and to stop
	ProtectBinfmt bool          // systemd-binfmt keeps what runs programs of the host
	KeepAlive     bool          // runs until it is stopped

	Hostname                          string // "" is the host's
	GenerateHosts, GenerateResolvConf bool
	MountFsTab                        bool
	HostTimezone                      bool

	Interop bool // programs of the host

	// Automount: what the host shares is mounted. Shares says less of single ones, by their names
	// in /mnt: ReadOnly or None. Nothing here can say more than the host does.
	Automount bool
	Shares    map[string]string
}

// What Config.Shares says.
const (
	ReadOnly = "ro"
	None     = "none"
)

// Defaults are those of a distro without the file.
func Defaults() Config {
	return Config{Umask: 0o022, InitTimeout: 10 * time.Second, ProtectBinfmt: true,
		GenerateHosts: true, GenerateResolvConf: true, MountFsTab: true, HostTimezone: true, Interop: true, Automount: true}
}

// Read reads the file of the distro whose root is at root.
func Read(root string) (Config, []string) {
	text, err := readFile(filepath.Join(root, Path))
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return Defaults(), nil
	case err != nil:
		c := Defaults()
		c.Interop = false
		return c, []string{fmt.Sprintf("%v; using the defaults, without programs of the host", err)}
	}
	return Parse(text)
}

// readFile reads a file that may be anything (O_NONBLOCK: also a FIFO).
func readFile(path string) (string, error) {
	f, err := os.OpenFile(path, os.O_RDONLY|syscall.O_NONBLOCK, 0)
	if err != nil {
		return "", err
	}
	defer f.Close()
	if st, err := f.Stat(); err != nil || !st.Mode().IsRegular() {
		return "", fmt.Errorf("%s is not a regular file", path)
	}
	text, err := io.ReadAll(io.LimitReader(f, maxFile+1))
	if err == nil && len(text) > maxFile {
		err = fmt.Errorf("%s is larger than %d KiB", path, maxFile>>10)
	}
	return string(text), err
}

// Parse applies the text of a file to the defaults.
func Parse(text string) (c Config, warnings []string) {
	c = Defaults()
	warn := func(line int, what string) {
		warnings = append(warnings, fmt.Sprintf("%s in %s:%d", what, Path, line))
	}
	entries, problems := ini.Parse(text)
	for _, e := range entries {
		set, known := keys[e.Name()]
		switch {
		case known:
			if msg := set(&c, e.Value); msg != "" {
				warn(e.Line, fmt.Sprintf("%s '%s' for key '%s'", msg, e.Value, e.Key))
			}
		case strings.EqualFold(e.Section, "shares"):
			if msg := c.narrow(e); msg != "" {
				warn(e.Line, fmt.Sprintf("%s '%s' for key '%s'", msg, e.Value, e.Key))
			}
		case !elsewhere[e.Name()]:
			warn(e.Line, ini.Unknown(e, names))
		}
	}
	for _, p := range problems {
		if p.Name == "interop.enabled" {
			c.Interop = false
		}
		warn(p.Line, p.Text)
	}
	return c, warnings
}

// narrow applies a line of [shares]. Who writes about a share at all wants less of it.
func (c *Config) narrow(e ini.Entry) (msg string) {
	how := strings.ToLower(e.Value)
	if how == "rw" { // as the host says
		return ""
	}
	if how != ReadOnly && how != None {
		how, msg = None, "Want ro or none (it is not mounted):"
	}
	if c.Shares == nil {
		c.Shares = map[string]string{}
	}
	c.Shares[strings.ToLower(e.Key)] = how
	return msg
}

// names are the keys that a slip of the fingers may have missed.
var names = []string{
	"automount.enabled", "automount.mountFsTab", "filesystem.umask", "interop.enabled",
	"network.hostname", "network.generateHosts", "network.generateResolvConf",
	"time.useWindowsTimezone", "user.default",
	"boot.command", "boot.systemd", "boot.initTimeout", "boot.protectBinfmt", "boot.keepAlive",
}

// keys maps "section.key" to what stores the value; the result is a warning's
// beginning, empty if the value was good.
var keys = map[string]func(c *Config, value string) string{
	"automount.enabled":          func(c *Config, v string) string { return boolean(&c.Automount, v) },
	"automount.mountfstab":       func(c *Config, v string) string { return boolean(&c.MountFsTab, v) },
	"network.generatehosts":      func(c *Config, v string) string { return boolean(&c.GenerateHosts, v) },
	"network.generateresolvconf": func(c *Config, v string) string { return boolean(&c.GenerateResolvConf, v) },
	"time.usewindowstimezone":    func(c *Config, v string) string { return boolean(&c.HostTimezone, v) },
	"boot.systemd":               func(c *Config, v string) string { return boolean(&c.Systemd, v) },
	"boot.protectbinfmt":         func(c *Config, v string) string { return boolean(&c.ProtectBinfmt, v) },
	"boot.keepalive":             func(c *Config, v string) string { return boolean(&c.KeepAlive, v) },
	"boot.command":               func(c *Config, v string) string { c.Command = v; return "" },
	"user.default":               func(c *Config, v string) string { c.DefaultUser = v; return "" },
	"interop.enabled": func(c *Config, v string) string {
		if msg := boolean(&c.Interop, v); msg != "" {
			c.Interop = false
			return msg + " (programs of the host are off)"
		}
		return ""
	},
	"boot.inittimeout": func(c *Config, v string) string {
		n, err := strconv.ParseInt(v, 0, 32)
		if err != nil || n < 0 {
			return "Invalid number of milliseconds"
		}
		c.InitTimeout = time.Duration(n) * time.Millisecond
		return ""
	},
	"filesystem.umask": func(c *Config, v string) string {
		n, err := strconv.ParseInt(v, 0, 32) // 022 is octal
		if err != nil || n < 0 || n > 0o777 {
			return "Invalid umask"
		}
		c.Umask = int(n)
		return ""
	},
	"network.hostname": func(c *Config, v string) string {
		c.Hostname = CleanHostname(v)
		if c.Hostname != v {
			return fmt.Sprintf("Invalid host name ('%s' is used):", c.Hostname)
		}
		return ""
	},
}

// elsewhere are keys of WSL that have no meaning here (docs/settings.md says why), so
// that a file carried over does not warn about each of them.
var elsewhere = map[string]bool{
	"automount.root": true, "automount.options": true, "automount.ldconfig": true, "automount.cgroups": true,
	"interop.appendwindowspath": true, "gpu.enabled": true, "gpu.appendlibpath": true, "general.guiapplications": true,
	"fileserver.enabled": true, "fileserver.logfile": true, "fileserver.loglevel": true, "fileserver.logtruncate": true,
}

func boolean(b *bool, v string) string {
	value, ok := ini.Bool(v)
	if !ok {
		return "Invalid boolean value"
	}
	*b = value
	return ""
}

// maxHostname is what Linux allows (HOST_NAME_MAX).
const maxHostname = 64

// CleanHostname makes a host name of any text as WSL does: other characters than
// letters, digits, '-' and '.' are left out, as are '-' and '.' at its ends and a '.' after another.
func CleanHostname(name string) string {
	var b strings.Builder
	for _, r := range name {
		switch {
		case r >= 'a' && r <= 'z', r >= 'A' && r <= 'Z', r >= '0' && r <= '9':
		case r == '-' && b.Len() > 0:
		case r == '.' && b.Len() > 0 && !strings.HasSuffix(b.String(), "."):
		default:
			continue
		}
		b.WriteRune(r)
	}
	clean := b.String()
	clean = strings.TrimRight(clean[:min(len(clean), maxHostname)], "-.")
	if clean == "" {
		return "localhost"
	}
	return clean
}
