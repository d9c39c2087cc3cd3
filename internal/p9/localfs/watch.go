package localfs

import (
	"container/list"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/wsl2/wsl2/internal/p9"
	"github.com/wsl2/wsl2/internal/p9/replay"
)

// Watch tells of changes that other processes make in directories that clients know: those
// that were looked up last. fanotify(7) is what tells them from our own; it needs no privileges, but Linux 5.17.
type Watch struct {
	fs   *FS
	f    *os.File // the fanotify group
	max  int
	full func()

	mu    sync.Mutex
	nodes map[uint64]int           // how many nodes clients have of a directory, by QID.Path; guarded by mu
	order *list.List               // of *watched, the one looked up last first; guarded by mu
	dirs  map[uint64]*list.Element // by QID.Path; guarded by mu
	byID  map[string]*list.Element // by what events call them; guarded by mu
}

// watched has a node of its own, which holds no directory above and is none of the clients'.
type watched struct {
	n  *inode
	id string
}

// watchMask are the events: of entries, so of directories also what happens to their files.
const watchMask = unix.FAN_CREATE | unix.FAN_DELETE | unix.FAN_RENAME | unix.FAN_MODIFY | unix.FAN_ATTRIB | unix.FAN_CLOSE_WRITE |
	unix.FAN_EVENT_ON_CHILD | unix.FAN_ONDIR

// Watch has the FS watch at most limit directories, two at least, until no client knows them. It is called before the FS is served, which Run
// ends. full is called whenever one that is known is no longer watched.
func (fs *FS) Watch(limit int, full func()) (*Watch, error) {
	fd, err := unix.FanotifyInit(unix.FAN_CLASS_NOTIF|unix.FAN_REPORT_DFID_NAME|unix.FAN_CLOEXEC|unix.FAN_NONBLOCK, unix.O_RDONLY|unix.O_CLOEXEC)
	if err != nil {
		return nil, os.NewSyscallError("fanotify_init", err)
	}
	w := &Watch{fs: fs, f: os.NewFile(uintptr(fd), "fanotify"), max: limit, full: full,
		nodes: map[uint64]int{}, order: list.New(), dirs: map[uint64]*list.Element{}, byID: map[string]*list.Element{}}
	if err := w.insert(fs.root); err != nil {
		w.f.Close()
		return nil, fmt.Errorf("fanotify: %w", err)
	}
	fs.watch = w
	return w, nil
}

// add watches a directory of which a client gets a node. One that cannot be watched is not.
func (w *Watch) add(n *inode) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.nodes[n.qid.Path]++
	if e := w.dirs[n.qid.Path]; e != nil {
		w.order.MoveToFront(e)
		return
	}
	if w.max == 0 { // closed
		return
	}
	if w.order.Len() >= w.max {
		if w.order.Back().Value.(*watched).n.qid.Path == w.fs.root.qid.Path { // which nobody looks up
			w.order.MoveToFront(w.order.Back())
		}
		w.remove(w.order.Back())
		w.full()
	}
	w.insert(n) //nolint:errcheck // its file system may have no handles, or the user may not read it
}

// forget is called when a client gives a node of a directory back.
func (w *Watch) forget(dir uint64) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.nodes[dir]--; w.nodes[dir] > 0 {
		return
	}
	delete(w.nodes, dir)
	if e := w.dirs[dir]; e != nil && dir != w.fs.root.qid.Path {
		w.remove(e)
	}
}

// insert watches a directory. Preconditions: mu is held.
func (w *Watch) insert(n *inode) error {
	id, err := identify(n.fd)
	if err != nil {
		return err
	}
	fd, err := unix.FcntlInt(uintptr(n.fd), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		return os.NewSyscallError("fcntl", err)
	}
	own := &inode{fs: n.fs, fd: fd, mode: n.mode, dev: n.dev, qid: n.qid, refs: 1}
	if err := w.mark(unix.FAN_MARK_ADD, own); err != nil {
		own.Close()
		return err
	}
	e := w.order.PushFront(&watched{own, id})
	w.dirs[n.qid.Path], w.byID[id] = e, e
	return nil
}

func (w *Watch) mark(how uint, n *inode) error {
	raw, err := w.f.SyscallConn()
	if err != nil {
		return err
	}
	cerr := raw.Control(func(fd uintptr) {
		err = unix.FanotifyMark(int(fd), how|unix.FAN_MARK_ONLYDIR, watchMask, unix.AT_FDCWD, n.magic())
	})
	return errors.Join(cerr, err)
}

// remove no longer watches. Preconditions: mu is held.
func (w *Watch) remove(e *list.Element) {
	d := w.order.Remove(e).(*watched)
	delete(w.dirs, d.n.qid.Path)
	delete(w.byID, d.id)
	w.mark(unix.FAN_MARK_REMOVE, d.n) //nolint:errcheck // it may be gone
	d.n.Close()
}

