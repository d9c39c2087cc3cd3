// Package native starts /init in namespaces of the host's own kernel, for distros of version 1.
// Package nsinit says what it agrees on with the guest.
package native

import (
	"bufio"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/wsl2/wsl2/launcher/api"
)

// Extent maps Count IDs of a user namespace, from Inside on, to the host's from Outside on
// (user_namespaces(7)).
type Extent struct{ Inside, Outside, Count uint32 }

// IDMap is a distro's users and groups on the host. It is the same at each start: its files belong to
// the IDs outside.
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
// name or a number. Lines that make no sense are passed over, as newuidmap(1) does.
func parseRanges(text, name, id string) (ranges []idRange) {
	for line := range strings.Lines(text) {
		f := strings.Split(strings.TrimSpace(line), ":")
		if len(f) != 3 || f[0] != name && f[0] != id {
			continue
		}
		first, ferr := strconv.ParseUint(f[1], 10, 32)
		count, cerr := strconv.ParseUint(f[2], 10, 32)
		if ferr != nil || cerr != nil || count == 0 || first+count > 1<<32-1 {
			continue
		}
		ranges = append(ranges, idRange{uint32(first), uint32(count)})
	}
	return ranges
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

// ThisUser returns the map of the user who runs wsl2. Root's has none of the host's own IDs: the root of
// a distro is never the host's.
func ThisUser() (IDMap, error) {
	uid, gid := os.Getuid(), os.Getgid()
	id := strconv.Itoa(uid)
	name := id
	if u, err := user.LookupId(id); err == nil {
		name = u.Username
	} else if uid == 0 {
		name = "root"
	}
	of := func(path string) (idRange, error) {
		text, err := os.ReadFile(path)
		if err != nil && !errors.Is(err, os.ErrNotExist) {
			return idRange{}, err
		}
		r, ok := largest(parseRanges(string(text[:min(len(text), maxRangeFile)]), name, id))
		switch {
		case ok:
			return r, nil
		case uid == 0:
			return rootRange, nil
		}
		return idRange{}, api.Errorf(api.CodeFailed, fmt.Sprintf("as root, add a range that no other line has, such as this line: %s:%d:%d (usermod --add-subuids and --add-subgids do), or use version 2", name, 100000+int64(uid%1000)*minIDs, minIDs),
			"a distro of version 1 needs %d IDs of the host for its users, and %s has none for %s", minIDs, path, name)
	}
	uids, err := of("/etc/subuid")
	if err != nil {
		return IDMap{}, err
	}
	gids, err := of("/etc/subgid")
	if err != nil {
		return IDMap{}, err
	}
	if uid == 0 {
		return IDMap{[]Extent{{0, uids.first, uids.count}}, []Extent{{0, gids.first, gids.count}}}, nil
	}
	return IDMap{extents(uint32(uid), uids), extents(uint32(gid), gids)}, nil
}

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
	m, err := ThisUser()
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
