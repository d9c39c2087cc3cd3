package api

import (
	"strconv"

	"golang.org/x/sys/unix"
)

// Self identifies the running executable.
func Self() Identity { return IdentityOf("/proc/self/exe") }

// IdentityOf identifies the wsl2 at path, of the same version as the caller. Its
// build is told by the file's inode, size and modification time: one system call,
// no hashing.
func IdentityOf(path string) Identity {
	id := Identity{Protocol: Protocol, Version: Version}
	var st unix.Stat_t
	if unix.Stat(path, &st) == nil {
		b := strconv.AppendUint(nil, st.Ino, 16)
		b = strconv.AppendInt(append(b, '.'), st.Size, 16)
		b = strconv.AppendInt(append(b, '.'), st.Mtim.Nano(), 16)
		id.Build = string(b)
	}
	return id
}
