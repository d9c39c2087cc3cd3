package p9

// The messages, each with the pair of functions for its body, fields in the order
// of the struct. Messages of the same shape share a type that has its own Kind.

// newMessage returns an empty message of type t, or nil.
func newMessage(t Type) Message {
	switch t {
	case RLerror:
		return new(Rlerror)
	case TClunk, TRemove, TReadlink, TStatfs:
		return &Tfid{Kind: t}
	case TClunk + 1, TRemove + 1, TFlush + 1, TRename + 1, TRenameat + 1, TUnlinkat + 1, TLink + 1,
		TSetattr + 1, TFsync + 1, TXattrcreate + 1:
		return &Rok{Kind: t}
	case TAttach + 1, TSymlink + 1, TMknod + 1, TMkdir + 1:
		return &Rqid{Kind: t}
	case TLopen + 1, TLcreate + 1:
		return &Ropen{Kind: t}
	case TStatfs + 1:
		return new(Rstatfs)
	case TLopen:
		return new(Tlopen)
	case TLcreate:
		return new(Tlcreate)
	case TSymlink:
		return new(Tsymlink)
	case TMknod:
		return new(Tmknod)
	case TRename:
		return new(Trename)
	case TReadlink + 1:
		return new(Rreadlink)
	case TGetattr:
		return new(Tgetattr)
	case TGetattr + 1:
		return new(Rgetattr)
	case TSetattr:
		return new(Tsetattr)
	case TXattrwalk:
		return new(Txattrwalk)
	case TXattrwalk + 1:
		return new(Rxattrwalk)
	case TXattrcreate:
		return new(Txattrcreate)
	case TRead, TReaddir:
		return &Tread{Kind: t}
	case TRead + 1, TReaddir + 1:
		return &Rread{Kind: t}
	case TFsync:
		return new(Tfsync)
	case TLock:
		return new(Tlock)
	case TLock + 1:
		return new(Rlock)
	case TGetlock:
		return new(Tgetlock)
	case TGetlock + 1:
		return new(Rgetlock)
	case TLink:
		return new(Tlink)
	case TMkdir:
		return new(Tmkdir)
	case TRenameat:
		return new(Trenameat)
	case TUnlinkat:
		return new(Tunlinkat)
	case TVersion, TVersion + 1:
		return &Mversion{Kind: t}
	case TAuth:
		return new(Tauth)
	case TAttach:
		return new(Tattach)
	case TFlush:
		return new(Tflush)
	case TWalk:
		return new(Twalk)
	case TWalk + 1:
		return new(Rwalk)
	case TWrite:
		return new(Twrite)
	case TWrite + 1:
		return new(Rwrite)
	}
	return nil
}

// Rlerror answers a request that failed.
type Rlerror struct{ Errno uint32 }

func (*Rlerror) Type() Type                   { return RLerror }
func (m *Rlerror) appendBody(b []byte) []byte { return appendU32(b, m.Errno) }
func (m *Rlerror) readBody(d *decoder)        { m.Errno = d.u32() }

// Tfid is Tclunk, Tremove, Treadlink and Tstatfs.
type Tfid struct {
	Kind Type
	FID  FID
}

func (m *Tfid) Type() Type                 { return m.Kind }
func (m *Tfid) appendBody(b []byte) []byte { return appendFID(b, m.FID) }
func (m *Tfid) readBody(d *decoder)        { m.FID = d.fid() }

// Rok is an answer without a body.
type Rok struct{ Kind Type }

func (m *Rok) Type() Type                 { return m.Kind }
func (m *Rok) appendBody(b []byte) []byte { return b }
func (m *Rok) readBody(*decoder)          {}

// Rqid is Rattach, Rsymlink, Rmknod and Rmkdir.
type Rqid struct {
	Kind Type
	QID  QID
}

func (m *Rqid) Type() Type                 { return m.Kind }
func (m *Rqid) appendBody(b []byte) []byte { return appendQID(b, m.QID) }
func (m *Rqid) readBody(d *decoder)        { m.QID = d.qid() }

// Ropen is Rlopen and Rlcreate. IOUnit 0 leaves the size of reads and writes to msize.
type Ropen struct {
	Kind   Type
	QID    QID
	IOUnit uint32
}

func (m *Ropen) Type() Type                 { return m.Kind }
func (m *Ropen) appendBody(b []byte) []byte { return appendU32(appendQID(b, m.QID), m.IOUnit) }
func (m *Ropen) readBody(d *decoder)        { m.QID, m.IOUnit = d.qid(), d.u32() }

