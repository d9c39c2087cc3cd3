package config

import (
	"maps"
	"net/netip"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/wsl2/wsl2/internal/wire"
	"github.com/wsl2/wsl2/launcher/ports"
	"github.com/wsl2/wsl2/vmm/usernet/policy"
)

func env(m map[string]string) func(string) string { return func(k string) string { return m[k] } }

func TestFromEnvUsesXDG(t *testing.T) {
	run := shortDir(t)
	p, err := FromEnv(env(map[string]string{
		"HOME": "/home/u", "XDG_RUNTIME_DIR": run, "XDG_DATA_HOME": "/data", "XDG_STATE_HOME": "relative",
	}), os.Getuid())
	if err != nil {
		t.Fatal(err)
	}
	for got, want := range map[string]string{
		p.Registry():      "/data/wsl2/registry.json",
		p.ConfigFile:      "/home/u/.config/wsl2/wslconfig",
		p.ServiceLog():    "/home/u/.local/state/wsl2/service.log", // relative = ignored
		p.ServiceSocket(): run + "/wsl2/service.sock",
	} {
		if got != want {
			t.Errorf("got %s, want %s", got, want)
		}
	}
	if st, err := os.Stat(p.Runtime); err != nil || st.Mode().Perm() != 0o700 {
		t.Errorf("runtime directory: %v %v", st, err)
	}
}

func TestFromEnvNeedsHome(t *testing.T) {
	if _, err := FromEnv(env(nil), os.Getuid()); err == nil || !strings.Contains(err.Error(), "HOME") {
		t.Fatalf("err = %v", err)
	}
}

func TestFromEnvLongRuntimeDir(t *testing.T) {
	long := filepath.Join(shortDir(t), strings.Repeat("x", 100))
	if err := os.Mkdir(long, 0o700); err != nil {
		t.Fatal(err)
	}
	_, err := FromEnv(env(map[string]string{"HOME": "/h", "XDG_RUNTIME_DIR": long}), os.Getuid())
	if err == nil || !strings.Contains(err.Error(), "shorter path") {
		t.Fatalf("err = %v", err)
	}
}

func TestRuntimeDirFallsBack(t *testing.T) {
	tmp := shortDir(t)
	me := os.Getuid()
	for _, xdg := range []string{"", "relative", filepath.Join(tmp, "absent")} {
		dir, err := runtimeDir(xdg, me, tmp)
		if err != nil || filepath.Dir(dir) != tmp {
			t.Errorf("runtimeDir(%q) = %q, %v", xdg, dir, err)
		}
	}
	// Someone else's directory in our place, or a link to one of ours, is refused.
	if _, err := runtimeDir("", me+1, tmp); err == nil { // made by us, hence not me+1's
		t.Error("a foreign directory was taken")
	}
	link := filepath.Join(tmp, "l")
	if err := os.Symlink(tmp, link); err != nil {
		t.Fatal(err)
	}
	if err := privateDir(link, me); err == nil {
		t.Error("a symlink was taken")
	}
	open := filepath.Join(tmp, "open")
	if err := os.Mkdir(open, 0o777); err != nil {
		t.Fatal(err)
	}
	if err := privateDir(open, me); err != nil {
		t.Fatal(err)
	}
	if st, _ := os.Stat(open); st.Mode().Perm() != 0o700 {
		t.Errorf("mode %v", st.Mode())
	}
}

