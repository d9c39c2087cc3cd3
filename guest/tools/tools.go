// Package tools is /init under its other names: what a distro's users call in it.
// A link to /init with any other name than those of Names stands for the program of
// the host that has this name (ln -s /init xdg-open).
package tools

import (
	"fmt"
	"io"
	"os"
	"path/filepath"

	"github.com/wsl2/wsl2/guest/hostexec"
	"github.com/wsl2/wsl2/internal/hostpath"
)

// Names are the tools that every distro has.
var Names = []string{"wslpath", "wslinfo", "host-exec", "wsl2", "xdg-open"}

// Init is where a distro finds /init, and what binfmt_misc calls for a program
// that only the host can run.
const Init = "/init"

// Main runs the tool that argv[0] names and returns the exit status.
func Main(argv []string) int {
	if len(argv) == 0 {
		return 125
	}
	shares, err := Shares()
	if err != nil {
		fmt.Fprintf(os.Stderr, "%s: %v\n", filepath.Base(argv[0]), err)
	}
	switch name := filepath.Base(argv[0]); {
	case argv[0] == Init:
		return foreign(argv[1:], shares)
	case name == "wslpath":
		return wslpath(argv[1:], shares, os.Stdout, os.Stderr)
	case name == "wslinfo":
		return wslinfo(argv[1:], os.Stdout, os.Stderr)
	case name == "host-exec":
		if len(argv) < 2 {
			fmt.Fprintln(os.Stderr, "usage: host-exec PROGRAM [ARGUMENT...]: run a program of the host")
			return 125
		}
		return hostexec.Run(argv[1:], shares)
	default:
		return hostexec.Run(append([]string{name}, argv[1:]...), shares)
	}
}

// foreign is what the kernel calls for a program of another system (binfmt_misc,
// with the flag P: path, argv[0], arguments). The host's own handler runs it.
func foreign(args []string, shares hostpath.Table) int {
	if len(args) < 2 {
		fmt.Fprintln(os.Stderr, "this is the init of wsl2's VM; see `wslpath --help`, `wslinfo --help`, `host-exec`")
		return 125
	}
	path, err := filepath.Abs(args[0])
	if err == nil {
		path, err = filepath.EvalSymlinks(path)
	}
	if err != nil {
		fmt.Fprintf(os.Stderr, "%s: %v\n", args[0], err)
		return 126
	}
	host, ok := shares.ToHost(path)
	if !ok {
		fmt.Fprintf(os.Stderr, "%s: only the host can run this program, and it does not see the file; move it into a directory that is shared\n", args[0])
		return 126
	}
	return hostexec.Run(append([]string{host}, args[2:]...), shares)
}

// Shares reads the distro's shares.
func Shares() (hostpath.Table, error) {
	text, err := os.ReadFile(hostpath.SharesFile)
	if os.IsNotExist(err) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	t, err := hostpath.Parse(string(text))
	if err != nil {
		return nil, fmt.Errorf("%s: %w", hostpath.SharesFile, err)
	}
	return t, nil
}

func say(w io.Writer, format string, a ...any) int {
	fmt.Fprintf(w, format+"\n", a...)
	return 1
}