// Mversion is Tversion and Rversion.
type Mversion struct {
	Kind    Type
	Msize   uint32
	Version string
}

func (m *Mversion) Type() Type                 { return m.Kind }
func (m *Mversion) appendBody(b []byte) []byte { return appendString(appendU32(b, m.Msize), m.Version) }
func (m *Mversion) readBody(d *decoder)        { m.Msize, m.Version = d.u32(), d.string() }

// Tauth asks for authentication; it is always refused.
type Tauth struct {
	AFID         FID
	Uname, Aname string
	UID          uint32
}

func (*Tauth) Type() Type { return TAuth }

func (m *Tauth) appendBody(b []byte) []byte {
	return appendU32(appendString(appendString(appendFID(b, m.AFID), m.Uname), m.Aname), m.UID)
}

func (m *Tauth) readBody(d *decoder) {
	m.AFID, m.Uname, m.Aname, m.UID = d.fid(), d.string(), d.string(), d.u32()
}

// Tattach makes FID stand for the root of the tree Aname.
type Tattach struct {
	FID, AFID    FID
	Uname, Aname string
	UID          uint32
}

func (*Tattach) Type() Type { return TAttach }

func (m *Tattach) appendBody(b []byte) []byte {
	b = appendFID(appendFID(b, m.FID), m.AFID)
	return appendU32(appendString(appendString(b, m.Uname), m.Aname), m.UID)
}

func (m *Tattach) readBody(d *decoder) {
	m.FID, m.AFID, m.Uname, m.Aname, m.UID = d.fid(), d.fid(), d.string(), d.string(), d.u32()
}

// Tflush takes a request back.
type Tflush struct{ Old Tag }

func (*Tflush) Type() Type                   { return TFlush }
func (m *Tflush) appendBody(b []byte) []byte { return appendU16(b, uint16(m.Old)) }
func (m *Tflush) readBody(d *decoder)        { m.Old = Tag(d.u16()) }

// Twalk makes NewFID stand for what Names lead to from FID.
type Twalk struct {
	FID, NewFID FID
	Names       []string
}

func (*Twalk) Type() Type { return TWalk }

func (m *Twalk) appendBody(b []byte) []byte {
	b = appendU16(appendFID(appendFID(b, m.FID), m.NewFID), uint16(len(m.Names)))
	for _, name := range m.Names {
		b = appendString(b, name)
	}
	return b
}

func (m *Twalk) readBody(d *decoder) {
	m.FID, m.NewFID = d.fid(), d.fid()
	n := int(d.u16())
	if n > maxWalk {
		d.b, d.err = nil, true
		return
	}
	for range n {
		m.Names = append(m.Names, d.string())
	}
}

// Rwalk has the QIDs of the names that were there.
type Rwalk struct{ QIDs []QID }

func (*Rwalk) Type() Type { return TWalk + 1 }

func (m *Rwalk) appendBody(b []byte) []byte {
	b = appendU16(b, uint16(len(m.QIDs)))
	for _, q := range m.QIDs {
		b = appendQID(b, q)
	}
	return b
}

func (m *Rwalk) readBody(d *decoder) {
	n := int(d.u16())
	if n > maxWalk {
		d.b, d.err = nil, true
		return
	}
	for range n {
		m.QIDs = append(m.QIDs, d.qid())
	}
}

// Tlopen opens FID.
type Tlopen struct {
	FID   FID
	Flags uint32
}

func (*Tlopen) Type() Type                   { return TLopen }
func (m *Tlopen) appendBody(b []byte) []byte { return appendU32(appendFID(b, m.FID), m.Flags) }
func (m *Tlopen) readBody(d *decoder)        { m.FID, m.Flags = d.fid(), d.u32() }

// Tlcreate makes and opens a file in FID, which stands for it afterwards.
type Tlcreate struct {
	FID              FID
	Name             string
	Flags, Mode, GID uint32
}

func (*Tlcreate) Type() Type { return TLcreate }

func (m *Tlcreate) appendBody(b []byte) []byte {
	b = appendString(appendFID(b, m.FID), m.Name)
	return appendU32(appendU32(appendU32(b, m.Flags), m.Mode), m.GID)
}

func (m *Tlcreate) readBody(d *decoder) {
	m.FID, m.Name, m.Flags, m.Mode, m.GID = d.fid(), d.string(), d.u32(), d.u32(), d.u32()
}

// Tsymlink makes a symbolic link.
type Tsymlink struct {
	Dir          FID
	Name, Target string
	GID          uint32
}

func (*Tsymlink) Type() Type { return TSymlink }