func TestSettings(t *testing.T) {
	host := Host{MemoryBytes: 16 << 30, CPUs: 12}
	text := strings.Join([]string{
		"\ufeff# comment", "[General]", "InstanceIdleTimeout = -1", "", "[wsl2]", "vmIdleTimeout=2000",
		"memory=4GB", "processors=3", `kernel="/boot/my kernel"`, `kernelCommandLine = quiet foo=\"a\" # more`, "accel=tcg",
		"nestedVirtualization=true", "defaultVhdSize=1TB",
		"[interop]", "hostPrograms = xdg-open, git /usr/bin/code", "sshAgent=false",
		"[distro.Debian-12.1]", "memory = 512MB", "cpus = 1.5", "[distro.small]", "pids = 100", "[wsl2]", "safeMode = true", "swap = 4GB", "swapFile = /srv/swap", "guiApplications = false",
		"localhostForwarding = false", "[ports]", "ignore = 5432, 6000-6010", "privileged = true", "publish = debian:80:8080 allow=10.0.0.0/8; debian:53/udp address=192.168.1.5", "[experimental]", "ignoredPorts = 7000",
		"[wsl2]", "networkingMode = none", "[network]", "hostLoopback = false", "hostCertificates = true", "bandwidth = 10MB", "allow = *.example.org:443, 192.0.2.0/24", "deny = [2001:db8::1]:25",
	}, "\n")
	s := Defaults(host)
	if w := s.parse(text, "f", host); len(w) != 0 {
		t.Fatalf("warnings %q", w)
	}
	want := Settings{InstanceIdleTimeout: -time.Millisecond, VMIdleTimeout: 2 * time.Second, BootTimeout: time.Minute,
		DistroStartTimeout: time.Minute, MemoryBytes: 4 << 30, Processors: 3, Kernel: "/boot/my kernel",
		KernelCommandLine: `quiet foo="a"`, Accel: "tcg", DefaultDiskBytes: 1 << 40,
		Interop: true, HostPrograms: []string{"xdg-open", "git", "/usr/bin/code"}, SafeMode: true, SwapBytes: 4 << 30, SwapFile: "/srv/swap",
		Limits: map[string]wire.Limits{"debian-12.1": {MemoryBytes: 512 << 20, MilliCPUs: 1500}, "small": {PIDs: 100}},
		Ports: ports.Policy{Privileged: true, Ignore: []ports.Range{{First: 5432, Last: 5432}, {First: 6000, Last: 6010}, {First: 7000, Last: 7000}},
			Rules: []ports.Rule{
				{Distro: "debian", Port: 80, HostPort: 8080, Allow: []netip.Prefix{netip.MustParsePrefix("10.0.0.0/8")}},
				{Distro: "debian", UDP: true, Port: 53, HostPort: 53, Address: netip.MustParseAddr("192.168.1.5")},
			}},
		Network: Network{Off: true, AutoProxy: true, HostCertificates: true, Bandwidth: 10 << 20, Policy: policy.Policy{
			Restricted: true,
			Allow:      []policy.Rule{{Name: "*.example.org", Port: 443}, {Net: netip.MustParsePrefix("192.0.2.0/24")}},
			Deny:       []policy.Rule{{Net: netip.MustParsePrefix("2001:db8::1/128"), Port: 25}},
		}}}
	if !reflect.DeepEqual(s, want) {
		t.Fatalf("got %+v\nwant %+v", s, want)
	}
}

// TestDocumented: the page of settings names every key that is not warned of, and
// what may be meant is what there is.
func TestDocumented(t *testing.T) {
	page, err := os.ReadFile("../../docs/settings.md")
	if err != nil {
		t.Fatal(err)
	}
	text := strings.ToLower(string(page))
	for _, name := range append(slices.Collect(maps.Keys(settings)), knownElsewhere...) {
		if !strings.Contains(text, name) {
			t.Errorf("docs/settings.md lacks %s", name)
		}
	}
	for _, name := range knownNames {
		if settings[strings.ToLower(name)] == nil {
			t.Errorf("no key %s", name)
		}
	}
	if len(knownNames) != len(settings) {
		t.Errorf("%d keys, of which %d may be meant", len(settings), len(knownNames))
	}
}

func TestSettingsWarn(t *testing.T) {
	host := Host{MemoryBytes: 16 << 30, CPUs: 4}
	for line, want := range map[string]string{
		"[wsl2]\nnope=1":                   "Unknown key 'wsl2.nope' in f:2",
		"nope":                             "Expected 'key = value', found 'nope' in f:1",
		"[wsl2":                            "Invalid section '[wsl2' in f:1",
		"[wsl2]\nvmIdleTimeout=soon":       "Invalid integer value 'soon' for key 'vmIdleTimeout' in f:2",
		"[wsl2]\nmemory=lots":              "Invalid memory size 'lots'",
		"[wsl2]\nmemory=1MB":               "Memory below 128 MB",
		"[wsl2]\nmemory=1TB":               "Memory above the host's",
		"[wsl2]\nprocessors=0":             "Invalid number of processors",
		"[wsl2]\nprocessors=1000":          "More processors than the 64",
		"[wsl2]\naccel=hvf":                "Accel must be",
		"[wsl2]\nkernel=vmlinux":           "absolute path",
		"[distro.deb]\nvm=mine":            "Invalid value 'mine' for key 'distro.deb.vm'",
		"[distro.deb]\nvn=own":             "Unknown key 'distro.deb.vn' (did you mean 'distro.deb.vm'?) in f:2",
		"[wsl2]\naccel=kvm\naccel=tcg":     "Duplicated config key 'wsl2.accel' in f:3",
		"[wsl2]\nkernelCommandLine=a\\qb":  `Invalid escape '\q'`,
		"[wsl2]\ndefaultVhdSize=1KB":       "Invalid disk size",
		"[wsl2]\nkernelCommandLine=dang\\": `Invalid escape '\'`,
		"[wsl2]\nswap=4KB":                 "Invalid swap size '4KB'",
		"[wsl2]\nswapFile=swap":            "Swap file needs an absolute path",
		"[wsl2]\nsafeMode=2":               "Invalid boolean value '2'",
		"[distro.a]\nmemory=1MB":           "Invalid limit '1MB' for key 'distro.a.memory' in f:2",
		"[distro.a]\ncpus=0":               "Invalid limit '0'",
		"[distro.a]\ncpus=nan":             "Invalid limit 'nan'",
		"[distro.a]\npids=-1":              "Invalid limit '-1'",
		"[distro.a]\npid=100":              "Unknown key 'distro.a.pid' (did you mean 'distro.a.pids'?) in f:2",
	} {
		s := Defaults(host)
		w := s.parse(line, "f", host)
		if len(w) != 1 || !strings.Contains(w[0], want) {
			t.Errorf("%q: warnings %q, want %q", line, w, want)
		}
		if s.MemoryBytes%memoryStep != 0 || s.Processors < 1 || s.Processors > 4 {
			t.Errorf("%q: unusable settings %+v", line, s)
		}
		if s.Limits != nil || s.SafeMode {
			t.Errorf("%q: a bad value counts: %+v", line, s)
		}
	}
}

