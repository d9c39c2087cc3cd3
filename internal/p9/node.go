package p9

// FS is what a server serves. All methods of FS, Node and Handle are called from
// many goroutines at once; an error's syscall.Errno is what the client is told, and
// EIO for an error without one.
type FS interface {
	// Attach returns the root of the tree that aname names.
	Attach(uname, aname string, uid uint32) (Node, error)
}

// Node is what fids stand for: a file, open or not, whatever its name is by now.
// Names have been checked: see the package's limits.
type Node interface {
	QID() QID
	// Walk returns the child. It never follows a symbolic link.
	Walk(name string) (Node, error)
	// Parent returns the directory that the node was walked from; of the root, the root.
	Parent() Node
	// Clone returns another reference to the same node.
	Clone() Node
	// Close ends a reference.
	Close()

	GetAttr(mask AttrMask) (Attr, error)
	SetAttr(SetAttr) error
	Statfs() (Statfs, error)
	Open(flags uint32) (Handle, error)
	Create(name string, flags, mode, gid uint32) (Node, Handle, error)
	Mkdir(name string, mode, gid uint32) (QID, error)
	Mknod(name string, mode, major, minor, gid uint32) (QID, error)
	Symlink(name, target string, gid uint32) (QID, error)
	Readlink() (string, error)
	Link(name string, target Node) error
	// RenameAt moves the child oldName to newName of newDir, which is of the same FS.
	RenameAt(oldName string, newDir Node, newName string) error
	UnlinkAt(name string, flags uint32) error
	// Rename and Remove work on the name that the node was walked by, if it still
	// has that; else they fail with ESTALE.
	Rename(newDir Node, newName string) error
	Remove() error

	// Xattr returns a value, or, for "", the list of names, each ended by NUL.
	Xattr(name string) ([]byte, error)
	// SetXattr sets a value, or removes it if value is nil.
	SetXattr(name string, value []byte, flags int) error
}

// Handle is a node that was opened.
type Handle interface {
	ReadAt(p []byte, offset int64) (int, error)
	WriteAt(p []byte, offset int64) (int, error)
	// Readdir appends entries (AppendDirent) from offset on to b, as many as fit
	// into its capacity. None is the directory's end.
	Readdir(b []byte, offset uint64) ([]byte, error)
	Truncate(size int64) error
	Fsync(datasync bool) error
	// Lock does not wait.
	Lock(Lock) (LockStatus, error)
	GetLock(Lock) (Lock, error)
	Close() error
}