func (m *Tsymlink) appendBody(b []byte) []byte {
	return appendU32(appendString(appendString(appendFID(b, m.Dir), m.Name), m.Target), m.GID)
}

func (m *Tsymlink) readBody(d *decoder) {
	m.Dir, m.Name, m.Target, m.GID = d.fid(), d.string(), d.string(), d.u32()
}

// Tmknod makes a node: a FIFO, a socket, a device.
type Tmknod struct {
	Dir                     FID
	Name                    string
	Mode, Major, Minor, GID uint32
}

func (*Tmknod) Type() Type { return TMknod }

func (m *Tmknod) appendBody(b []byte) []byte {
	b = appendString(appendFID(b, m.Dir), m.Name)
	return appendU32(appendU32(appendU32(appendU32(b, m.Mode), m.Major), m.Minor), m.GID)
}

func (m *Tmknod) readBody(d *decoder) {
	m.Dir, m.Name, m.Mode, m.Major, m.Minor, m.GID = d.fid(), d.string(), d.u32(), d.u32(), d.u32(), d.u32()
}

// Tmkdir makes a directory.
type Tmkdir struct {
	Dir       FID
	Name      string
	Mode, GID uint32
}

func (*Tmkdir) Type() Type { return TMkdir }

func (m *Tmkdir) appendBody(b []byte) []byte {
	return appendU32(appendU32(appendString(appendFID(b, m.Dir), m.Name), m.Mode), m.GID)
}

func (m *Tmkdir) readBody(d *decoder) {
	m.Dir, m.Name, m.Mode, m.GID = d.fid(), d.string(), d.u32(), d.u32()
}

// Trename moves FID.
type Trename struct {
	FID, Dir FID
	Name     string
}

func (*Trename) Type() Type { return TRename }

func (m *Trename) appendBody(b []byte) []byte {
	return appendString(appendFID(appendFID(b, m.FID), m.Dir), m.Name)
}

func (m *Trename) readBody(d *decoder) { m.FID, m.Dir, m.Name = d.fid(), d.fid(), d.string() }

// Trenameat moves an entry.
type Trenameat struct {
	OldDir  FID
	OldName string
	NewDir  FID
	NewName string
}

func (*Trenameat) Type() Type { return TRenameat }

func (m *Trenameat) appendBody(b []byte) []byte {
	b = appendString(appendFID(b, m.OldDir), m.OldName)
	return appendString(appendFID(b, m.NewDir), m.NewName)
}

func (m *Trenameat) readBody(d *decoder) {
	m.OldDir, m.OldName, m.NewDir, m.NewName = d.fid(), d.string(), d.fid(), d.string()
}

// Tunlinkat removes an entry.
type Tunlinkat struct {
	Dir   FID
	Name  string
	Flags uint32
}

func (*Tunlinkat) Type() Type { return TUnlinkat }

func (m *Tunlinkat) appendBody(b []byte) []byte {
	return appendU32(appendString(appendFID(b, m.Dir), m.Name), m.Flags)
}

func (m *Tunlinkat) readBody(d *decoder) { m.Dir, m.Name, m.Flags = d.fid(), d.string(), d.u32() }

// Tlink makes a hard link to FID.
type Tlink struct {
	Dir, FID FID
	Name     string
}

func (*Tlink) Type() Type { return TLink }

func (m *Tlink) appendBody(b []byte) []byte {
	return appendString(appendFID(appendFID(b, m.Dir), m.FID), m.Name)
}

func (m *Tlink) readBody(d *decoder) { m.Dir, m.FID, m.Name = d.fid(), d.fid(), d.string() }

// Rreadlink has a symbolic link's target.
type Rreadlink struct{ Target string }

func (*Rreadlink) Type() Type                   { return TReadlink + 1 }
func (m *Rreadlink) appendBody(b []byte) []byte { return appendString(b, m.Target) }
func (m *Rreadlink) readBody(d *decoder)        { m.Target = d.string() }

// Tgetattr asks for attributes.
type Tgetattr struct {
	FID  FID
	Mask AttrMask
}

func (*Tgetattr) Type() Type                   { return TGetattr }
func (m *Tgetattr) appendBody(b []byte) []byte { return appendU64(appendFID(b, m.FID), uint64(m.Mask)) }
func (m *Tgetattr) readBody(d *decoder)        { m.FID, m.Mask = d.fid(), AttrMask(d.u64()) }

// Rgetattr has attributes.
type Rgetattr struct{ Attr Attr }

func (*Rgetattr) Type() Type { return TGetattr + 1 }

