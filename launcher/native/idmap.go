// Package native starts /init in namespaces of the host's own kernel, for distros of version 1.
// Package nsinit says what it agrees on with the guest.
package native

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/wsl2/wsl2/launcher/api"
)

// Extent maps Count IDs of a user namespace, from Inside on, to the host's from Outside on
// (user_namespaces(7)).
type Extent struct{ Inside, Outside, Count uint32 }

// IDMap is a distro's users and groups on the host. It is the same at each start (mapOf). Root's has none of the host's
// own IDs: the root of a distro is never the host's.
type IDMap struct{ UIDs, GIDs []Extent }

const (
	// ownID is the user himself in a distro: the first user that distributions make.
	ownID = 1000
	// minIDs is what a distro needs at least: nobody is 65534.
	minIDs = 1 << 16
)

// rootRange is root's range where /etc/subuid has none for root: above those that login.defs(5) and
// systemd give out (UIDS-GIDS.md).
var rootRange = idRange{first: 0x70000000, count: 0x0ff00000}

// idRange are IDs of the host that belong to a user.
type idRange struct{ first, count uint32 }

// maxRangeFile bounds what is read of /etc/subuid.
const maxRangeFile = 4 << 20

// parseRanges returns a user's ranges in the text of /etc/subuid (subuid(5)), whose lines begin with a
// name or a number, and those of others. Lines that make no sense are passed over, as newuidmap(1) does.
func parseRanges(text, name, id string) (own []idRange, others []line) {
	for l := range strings.Lines(text) {
		f := strings.Split(strings.TrimSpace(l), ":")
		if len(f) != 3 || f[0] == "" || f[0][0] == '#' {
			continue
		}
		first, ferr := strconv.ParseUint(f[1], 10, 32)
		count, cerr := strconv.ParseUint(f[2], 10, 32)
		if ferr != nil || cerr != nil || count == 0 || first+count > 1<<32-1 {
			continue
		}
		r := idRange{uint32(first), uint32(count)}
		if f[0] == name || f[0] == id {
			own = append(own, r)
		} else {
			others = append(others, line{f[0], r})
		}
	}
	return own, others
}

// line is one of another user's.
type line struct {
	user string
	ids  idRange
}

// holds tells whether an extent lies in the range; overlaps, whether they have an ID in common.
func (r idRange) holds(e Extent) bool {
	return e.Outside >= r.first && uint64(e.Outside)+uint64(e.Count) <= uint64(r.first)+uint64(r.count)
}

func (r idRange) overlaps(e Extent) bool {
	return uint64(e.Outside) < uint64(r.first)+uint64(r.count) && uint64(r.first) < uint64(e.Outside)+uint64(e.Count)
}

// largest returns the largest range that is of use, false if there is none.
func largest(ranges []idRange) (best idRange, ok bool) {
	for _, r := range ranges {
		if r.count >= minIDs && r.count > best.count {
			best, ok = r, true
		}
	}
	return best, ok
}

// extents map a distro's IDs for the user own: who he is there, and the range for all others.
func extents(own uint32, r idRange) []Extent {
	return []Extent{
		{0, r.first, ownID},
		{ownID, own, 1},
		{ownID + 1, r.first + ownID, r.count - ownID},
	}
}

// ids are what a file of ranges has: the user's and others'.
type ids struct {
	path   string
	self   uint32 // the user's own ID
	own    []idRange
	others []line
}

// hostUser is who runs wsl2.
type hostUser struct {
	name       string
	uids, gids ids
}

// thisUser reads what the user has.
func thisUser() (hostUser, error) {
	uid := os.Getuid()
	id := strconv.Itoa(uid)
	u := hostUser{name: id, uids: ids{path: "/etc/subuid", self: uint32(uid)}, gids: ids{path: "/etc/subgid", self: uint32(os.Getgid())}}
	if known, err := user.LookupId(id); err == nil {
		u.name = known.Username
	} else if uid == 0 {
		u.name = "root"
	}
	for _, i := range []*ids{&u.uids, &u.gids} {
		text, err := os.ReadFile(i.path)
		if err != nil && !errors.Is(err, os.ErrNotExist) {
			return u, err
		}
		i.own, i.others = parseRanges(string(text[:min(len(text), maxRangeFile)]), u.name, id)
	}
	return u, nil
}

