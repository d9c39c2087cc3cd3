package client

import (
	"strings"

	"github.com/wsl2/wsl2/internal/hostpath"
	"github.com/wsl2/wsl2/internal/wslenv"
)

// guestEnv is what a session takes over from the caller's environment: the
// language, what describes the terminal if there is one, and what WSLENV names.
// All else stays on the host.
func guestEnv(std Stdio, tty bool, shares hostpath.Table) []string {
	var env []string
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
	return append(env, wslenv.Select(std.Getenv("WSLENV"), std.Environ, wslenv.ToGuest, shares.ToGuest)...)
}