func (m *Rgetattr) appendBody(b []byte) []byte {
	a := &m.Attr
	b = appendQID(appendU64(b, uint64(a.Valid)), a.QID)
	b = appendU32(appendU32(appendU32(b, a.Mode), a.UID), a.GID)
	for _, v := range [...]uint64{a.Nlink, a.Rdev, a.Size, a.Blksize, a.Blocks} {
		b = appendU64(b, v)
	}
	for _, t := range [...]Time{a.Atime, a.Mtime, a.Ctime, a.Btime} {
		b = appendTime(b, t)
	}
	return appendU64(appendU64(b, a.Gen), a.DataVersion)
}

func (m *Rgetattr) readBody(d *decoder) {
	a := &m.Attr
	a.Valid, a.QID = AttrMask(d.u64()), d.qid()
	a.Mode, a.UID, a.GID = d.u32(), d.u32(), d.u32()
	a.Nlink, a.Rdev, a.Size, a.Blksize, a.Blocks = d.u64(), d.u64(), d.u64(), d.u64(), d.u64()
	a.Atime, a.Mtime, a.Ctime, a.Btime = d.time(), d.time(), d.time(), d.time()
	a.Gen, a.DataVersion = d.u64(), d.u64()
}

// Tsetattr sets attributes.
type Tsetattr struct {
	FID  FID
	Attr SetAttr
}

func (*Tsetattr) Type() Type { return TSetattr }

func (m *Tsetattr) appendBody(b []byte) []byte {
	a := &m.Attr
	b = appendU32(appendFID(b, m.FID), uint32(a.Valid))
	b = appendU32(appendU32(appendU32(b, a.Mode), a.UID), a.GID)
	return appendTime(appendTime(appendU64(b, a.Size), a.Atime), a.Mtime)
}

func (m *Tsetattr) readBody(d *decoder) {
	a := &m.Attr
	m.FID, a.Valid = d.fid(), SetMask(d.u32())
	a.Mode, a.UID, a.GID = d.u32(), d.u32(), d.u32()
	a.Size, a.Atime, a.Mtime = d.u64(), d.time(), d.time()
}

// Rstatfs answers Tstatfs.
type Rstatfs struct{ Statfs Statfs }

func (*Rstatfs) Type() Type { return TStatfs + 1 }

func (m *Rstatfs) appendBody(b []byte) []byte {
	s := &m.Statfs
	b = appendU32(appendU32(b, s.Type), s.Bsize)
	for _, v := range [...]uint64{s.Blocks, s.Bfree, s.Bavail, s.Files, s.Ffree, s.Fsid} {
		b = appendU64(b, v)
	}
	return appendU32(b, s.Namelen)
}

func (m *Rstatfs) readBody(d *decoder) {
	s := &m.Statfs
	s.Type, s.Bsize = d.u32(), d.u32()
	s.Blocks, s.Bfree, s.Bavail, s.Files, s.Ffree, s.Fsid = d.u64(), d.u64(), d.u64(), d.u64(), d.u64(), d.u64()
	s.Namelen = d.u32()
}

// Txattrwalk makes NewFID stand for the value of an extended attribute, or, with
// no Name, for the list of names, each ended by NUL. It is read with Tread.
type Txattrwalk struct {
	FID, NewFID FID
	Name        string
}

func (*Txattrwalk) Type() Type { return TXattrwalk }

func (m *Txattrwalk) appendBody(b []byte) []byte {
	return appendString(appendFID(appendFID(b, m.FID), m.NewFID), m.Name)
}

func (m *Txattrwalk) readBody(d *decoder) { m.FID, m.NewFID, m.Name = d.fid(), d.fid(), d.string() }

// Rxattrwalk has the size of what can be read.
type Rxattrwalk struct{ Size uint64 }

func (*Rxattrwalk) Type() Type                   { return TXattrwalk + 1 }
func (m *Rxattrwalk) appendBody(b []byte) []byte { return appendU64(b, m.Size) }
func (m *Rxattrwalk) readBody(d *decoder)        { m.Size = d.u64() }

// Txattrcreate makes FID stand for an attribute to be written: Size bytes with
// Twrite; Tclunk sets it. Size 0 with XATTR_REPLACE removes it.
type Txattrcreate struct {
	FID   FID
	Name  string
	Size  uint64
	Flags uint32
}

func (*Txattrcreate) Type() Type { return TXattrcreate }

func (m *Txattrcreate) appendBody(b []byte) []byte {
	return appendU32(appendU64(appendString(appendFID(b, m.FID), m.Name), m.Size), m.Flags)
}