// root tells whether it is root, who may map whatever he likes.
func (u hostUser) root() bool { return u.uids.self == 0 }

// newMap returns the map of the user's new distros.
func (u hostUser) newMap() (m IDMap, err error) {
	for _, side := range []struct {
		to *[]Extent
		of ids
	}{{&m.UIDs, u.uids}, {&m.GIDs, u.gids}} {
		to, of := side.to, side.of
		r, ok := largest(of.own)
		switch {
		case ok:
		case u.root():
			r = rootRange
		default:
			return m, api.Errorf(api.CodeFailed, fmt.Sprintf("as root, add a range that no other line has, such as this line: %s (usermod --add-subuids and --add-subgids do), or use version 2", u.free(of)),
				"a distro of version 1 needs %d IDs of the host for its users, and %s has none for %s", minIDs, of.path, u.name)
		}
		if u.root() {
			*to = []Extent{{0, r.first, r.count}}
		} else {
			*to = extents(of.self, r)
		}
	}
	return m, nil
}

// all maps every ID that the user has.
func (u hostUser) all() (m IDMap) {
	for _, side := range []struct {
		to *[]Extent
		of ids
	}{{&m.UIDs, u.uids}, {&m.GIDs, u.gids}} {
		list := []Extent{{0, side.of.self, 1}}
		for _, r := range side.of.own {
			if !slices.ContainsFunc(list, r.overlaps) {
				last := list[len(list)-1]
				list = append(list, Extent{last.Inside + last.Count, r.first, r.count})
			}
		}
		*side.to = list
	}
	return m
}

// free is a line that the user could have: behind all that there are.
func (u hostUser) free(of ids) string {
	first := uint64(100000) // login.defs(5), SUB_UID_MIN
	for _, l := range of.others {
		first = max(first, uint64(l.ids.first)+uint64(l.ids.count))
	}
	return fmt.Sprintf("%s:%d:%d", u.name, first, minIDs)
}

// missing returns the line that would have to be in a file of ranges for what of a map's side is not the user's any
// more, "" if all is.
func (u hostUser) missing(of ids, list []Extent) string {
	own := of.own
	if u.root() { // who would get any map from the kernel: the file is not believed
		own = append(slices.Clone(own), rootRange)
	}
	first, end, lost := uint64(1<<32), uint64(0), false
	for _, e := range list {
		if e.Inside == ownID && e.Count == 1 && !u.root() {
			if e.Outside != of.self {
				return fmt.Sprintf("ID %d instead of %d", e.Outside, of.self)
			}
			continue
		}
		first, end = min(first, uint64(e.Outside)), max(end, uint64(e.Outside)+uint64(e.Count))
		lost = lost || !slices.ContainsFunc(own, func(r idRange) bool { return r.holds(e) })
	}
	if !lost {
		return ""
	}
	return fmt.Sprintf("%s:%d:%d", u.name, first, end-first)
}

// separate is what to do about overlaps.
const separate = "as root, give one of them another range"

// overlaps says whose IDs some of a map's are as well.
func (u hostUser) overlaps(m IDMap) (warnings []string) {
	for _, side := range []struct {
		of   ids
		list []Extent
	}{{u.uids, m.UIDs}, {u.gids, m.GIDs}} {
		for _, l := range side.of.others {
			if slices.ContainsFunc(side.list, l.ids.overlaps) {
				warnings = append(warnings, fmt.Sprintf("%s gives IDs to %s that users of distros of version 1 have (%d and the %d behind it): each can read and change the other's files",
					side.of.path, l.user, l.ids.first, l.ids.count-1))
			}
		}
	}
	return warnings
}

