// Package hostpath translates paths between the host and a distro. Both are
// POSIX paths; a file has one on the other side if it lies in a shared directory.
package hostpath

import (
	"fmt"
	"path"
	"strings"
)

// SharesFile is where a distro finds its shares: Table.String. It is absent
// while nothing is shared.
const SharesFile = "/run/wsl2/shares"

// Share is one directory under its names on both sides, absolute and clean.
type Share struct{ Host, Guest string }

// Table holds a distro's shares. A share inside another one hides what lies there.
type Table []Share

// ToGuest translates a host path.
func (t Table) ToGuest(p string) (string, bool) {
	return t.translate(p, func(s Share) (from, to string) { return s.Host, s.Guest })
}

// ToHost translates a guest path. Symbolic links are the caller's to resolve.
func (t Table) ToHost(p string) (string, bool) {
	return t.translate(p, func(s Share) (from, to string) { return s.Guest, s.Host })
}

// translate replaces the longest prefix that is a share. A slash at the end stays.
func (t Table) translate(p string, way func(Share) (from, to string)) (string, bool) {
	if !path.IsAbs(p) || strings.IndexByte(p, 0) >= 0 {
		return "", false
	}
	clean := path.Clean(p)
	longest, result := -1, ""
	for _, s := range t {
		from, to := way(s)
		if rest, ok := inside(from, clean); ok && len(from) > longest {
			longest, result = len(from), path.Join(to, rest)
		}
	}
	if longest < 0 {
		return "", false
	}
	if strings.HasSuffix(p, "/") && result != "/" {
		result += "/"
	}
	return result, true
}

// inside splits p into dir and what follows it.
func inside(dir, p string) (rest string, ok bool) {
	if dir == "/" || p == dir {
		return strings.TrimPrefix(p, dir), true
	}
	if rest, ok = strings.CutPrefix(p, dir); ok && rest[0] == '/' {
		return rest, true
	}
	return "", false
}

// The escapes are those of fstab(5). They are made when they are needed: every
// command links this package.
func escape(p string) string {
	return strings.NewReplacer(`\`, `\134`, "\t", `\011`, "\n", `\012`, " ", `\040`).Replace(p)
}

func unescape(p string) string {
	return strings.NewReplacer(`\134`, `\`, `\011`, "\t", `\012`, "\n", `\040`, " ").Replace(p)
}

// String is a line for each share: host path, tab, guest path, escaped as in fstab(5).
func (t Table) String() string {
	var b strings.Builder
	for _, s := range t {
		fmt.Fprintf(&b, "%s\t%s\n", escape(s.Host), escape(s.Guest))
	}
	return b.String()
}

// Parse reads what String wrote.
func Parse(text string) (Table, error) {
	var t Table
	for line := range strings.Lines(text) {
		host, guest, ok := strings.Cut(strings.TrimSuffix(line, "\n"), "\t")
		s := Share{unescape(host), unescape(guest)}
		if !ok || !clean(s.Host) || !clean(s.Guest) {
			return nil, fmt.Errorf("%q is no share: want two absolute paths with a tab between", line)
		}
		t = append(t, s)
	}
	return t, nil
}

func clean(p string) bool {
	return path.IsAbs(p) && path.Clean(p) == p && strings.IndexByte(p, 0) < 0
}
