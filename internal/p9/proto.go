package p9

import (
	"errors"
	"syscall"
)

// Version is the one dialect that is spoken.
const Version = "9P2000.L"

// Sizes.
const (
	// MaxMsize is the largest frame that Tversion can agree on, MinMsize the
	// smallest: v9fs refuses less.
	MaxMsize = 1 << 20
	MinMsize = 4096
	// headerSize is size[4] type[1] tag[2].
	headerSize = 7
	// ioHeader is what a frame holds beside the data of Twrite, the larger of both:
	// fid[4] offset[8] count[4], and one byte more, which Linux and diod allow for (P9_IOHDRSZ).
	ioHeader = headerSize + 16 + 1
	// maxWalk is the number of names in a Twalk.
	maxWalk = 16
	// MaxName is NAME_MAX.
	MaxName = 255
	// maxXattr is XATTR_SIZE_MAX and XATTR_LIST_MAX.
	maxXattr = 64 << 10
)

// Tag names a request while it is in flight.
type Tag uint16

// NoTag is Tversion's.
const NoTag Tag = 0xffff

// FID is the client's number for a file.
type FID uint32

// NoFID is no file: Tattach's afid.
const NoFID FID = 0xffffffff

// Type is a frame's type byte.
type Type uint8

// Types. An R-message is its T-message and one.
const (
	RLerror      Type = 7
	TStatfs      Type = 8
	TLopen       Type = 12
	TLcreate     Type = 14
	TSymlink     Type = 16
	TMknod       Type = 18
	TRename      Type = 20
	TReadlink    Type = 22
	TGetattr     Type = 24
	TSetattr     Type = 26
	TXattrwalk   Type = 30
	TXattrcreate Type = 32
	TReaddir     Type = 40
	TFsync       Type = 50
	TLock        Type = 52
	TGetlock     Type = 54
	TLink        Type = 70
	TMkdir       Type = 72
	TRenameat    Type = 74
	TUnlinkat    Type = 76
	TVersion     Type = 100
	TAuth        Type = 102
	TAttach      Type = 104
	TFlush       Type = 108
	TWalk        Type = 110
	TRead        Type = 116
	TWrite       Type = 118
	TClunk       Type = 120
	TRemove      Type = 122
)

// QID types.
const (
	QTDir     uint8 = 0x80
	QTSymlink uint8 = 0x02
	QTFile    uint8 = 0x00
)

// QID identifies a file on its server: Path does, and Version changes with its contents.
type QID struct {
	Type    uint8
	Version uint32
	Path    uint64
}

const qidSize = 13

// Time is a point in time. Sec is signed, in the protocol as well.
type Time struct {
	Sec  int64
	Nsec uint64
}

// AttrMask says what Tgetattr asks for and Rgetattr holds.
type AttrMask uint64

// Masks.
const (
	AttrMode AttrMask = 1 << iota
	AttrNlink
	AttrUID
	AttrGID
	AttrRdev
	AttrAtime
	AttrMtime
	AttrCtime
	AttrIno
	AttrSize
	AttrBlocks
	AttrBtime
	AttrGen
	AttrDataVersion
	// AttrBasic is what stat(2) has.
	AttrBasic AttrMask = 0x7ff
)

// Attr are a file's attributes.
type Attr struct {
	Valid                      AttrMask
	QID                        QID
	Mode, UID, GID             uint32 // Mode with S_IFMT
	Nlink, Rdev, Size          uint64
	Blksize, Blocks            uint64
	Atime, Mtime, Ctime, Btime Time
	Gen, DataVersion           uint64
}

// SetMask says what Tsetattr sets.
type SetMask uint32

// Masks.
const (
	SetMode SetMask = 1 << iota
	SetUID
	SetGID
	SetSize
	SetAtime // to now, unless SetAtimeTo
	SetMtime // to now, unless SetMtimeTo
	SetCtime // to now; whatever changes a file does that
	SetAtimeTo
	SetMtimeTo
)

// SetAttr is what Tsetattr sets.
type SetAttr struct {
	Valid          SetMask
	Mode, UID, GID uint32
	Size           uint64
	Atime, Mtime   Time
}

// Statfs is statfs(2)'s.
type Statfs struct {
	Type, Bsize                               uint32
	Blocks, Bfree, Bavail, Files, Ffree, Fsid uint64
	Namelen                                   uint32
}

// Types of locks.
const (
	LockRead uint8 = iota
	LockWrite
	LockUnlock
)

// LockStatus is Rlock's answer.
type LockStatus uint8

// Statuses.
const (
	LockSuccess LockStatus = iota
	LockBlocked
	LockError
	LockGrace
)

// Lock is a byte range's lock. Length 0 means to the end of the file.
type Lock struct {
	Type          uint8
	Start, Length uint64
	ProcID        uint32
	ClientID      string
}

// Flags of Tlopen and Tlcreate are open(2)'s on x86, which are the protocol's.
const (
	openAccess = syscall.O_ACCMODE
	// UnlinkDir is AT_REMOVEDIR of Tunlinkat.
	UnlinkDir uint32 = 0x200
)

// errnoOf is the errno that a peer is told for err.
func errnoOf(err error) syscall.Errno {
	var errno syscall.Errno
	if errors.As(err, &errno) && errno != 0 {
		return errno
	}
	return syscall.EIO
}
