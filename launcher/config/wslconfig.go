package config

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"runtime"
	"strconv"
	"strings"
	"time"
)

// Settings is what wslconfig says, defaults filled in. A negative timeout
// means never.
type Settings struct {
	// InstanceIdleTimeout is how long a distro without sessions and processes
	// keeps running; VMIdleTimeout the same for a VM without distros.
	InstanceIdleTimeout, VMIdleTimeout time.Duration
	// BootTimeout bounds the VM's boot up to /init's readiness;
	// DistroStartTimeout the mount of a disk and the start of its init.
	BootTimeout, DistroStartTimeout time.Duration
	MemoryBytes                     uint64 // a multiple of 2 MiB
	Processors                      int    // 1 to MaxProcessors
	Kernel                          string // "" = the one that came with wsl2
	KernelCommandLine               string // appended
	Accel                           string // auto, kvm or tcg
	DefaultDiskBytes                uint64 // virtual size of a new distro's disk
	// Interop says whether distros may run programs of the host, HostPrograms
	// which: names or absolute paths, "*" for all.
	Interop      bool
	HostPrograms []string
	SSHAgent     bool // distros may use the caller's SSH agent
}

// Limits of what a VM can be asked for.
const (
	MaxProcessors  = 64
	MinMemoryBytes = 128 << 20 // the kernel, 16 disks and a distro; with less, /init or the first program dies
	memoryStep     = 2 << 20
	minDiskBytes   = 1 << 30
	maxDiskBytes   = 16 << 40 // ext4 with 4 KiB blocks
)

// Host is what defaults and limits depend on.
type Host struct {
	MemoryBytes uint64
	CPUs        int
}

// ThisHost asks the kernel.
func ThisHost() Host {
	return Host{MemoryBytes: totalMemory(), CPUs: runtime.NumCPU()}
}

// Defaults for a host: half of its memory up to 8 GiB, which costs nothing
// until the guest touches it, and all its processors up to 8.
func Defaults(h Host) Settings {
	return Settings{
		InstanceIdleTimeout: 15 * time.Second,
		VMIdleTimeout:       60 * time.Second,
		BootTimeout:         60 * time.Second,
		DistroStartTimeout:  60 * time.Second,
		MemoryBytes:         max(min(h.MemoryBytes/2, 8<<30), 256<<20) / memoryStep * memoryStep,
		Processors:          max(min(h.CPUs, 8), 1),
		Accel:               "auto",
		DefaultDiskBytes:    256 << 30,
		Interop:             true,
		HostPrograms:        []string{"*"},
		SSHAgent:            true,
	}
}

// Load reads wslconfig at path over the defaults for h. What it cannot use it
// reports as warnings, never as an error: a typing mistake must not lock users
// out of their distros.
func Load(path string, h Host) (Settings, []string) {
	s := Defaults(h)
	text, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		return s, nil
	}
	if err != nil {
		return s, []string{fmt.Sprintf("%v; using the defaults", err)}
	}
	return s, s.parse(string(text), path, h)
}

// parse applies an ini text: '#' and ';' comments, [section], key=value;
// sections and keys ignore case; quotes around a value are dropped; the first of two
// equal keys wins (WSL's configfile.cpp).
func (s *Settings) parse(text, path string, h Host) (warnings []string) {
	section := ""
	seen := map[string]bool{}
	for i, line := range strings.Split(text, "\n") {
		warn := func(format string, a ...any) {
			warnings = append(warnings, fmt.Sprintf("%s in %s:%d", fmt.Sprintf(format, a...), path, i+1))
		}
		line = strings.TrimSpace(line)
		if i == 0 {
			line = strings.TrimPrefix(line, "\ufeff")
		}
		if line == "" || line[0] == '#' || line[0] == ';' {
			continue
		}
		if line[0] == '[' {
			name, ok := strings.CutSuffix(line[1:], "]")
			if !ok {
				warn("Invalid section '%s'", line)
				continue
			}
			section = strings.ToLower(strings.TrimSpace(name))
			continue
		}
		key, value, ok := strings.Cut(line, "=")
		if !ok {
			warn("Expected 'key = value', found '%s'", line)
			continue
		}
		key = strings.TrimSpace(key)
		value, err := unquote(strings.TrimSpace(value))
		if err != nil {
			warn("%v for key '%s'", err, key)
			continue
		}
		full := section + "." + strings.ToLower(key)
		set, known := settings[full]
		if !known {
			if !knownElsewhere[full] {
				warn("Unknown key '%s.%s'", section, key)
			}
			continue
		}
		if seen[full] {
			warn("Duplicated config key '%s.%s'", section, key)
			continue
		}
		seen[full] = true
		if msg := set(s, value, h); msg != "" {
			warn("%s '%s' for key '%s'", msg, value, key)
		}
	}
	return warnings
}

