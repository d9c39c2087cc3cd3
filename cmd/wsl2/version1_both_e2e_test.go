//go:build e2e

package main_test

import (
	"go/ast"
	"go/parser"
	"go/token"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/wsl2/wsl2/internal/testsys"
)

// both are the tests of what both versions have in common, with a distro that newHost and configured make.
var both = []struct {
	name string
	test func(*testing.T)
}{
	{"StreamMatrix", TestStreamMatrix}, {"Floods", TestFloods}, {"ShortCommands", TestShortCommands}, {"PeerBugs", TestPeerBugs},
	{"Identity", TestIdentity}, {"Tmux", TestTmux}, {"GoTest", TestGoTest}, {"Sessions", TestSessions}, {"Terminal", TestTerminal},
	{"Tools", TestTools}, {"HostPrograms", TestHostPrograms}, {"Agent", TestAgent}, {"Share", TestShare}, {"Copy", TestCopy}, {"FSPath", TestFSPath},
	{"SSH", TestSSH}, {"WSLConf", TestWSLConf}, {"WSLConfWarns", TestWSLConfWarns}, {"Musl", TestMusl}, {"TwoDistros", TestTwoDistros},
}

// differences are the rows of the table in docs/version1.md, and the tests that show them; after them those that are
// not run with version 1 because of them.
var differences = map[string]struct{ shown, ofVersion2 []string }{
	"kernel, modules, `uname -r`, sysctls":       {[]string{"TestVersion1Life"}, []string{"TestPanic", "TestSwap"}},
	"wslconfig's `kernel`, `kernelCommandLine`":  {[]string{"TestVersion1Settings"}, nil},
	"wslconfig's `memory`, `processors`, `swap`": {nil, nil}, // as in WSL
	"processes":               {[]string{"TestVersion1Life"}, nil},
	"network":                 {[]string{"TestVersion1Settings"}, []string{"TestNetwork", "TestNetworkRules", "TestNetworkPrograms", "TestPorts", "TestDistroNetworks"}},
	"`/etc/resolv.conf`":      {[]string{"TestVersion1Debian"}, nil}, // apt finds its mirror
	"shared directories":      {[]string{"TestShare"}, []string{"TestSharePrograms", "TestShareTransports", "TestShareServerDies", "TestShareServerHangs"}},
	"shares, started by root": {[]string{"TestShare"}, nil},
	"shares' `umask`, `fmask`, `dmask` and `metadata`": {[]string{"TestVersion1Settings"}, []string{"TestShareSettings"}},
	"`/mnt/wsl`, `--mount`":                            {[]string{"TestVersion1Settings"}, []string{"TestMount", "TestMountDevice", "TestShared"}},
	"systemd (`boot.systemd`)":                         {[]string{"TestWSLConfWarns"}, []string{"TestSystemd", "TestSystemdIdle"}},
	"limits (`[distro.NAME] memory`, `cpus`, `pids`)":  {[]string{"TestVersion1Settings"}, []string{"TestLimits"}}, // and TestVersion1Limits in the kvm ring
	"when a distro's memory is used up":                {nil, []string{"TestLimits"}},
	"`vm = own`":                                       {[]string{"TestVersion1Settings"}, []string{"TestOwnVM"}},
	"`mknod`, loop mounts, file systems on devices":    {[]string{"TestVersion1Life", "TestSetVersion"}, nil},
	"`trusted.*` attributes":                           {[]string{"TestVersion1Life"}, nil},
	"MZ programs":                                      {[]string{"TestHostPrograms"}, nil},
	"`dmesg`":                                          {nil, nil}, // it is as the host has it set
	"limit of open files (`ulimit -Hn`)":               {[]string{"TestVersion1Life"}, nil},
	"`--manage --resize`, `--compact`, `--repair`, export as vhdx or raw, `--import --vhd`, `--import-in-place`": {[]string{"TestVersion1Life"},
		[]string{"TestExportFormats", "TestNoSpace", "TestNoSpaceVerbs", "TestDamagedDisk", "TestDiskInUse"}},
	"`--manage --move`, `--clone`": {[]string{"TestVersion1Life"}, nil},
	"`--debug-shell`, `--kernel`, `--accel`": {[]string{"TestVersion1Life"},
		[]string{"TestDebugShell", "TestSystemDistro", "TestBadImages", "TestBadKernels", "TestSizes", "TestNoKVM", "TestNoQEMU"}},
	"setuid files in shares, started by root": {[]string{"TestVersion1Mounts"}, nil},
}