// identify returns what events call a directory: its file system's ID, and the handle's type and bytes.
func identify(fd int) (string, error) {
	var st unix.Statfs_t
	if err := unix.Fstatfs(fd, &st); err != nil {
		return "", os.NewSyscallError("fstatfs", err)
	}
	h, _, err := unix.NameToHandleAt(fd, "", unix.AT_EMPTY_PATH)
	if err != nil {
		return "", os.NewSyscallError("name_to_handle_at", err)
	}
	b := binary.NativeEndian.AppendUint32(nil, uint32(st.Fsid.Val[0]))
	b = binary.NativeEndian.AppendUint32(b, uint32(st.Fsid.Val[1]))
	b = binary.NativeEndian.AppendUint32(b, uint32(h.Size()))
	b = binary.NativeEndian.AppendUint32(b, uint32(h.Type()))
	return string(append(b, h.Bytes()...)), nil
}

// Covers tells whether changes of a node are told, of a directory also those of its entries. Those of other file systems,
// mounted beneath the root, may go away with their mounts.
func (w *Watch) Covers(n p9.Node) bool {
	i, ok := n.(*inode)
	if !ok || i.dev != w.fs.dev {
		return false
	}
	i.mu.Lock()
	parent := i.parent
	i.mu.Unlock()
	if parent == nil { // the root, which tells of itself
		parent = i
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.dirs[parent.qid.Path] != nil && (i.mode&unix.S_IFMT != unix.S_IFDIR || w.dirs[i.qid.Path] != nil)
}

// lookup returns a watched directory with a reference, or nil.
func (w *Watch) lookup(id string) *inode {
	w.mu.Lock()
	defer w.mu.Unlock()
	if e := w.byID[id]; e != nil {
		return e.Value.(*watched).n.Clone().(*inode)
	}
	return nil
}

// Walk returns the entry of a watched directory.
func (w *Watch) Walk(dir uint64, name string) (p9.Node, error) {
	n := w.known(dir)
	if n == nil {
		return nil, unix.ESTALE
	}
	defer n.Close()
	return n.Walk(name)
}

// known returns a watched directory with a reference, or nil.
func (w *Watch) known(dir uint64) *inode {
	w.mu.Lock()
	defer w.mu.Unlock()
	if e := w.dirs[dir]; e != nil {
		return e.Value.(*watched).n.Clone().(*inode)
	}
	return nil
}

// Path returns the path of a watched directory from the root, "." for the root itself.
func (w *Watch) Path(dir uint64) (string, error) {
	n := w.known(dir)
	if n == nil {
		return "", unix.ESTALE
	}
	defer n.Close()
	root, err := os.Readlink(w.fs.root.magic())
	if err != nil {
		return "", err
	}
	path, err := os.Readlink(n.magic())
	if err != nil {
		return "", err
	}
	rel, err := filepath.Rel(root, path)
	if err != nil || !filepath.IsLocal(rel) {
		return "", unix.ESTALE
	}
	return rel, nil
}

// ownPause is how long our own changes are left to gather, before they are thrown away
// together: each would wake us, beside the request that made it.
const ownPause = 10 * time.Millisecond

// Run calls tell with each change, one at a time, until ctx ends. lost is called when changes came too fast, and some are not told.
func (w *Watch) Run(ctx context.Context, tell func(*replay.Change), lost func()) error {
	defer w.close()
	stop := context.AfterFunc(ctx, func() { w.f.Close() })
	defer stop()
	buf := make([]byte, 64<<10)
	for {
		n, err := w.f.Read(buf)
		if err != nil {
			if ctx.Err() != nil {
				return nil
			}
			return fmt.Errorf("fanotify: %w", err)
		}
		own := true
		for b := buf[:n]; len(b) > 0; {
			var e event
			if b, err = e.parse(b); err != nil {
				return err
			}
			switch {
			case e.mask&unix.FAN_Q_OVERFLOW != 0:
				lost()
			case int(e.pid) != os.Getpid():
				own = false
				w.changes(&e, tell)
			}
		}
		if own {
			timer := time.NewTimer(ownPause)
			select {
			case <-timer.C:
			case <-ctx.Done():
				timer.Stop()
			}
		}
	}
}

// close ends all. Nothing is served any more, or nobody watched.
func (w *Watch) close() {
	w.f.Close()
	w.mu.Lock()
	defer w.mu.Unlock()
	for w.order.Len() > 0 {
		w.remove(w.order.Back())
	}
	w.max = 0
}

// changes tells what an event means: the kernel merges those of an entry that were not read yet.
func (w *Watch) changes(e *event, tell func(*replay.Change)) {
	if e.mask&unix.FAN_RENAME != 0 {
		w.renamed(e, tell)
		return
	}
	dir := w.lookup(e.dir)
	if dir == nil { // it is forgotten
		return
	}
	defer dir.Close()
	if e.name == "." || e.name == "" { // the directory itself, of which that above it tells
		if e.mask&unix.FAN_ATTRIB != 0 && dir.qid.Path == w.fs.root.qid.Path {
			tell(&replay.Change{Kind: replay.Attributes, Dir: dir.qid.Path, Name: ".", Mode: unix.S_IFDIR})
		}
		return
	}
	c := replay.Change{Dir: dir.qid.Path, Name: e.name, Mode: e.kind()}
	var st unix.Stat_t
	there := unix.Fstatat(dir.fd, e.name, &st, unix.AT_SYMLINK_NOFOLLOW) == nil
	does := func(mask uint64, kind replay.Kind) {
		if e.mask&mask != 0 {
			change := c
			change.Kind = kind
			tell(&change)
		}
	}
	does(unix.FAN_DELETE, replay.Removed) // also if it was made: one may have been there before
	if !there {
		return
	}
	c.Mode = st.Mode
	does(unix.FAN_CREATE, replay.Created)
	does(unix.FAN_MODIFY, replay.Modified)
	does(unix.FAN_ATTRIB, replay.Attributes)
	does(unix.FAN_CLOSE_WRITE, replay.Written)
}

// renamed tells of a rename: to who knows one of the directories only, a file has come or gone.
func (w *Watch) renamed(e *event, tell func(*replay.Change)) {
	from, to := w.lookup(e.dir), w.lookup(e.newDir)
	c := replay.Change{Mode: e.kind()}
	if from != nil {
		defer from.Close()
		c.Kind, c.Dir, c.Name = replay.Removed, from.qid.Path, e.name
	}
	if to != nil {
		defer to.Close()
		var st unix.Stat_t
		switch err := unix.Fstatat(to.fd, e.newName, &st, unix.AT_SYMLINK_NOFOLLOW); {
		case err != nil: // gone again
		case from != nil:
			c.Kind, c.NewDir, c.NewName, c.Mode = replay.Renamed, to.qid.Path, e.newName, st.Mode
		default:
			c.Kind, c.Dir, c.Name, c.Mode = replay.Created, to.qid.Path, e.newName, st.Mode
		}
	}
	if c.Kind != 0 {
		tell(&c)
	}
	if c.Kind == replay.Created && c.Mode&unix.S_IFMT == unix.S_IFREG { // whole: what waits for that has no other sign of it
		c.Kind = replay.Written
		tell(&c)
	}
	var st unix.Stat_t
	if from != nil && unix.Fstatat(from.fd, e.name, &st, unix.AT_SYMLINK_NOFOLLOW) == nil { // the kernel may have told of it already, with what was there before
		tell(&replay.Change{Kind: replay.Created, Dir: from.qid.Path, Name: e.name, Mode: st.Mode})
	}
}

// event is one of fanotify's.
type event struct {
	mask            uint64
	pid             int32
	dir, name       string // of FAN_RENAME the old ones
	newDir, newName string
}

// kind is what an event tells of the type of a file.
func (e *event) kind() uint32 {
	if e.mask&unix.FAN_ONDIR != 0 {
		return unix.S_IFDIR
	}
	return unix.S_IFREG
}

// The layout of events (include/uapi/linux/fanotify.h): metadata, and a record behind it for each
// directory: type[1] pad[1] length[2] fsid[8], the handle's length[4] type[4] bytes, and the name.
const (
	eventHeader  = 24
	recordHeader = 4
	recordHandle = recordHeader + 8
)

var errEvent = errors.New("fanotify: an event that is none")

// parse reads the first of events, and returns the rest.
func (e *event) parse(b []byte) ([]byte, error) {
	if len(b) < eventHeader {
		return nil, errEvent
	}
	length, header := int(binary.NativeEndian.Uint32(b)), int(binary.NativeEndian.Uint16(b[6:]))
	if b[4] != unix.FANOTIFY_METADATA_VERSION || header < eventHeader || length < header || length > len(b) {
		return nil, errEvent
	}
	*e = event{mask: binary.NativeEndian.Uint64(b[8:]), pid: int32(binary.NativeEndian.Uint32(b[20:]))}
	for r := b[header:length]; len(r) >= recordHandle+8; {
		n := int(binary.NativeEndian.Uint16(r[2:]))
		if n < recordHandle+8 || n > len(r) {
			return nil, errEvent
		}
		handle := int(binary.NativeEndian.Uint32(r[recordHandle:]))
		if handle > n-recordHandle-8 {
			return nil, errEvent
		}
		end := recordHandle + 8 + handle
		id := string(r[recordHeader:end])
		name, _, _ := strings.Cut(string(r[end:n]), "\x00")
		switch r[0] {
		case unix.FAN_EVENT_INFO_TYPE_DFID_NAME, unix.FAN_EVENT_INFO_TYPE_OLD_DFID_NAME:
			e.dir, e.name = id, name
		case unix.FAN_EVENT_INFO_TYPE_NEW_DFID_NAME:
			e.newDir, e.newName = id, name
		}
		r = r[n:]
	}
	return b[length:], nil
}
