package localfs

import (
	"fmt"

	"golang.org/x/sys/unix"

	"github.com/wsl2/wsl2/internal/p9"
)

// With Config.Metadata a file's owner and mode for the client are an extended attribute, "UID GID MODE"
// with the mode in octal, where they are not what this machine says. The file stays its owner's here, and
// open to him: without that he could not write the attribute (xattr(7)).
const (
	metadataPrefix = "user.wsl2."
	metadataName   = metadataPrefix + "attr"
	metadataSize   = 64 // is more than it takes
)

// hasMetadata tells whether the file may have them: only files and directories have attributes of users.
func (n *inode) hasMetadata() bool {
	kind := n.mode & unix.S_IFMT
	return n.fs.cfg.Metadata && (kind == unix.S_IFREG || kind == unix.S_IFDIR)
}

// readMetadata puts into a what the file has, if it has any.
func (n *inode) readMetadata(a *p9.Attr) bool {
	b := make([]byte, metadataSize)
	c, err := unix.Getxattr(n.magic(), metadataName, b)
	if err != nil {
		return false
	}
	var uid, gid, mode uint32
	// What else is there was not written here.
	if k, err := fmt.Sscanf(string(b[:c]), "%d %d %o", &uid, &gid, &mode); err != nil || k != 3 {
		return false
	}
	a.UID, a.GID, a.Mode = uid, gid, a.Mode&unix.S_IFMT|mode&0o7777
	return true
}

func (n *inode) writeMetadata(set p9.SetAttr) error {
	a, err := n.GetAttr(p9.AttrBasic)
	if err != nil {
		return err
	}
	if set.Valid&p9.SetUID != 0 {
		a.UID = set.UID
	}
	if set.Valid&p9.SetGID != 0 {
		a.GID = set.GID
	}
	switch {
	case set.Valid&p9.SetMode != 0:
		a.Mode = set.Mode
	case set.Valid&(p9.SetUID|p9.SetGID) != 0 && n.mode&unix.S_IFMT == unix.S_IFREG: // as chown(2) does
		a.Mode &^= unix.S_ISUID | unix.S_ISGID
	}
	return unix.Setxattr(n.magic(), metadataName, fmt.Appendf(nil, "%d %d %o", a.UID, a.GID, a.Mode&0o7777), 0)
}

// ownable is the mode here of what is made with mode there.
func (n *inode) ownable(mode, owner uint32) uint32 {
	if n.fs.cfg.Metadata {
		return mode | owner
	}
	return mode
}

// keepMode keeps the mode of what was just made, where ownable has made it another.
func (n *inode) keepMode(mode uint32) {
	if !n.hasMetadata() {
		return
	}
	if a, err := n.GetAttr(p9.AttrMode); err == nil && a.Mode&0o7777 != mode&^n.mask() {
		n.writeMetadata(p9.SetAttr{Valid: p9.SetMode, Mode: mode}) //nolint:errcheck // where there are no attributes it stays as it is here
	}
}

func (n *inode) mask() uint32 {
	if n.mode&unix.S_IFMT == unix.S_IFDIR {
		return n.fs.cfg.DirMask
	}
	return n.fs.cfg.FileMask
}