// apart are the tests that are run with version 2 only though version 1 has what they test, and why.
var apart = map[string]string{
	"TestAsUser":           "it repeats tests of both as another user: TestVersion1Life and TestVersion1Debian are run by one",
	"TestPrograms":         "it is about a whole Debian in a VM: TestVersion1Debian",
	"TestHostCertificates": "the distro's init does the same in both, before it knows of a kernel",
	"TestIdleStop":         "it is about the VM's end: TestVersion1Life stops when idle",
	"TestImport":           "its archives go to the same importer: TestVersion1Life",
	"TestInstall":          "it ends in the import of an archive: TestVersion1Life",
	"TestInstallKilled":    "as TestInstall",
	"TestInstalled":        "it is about the files of an installation",
	"TestJSON":             "it has distros of both",
	"TestKilled":           "TestVersion1Killed",
	"TestKilledVerbs":      "TestVersion1Killed and TestSetVersion",
	"TestManage":           "it is about disks: TestVersion1Life",
	"TestVerbs":            "it is about the registry, which both have in common",
	"TestDoctor":           "it starts no distro: TestVersion1IDs",
	"TestMakeRun":          "it starts what was built",
	"TestStaleSocket":      "it is about the service's socket",
}

// TestVersion1 runs the tests of both once more, with distros of version 1.
func TestVersion1(t *testing.T) {
	t.Setenv(versionVariable, "1")
	for _, c := range both {
		t.Run(c.name, c.test)
	}
}

// TestVersion1Table: each difference in docs/version1.md has its reason, and tests that are there.
func TestVersion1Table(t *testing.T) {
	text, err := os.ReadFile(filepath.Join(testsys.Root(), "docs/version1.md"))
	testsys.Must(t, err)
	_, table, _ := strings.Cut(string(text), "## Differences to version 2")
	table, _, _ = strings.Cut(table, "\n## ")
	rows := map[string]bool{}
	for line := range strings.Lines(table) {
		cells := strings.Split(strings.Trim(strings.TrimSpace(line), "|"), " | ")
		name := strings.TrimSpace(cells[0])
		if len(cells) != 3 || name == "" {
			continue
		}
		rows[name] = true
		if _, ok := differences[name]; !ok {
			t.Errorf("no test is named that shows the difference %q", name)
		}
		if strings.TrimSpace(cells[2]) == "" {
			t.Errorf("the difference %q has no reason", name)
		}
	}
	placed := map[string]bool{}
	for _, c := range both {
		placed["Test"+c.name] = true
	}
	for name, why := range apart {
		if placed[name] || why == "" {
			t.Errorf("%s is run with both versions, or has no reason not to be", name)
		}
		placed[name] = true
	}
	for _, d := range differences {
		for _, name := range d.ofVersion2 {
			placed[name] = true
		}
	}
	tests := map[string]bool{}
	files, err := filepath.Glob("*_e2e_test.go")
	testsys.Must(t, err)
	for _, path := range files {
		f, err := parser.ParseFile(token.NewFileSet(), path, nil, 0)
		testsys.Must(t, err)
		for _, d := range f.Decls {
			if fn, ok := d.(*ast.FuncDecl); ok && fn.Recv == nil {
				tests[fn.Name.Name] = true
			}
		}
	}
	for name := range tests {
		own := strings.HasPrefix(name, "TestVersion1") || name == "TestSetVersion"
		if strings.HasPrefix(name, "Test") && !own && !placed[name] {
			t.Errorf("%s is neither run with both versions, nor does anything say why not", name)
		}
	}
	for name := range apart {
		if !tests[name] {
			t.Errorf("there is no %s", name)
		}
	}
	for name, d := range differences {
		if !rows[name] {
			t.Errorf("docs/version1.md has no difference %q", name)
		}
		for _, test := range slices.Concat(d.shown, d.ofVersion2) {
			if !tests[test] {
				t.Errorf("%q: there is no %s", name, test)
			}
		}
		for _, test := range d.ofVersion2 {
			if slices.ContainsFunc(both, func(b struct {
				name string
				test func(*testing.T)
			}) bool {
				return "Test"+b.name == test
			}) {
				t.Errorf("%q: %s is run with both versions", name, test)
			}
		}
	}
}
