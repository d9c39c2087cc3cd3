//go:build e2e

package main_test

import (
	"go/ast"
	"go/parser"
	"go/token"
	"os"
	"path/filepath"
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

// Rows of the table of differences in docs/version1.md.
const (
	rowKernel  = "kernel, modules, `uname -r`, sysctls"
	rowNetwork = "network"
	rowShares  = "shared directories"
	rowMasks   = "shares' `umask`, `fmask`, `dmask` and `metadata`"
	rowMount   = "`/mnt/wsl`, `--mount`"
	rowSystemd = "systemd (`boot.systemd`)"
	rowLimits  = "limits (`[distro.NAME] memory`, `cpus`, `pids`)"
	rowDisk    = "`--manage --resize`, `--compact`, `--repair`, export as vhdx or raw, `--import --vhd`, `--import-in-place`"
	rowVM      = "`--debug-shell`, `--kernel`, `--accel`"
	rowOwnVM   = "`vm = own`"
)

// ofVersion2 are the other tests: those of what version 1 has not, by the row that says why, and those that it has one of its own for.
var ofVersion2 = map[string]string{
	"TestKilled": "TestVersion1Killed", "TestStaleSocket": "TestVersion1Killed", "TestKilledVerbs": "TestSetVersion",
	"TestManage": "TestVersion1Life", "TestImport": "TestVersion1Life", "TestInstall": "TestVersion1Life", "TestVerbs": "TestVersion1Life", "TestIdleStop": "TestVersion1Life",
	"TestAsUser": "TestVersion1Life", "TestPrograms": "TestVersion1Debian", "TestInstalled": "TestVersion1Debian", "TestMakeRun": "TestVersion1Debian",
	"TestDoctor": "TestVersion1NoRange",
	"TestPanic":  rowKernel, "TestSwap": rowKernel,
	"TestNetwork": rowNetwork, "TestNetworkRules": rowNetwork, "TestPorts": rowNetwork,
	"TestSharePrograms": rowShares, "TestShareTransports": rowShares, "TestShareServerDies": rowShares, "TestShareSettings": rowMasks,
	"TestMount": rowMount, "TestMountDevice": rowMount, "TestShared": rowMount,
	"TestSystemd": rowSystemd, "TestSystemdIdle": rowSystemd,
	"TestLimits":        rowLimits, // and the kvm ring's TestVersion1Limits
	"TestExportFormats": rowDisk, "TestNoSpace": rowDisk, "TestNoSpaceVerbs": rowDisk, "TestDamagedDisk": rowDisk, "TestDiskInUse": rowDisk,
	"TestDebugShell": rowVM, "TestSystemDistro": rowVM, "TestBadImages": rowVM, "TestBadKernels": rowVM, "TestSizes": rowVM, "TestNoKVM": rowVM, "TestNoQEMU": rowVM,
	"TestOwnVM": rowOwnVM,
}

// TestVersion1 runs the tests of both once more, with distros of version 1.
func TestVersion1(t *testing.T) {
	t.Setenv(versionVariable, "1")
	for _, c := range both {
		t.Run(c.name, c.test)
	}
}

// TestVersion1Table: each test of this ring is run with both versions, or docs/version1.md says why not, with a reason.
func TestVersion1Table(t *testing.T) {
	text, err := os.ReadFile(filepath.Join(testsys.Root(), "docs/version1.md"))
	testsys.Must(t, err)
	rows := map[string]bool{}
	_, table, _ := strings.Cut(string(text), "## Differences to version 2")
	for line := range strings.Lines(table) {
		if cells := strings.Split(strings.TrimSpace(line), " | "); len(cells) == 3 && strings.HasPrefix(cells[0], "| ") {
			rows[strings.TrimPrefix(cells[0], "| ")] = true
		}
	}
	tests := map[string]bool{}
	files, err := filepath.Glob("*_e2e_test.go")
	testsys.Must(t, err)
	for _, path := range files {
		f, err := parser.ParseFile(token.NewFileSet(), path, nil, 0)
		testsys.Must(t, err)
		for _, d := range f.Decls {
			if fn, ok := d.(*ast.FuncDecl); ok && fn.Recv == nil && strings.HasPrefix(fn.Name.Name, "Test") {
				tests[fn.Name.Name] = true
			}
		}
	}
	if len(tests) < len(both) {
		t.Fatalf("%d tests in %q", len(tests), files)
	}
	covered := map[string]bool{}
	for _, c := range both {
		covered["Test"+c.name] = true
	}
	for name, why := range ofVersion2 {
		covered[name] = true
		if !tests[name] {
			t.Errorf("there is no %s", name)
		}
		if strings.HasPrefix(why, "Test") && !tests[why] || !strings.HasPrefix(why, "Test") && !rows[why] {
			t.Errorf("%s is not run with version 1 because of %q, which is neither a test nor a row of docs/version1.md", name, why)
		}
	}
	for name := range tests {
		if !covered[name] && !strings.HasPrefix(name, "TestVersion1") && name != "TestSetVersion" {
			t.Errorf("%s is run with version 2 only: add it to the list of both, or say in docs/version1.md what is different and why", name)
		}
	}
}