// mapOf returns the map of a distro, which a file beside its root keeps: its files belong to the IDs outside, whatever
// range the user has got since. An empty file is a new distro's, or that of one which kept the map in its lock, as
// all did until 2026-11. The caller holds the lock.
func (u hostUser) mapOf(root string, lock *os.File) (m IDMap, err error) {
	kept, err := os.OpenFile(root+idsSuffix, os.O_RDWR|os.O_CREATE|unix.O_NOFOLLOW, 0o600)
	if err != nil {
		return m, err
	}
	defer kept.Close()
	var from *os.File
	var text []byte
	for _, from = range []*os.File{kept, lock} {
		if text, err = io.ReadAll(io.NewSectionReader(from, 0, maxKept)); err != nil {
			return m, err
		}
		if len(text) > 0 {
			break
		}
	}
	if len(text) == 0 {
		if m, err = u.newMap(); err != nil {
			return m, err
		}
		if text, err = json.Marshal(m); err == nil {
			_, err = kept.WriteAt(text, 0)
		}
		if err == nil {
			err = kept.Sync() // an empty file would get whatever range is there at the next start
		}
		return m, err
	}
	if err := json.Unmarshal(text, &m); err != nil || len(m.UIDs) == 0 || len(m.GIDs) == 0 {
		return m, api.Errorf(api.CodeFailed, "if /etc/subuid and /etc/subgid have not changed, delete it: it is made anew",
			"%s, which says whose the files of the distro are, cannot be read (%v)", from.Name(), err)
	}
	for _, side := range []struct {
		of   ids
		list []Extent
	}{{u.uids, m.UIDs}, {u.gids, m.GIDs}} {
		if line := u.missing(side.of, side.list); line != "" {
			return m, api.Errorf(api.CodeFailed, fmt.Sprintf("as root, put this line back into %s: %s", side.of.path, line),
				"%s has changed since the distro in %s was made: its files belong to IDs that are not %s's any more", side.of.path, root, u.name)
		}
	}
	if from != kept {
		_, err = kept.WriteAt(text, 0)
	}
	return m, err
}

// maxKept bounds what is read of that file.
const maxKept = 4096

// write gives the map to the user namespace of a process.
func (m IDMap) write(pid int) error {
	if os.Geteuid() == 0 {
		for file, list := range map[string][]Extent{"uid_map": m.UIDs, "gid_map": m.GIDs} {
			var lines strings.Builder
			for _, e := range list {
				fmt.Fprintf(&lines, "%d %d %d\n", e.Inside, e.Outside, e.Count)
			}
			if err := os.WriteFile(fmt.Sprintf("/proc/%d/%s", pid, file), []byte(lines.String()), 0); err != nil {
				return err
			}
		}
		return nil
	}
	for tool, list := range map[string][]Extent{"newuidmap": m.UIDs, "newgidmap": m.GIDs} {
		args := []string{strconv.Itoa(pid)}
		for _, e := range list {
			for _, n := range []uint32{e.Inside, e.Outside, e.Count} {
				args = append(args, strconv.FormatUint(uint64(n), 10))
			}
		}
		out, err := exec.Command(tool, args...).CombinedOutput()
		if errors.Is(err, exec.ErrNotFound) {
			return api.Errorf(api.CodeNoToolchain, "install it (Debian's package is uidmap), or use version 2", "a distro of version 1 needs %s", tool)
		}
		if err != nil {
			return fmt.Errorf("%s: %w: %s", tool, err, strings.TrimSpace(string(out)))
		}
	}
	return nil
}

// MakeRoot makes the directory of a new root, which the distro's own root can take over. Nobody else
// may come there: the set-id programs in it would make him one of the distro's users.
func MakeRoot(path string) error {
	u, err := thisUser()
	if err != nil {
		return err
	}
	m, err := u.newMap()
	if err != nil {
		return err
	}
	dir := filepath.Dir(path)
	st, err := os.Stat(dir)
	if err != nil {
		return err
	}
	if st.Mode().Perm()&0o077 != 0 {
		return api.Errorf(api.CodeBadRequest, "chmod 700 "+dir+", or name a directory that is not there yet", "other users can enter %s, where the root of a distro of version 1 must be its user's alone", dir)
	}
	if err := os.Mkdir(path, 0o755); err != nil {
		return err
	}
	if os.Geteuid() != 0 {
		return nil // the caller is one of the distro's users
	}
	if err := os.Chown(path, int(m.UIDs[0].Outside), int(m.GIDs[0].Outside)); err != nil {
		os.Remove(path)
		return err
	}
	return nil
}

// lastCapability is the kernel's (capabilities(7)).
func lastCapability() (uintptr, error) {
	const path = "/proc/sys/kernel/cap_last_cap"
	f, err := os.Open(path)
	if err != nil {
		return 0, err
	}
	defer f.Close()
	line, err := bufio.NewReader(f).ReadString('\n')
	if err != nil {
		return 0, err
	}
	n, err := strconv.ParseUint(strings.TrimSpace(line), 10, 8)
	if err != nil {
		return 0, fmt.Errorf("%s: %w", path, err)
	}
	return uintptr(n), nil
}
