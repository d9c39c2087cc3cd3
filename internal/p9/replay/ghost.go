package replay

import (
	"sync/atomic"

	"golang.org/x/sys/unix"

	"github.com/wsl2/wsl2/internal/p9"
)

// ghost is a file that is no more. It has attributes, and nothing can be done to it.
type ghost struct {
	parent p9.Node // a reference
	qid    p9.QID
	mode   uint32
	refs   atomic.Int32
}

// ghosts counts them, for their identities: numbers that file systems do not give.
var ghosts atomic.Uint64

func newGhost(dir p9.Node, mode uint32) p9.Node {
	g := &ghost{parent: dir.Clone(), qid: p9.QID{Version: 1, Path: 1<<63 | ghosts.Add(1)}, mode: mode & unix.S_IFMT}
	switch g.mode {
	case unix.S_IFDIR:
		g.qid.Type = p9.QTDir
	case unix.S_IFLNK:
		g.qid.Type = p9.QTSymlink
	}
	g.refs.Store(1)
	return g
}

func (g *ghost) QID() p9.QID     { return g.qid }
func (g *ghost) Parent() p9.Node { return g.parent.Clone() }

func (g *ghost) Clone() p9.Node {
	g.refs.Add(1)
	return g
}

func (g *ghost) Close() {
	if g.refs.Add(-1) == 0 {
		g.parent.Close()
	}
}

func (g *ghost) GetAttr(p9.AttrMask) (p9.Attr, error) {
	return p9.Attr{Valid: p9.AttrBasic, QID: g.qid, Mode: g.mode | 0o600, Nlink: 1, Blksize: 4096}, nil
}

func (g *ghost) Walk(string) (p9.Node, error)           { return nil, unix.ENOENT }
func (g *ghost) SetAttr(p9.SetAttr) error               { return unix.ENOENT }
func (g *ghost) Statfs() (p9.Statfs, error)             { return p9.Statfs{}, unix.ENOENT }
func (g *ghost) Open(uint32) (p9.Handle, error)         { return nil, unix.ENOENT }
func (g *ghost) Readlink() (string, error)              { return "", unix.ENOENT }
func (g *ghost) Link(string, p9.Node) error             { return unix.ENOENT }
func (g *ghost) UnlinkAt(string, uint32) error          { return unix.ENOENT }
func (g *ghost) Rename(p9.Node, string) error           { return unix.ENOENT }
func (g *ghost) Remove() error                          { return unix.ENOENT }
func (g *ghost) Xattr(string) ([]byte, error)           { return nil, unix.ENOENT }
func (g *ghost) SetXattr(string, []byte, int) error     { return unix.ENOENT }
func (g *ghost) RenameAt(string, p9.Node, string) error { return unix.ENOENT }

func (g *ghost) Create(string, uint32, uint32, uint32) (p9.Node, p9.Handle, error) {
	return nil, nil, unix.ENOENT
}

func (g *ghost) Mkdir(string, uint32, uint32) (p9.QID, error) { return p9.QID{}, unix.ENOENT }

func (g *ghost) Mknod(string, uint32, uint32, uint32, uint32) (p9.QID, error) {
	return p9.QID{}, unix.ENOENT
}

func (g *ghost) Symlink(string, string, uint32) (p9.QID, error) { return p9.QID{}, unix.ENOENT }
