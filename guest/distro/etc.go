package distro

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"github.com/wsl2/wsl2/internal/wslconf"
)

// hostResolvConf is what version 1 has of the host's.
const hostResolvConf = "/run/wsl2/resolv.conf"

// resolvConf is what the distro's /etc/resolv.conf links to.
func (d *distro) resolvConf() string {
	if d.dir {
		return hostResolvConf
	}
	return ResolvConf
}

// ResolvConf is the resolv.conf(5) of the VM's network, which distros link to.
const ResolvConf = Shared + "/resolv.conf"

// GeneratedBy begins a file that is written anew unless key of wsl.conf says no.
func GeneratedBy(key string) string {
	return "# Written by wsl2 at each start. To keep a file of your own, put this in " + wslconf.Path + ":\n" +
		"# [network]\n# " + key + " = false\n"
}

// etc writes what a distro's /etc takes over from outside. root is its root, entries
// are the host's for hosts(5). One file that cannot be written does not keep it from the others.
func etc(root string, conf wslconf.Config, resolvConf, hostname, entries, timezone string) error {
	dir := filepath.Join(root, "etc")
	errs := []error{replaceFile(filepath.Join(dir, "hostname"), hostname+"\n")} // systemd sets it from there
	if conf.GenerateHosts {
		errs = append(errs, replaceFile(filepath.Join(dir, "hosts"), hosts(hostname, entries)))
	}
	if _, err := os.Stat(filepath.Join(root, resolvConf)); err == nil && conf.GenerateResolvConf {
		errs = append(errs, replaceLink(filepath.Join(dir, "resolv.conf"), resolvConf))
	}
	if conf.HostTimezone {
		errs = append(errs, setTimezone(root, timezone))
	}
	return errors.Join(errs...)
}

// hosts is /etc/hosts as Debian's installer and WSL write it: sudo looks up its own host's name.
func hosts(hostname, entries string) string {
	names := hostname
	if short, _, ok := strings.Cut(hostname, "."); ok {
		names += "\t" + short
	}
	if entries != "" {
		entries = "\n# The host's:\n" + entries
	}
	return GeneratedBy("generateHosts") + "127.0.0.1\tlocalhost\n127.0.1.1\t" + names + `

::1	ip6-localhost ip6-loopback
fe00::0	ip6-localnet
ff00::0	ip6-mcastprefix
ff02::1	ip6-allnodes
ff02::2	ip6-allrouters
` + entries
}

const zoneinfo = "/usr/share/zoneinfo/"

// setTimezone links /etc/localtime to a zone, if the distro knows it.
func setTimezone(root, zone string) error {
	if !filepath.IsLocal(zone) {
		return nil
	}
	if st, err := os.Stat(filepath.Join(root, zoneinfo, zone)); err != nil || !st.Mode().IsRegular() {
		return nil // no tzdata, or an older one
	}
	link := filepath.Join(root, "etc/localtime")
	if to, err := os.Readlink(link); err != nil || !strings.HasSuffix(to, zoneinfo+zone) { // it may be ../usr/share
		if err := replaceLink(link, zoneinfo+zone); err != nil {
			return err
		}
	}
	file := filepath.Join(root, "etc/timezone") // Debian's; others have none
	if _, err := os.Lstat(file); err != nil {
		return nil
	}
	return replaceFile(file, zone+"\n")
}

// replaceFile writes a file if that changes it. A link in its place is another
// program's business (NixOS, resolvconf) and left alone.
func replaceFile(path, content string) error {
	st, err := os.Lstat(path)
	switch {
	case err == nil && st.Mode()&fs.ModeSymlink != 0:
		return nil
	case err == nil && st.Mode().IsRegular() && st.Size() == int64(len(content)):
		if old, err := os.ReadFile(path); err == nil && string(old) == content {
			return nil
		}
	}
	return replace(path, func(temp string) error {
		if err := os.WriteFile(temp, []byte(content), 0o644); err != nil {
			return err
		}
		return os.Chmod(temp, 0o644) // whatever the distro's umask is
	})
}

// replaceLink makes path a link if it is not that already, whatever it is.
func replaceLink(path, to string) error {
	if old, err := os.Readlink(path); err == nil && old == to {
		return nil
	}
	return replace(path, func(temp string) error { return os.Symlink(to, temp) })
}

// replace makes a file beside path and puts it there at once: whoever reads it
// gets the old one or the new one.
func replace(path string, make func(temp string) error) error {
	temp := path + ".wsl2-new"
	if err := os.Remove(temp); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("write %s: %w", path, err)
	}
	err := make(temp)
	if err == nil {
		err = os.Rename(temp, path)
	}
	if err != nil {
		os.Remove(temp)
		return fmt.Errorf("write %s: %w", path, err)
	}
	return nil
}

// mountsAtStart tells whether an fstab(5) has anything to mount at a start: most
// name the root, which is mounted, or nothing.
func mountsAtStart(fstab string) bool {
	for line := range strings.Lines(fstab) {
		f := strings.Fields(line)
		if len(f) < 3 || strings.HasPrefix(f[0], "#") || f[1] == "/" || f[2] == "swap" || f[2] == "ignore" {
			continue
		}
		if len(f) > 3 && strings.Contains(","+f[3]+",", ",noauto,") {
			continue
		}
		return true
	}
	return false
}
