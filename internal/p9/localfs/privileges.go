package localfs

import (
	"golang.org/x/sys/unix"

	"github.com/wsl2/wsl2/internal/p9"
)

// DropPrivileges takes away a file's set-id bits, for a client whose user changes the file and may not keep them, where the
// change does not: those of its metadata (metadata.go), and those that it has here if our process may keep them.
func (n *inode) DropPrivileges() error {
	if err := n.writable(); err != nil {
		return err
	}
	if n.mode&unix.S_IFMT != unix.S_IFREG {
		return nil
	}
	var a p9.Attr
	if n.hasMetadata() && n.readMetadata(&a) && unprivileged(a.Mode) != a.Mode {
		if err := n.writeMetadata(p9.SetAttr{Valid: p9.SetMode, Mode: unprivileged(a.Mode)}); err != nil {
			return err
		}
	}
	if keeps, err := keepsPrivileges(); err != nil || !keeps {
		return err
	}
	var st unix.Stat_t // not GetAttr: what the client does not see of the mode stays
	if err := unix.Fstat(n.fd, &st); err != nil {
		return err
	}
	if mode := unprivileged(st.Mode); mode != st.Mode {
		return unix.Chmod(n.magic(), mode&0o7777)
	}
	return nil
}

// unprivileged is a mode without its set-id bits. That of a group that may not execute the file is mandatory locking's.
func unprivileged(mode uint32) uint32 {
	if mode&unix.S_IXGRP != 0 {
		mode &^= unix.S_ISGID
	}
	return mode &^ unix.S_ISUID
}

// keepsPrivileges tells whether write(2) of ours leaves set-id bits.
func keepsPrivileges() (bool, error) {
	var sets [2]unix.CapUserData // of 32 capabilities each
	err := unix.Capget(&unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}, &sets[0])
	return sets[0].Effective&(1<<unix.CAP_FSETID) != 0, err
}
