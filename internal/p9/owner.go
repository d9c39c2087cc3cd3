package p9

import "syscall"

// Owner maps one user and group of the server's to one of the client's. The client
// sees every other as nobody, and can give files to no other.
type Owner struct{ UID, GID, ClientUID, ClientGID uint32 }

// nobody is the overflow UID of user namespaces.
const nobody = 65534

// Attr maps attributes for the client.
func (o *Owner) Attr(a *Attr) {
	uid, gid := a.UID, a.GID
	a.UID, a.GID = nobody, nobody
	if uid == o.UID {
		a.UID = o.ClientUID
	}
	if gid == o.GID {
		a.GID = o.ClientGID
	}
}

// SetAttr maps what the client sets.
func (o *Owner) SetAttr(a *SetAttr) error {
	switch {
	case a.Valid&SetUID != 0 && a.UID != o.ClientUID, a.Valid&SetGID != 0 && a.GID != o.ClientGID:
		return syscall.EPERM
	}
	a.UID, a.GID = o.UID, o.GID
	return nil
}
