package config

import (
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"github.com/wsl2/wsl2/internal/ini"
	"github.com/wsl2/wsl2/internal/wire"
)

// Sections of wslconfig that say what distros see of the host: [shares] for all, and
// [shares.NAME] for one, which goes before.
//
//	[shares]
//	isolated = false       # true: nothing, whatever else is said
//	host = ~               # at /mnt/host: the default
//	data = /srv/data, ro   # at /mnt/data, read-only; see setOption for the others
//	[shares.untrusted]
//	isolated = true
const sharesSection = "shares"

// shareParent is where a distro has its shares.
const shareParent = "/mnt"

// Share is a directory of the host in a distro, and how it is served.
type Share struct {
	wire.Share
	// Stream: 9P, also where the VM has a virtio-fs device.
	Stream bool
	// FileMask and DirMask are permissions that the distro does not see.
	FileMask, DirMask uint32
	// Metadata keeps owners and modes of the distro's in extended attributes.
	Metadata bool
	// foldCase: case=off was said, which set warns of; false in what Of returns.
	foldCase bool
}

// shareRule is one line of those sections.
type shareRule struct {
	distro string // folded; "" for all
	name   string // in shareParent
	share  Share
	none   bool // not shared
}

// Shares say which directories of the host a distro has.
type Shares struct {
	rules    []shareRule
	isolated map[string]bool // by folded distro, "" for all
}

// defaultShares share the user's home as /mnt/host.
func defaultShares(home string) Shares {
	if !filepath.IsAbs(home) {
		return Shares{}
	}
	return Shares{rules: []shareRule{{name: "host", share: Share{Share: wire.Share{Host: filepath.Clean(home), Guest: shareParent + "/host"}}}}}
}

// isShare tells whether a setting is one of the sections', and of which distro.
func isShare(e ini.Entry) (distro string, ok bool) {
	section := strings.ToLower(e.Section)
	if section == sharesSection {
		return "", true
	}
	distro, ok = strings.CutPrefix(section, sharesSection+".")
	return distro, ok && distro != ""
}

// set applies one line; the result is a warning's beginning, empty if it was good.
func (s *Shares) set(distro string, e ini.Entry, home string) string {
	key := strings.ToLower(e.Key)
	if key == "isolated" {
		v, ok := ini.Bool(e.Value)
		if s.isolated == nil {
			s.isolated = map[string]bool{}
		}
		s.isolated[distro] = v || !ok // who writes this wants less, not more
		if !ok {
			return "Invalid boolean value (nothing is shared)"
		}
		return ""
	}
	if key == "" || key == "." || key == ".." || strings.ContainsAny(key, "/\x00") {
		return "Not a directory's name (the share is mounted at " + shareParent + "/NAME):"
	}
	r := shareRule{distro: distro, name: key, share: Share{Share: wire.Share{Guest: shareParent + "/" + key}}}
	path := e.Value
	var options []string // the first is the last; umask=077, fmask=177
	for {
		before, option, ok := cutLast(path, ",")
		if !ok || !setOption(new(Share), option) {
			break
		}
		path, options = before, append(options, option)
	}
	for _, option := range slices.Backward(options) {
		setOption(&r.share, option)
	}
	if rest, ok := strings.CutPrefix(path, "~"); ok && (rest == "" || rest[0] == '/') {
		path = home + rest
	}
	r.none = path == "none"
	if !r.none && !filepath.IsAbs(path) {
		return "Want an absolute path of the host, ~ or none, and perhaps ', ro'; ignored:"
	}
	r.share.Host = filepath.Clean(path)
	folds := r.share.foldCase
	r.share.foldCase = false
	s.rules = append(s.rules, r)
	if folds {
		return "Names in a share are the host's, which tells upper from lower case (where its file system can, chattr +F has a directory not do so); case=off is ignored:"
	}
	return ""
}

// setOption sets what stands behind a share's path; false if it is part of the path.
func setOption(s *Share, option string) bool {
	key, value, _ := strings.Cut(option, "=")
	mask, err := strconv.ParseUint(value, 8, 32)
	isMask := err == nil && mask <= 0o777
	switch {
	case option == "ro", option == "rw":
		s.ReadOnly = option == "ro"
	case option == "transport=9p", option == "transport=virtiofs":
		s.Stream = option == "transport=9p"
	case option == "metadata":
		s.Metadata = true
	case option == "case=off", option == "case=dir", option == "case=force": // WSL's
		s.foldCase = option == "case=off"
	case key == "umask" && isMask:
		s.FileMask, s.DirMask = uint32(mask), uint32(mask)
	case key == "fmask" && isMask:
		s.FileMask = uint32(mask)
	case key == "dmask" && isMask:
		s.DirMask = uint32(mask)
	default:
		return false
	}
	return true
}

// cutLast splits s around the last sep, and trims both.
func cutLast(s, sep string) (before, after string, ok bool) {
	i := strings.LastIndex(s, sep)
	if i < 0 {
		return s, "", false
	}
	return strings.TrimSpace(s[:i]), strings.TrimSpace(s[i+len(sep):]), true
}

// Of returns a distro's shares, in the order of their mount points.
func (s Shares) Of(distro string) []Share {
	distro = strings.ToLower(distro)
	isolated, said := s.isolated[distro]
	if !said || s.isolated[""] {
		isolated = s.isolated[""]
	}
	if isolated {
		return nil
	}
	last := map[string]shareRule{}
	for _, of := range []string{"", distro} { // the distro's own go before
		for _, r := range s.rules {
			if r.distro == of {
				last[r.name] = r
			}
		}
	}
	var list []Share
	for _, r := range last {
		if !r.none {
			list = append(list, r.share)
		}
	}
	slices.SortFunc(list, func(a, b Share) int { return strings.Compare(a.Guest, b.Guest) })
	return list
}