func (m *Txattrcreate) readBody(d *decoder) {
	m.FID, m.Name, m.Size, m.Flags = d.fid(), d.string(), d.u64(), d.u32()
}

// Tread is Tread and Treaddir.
type Tread struct {
	Kind   Type
	FID    FID
	Offset uint64
	Count  uint32
}

func (m *Tread) Type() Type { return m.Kind }

func (m *Tread) appendBody(b []byte) []byte {
	return appendU32(appendU64(appendFID(b, m.FID), m.Offset), m.Count)
}

func (m *Tread) readBody(d *decoder) { m.FID, m.Offset, m.Count = d.fid(), d.u64(), d.u32() }

// Rread is Rread and Rreaddir.
type Rread struct {
	Kind Type
	Data []byte
}

func (m *Rread) Type() Type                 { return m.Kind }
func (m *Rread) appendBody(b []byte) []byte { return appendData(b, m.Data) }
func (m *Rread) readBody(d *decoder)        { m.Data = d.data() }

// Twrite writes.
type Twrite struct {
	FID    FID
	Offset uint64
	Data   []byte
}

func (*Twrite) Type() Type { return TWrite }
func (m *Twrite) appendBody(b []byte) []byte {
	return appendData(appendU64(appendFID(b, m.FID), m.Offset), m.Data)
}
func (m *Twrite) readBody(d *decoder) { m.FID, m.Offset, m.Data = d.fid(), d.u64(), d.data() }

// Rwrite has the number of bytes written.
type Rwrite struct{ Count uint32 }

func (*Rwrite) Type() Type                   { return TWrite + 1 }
func (m *Rwrite) appendBody(b []byte) []byte { return appendU32(b, m.Count) }
func (m *Rwrite) readBody(d *decoder)        { m.Count = d.u32() }

// Tfsync writes a file back to its disk.
type Tfsync struct {
	FID      FID
	Datasync uint32
}

func (*Tfsync) Type() Type                   { return TFsync }
func (m *Tfsync) appendBody(b []byte) []byte { return appendU32(appendFID(b, m.FID), m.Datasync) }
func (m *Tfsync) readBody(d *decoder)        { m.FID, m.Datasync = d.fid(), d.u32() }

// Tlock takes or releases a lock.
type Tlock struct {
	FID   FID
	Flags uint32 // LockBlock, LockReclaim
	Lock  Lock
}

func (*Tlock) Type() Type { return TLock }

func (m *Tlock) appendBody(b []byte) []byte {
	l := &m.Lock
	b = appendU32(append(appendFID(b, m.FID), l.Type), m.Flags)
	return appendString(appendU32(appendU64(appendU64(b, l.Start), l.Length), l.ProcID), l.ClientID)
}

func (m *Tlock) readBody(d *decoder) {
	l := &m.Lock
	m.FID, l.Type, m.Flags = d.fid(), d.u8(), d.u32()
	l.Start, l.Length, l.ProcID, l.ClientID = d.u64(), d.u64(), d.u32(), d.string()
}

// Rlock answers Tlock.
type Rlock struct{ Status LockStatus }

func (*Rlock) Type() Type                   { return TLock + 1 }
func (m *Rlock) appendBody(b []byte) []byte { return append(b, byte(m.Status)) }
func (m *Rlock) readBody(d *decoder)        { m.Status = LockStatus(d.u8()) }

// Tgetlock asks for a lock that is in the way of Lock.
type Tgetlock struct {
	FID  FID
	Lock Lock
}

func (*Tgetlock) Type() Type                   { return TGetlock }
func (m *Tgetlock) appendBody(b []byte) []byte { return m.Lock.append(appendFID(b, m.FID)) }
func (m *Tgetlock) readBody(d *decoder)        { m.FID = d.fid(); m.Lock.read(d) }

// Rgetlock has that lock, or LockUnlock as its type.
type Rgetlock struct{ Lock Lock }

func (*Rgetlock) Type() Type                   { return TGetlock + 1 }
func (m *Rgetlock) appendBody(b []byte) []byte { return m.Lock.append(b) }
func (m *Rgetlock) readBody(d *decoder)        { m.Lock.read(d) }

func (l *Lock) append(b []byte) []byte {
	b = appendU64(appendU64(append(b, l.Type), l.Start), l.Length)
	return appendString(appendU32(b, l.ProcID), l.ClientID)
}

func (l *Lock) read(d *decoder) {
	l.Type, l.Start, l.Length, l.ProcID, l.ClientID = d.u8(), d.u64(), d.u64(), d.u32(), d.string()
}
