package client

import (
	"errors"
	"os"
	"path/filepath"
	"strings"

	"github.com/wsl2/wsl2/internal/hostpath"
	"github.com/wsl2/wsl2/internal/wslenv"
	"github.com/wsl2/wsl2/launcher/api"
)

// guestEnv is what a session takes over from the caller's environment: the
// language, what describes the terminal if there is one, the proxies, and what WSLENV names.
// All else stays on the host.
func guestEnv(std Stdio, tty bool, o api.Opened) []string {
	var env []string
	if o.Proxy {
		env = proxies(std.Environ)
	}
	for _, kv := range std.Environ {
		name, value, _ := strings.Cut(kv, "=")
		switch {
		case name == "LANG", name == "LANGUAGE", strings.HasPrefix(name, "LC_"):
		case tty && (name == "TERM" || name == "COLORTERM"):
		default:
			continue
		}
		if value != "" {
			env = append(env, kv)
		}
	}
	return append(env, wslenv.Select(std.Getenv("WSLENV"), std.Environ, wslenv.ToGuest, o.Shares.ToGuest)...)
}

// callersDir is the distro's path of the caller's directory; "", the home, if it has
// none. A shell at a terminal says so, for there it is seen that it is another. A
// command does not: its standard error is its own, for pipelines and CI as well.
func (c *Client) callersDir(spec RunSpec, std Stdio, shares hostpath.Table) string {
	dir, err := os.Getwd()
	if err != nil {
		return ""
	}
	guest, ok := shares.ToGuest(dir)
	if !ok && interactive(spec, std) {
		c.Notice(dir + " is not shared with the distro (see [shares] in wslconfig); the shell starts in the home")
	}
	return guest
}

// guestDir is the distro's path of a directory of the host.
func guestDir(dir string, shares hostpath.Table) (string, error) {
	abs, err := filepath.Abs(dir)
	if err != nil {
		return "", err
	}
	if _, err := os.Stat(abs); err != nil {
		return "", errors.Unwrap(err) // the caller names the directory
	}
	guest, ok := shares.ToGuest(abs)
	if !ok {
		return "", errors.New("it is not shared with the distro (see [shares] in wslconfig)")
	}
	return guest, nil
}