func TestLoad(t *testing.T) {
	dir := t.TempDir()
	if _, w := Load(filepath.Join(dir, "absent"), ThisHost()); w != nil {
		t.Errorf("absent file warns: %q", w)
	}
	if _, w := Load(dir, ThisHost()); len(w) != 1 {
		t.Errorf("unreadable file: %q", w)
	}
	if h := ThisHost(); h.MemoryBytes < 64<<20 || h.CPUs < 1 {
		t.Errorf("ThisHost = %+v", h)
	}
}

func TestParseSize(t *testing.T) {
	for v, want := range map[string]uint64{"1": 1, "7B": 7, "3k": 3 << 10, "3KB": 3 << 10, "2mb": 2 << 20, "5G": 5 << 30, "1TB": 1 << 40} {
		if n, err := ParseSize(v); err != nil || n != want {
			t.Errorf("ParseSize(%q) = %d, %v", v, n, err)
		}
	}
	for _, v := range []string{"", "G", "1X", "-1", "1.5G", "BB", "1BK", "99999999999999999999", "9999999999TB"} {
		if n, err := ParseSize(v); err == nil {
			t.Errorf("ParseSize(%q) = %d", v, n)
		}
	}
}

// TestDistroSettings: sections of distros, in whatever case.
func TestDistroSettings(t *testing.T) {
	s := Defaults(Host{})
	w := s.parse("[distro.Debian]\nVM = Own\n[distro.a.b]\nvm=own\n[distro.c]\nvm=shared", "f", Host{})
	if len(w) != 0 || !reflect.DeepEqual(s.OwnVM, map[string]bool{"debian": true, "a.b": true, "c": false}) {
		t.Errorf("%v, warnings %q", s.OwnVM, w)
	}
	w = s.parse("[distro.Debian]\nNetwork = Own\n[distro.a.b]\nnetwork=none\n[distro.c]\nnetwork=shared\n[distro.d]\nnetwork=mine", "f", Host{})
	if len(w) != 1 || !strings.Contains(w[0], "none (which is used)") || !reflect.DeepEqual(s.Networks, map[string]string{"debian": OwnNetwork, "a.b": NoNetwork, "d": NoNetwork}) {
		t.Errorf("%v, warnings %q", s.Networks, w)
	}
}

// TestOvercommit: more processors than the host has are the user's wish.
func TestOvercommit(t *testing.T) {
	h := Host{MemoryBytes: 1 << 30, CPUs: 2}
	s := Defaults(h)
	if w := s.parse("[wsl2]\nprocessors=64", "f", h); len(w) != 0 || s.Processors != 64 {
		t.Errorf("%d processors, warnings %q", s.Processors, w)
	}
}

func FuzzSettings(f *testing.F) {
	f.Add("[wsl2]\nmemory=4GB\n")
	f.Fuzz(func(t *testing.T, text string) {
		h := Host{MemoryBytes: 1 << 30, CPUs: 2}
		s := Defaults(h)
		s.parse(text, "f", h)
		if s.MemoryBytes < MinMemoryBytes || s.MemoryBytes > h.MemoryBytes || s.MemoryBytes%memoryStep != 0 ||
			s.Processors < 1 || s.Processors > MaxProcessors || !ValidAccel(s.Accel) {
			t.Fatalf("%q gives %+v", text, s)
		}
	})
}

// shortDir is a temporary directory whose path leaves room for socket names.
func shortDir(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("/tmp", "w")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	return dir
}

