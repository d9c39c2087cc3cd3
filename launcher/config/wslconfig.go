package config

import (
	"errors"
	"fmt"
	"io/fs"
	"net/url"
	"os"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/wsl2/wsl2/internal/ini"
	"github.com/wsl2/wsl2/internal/wire"
	"github.com/wsl2/wsl2/launcher/ports"
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
	SwapBytes                       uint64 // of the VM; 0 = none
	SwapFile                        string // where it is made; "" = in the state directory
	DistributionListURL             string // of a DistributionInfo.json; "" = Microsoft's
	// Interop says whether distros may run programs of the host, HostPrograms
	// which: names or absolute paths, "*" for all.
	Interop      bool
	HostPrograms []string
	SSHAgent     bool // distros may use the caller's SSH agent
	// OwnVM are the distros, by folded name, that have a VM of their own.
	OwnVM   map[string]bool
	Shares  Shares
	Network Network
	// Networks are the distros, by folded name, that do not share the VM's network: OwnNetwork or NoNetwork.
	Networks map[string]string
	// SafeMode starts distros as if they had no /etc/wsl.conf.
	SafeMode bool
	// Limits are what distros may use of the VM, by their folded names.
	Limits map[string]wire.Limits
	// Ports are what distros serve, on the host.
	Ports ports.Policy
}

// Limits of what a VM can be asked for.
const (
	MaxProcessors  = 64
	MinMemoryBytes = 128 << 20 // the kernel, 16 disks and a distro; with less, /init or the first program dies
	memoryStep     = 2 << 20
	minDiskBytes   = 1 << 30
	maxDiskBytes   = 16 << 40 // ext4 with 4 KiB blocks
	minSwapBytes   = 1 << 20
	maxSwapBytes   = 1 << 40
)

// Host is what defaults and limits depend on.
type Host struct {
	MemoryBytes uint64
	CPUs        int
	Home        string // the user's directory
}

