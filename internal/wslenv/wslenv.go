// Package wslenv selects the environment variables that WSLENV hands from one
// side to the other.
//
// WSLENV is a list of entries NAME[/flags], with a colon between (wsl.md §1.6):
//
//	p  the value is a path and is translated
//	l  it is a list of paths, with colons between
//	u  only from the host into the distro
//	w  only from the distro to the host
//
// An entry with another flag is skipped; one without u and w goes both ways.
package wslenv

import (
	"slices"
	"strings"
)

// Direction is where the variables go, as a flag.
type Direction string

// Directions.
const (
	ToGuest Direction = "u"
	ToHost  Direction = "w"
)

// Select returns what list hands over of environ, as NAME=VALUE, WSLENV itself
// first. A variable that is not set comes as an empty one. translate translates a
// path; a path that it cannot translate has no place on the other side: such a
// variable is left out, such an element dropped from a list.
func Select(list string, environ []string, to Direction, translate func(string) (string, bool)) []string {
	if list == "" {
		return nil
	}
	env := []string{"WSLENV=" + list}
	for entry := range strings.SplitSeq(list, ":") {
		name, flags, _ := strings.Cut(entry, "/")
		if name == "" || name == "WSLENV" || strings.ContainsRune(name, '=') || strings.Trim(flags, "pluw") != "" {
			continue
		}
		if strings.ContainsAny(flags, "uw") && !strings.Contains(flags, string(to)) {
			continue
		}
		value := lookup(environ, name)
		switch {
		case value == "":
		case strings.Contains(flags, "l"):
			var kept []string
			for p := range strings.SplitSeq(value, ":") {
				if p, ok := translate(p); ok {
					kept = append(kept, p)
				}
			}
			value = strings.Join(kept, ":")
		case strings.Contains(flags, "p"):
			var ok bool
			if value, ok = translate(value); !ok {
				continue
			}
		}
		env = append(env, name+"="+value)
	}
	return env
}

// lookup returns a variable's value, "" if it is not set.
func lookup(environ []string, name string) string {
	i := slices.IndexFunc(environ, func(kv string) bool { return strings.HasPrefix(kv, name+"=") })
	if i < 0 {
		return ""
	}
	return environ[i][len(name)+1:]
}
