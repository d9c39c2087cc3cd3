package client

import (
	"slices"
	"strings"
)

// guestEnv is what a session takes over from the caller's environment: the
// language, what describes the terminal if there is one, and what WSLENV names.
// All else stays on the host.
func guestEnv(std Stdio, tty bool) []string {
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
	if list := std.Getenv("WSLENV"); list != "" {
		env = append(env, wslEnv(list, std.Environ)...)
	}
	return env
}

// wslEnv returns the variables that a WSLENV list hands to the guest, WSLENV
// itself included: entries NAME[/flags] with flags p (path), l (list of paths),
// u (host to guest only), w (guest to host only). An entry with another flag is
// skipped. Host paths have no place in the guest yet, so that entries with p and l pass
// nothing.
func wslEnv(list string, environ []string) []string {
	env := []string{"WSLENV=" + list}
	for entry := range strings.SplitSeq(list, ":") {
		name, flags, _ := strings.Cut(entry, "/")
		if name == "" || strings.Trim(flags, "plu") != "" || strings.ContainsAny(flags, "pl") {
			continue
		}
		i := slices.IndexFunc(environ, func(kv string) bool { return strings.HasPrefix(kv, name+"=") })
		if i >= 0 {
			env = append(env, environ[i])
		}
	}
	return env
}
