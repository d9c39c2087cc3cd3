package pid1

import (
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/wsl2/wsl2/guest/distro"
)

// unshare takes away what a distro that has ended mounted from its disk in
// distro.SharedDir: the other distros' namespaces would keep the disk in use. The
// rest of what it mounted there stays, as in WSL.
func unshare(device string) error {
	var st unix.Stat_t
	if err := unix.Stat(device, &st); err != nil {
		return fmt.Errorf("unmount %s in %s: %w", device, distro.SharedDir, err)
	}
	text, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return fmt.Errorf("unmount %s in %s: %w", device, distro.SharedDir, err)
	}
	var errs []error
	for _, dir := range mountsOf(string(text), st.Rdev, distro.SharedDir+"/") {
		// The mount is shared: it goes in every namespace.
		if err := unix.Unmount(dir, unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW); err != nil {
			errs = append(errs, fmt.Errorf("unmount %s: %w", dir, err))
		}
	}
	return errors.Join(errs...)
}

// mountsOf returns where a device is mounted below a directory, the latest mount first,
// of a mountinfo (proc_pid_mountinfo(5)). Its paths are the distros' to choose.
func mountsOf(mountinfo string, device uint64, below string) []string {
	number := fmt.Sprintf("%d:%d", unix.Major(device), unix.Minor(device))
	var list []string
	for line := range strings.Lines(mountinfo) {
		f := strings.Fields(line) // id, parent, major:minor, root, mount point
		if len(f) < 5 || f[2] != number {
			continue
		}
		if dir := unescape(f[4]); strings.HasPrefix(dir, below) {
			list = append([]string{dir}, list...)
		}
	}
	return list
}

// unescape resolves the kernel's \ooo for spaces, tabs, newlines and backslashes.
func unescape(s string) string {
	var b strings.Builder
	for i := 0; i < len(s); i++ {
		if s[i] == '\\' && i+4 <= len(s) {
			if n, err := strconv.ParseUint(s[i+1:i+4], 8, 8); err == nil {
				b.WriteByte(byte(n))
				i += 3
				continue
			}
		}
		b.WriteByte(s[i])
	}
	return b.String()
}
