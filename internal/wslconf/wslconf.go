// Package wslconf reads single keys of a distro's /etc/wsl.conf (wsl.md §2.1). The
// file is the distro's own, so it may hold anything; what makes no sense is passed over.
package wslconf

import (
	"strconv"
	"strings"
)

// Path is where a distro keeps it.
const Path = "/etc/wsl.conf"

// Bool returns the value of key in section: 0, 1, true or false. The first of two
// equal keys counts; without one, or with a value that is none of these, it is otherwise.
func Bool(text, section, key string, otherwise bool) bool {
	in := false
	for line := range strings.Lines(text) {
		line = strings.TrimSpace(line)
		if i := strings.IndexByte(line, '#'); i >= 0 {
			line = strings.TrimSpace(line[:i])
		}
		if name, ok := strings.CutPrefix(line, "["); ok {
			name, ok = strings.CutSuffix(name, "]")
			in = ok && strings.EqualFold(strings.TrimSpace(name), section)
			continue
		}
		name, value, ok := strings.Cut(line, "=")
		if !in || !ok || !strings.EqualFold(strings.TrimSpace(name), key) {
			continue
		}
		b, err := strconv.ParseBool(strings.ToLower(strings.Trim(strings.TrimSpace(value), `"`)))
		if err != nil {
			return otherwise
		}
		return b
	}
	return otherwise
}
