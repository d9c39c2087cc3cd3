package tools

import (
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// Version is wsl2's, set by the linker (-X github.com/wsl2/wsl2/guest/tools.Version=...).
var Version = "0.1.0-dev"

const wslinfoUsage = `usage: wslinfo [-n] --version | --vm-id | --networking-mode | --msal-proxy-path
Tell about the VM that this distro runs in.
  -n  without a newline
`

// wslinfo is WSL's tool of that name (wsl.md §1.7).
func wslinfo(args []string, out, errOut io.Writer) int {
	newline, what := "\n", ""
	for _, arg := range args {
		switch arg {
		case "-n":
			newline = ""
		case "-h", "--help":
			fmt.Fprint(out, wslinfoUsage)
			return 0
		default:
			if what != "" {
				fmt.Fprint(errOut, wslinfoUsage)
				return say(errOut, "wslinfo: %s: one thing at a time", arg)
			}
			what = arg
		}
	}
	var text string
	var err error
	switch what {
	case "--version":
		text = Version
	case "--vm-id":
		text, err = vmID()
	case "--networking-mode":
		text, err = networkingMode()
	case "--msal-proxy-path": // Windows' sign-in broker
		return say(errOut, "wslinfo: %s: no Linux host has one", what)
	default:
		fmt.Fprint(errOut, wslinfoUsage)
		return say(errOut, "wslinfo: %s: Invalid argument", what)
	}
	if err != nil {
		return say(errOut, "wslinfo: %v", err)
	}
	fmt.Fprint(out, text, newline)
	return 0
}

// vmID is the kernel's name for this boot: one for each VM, the same in all of
// its distros.
func vmID() (string, error) {
	text, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	return strings.TrimSpace(string(text)), err
}

// networkingMode is "nat" once the VM has an interface beside loopback, which is
// user-mode NAT, and "none" before.
func networkingMode() (string, error) {
	const class = "/sys/class/net"
	list, err := os.ReadDir(class)
	for _, e := range list {
		text, _ := os.ReadFile(filepath.Join(class, e.Name(), "flags")) // one that has just gone is down
		flags, _ := strconv.ParseUint(strings.TrimSpace(string(text)), 0, 32)
		if flags&unix.IFF_UP != 0 && flags&unix.IFF_LOOPBACK == 0 {
			return "nat", nil
		}
	}
	return "none", err
}