// TestShares: what a distro sees of the host, by wslconfig's lines.
func TestShares(t *testing.T) {
	home := Share{Share: wire.Share{Host: "/home/me", Guest: "/mnt/host"}}
	data := Share{Share: wire.Share{Host: "/srv/my, data", Guest: "/mnt/data", ReadOnly: true}}
	src := Share{Share: wire.Share{Host: "/home/me/src", Guest: "/mnt/host"}}
	with := func(s Share, change func(*Share)) Share { change(&s); return s }
	for text, want := range map[string][]Share{
		"":                                 {home},
		"[shares]\ndata=/srv/my, data, ro": {data, home},
		"[shares]\nhost=none":              nil,
		"[shares]\nhost=~/src/,rw":         {src},
		"[shares]\nhost=~, metadata, umask=077, fmask=177":                 {with(home, func(s *Share) { s.Metadata, s.FileMask, s.DirMask = true, 0o177, 0o77 })},
		"[shares]\nhost=~, dmask=22, transport=9p, rw":                     {with(home, func(s *Share) { s.Stream, s.DirMask = true, 0o22 })},
		"[shares]\nhost=~/src, transport=virtiofs":                         {src},
		"[shares]\nhost=~/src, case=dir\n[shares.x]\nhost=~, case=force":   {src},
		"[shares]\nhost=/a, umask=99":                                      {with(home, func(s *Share) { s.Host = "/a, umask=99" })},
		"[shares]\nhost=~":                                                 {home},
		"[Shares]\nhost=~, ro":                                             {with(home, func(s *Share) { s.ReadOnly = true })},
		"[shares]\nisolated=true\n[shares.debian]\nisolated=false\nhost=~": nil,
		"[shares.debian]\nisolated=true":                                   nil,
		"[shares.other]\nisolated=true\ndata=/x":                           {home},
		"[shares]\ndata=/x\n[shares.DEBIAN]\ndata=/srv/my, data, ro":       {data, home},
		"[shares.debian]\ndata=/srv/my, data, ro\n[shares]\ndata=/x":       {data, home},
		"[shares]\ndata=/x\n[shares.debian]\ndata=none\nhost=none":         nil,
	} {
		h := Host{Home: "/home/me"}
		s := Defaults(h)
		if w := s.parse(text, "f", h); len(w) != 0 {
			t.Errorf("%q: warnings %q", text, w)
		}
		if got := s.Shares.Of("Debian"); !reflect.DeepEqual(got, want) {
			t.Errorf("%q: %+v, want %+v", text, got, want)
		}
	}
	for text, want := range map[string]string{
		"[shares]\ndata=srv":      "absolute path",
		"[shares]\na/b=/srv":      "Not a directory's name",
		"[shares]\n..=/srv":       "Not a directory's name",
		"[shares]\ndata=~other/x": "absolute path",
	} {
		s := Defaults(Host{Home: "/home/me"})
		if w := s.parse(text, "f", Host{}); len(w) != 1 || !strings.Contains(w[0], want) || len(s.Shares.Of("debian")) != 1 {
			t.Errorf("%q: warnings %q, shares %+v", text, w, s.Shares)
		}
	}
	s := Defaults(Host{Home: "/home/me"})
	if w := s.parse("[shares]\nisolated=perhaps", "f", Host{}); len(w) != 1 || s.Shares.Of("debian") != nil {
		t.Errorf("%q, %+v", w, s.Shares)
	}
	s = Defaults(Host{Home: "/home/me"})
	if w := s.parse("[shares]\nhost=~/src, case=off", "f", Host{Home: "/home/me"}); len(w) != 1 || !strings.Contains(w[0], "chattr +F") ||
		!reflect.DeepEqual(s.Shares.Of("debian"), []Share{src}) {
		t.Errorf("%q, %+v", w, s.Shares)
	}
	if got := Defaults(Host{}).Shares.Of("debian"); got != nil {
		t.Errorf("without a home: %+v", got)
	}
}

// What is suggested is what is known.
func TestKnownNames(t *testing.T) {
	if len(knownNames) != len(settings) {
		t.Errorf("%d names, %d settings", len(knownNames), len(settings))
	}
	for _, n := range knownNames {
		if settings[strings.ToLower(n)] == nil {
			t.Errorf("%s is no setting", n)
		}
	}
	var set Settings
	w := set.parse("[wsl2]\nmemroy=4GB\n[general]\ndistributionListUrl=file:///x\ninstanceidletimeout=x\n", "F", Host{})
	if len(w) != 2 || w[0] != "Unknown key 'wsl2.memroy' (did you mean 'wsl2.memory'?) in F:2" || set.DistributionListURL != "file:///x" {
		t.Errorf("%q", w)
	}
}