// ThisHost asks the kernel.
func ThisHost() Host {
	return Host{MemoryBytes: totalMemory(), CPUs: runtime.NumCPU(), Home: os.Getenv("HOME")}
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
		Shares:              defaultShares(h.Home),
		Ports:               ports.Policy{Localhost: true},
		Network:             Network{HostLoopback: true, AutoProxy: true},
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

// parse applies the text of a file (package ini).
func (s *Settings) parse(text, path string, h Host) (warnings []string) {
	warn := func(line int, what string) {
		warnings = append(warnings, fmt.Sprintf("%s in %s:%d", what, path, line))
	}
	entries, problems := ini.Parse(text)
	for _, e := range entries {
		if name, ok := distroOf(e); ok {
			if msg := s.setDistro(name, e); msg != "" {
				warn(e.Line, msg)
			}
			continue
		}
		if distro, ok := isShare(e); ok {
			if msg := s.Shares.set(distro, e, h.Home); msg != "" {
				warn(e.Line, fmt.Sprintf("%s '%s' for key '%s'", msg, e.Value, e.Key))
			}
			continue
		}
		set, known := settings[e.Name()]
		if !known {
			if !slices.Contains(knownElsewhere, e.Name()) {
				warn(e.Line, ini.Unknown(e, knownNames))
			}
			continue
		}
		if msg := set(s, e.Value, h); msg != "" {
			warn(e.Line, fmt.Sprintf("%s '%s' for key '%s'", msg, e.Value, e.Key))
		}
	}
	for _, p := range problems {
		warn(p.Line, p.Text)
	}
	return warnings
}

// What a distro's init and a shell in it need.
const (
	minDistroMemory = 32 << 20
	minDistroCPUs   = 0.01
	minDistroPIDs   = 32
)

// distroOf returns the distro that a setting is for, if it is for one: [distro.NAME].
func distroOf(e ini.Entry) (name string, ok bool) {
	return strings.CutPrefix(strings.ToLower(e.Section), "distro.")
}

// setDistro stores a setting of a distro; the result is a warning, empty if the value
// was good.
func (s *Settings) setDistro(distro string, e ini.Entry) string {
	l, good := s.Limits[distro], false
	switch strings.ToLower(e.Key) {
	case "vm":
		value := strings.ToLower(e.Value)
		if value != "own" && value != "shared" {
			return fmt.Sprintf("Invalid value '%s' for key '%s.%s', want own or shared,", e.Value, e.Section, e.Key)
		}
		if s.OwnVM == nil {
			s.OwnVM = map[string]bool{}
		}
		s.OwnVM[distro] = value == "own"
		return ""
	case "network":
		return s.setDistroNetwork(distro, e)
	case "memory":
		n, err := ParseSize(e.Value)
		l.MemoryBytes, good = n, err == nil && n >= minDistroMemory
	case "cpus":
		n, err := strconv.ParseFloat(e.Value, 64)
		good = err == nil && n >= minDistroCPUs && n <= MaxProcessors
		if good {
			l.MilliCPUs = uint32(n * 1000)
		}
	case "pids":
		n, err := strconv.ParseUint(e.Value, 10, 22) // Linux has no more (PID_MAX_LIMIT)
		l.PIDs, good = uint32(n), err == nil && n >= minDistroPIDs
	default:
		return ini.Unknown(e, []string{e.Section + ".vm", e.Section + ".network", e.Section + ".memory", e.Section + ".cpus", e.Section + ".pids"})
	}
	if !good {
		return fmt.Sprintf("Invalid limit '%s' for key '%s.%s'", e.Value, e.Section, e.Key)
	}
	if s.Limits == nil {
		s.Limits = map[string]wire.Limits{}
	}
	s.Limits[distro] = l
	return ""
}

// knownNames are the keys that a slip of the fingers may have missed.
var knownNames = []string{
	"general.instanceIdleTimeout", "general.distributionListUrl",
	"wsl2.vmIdleTimeout", "wsl2.kernelBootTimeout", "wsl2.distributionStartTimeout", "wsl2.memory", "wsl2.processors",
	"wsl2.kernel", "wsl2.kernelCommandLine", "wsl2.accel", "wsl2.defaultVhdSize",
	"interop.enabled", "interop.hostPrograms", "interop.sshAgent", "wsl2.safeMode", "wsl2.swap", "wsl2.swapFile",
	"wsl2.localhostForwarding", "ports.ignore", "ports.privileged", "ports.publish", "experimental.ignoredPorts",
	"wsl2.networkingMode", "wsl2.autoProxy", "network.hostLoopback", "network.hostCertificates", "network.bandwidth", "network.allow", "network.deny",
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
	"general.distributionlisturl": func(s *Settings, v string, _ Host) string {
		if u, err := url.Parse(v); err != nil || u.Scheme != "https" && u.Scheme != "http" && u.Scheme != "file" {
			return "Want a URL with https:// or file://; ignored:"
		}
		s.DistributionListURL = v
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
	"wsl2.autoproxy":           func(s *Settings, v string, _ Host) string { return s.Network.setAutoProxy(v) },
	"wsl2.networkingmode":      func(s *Settings, v string, _ Host) string { return s.Network.setMode(v) },
	"network.hostloopback":     func(s *Settings, v string, _ Host) string { return s.Network.setHostLoopback(v) },
	"network.hostcertificates": func(s *Settings, v string, _ Host) string { return s.Network.setHostCertificates(v) },
	"network.bandwidth":        func(s *Settings, v string, _ Host) string { return s.Network.setBandwidth(v) },
	"network.allow":            func(s *Settings, v string, _ Host) string { return s.Network.setAllow(v) },
	"network.deny":             func(s *Settings, v string, _ Host) string { return s.Network.setDeny(v) },
	"wsl2.safemode": func(s *Settings, v string, _ Host) string {
		b, ok := ini.Bool(v)
		if !ok {
			return "Invalid boolean value"
		}
		s.SafeMode = b
		return ""
	},
	"wsl2.swap": func(s *Settings, v string, _ Host) string {
		n, err := ParseSize(v)
		if err != nil || n != 0 && (n < minSwapBytes || n > maxSwapBytes) {
			return "Invalid swap size"
		}
		s.SwapBytes = n
		return ""
	},
	"wsl2.swapfile": func(s *Settings, v string, _ Host) string {
		if v != "" && !strings.HasPrefix(v, "/") {
			return "Swap file needs an absolute path; ignored:"
		}
		s.SwapFile = v
		return ""
	},
	"wsl2.localhostforwarding": func(s *Settings, v string, _ Host) string {
		b, ok := ini.Bool(v)
		s.Ports.Localhost = b && ok // who writes this wants less, not more
		if !ok {
			return "Invalid boolean value (ports of distros stay in the VM)"
		}
		return ""
	},
	"ports.privileged": func(s *Settings, v string, _ Host) string {
		b, ok := ini.Bool(v)
		if !ok {
			return "Invalid boolean value"
		}
		s.Ports.Privileged = b
		return ""
	},
	"ports.ignore":              ignorePorts,
	"experimental.ignoredports": ignorePorts, // WSL's name
	"ports.publish": func(s *Settings, v string, _ Host) string {
		rules, err := ports.ParseRules(v)
		if err != nil {
			return fmt.Sprintf("Not published (%v):", err)
		}
		s.Ports.Rules = rules
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

// knownElsewhere are keys of WSL's .wslconfig that have no meaning here
// (docs/settings.md says why), so that a file carried over does not warn about each of them.
var knownElsewhere = []string{
	"wsl2.kernelmodules", "wsl2.loadkernelmodules", "wsl2.loaddefaultkernelmodules", "wsl2.kerneldebugport",
	"wsl2.pagereporting", "wsl2.nestedvirtualization", "wsl2.hardwareperformancecounters",
	"wsl2.mountdevicetimeout", "wsl2.debugconsole", "wsl2.debugconsolelogfile", "wsl2.earlybootlogging",
	"wsl2.vmswitch", "wsl2.macaddress", "wsl2.dhcp", "wsl2.dhcptimeout", "wsl2.ipv6",
	"wsl2.dnsproxy", "wsl2.dnstunneling", "wsl2.firewall",
	"wsl2.gpusupport", "wsl2.guiapplications", "wsl2.systemdistro", "wsl2.hostfilesystemaccess", "wsl2.virtio", "wsl2.virtiofs", "wsl2.virtio9p",
	"wsl2.crashdumpfolder", "wsl2.maxcrashdumpcount", "wsl2.isolatedistrocgroup", "wsl2.telemetry",
	"general.distributioninstallpath",
	"experimental.automemoryreclaim", "experimental.sparsevhd", "experimental.besteffortdnsparsing",
	"experimental.dnstunnelingipaddress", "experimental.initialautoproxytimeout",
	"experimental.hostaddressloopback", "experimental.swiotlb", "experimental.virtiofsaggregateshares", "experimental.setversiondebug",
	"experimental.networkingmode", "experimental.dnstunneling", "experimental.firewall", "experimental.autoproxy",
}

func ignorePorts(s *Settings, v string, _ Host) string {
	list, err := ports.ParseRanges(v)
	if err != nil {
		return fmt.Sprintf("Ignores no ports (%v):", err)
	}
	s.Ports.Ignore = append(s.Ports.Ignore, list...)
	return ""
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
