// Package users reads /etc/passwd and /etc/group: who a session runs as. The
// files belong to the distro, so they may hold anything: sizes are bounded and
// lines that make no sense are passed over, as libc does.
package users

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
)

// Limits. A distro's files are far smaller; libc's own buffers are, too.
const (
	maxFile   = 16 << 20
	maxLine   = 1 << 20
	maxGroups = 65536 // NGROUPS_MAX
)

// DefaultShell is used where the passwd entry names none (passwd(5)).
const DefaultShell = "/bin/sh"

// ErrUnknown means that no entry has that name or number.
var ErrUnknown = errors.New("no such user")

// User is one entry of passwd(5) with its supplementary groups.
type User struct {
	Name   string
	UID    uint32
	GID    uint32
	Groups []uint32 // without GID
	Home   string   // absolute; "/" where the entry names none
	Shell  string
}

// Default tells who a distro's programs run as when nobody is named: the user that its
// wsl.conf names, else (with the reason, if it names one who cannot be used) the one that the
// registry of distros does.
func Default(root, configured, registered string) (who string, reason error) {
	if configured == "" {
		return registered, nil
	}
	if _, err := Lookup(root, configured); err != nil {
		return registered, err
	}
	return configured, nil
}

// Lookup finds a user by name, or by number if no name matches; "" is root. A
// number without an entry is a user as well, as for docker run: it has no name
// of its own, no groups, and / for its home. root is the directory that holds etc.
func Lookup(root, who string) (*User, error) {
	if who == "" {
		who = "0"
	}
	number, numErr := parseID(who)
	var byName, byID *User
	err := lines(filepath.Join(root, "etc/passwd"), func(line string) bool {
		u, ok := parsePasswd(line)
		if !ok {
			return true
		}
		if u.Name == who {
			byName = u
			return false
		}
		if numErr == nil && u.UID == number && byID == nil {
			byID = u
		}
		return true
	})
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, err
	}
	u := byName
	switch {
	case u != nil:
	case byID != nil:
		u = byID
	case numErr == nil:
		u = &User{Name: who, UID: number, GID: number, Home: "/", Shell: DefaultShell}
		if number == 0 { // a distro without passwd still has a root
			u.Name = "root"
			u.Home = "/root"
		}
		return u, nil
	default:
		return nil, fmt.Errorf("%w: %q", ErrUnknown, who)
	}
	if u.Groups, err = groups(root, u); err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, err
	}
	return u, nil
}

// parseID accepts what chown(1) does: a decimal number. The largest is the
// kernel's "no change" and no identity.
func parseID(s string) (uint32, error) {
	n, err := strconv.ParseUint(s, 10, 32)
	if err == nil && n == 1<<32-1 {
		err = strconv.ErrRange
	}
	return uint32(n), err
}

// parsePasswd parses name:password:uid:gid:gecos:home:shell.
func parsePasswd(line string) (*User, bool) {
	f := strings.Split(line, ":")
	if len(f) < 7 || f[0] == "" || f[0][0] == '+' || f[0][0] == '-' || f[0][0] == '#' {
		return nil, false
	}
	uid, err1 := parseID(f[2])
	gid, err2 := parseID(f[3])
	if err1 != nil || err2 != nil {
		return nil, false
	}
	u := &User{Name: f[0], UID: uid, GID: gid, Home: f[5], Shell: f[6]}
	if !filepath.IsAbs(u.Home) {
		u.Home = "/"
	}
	if u.Shell == "" {
		u.Shell = DefaultShell
	}
	return u, true
}

// groups returns the groups of group(5), name:password:gid:a,b,c, that list u.
func groups(root string, u *User) ([]uint32, error) {
	var list []uint32
	err := lines(filepath.Join(root, "etc/group"), func(line string) bool {
		f := strings.SplitN(line, ":", 4)
		if len(f) != 4 || !member(f[3], u.Name) {
			return true
		}
		gid, err := parseID(f[2])
		if err != nil || gid == u.GID {
			return true
		}
		for _, g := range list {
			if g == gid {
				return true
			}
		}
		list = append(list, gid)
		return len(list) < maxGroups
	})
	return list, err
}

// member reports whether name is in the comma-separated list.
func member(list, name string) bool {
	for rest := list; rest != ""; {
		var one string
		one, rest, _ = strings.Cut(rest, ",")
		if one == name {
			return true
		}
	}
	return false
}

// lines calls f for each line of the file until f returns false.
func lines(path string, f func(string) bool) error {
	// O_NONBLOCK: the distro may have put a FIFO there, which must not hold us up.
	file, err := os.OpenFile(path, os.O_RDONLY|syscall.O_NONBLOCK, 0)
	if err != nil {
		return err
	}
	defer file.Close()
	s := bufio.NewScanner(io.LimitReader(file, maxFile))
	s.Buffer(make([]byte, 0, 4096), maxLine)
	for s.Scan() {
		if !f(s.Text()) {
			return nil
		}
	}
	if err := s.Err(); err != nil {
		return fmt.Errorf("read %s: %w", path, err)
	}
	return nil
}
