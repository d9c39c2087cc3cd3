package config

import "golang.org/x/sys/unix"

// totalMemory is the host's RAM in bytes.
func totalMemory() uint64 {
	var si unix.Sysinfo_t
	if err := unix.Sysinfo(&si); err != nil {
		return 0
	}
	return si.Totalram * uint64(si.Unit)
}
