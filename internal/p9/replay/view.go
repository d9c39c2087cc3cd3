package replay

import (
	"golang.org/x/sys/unix"

	"github.com/wsl2/wsl2/internal/p9"
)

// FS returns fs, with the stage's view for UID.
func FS(fs p9.FS, s *Stage) p9.FS { return attacher{fs, s} }

type attacher struct {
	p9.FS
	stage *Stage
}

func (a attacher) Attach(uname, aname string, uid uint32) (p9.Node, error) {
	n, err := a.FS.Attach(uname, aname, uid)
	if err == nil && uid == UID {
		n = &view{n, a.stage}
	}
	return n, err
}

// view is a node as UID sees it, who changes nothing.
type view struct {
	p9.Node
	stage *Stage
}

func (v *view) Walk(name string) (p9.Node, error) {
	n, err := v.stage.Walk(v.Node, name, nil)
	if err != nil {
		return nil, err
	}
	return &view{n, v.stage}, nil
}

func (v *view) Parent() p9.Node { return &view{v.Node.Parent(), v.stage} }

func (v *view) Clone() p9.Node { return &view{v.Node.Clone(), v.stage} }

func (v *view) made(name string) (p9.QID, error) {
	if err := v.stage.Done(Change{Kind: Created, Dir: v.QID().Path, Name: name}); err != nil {
		return p9.QID{}, err
	}
	n, err := v.Node.Walk(name)
	if err != nil {
		return p9.QID{}, err
	}
	defer n.Close()
	return n.QID(), nil
}

func (v *view) Mkdir(name string, _, _ uint32) (p9.QID, error)       { return v.made(name) }
func (v *view) Mknod(name string, _, _, _, _ uint32) (p9.QID, error) { return v.made(name) }
func (v *view) Symlink(name, _ string, _ uint32) (p9.QID, error)     { return v.made(name) }

func (v *view) UnlinkAt(name string, _ uint32) error {
	return v.stage.Done(Change{Kind: Removed, Dir: v.QID().Path, Name: name})
}

func (v *view) RenameAt(oldName string, newDir p9.Node, newName string) error {
	return v.stage.Done(Change{Kind: Renamed, Dir: v.QID().Path, Name: oldName, NewDir: newDir.QID().Path, NewName: newName})
}

func (v *view) SetAttr(p9.SetAttr) error { return nil }

func (v *view) Open(flags uint32) (p9.Handle, error) { return v.Node.Open(ReadOnly(flags)) }

// ReadOnly are the flags with which UID's open(2) for writing opens here.
func ReadOnly(flags uint32) uint32 {
	return flags &^ (unix.O_ACCMODE | unix.O_TRUNC | unix.O_APPEND)
}

func (v *view) Create(string, uint32, uint32, uint32) (p9.Node, p9.Handle, error) {
	return nil, nil, unix.EROFS
}

func (v *view) Link(string, p9.Node) error         { return unix.EROFS }
func (v *view) Rename(p9.Node, string) error       { return unix.EROFS }
func (v *view) Remove() error                      { return unix.EROFS }
func (v *view) SetXattr(string, []byte, int) error { return unix.EROFS }
