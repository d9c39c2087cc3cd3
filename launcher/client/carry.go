package client

import (
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/wsl2/wsl2/internal/wire"
)

// carried is the program that a command names if it lies in the host's directory
// for temporary files, where no distro sees it, else "". Build tools make such
// programs and pass them on by their path: go test -exec wsl2.
func carried(spec *RunSpec, getenv func(string) string) string {
	if len(spec.Argv) == 0 || !strings.HasPrefix(spec.Argv[0], "/") {
		return ""
	}
	path := spec.Argv[0]
	if spec.Shell != wire.ShellNone {
		path, _, _ = strings.Cut(path, " ") // a path that needs quotes does not come with them
	}
	for _, name := range []string{"GOTMPDIR", "TMPDIR"} {
		if dir := getenv(name); dir != "" && strings.HasPrefix(path, filepath.Clean(dir)+"/") {
			return executable(path)
		}
	}
	if strings.HasPrefix(path, "/tmp/") {
		return executable(path)
	}
	return ""
}

func executable(path string) string {
	if st, err := os.Stat(path); err != nil || !st.Mode().IsRegular() || st.Mode()&0o111 == 0 {
		return ""
	}
	return path
}

// carryIn makes a copy of the program in the distro, under its own path. A file
// that the distro has there stays; then, and on an error, which the program's start
// will show, made is false.
func (c *Client) carryIn(spec RunSpec, path string) (made bool) {
	f, err := os.Open(path)
	if err != nil {
		return false
	}
	defer f.Close()
	const script = `test -e "$0" && exit 1; umask 077; mkdir -p "$1" && cat >"$0" && chmod 755 "$0"`
	status, err := c.helper(spec, f, "sh", "-c", script, path, filepath.Dir(path))
	return status == 0 && err == nil
}

// carryOut removes what carryIn has made, and its directory if that is empty.
func (c *Client) carryOut(spec RunSpec, path string) {
	c.helper(spec, nil, "sh", "-c", `rm -f "$0"; rmdir "$1" && rmdir "${1%/*}"`, path, filepath.Dir(path)) // what is left goes with the distro
}

// helper runs a program of the distro silently, as the command's user.
func (c *Client) helper(spec RunSpec, in *os.File, argv ...string) (int, error) {
	null, err := os.OpenFile(os.DevNull, os.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		return StatusFailed, err
	}
	defer null.Close()
	if in == nil {
		in = null
	}
	spec.Cwd, spec.HostCwd, spec.Shell, spec.Argv = "/", false, wire.ShellNone, argv
	spec.aside = true
	return c.run(spec, Stdio{In: in, Out: null, Err: null, Getenv: func(string) string { return "" }})
}