// settings maps "section.key" to what stores the value; the result is a
// warning's beginning, empty if the value was good.
var settings = map[string]func(s *Settings, value string, h Host) string{
	"general.instanceidletimeout": func(s *Settings, v string, _ Host) string { return millis(&s.InstanceIdleTimeout, v) },
	"wsl2.vmidletimeout":          func(s *Settings, v string, _ Host) string { return millis(&s.VMIdleTimeout, v) },
	"wsl2.kernelboottimeout":      func(s *Settings, v string, _ Host) string { return millis(&s.BootTimeout, v) },
	"wsl2.distributionstarttimeout": func(s *Settings, v string, _ Host) string {
		return millis(&s.DistroStartTimeout, v)
	},
	"wsl2.memory": func(s *Settings, v string, h Host) string {
		n, err := ParseSize(v)
		switch {
		case err != nil:
			return "Invalid memory size"
		case n < MinMemoryBytes:
			return fmt.Sprintf("Memory below %d MB (the default is used):", MinMemoryBytes>>20)
		case h.MemoryBytes != 0 && n > h.MemoryBytes:
			s.MemoryBytes = h.MemoryBytes / memoryStep * memoryStep
			return "Memory above the host's (the host's is used):"
		}
		s.MemoryBytes = n / memoryStep * memoryStep
		return ""
	},
	// More than the host has is no error, unlike with WSL: they take turns, and a
	// small machine can test what only many processors show.
	"wsl2.processors": func(s *Settings, v string, _ Host) string {
		n, err := strconv.Atoi(v)
		switch {
		case err != nil || n < 1:
			return "Invalid number of processors (the default is used)"
		case n > MaxProcessors:
			return fmt.Sprintf("More processors than the %d possible (the default is used):", MaxProcessors)
		}
		s.Processors = n
		return ""
	},
	"wsl2.kernel": func(s *Settings, v string, _ Host) string {
		if v != "" && !strings.HasPrefix(v, "/") {
			return "Kernel needs an absolute path; ignored:"
		}
		s.Kernel = v
		return ""
	},
	"wsl2.kernelcommandline": func(s *Settings, v string, _ Host) string { s.KernelCommandLine = v; return "" },
	"wsl2.accel": func(s *Settings, v string, _ Host) string {
		if !ValidAccel(v) {
			return "Accel must be auto, kvm or tcg; ignored:"
		}
		s.Accel = v
		return ""
	},
	"interop.enabled": func(s *Settings, v string, _ Host) string {
		b, err := strconv.ParseBool(strings.ToLower(v))
		if err != nil {
			s.Interop = false // who writes this wants less, not more
			return "Invalid boolean value (programs of the host are off)"
		}
		s.Interop = b
		return ""
	},
	"interop.sshagent": func(s *Settings, v string, _ Host) string {
		b, err := strconv.ParseBool(strings.ToLower(v))
		if err != nil {
			s.SSHAgent = false
			return "Invalid boolean value (the SSH agent is off)"
		}
		s.SSHAgent = b
		return ""
	},
	"interop.hostprograms": func(s *Settings, v string, _ Host) string {
		s.HostPrograms = strings.FieldsFunc(v, func(r rune) bool { return r == ',' || r == ' ' || r == '\t' })
		return ""
	},
	"wsl2.defaultvhdsize": func(s *Settings, v string, _ Host) string {
		n, err := ParseSize(v)
		if err != nil || n < minDiskBytes || n > maxDiskBytes {
			return "Invalid disk size"
		}
		s.DefaultDiskBytes = n
		return ""
	},
}

// knownElsewhere are keys of WSL's .wslconfig that have no meaning here, so
// that a file carried over does not warn about each of them.
var knownElsewhere = map[string]bool{
	"wsl2.nestedvirtualization": true, "wsl2.guiapplications": true, "wsl2.gpusupport": true,
	"general.distributioninstallpath": true, "wsl2.telemetry": true, "wsl2.debugconsole": true,
	"wsl2.pagereporting": true, "wsl2.safemode": true, "wsl2.firewall": true,
}

// ValidAccel tells whether name is a way to run a VM.
func ValidAccel(name string) bool { return name == "auto" || name == "kvm" || name == "tcg" }

func millis(d *time.Duration, v string) string {
	n, err := strconv.ParseInt(v, 0, 64)
	if err != nil || n > int64(1<<62/time.Millisecond) {
		return "Invalid integer value"
	}
	*d = time.Duration(max(n, -1)) * time.Millisecond
	return ""
}

// unquote drops a pair of quotes and resolves the escapes \\ \" \n \t \b.
func unquote(v string) (string, error) {
	if len(v) >= 2 && v[0] == '"' && v[len(v)-1] == '"' {
		v = v[1 : len(v)-1]
	}
	if !strings.Contains(v, `\`) {
		return v, nil
	}
	var b strings.Builder
	for i := 0; i < len(v); i++ {
		if v[i] != '\\' {
			b.WriteByte(v[i])
			continue
		}
		i++
		if i == len(v) {
			return "", errors.New(`Invalid escape '\'`)
		}
		switch v[i] {
		case '\\', '"':
			b.WriteByte(v[i])
		case 'n':
			b.WriteByte('\n')
		case 't':
			b.WriteByte('\t')
		case 'b':
			b.WriteByte('\b')
		default:
			return "", fmt.Errorf(`Invalid escape '\%c'`, v[i])
		}
	}
	return b.String(), nil
}

// ParseSize reads a size as WSL writes it: digits and B, K, KB, M, MB, G, GB,
// T or TB (powers of 1024, any case).
func ParseSize(v string) (uint64, error) {
	digits := strings.TrimRight(strings.ToUpper(v), "BKMGT")
	unit := strings.ToUpper(v)[len(digits):]
	shift, ok := map[string]uint{"": 0, "B": 0, "K": 10, "KB": 10, "M": 20, "MB": 20, "G": 30, "GB": 30, "T": 40, "TB": 40}[unit]
	n, err := strconv.ParseUint(digits, 10, 64)
	if !ok || err != nil || n > (1<<63)>>shift {
		return 0, fmt.Errorf("invalid size %q (want digits and B, KB, MB, GB or TB)", v)
	}
	return n << shift, nil
}
